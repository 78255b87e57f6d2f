"""The networks of the paper: as large as those of torchvision and timm, every norm that of norm_cfg, shortcuts too."""

import pytest
import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmubn.openmmlab.models  # noqa: F401 - registers
from mmubn import IEBN, UBN

# Parameters of timm's inception_v4 and res2net50_26w_4s (timm 1.0.31), which torchvision lacks.
TIMM = {'inception_v4': 42_679_816, 'res2net50_26w_4s': 25_699_120}
CLASSIFIER = {'resnext50_32x4d': 2049 * 1000, 'inception_v4': 1537 * 1000}
# UBN's neighbor_weight, center_weight, scale_weight and scale_bias, per channel.
UBN_EXTRA = 8 + 1 + 1 + 1


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmpretrain')


def build(type_, norm_cfg=None, **options):
    return MODELS.build(dict(type=type_, norm_cfg=norm_cfg or dict(type='UBN'), **options))


def classifier(name):
    """MMPretrain's network of this name with UBN."""
    model = Config.fromstring(f"_base_ = 'mmpretrain::_base_/models/{name}.py'", '.py').model
    model.backbone.norm_cfg = dict(type='UBN')
    return MODELS.build(model)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def layers(model, kind=_BatchNorm):
    return [module for module in model.modules() if isinstance(module, kind)]


def resolutions(model, kinds, size=32):
    """The input and output heights of every module of ``kinds``, in order."""
    found = []
    hooks = [
        module.register_forward_hook(lambda _, x, y: found.append((x[0].shape[2], y.shape[2])))
        for module in layers(model, kinds)
    ]
    features(model, size)
    for hook in hooks:
        hook.remove()
    return found


def features(model, size, batch=1):
    model.eval()  # MMPretrain's networks return None
    with torch.no_grad():
        return model(torch.zeros(batch, 3, size, size))


RESNETS = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d')
# MMPretrain's names and torchvision's.
TORCHVISION = {name: name for name in RESNETS} | {'vgg11bn': 'vgg11_bn', 'vgg13bn': 'vgg13_bn'}


def reference(name):
    with torch.device('meta'):
        return torchvision.models.get_model(name)


@pytest.mark.parametrize('name', TORCHVISION)
def test_as_large_as_torchvision(name):
    expected, model = reference(TORCHVISION[name]), classifier(name)
    batch_norms = layers(expected)
    assert len(layers(model, UBN)) == len(layers(model)) == len(batch_norms)
    assert count(model) == count(expected) + UBN_EXTRA * sum(layer.num_features for layer in batch_norms)


def test_res2net_as_large_as_timm():
    model = classifier('res2net50-w26-s4')
    assert len(layers(model, UBN)) == len(layers(model)) == 1 + 16 * 5 + 4
    assert count(model) == TIMM['res2net50_26w_4s'] + UBN_EXTRA * sum(layer.num_features for layer in layers(model))


class TestInceptionV4:
    @pytest.mark.parametrize('name', ['InceptionV4', 'InceptionV4_CIFAR'])
    def test_as_large_as_timm(self, name):
        model = build(name, dict(type='BN'))
        assert count(model) == TIMM['inception_v4'] - CLASSIFIER['inception_v4']

    @pytest.mark.parametrize(
        'norm', [dict(type='UBN', threshold=0.3), dict(type='IEBN'), dict(type='GN', num_groups=32)]
    )
    def test_a_norm_after_every_convolution(self, norm):
        kinds = {'UBN': UBN, 'IEBN': IEBN, 'GN': nn.GroupNorm}
        model = build('InceptionV4', norm)
        found = layers(model, kinds[norm['type']])
        assert len(found) == len(layers(model, nn.Conv2d)) == 149
        assert layers(model) == (found if norm['type'] != 'GN' else [])
        assert all(layer.threshold == 0.3 for layer in found if isinstance(layer, UBN))

    def test_shapes_of_the_paper(self):
        """Figure 9: 299 pixels, 35 after the stem, 17 and 8 after the reductions."""
        model = build('InceptionV4', dict(type='BN'))
        widths = []
        for block in model.features:
            block.register_forward_hook(lambda _, __, y: widths.append(tuple(y.shape[1:3])))
        (y,) = features(model, 299)
        stem = [(32, 149), (32, 147), (64, 147), (160, 73), (192, 71), (384, 35)]
        assert widths == [*stem, *[(384, 35)] * 4, *[(1024, 17)] * 8, *[(1536, 8)] * 4]
        assert y.shape == (1, 1536, 8, 8)

    def test_smallest_input(self):
        (y,) = features(build('InceptionV4', dict(type='BN')), 75)
        assert y.shape == (1, 1536, 1, 1)

    def test_the_stem_keeps_the_resolution_of_cifar(self):
        model = build('InceptionV4_CIFAR', dict(type='BN'))
        assert not layers(model.features[:6], (nn.MaxPool2d, nn.AvgPool2d))
        stem, stages = resolutions(model.features[:6], nn.Conv2d), resolutions(model, nn.MaxPool2d)
        assert stem == [(32, 32)] * 11
        assert stages == [(32, 15), (15, 7)]

    def test_dropout_is_that_of_the_pooled_features(self):
        model = build('InceptionV4_CIFAR', dict(type='BN'), dropout=0.5)
        x = torch.ones(2, 1536, 7, 7)
        pooled = model.dropout.train()(x).mean((2, 3))
        assert set(pooled.unique().tolist()) == {0.0, 2.0}

    def test_trains(self):
        torch.manual_seed(0)
        model = build('InceptionV4_CIFAR')
        model.init_weights()
        model.train()
        model(torch.randn(2, 3, 11, 11))[0].square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


class TestCIFARForms:
    def test_resnext_as_large_as_torchvision(self):
        model, expected = build('ResNeXt_CIFAR', depth=50), reference('resnext50_32x4d')
        stem = (7 * 7 - 3 * 3) * 3 * 64
        batch_norms = layers(expected)
        assert len(layers(model, UBN)) == len(layers(model)) == 53
        assert count(model) == (
            count(expected)
            - CLASSIFIER['resnext50_32x4d']
            - stem
            + UBN_EXTRA * sum(norm.num_features for norm in batch_norms)
        )

    def test_resnext_has_grouped_convolutions(self):
        model = build('ResNeXt_CIFAR', depth=50)
        grouped = [conv for conv in layers(model, nn.Conv2d) if conv.kernel_size == (3, 3)][1:]
        assert len(grouped) == 16
        assert {conv.groups for conv in grouped} == {32}

    @pytest.mark.parametrize(
        ('name', 'options'),
        [('ResNet_CIFAR', dict(depth=18)), ('ResNet_CIFAR', dict(depth=50)), ('ResNeXt_CIFAR', dict(depth=50))],
        ids=lambda value: str(value),
    )
    def test_the_first_stage_sees_every_pixel(self, name, options):
        model = build(name, out_indices=(0, 1, 2, 3), **options)
        assert not layers(model, nn.MaxPool2d)
        outputs = features(model, 32, batch=2)
        widths = [64, 128, 256, 512] if options['depth'] == 18 else [256, 512, 1024, 2048]
        assert [tuple(y.shape) for y in outputs] == [
            (2, width, size, size) for width, size in zip(widths, (32, 16, 8, 4), strict=True)
        ]

    def test_vgg_ends_at_one_pixel(self):
        (y,) = features(build('VGG', depth=11), 32, batch=2)
        assert y.shape == (2, 512, 1, 1)

    def test_resnext_depth(self):
        with pytest.raises(KeyError, match='18'):
            build('ResNeXt_CIFAR', depth=18)


NORMS = {
    'BN': (dict(type='BN'), nn.BatchNorm2d),
    'GN': (dict(type='GN', num_groups=32), nn.GroupNorm),
    'IN': (dict(type='IN', affine=True), nn.InstanceNorm2d),
    # mmcv's LN is torch's, which normalises over the last axis, the width; this one over the channels.
    'LN2d': (dict(type='LN2d'), nn.LayerNorm),
    'IEBN': (dict(type='IEBN'), IEBN),
}


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('ResNet_CIFAR', dict(depth=18, base_channels=32, stem_channels=32)),
        ('ResNeXt_CIFAR', dict(depth=50)),
        ('VGG', dict(depth=11)),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_other_norms(name, options, norm):
    """Each trains: one step from one pass, with as many norms as with UBN and no other."""
    norm_cfg, kind = NORMS[norm]
    torch.manual_seed(0)
    model = build(name, norm_cfg, **options)
    assert len(layers(model, kind)) == {'ResNet_CIFAR': 20, 'ResNeXt_CIFAR': 53, 'VGG': 8}[name]
    assert layers(model) == (layers(model, kind) if issubclass(kind, _BatchNorm) else [])
    model.init_weights()
    model.train()
    output = model(torch.randn(2, 3, 32, 32))[-1]
    output.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
