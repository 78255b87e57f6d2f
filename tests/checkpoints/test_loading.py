"""A norm layer of any known layout starts a layer of the same function, or is refused."""

import copy
import itertools
import logging
import warnings

import pytest
import torch
from mmengine.runner import checkpoint as mmengine_checkpoint
from saved_norms import (
    CHANNELS,
    LENGTH,
    LOST,
    NORMALISED,
    PREFIX,
    RAW,
    RECTIFICATIONS,
    SOURCES,
    TYPES,
    assert_same_function,
    fill,
    inside,
    source,
)
from torch import nn

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN
from mmubn.checkpoints import LAYOUTS, CheckpointError, counted_reads, report_reads


def load_by_torch(model, state_dict):
    model.load_state_dict(state_dict)


def load_by_mmengine(model, state_dict):
    """Silent where all is well: MMEngine tells of keys that are missing or too many by a warning in the log."""
    logger = logging.Logger('load')
    records = []
    logger.addFilter(lambda record: records.append(record))
    mmengine_checkpoint.load_state_dict(model, state_dict, logger=logger)
    assert not [record for record in records if record.levelno >= logging.WARNING], records


LOADERS = pytest.mark.parametrize('load', [load_by_torch, load_by_mmengine])


def assert_refused(model, state_dict, load, parts):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=PREFIX[:-1]) as error:
        load(model, state_dict)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert '\n' not in message
    for key, value in model.state_dict().items():  # nothing half loaded
        assert torch.equal(value, before[key]), key


# --- every layout into every type -------------------------------------------------------------------------------------

PAIRS = [
    (name, kind)
    for name, kind in itertools.product(SOURCES, TYPES)
    # No key of a UBN says whether it calibrates its bias; a layer takes it for one of its own argument.
    if name == 'ubn-released' or not name.startswith('ubn') or ('calibrated' in name) == ('calibrated' in kind)
]
APPROXIMATE = [('ubn-released', 'UBN'), ('ubn-released', 'SyncUBN')]


@pytest.mark.parametrize(('name', 'kind'), [pair for pair in PAIRS if pair not in APPROXIMATE])
def test_exact_or_refused(name, kind):
    build, exact = TYPES[kind]
    reference, norm = source(name), fill(build().double())  # whatever it held, every tensor is loaded over
    if name in exact:
        load_by_torch(inside(norm), inside(reference).state_dict())
        assert_same_function(norm, reference)
    else:
        assert_refused(inside(norm), inside(reference).state_dict(), load_by_torch, [])


@pytest.mark.parametrize(('name', 'kind'), PAIRS)
def test_a_constant_times_batch_norm(name, kind):
    reference, norm = source(name, *RECTIFICATIONS), fill(TYPES[kind][0]().double())
    if name in LOST.get(kind, ()):
        assert_refused(inside(norm), inside(reference).state_dict(), load_by_torch, ['is missing'])
    else:
        load_by_torch(inside(norm), inside(reference).state_dict())
        assert_same_function(norm, reference)


@pytest.mark.parametrize('kind', TYPES)
def test_batch_norm_leaves_the_rectifications_as_in_a_fresh_layer(kind):
    norm = fill(TYPES[kind][0]().double())
    norm.load_state_dict(source('bn').state_dict())
    for name, value in norm.initial_rectifications().items():
        assert torch.equal(getattr(norm, name), value), name


OPTIONS = [
    *[('bn', options) for options in ({}, dict(kernel_size=1), dict(kernel_size=5), dict(calibrate_bias=True))],
    *[('bn', options) for options in (dict(threshold=None), dict(centering=False), dict(scaling=False))],
    *[('rbn-released', options) for options in ({}, dict(kernel_size=1), dict(kernel_size=5))],
    *[('bnet-released', options) for options in ({}, dict(kernel_size=5), dict(centering=False), dict(scaling=False))],
    ('bnet-released', dict(calibrate_bias=True)),
    ('bnet-released 5x5', dict(kernel_size=7)),
    ('bnet', dict(kernel_size=5)),
    ('bnet-released 1x1', {}),
    ('bnet-released 1x1', dict(kernel_size=1, centering=False, scaling=False)),
    ('ubn-released', dict(calibrate_bias=True)),
    ('ubn-released', dict(calibrate_bias=True, kernel_size=5)),
    ('ubn', {}),
    ('ubn', dict(kernel_size=5)),
    ('ubn plain', dict(centering=False, scaling=False, kernel_size=1)),
    ('ubn plain', dict(centering=False, scaling=False, kernel_size=1, threshold=None)),
    ('ubn centering', dict(scaling=False, kernel_size=7)),
    ('ubn calibrated scaling', dict(centering=False, calibrate_bias=True)),
]


@LOADERS
@pytest.mark.parametrize(('name', 'options'), OPTIONS)
def test_same_function(name, options, load):
    reference = source(name)
    state_dict = inside(reference).state_dict()
    before = copy.deepcopy(state_dict)
    norm = fill(UBN(CHANNELS, **options).double())
    load(inside(norm), state_dict)

    assert_same_function(norm, reference)
    assert state_dict.keys() == before.keys()
    assert all(torch.equal(state_dict[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ('name', 'zeroed', 'layer'),
    [
        ('rbn', ['center_weight'], UBN(CHANNELS, centering=False)),
        ('rbn', ['scale_weight'], UBN(CHANNELS, scaling=False)),
        ('rbn', ['scale_weight'], UBN(CHANNELS, calibrate_bias=True)),
        ('rbn', ['bias'], UBN(CHANNELS, calibrate_bias=True)),
        ('ubn-released', ['bnconv.bias'], UBN(CHANNELS)),
        ('ubn-released', ['scale_weight'], UBN(CHANNELS)),
        ('ubn-released', ['scale_weight'], UBN(CHANNELS, scaling=False)),
        ('ubn', ['neighbor_weight'], UBN(CHANNELS, kernel_size=1)),
        ('iebn-released', ['weight_readjust'], UBN(CHANNELS)),
        *[(name, ['neighbor_weight'], RBN(CHANNELS)) for name in ('ubn', 'ubn centering')],
        ('ubn-released', ['neighbor_weight', 'bnconv.bias'], RBN(CHANNELS)),
        ('ubn centering', ['center_weight'], BNET(CHANNELS, kernel_size=5)),
        *[(name, ['center_weight', 'scale_weight'], BNET(CHANNELS)) for name in ('rbn', 'ubn', 'ubn-released')],
        ('bnet 5x5', ['neighbor_weight'], BNET(CHANNELS)),
    ],
)
def test_what_the_layer_lacks_is_zero(name, zeroed, layer):
    reference, norm = source(name, *zeroed), fill(copy.deepcopy(layer).double())
    norm.load_state_dict(reference.state_dict())
    assert_same_function(norm, reference)


@pytest.mark.parametrize('build', [UBN, BNET])
def test_a_5x5_kernel_with_zeros_around_3x3(build):
    reference = source('bnet-released 5x5')
    with torch.no_grad():
        inner = reference.bnconv.weight[:, :, 1:4, 1:4].clone()
        reference.bnconv.weight.zero_()[:, :, 1:4, 1:4] = inner
    norm = build(CHANNELS).double()
    norm.load_state_dict(reference.state_dict())
    assert_same_function(norm, reference)


def test_batch_norm_1d_starts_unitized_bn():
    reference, norm = fill(nn.BatchNorm1d(CHANNELS).double()), UnitizedBN(CHANNELS).double()
    norm.load_state_dict(reference.state_dict())
    x = torch.randn(8, CHANNELS, dtype=torch.float64)
    assert torch.allclose(norm(x), reference(x), rtol=1e-10)
    assert torch.allclose(norm.eval()(x), reference.eval()(x), rtol=1e-10)


@pytest.mark.parametrize('kind', TYPES)
def test_own_entries_are_left_alone(kind):
    reference, norm = fill(TYPES[kind][0]()), TYPES[kind][0]()
    if 'UBN' in kind:
        reference.running_similarity.fill_(0.25)
    norm.load_state_dict(reference.state_dict())
    for key, value in reference.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value), key


def test_running_similarity_survives_other_arguments():
    reference = source('ubn')
    reference.running_similarity.fill_(0.25)
    norm = UBN(CHANNELS, kernel_size=5)
    norm.load_state_dict(reference.state_dict())
    assert norm.running_similarity == 0.25


@pytest.mark.parametrize(('name', 'kind'), [('bn', 'UBN'), ('rbn', 'UBN'), ('bnet', 'UBN'), ('ubn', 'UBN')])
def test_num_batches_tracked_is_optional(name, kind):
    reference = source(name)
    state_dict = dict(reference.state_dict())
    del state_dict['num_batches_tracked']
    norm = TYPES[kind][0]().double()
    norm.load_state_dict(state_dict)
    assert_same_function(norm, reference)
    with_count = dict(state_dict, num_batches_tracked=torch.tensor(7))
    norm.load_state_dict(with_count)
    assert norm.num_batches_tracked == 7


@pytest.mark.parametrize(('kind', 'factor'), [('UBN', 0.7310585786), ('RBN', 0.7310585786), ('IEBN', 0.2689414214)])
def test_half_precision_is_rounded_once(kind, factor):
    reference = source('bn').half()
    norm = TYPES[kind][0]()
    norm.load_state_dict(reference.state_dict())
    assert torch.allclose(norm.weight * factor, reference.weight.float(), rtol=1e-6)
    assert_same_function(norm, reference, tolerance=1e-6)


@pytest.mark.parametrize('build', [UBN, SyncUBN])
def test_released_ubn_in_the_form_of_the_paper_warns(build):
    reference = source('ubn-released')
    norm, exact = build(CHANNELS), build(CHANNELS, calibrate_bias=True)
    with pytest.warns(UserWarning, match=r'scaling factor multiplies the bias.*calibrate_bias=True'):
        norm.load_state_dict(reference.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        exact.load_state_dict(reference.state_dict())
    # All but the bias is the same, and the bias is that of a sample whose features are average.
    same = ('weight', 'neighbor_weight', 'center_weight', 'scale_weight', 'scale_bias', 'running_mean', 'running_var')
    assert all(torch.equal(norm.state_dict()[key], exact.state_dict()[key]) for key in same)
    assert torch.allclose(norm.bias, exact.bias * torch.sigmoid(exact.scale_bias))


# --- what is refused --------------------------------------------------------------------------------------------------


def change(state_dict, remove=(), **add):
    kept = {key: value for key, value in state_dict.items() if key.removeprefix(PREFIX) not in remove}
    return kept | {PREFIX + key.replace('__', '.'): value for key, value in add.items()}


C = torch.ones(CHANNELS)
C4 = torch.ones(1, CHANNELS, 1, 1)
LACKS = [  # source, layer, what the message names
    ('rbn-released', UBN(CHANNELS, centering=False), ['center_weight', 'no centering']),
    ('rbn-released', UBN(CHANNELS, scaling=False), ['scale_weight', 'no scaling']),
    ('rbn-released', UBN(CHANNELS, calibrate_bias=True), ['bias', 'multiplies']),
    ('bnet-released', UBN(CHANNELS, kernel_size=1), ['bnconv.weight', '1 x 1', 'got a 3 x 3', 'set kernel_size=3']),
    ('bnet-released 5x5', UBN(CHANNELS), ['bnconv.weight', '3 x 3', 'a 5 x 5 kernel', 'set kernel_size=5 (norm_cfg']),
    ('bnet 5x5', BNET(CHANNELS), ['neighbor_weight', 'this BNET has a 3 x 3', 'a 5 x 5', 'set kernel_size=5']),
    ('ubn', UBN(CHANNELS, kernel_size=1), ['neighbor_weight', '1 x 1']),
    ('ubn', UBN(CHANNELS, centering=False), ['center_weight', 'no centering']),
    ('ubn plain', UBN(CHANNELS), ['center_weight is missing', 'norm_cfg']),
    ('ubn centering', UBN(CHANNELS, kernel_size=5), ['scale_bias is missing', 'norm_cfg']),
    ('ubn calibrated scaling', UBN(CHANNELS, calibrate_bias=True), ['center_weight is missing', 'norm_cfg']),
    ('iebn-released', UBN(CHANNELS), ['weight_readjust of released IEBN', RAW, NORMALISED]),
    ('iebn-released', RBN(CHANNELS), ['weight_readjust of released IEBN', RAW, NORMALISED]),
    ('iebn-released', BNET(CHANNELS), ['weight_readjust of released IEBN', RAW, 'this BNET has no scaling']),
    ('iebn', UBN(CHANNELS), ['center_weight is missing', 'a whole IEBN', RAW, NORMALISED, 'convert_norm.py']),
    ('unitizedbn', IEBN(CHANNELS), ['scale_bias is missing', 'a whole UnitizedBN', LENGTH, RAW, 'convert_norm.py']),
    ('unitizedbn', BNET(CHANNELS), ['scale_weight of UnitizedBN', LENGTH, 'this BNET has no scaling']),
    ('rbn', BNET(CHANNELS), ['center_weight', 'this BNET has no centering']),
    ('rbn', IEBN(CHANNELS), ['center_weight', 'this IEBN has no centering']),
    ('bnet', RBN(CHANNELS), ['neighbor_weight', 'this RBN has a 1 x 1 kernel']),
]
BROKEN = [  # source, keys to remove, keys to add, what the message names
    ('bn', ['weight'], {}, ['weight is missing', 'BatchNorm']),
    ('bn', ['weight', 'bias'], {}, ['missing']),
    ('bn', ['weight', 'bias', 'running_mean', 'running_var'], {}, ['missing']),
    ('bn', [], dict(weight=C4), ['readjust is missing', 'released IEBN']),
    ('bn', [], dict(running_var=C4), ['running_var', '(6,)', '(1, 6, 1, 1)']),
    ('bn', [], dict(weight=1.0), ['weight', 'float']),
    ('bn', [], dict(center_weight=C), ['center_weight', 'running_similarity is missing']),
    ('bn', [], dict(scale_weight=C, center_weight=C), ['center_weight', 'scale_bias is missing', 'RBN']),
    ('bn', [], dict(bnconv__bias=C), ['bnconv.bias', 'BatchNorm']),
    ('bn', [], dict(gamma=C), ['gamma', 'BatchNorm']),
    ('bn', [], dict(num_batches_tracked=torch.zeros(2)), ['num_batches_tracked', 'a scalar', '(2,)']),
    ('rbn-released', ['center_weight'], {}, ['center_weight is missing', 'released RBN']),
    ('rbn-released', ['scale_bias'], {}, ['scale_bias is missing', 'released RBN']),
    ('rbn-released', [], dict(weight_readjust=C4), ['weight_readjust is none of its keys', 'released RBN']),
    ('bnet-released', [], dict(bnconv__weight=torch.ones(CHANNELS, 1, 2, 2)), ['bnconv.weight', 'odd', '(6, 1, 2, 2)']),
    ('bnet-released', [], dict(bnconv__weight=torch.ones(CHANNELS, 6, 3, 3)), ['bnconv.weight', '(6, 6, 3, 3)']),
    ('iebn-released', ['bias_readjust'], {}, ['bias_readjust is missing', 'released IEBN']),
    ('iebn-released', ['weight_readjust', 'bias_readjust'], {}, ['bias_readjust is missing', 'released IEBN']),
    ('ubn-released', [], dict(weight=C), ['weight is none of its keys', 'released UBN']),
    ('ubn', ['scale_weight', 'scale_bias'], {}, ['scale_bias is missing', 'norm_cfg']),
    ('ubn', [], dict(neighbor_weight=torch.ones(CHANNELS, 7)), ['neighbor_weight', '(6, 7)']),
    ('ubn', [], dict(num_batches_tracked=torch.zeros(2)), ['num_batches_tracked', 'a scalar', '(2,)']),
    ('ubn', [], dict(center_weight=C4), ['no layout with vectors of shape (1, C, 1, 1)']),
    ('ubn', [], dict(extra=C), ['extra', 'UBN']),
]


@LOADERS
@pytest.mark.parametrize(('name', 'layer', 'parts'), LACKS)
def test_refuses_what_the_layer_lacks(name, layer, parts, load):
    assert_refused(inside(copy.deepcopy(layer)), inside(source(name)).state_dict(), load, parts)


@LOADERS
@pytest.mark.parametrize(('name', 'remove', 'add', 'parts'), BROKEN)
def test_refuses_what_is_of_no_layout(name, remove, add, parts, load):
    state_dict = change(inside(source(name)).state_dict(), remove, **add)
    assert_refused(inside(UBN(CHANNELS)), state_dict, load, parts)


def same_type(name):
    """The type that a layout is of, and UBN."""
    own = {'bn': 'UBN', 'rbn': 'RBN', 'bnet': 'BNET', 'iebn': 'IEBN', 'unitizedbn': 'UnitizedBN', 'ubn': 'UBN'}
    return dict.fromkeys([own[name.split('-')[0]], 'UBN'])


@pytest.mark.parametrize('name', LAYOUTS)
def test_refuses_a_missing_tensor(name):
    # Not even where what is left would be a constant times BatchNorm.
    for zeroed, kind in itertools.product(((), RECTIFICATIONS), same_type(name)):
        state_dict = inside(source(name, *zeroed)).state_dict()
        keys = {key.removeprefix(PREFIX) for key in state_dict} - {'num_batches_tracked'}
        # Without these, the whole is a BatchNorm, which the types start from.
        keys -= {'bnet': {'neighbor_weight'}, 'unitizedbn': {'scale_weight'}}.get(name, set())
        for key in keys:
            lacking, model = change(state_dict, [key]), inside(TYPES[kind][0]())
            assert_refused(model, lacking, load_by_mmengine, [f'{PREFIX}{key} is missing'])


@pytest.mark.parametrize('name', LAYOUTS)
def test_refuses_another_number_of_channels(name):
    for kind in same_type(name):
        state_dict = inside(source(name)).state_dict()
        for key, tensor in state_dict.items():
            if tensor.dim():
                vector = tensor.shape[0] == 1
                fewer = tensor[:, :-1] if vector else tensor[:-1]
                expected = '(6,) or (1, 6, 1, 1), got' if vector else '(6,), got' if tensor.dim() == 1 else '(6, '
                if key.endswith('neighbor_weight'):
                    expected = '(6 * (k*k - 1),) or (6, k*k - 1) with odd k, got'
                parts = [f'{key} of {LAYOUTS[name].title}', f'shape {expected}', str(tuple(fewer.shape))]
                assert_refused(inside(TYPES[kind][0]()), {**state_dict, key: fewer}, load_by_mmengine, parts)


@pytest.mark.parametrize('name', LAYOUTS)
def test_refuses_a_mixed_up_layout(name):
    state_dict = inside(source(name)).state_dict()
    for other in LAYOUTS:
        mixed = inside(source(other)).state_dict() | state_dict
        # Unless the keys of one are among those of the other: two layouts in one are of no layout.
        if len(mixed) > max(len(state_dict), len(inside(SOURCES[other]()).state_dict())):
            for kind in same_type(name) | same_type(other):
                assert_refused(inside(TYPES[kind][0]()), mixed, load_by_mmengine, [' is '])


@pytest.mark.parametrize('kind', TYPES)
def test_without_any_key_torch_reports_the_missing_ones(kind):
    model = inside(TYPES[kind][0]())
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({})
    # A layer whose name only begins alike is another layer.
    result = model.load_state_dict({'layer2.0.bn10.weight': C}, strict=False)
    assert PREFIX + 'weight' in result.missing_keys
    assert result.unexpected_keys == ['layer2.0.bn10.weight']


# --- what was read ----------------------------------------------------------------------------------------------------


def report(model, state_dict):
    """What is said of a load by torch."""
    with counted_reads() as reads, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model.load_state_dict(state_dict, strict=False)
    return report_reads(reads)


def test_layouts_are_counted():
    names = ('bn', 'bn', 'rbn', 'rbn-released', 'bnet-released', 'ubn-released', 'ubn', 'ubn', 'ubn centering')
    layers = [*(UBN(CHANNELS) for _ in range(8)), UBN(CHANNELS, scaling=False, kernel_size=7), UBN(CHANNELS)]
    assert report(nn.Sequential(*layers), nn.Sequential(*map(source, names)).state_dict()) == [
        'mmubn: 9 UBN layers read: 2 from BatchNorm, 1 from RBN, 1 from released RBN, 1 from released BNET, 1 from '
        'released UBN, its bias approximately, 2 from UBN, 1 from UBN of other arguments; 1 not in the state dict'
    ]
    model, own = nn.Sequential(UBN(CHANNELS), UBN(CHANNELS)), nn.Sequential(source('ubn'), source('ubn')).state_dict()
    del own['1.num_batches_tracked']
    # A count does not go on from the load before, even from one that was refused.
    with pytest.raises(CheckpointError, match='foo'):
        report(model, own | {'1.foo': C})
    assert report(model, own) == ['mmubn: 2 UBN layers read: 2 from UBN']
    assert report(nn.Sequential(nn.BatchNorm2d(CHANNELS)), nn.Sequential(source('bn')).state_dict()) == []
    assert report(nn.Sequential(RBN(CHANNELS)), {}) == ['mmubn: 0 RBN layers read; 1 not in the state dict']


def test_each_type_is_counted():
    saved = {
        'rbn': RBN,
        'rbn-released': RBN,
        'bnet-released': BNET,
        'iebn': IEBN,
        'iebn-released': IEBN,
        'bn': UnitizedBN,
        'unitizedbn': UnitizedBN,
    }
    model = nn.ModuleDict({name: build(CHANNELS) for name, build in saved.items()} | {'ubn': BNET(CHANNELS)})
    state_dict = nn.ModuleDict({name: source(name) for name in saved}).state_dict()
    ubn = source('ubn', 'center_weight', 'scale_weight').state_dict()
    assert report(model, state_dict | {f'ubn.{key}': value for key, value in ubn.items()}) == [
        'mmubn: 2 RBN layers read: 1 from RBN, 1 from released RBN',
        'mmubn: 2 BNET layers read: 1 from released BNET, 1 from UBN taken to be without calibrate_bias',
        'mmubn: 2 IEBN layers read: 1 from IEBN, 1 from released IEBN',
        'mmubn: 2 UnitizedBN layers read: 1 from BatchNorm, 1 from UnitizedBN',
    ]


def test_counts_within_counts():
    layer, state_dict = UBN(CHANNELS), source('bn').state_dict()
    with counted_reads() as outer:
        layer.load_state_dict(state_dict)
        with counted_reads() as inner:
            layer.load_state_dict(state_dict)
    layer.load_state_dict(state_dict)
    assert outer == {('UBN', 'BatchNorm'): 2}
    assert inner == {('UBN', 'BatchNorm'): 1}
