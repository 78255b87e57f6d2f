"""A whole state dict in another layout: of the same function, or refused."""

import copy
from collections import OrderedDict

import pytest
import torch
from saved_norms import (
    BATCH_NORM,
    BNETS,
    CHANNELS,
    LARGE,
    LENGTH,
    NORMALISED,
    PREFIX,
    RAW,
    RBNS,
    RECTIFICATIONS,
    SOURCES,
    ReleasedBNET,
    ReleasedUBN,
    assert_same_function,
    inside,
    source,
)
from torch import nn

from mmubn import BNET, RBN, UBN
from mmubn.checkpoints import LAYOUTS, CheckpointError, convert_state_dict

CONVERSIONS = {  # layout to write: what has an exact equal in it, whatever the values
    'bn': {'ubn plain'},
    'rbn': {'ubn plain', 'rbn-released'},
    'rbn-released': {'ubn plain', 'rbn'},
    'bnet': {'ubn plain', *BNETS, *LARGE},
    'bnet-released': {'ubn plain', *BNETS, *LARGE},
    'iebn': {'ubn plain', 'iebn-released'},
    'iebn-released': {'ubn plain', 'iebn'},
    'unitizedbn': {'ubn plain'},
    'ubn': {'ubn plain', 'ubn centering', *RBNS, *BNETS, *LARGE},
    'ubn-released': {'ubn plain', 'ubn centering', *BNETS, *LARGE},
}


def convert_exactly(name, zeroed, to, calibrate_bias):
    reference = source(name, *zeroed)
    state_dict = inside(reference).state_dict()
    before = copy.deepcopy(state_dict)
    converted, counts = convert_state_dict(state_dict, to, calibrate_bias)
    assert counts == {LAYOUTS[name.split()[0]].title: 1}
    size = 5 if '5x5' in name or name == 'ubn centering' else 3
    build = {
        'bnet': lambda: BNET(CHANNELS, kernel_size=size),
        'bnet-released': lambda: ReleasedBNET(size),
        'ubn-released': lambda: ReleasedUBN(size),
        'ubn': lambda: UBN(CHANNELS, kernel_size=size, calibrate_bias=calibrate_bias),
    }
    norm = build.get(to, SOURCES[to])().double()
    # Into the other implementation as it is: its keys, its shapes.
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in inside(norm).state_dict().items()
    }
    inside(norm).load_state_dict(converted)
    assert_same_function(norm, reference)
    assert all(torch.equal(state_dict[key], before[key]) for key in before)
    # torch.save writes what a view is a part of, too.
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in converted.values())


@pytest.mark.parametrize('to', LAYOUTS)
@pytest.mark.parametrize('name', [name for name in SOURCES if 'calibrated' not in name])
def test_conversion_is_exact_or_refused(name, to):
    if name in CONVERSIONS[to] or name in BATCH_NORM or name == to:
        convert_exactly(name, [], to, calibrate_bias=False)
    else:
        state_dict = inside(source(name)).state_dict()
        keys = '|'.join(key.replace('.', r'\.') for key in state_dict)
        with pytest.raises(CheckpointError, match=f'^({keys}) of {LAYOUTS[name.split()[0]].title}'):
            convert_state_dict(state_dict, to)


@pytest.mark.parametrize('to', LAYOUTS)
@pytest.mark.parametrize('name', SOURCES)
def test_conversion_of_a_constant_times_batch_norm(name, to):
    convert_exactly(name, RECTIFICATIONS, to, calibrate_bias='calibrated' in name)


@pytest.mark.parametrize(
    ('name', 'zeroed', 'to', 'calibrate_bias'),
    [
        *[(name, [], 'ubn', True) for name in ('ubn-released', 'ubn calibrated scaling')],
        *[(name, [], 'ubn-released', True) for name in ('ubn calibrated', 'ubn calibrated scaling')],
        *[('bn', [], to, True) for to in ('ubn', 'ubn-released')],
        *[('ubn', ['neighbor_weight'], to, False) for to in ('rbn', 'rbn-released')],
        *[('rbn', ['bias'], to, True) for to in ('ubn', 'ubn-released')],
        *[(name, ['center_weight', 'scale_weight'], 'bnet', False) for name in ('rbn', 'ubn', 'ubn-released')],
    ],
)
def test_conversion_is_exact(name, zeroed, to, calibrate_bias):
    convert_exactly(name, zeroed, to, calibrate_bias)


@pytest.mark.parametrize(
    ('name', 'to', 'calibrate_bias'),
    [
        *[('bn', to, flag) for to in LAYOUTS if to != 'bn' for flag in (False, True)],
        *[('rbn', 'ubn', False), ('bnet', 'ubn', False), ('bnet', 'ubn-released', True), ('ubn-released', 'ubn', True)],
        *[(name, f'{name}-released', False) for name in ('rbn', 'bnet', 'iebn')],
        *[(f'{name}-released', name, False) for name in ('rbn', 'bnet', 'iebn')],
    ],
)
def test_round_trip(name, to, calibrate_bias):
    state_dict = inside(source(name)).state_dict()
    there, _ = convert_state_dict(state_dict, to, calibrate_bias)
    back, _ = convert_state_dict(there, name, calibrate_bias)
    shapes, other, same = ({key: value.shape for key, value in each.items()} for each in (state_dict, there, back))
    assert other != shapes
    assert same == shapes
    for key, value in state_dict.items():
        assert torch.allclose(back[key], value, rtol=1e-12), key


@pytest.mark.parametrize(
    ('name', 'to', 'calibrate_bias', 'parts'),
    [
        ('ubn', 'bn', False, ['center_weight', 'BatchNorm']),
        ('ubn calibrated scaling', 'bn', True, ['scale_weight', 'BatchNorm']),
        ('ubn', 'rbn', False, ['neighbor_weight', 'RBN']),
        ('ubn', 'ubn-released', False, ['bias', 'multiplies', 'released UBN']),
        ('ubn-released', 'ubn', False, ['bnconv.bias', 'multiplies', 'UBN']),
        ('bnet-released', 'bn', False, ['bnconv.weight', 'BatchNorm']),
        ('rbn', 'bnet', False, ['center_weight', 'BNET']),
        ('iebn', 'rbn', False, ['scale_weight of IEBN', RAW, 'RBN', NORMALISED]),
        ('iebn-released', 'ubn', False, ['weight_readjust of released IEBN', RAW, 'UBN', NORMALISED]),
        ('unitizedbn', 'bn', False, ['scale_weight of UnitizedBN', LENGTH, 'BatchNorm has no scaling']),
    ],
)
def test_conversion_that_is_not_exact_is_refused(name, to, calibrate_bias, parts):
    state_dict = inside(source(name)).state_dict()
    # The layer at fault is named, not the first.
    fine = {f'layer1.{key}': value for key, value in source('bn').state_dict().items()}
    with pytest.raises(CheckpointError, match=f'^{PREFIX}') as error:
        convert_state_dict(fine | state_dict, to, calibrate_bias)
    assert all(part in str(error.value) for part in parts), error.value


def test_conversion_keeps_the_rest_in_its_place():
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), source('bn'), nn.GroupNorm(2, CHANNELS))
    state_dict = model.state_dict()
    converted, counts = convert_state_dict(state_dict, 'bnet-released')
    assert counts == {'BatchNorm': 1}
    assert [key for key in converted if not key.startswith('1.')] == ['0.weight', '0.bias', '2.weight', '2.bias']
    assert [key.split('.')[0] for key in converted] == sorted(key.split('.')[0] for key in converted)
    assert all(converted[key] is state_dict[key] for key in converted if not key.startswith('1.'))
    assert isinstance(converted, OrderedDict)
    assert converted._metadata == state_dict._metadata


def test_conversion_tells_names_apart_that_begin_alike():
    model = nn.ModuleDict({'bn1': source('bn'), 'bn10': source('rbn-released', 'center_weight')})
    converted, counts = convert_state_dict(model.state_dict(), 'rbn')
    assert counts == {'BatchNorm': 1, 'released RBN': 1}
    other = nn.ModuleDict({'bn1': RBN(CHANNELS), 'bn10': RBN(CHANNELS)}).double()
    other.load_state_dict(converted)
    for name in model:
        assert_same_function(other[name], model[name])
