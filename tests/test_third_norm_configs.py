"""The configs with BNET or UBN as the third norm of each bottleneck alone: which norms are where, and the recipe."""

import copy
import functools
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers import is_third_norm
from mmdet.registry import MODELS as DETECTION_MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS as CLASSIFICATION_MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn.layers import UnifiedNorm
from mmubn.openmmlab.config_checks import check_norm_arguments, check_norm_types, check_norms_used

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
PATHS = sorted(path for path in CONFIGS.glob('*/*.py') if is_third_norm(path))
DETECTORS = [path for path in PATHS if path.stem.endswith('_coco')]
CLASSIFIERS = [path for path in PATHS if path not in DETECTORS]
LAYERS = {50: (16, 53 - 16), 101: (33, 104 - 33)}  # of ours, and BatchNorms


def parts(path):
    """Depth, name of the norm and kernel size."""
    depth = int(re.search(r'(?:_r|resnet)(50|101)[_-]', path.stem)[1])
    match = re.search(r'bnet3-k(\d)', path.stem)
    return depth, 'BNET' if match else 'UBN', int(match[1]) if match else 3


def checkpoint(depth, norm, kernel_size):
    return f'resnet{depth}-' + (f'bnet3-k{kernel_size}' if norm == 'BNET' else 'ubn3')


def test_all_are_here():
    variants = {(50, 'BNET', 3), (50, 'BNET', 5), (50, 'BNET', 7), (101, 'BNET', 3), (101, 'BNET', 5), (50, 'UBN', 3)}
    of = {name: [parts(path) for path in DETECTORS if path.stem.startswith(name)] for name in ('faster', 'mask', 'ret')}
    assert sorted(of['faster']) == sorted([*variants, (50, 'BNET', 5), (101, 'BNET', 5)])
    assert sorted(of['mask']) == sorted(variants - {(50, 'BNET', 7)})
    assert of['ret'] == [(101, 'BNET', 5)]
    assert sorted(map(parts, CLASSIFIERS)) == sorted(variants)


@functools.cache
def load(path):
    return Config.fromfile(path)


@functools.cache
def build(path):
    """The backbone. The weights of convolutions stay what is in memory: drawing them takes longer than all else."""
    cfg = copy.deepcopy(load(path))
    init_default_scope(cfg.default_scope)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, 'reset_parameters', lambda layer: None)
        if path in DETECTORS:
            return DETECTION_MODELS.build(cfg.model.backbone)
        return CLASSIFICATION_MODELS.build(cfg.model.backbone)


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_the_third_norms_and_no_others(path):
    depth, norm, kernel_size = parts(path)
    cfg, backbone = load(path), build(path)
    check_norm_types(cfg)
    check_norm_arguments(cfg)
    check_norms_used(cfg, nn.ModuleDict(dict(backbone=backbone)))
    norms = {name: module for name, module in backbone.named_modules() if isinstance(module, _BatchNorm)}
    ours = {name: module for name, module in norms.items() if isinstance(module, UnifiedNorm)}
    assert all(re.fullmatch(r'layer[1-4]\.\d+\.bn3', name) for name in ours)
    assert (len(ours), len(norms) - len(ours)) == LAYERS[depth]
    assert {(type(module).__name__, module.kernel_size) for module in ours.values()} == {(norm, kernel_size)}
    assert {type(norms[name]) for name in norms.keys() - ours.keys()} == {nn.BatchNorm2d}
    others = load(path).model.to_dict() | dict(backbone=None)
    assert not re.search('BNET|UBN', str(others))


@pytest.mark.parametrize('path', DETECTORS, ids=lambda path: path.stem)
def test_it_starts_from_what_the_imagenet_config_trains(path):
    name = checkpoint(*parts(path))
    assert load(path).model.backbone.module.init_cfg.checkpoint == f'checkpoints/{name}_in1k.pth'
    (trained,) = (each for each in CLASSIFIERS if each.stem.startswith(f'{name}_'))
    shapes = [{key: value.shape for key, value in build(each).state_dict().items()} for each in (path, trained)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize('path', DETECTORS[:1], ids=lambda path: path.stem)
def test_the_frozen_stage_has_it_too(path):
    """As the authors have it: its kernels are frozen, and no norm of the backbone is in training mode."""
    backbone = build(path)
    norms = {name: module for name, module in backbone.named_modules() if isinstance(module, _BatchNorm)}
    frozen = {name.split('.')[0] for name, module in norms.items() if not module.weight.requires_grad}
    assert frozen == {'bn1', 'layer1'}
    assert not backbone.layer1[0].bn3.neighbor_weight.requires_grad
    assert backbone.layer2[0].bn3.neighbor_weight.requires_grad
    backbone.train()
    assert not any(module.training for module in norms.values())


def plain(node):
    """Without the name of the package that MMEngine writes into every dict inherited from one."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key != '_scope_'}
    return [plain(value) for value in node] if isinstance(node, (list, tuple)) else node


@functools.cache
def _stock_config(name):
    return plain(get_config(name).to_dict())


def stock_config(name):
    return copy.deepcopy(_stock_config(name))


STOCK = {
    'faster': 'faster_rcnn/faster-rcnn_r50_fpn_{}_coco',
    'mask-r': 'mask_rcnn/mask-rcnn_r50_fpn_{}_coco',
    'retina': 'retinanet/retinanet_r50_fpn_{}_coco',
}


@pytest.mark.parametrize('path', DETECTORS, ids=lambda path: path.stem)
def test_the_rest_is_mmdetection_s(path):
    """All but the backbone is that of the 1x or, but for the sizes of images, of the 2x config."""
    schedule = '2x' if 'ms-2x' in path.stem else '1x'
    ours = plain(load(path).to_dict())
    stock = stock_config(f'mmdet::{STOCK[path.stem[:6]].format(schedule)}.py')
    backbone, expected = ours['model'].pop('backbone'), stock['model'].pop('backbone')
    assert ours['model'] == stock['model']
    if schedule == '2x':
        resize = ours['train_dataloader']['dataset']['pipeline'][2]
        assert resize == dict(type='RandomResize', scale=[[1333, 480], [1333, 960]], keep_ratio=True)
        stock['train_dataloader']['dataset']['pipeline'][2] = resize
        for cfg in (ours, stock):  # what has its default value
            for step in cfg['train_dataloader']['dataset']['pipeline']:
                step.pop('backend_args', None)
    for key in ('train_cfg', 'optim_wrapper', 'param_scheduler', 'train_dataloader', 'val_dataloader', 'auto_scale_lr'):
        assert ours[key] == stock[key], key

    depth, norm, kernel_size = parts(path)
    norm_cfg = dict(type='UBN') if norm == 'UBN' else dict(type='BNET', kernel_size=kernel_size)
    module = backbone.pop('module')
    assert backbone == dict(type='ConvertNorms', where='*.bn3', norm_cfg=norm_cfg)
    init_cfg = module.pop('init_cfg')
    file = f'checkpoints/{checkpoint(depth, norm, kernel_size)}_in1k.pth'
    assert init_cfg == dict(type='Pretrained', prefix='backbone.', strict=True, checkpoint=file)
    expected.pop('init_cfg')
    assert module == expected | dict(depth=depth)


@pytest.mark.parametrize('path', CLASSIFIERS, ids=lambda path: path.stem)
def test_imagenet(path):
    """BNET's authors train as MMPretrain's config does, UBN's as configs/imagenet/ has it."""
    depth, norm, kernel_size = parts(path)
    name = f'{checkpoint(depth, norm, kernel_size)}_'
    assert path.stem == name + ('8xb32_in1k' if norm == 'BNET' else '4xb256_in1k')
    ours = plain(load(path).to_dict())
    if norm == 'BNET':
        like = stock_config('mmpretrain::resnet/resnet50_8xb32_in1k.py')
        like['model']['backbone'] |= dict(depth=depth, norm_cfg=dict(type='BN'))
    else:
        like = plain(load(CONFIGS / 'imagenet/resnet50-bn_4xb256_in1k.py').to_dict())
    assert ours['model']['backbone'].pop('module') == like['model']['backbone']
    for key in ('train_cfg', 'optim_wrapper', 'param_scheduler', 'train_dataloader', 'val_dataloader', 'auto_scale_lr'):
        assert ours[key] == like[key], key
    assert ours['val_evaluator']['topk'] == [1, 5]


@pytest.mark.parametrize('path', CLASSIFIERS[::5], ids=lambda path: path.stem)
def test_the_last_kernel_of_a_block_starts_at_zero(path):
    init_default_scope('mmpretrain')
    backbone = copy.deepcopy(load(path).model.backbone)
    backbone.module.update(depth=50, base_channels=4, stem_channels=4)
    model = CLASSIFICATION_MODELS.build(backbone)
    model.init_weights()
    norms = Counter()
    for module in model.modules():
        if isinstance(module, UnifiedNorm):
            norms[type(module).__name__] += 1
            assert not any(each.any() for each in (module.weight, module.neighbor_weight, module.bias))
    assert norms.total() == 16
