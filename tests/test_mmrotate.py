"""MMRotate: its config with UBN, the tools of this repository on it, and checkpoints of BatchNorm."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmubn import UBN
from mmubn.openmmlab.config_checks import check_norm_arguments, check_norm_types, check_norms_used

pytest.importorskip('mmrotate', reason='MMRotate is not installed')

from cli import metrics, tool
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from mmrotate.registry import MODELS
from mmrotate.structures.bbox import RotatedBoxes

CONFIG = Path(__file__).parents[1] / 'configs/rotated_retinanet'
CONFIG /= 'rotated-retinanet-rbox-le90_r50_fpn_ubn-backbone_1x_dota.py'
STOCK = 'mmrotate::rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py'
NARROW = {
    'model.backbone.init_cfg': None,
    'model.backbone.base_channels': 8,
    'model.neck.in_channels': [32, 64, 128, 256],
    'model.neck.out_channels': 16,
    'model.bbox_head.in_channels': 16,
    'model.bbox_head.feat_channels': 16,
}


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmrotate')


def build(norm='UBN', **options):
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(NARROW | {'model.backbone.norm_cfg.type': norm} | options)
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


def test_the_backbone_has_ubn_and_the_rest_is_mmrotate_s(tmp_path):
    (tmp_path / 'stock.py').write_text(f'_base_ = {STOCK!r}')
    cfg, stock = Config.fromfile(CONFIG), Config.fromfile(tmp_path / 'stock.py')
    check_norm_types(cfg)
    check_norm_arguments(cfg)
    model = build()
    check_norms_used(cfg, model)
    norms = [name for name, layer in model.named_modules() if isinstance(layer, UBN)]
    assert len(norms) == 53
    assert all(name.startswith('backbone.') for name in norms)
    cfg.model.backbone.norm_cfg = stock.model.backbone.norm_cfg
    assert cfg.to_dict() == stock.to_dict()


def test_a_checkpoint_of_batch_norm_is_read_exactly():
    source, model = randomize(build('BN'), 0.1).eval(), build().eval()
    model.load_state_dict(source.state_dict())
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outputs = [[each for level in net(image, mode='tensor') for each in level] for net in (source, model)]
    for expected, found in zip(*outputs, strict=True):
        assert expected.std() > 0
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_one_iteration_trains_the_norms():
    model = build(**{'model.backbone.norm_eval': False, 'model.backbone.frozen_stages': -1}).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), batch_input_shape=(64, 64)))
    boxes = RotatedBoxes(torch.tensor([[30.0, 30.0, 40.0, 20.0, 0.3]]))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([1]))
    data = model.data_preprocessor(dict(inputs=[torch.rand(3, 64, 64)] * 2, data_samples=[sample] * 2), training=True)
    losses = model(**data, mode='loss')
    assert losses.keys() == {'loss_cls', 'loss_bbox'}
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, UBN)}
    before = {name: layer.center_weight.clone() for name, layer in norms.items()}
    model.parse_losses(losses)[0].backward()
    optimizer.step()
    for name, layer in norms.items():
        assert not torch.equal(layer.center_weight, before[name]), name
        assert layer.num_batches_tracked == 1, name


@pytest.mark.slow
def test_the_tools_train_evaluate_and_draw(tmp_path):
    data = tmp_path / 'data' / 'trainval'
    for folder in ('images', 'annfiles'):
        (data / folder).mkdir(parents=True)
    for i in range(2):
        image = np.zeros((64, 64, 3), np.uint8)
        image[20:40, 10:50] = 200
        Image.fromarray(image).save(data / 'images' / f'{i}.png')
        (data / 'annfiles' / f'{i}.txt').write_text('10 20 50 20 50 40 10 40 plane 0\n')
    values = NARROW | {'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 2}  # MMRotate's mAP starts processes
    for split in ('train', 'val', 'test'):
        values |= {
            f'{split}_dataloader.dataset.data_root': f'{tmp_path}/data/',
            f'{split}_dataloader.num_workers': 0,
            f'{split}_dataloader.persistent_workers': False,
            f'{split}_dataloader.dataset.pipeline.{3 if split == "train" else 1}.scale': (64, 64),
        }
    arguments = ['--cfg-options', *(f'{key}={value}'.replace(' ', '') for key, value in values.items())]
    result = tool('train.py', CONFIG, '--work-dir', tmp_path / 'run', *arguments)
    assert result.returncode == 0, result.stdout
    checkpoint = tmp_path / 'run' / 'epoch_1.pth'
    result = tool('test.py', CONFIG, checkpoint, '--work-dir', tmp_path / 'test', '--show-dir', 'drawn', *arguments)
    assert result.returncode == 0, result.stdout
    assert 0 <= metrics(tmp_path / 'test')['dota/mAP'] <= 1
    assert len(list((tmp_path / 'test').glob('*/drawn/*.png'))) == 2
    result = tool('train.py', CONFIG, *arguments, 'model.bbox_head.num_classes=3')
    assert result.returncode == 2
    assert 'model.bbox_head.num_classes is 3, but the train data set (DOTADataset) has 15' in result.stdout
