"""Every config of the paper's detectors builds, with the norms and the recipe that its name promises."""

from pathlib import Path

import pytest
import torch
from helpers import is_third_norm
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmubn import UBN

ROOT = Path(__file__).resolve().parent.parent
# test_detectors.py, test_classification_configs.py and test_third_norm_configs.py have the others.
COCO_CONFIGS = sorted(
    path
    for name in ('faster', 'mask')
    for path in (ROOT / 'configs').glob(f'{name}_rcnn/*.py')
    if not is_third_norm(path)
)
CONFIGS = [*COCO_CONFIGS, *sorted((ROOT / 'configs' / 'digits').glob('*-rcnn*.py'))]
LAYERS = {'r18': 20, 'r50': 53, 'r101': 104}


def build(cfg):
    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg = None  # no checkpoint is read
    with torch.device('meta'):  # millions of values that nobody reads
        return MODELS.build(cfg.model)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_builds_with_the_expected_norms(path):
    cfg = Config.fromfile(path)
    model = build(cfg)
    expected = next(count for depth, count in LAYERS.items() if f'_{depth}_' in path.stem)
    ubn = [name for name, module in model.named_modules() if isinstance(module, UBN)]
    other = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, UBN)
    ]
    found, absent = (ubn, other) if 'ubn' in path.stem else (other, ubn)
    assert len(found) == expected
    assert not absent
    assert all(name.startswith('backbone.') for name in found)


def test_the_paper_s_configs_are_all_there():
    found = {path.stem for path in COCO_CONFIGS}
    expected = {
        f'{detector}_{depth}_fpn_{norm}_1x_coco'
        for detector in ('faster-rcnn', 'mask-rcnn')
        for depth in ('r50', 'r101')
        for norm in ('ubn-backbone', 'bn-backbone', 'ubn-backbone-gated', 'syncubn-backbone')
    }
    assert found == expected


@pytest.mark.parametrize('path', COCO_CONFIGS, ids=lambda path: path.stem)
def test_recipe_of_the_paper(path):
    """Section 4.2.3 of the paper, and design decisions of its released configs."""
    cfg = Config.fromfile(path)
    assert cfg.train_cfg.max_epochs == 12
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ('SGD', 0.02, 0.9, 1e-4)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16
    backbone = cfg.model.backbone
    assert backbone.frozen_stages == 1
    assert backbone.norm_eval is not ('-gated' in path.stem or 'syncubn' in path.stem)
    depth = 101 if '_r101_' in path.stem else 50
    norm = 'ubn' if 'ubn' in path.stem else 'bn'
    assert backbone.depth == depth
    assert backbone.norm_cfg.type == ('SyncUBN' if 'syncubn' in path.stem else norm.upper())
    assert backbone.init_cfg.checkpoint == f'checkpoints/resnet{depth}-{norm}_in1k.pth'
    assert ('segm' in cfg.val_evaluator.metric) is path.stem.startswith('mask-rcnn')


def test_where_the_gate_acts():
    """norm_eval=True keeps every norm in evaluation mode; with False, all but the frozen stages train."""
    training = {}
    for name in ('ubn-backbone', 'ubn-backbone-gated'):
        model = build(Config.fromfile(ROOT / f'configs/faster_rcnn/faster-rcnn_r50_fpn_{name}_1x_coco.py')).train()
        training[name] = sum(module.training for module in model.modules() if isinstance(module, UBN))
    assert training == {'ubn-backbone': 0, 'ubn-backbone-gated': 53 - 1 - 10}  # stem and stage 1 are frozen


def test_readmes_name_every_config():
    for path in (ROOT / 'configs').glob('*/*.py'):
        if path.parent.name not in ('_base_', 'sweeps'):
            assert path.name in (path.parent / 'README.md').read_text(), path.name


def test_configs_of_sweeps_are_those_that_sweep_files_name():
    """Or bases of one. tests/analysis/test_sweeps.py reads all that the sweep files name."""
    folder = ROOT / 'configs' / 'sweeps'
    files = [*folder.glob('*.yml'), *folder.glob('*.py')]
    text = ''.join(path.read_text() for path in files)
    paths = sorted(folder.glob('*.py'))
    assert paths
    for path in paths:
        assert f'mmubn::sweeps/{path.name}' in text or f"'./{path.name}'" in text, path.name
