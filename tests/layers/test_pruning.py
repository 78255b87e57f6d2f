"""Structured pruning: a layer of fewer channels is the layer that was built with so many and given their values."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from helpers import batch, randomize
from networks import TYPES
from torch import nn

from mmubn import BNET, RBN, UBN, fold

CHANNELS = 5
NORMS = {norm.__name__: norm for norm in TYPES}
NORMS |= {f'BNET {k}x{k}': functools.partial(BNET, kernel_size=k) for k in (1, 5, 7)}
NORMS |= {f'UBN {k}x{k}': functools.partial(UBN, kernel_size=k) for k in (1, 5)}
NORMS['UBN without running statistics'] = functools.partial(UBN, track_running_stats=False)
KEPT = {
    'list': ([4, 0, 2], [4, 0, 2]),
    'tuple': ((1, 3), [1, 3]),
    'range': (range(1, 4), [1, 2, 3]),
    'from the end': ([-1, 0], [4, 0]),
    'array': (np.array([3, 1], dtype=np.uint8), [3, 1]),
    'tensor': (torch.tensor([2, 3]), [2, 3]),
    'mask': (torch.tensor([True, False, False, True, True]), [0, 3, 4]),
    'list of booleans': ([False, True, False, False, False], [1]),
    'slice': (slice(1, None, 2), [1, 3]),
    'all': (slice(None), [0, 1, 2, 3, 4]),
}
each_norm = pytest.mark.parametrize('norm', NORMS.values(), ids=NORMS)


def taught(norm):
    """A layer with random values and gradients, one parameter of it frozen."""
    layer = randomize(norm(CHANNELS))
    layer.bias.requires_grad_(False)
    (layer(batch((4, CHANNELS, 6, 5))) * batch((4, CHANNELS, 6, 5), seed=1)).sum().backward()
    return layer


def rows(tensor, kept):
    """Of a tensor whose first dimension has the numbers of one channel after those of another."""
    if tensor is None or tensor.dim() == 0:
        return tensor
    per_channel = len(tensor) // CHANNELS
    return torch.tensor([tensor[channel * per_channel + i] for channel in kept for i in range(per_channel)])


def fresh(norm, layer, kept):
    """The layer to compare with: built with fewer channels, and given their values one by one."""
    expected = norm(len(kept))
    expected.load_state_dict({name: rows(value, kept) for name, value in layer.state_dict().items()})
    return expected.train(layer.training)


def results(layer):
    """Of two steps of training and of an evaluation: outputs, gradients, buffers."""
    channels, found = layer.num_features, []
    for step, training in enumerate((True, True, False)):
        layer.train(training).zero_grad()
        x = batch((4, channels, 6, 5), seed=step).requires_grad_()
        y = layer(x)
        (y * batch((4, channels, 6, 5), seed=9)).sum().backward()
        found += [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters()), *layer.buffers()]
    return copy.deepcopy(found)


@each_norm
@pytest.mark.parametrize(('index', 'kept'), KEPT.values(), ids=KEPT)
def test_it_is_the_layer_built_with_fewer_channels(norm, index, kept):
    layer = taught(norm)
    expected = fresh(norm, layer, kept)
    gradients = {name: rows(parameter.grad, kept) for name, parameter in layer.named_parameters()}
    layer.select_channels(index)
    assert layer.num_features == len(kept)
    assert repr(layer) == repr(expected)
    assert layer.state_dict().keys() == expected.state_dict().keys()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    for name, parameter in layer.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad == (name != 'bias')
        assert parameter.grad is None if name == 'bias' else torch.equal(parameter.grad, gradients[name])

    reloaded = norm(len(kept))
    reloaded.load_state_dict(layer.state_dict())
    expected.bias.requires_grad_(False)
    reloaded.bias.requires_grad_(False)
    for one, other, again in zip(*map(results, (layer, expected, reloaded)), strict=True):
        assert (one is None) == (other is None) == (again is None)
        assert one is None or (torch.equal(one, other) and torch.equal(one, again))


@each_norm
def test_selections_follow_each_other(norm):
    layer = taught(norm)
    expected = fresh(norm, layer, [3, 1])
    layer.select_channels([1, 3, 4])
    layer.select_channels([1, 0])
    assert all(map(torch.equal, layer.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize('norm', TYPES)
def test_it_goes_on_in_other_ways(norm):
    """Copied, in another dtype, and folded."""
    layer = taught(norm).eval()
    layer.select_channels([4, 0, 2])
    expected, x = fresh(norm, taught(norm).eval(), [4, 0, 2]), batch((2, 3, 4, 4))
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected(x))
    torch.testing.assert_close(fold(layer)(x), expected(x))
    torch.testing.assert_close(layer.double()(x.double()), expected.double()(x.double()))


@pytest.mark.parametrize(
    'index',
    [
        [],
        slice(5, None),
        torch.zeros(5, dtype=torch.bool),
        [5],
        [-6],
        [0, 0],
        torch.tensor([1, 0, 1, 0, 0], dtype=torch.uint8),  # a mask, as torch once had them
        [True, False],
        [0.0, 0.5],
        [[0, 1], [2, 3]],
        3,
        None,
        True,
        {0, 1},
        'weight',
        slice(None, None, -1),
    ],
    ids=str,
)
def test_what_is_no_choice_of_channels_is_refused_and_changes_nothing(index):
    layer = taught(UBN)
    before, parameters = copy.deepcopy(layer.state_dict()), list(layer.parameters())
    with pytest.raises(ValueError, match=r'^UBN: index must .*, got '):
        layer.select_channels(index)
    assert layer.num_features == CHANNELS
    assert all(one is other for one, other in zip(layer.parameters(), parameters, strict=True))
    assert all(map(torch.equal, layer.state_dict().values(), before.values()))


def slice_as_a_batch_norm(layer, kept):
    """What Torch-Pruning does to anything that is a BatchNorm (BatchnormPruner.prune_out_channels)."""
    layer.num_features = len(kept)
    layer.running_mean = layer.running_mean.data[kept]
    layer.running_var = layer.running_var.data[kept]
    for name in ('weight', 'bias'):
        setattr(layer, name, nn.Parameter(getattr(layer, name).data[kept]))


@pytest.mark.parametrize('kept', [[0, 3], [2]], ids=str)  # one channel fits any number of them
@pytest.mark.parametrize('norm', TYPES)
class TestHalfSliced:
    def test_as_torch_pruning_does(self, norm, kept):
        layer = taught(norm)
        slice_as_a_batch_norm(layer, kept)
        x = batch((4, len(kept), 6, 5))
        state = copy.deepcopy(layer.state_dict())
        for training in (True, False):
            with pytest.raises(ValueError, match=rf'^{norm.__name__}: .* must have shape .*layer\.select_channels'):
                layer.train(training)(x)
        for refused in (fold, lambda layer: layer.select_channels([0])):
            with pytest.raises(ValueError, match=rf'^{norm.__name__}: .* must have shape .*layer\.select_channels'):
                refused(layer)
        assert all(map(torch.equal, layer.state_dict().values(), state.values())), 'nothing was counted or moved'

    def test_only_some_of_its_tensors(self, norm, kept):
        """By hand, with ``num_features`` and without."""
        names = [*dict(taught(norm).named_parameters()), 'running_mean', 'running_var']
        for count, num_features in itertools.product(range(1, len(names)), (len(kept), CHANNELS)):
            layer = taught(norm)
            layer.num_features = num_features
            for name in names[:count]:
                value = rows(getattr(layer, name).data, kept)
                setattr(layer, name, nn.Parameter(value) if isinstance(getattr(layer, name), nn.Parameter) else value)
            with pytest.raises(ValueError, match=rf'^{norm.__name__}: .* must have shape .*layer\.select_channels'):
                layer(batch((4, num_features, 6, 5)))


def test_channels_of_a_layer_without_pooling_over_channels_are_independent():
    """A channel of an RBN is what it was in the wider layer."""
    layer, x = taught(RBN), batch((4, CHANNELS, 6, 5))
    expected = copy.deepcopy(layer)(x)[:, [4, 1]]
    layer.select_channels([4, 1])
    torch.testing.assert_close(layer(x[:, [4, 1]]), expected)
