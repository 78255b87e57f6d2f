"""The counters of MMEngine and mmcv count every norm type, by the formula of ``mmubn/openmmlab/counters.py``."""

import copy
import re

import mmcv.cnn
import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN

ALL_OFF = dict(threshold=None, centering=False, scaling=False, kernel_size=1)
# Per value of the input, in evaluation: moments + normalisation + taps.
COSTS = {
    'UBN': (UBN, {}, 1 + 1 + 9),
    'SyncUBN': (SyncUBN, {}, 1 + 1 + 9),
    'UBN 5x5': (UBN, dict(kernel_size=5), 1 + 1 + 25),
    'UBN without centering': (UBN, dict(centering=False), 1 + 1 + 9),
    'UBN without scaling': (UBN, dict(scaling=False), 1 + 1 + 9),
    'UBN with the gate and the affine step alone': (UBN, dict(centering=False, scaling=False), 0 + 1 + 9),
    'UBN pointwise': (UBN, dict(kernel_size=1), 1 + 1 + 1),
    'UBN as BatchNorm': (UBN, ALL_OFF, 0 + 1 + 1),
    'RBN': (RBN, {}, 1 + 1 + 1),
    'BNET': (BNET, {}, 0 + 1 + 9),
    'BNET 7x7': (BNET, dict(kernel_size=7), 0 + 1 + 49),
    'IEBN': (IEBN, {}, 1 + 1 + 1),
    'UnitizedBN': (UnitizedBN, {}, 2 + 1 + 1),
}
CHANNELS, SIZE = 4, 6
VALUES = CHANNELS * SIZE * SIZE


@pytest.fixture(autouse=True)
def installed(install):
    """For the tests of this file alone: ``import mmubn`` leaves both counters as they are."""
    install('flop-counter-mmengine', 'flop-counter-mmcv')


def model(norm):
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 1, bias=False), norm)


def count_mmengine(module):
    info = get_model_complexity_info(module, (3, SIZE, SIZE))
    return info['flops'], info['params']


def count_mmcv(module):
    return mmcv.cnn.get_model_complexity_info(module, (3, SIZE, SIZE), as_strings=False, print_per_layer_stat=False)


def of_norm(count, norm):
    """FLOPs per value, and parameters, that the counter sees in the norm."""
    flops, parameters = count(model(norm))
    return (flops - 3 * VALUES) / VALUES, parameters - 3 * CHANNELS


@pytest.mark.parametrize(('norm', 'options', 'cost'), COSTS.values(), ids=COSTS)
def test_evaluation(norm, options, cost):
    layer = norm(CHANNELS, **options).eval()
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    assert of_norm(count_mmengine, layer) == (cost, parameters)
    bias_of_the_convolution = int(layer.kernel_size > 1)
    assert of_norm(count_mmcv, layer) == (cost + bias_of_the_convolution, parameters)


@pytest.mark.parametrize('count', [count_mmengine, count_mmcv])
@pytest.mark.parametrize('training', [True, False])
def test_as_batch_norm(count, training):
    norms = [norm.train(training) for norm in (UBN(CHANNELS, **ALL_OFF), nn.BatchNorm2d(CHANNELS))]
    assert of_norm(count, norms[0]) == of_norm(count, norms[1])


@pytest.mark.parametrize(('norm', 'options', 'cost'), COSTS.values(), ids=COSTS)
def test_training(norm, options, cost):
    layer = norm(CHANNELS, **options)
    assert of_norm(count_mmengine, layer)[0] == 4 + layer.kernel_size**2


@pytest.mark.parametrize('count', [count_mmengine, count_mmcv])
def test_features_without_height_and_width(count):
    """Of a Linear layer; UnitizedBN alone takes them."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CHANNELS, bias=False), UnitizedBN(CHANNELS)).eval()
    bare = head[:2]
    (flops, parameters), (without, others) = count(head), count(bare)
    assert (flops - without, parameters - others) == (4 * CHANNELS, 3 * CHANNELS)


@pytest.mark.parametrize('norm', [UBN, RBN, BNET, IEBN, UnitizedBN])
@pytest.mark.parametrize('training', [True, False])
def test_counting_leaves_the_model_as_it_was(norm, training):
    module = model(norm(CHANNELS)).train(training)
    before = copy.deepcopy(module.state_dict())
    count_mmengine(module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert 'forward' not in vars(module[1])
    module.train()(torch.randn(2, 3, 4, 4))
    assert module[1].num_batches_tracked == 1


def test_each_layer_of_the_tables():
    info = get_model_complexity_info(model(UBN(CHANNELS)).eval(), (3, SIZE, SIZE))
    row = r'\| +1 +\| +52 +\| +1\.584K +\|'  # 13 parameters per channel, 11 FLOPs per value
    assert re.search(row, info['out_table']), info['out_table']


def test_installing_twice_counts_once(install):
    install('flop-counter-mmengine', 'flop-counter-mmcv')
    assert of_norm(count_mmcv, UBN(CHANNELS).eval())[0] == 12
    assert of_norm(count_mmengine, UBN(CHANNELS).eval())[0] == 11
