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


def named_for(to, state_dict):
    """The keys that a conversion writes: those of BNET's networks have another name of the layer."""
    return {key.replace('.bn1.', '.bnet1.') if to == 'bnet-released' else key: state_dict[key] for key in state_dict}


def convert_exactly(name, zeroed, to, calibrate_bias):
    reference = source(name, *zeroed)
    state_dict = inside(reference).state_dict()
    before = copy.deepcopy(state_dict)
    converted, counts, kept = convert_state_dict(state_dict, to, calibrate_bias)
    assert (counts, kept) == ({LAYOUTS[name.split()[0]].title: 1}, 0)
    size = 5 if '5x5' in name or name == 'ubn centering' else 3
    build = {
        'bnet': lambda: BNET(CHANNELS, kernel_size=size),
        'bnet-released': lambda: ReleasedBNET(size),
        'ubn-released': lambda: ReleasedUBN(size),
        'ubn': lambda: UBN(CHANNELS, kernel_size=size, calibrate_bias=calibrate_bias),
    }
    norm = build.get(to, SOURCES[to])().double()
    # Into the other implementation as it is: its keys, its shapes.
    own = inside(norm).state_dict()
    assert {key: (value.shape, value.dtype) for key, value in converted.items()} == {
        key: (value.shape, value.dtype) for key, value in named_for(to, own).items()
    }
    inside(norm).load_state_dict({key: converted[other] for key, other in zip(own, named_for(to, own), strict=True)})
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
    there, *_ = convert_state_dict(state_dict, to, calibrate_bias)
    back, *_ = convert_state_dict(there, name, calibrate_bias)
    state_dict = named_for(name, state_dict)
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
    converted, counts, kept = convert_state_dict(state_dict, 'bnet-released')
    assert (counts, kept) == ({'BatchNorm': 1}, 0)
    assert [key for key in converted if not key.startswith('1.')] == ['0.weight', '0.bias', '2.weight', '2.bias']
    assert [key.split('.')[0] for key in converted] == sorted(key.split('.')[0] for key in converted)
    assert all(converted[key] is state_dict[key] for key in converted if not key.startswith('1.'))
    assert isinstance(converted, OrderedDict)
    assert converted._metadata == state_dict._metadata


def test_conversion_tells_names_apart_that_begin_alike():
    model = nn.ModuleDict({'bn1': source('rbn'), 'bn10': source('rbn-released', 'center_weight')})
    converted, counts, _ = convert_state_dict(model.state_dict(), 'rbn')
    assert counts == {'RBN': 1, 'released RBN': 1}
    other = nn.ModuleDict({'bn1': RBN(CHANNELS), 'bn10': RBN(CHANNELS)}).double()
    other.load_state_dict(converted)
    for name in model:
        assert_same_function(other[name], model[name])


class TestPlacement:
    """A network with its norms in some places keeps them there."""

    @staticmethod
    def network(third, first='bn', name='bn3'):
        block = {'bn1': source(first), name: source(third), 'downsample': nn.Sequential(source('bn'))}
        return nn.ModuleDict({'layer1': nn.Sequential(nn.ModuleDict(block))})

    @pytest.mark.parametrize('to', LAYOUTS)
    def test_batch_norms_beside_others_stay(self, to):
        state_dict = self.network(to).state_dict()
        converted, counts, kept = convert_state_dict(state_dict, to)
        assert (counts, kept) == ({LAYOUTS[to].title: 3 if to == 'bn' else 1}, 0 if to == 'bn' else 2)
        for name in ('bn1', 'downsample.0'):
            keys = [key for key in state_dict if key.startswith(f'layer1.0.{name}.')]
            assert keys
            assert all(torch.equal(converted[key], state_dict[key]) for key in keys)
            assert to == 'bn' or all(converted[key] is state_dict[key] for key in keys)

    @pytest.mark.parametrize('to', LAYOUTS)
    def test_batch_norms_alone_are_converted(self, to):
        _, counts, kept = convert_state_dict(self.network('bn').state_dict(), to)
        assert (counts, kept) == ({'BatchNorm': 3}, 0)

    @pytest.mark.parametrize(('third', 'name'), [('bnet', 'bn3'), ('bnet-released', 'bnet3')])
    def test_there_and_back_is_the_same(self, third, name):
        state_dict = self.network(third, name=name).state_dict()
        other = 'bnet-released' if third == 'bnet' else 'bnet'
        there, *_ = convert_state_dict(state_dict, other)
        assert {key.split('.')[2] for key in there} == {'bn1', 'downsample', 'bnet3' if third == 'bnet' else 'bn3'}
        back, *_ = convert_state_dict(there, third)
        once_more, *_ = convert_state_dict(back, third)
        for each in (back, once_more):
            assert each.keys() == state_dict.keys()
            assert all(torch.equal(each[key], state_dict[key]) for key in state_dict)
        if third == 'bnet-released':
            assert list(back) == list(state_dict)

    def test_back_to_batch_norm(self):
        model = self.network('bnet')
        with torch.no_grad():
            model.layer1[0].bn3.neighbor_weight.zero_()
        converted, counts, kept = convert_state_dict(model.state_dict(), 'bn')
        assert (counts, kept) == ({'BNET': 1}, 2)
        assert converted.keys() == self.network('bn').state_dict().keys()

    def test_a_layer_of_no_layout_beside_batch_norms_is_an_error(self):
        state_dict = self.network('bn').state_dict()
        del state_dict['layer1.0.bn3.weight']
        with pytest.raises(CheckpointError, match=r"'layer1\.0\.bn3' has the keys of no layout"):
            convert_state_dict(state_dict, 'bnet')

    @pytest.mark.parametrize('name', ['bn', 'bn2', 'norm', 'bn2a', 'xbn3', '3'])
    def test_the_names_of_their_networks(self, name):
        block = nn.ModuleDict({name: source('bnet'), 'bn1': source('bn')})
        for prefix, model in (('', block), ('layer1.', nn.ModuleDict({'layer1': block}))):
            converted, *_ = convert_state_dict(model.state_dict(), 'bnet-released')
            theirs = {'bn': 'bnet', 'bn2': 'bnet2'}.get(name, name)
            assert f'{prefix}{theirs}.bnconv.weight' in converted
            assert f'{prefix}bn1.weight' in converted


class TestHalfPrecision:
    """Parameters are written in their dtype, of values that are rounded once."""

    @pytest.mark.parametrize('to', LAYOUTS)
    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_as_a_layer_of_this_dtype(self, to, dtype):
        state_dict = inside(source('bn').to(dtype)).state_dict()
        converted, *_ = convert_state_dict(state_dict, to)
        build = {'bnet-released': lambda: ReleasedBNET(3), 'ubn-released': lambda: ReleasedUBN(3)}
        own = named_for(to, inside(build.get(to, SOURCES[to])().to(dtype)).state_dict())
        assert {key: value.dtype for key, value in converted.items()} == {key: own[key].dtype for key in own}
        wide, *_ = convert_state_dict({key: value.double() for key, value in state_dict.items()}, to)
        for key, value in converted.items():
            torch.testing.assert_close(value.double(), wide[key].double(), rtol=torch.finfo(dtype).eps, atol=0)

    def test_of_the_parameters_alone(self):
        """As where the statistics stay in float32."""
        norm = source('bn').half()
        norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
        converted, *_ = convert_state_dict(norm.state_dict(), 'ubn')
        wide = {'running_mean', 'running_var', 'running_similarity'}
        for key, value in converted.items():
            expected = torch.int64 if key == 'num_batches_tracked' else torch.float32 if key in wide else torch.float16
            assert value.dtype == expected, key

    def test_a_similarity_that_was_saved(self):
        norm = UBN(CHANNELS).half()
        norm.running_similarity = torch.tensor(0.1)
        converted, *_ = convert_state_dict(norm.state_dict(), 'ubn')
        assert converted['running_similarity'].equal(torch.tensor(0.1))
