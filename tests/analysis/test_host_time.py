"""Launches through a driver that stands in for a GPU: a replay hands it what the steps do, and the tool counts time."""

import math

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn

pytest.importorskip('triton')

from mmubn import UBN
from mmubn.analysis.host_time import StandInDriver, host_times, stand_in
from mmubn.ops import use_backend

SHAPE = (2, 4, 3, 4)


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """What the driver is told to launch."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    found = []
    with stand_in(StandInDriver(lambda *launch: found.append(launch))), use_backend('triton'):
        yield found


@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False])
def test_a_replay_launches_what_the_steps_do(launched, training):
    layer = randomize(UBN(SHAPE[1])).train(training)
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    inputs = {tensor.data_ptr() for tensor in (x, *layer.parameters(), *layer.buffers())}
    recorded = []
    for iteration in range(3):
        del launched[:]
        y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], dy)
        # An argument is a number, or a place in memory: an input is where it was, and all else is aligned as it was.
        step = []
        for function, grid, arguments in launched:
            addresses = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
            traits = [each if each in (*inputs, None) or abs(each) < 2**32 else each % 16 for each in addresses]
            step.append((function, grid, traits))
        assert any(y.data_ptr() in [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
                   for _, _, arguments in launched)  # fmt: skip
        recorded.append(step)
        kinds = {type(each) for _, _, arguments in launched for each in arguments}
        assert (Tensor in kinds or nn.Parameter in kinds) == (iteration < 2)
    steps, half, replays = recorded
    assert len(steps) == (8 if training else 7)
    assert half == steps
    assert replays == steps


def test_times_are_of_every_layer_and_round():
    layers = {'bn': nn.BatchNorm2d(4), 'ubn': UBN(4)}
    found = host_times(layers, SHAPE, rounds=3, steps=2)
    assert found.keys() == layers.keys()
    for measures in found.values():
        for values in measures.values():
            assert len(values) == 3
            assert all(value > 0 and math.isfinite(value) for value in values)
