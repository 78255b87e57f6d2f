"""``import mmubn`` makes its norm types known wherever OpenMMLab builds a norm."""

import pytest
from mmcv.cnn import ConvModule, build_norm_layer
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.utils import build_norm_layer as build_mmpretrain_norm_layer
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS

import mmubn

NORMS = ['UBN', 'SyncUBN', 'RBN', 'BNET', 'IEBN', 'UnitizedBN']
# An argument of each besides those of BatchNorm, where it has one.
OPTIONS = {'UBN': dict(threshold=0.2), 'SyncUBN': dict(threshold=0.2), 'BNET': dict(kernel_size=5)}


@pytest.mark.parametrize('name', NORMS)
def test_root_registry_and_its_children(name):
    for registry in (MODELS, MMDET_MODELS, MMPRETRAIN_MODELS):
        assert registry.get(name) is getattr(mmubn, name)


@pytest.mark.parametrize('name', NORMS)
@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmpretrain', 'mmcv'])
def test_build_norm_layer_in_every_scope(scope, name):
    options = dict(momentum=0.2, eps=1e-3, **OPTIONS.get(name, {}))
    with DefaultScope.overwrite_default_scope(scope):
        abbreviation, layer = build_norm_layer(dict(type=name, requires_grad=False, **options), 8, postfix=1)
    assert abbreviation == 'bn1', 'pretrained checkpoints name the norms of a ResNet bn1, bn2, bn3'
    assert type(layer) is getattr(mmubn, name)
    assert {key: getattr(layer, key) for key in options} == options
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize('name', NORMS)
def test_mmpretrain_builder(name):
    layer = build_mmpretrain_norm_layer(dict(type=name, **OPTIONS.get(name, {})), 8)
    assert type(layer) is getattr(mmubn, name)
    assert layer.num_features == 8


def test_conv_module_keeps_the_neighbors_at_zero():
    for name in ('UBN', 'SyncUBN', 'BNET'):
        module = ConvModule(3, 8, 3, norm_cfg=dict(type=name))
        module.init_weights()
        assert module.bn.weight.eq(1).all()
        assert module.bn.neighbor_weight.eq(0).all()


@pytest.mark.parametrize('name', NORMS)
def test_unknown_argument_in_norm_cfg(name):
    with pytest.raises(TypeError, match='thresh'):
        build_norm_layer(dict(type=name, thresh=0.2), 8)
