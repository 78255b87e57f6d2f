"""RetinaNet, Cascade R-CNN, FCOS and RTMDet: which norms are where; the rest is as in MMDetection."""

import argparse
import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import is_third_norm, randomize
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS as CLASSIFICATION_MODELS
from torch import nn

import mmubn
from mmubn.cli.config import add_config_arguments, load_config
from mmubn.layers import UnifiedNorm

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
FOLDERS = ('retinanet', 'cascade_rcnn', 'fcos', 'rtmdet')
# Of each config, the one of MMDetection that it differs from.
STOCK = {
    'retinanet_r50_fpn_ubn-backbone_1x_coco': 'retinanet/retinanet_r50_fpn_1x_coco',
    'cascade-rcnn_r50_fpn_ubn-backbone_1x_coco': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco',
    'fcos_r50_fpn_gn-head_ubn-backbone_1x_coco': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco',
    'rtmdet_s_ubn-backbone_8xb32-300e_coco': 'rtmdet/rtmdet_s_8xb32-300e_coco',
    'rtmdet_s_ubn-all_8xb32-300e_coco': 'rtmdet/rtmdet_s_8xb32-300e_coco',
}
RESNET_CONFIGS = [name for name in STOCK if '_r50_' in name]
# Norm layers of backbone, neck and head together, by part.
COUNTS = {'r50': {'backbone': 53}, 's': {'backbone': 39, 'neck': 31, 'bbox_head': 12}}
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, UnifiedNorm)


def load(name, *options):
    """The config as a tool gets it from the command line."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    path = next(CONFIGS.glob(f'*/{name}.py'))
    return load_config(parser.parse_args([str(path), *(['--cfg-options', *options] if options else [])]))


def norms(cfg):
    """How many norm layers of which type the model has, as {part: {name of the type: count}}."""
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (*BATCH_NORMS, nn.GroupNorm)):
            found.setdefault(name.split('.')[0], Counter())[type(layer).__name__] += 1
    return found


def test_all_configs_are_here():
    found = {path.stem for folder in FOLDERS for path in (CONFIGS / folder).glob('*.py') if not is_third_norm(path)}
    assert found == set(STOCK)


@pytest.mark.parametrize('name', STOCK)
def test_norms(name):
    found = norms(load(name))
    parts = COUNTS['r50' if name in RESNET_CONFIGS else 's']
    expected = {'backbone': {'UBN': parts['backbone']}}
    if name.startswith('fcos'):
        expected['bbox_head'] = {'GroupNorm': 8}
    elif name.startswith('rtmdet'):
        other = 'UBN' if 'ubn-all' in name else 'SyncBatchNorm'
        expected |= {part: {other: parts[part]} for part in ('neck', 'bbox_head')}
    assert found == expected


@pytest.mark.parametrize('norm', ['BN', 'SyncUBN', 'IEBN', 'GN'])
@pytest.mark.parametrize('name', STOCK)
def test_cfg_options_switch_the_norm(name, norm):
    parts = ['backbone', 'neck', 'bbox_head'] if 'ubn-all' in name else ['backbone']
    options = [f'model.{part}.norm_cfg.type={norm}' for part in parts]
    if norm == 'GN':
        options += [f'model.{part}.norm_cfg.num_groups=4' for part in parts]
    found = norms(load(name, *options))
    expected = {'BN': 'BatchNorm2d', 'GN': 'GroupNorm'}.get(norm, norm)
    counts = COUNTS['r50' if name in RESNET_CONFIGS else 's']
    assert {part: found[part] for part in parts} == {part: {expected: counts[part]} for part in parts}


@pytest.mark.parametrize('name', [name for name in STOCK if name.startswith('rtmdet')])
def test_rtmdet_keeps_its_norms_in_distributed_training(name, monkeypatch):
    """There, MMDetection's config has every BatchNorm replaced by SyncBatchNorm, which is an error for a UBN."""
    alone = norms(load(name))
    monkeypatch.setattr('mmdet.models.detectors.rtmdet.get_world_size', lambda: 2)
    assert norms(load(name)) == alone
    with pytest.raises(RuntimeError, match='SyncUBN'):
        norms(load(name, 'model.use_syncbn=True'))


def test_cfg_options_give_arguments():
    cfg = load('rtmdet_s_ubn-backbone_8xb32-300e_coco', 'model.backbone.norm_cfg.threshold=0.3')
    init_default_scope('mmdet')
    backbone = MODELS.build(cfg.model.backbone)
    assert {layer.threshold for layer in backbone.modules() if isinstance(layer, mmubn.UBN)} == {0.3}


@pytest.mark.parametrize('name', STOCK)
def test_the_rest_is_mmdetection_s(name):
    """Schedule, data and everything in the model but what the config is for."""
    cfg, stock = (plain(each.to_dict()) for each in (load(name), get_config(f'mmdet::{STOCK[name]}.py')))
    for key in ('train_cfg', 'optim_wrapper', 'param_scheduler', 'train_dataloader', 'val_dataloader', 'auto_scale_lr'):
        assert cfg[key] == stock[key], key
    changed = {'backbone.norm_cfg', 'backbone.init_cfg'}
    if name.startswith('fcos'):
        changed |= {'data_preprocessor.mean', 'data_preprocessor.std', 'data_preprocessor.bgr_to_rgb', 'backbone.style'}
    if name.startswith('rtmdet'):
        changed.add('use_syncbn')
    if 'ubn-all' in name:
        changed |= {'neck.norm_cfg', 'bbox_head.norm_cfg'}
    assert set(differences(cfg['model'], stock['model'])) == changed


def plain(node):
    """Without the name of the package that MMEngine writes into every dict inherited from one."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key != '_scope_'}
    return [plain(value) for value in node] if isinstance(node, (list, tuple)) else node


def differences(a, b):
    """Names of the entries that differ, two levels deep."""
    for key in a.keys() | b.keys():
        one, other = a.get(key), b.get(key)
        if one == other:
            continue
        if not isinstance(one, dict) or not isinstance(other, dict):
            yield key
            continue
        yield from (f'{key}.{name}' for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.mark.parametrize('name', RESNET_CONFIGS)
def test_where_a_resnet_starts(name):
    backbone = load(name).model.backbone
    assert backbone.init_cfg == dict(
        type='Pretrained', checkpoint='checkpoints/resnet50-ubn_in1k.pth', prefix='backbone.', strict=True
    )
    assert backbone.norm_cfg == dict(type='UBN', requires_grad=True)
    # The network that MMPretrain trains, and the colours that it is trained with.
    trained = get_config('mmpretrain::resnet/resnet50_8xb32_in1k.py')
    assert backbone.style == trained.model.backbone.style
    preprocessor = load(name).model.data_preprocessor
    assert (preprocessor.mean, preprocessor.std, preprocessor.bgr_to_rgb) == (
        trained.data_preprocessor.mean,
        trained.data_preprocessor.std,
        trained.data_preprocessor.to_rgb,
    )


@pytest.mark.parametrize(
    'path',
    [path for path in sorted(CONFIGS.glob('*/*_coco.py')) if not is_third_norm(path)],
    ids=lambda path: path.stem,
)
def test_the_backbone_is_that_of_the_imagenet_config(path):
    """What configs/imagenet/ trains under the checkpoint's name has every tensor of the backbone, and no other."""
    cfg = load(path.stem)
    init_cfg = cfg.model.backbone.init_cfg
    assert (init_cfg.type, init_cfg.prefix, init_cfg.strict) == ('Pretrained', 'backbone.', True)
    if path.parent.name == 'rtmdet':
        cfg.model.backbone.norm_cfg.type = 'BN'
        trained = 'mmdet::rtmdet/classification/cspnext-s_8xb256-rsb-a1-600e_in1k.py'
    else:
        network = Path(init_cfg.checkpoint).stem.removesuffix('_in1k')
        (trained,) = (CONFIGS / 'imagenet').glob(f'{network}_*.py')
    init_default_scope('mmdet')
    backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None))
    assert {key: value.shape for key, value in backbone.state_dict().items()} == shapes_of_classifier(trained)


@functools.cache
def shapes_of_classifier(config):
    """The tensors that its checkpoint has under 'backbone.'."""
    cfg = get_config(config) if isinstance(config, str) else Config.fromfile(config)
    init_default_scope('mmpretrain')
    backbone = CLASSIFICATION_MODELS.build(cfg.model.backbone)
    return {key: value.shape for key, value in backbone.state_dict().items()}


@pytest.mark.parametrize('name', [name for name in STOCK if name.startswith('rtmdet')])
def test_where_rtmdet_starts(name):
    """At MMDetection's checkpoint of a CSPNeXt with BatchNorm, strictly."""
    cfg, stock = load(name), get_config('mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py')
    assert cfg.model.backbone.init_cfg == dict(stock.model.backbone.init_cfg, strict=True)


def test_a_cspnext_of_batch_norm_becomes_ubn_exactly(tmp_path):
    """With the network of MMDetection's own ImageNet config: every key fits, and the features are the same."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    source = MODELS.build(
        get_config('mmdet::rtmdet/classification/cspnext-s_8xb256-rsb-a1-600e_in1k.py').model.backbone
    )
    source.out_indices = (2, 3, 4)
    for seed, layer in enumerate(source.modules()):
        if isinstance(layer, nn.BatchNorm2d):
            randomize(layer, seed=seed)
    state_dict = {f'backbone.{key}': value for key, value in source.state_dict().items()}
    torch.save({'state_dict': state_dict | {'head.fc.weight': torch.zeros(1)}}, tmp_path / 'cspnext.pth')

    option = f'model.backbone.init_cfg.checkpoint={tmp_path}/cspnext.pth'
    backbone = MODELS.build(load('rtmdet_s_ubn-backbone_8xb32-300e_coco', option).model.backbone)
    backbone.init_weights()
    source.eval()
    backbone.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), source(x), rtol=1e-4, atol=1e-4)
