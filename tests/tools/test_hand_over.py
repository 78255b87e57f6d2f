"""From a classifier to a detector: each starts from exactly the backbone that it is given, trains and is evaluated."""

import argparse
import json
import math

import pytest
import torch
from cli import ROOT, checkpoint_of, data_options, metrics, tool
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

import mmubn
from mmubn.cli import add_config_arguments, load_config

CLASSIFIER = ROOT / 'configs' / 'digits' / 'resnet18-ubn_digits.py'
DETECTOR = ROOT / 'configs' / 'digits' / 'faster-rcnn_r18_fpn_ubn_digits.py'
RTMDET = ('rtmdet_s_ubn-backbone_8xb32-300e_coco', 'rtmdet_s_ubn-all_8xb32-300e_coco')
RESNET = (
    'retinanet_r50_fpn_ubn-backbone_1x_coco',
    'cascade-rcnn_r50_fpn_ubn-backbone_1x_coco',
    'fcos_r50_fpn_gn-head_ubn-backbone_1x_coco',
)


def backbone_of(checkpoint):
    state_dict = checkpoint_of(checkpoint)['state_dict']
    return {key.removeprefix('backbone.'): value for key, value in state_dict.items() if key.startswith('backbone.')}


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """The checkpoint of a ResNet-18 with UBN that MMPretrain trained on a folder of digits laid out like ImageNet."""
    folder = tmp_path_factory.mktemp('classifier')
    result = tool(
        'dataset_converters/digits_to_imagefolder.py',
        *(folder / 'data', '--train-per-class', '16', '--val-per-class', '4'),
    )
    assert result.returncode == 0, result.stdout
    options = ['train_cfg.max_epochs=2', 'default_hooks.logger.interval=1']
    for split in ('train', 'val'):
        loader = f'{split}_dataloader'
        options += [f'{loader}.dataset.data_root={folder}/data', f'{loader}.num_workers=0']
        options += [f'{loader}.persistent_workers=False']
    result = tool('train.py', CLASSIFIER, '--work-dir', folder / 'run', '--cfg-options', *options)
    assert result.returncode == 0, result.stdout
    assert 'accuracy/top1' in result.stdout
    return folder / 'run' / 'epoch_2.pth'


def test_a_classifier_draws_every_image_into_the_folder_of_the_run(classifier, tmp_path):
    data = classifier.parent.parent / 'data'
    options = [f'test_dataloader.dataset.data_root={data}', 'test_dataloader.num_workers=0']
    options += ['test_dataloader.persistent_workers=False']
    arguments = ['--work-dir', tmp_path, '--show-dir', 'drawn', '--cfg-options', *options]
    result = tool('test.py', CLASSIFIER, classifier, *arguments)
    assert result.returncode == 0, result.stdout
    assert len(list(tmp_path.glob('*/drawn/*.png'))) == len(list(data.glob('val/*/*.png'))) == 40


def test_from_training_to_ap(classifier, small, tmp_path):
    """Train a classifier, hand its backbone over by the checkpoint's path alone, train Faster R-CNN, measure its AP."""
    options = ['--cfg-options', *small, f'model.backbone.init_cfg.checkpoint={classifier}']
    work_dir = tmp_path / 'train'
    result = tool('train.py', DETECTOR, '--work-dir', work_dir, *options)
    assert result.returncode == 0, result.stdout
    assert f'load backbone. in model from: {classifier}' in result.stdout
    assert 'mmubn: 20 UBN layers read: 20 from UBN' in result.stdout
    # The config itself names a checkpoint that is not there, and evaluation does not ask for it.
    arguments = [work_dir / 'epoch_2.pth', '--work-dir', tmp_path / 'test', '--cfg-options', *small]
    result = tool('test.py', DETECTOR, *arguments)
    assert result.returncode == 0, result.stdout
    assert 0 <= metrics(tmp_path / 'test')['coco/bbox_mAP'] <= 1

    given, found = backbone_of(classifier), backbone_of(work_dir / 'epoch_2.pth')
    assert given.keys() == found.keys()
    frozen = [key for key in given if key.startswith(('conv1.', 'bn1.', 'layer1.'))]
    assert len(frozen) > 50
    for key in frozen:
        assert torch.equal(found[key], given[key]), key

    # A step of AdamW moves a parameter by at most lr (1 - beta1) / sqrt(1 - beta2), and by lr times decay times itself.
    lines = [json.loads(line) for path in work_dir.glob('*/vis_data/scalars.json') for line in path.open()]
    travel = sum(line['lr'] for line in lines if 'loss' in line) * 0.1 / math.sqrt(1e-3)
    learned = {key: value for key, value in given.items() if '.conv' in key and key not in frozen}
    fresh = MODELS.build(dict(load(DETECTOR).model.backbone, init_cfg=None)).state_dict()
    for key, value in learned.items():
        bound = travel * (1 + 0.01 * value.abs().max())
        assert 0 < (found[key] - value).abs().max() <= bound, key
        assert (found[key] - fresh[key]).abs().max() > 10 * bound, f'{key}: the bound must tell the two starts apart'


def load(path, *options):
    """The config as a tool gets it from the command line."""
    init_default_scope('mmdet')
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_config(parser.parse_args([str(path), *(['--cfg-options', *options] if options else [])]))


def smaller(node):
    """The same pipelines for images of a tenth of the size."""
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = smaller(value)
        return node
    if isinstance(node, tuple) and node and all(isinstance(item, int) and item >= 640 for item in node):
        return tuple(item // 10 for item in node)
    return type(node)(smaller(item) for item in node) if isinstance(node, (list, tuple)) else node


@pytest.fixture
def cspnext(tmp_path):
    """A classifier with BatchNorm, of the network of MMDetection's ImageNet config, a quarter as wide."""
    init_default_scope('mmdet')
    cfg = get_config('mmdet::rtmdet/classification/cspnext-s_8xb256-rsb-a1-600e_in1k.py').model.backbone
    torch.manual_seed(0)
    backbone = MODELS.build(dict(cfg, widen_factor=0.125))
    state_dict = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    torch.save({'state_dict': state_dict | {'head.fc.weight': torch.zeros(1)}}, tmp_path / 'cspnext.pth')
    return tmp_path / 'cspnext.pth'


class Start(Hook):
    """Remembers the backbone as it is before the first iteration."""

    def before_train(self, runner):
        self.backbone = {key: value.clone() for key, value in runner.model.backbone.state_dict().items()}


def narrow(name, checkpoint, digits, work_dir):
    """The runner of a config for COCO: a narrow network, 4 iterations on the digits, and an evaluation."""
    width = 64  # FCOS normalises groups of 1/32 of this, down to maps of one pixel
    options = [
        *data_options(digits),
        'train_dataloader.batch_size=2',
        'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
        'randomness.seed=0',
        f'work_dir={work_dir}',
        f'model.backbone.init_cfg.checkpoint={checkpoint}',
        f'model.neck.out_channels={width}',
    ]
    if name in RTMDET:
        options += ['model.backbone.widen_factor=0.125', 'model.neck.in_channels=[32,64,128]']
        options.append('model.bbox_head.exp_on_reg=True')  # no box of less than nothing, which is left out
    else:
        options += [f'model.backbone.{key}' for key in ('depth=18', 'stem_channels=32', 'base_channels=32')]
        options.append('model.neck.in_channels=[32,64,128,256]')
    # Evaluate whatever it finds, however unsure.
    if name.startswith('cascade'):
        options.append('model.test_cfg.rcnn.score_thr=0')
        options += [f'model.rpn_head.{key}={width}' for key in ('in_channels', 'feat_channels')]
        options.append(f'model.roi_head.bbox_roi_extractor.out_channels={width}')
        for stage in range(3):
            settings = (f'in_channels={width}', f'fc_out_channels={width}', 'num_classes=10')
            options += [f'model.roi_head.bbox_head.{stage}.{setting}' for setting in settings]
    else:
        options.append('model.test_cfg.score_thr=0')
        settings = (f'in_channels={width}', f'feat_channels={width}', 'num_classes=10')
        options += [f'model.bbox_head.{setting}' for setting in settings]
    cfg = load(next((ROOT / 'configs').glob(f'*/{name}.py')), *options)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=tuple('0123456789'))
    return Runner.from_cfg(Config(smaller(cfg.to_dict())))


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in (RESNET[0], RESNET[2])))
        for name in (*RESNET, *RTMDET)
    ],
)
def test_a_detector_starts_from_a_classifier_and_trains(name, classifier, digits, tmp_path, request):
    checkpoint = request.getfixturevalue('cspnext') if name in RTMDET else classifier
    runner, start = narrow(name, checkpoint, digits, tmp_path), Start()
    runner.register_hook(start)
    runner.train()
    assert runner.iter == 4
    assert all(math.isfinite(loss) for loss in runner.message_hub.get_scalar('train/loss').data[0])
    assert runner.message_hub.get_scalar('val/coco/bbox_mAP').current() >= 0

    given, found = backbone_of(checkpoint), runner.model.backbone.state_dict()
    convolutions = [key for key in given if given[key].dim() == 4]
    assert len(convolutions) >= 20
    for key in given if name not in RTMDET else convolutions:
        assert torch.equal(start.backbone[key], given[key]), key
    assert not all(torch.equal(found[key], given[key]) for key in convolutions), 'the backbone must learn'

    layers = {key: layer for key, layer in runner.model.named_modules() if isinstance(layer, mmubn.UBN)}
    if name in RTMDET:
        assert len(layers) == (39 + 31 + 12 if 'ubn-all' in name else 39)
        assert all(layer.running_similarity < 1 for layer in layers.values()), 'every gate must have seen samples'
    else:
        assert len(layers) == 20
        statistics = [key for key in given if 'running_' in key]
        assert all(torch.equal(found[key], given[key]) for key in statistics), 'norm_eval=True'


def test_a_detector_does_not_start_from_what_does_not_fit(classifier, digits, tmp_path):
    checkpoint = checkpoint_of(classifier)
    del checkpoint['state_dict']['backbone.layer4.1.conv2.weight']
    torch.save(checkpoint, tmp_path / 'damaged.pth')
    runner = narrow(RESNET[0], tmp_path / 'damaged.pth', digits, tmp_path)
    with pytest.raises(ValueError, match=r'damaged\.pth.*layer4\.1\.conv2\.weight is missing'):
        runner.train()
    assert runner.iter == 0
