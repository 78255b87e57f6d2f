"""What code written for nn.BatchNorm2d sets, asks and resets: a norm of this package does what a BatchNorm2d does."""

import copy
import inspect

import numpy as np
import pytest
import torch
from helpers import batch, randomize
from mmengine.model import initialize
from networks import TYPES
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from mmubn.layers import BNET, UBN, SyncUBN, UnifiedNorm

GATED = [UBN, SyncUBN]
EACH_TYPE = pytest.mark.parametrize('norm', TYPES)


def state(layer):
    return copy.deepcopy(layer.state_dict())


def assert_same_state(layer, expected):
    torch.testing.assert_close(dict(layer.state_dict()), dict(expected), rtol=0, atol=0)


def with_closed_gate(layer):
    if isinstance(layer, UBN):
        layer.running_similarity.fill_(-0.9)
    return layer


@EACH_TYPE
class TestType:
    def test_is_a_batch_norm_2d_by_its_direct_bases_too(self, norm):
        """User code asks isinstance; MMEngine's initialisers look at the names of the direct bases."""
        assert issubclass(norm, nn.BatchNorm2d)
        assert {nn.BatchNorm2d, _BatchNorm} <= set(norm.__bases__)
        assert not issubclass(norm, nn.SyncBatchNorm)

    @pytest.mark.parametrize('name', ['_BatchNorm', 'BatchNorm2d'])
    def test_so_is_a_subclass_of_a_user(self, norm, name):
        class Mine(norm):
            pass

        class Other(Mine, nn.Module):
            pass

        for kind in (norm, Mine, Other):
            layer = kind(3)
            assert isinstance(layer, norm)
            initialize(layer, dict(type='Constant', layer=name, val=0.5, bias=0.25))
            assert layer.weight.eq(0.5).all()
            assert layer.bias.eq(0.25).all()

    def test_torch_can_make_a_subclass_of_its_own(self, norm):
        """For a parametrization, as FSDP2 does for a shard."""
        layer = randomize(norm(4))
        expected = copy.deepcopy(layer)
        nn.utils.parametrize.register_parametrization(layer, 'weight', nn.Identity())
        assert isinstance(layer, norm)
        assert torch.equal(layer(batch((2, 4, 5, 5))), expected(batch((2, 4, 5, 5))))


@EACH_TYPE
class TestConstructor:
    def test_begins_with_the_arguments_of_a_batch_norm_2d(self, norm):
        names = list(inspect.signature(nn.BatchNorm2d).parameters)[:7]
        assert names[-2:] == ['device', 'dtype']
        assert list(inspect.signature(norm).parameters)[: len(names)] == names
        others = list(inspect.signature(norm).parameters.values())[len(names) :]
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in others)
        layer = norm(4, 1e-3, None, True, False, 'cpu', torch.float64)
        expected = nn.BatchNorm2d(4, 1e-3, None, True, False, 'cpu', torch.float64)
        for name in ('num_features', 'eps', 'momentum', 'affine', 'track_running_stats'):
            assert getattr(layer, name) == getattr(expected, name), name

    def test_device_and_dtype(self, norm):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            layer = norm(4, device='cpu', dtype=dtype)
            expected = norm(4).to(dtype)
            for name, tensor in expected.state_dict().items():
                assert layer.state_dict()[name].dtype == tensor.dtype, name
                assert torch.equal(layer.state_dict()[name], tensor), name
        layer = norm(4, device='meta')
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        layer = layer.to_empty(device='cpu')
        layer.reset_parameters()
        assert_same_state(layer, norm(4).state_dict())

    def test_without_running_statistics(self, norm):
        layer, plain = norm(4, track_running_stats=False), nn.BatchNorm2d(4, track_running_stats=False)
        buffers = dict(nn.Module.named_buffers(layer))
        assert buffers == {}
        assert set(plain.state_dict()) <= set(layer.state_dict())
        assert not {'running_mean', 'running_similarity'} & set(layer.state_dict())
        layer.reset_running_stats()
        layer.reset_parameters()
        x = batch((3, 4, 5, 5))
        y = randomize(layer)(x)
        assert torch.equal(layer.eval()(x), y), 'the statistics of the batch in evaluation too'
        copies = norm(4, track_running_stats=False)
        copies.load_state_dict(layer.state_dict())
        assert torch.equal(copies(x), y)

    def test_without_running_statistics_it_starts_from_a_batch_norm_without(self, norm):
        plain = randomize(nn.BatchNorm2d(4, track_running_stats=False)).double()
        layer = norm(4, track_running_stats=False).double()
        layer.load_state_dict(plain.state_dict())
        x = batch((3, 4, 5, 5), dtype=torch.float64)
        torch.testing.assert_close(layer(x), plain(x))
        with pytest.raises(RuntimeError, match=r'Unexpected key.*running_mean'):
            layer.load_state_dict(nn.BatchNorm2d(4).state_dict())

    def test_momentum_none_is_the_plain_average(self, norm):
        layer, plain = norm(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
        for seed in range(4):
            layer(batch(seed=seed) + seed)
            plain(batch(seed=seed) + seed)
        torch.testing.assert_close(layer.running_mean, plain.running_mean)
        torch.testing.assert_close(layer.running_var, plain.running_var)
        assert layer.num_batches_tracked == plain.num_batches_tracked == 4


@EACH_TYPE
class TestStatistics:
    def test_reset_opens_the_gate(self, norm):
        """Re-estimation of slimmable networks and NAS: reset, then forwards in training."""
        layer = with_closed_gate(randomize(norm(3)))
        layer.center_weight = None if layer.center_weight is None else nn.Parameter(torch.zeros(3))
        plain = nn.BatchNorm2d(3)
        layer.reset_running_stats()
        if norm in GATED:
            assert layer.running_similarity == 1
        for seed in range(3):
            for each in (layer, plain):
                each(batch(seed=seed, shared=3.0) + seed)
        torch.testing.assert_close(layer.running_mean, plain.running_mean)
        torch.testing.assert_close(layer.running_var, plain.running_var)

    def test_momentum_0_moves_nothing(self, norm, backend):
        """The second forward of SAM; the gate decides by the similarity as the first left it."""
        for tau in (0.9, -0.9):
            layer = randomize(norm(3))
            if norm in GATED:
                layer.running_similarity.fill_(tau)
            first = copy.deepcopy(layer)
            layer.momentum = 0
            before = state(layer)
            y = layer(batch(shared=3.0 if tau > 0 else 0.0))
            assert_same_state(layer, before)
            torch.testing.assert_close(y, first(batch(shared=3.0 if tau > 0 else 0.0)))
        layer.momentum = 0.1
        layer(batch())
        assert norm not in GATED or layer.running_similarity != before['running_similarity'], 'it moves again'

    def test_not_tracking_moves_nothing(self, norm, backend):
        """The auxiliary forwards of VAT, between the ordinary ones: switched off and on again."""
        for tau in (0.9, -0.9):
            layer = randomize(norm(3))
            if norm in GATED:
                layer.running_similarity.fill_(tau)
            x = batch(shared=3.0 if tau > 0 else 0.0)
            expected = copy.deepcopy(layer)(x)
            before = state(layer)
            layer.track_running_stats = False
            torch.testing.assert_close(layer(x), expected)
            evaluated = layer.eval()(x)
            assert_same_state(layer, before)
            layer.track_running_stats = True
            assert torch.equal(layer(x), evaluated), 'in evaluation by the running statistics, as a BatchNorm'
            layer.train()(x)
            assert layer.num_batches_tracked == before['num_batches_tracked'] + int(norm not in GATED or tau > 0)

    def test_without_buffers_the_batch_normalises(self, norm, backend):
        """Test-time adaptation and torch.func.replace_all_batch_norm_modules_ set them to None."""
        layer = randomize(norm(3))
        x = batch(shared=3.0)
        expected = copy.deepcopy(layer)(x)
        tau = None if norm not in GATED else layer.running_similarity.clone()
        with_closed_gate(layer)
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = None
        for training in (True, False):
            torch.testing.assert_close(layer.train(training)(x), expected)
        assert tau is None or layer.running_similarity == torch.tensor(-0.9)
        replaced = randomize(norm(3)).eval()
        torch.func.replace_all_batch_norm_modules_(replaced)
        torch.testing.assert_close(replaced(x), expected)
        with pytest.raises(ValueError, match='needs more than 1 value per channel'):
            replaced(torch.zeros(1, 3, 1, 1))

    def test_gradients_without_buffers_are_those_of_training(self, norm, backend):
        gradients = []
        for training in (True, False):
            layer = randomize(norm(3)).double().train(training)
            if not training:
                layer.running_mean = layer.running_var = None
            x = batch(dtype=torch.float64, shared=3.0).requires_grad_()
            y = layer(x)
            (y * y.detach().cos()).sum().backward()
            gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
        torch.testing.assert_close(*gradients)

    def test_update_bn_with_a_closed_gate(self, norm):
        """It resets, sets momentum to None, and puts it back; the gate then acts again."""
        layer = with_closed_gate(randomize(norm(3)))
        if layer.center_weight is not None:
            nn.init.zeros_(layer.center_weight)
        data = [batch(seed=seed) + seed for seed in range(3)]
        plain = nn.BatchNorm2d(3)
        for each in (layer, plain):
            update_bn(data, each)
        torch.testing.assert_close(layer.running_mean, plain.running_mean)
        torch.testing.assert_close(layer.running_var, plain.running_var)
        assert layer.momentum == 0.1


@EACH_TYPE
class TestInputs:
    @pytest.mark.parametrize('convert', [list, tuple, np.asarray, dict.fromkeys, lambda x: None, lambda x: 'image'])
    def test_what_is_no_tensor_gets_the_sentence(self, norm, convert):
        x = convert(batch((2, 3, 5, 5)))
        with pytest.raises(
            ValueError, match=rf'^{norm.__name__} expected a tensor of shape .*got a {type(x).__name__};'
        ):
            norm(3)(x)


class TestShape:
    """neighbor_weight is one-dimensional, for rules that go by the number of dimensions."""

    @pytest.mark.parametrize('norm', [UBN, BNET])
    def test_no_parameter_is_a_matrix(self, norm):
        layer = norm(4)
        assert all(parameter.ndim == 1 for parameter in layer.parameters())
        for parameter in layer.parameters():  # as Transformers written by hand do
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        assert layer.neighbor_weight.eq(0).all()

    @pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch 2.9 brings it')
    def test_muon_takes_matrices_alone(self):
        model = nn.Sequential(nn.Linear(4, 4), UBN(4))
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        assert len(matrices) == 1
        torch.optim.Muon(matrices)

    def test_the_order_is_channel_by_channel_and_row_by_row(self):
        layer = BNET(2).eval()
        nn.init.zeros_(layer.weight)
        with torch.no_grad():
            layer.neighbor_weight.view(2, 8)[1, 4] = 1.0  # right of the centre, of the second channel
        x = batch((1, 2, 4, 4))
        expected = torch.zeros_like(x)
        expected[:, 1, :, :-1] = x[:, 1, :, 1:] / (1 + 1e-5) ** 0.5
        torch.testing.assert_close(layer(x), expected)


def test_a_type_of_its_own_is_a_short_definition():
    """What extending.md promises, without naming the bases again."""

    class Centered(UnifiedNorm):
        def __init__(self, num_features, eps=1e-5, momentum=0.1):
            super().__init__(num_features, eps, momentum, centering=True)

    assert {nn.BatchNorm2d, _BatchNorm} <= set(Centered.__bases__)
    assert randomize(Centered(3))(batch()).shape == (4, 3, 6, 5)
