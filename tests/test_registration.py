"""``import mmubn`` makes the name UBN known wherever OpenMMLab builds a norm."""

import pytest
from mmcv.cnn import ConvModule, build_norm_layer
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.utils import build_norm_layer as build_mmpretrain_norm_layer
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS

import mmubn


def test_root_registry_and_its_children():
    for registry in (MODELS, MMDET_MODELS, MMPRETRAIN_MODELS):
        assert registry.get('UBN') is mmubn.UBN


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmpretrain', 'mmcv'])
def test_build_norm_layer_in_every_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        name, layer = build_norm_layer(dict(type='UBN', requires_grad=False, threshold=0.2), 8, postfix=1)
    assert name == 'bn1', 'pretrained checkpoints name the norms of a ResNet bn1, bn2, bn3'
    assert type(layer) is mmubn.UBN
    assert layer.threshold == 0.2
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_mmpretrain_builder():
    assert type(build_mmpretrain_norm_layer(dict(type='UBN'), 8)) is mmubn.UBN


def test_conv_module_keeps_the_neighbors_at_zero():
    module = ConvModule(3, 8, 3, norm_cfg=dict(type='UBN'))
    module.init_weights()
    assert module.bn.weight.eq(1).all()
    assert module.bn.neighbor_weight.eq(0).all()


def test_unknown_argument_in_norm_cfg():
    with pytest.raises(TypeError, match='thresh'):
        build_norm_layer(dict(type='UBN', thresh=0.2), 8)
