"""Files of BNET's authors, made in their formats with random values, everywhere that MMEngine reads a checkpoint."""

import argparse
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import batch
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from released_bnet import detector_file, imagenet_file, named_as_before, prefixed, resnet

from mmubn.checkpoints import CheckpointError
from mmubn.cli.config import add_config_arguments, load_config
from mmubn.openmmlab.checkpoint_fit import find_fit, find_weights
from mmubn.openmmlab.hooks.checkpoint_fit import CheckpointFitHook
from mmubn.openmmlab.loading import accepted_checkpoints
from mmubn.openmmlab.pretrained import PretrainedInit

CONFIG = 'configs/retinanet/retinanet_r101_fpn_bnet3-k5-backbone_1x_coco.py'
ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = [
    'model.backbone.module.depth=50',
    'model.backbone.module.base_channels=8',
    'model.backbone.module.stem_channels=8',
]
SMALL += ['model.neck.in_channels=[32,64,128,256]', 'model.neck.out_channels=16', 'model.bbox_head.in_channels=16']
SMALL += ['model.bbox_head.feat_channels=16', 'model.bbox_head.num_classes=2', 'model.bbox_head.stacked_convs=1']
X = batch((1, 3, 64, 64))


def load(*options):
    """The RetinaNet of the recipe, small, as a tool gets it."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    cfg = load_config(parser.parse_args([str(ROOT / CONFIG), '--cfg-options', *SMALL, *options]))
    init_default_scope('mmdet')
    return cfg


@pytest.fixture(scope='module')
def released():
    return resnet()


@pytest.fixture(scope='module')
def detector(released):
    """The state dict of the released detector: of all but the backbone the names are MMDetection 3's."""
    torch.manual_seed(1)
    ours = MODELS.build(load().model).state_dict()
    others = {key: torch.randn_like(value) for key, value in ours.items() if not key.startswith('backbone.')}
    return prefixed(released.state_dict(), 'backbone.') | others


@torch.no_grad()
def assert_same(backbone, released):
    backbone.eval()  # returns None for some
    for found, expected in zip(backbone(X), released(X), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize('names', [dict, named_as_before], ids=['released', 'before'])
def test_load_from(names, detector, released, tmp_path, monkeypatch):
    """As a run, and tools/test.py, which wants all of it."""
    torch.save(detector_file(names(detector)), tmp_path / 'bnet.pth')
    cfg = load()
    cfg.work_dir, cfg.load_from, cfg.log_level = str(tmp_path), str(tmp_path / 'bnet.pth'), 'ERROR'
    for key in [key for key in cfg if key.startswith(('train_', 'val_', 'test_', 'optim', 'param', 'auto_scale'))]:
        cfg[key] = None
    monkeypatch.setattr(Runner, '_log_env', lambda *_: None)  # takes longer than all the rest
    runner = Runner.from_cfg(cfg)
    runner.register_hook(CheckpointFitHook(whole=True))
    with accepted_checkpoints():
        runner.load_or_resume()
    assert_same(runner.model.backbone, released)


def test_a_file_is_wholly_read(detector, tmp_path):
    torch.save(detector_file(detector), tmp_path / 'bnet.pth')
    with accepted_checkpoints():
        content = torch.load(tmp_path / 'bnet.pth', weights_only=True)
    assert content['meta']['iter'] == np.int64(87960)
    fit = find_fit(MODELS.build(load().model), find_weights(content, 'bnet.pth'))
    assert fit.is_whole


def test_init_detector(detector, released, tmp_path):
    torch.save(detector_file(detector), tmp_path / 'bnet.pth')
    model = init_detector(load(), str(tmp_path / 'bnet.pth'), device='cpu')
    assert_same(model.backbone, released)
    assert torch.equal(model.bbox_head.retina_cls.weight, detector['bbox_head.retina_cls.weight'])
    assert model.dataset_meta['classes'] == ('one', 'two')


@pytest.mark.parametrize(
    ('wrap', 'prefix', 'init_prefix', 'strict'),
    [
        (imagenet_file, '', None, True),
        (imagenet_file, 'module.', None, True),
        (imagenet_file, 'module.', None, False),
        (dict, '', None, False),
        (detector_file, 'backbone.', 'backbone.', True),
    ],
    ids=['imagenet', 'module', 'module leniently', 'state dict', 'detector'],
)
def test_init_cfg(wrap, prefix, init_prefix, strict, released, tmp_path):
    state_dict = released.state_dict() | {'fc.weight': torch.zeros(2, 256), 'fc.bias': torch.zeros(2)}
    torch.save(
        wrap(prefixed(state_dict if prefix != 'backbone.' else released.state_dict(), prefix)), tmp_path / 'r.pth'
    )
    backbone = MODELS.build(load().model.backbone)
    PretrainedInit(str(tmp_path / 'r.pth'), prefix=init_prefix, strict=strict)(backbone)
    assert_same(backbone, released)


def test_by_options_of_the_recipe(released, tmp_path):
    """What docs/checkpoints.md says."""
    torch.save(imagenet_file(released.state_dict()), tmp_path / 'R50_BNET-5.pth')
    init_cfg = 'model.backbone.module.init_cfg'
    cfg = load(f'{init_cfg}.checkpoint={tmp_path}/R50_BNET-5.pth', f'{init_cfg}.prefix=None')
    backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()
    assert_same(backbone, released)


def test_the_log(released, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        'mmubn.openmmlab.loading.print_log', lambda text, logger, level=logging.INFO: lines.append(text)
    )
    torch.save(imagenet_file(released.state_dict()), tmp_path / 'r.pth')
    PretrainedInit(str(tmp_path / 'r.pth'), strict=True)(MODELS.build(load().model.backbone))
    assert lines == ['mmubn: 16 BNET layers read: 16 from released BNET']


@pytest.mark.parametrize('strict', [True, False])
def test_renamed_in_part(strict, released, tmp_path):
    state_dict = dict(released.state_dict())
    for key in [key for key in state_dict if key.startswith('layer1.0.bnet3.running')]:
        state_dict[key.replace('bnet3', 'bn3')] = state_dict.pop(key)
    torch.save(state_dict, tmp_path / 'r.pth')
    with pytest.raises(
        CheckpointError, match=r'r\.pth.*two names, layer1\.0\.bn3 \(running_mean, running_var\) and layer1'
    ):
        PretrainedInit(str(tmp_path / 'r.pth'), strict=strict)(MODELS.build(load().model.backbone))
