"""A checkpoint of any known layout starts a network of the same function, or is refused."""

import argparse
import copy
import itertools
import logging
import warnings
from collections import OrderedDict

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet50

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN
from mmubn.checkpoints import LAYOUTS, CheckpointError, convert_state_dict, find_layout

CHANNELS = 6


# --- the norms as their papers and released implementations name and compute them -------------------------------------


class Released(nn.BatchNorm2d):
    """BatchNorm without affine step, with vectors of the released shape or a convolution."""

    vectors = ()

    def __init__(self, kernel_size=None):
        super().__init__(CHANNELS, affine=False)
        for name in self.vectors:
            setattr(self, name, nn.Parameter(torch.empty(1, CHANNELS, 1, 1)))
        if kernel_size is not None:
            self.bnconv = nn.Conv2d(CHANNELS, CHANNELS, kernel_size, padding=kernel_size // 2, groups=CHANNELS)

    def normalised(self, x):
        # Without weight and bias, which some of them have: they come after the factor.
        return F.batch_norm(x, self.running_mean, self.running_var, None, None, self.training, self.momentum, self.eps)

    def rectified(self, x):
        x = self.normalised(x + self.center_weight * x.mean((2, 3), keepdim=True))
        return x, torch.sigmoid(self.scale_weight * x.mean((2, 3), keepdim=True) + self.scale_bias)


class ReleasedRBN(Released):
    vectors = ('weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias')

    def forward(self, x):
        x, r = self.rectified(x)
        return self.weight * (r * x) + self.bias


class ReleasedBNET(Released):
    def forward(self, x):
        return self.bnconv(self.normalised(x))


class ReleasedIEBN(Released):
    vectors = ('weight', 'bias', 'weight_readjust', 'bias_readjust')

    def forward(self, x):
        r = torch.sigmoid(self.weight_readjust * x.mean((2, 3), keepdim=True) + self.bias_readjust)
        return self.normalised(x) * (self.weight * r) + self.bias


class ReleasedUBN(Released):
    """With the gate open."""

    vectors = ('center_weight', 'scale_weight', 'scale_bias')

    def forward(self, x):
        x, r = self.rectified(x)
        return r * self.bnconv(x)


SOURCES = {  # the first word is the name of the layout
    'bn': lambda: nn.BatchNorm2d(CHANNELS),
    'rbn': lambda: RBN(CHANNELS),
    'rbn-released': ReleasedRBN,
    'bnet': lambda: BNET(CHANNELS),
    'bnet 5x5': lambda: BNET(CHANNELS, kernel_size=5),
    'bnet-released': lambda: ReleasedBNET(3),
    'bnet-released 5x5': lambda: ReleasedBNET(5),
    'bnet-released 1x1': lambda: ReleasedBNET(1),
    'iebn': lambda: IEBN(CHANNELS),
    'iebn-released': ReleasedIEBN,
    'unitizedbn': lambda: UnitizedBN(CHANNELS),
    'ubn-released': lambda: ReleasedUBN(3),
    'ubn': lambda: UBN(CHANNELS),
    'ubn plain': lambda: UBN(CHANNELS, centering=False, scaling=False, kernel_size=1),
    'ubn centering': lambda: UBN(CHANNELS, scaling=False, kernel_size=5),
    'ubn calibrated': lambda: UBN(CHANNELS, calibrate_bias=True),
    'ubn calibrated scaling': lambda: UBN(CHANNELS, centering=False, calibrate_bias=True),
}
# Where these are zero, all of them are BatchNorm times a constant.
RECTIFICATIONS = ('neighbor_weight', 'center_weight', 'scale_weight', 'weight_readjust')


def randomize(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.dim():
                tensor.normal_(generator=generator)
    return module


def source(name, *zeroed):
    """In float64, with random values but for the tensors ``zeroed``; neighbor_weight stands for that of bnconv too."""
    norm = randomize(SOURCES[name]().double())
    with torch.no_grad():
        for key, tensor in norm.state_dict().items():
            if key in zeroed:
                tensor.zero_()
            elif key == 'bnconv.weight' and 'neighbor_weight' in zeroed:
                is_center = torch.zeros_like(tensor)
                is_center[:, :, tensor.shape[2] // 2, tensor.shape[3] // 2] = 1
                tensor.mul_(is_center)
    return norm


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


def inside(norm):
    """The norm where a network has it, so that the keys have a prefix."""
    return nn.ModuleDict({'layer2': nn.Sequential(nn.ModuleDict({'bn1': norm}))})


PREFIX = 'layer2.0.bn1.'


def assert_same_function(norm, reference, tolerance=1e-12):
    """In evaluation and, with the gate open, in training, which must leave the same running statistics."""
    generator = torch.Generator().manual_seed(0)
    x = sum(torch.randn(4, CHANNELS, *size, dtype=torch.float64, generator=generator) for size in ((9, 8), (1, 1)))
    norm, reference = copy.deepcopy(norm).double(), copy.deepcopy(reference).double()
    for training in (False, True):
        y, expected = norm.train(training)(x), reference.train(training)(x)
        assert (y - expected).abs().max() / expected.abs().max() < tolerance
    for name in ('running_mean', 'running_var'):
        assert torch.allclose(getattr(norm, name), getattr(reference, name), rtol=1e-10, atol=1e-12), name


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

BATCH_NORM = {'bn', 'bnet-released 1x1'}
RBNS = {'rbn', 'rbn-released'}
BNETS = {'bnet', 'bnet-released'}
LARGE = {'bnet 5x5', 'bnet-released 5x5'}
TYPES = {  # a layer, and what it reads exactly, whatever the values
    'UBN': (lambda: UBN(CHANNELS), {*BATCH_NORM, *RBNS, *BNETS, 'ubn'}),
    'SyncUBN': (lambda: SyncUBN(CHANNELS), {*BATCH_NORM, *RBNS, *BNETS, 'ubn'}),
    'UBN calibrated': (
        lambda: UBN(CHANNELS, calibrate_bias=True),
        {*BATCH_NORM, *BNETS, 'ubn-released', 'ubn calibrated'},
    ),
    'RBN': (lambda: RBN(CHANNELS), {*BATCH_NORM, 'ubn plain', *RBNS}),
    'BNET': (lambda: BNET(CHANNELS), {*BATCH_NORM, 'ubn plain', *BNETS}),
    'BNET 1x1': (lambda: BNET(CHANNELS, kernel_size=1), {*BATCH_NORM, 'ubn plain'}),
    'IEBN': (lambda: IEBN(CHANNELS), {*BATCH_NORM, 'ubn plain', 'iebn', 'iebn-released'}),
    'UnitizedBN': (lambda: UnitizedBN(CHANNELS), {*BATCH_NORM, 'ubn plain', 'unitizedbn'}),
}
# Keys that are some of the type's own: they may be its own with a tensor lost, so not even a constant is read.
LOST = {
    'UBN': {'iebn', 'unitizedbn', 'ubn plain', 'ubn centering'},
    'UBN calibrated': {'iebn', 'unitizedbn', 'ubn calibrated scaling'},
    'RBN': {'iebn', 'unitizedbn'},
    'IEBN': {'unitizedbn'},
}
LOST['SyncUBN'] = LOST['UBN']
PAIRS = [
    (name, kind)
    for name, kind in itertools.product(SOURCES, TYPES)
    # No key of a UBN says whether it calibrates its bias; a layer takes it for one of its own argument.
    if name == 'ubn-released' or not name.startswith('ubn') or ('calibrated' in name) == ('calibrated' in kind)
]
APPROXIMATE = [('ubn-released', 'UBN'), ('ubn-released', 'SyncUBN')]


@pytest.mark.parametrize('name', SOURCES)
def test_layouts_are_told_apart(name):
    assert find_layout(source(name).state_dict(), PREFIX) is LAYOUTS[name.split()[0]]


@pytest.mark.parametrize(('name', 'kind'), [pair for pair in PAIRS if pair not in APPROXIMATE])
def test_exact_or_refused(name, kind):
    build, exact = TYPES[kind]
    reference, norm = source(name), randomize(build().double())  # whatever it held, every tensor is loaded over
    if name in exact:
        load_by_torch(inside(norm), inside(reference).state_dict())
        assert_same_function(norm, reference)
    else:
        assert_refused(inside(norm), inside(reference).state_dict(), load_by_torch, [])


@pytest.mark.parametrize(('name', 'kind'), PAIRS)
def test_a_constant_times_batch_norm(name, kind):
    reference, norm = source(name, *RECTIFICATIONS), randomize(TYPES[kind][0]().double())
    if name in LOST.get(kind, ()):
        assert_refused(inside(norm), inside(reference).state_dict(), load_by_torch, ['is missing'])
    else:
        load_by_torch(inside(norm), inside(reference).state_dict())
        assert_same_function(norm, reference)


@pytest.mark.parametrize('kind', TYPES)
def test_batch_norm_leaves_the_rectifications_as_in_a_fresh_layer(kind):
    norm = randomize(TYPES[kind][0]().double())
    norm.load_state_dict(source('bn').state_dict())
    for name, value in norm.initial_rectifications().items():
        assert torch.equal(getattr(norm, name), value), name


OPTIONS = [
    *[('bn', options) for options in ({}, dict(kernel_size=1), dict(scaling=False), dict(calibrate_bias=True))],
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
    norm = randomize(UBN(CHANNELS, **options).double())
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
    reference, norm = source(name, *zeroed), randomize(copy.deepcopy(layer).double())
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
    reference, norm = randomize(nn.BatchNorm1d(CHANNELS).double()), UnitizedBN(CHANNELS).double()
    norm.load_state_dict(reference.state_dict())
    x = torch.randn(8, CHANNELS, dtype=torch.float64)
    assert torch.allclose(norm(x), reference(x), rtol=1e-10)
    assert torch.allclose(norm.eval()(x), reference.eval()(x), rtol=1e-10)


@pytest.mark.parametrize('kind', TYPES)
def test_own_entries_are_left_alone(kind):
    reference, norm = randomize(TYPES[kind][0]()), TYPES[kind][0]()
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
RAW, NORMALISED, LENGTH = 'the mean of the raw input', 'the mean of the normalised input', 'the length of the'
LACKS = [  # source, layer, what the message names
    ('rbn-released', UBN(CHANNELS, centering=False), ['center_weight', 'no centering']),
    ('rbn-released', UBN(CHANNELS, scaling=False), ['scale_weight', 'no scaling']),
    ('rbn-released', UBN(CHANNELS, calibrate_bias=True), ['bias', 'multiplies']),
    ('bnet-released', UBN(CHANNELS, kernel_size=1), ['bnconv.weight', '1 x 1']),
    ('bnet-released 5x5', UBN(CHANNELS), ['bnconv.weight', '3 x 3']),
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
    ('bnet 5x5', BNET(CHANNELS), ['neighbor_weight', '3 x 3']),
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


# --- conversion of whole state dicts ----------------------------------------------------------------------------------

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


# --- through MMEngine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def batch_norm_resnet():
    torch.manual_seed(0)
    model = resnet50()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ('norm', 'wrap'),
    [
        *[('UBN', wrap) for wrap in ('plain', 'state_dict', 'prefix', 'model', 'model prefix')],
        *[(norm, 'plain') for norm in ('RBN', 'BNET', 'IEBN', 'UnitizedBN')],
    ],
)
def test_resnet50_through_init_cfg(tmp_path, capsys, batch_norm_resnet, norm, wrap):
    path, log = str(tmp_path / 'resnet50.pth'), tmp_path / 'log'
    state_dict = batch_norm_resnet.state_dict()
    init_cfg = dict(type='Pretrained', checkpoint=path)
    if 'prefix' in wrap:
        state_dict = {f'backbone.{key}': value for key, value in state_dict.items()}
        init_cfg['prefix'] = 'backbone.'
    if 'model' in wrap:
        state_dict = {'model': state_dict, 'epoch': 90, 'args': argparse.Namespace(lr=0.1)}
    elif wrap != 'plain':
        state_dict = {'state_dict': state_dict, 'meta': {}}
    torch.save(state_dict, path)
    MMLogger.get_instance(f'{tmp_path}', log_file=str(log))  # becomes the current one
    model = ResNet(50, norm_cfg=dict(type=norm), norm_eval=False, init_cfg=init_cfg)
    model.init_weights()

    assert log.read_text().count('mmubn: ') == 1
    assert f'mmubn: 53 {norm} layers read: 53 from BatchNorm\n' in log.read_text()
    assert 'missing keys' not in log.read_text()
    assert 'Could not safely load' not in capsys.readouterr().out  # nor did it take the unsafe way
    x = torch.randn(2, 3, 64, 64)
    reference = copy.deepcopy(batch_norm_resnet)
    for training, tolerance in ((True, 2e-3), (False, 1e-4)):
        model.train(training), reference.train(training)
        y = model(x)[-1]
        expected = nn.Sequential(*list(reference.children())[:-2])(x)
        assert (y - expected).abs().max() / expected.abs().max() < tolerance


def logged(caplog, model, state_dict):
    caplog.clear()
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        mmengine_checkpoint.load_state_dict(model, state_dict, logger=logging.getLogger('load'))
    return [record.getMessage() for record in caplog.records if 'mmubn' in record.getMessage()]


def test_the_log_counts_layouts(caplog):
    def network(*norms):
        return nn.Sequential(*norms)

    names = ('bn', 'bn', 'rbn', 'rbn-released', 'bnet-released', 'ubn-released', 'ubn', 'ubn', 'ubn centering')
    layers = [*(UBN(CHANNELS) for _ in range(8)), UBN(CHANNELS, scaling=False, kernel_size=7), UBN(CHANNELS)]
    assert logged(caplog, network(*layers), network(*map(source, names)).state_dict()) == [
        'mmubn: 9 UBN layers read: 2 from BatchNorm, 1 from RBN, 1 from released RBN, 1 from released BNET, 1 from '
        'released UBN, its bias approximately, 2 from UBN, 1 from UBN of other arguments; 1 not in the state dict'
    ]
    own = network(source('ubn'), source('ubn')).state_dict()
    del own['1.num_batches_tracked']
    # A count does not go on from the load before, even from one that was refused.
    with pytest.raises(CheckpointError, match='foo'):
        logged(caplog, network(UBN(CHANNELS), UBN(CHANNELS)), own | {'1.foo': C})
    assert logged(caplog, network(UBN(CHANNELS), UBN(CHANNELS)), own) == ['mmubn: 2 UBN layers read: 2 from UBN']
    assert logged(caplog, network(nn.BatchNorm2d(CHANNELS)), network(source('bn')).state_dict()) == []


def test_the_log_counts_each_type(caplog):
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
    assert logged(caplog, model, state_dict | {f'ubn.{key}': value for key, value in ubn.items()}) == [
        'mmubn: 2 RBN layers read: 1 from RBN, 1 from released RBN',
        'mmubn: 2 BNET layers read: 1 from released BNET, 1 from UBN taken to be without calibrate_bias',
        'mmubn: 2 IEBN layers read: 1 from IEBN, 1 from released IEBN',
        'mmubn: 2 UnitizedBN layers read: 1 from BatchNorm, 1 from UnitizedBN',
    ]


class Network(BaseModel):
    def __init__(self, norm):
        super().__init__()
        self.norm = randomize(norm)

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize(
    ('name', 'kind', 'title'), [('rbn-released', 'UBN', 'released RBN'), ('iebn-released', 'IEBN', 'released IEBN')]
)
def test_runner_loads_from_a_model_key(tmp_path, name, kind, title):
    reference, path = source(name), tmp_path / 'checkpoint.pth'
    torch.save({'model': nn.ModuleDict({'norm': reference}).state_dict()}, path)
    model = Network(TYPES[kind][0]().double())
    runner = Runner(model, str(tmp_path), load_from=str(path), experiment_name=f'{tmp_path}')
    runner.load_or_resume()
    assert_same_function(runner.model.norm, reference)
    (log,) = tmp_path.rglob('*.log')
    assert f'mmubn: 1 {kind} layers read: 1 from {title}\n' in log.read_text()


def test_a_dict_with_state_dict_or_without_tensors_is_read_as_ever(tmp_path):
    tensors, path = {'weight': C}, tmp_path / 'checkpoint.pth'
    for content in (tensors, {'state_dict': tensors, 'model': {'other': C}}, {'model': {}}, {'model': 'resnet50'}):
        torch.save(content, path)
        read = mmengine_checkpoint._load_checkpoint(str(path))
        assert read.keys() == content.keys()
        assert 'state_dict' not in read or read['state_dict'].keys() == {'weight'}
