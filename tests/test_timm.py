"""Networks of timm with the norms of this package: built, started from BatchNorm's weights, trained; timm's utilities.

Where timm makes a norm and its activation in one layer, the norm has the activation as a child.
"""

import copy
import functools
import io
import subprocess
import sys

import pytest
import torch
from helpers import batch, randomize
from networks import TYPES
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import RBN, UBN, SyncUBN, fold
from mmubn.layers import UnifiedNorm

timm = pytest.importorskip('timm')

from timm.layers import (  # noqa: E402
    BatchNormAct2d,
    ConvNormAct,
    DropBlock2d,
    GroupNormAct,
    convert_splitbn_model,
    convert_sync_batchnorm,
    create_norm_act_layer,
    get_norm_act_layer,
)
from timm.optim import param_groups_weight_decay  # noqa: E402
from timm.utils import ModelEmaV2, ModelEmaV3, freeze, reparameterize_model, unfreeze  # noqa: E402
from timm.utils.model import freeze_batch_norm_2d  # noqa: E402

# A small network of each family; all its norms are those of norm_layer. The first three make norms alone.
FAMILIES = (
    'resnet10t',
    'res2net50_26w_4s',
    'resnest14d',
    'efficientnet_b0',
    'regnety_002',
    'resnetv2_18',
    'densenet121',
    'gernet_s',
    'cs3darknet_s',
    'ese_vovnet19b_slim_dw',
)
TINY = 'tinynet_e'  # an EfficientNet with 31 norms, 21 of them with an activation


def create(name=TINY, norm_layer=UBN, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, norm_layer=norm_layer, **options)


def with_batch_norm(name=TINY):
    """timm's own network, with norms as after some training."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    for seed, norm in enumerate(norms(model, _BatchNorm)):
        randomize(norm, scale=0.1, seed=seed)
    return model


def norms(model, kind=UnifiedNorm):
    return [module for module in model.modules() if isinstance(module, kind)]


def images(seed=0, size=64):
    return batch((2, 3, size, size), seed=seed)


def step(model, x):
    """Output, gradient of the input and running statistics of a training step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad, torch.cat([norm.running_var for norm in norms(model, _BatchNorm)])


def assert_starts_from(theirs, ours, x):
    """With the weights of ``theirs``: the same in evaluation, in a training step, and in evaluation after it.

    In float64, where rounding is no excuse.
    """
    theirs, ours, x = theirs.double(), ours.double(), x.double()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    for found, expected in zip(step(ours.train(), x), step(theirs.train(), x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


class TestFamilies:
    @pytest.mark.parametrize('name', FAMILIES)
    def test_starts_from_the_weights_of_batch_norm(self, name):
        theirs, ours = with_batch_norm(name), create(name)
        assert [type(norm) for norm in norms(ours, _BatchNorm)] == [UBN] * len(norms(theirs, _BatchNorm))
        assert_starts_from(theirs, ours, images())

    @pytest.mark.parametrize('name', FAMILIES)
    def test_initial_weights_are_those_with_batch_norm(self, name):
        """The last norm of a residual branch starts at 0, for one."""
        torch.manual_seed(0)
        theirs = timm.create_model(name, num_classes=3).state_dict()
        ours = create(name).state_dict()
        assert theirs.keys() <= ours.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), key
        added = {key.rpartition('.')[2] for key in ours.keys() - theirs.keys()}
        assert added == {'neighbor_weight', 'center_weight', 'scale_weight', 'scale_bias', 'running_similarity'}
        assert not any(value.any() for key, value in ours.items() if key.endswith(('neighbor_weight', 'center_weight')))

    def test_zero_initialisation(self):
        model = create('resnet10t')
        assert all(block.bn2.weight.eq(0).all() for block in (model.layer1[0], model.layer4[0]))


class TestTypes:
    @pytest.mark.parametrize('norm', TYPES)
    def test_start_from_the_weights_of_batch_norm(self, norm):
        theirs, ours = with_batch_norm(), create(norm_layer=norm)
        assert {type(each) for each in norms(ours, _BatchNorm)} == {norm}
        assert_starts_from(theirs, ours, images())

    def test_partial(self):
        """Arguments of the layer come from it, those of a network are added: DPN binds an eps, and a second time."""
        part = functools.partial(functools.partial(UBN, kernel_size=5, momentum=0.3), threshold=None)
        for norm in norms(create(norm_layer=part)):
            assert (norm.kernel_size, norm.momentum, norm.threshold, norm.eps) == (5, 0.3, None, 1e-5)
        found = norms(create('dpn48b', part))
        assert [type(norm.act) for norm in found] == [nn.SiLU, nn.SiLU]
        assert {(norm.kernel_size, norm.eps) for norm in found} == {(5, 1e-3)}

    def test_class_of_ones_own(self):
        class Mine(RBN):
            """Takes whatever there is."""

            def __init__(self, num_features, **options):
                super().__init__(num_features, **options)

        model = create(norm_layer=functools.partial(Mine, eps=1e-3))
        assert {(type(norm), float(norm.eps)) for norm in norms(model)} == {(Mine, 1e-3)}
        assert [type(norm.act) for norm in norms(model)] == [
            type(norm.act) for norm in norms(with_batch_norm(), _BatchNorm)
        ]

    def test_trains(self):
        torch.manual_seed(0)
        model, labels = create(norm_layer=SyncUBN), torch.arange(12) % 3
        x = torch.randn(12, 3, 64, 64) + labels[:, None, None, None]
        optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
        for _ in range(6):
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], losses
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_checkpointing_of_activations(self):
        plain, checkpointed = create(), create()
        checkpointed.set_grad_checkpointing()
        for found, expected in zip(step(checkpointed, images()), step(plain, images()), strict=True):
            assert torch.equal(found, expected)
        assert all(norm.num_batches_tracked == 1 for norm in norms(checkpointed))


ACTIVATIONS = {
    'ReLU': (nn.ReLU, {}),
    'by name': ('silu', {}),
    'arguments': (nn.LeakyReLU, dict(act_kwargs=dict(negative_slope=0.3))),
    'not in place': (nn.Hardswish, dict(inplace=False)),
    'parameters': ('prelu', {}),
    'none': (None, {}),
    'not applied': (nn.ReLU, dict(apply_act=False)),
    'dropped blocks': (nn.ReLU, dict(drop_layer=functools.partial(DropBlock2d, drop_prob=0.5, block_size=1))),
}


def pair(act_layer=nn.SiLU, norm=UBN, **options):
    """A norm with its activation, ours with the weights of timm's, and timm's."""
    theirs = randomize(get_norm_act_layer(nn.BatchNorm2d, act_layer)(4, **options))
    ours = get_norm_act_layer(norm, act_layer)(4, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


class TestLayer:
    @pytest.mark.parametrize(('act_layer', 'options'), ACTIVATIONS.values(), ids=ACTIVATIONS)
    def test_what_follows_is_as_in_timm(self, act_layer, options):
        ours, theirs = pair(act_layer, **options)
        assert (type(ours), type(theirs)) == (UBN, BatchNormAct2d)
        assert repr(ours.act) == repr(theirs.act)
        assert repr(ours.drop) == repr(theirs.drop)
        assert_starts_from(theirs, ours, batch((2, 4, 5, 6)))

    def test_of_samples_of_no_elements(self):
        ours, _ = pair()
        assert ours(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)

    def test_arguments_that_nobody_knows(self):
        with pytest.raises(TypeError, match='unknown'):
            get_norm_act_layer(UBN, nn.ReLU)(4, unknown=1)
        with pytest.raises(TypeError, match='act_layer'):
            UBN(4, act_layer=nn.ReLU)

    def test_copies(self):
        ours, theirs = pair()
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        x = batch((2, 4, 5, 6))
        for copied in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
            assert type(copied) is UBN
            torch.testing.assert_close(copied.eval()(x), theirs.eval()(x))
        assert '(act): SiLU' in repr(ours)

    def test_other_norms_are_those_of_timm(self):
        assert get_norm_act_layer(None) is None
        for norm, kind in ((nn.BatchNorm2d, BatchNormAct2d), ('groupnorm', GroupNormAct)):
            layer = get_norm_act_layer(norm, nn.SiLU)(32)
            assert type(layer) is kind
            assert type(layer.act) is nn.SiLU
        assert type(create_norm_act_layer(functools.partial(nn.GroupNorm, num_groups=2), 4)) is GroupNormAct
        with pytest.raises(AssertionError, match='No equivalent norm_act layer for instancenorm2d'):
            get_norm_act_layer(nn.InstanceNorm2d, nn.ReLU)

    def test_a_function_makes_both(self):
        def both(channels, **options):
            return get_norm_act_layer(UBN, nn.GELU)(channels, **options)

        model = create(norm_layer=both)
        assert {type(norm.act) for norm in norms(model)} == {nn.GELU, nn.Identity}
        assert type(get_norm_act_layer(lambda channels: nn.BatchNorm2d(channels), nn.ReLU)(4)) is nn.BatchNorm2d

    @pytest.mark.parametrize('name', [TINY, 'densenet121'])
    def test_a_function_that_drops_the_activation(self, name):
        with pytest.raises(TypeError, match=r'makes a UBN without the activation .* functools\.partial\(UBN, \.\.\.\)'):
            create(name, lambda channels, **_: UBN(channels))

    def test_a_function_where_no_activation_is_wanted(self):
        for act_layer, options in ((None, {}), (nn.ReLU, dict(apply_act=False))):
            assert type(get_norm_act_layer(lambda channels, **_: UBN(channels), act_layer)(4, **options)) is UBN
        assert len(norms(create('resnet10t', lambda channels, **_: UBN(channels, kernel_size=1)))) == 14


class TestMMPretrain:
    @pytest.fixture(autouse=True)
    def quiet(self, monkeypatch):
        monkeypatch.setattr('mmpretrain.models.backbones.timm_backbone.print_timm_feature_info', lambda info: None)

    def build(self, name, norm_layer):
        from mmpretrain.registry import MODELS

        torch.manual_seed(0)
        return MODELS.build(dict(type='mmpretrain.TIMMBackbone', model_name=name, norm_layer=norm_layer))

    @pytest.mark.parametrize('name', ['resnet10t', TINY, 'densenet121'])
    def test_backbone(self, name):
        """Its network is that of timm, activations too."""
        theirs = with_batch_norm(name)
        backbone = self.build(name, 'UBN')
        assert len(norms(backbone)) == len(norms(theirs, _BatchNorm))
        weights = {
            key: value for key, value in theirs.state_dict().items() if not key.startswith(('classifier.', 'fc.'))
        }
        backbone.timm_model.load_state_dict(weights)
        theirs.reset_classifier(0, '')
        backbone.eval(), theirs.eval()
        torch.testing.assert_close(backbone(images()), (theirs(images()),))

    def test_arguments_by_a_name_of_ones_own(self, monkeypatch):
        from mmengine.registry import MODELS

        monkeypatch.setitem(MODELS.module_dict, 'UBN5', functools.partial(UBN, kernel_size=5))
        found = norms(self.build(TINY, 'UBN5'))
        assert {norm.kernel_size for norm in found} == {5}
        assert [type(norm.act) for norm in found] == [type(norm.act) for norm in norms(create())]

    def test_classifier(self):
        from mmpretrain.registry import MODELS

        model = MODELS.build(dict(type='mmpretrain.TimmClassifier', model_name=TINY, norm_layer=UBN))
        assert [type(norm.act) for norm in norms(model)] == [type(norm.act) for norm in norms(create())]


CONVERSIONS = {
    'convert_sync_batchnorm': convert_sync_batchnorm,
    'convert_splitbn_model': convert_splitbn_model,
    'freeze_batch_norm_2d': freeze_batch_norm_2d,
    'freeze': freeze,
    'freeze of one layer': lambda model: freeze(model, 'bn1'),
}


class TestUtilities:
    @pytest.mark.parametrize('name', ['resnet10t', TINY])
    @pytest.mark.parametrize('convert', CONVERSIONS.values(), ids=CONVERSIONS)
    def test_what_makes_another_norm_of_it_is_an_error(self, convert, name):
        model = create(name)
        with pytest.raises(RuntimeError, match='of type UBN, would be replaced by a '):
            convert(model)
        assert {type(norm) for norm in norms(model, _BatchNorm)} == {UBN}

    @pytest.mark.parametrize('name', ['resnet10t', TINY])
    def test_sync_ubn_is_synchronized(self, name):
        model, x = create(name, SyncUBN).eval(), images()
        expected = model(x)
        assert convert_sync_batchnorm(model) is model
        assert {type(norm) for norm in norms(model, _BatchNorm)} == {SyncUBN}
        assert torch.equal(model(x), expected)

    def test_pruning_is_an_error(self):
        """timm makes new norms for a copy of the model, by the eps of the original."""
        with pytest.raises(RuntimeError, match='of type UBN, would be replaced by a BatchNorm2d'):
            timm.create_model('ecaresnet50d_pruned', norm_layer=UBN)

    def test_reparameterization_is_an_error(self):
        with pytest.raises(RuntimeError, match=r'treats the UBN of 48 channels as a BatchNorm .*mmubn\.deploy\.fold'):
            reparameterize_model(create('repvgg_a0'))

    def test_freezing_of_parameters_alone(self):
        model = create()
        freeze(model, include_bn_running_stats=False)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        unfreeze(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert {type(norm) for norm in norms(model, _BatchNorm)} == {UBN}

    @pytest.mark.parametrize('norm', TYPES)
    def test_no_parameter_of_a_norm_decays(self, norm):
        model = create(norm_layer=norm)
        free, decayed = (group['params'] for group in param_groups_weight_decay(model, weight_decay=0.1))
        assert {id(parameter) for each in norms(model) for parameter in each.parameters()} <= set(map(id, free))
        assert all(parameter.dim() > 1 for parameter in decayed)

    @pytest.mark.parametrize('ema', [ModelEmaV2, ModelEmaV3])
    def test_averaged_model(self, ema):
        model = create()
        first = copy.deepcopy(model.state_dict())
        average = ema(model, decay=0.75)
        step(model, images())
        randomize(model, scale=0.1)
        average.update(model)
        state, averaged = model.state_dict(), average.module.state_dict()
        assert state.keys() == averaged.keys()
        for key, value in averaged.items():
            if value.is_floating_point():
                torch.testing.assert_close(value, 0.75 * first[key] + 0.25 * state[key], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(average.module.eval()(images()), copy.deepcopy(average.module)(images()))

    def test_features(self):
        model, graph = (create(features_only=True, **options) for options in ({}, dict(feature_cls='fx')))
        graph.load_state_dict({f'graph_module.{key}': value for key, value in model.state_dict().items()})
        for training in (True, False):
            found, expected = (each.train(training)(images()) for each in (graph, model))
            assert len(found) == 5
            torch.testing.assert_close(found, expected)


class TestDeployment:
    @pytest.mark.parametrize('kernel_size', [1, 3])
    @pytest.mark.parametrize('name', [TINY, 'resnetv2_18'])
    def test_fold(self, name, kernel_size):
        """With the function of a BatchNorm, and with rectifications that act."""
        model = create(name, functools.partial(UBN, kernel_size=kernel_size)).double().eval()
        model.load_state_dict(with_batch_norm(name).state_dict())
        for scale in (0.0, 0.1):
            for norm in norms(model):
                randomize(norm, scale)
            folded = fold(model)
            assert not norms(folded)
            torch.testing.assert_close(folded(images().double()), model(images().double()))

    @pytest.mark.parametrize('norm', TYPES)
    def test_fold_of_a_layer(self, norm):
        ours, theirs = pair(nn.ReLU, norm)
        x = batch((2, 4, 5, 6))
        folded = fold(ours.eval())
        assert [type(each) for each in folded] == [nn.BatchNorm2d, nn.ReLU]
        torch.testing.assert_close(folded(x), theirs.eval()(x))
        randomize(ours)
        torch.testing.assert_close(fold(ours)(x), ours(x))
        assert type(fold(pair(None, norm)[0].eval())) is nn.BatchNorm2d

    def test_trace(self):
        """A layer with its activation is one node of a graph of torch.fx, which follows its mode."""
        model = ConvNormAct(3, 4, 3, norm_layer=UBN, act_layer=nn.SiLU)
        graph = torch.fx.symbolic_trace(model)
        targets = [node.target for node in graph.graph.nodes]
        assert targets.count('bn') == 1
        assert 'bn.act' not in targets
        for training in (True, False):
            expected = copy.deepcopy(model).train(training)(images())
            assert torch.equal(graph.train(training)(images()), expected)

    def test_compiled(self):
        ours, _ = pair()
        x = batch((2, 4, 5, 6))
        expected = copy.deepcopy(ours)(x)
        torch.testing.assert_close(torch.compile(ours, backend='eager', fullgraph=True)(x), expected)


ORDER = """
import sys
import {first}
assert ('timm' in sys.modules) == ({first!r} == 'timm'), 'mmubn must not import timm'
import {second}
import timm.models.densenet
from torch import nn
import mmubn
layer = timm.layers.get_norm_act_layer(mmubn.UBN, nn.SiLU)(4)
assert timm.models.densenet.get_norm_act_layer is timm.layers.create_norm_act.get_norm_act_layer
assert not any('mmubn' in type(finder).__module__ for finder in sys.meta_path)
assert 'timm_norms' not in timm.layers.create_norm_act.__loader__.__class__.__module__
print(type(layer).__name__, type(layer.act).__name__)
"""


class TestImport:
    @pytest.mark.parametrize('order', [('mmubn', 'timm'), ('timm', 'mmubn')])
    def test_in_any_order(self, order):
        code = ORDER.format(first=order[0], second=order[1])
        result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
        assert result.stdout.splitlines()[-1:] == ['UBN SiLU'], result.stderr
