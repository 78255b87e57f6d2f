"""What torch's counter of operations sees of a layer: the depthwise convolution, whatever computes it otherwise."""

import functools

import pytest
import torch
from helpers import batch, randomize
from networks import TYPES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmubn import BNET, UBN, backend_info
from mmubn.ops import use_backend

NORMS = {norm.__name__: norm for norm in TYPES}
NORMS |= {f'BNET {k}x{k}': functools.partial(BNET, kernel_size=k) for k in (5, 7)}
NORMS['UBN 1x1'] = functools.partial(UBN, kernel_size=1)


def count(layer, backward):
    x = batch(dtype=next(layer.parameters()).dtype).requires_grad_(backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        y = layer(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('norm', NORMS.values(), ids=NORMS)
def test_it_counts_the_convolution(norm, training):
    """Two operations for each value and tap, and in the backward what torch counts for a depthwise convolution."""
    layer, x = randomize(norm(3)).train(training), batch()
    kernel_size = layer.kernel_size
    assert backend_info(layer, x).startswith('cpp: '), 'whose kernels no counter sees'
    depthwise = nn.Conv2d(3, 3, kernel_size, padding=kernel_size // 2, groups=3)
    for backward in (False, True):
        found = count(layer, backward)
        assert found == (count(depthwise, backward) if kernel_size > 1 else 0)
        with use_backend('reference'):
            assert found == count(layer, backward)
    if kernel_size > 1:
        assert count(layer, backward=False) == 2 * kernel_size**2 * x.numel()


def test_it_counts_by_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), UBN(4))
    with FlopCounterMode(display=False) as counter:
        model(batch())
    counts = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    values = batch().numel() // 3 * 4
    assert counts['Sequential.0'] == 2 * 3 * values
    assert counts['Sequential.1'] == 2 * 9 * values
