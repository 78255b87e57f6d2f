"""MMSegmentation: its config with SyncUBN, the tools of this repository on it, and checkpoints of BatchNorm."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from PIL import Image
from torch import nn

import mmubn.openmmlab
from mmubn import SyncUBN
from mmubn.openmmlab.config_checks import check_norm_arguments, check_norm_types, check_norms_used

pytest.importorskip('mmseg', reason='MMSegmentation is not installed')

from cli import metrics, tool
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

CONFIG = Path(__file__).parents[1] / 'configs' / 'fcn' / 'fcn_r50-d8_syncubn_4xb2-40k_cityscapes-512x1024.py'
STOCK = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
NARROW = {
    'model.pretrained': None,
    'model.backbone.base_channels': 8,
    'model.backbone.stem_channels': 8,
    'model.decode_head.in_channels': 256,
    'model.decode_head.channels': 16,
    'model.auxiliary_head.in_channels': 128,
    'model.auxiliary_head.channels': 16,
    'model.data_preprocessor.size': (64, 64),
}


@pytest.fixture(autouse=True)
def _names():
    mmubn.openmmlab.install('config-packages')  # as the tools do
    init_default_scope('mmseg')


def load(norm='SyncUBN', **options):
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(options)
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        cfg.model[part].norm_cfg = ConfigDict(type=norm)
    return cfg


def build(norm):
    torch.manual_seed(0)
    return MODELS.build(load(norm, **NARROW).model)


def test_all_norms_are_syncubn_and_the_rest_is_mmsegmentation_s(tmp_path):
    (tmp_path / 'stock.py').write_text(f'_base_ = {STOCK!r}')
    cfg, stock = Config.fromfile(CONFIG), Config.fromfile(tmp_path / 'stock.py')
    check_norm_types(cfg)
    check_norm_arguments(cfg)
    with torch.device('meta'):
        model = MODELS.build(copy.deepcopy(cfg.model))
    check_norms_used(cfg, model)
    norms = [name.split('.')[0] for name, layer in model.named_modules() if isinstance(layer, SyncUBN)]
    assert {part: norms.count(part) for part in norms} == {'backbone': 55, 'decode_head': 3, 'auxiliary_head': 1}
    batch_norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert len(batch_norms) == len(norms)
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        cfg.model[part].norm_cfg = stock.model[part].norm_cfg
    cfg.norm_cfg = stock.norm_cfg
    assert cfg.to_dict() == stock.to_dict()


@pytest.mark.parametrize('norm', ['UBN', 'SyncUBN'])
def test_a_checkpoint_of_batch_norm_is_read_exactly(norm):
    source, model = randomize(build('BN'), 0.1).eval(), build(norm).eval()
    model.load_state_dict(source.state_dict())
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = source(image), model(image)
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_one_iteration_trains_all_norms():
    model = build('UBN')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, 64, 64)))
    data = model.data_preprocessor(dict(inputs=[torch.rand(3, 64, 64)] * 2, data_samples=[sample] * 2), training=True)
    losses = model(**data, mode='loss')
    assert {'decode.loss_ce', 'aux.loss_ce'} <= losses.keys()
    before = {
        name: layer.center_weight.clone() for name, layer in model.named_modules() if hasattr(layer, 'center_weight')
    }
    assert len(before) == 59
    model.parse_losses(losses)[0].backward()
    optimizer.step()
    for name, weight in before.items():
        layer = model.get_submodule(name)
        assert not torch.equal(layer.center_weight, weight), name
        assert layer.num_batches_tracked == 1, name


def cityscapes(folder):
    """Two images for each split; the label of the right half is its brightness."""
    for split, labels in (('train', (1, 2)), ('val', (1, 2))):
        for kind in ('leftImg8bit', 'gtFine'):
            (folder / kind / split / 'town').mkdir(parents=True)
        for i, label in enumerate(labels):
            pixels = np.zeros((64, 128), np.uint8)
            pixels[:, 64:] = label
            Image.fromarray(np.stack([100 * pixels] * 3, -1)).save(
                folder / f'leftImg8bit/{split}/town/{i}_leftImg8bit.png'
            )
            Image.fromarray(pixels).save(folder / f'gtFine/{split}/town/{i}_gtFine_labelTrainIds.png')


def options(folder):
    values = NARROW | {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2, 'default_hooks.checkpoint.interval': 2}
    for split in ('train', 'val', 'test'):
        values |= {
            f'{split}_dataloader.dataset.data_root': f'{folder}/',
            f'{split}_dataloader.num_workers': 0,
            f'{split}_dataloader.persistent_workers': False,
            f'{split}_dataloader.dataset.pipeline.{2 if split == "train" else 1}.scale': (128, 64),
        }
    values['train_dataloader.dataset.pipeline.3.crop_size'] = (64, 64)
    return [f'{key}={value}'.replace(' ', '') for key, value in values.items()]


@pytest.mark.slow
def test_the_tools_train_evaluate_and_draw(tmp_path):
    cityscapes(tmp_path / 'data')
    arguments = ['--cfg-options', *options(tmp_path / 'data')]
    result = tool('train.py', CONFIG, '--work-dir', tmp_path / 'run', *arguments)
    assert result.returncode == 0, result.stdout
    test = ['--work-dir', tmp_path / 'test', '--show-dir', 'drawn', '--out', tmp_path / 'out.pkl', *arguments]
    result = tool('test.py', CONFIG, tmp_path / 'run' / 'iter_2.pth', *test)
    assert result.returncode == 0, result.stdout
    assert 0 < metrics(tmp_path / 'test')['mIoU'] <= 100
    assert len(list((tmp_path / 'test').glob('*/drawn/*.png'))) == 2
    assert (tmp_path / 'out.pkl').stat().st_size > 1000

    result = tool('train.py', CONFIG, *arguments, 'model.decode_head.num_classes=7')
    assert result.returncode == 2
    assert 'model.decode_head.num_classes is 7, but the train data set (CityscapesDataset) has 19' in result.stdout
    result = tool('train.py', CONFIG, '--cfg-options', 'train_dataloader.dataset.data_root=nowhere/')
    assert result.returncode == 2
    assert 'as the documentation of mmseg says' in result.stdout
