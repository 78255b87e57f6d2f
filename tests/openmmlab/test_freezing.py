"""Whatever a network of MMDetection or MMPretrain freezes with BN it freezes with the norms of this package.

Networks find what to freeze in several ways: ``isinstance`` of ``_BatchNorm`` or of ``nn.BatchNorm2d``, by name, or all
parameters of a stage. So every class that is registered and takes ``norm_cfg`` and an argument that freezes is built
with both norms and compared. A class that comes with a new version of a library joins by itself.
"""

import inspect
import itertools

import mmdet.registry
import mmpretrain.registry
import pytest
import torch
from helpers import batch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmubn.openmmlab.models  # noqa: F401 - registers
from mmubn.layers import NORMS
from mmubn.openmmlab.config_checks import ConfigError, check_norms_used

REGISTRIES = {registry.scope: registry for registry in (MODELS, mmdet.registry.MODELS, mmpretrain.registry.MODELS)}
FREEZES = ('norm_eval', 'frozen_stages')


def parameters(cls):
    """The arguments of a constructor, those that it hands on to its parents included."""
    names = set()
    for owner in cls.__mro__:
        if '__init__' in vars(owner):
            own = inspect.signature(owner.__init__).parameters.values()
            names.update(each.name for each in own)
            if not any(each.kind is each.VAR_KEYWORD for each in own):
                break
    return names


def find_networks():
    """By ``scope.name``: the freezing arguments of every class that takes ``norm_cfg`` and has any."""
    for registry in REGISTRIES.values():
        registry.import_from_location()
    found = {}
    for scope, registry in REGISTRIES.items():
        for name, cls in registry.module_dict.items():
            names = parameters(cls) if inspect.isclass(cls) else set()
            freezing = [argument for argument in FREEZES if argument in names]
            if 'norm_cfg' in names and freezing:
                found[f'{scope}.{name}'] = freezing
    return found


NETWORKS = find_networks()

# --- how to build them ------------------------------------------------------------------------------------------------


def branches(count, block):
    widths = tuple(8 * 2**i for i in range(count))
    return dict(num_modules=1, num_branches=count, block=block, num_blocks=(1,) * count, num_channels=widths)


HRNET = dict(extra={f'stage{i}': branches(i, 'BASIC' if i > 1 else 'BOTTLENECK') for i in (1, 2, 3, 4)})
TRANSFORMER = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=32)
HIERARCHICAL = dict(arch=dict(embed_dims=32, depths=[1, 1, 2], num_heads=2))
SMALL_CSP = dict(deepen_factor=0.1, widen_factor=0.1)
# What a class needs, or what makes it small. One that is not here is built without arguments.
ARGUMENTS = {
    'mmdet.CSPDarknet': SMALL_CSP,
    'mmdet.CSPNeXt': SMALL_CSP,
    'mmdet.DetectoRS_ResNeXt': dict(depth=50),
    'mmdet.DetectoRS_ResNet': dict(depth=50),
    'mmdet.HRNet': HRNET,
    'mmdet.RegNet': dict(arch='regnetx_400mf'),
    'mmdet.Res2Net': dict(depth=50),
    'mmdet.ResLayer': dict(depth=50),
    'mmdet.ResLayerExtraNorm': dict(depth=50),
    'mmdet.ResNeSt': dict(depth=50),
    'mmdet.ResNeXt': dict(depth=50),
    'mmdet.ResNet': dict(depth=18),
    'mmdet.ResNetV1d': dict(depth=18),
    'mmdet.TridentResNet': dict(
        depth=50,
        num_branch=3,
        test_branch_idx=1,
        trident_dilations=(1, 2, 3),
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
    ),
    'mmpretrain.CAEPretrainViT': dict(arch=TRANSFORMER, layer_scale_init_value=0.1),
    'mmpretrain.CSPDarkNet': dict(depth=53),
    'mmpretrain.CSPResNeXt': dict(depth=50),
    'mmpretrain.CSPResNet': dict(depth=50),
    'mmpretrain.EfficientNetV2': dict(arch='b0'),
    'mmpretrain.HRNet': HRNET,
    'mmpretrain.HiViT': HIERARCHICAL,
    'mmpretrain.MobileOne': dict(arch='s0'),
    'mmpretrain.MoCoV3ViT': dict(patch_size=16),
    'mmpretrain.PyramidVig': dict(arch='tiny'),
    'mmpretrain.RegNet': dict(arch='regnetx_400mf'),
    'mmpretrain.RepLKNet': dict(arch='31B'),
    'mmpretrain.RepVGG': dict(arch='A0'),
    'mmpretrain.Res2Net': dict(depth=50),
    'mmpretrain.ResNeSt': dict(depth=50),
    'mmpretrain.ResNeXt': dict(depth=50),
    'mmpretrain.ResNeXt_CIFAR': dict(depth=50),
    'mmpretrain.ResNet': dict(depth=18),
    'mmpretrain.ResNetV1c': dict(depth=18),
    'mmpretrain.ResNetV1d': dict(depth=18),
    'mmpretrain.ResNet_CIFAR': dict(depth=18),
    'mmpretrain.SEResNeXt': dict(depth=50),
    'mmpretrain.SEResNet': dict(depth=50),
    'mmpretrain.SparseResNet': dict(depth=50),
    'mmpretrain.VGG': dict(depth=11),
    'mmpretrain.Vig': dict(arch='tiny'),
    'mmpretrain.iTPNHiViT': HIERARCHICAL,
}
STAGES = dict.fromkeys(NETWORKS, (-1, 1, 2)) | {
    'mmdet.EfficientNet': (0, 1, 3),
    'mmpretrain.EfficientNet': (0, 1, 3),
    'mmpretrain.EfficientNetV2': (0, 1, 3),
    # With a stage frozen they end in an AttributeError, with any norm: 'no attribute fc_norm'.
    'mmpretrain.HiViT': (-1, 0),
    'mmpretrain.iTPNHiViT': (-1, 0),
    # Slow to build.
    'mmpretrain.PyramidVig': (0, 2),
}
# Those that freeze no norm, whatever they are asked to.
FREEZE_NONE = {
    'mmpretrain.HiViT': 'see above',
    'mmpretrain.ViTEVA02': 'it freezes its stages, then makes them once more',
    'mmpretrain.iTPNHiViT': 'see above',
}
# Those that have no UBN where norm_cfg asks for it. The tools end with an error (config_checks.check_norms_used).
IGNORE = {'mmpretrain.RepLKNet': 'norm_cfg is not handed on to its stages'}
# Those that put another norm in the place of each BatchNorm2d, which is an error.
REPLACE = {'mmpretrain.SparseResNet': 'SparseBatchNorm2d'}


def build(network, norm, **arguments):
    scope, _, name = network.partition('.')
    arguments = {**ARGUMENTS.get(network, {}), **arguments}
    return REGISTRIES[scope].build(dict(type=name, norm_cfg=dict(type=norm), **arguments))


@pytest.fixture
def _no_initialization(monkeypatch):
    """Parameters keep what is in their memory, which takes a fraction of the time."""
    for name in vars(nn.init):
        if name.endswith('_') and not name.startswith('_'):
            monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


def settings(network):
    """All freezing arguments that are tried."""
    values = {'norm_eval': (True, False), 'frozen_stages': STAGES[network]}
    freezing = NETWORKS[network]
    return [dict(zip(freezing, each, strict=True)) for each in itertools.product(*(values[name] for name in freezing))]


def norm_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


# --- what is frozen ---------------------------------------------------------------------------------------------------


def assert_frozen_alike(network, norm):
    """For all settings; whether any of them froze a norm."""
    froze = False
    for arguments in settings(network):
        theirs, ours = build(network, 'BN', **arguments), build(network, norm, **arguments)
        theirs.train()  # MMPretrain's networks return None
        ours.train()
        expected, found = norm_layers(theirs), norm_layers(ours)
        assert found.keys() == expected.keys() != set()
        assert any(type(layer).__name__ == norm for layer in found.values()) == (network not in IGNORE), found
        for name, layer in found.items():
            other = expected[name]
            assert layer.training == other.training, (arguments, name)
            for parameter in ('weight', 'bias'):
                trains = getattr(other, parameter).requires_grad
                assert getattr(layer, parameter).requires_grad == trains, (arguments, name, parameter)
            for parameter, value in layer.named_parameters():
                assert value.requires_grad == layer.weight.requires_grad, (arguments, name, parameter)
            froze = froze or not (other.training and other.weight.requires_grad)
    return froze


@pytest.mark.usefixtures('_no_initialization')
class TestFrozen:
    @pytest.mark.parametrize('network', [network for network in NETWORKS if network not in REPLACE])
    def test_ubn(self, network):
        assert assert_frozen_alike(network, 'UBN') == (network not in FREEZE_NONE)

    @pytest.mark.parametrize('norm', [norm.__name__ for norm in NORMS if norm.__name__ != 'UBN'])
    @pytest.mark.parametrize('network', ['mmdet.ResLayer', 'mmdet.ResNet'])
    def test_other_types(self, network, norm):
        assert assert_frozen_alike(network, norm)

    @pytest.mark.parametrize('network', IGNORE)
    def test_those_that_ignore_it(self, network):
        model = nn.ModuleDict(dict(backbone=build(network, 'UBN')))
        cfg = Config(dict(model=dict(backbone=dict(norm_cfg=dict(type='UBN')))))
        with pytest.raises(ConfigError, match='asks for UBN, but'):
            check_norms_used(cfg, model)

    @pytest.mark.parametrize('network', REPLACE)
    def test_those_that_replace_it(self, network):
        with pytest.raises(RuntimeError, match=f'of type UBN, would be replaced by a {REPLACE[network]}'):
            build(network, 'UBN')

    def test_tables_name_networks_that_there_are(self):
        assert {*ARGUMENTS, *STAGES, *FREEZE_NONE, *IGNORE, *REPLACE} == NETWORKS.keys()


# --- what frozen norms do ---------------------------------------------------------------------------------------------

# Those that ask for isinstance(layer, nn.BatchNorm2d), in a form of few channels.
ASK_FOR_BATCH_NORM_2D = {
    'mmdet.ResLayer': (dict(depth=50, stage=1), (2, 256, 8, 8)),
    'mmdet.ResLayerExtraNorm': (dict(depth=50, stage=1), (2, 256, 8, 8)),
    'mmdet.EfficientNet': (dict(), (2, 3, 32, 32)),
    'mmpretrain.EfficientNet': (dict(), (2, 3, 32, 32)),
    'mmpretrain.EfficientNetV2': (dict(arch='b0'), (2, 3, 32, 32)),
    'mmpretrain.ShuffleNetV2': (dict(widen_factor=0.5), (2, 3, 64, 64)),
}


@pytest.mark.parametrize('norm_eval', [True, False])
@pytest.mark.parametrize('network', ASK_FOR_BATCH_NORM_2D)
def test_no_buffer_of_a_frozen_norm_moves(network, norm_eval):
    arguments, shape = ASK_FOR_BATCH_NORM_2D[network]
    model = build(network, 'UBN', norm_eval=norm_eval, **arguments)
    model.train()
    layers = norm_layers(model)
    before = {name: {key: value.clone() for key, value in layer.named_buffers()} for name, layer in layers.items()}
    model(batch(shape))
    for name, layer in layers.items():
        moved = [key for key, value in layer.named_buffers() if not torch.equal(value, before[name][key])]
        if norm_eval:
            assert moved == [], name
        else:
            assert 'running_similarity' in moved, name
