"""A checkpoint of any known layout starts a UBN network of the same function, or is refused."""

import argparse
import copy
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

from mmubn import UBN
from mmubn.checkpoints import LAYOUTS, convert_state_dict

CHANNELS = 6


# --- the norms as their papers and released implementations name and compute them -------------------------------------


class Rectified(nn.BatchNorm2d):
    """BatchNorm without affine step, with the per-image factor r."""

    def __init__(self, channels=CHANNELS):
        super().__init__(channels, affine=False)
        for name in ('center_weight', 'scale_weight', 'scale_bias'):
            setattr(self, name, nn.Parameter(torch.empty(1, channels, 1, 1)))

    def rectified(self, x):
        x = x + self.center_weight * x.mean((2, 3), keepdim=True)
        # Without weight and bias, which RBN has: they come after the factor.
        x = F.batch_norm(x, self.running_mean, self.running_var, None, None, self.training, self.momentum, self.eps)
        return x, torch.sigmoid(self.scale_weight * x.mean((2, 3), keepdim=True) + self.scale_bias)


class RBN(Rectified):
    def __init__(self, channels=CHANNELS):
        super().__init__(channels)
        self.weight = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1))

    def forward(self, x):
        x, r = self.rectified(x)
        return self.weight * (r * x) + self.bias


class BNET(nn.BatchNorm2d):
    def __init__(self, channels=CHANNELS, kernel_size=3):
        super().__init__(channels, affine=False)
        self.bnconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x):
        return self.bnconv(super().forward(x))


class ReleasedUBN(Rectified):
    """With the gate open."""

    def __init__(self, channels=CHANNELS, kernel_size=3):
        super().__init__(channels)
        self.bnconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x):
        x, r = self.rectified(x)
        return r * self.bnconv(x)


SOURCES = {
    'bn': lambda: nn.BatchNorm2d(CHANNELS),
    'rbn': RBN,
    'bnet': BNET,
    'bnet 5x5': lambda: BNET(kernel_size=5),
    'bnet 1x1': lambda: BNET(kernel_size=1),
    'ubn-released': ReleasedUBN,
    'ubn': lambda: UBN(CHANNELS),
    'ubn calibrated': lambda: UBN(CHANNELS, calibrate_bias=True),
    'ubn plain': lambda: UBN(CHANNELS, centering=False, scaling=False, kernel_size=1),
    'ubn centering': lambda: UBN(CHANNELS, scaling=False, kernel_size=5),
    'ubn scaling': lambda: UBN(CHANNELS, centering=False, calibrate_bias=True),
}


def randomize(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2)
            elif tensor.dim():
                tensor.normal_()
    return module


def source(name, **zeroed):
    norm = randomize(SOURCES[name]())
    with torch.no_grad():
        for key in zeroed:
            norm.state_dict()[key].zero_()
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


def inside(norm):
    """The norm where a network has it, so that the keys have a prefix."""
    return nn.ModuleDict({'layer2': nn.Sequential(nn.ModuleDict({'bn1': norm}))})


PREFIX = 'layer2.0.bn1.'


def assert_same_function(norm, reference):
    x = torch.randn(4, CHANNELS, 9, 8) + torch.randn(4, CHANNELS, 1, 1)
    norm, reference = copy.deepcopy(norm), copy.deepcopy(reference)
    for training, tolerance in ((False, 1e-4), (True, 2e-3)):
        y, expected = norm.train(training)(x), reference.train(training)(x)
        assert (y - expected).abs().max() / expected.abs().max() < tolerance
        assert torch.isfinite(y).all()
    assert torch.allclose(norm.running_mean, reference.running_mean, atol=1e-5)
    assert torch.allclose(norm.running_var, reference.running_var, rtol=1e-4)


EXACT = [
    *[('bn', options) for options in ({}, dict(kernel_size=1), dict(scaling=False), dict(calibrate_bias=True))],
    *[('rbn', options) for options in ({}, dict(kernel_size=1), dict(kernel_size=5))],
    *[('bnet', options) for options in ({}, dict(kernel_size=5), dict(centering=False), dict(scaling=False))],
    ('bnet', dict(calibrate_bias=True)),
    ('bnet 5x5', dict(kernel_size=7)),
    ('bnet 1x1', {}),
    ('bnet 1x1', dict(kernel_size=1, centering=False, scaling=False)),
    ('ubn-released', dict(calibrate_bias=True)),
    ('ubn-released', dict(calibrate_bias=True, kernel_size=5)),
    ('ubn', {}),
    ('ubn', dict(kernel_size=5)),
    ('ubn plain', dict(centering=False, scaling=False, kernel_size=1)),
    ('ubn plain', dict(centering=False, scaling=False, kernel_size=1, threshold=None)),
    ('ubn centering', dict(scaling=False, kernel_size=7)),
    ('ubn scaling', dict(centering=False, calibrate_bias=True)),
]


@pytest.mark.parametrize('load', [load_by_torch, load_by_mmengine])
@pytest.mark.parametrize(('name', 'options'), EXACT)
def test_same_function(name, options, load):
    reference = source(name)
    state_dict = inside(reference).state_dict()
    before = copy.deepcopy(state_dict)
    norm = randomize(UBN(CHANNELS, **options))  # whatever it held, every tensor is loaded over
    load(inside(norm), state_dict)

    assert_same_function(norm, reference)
    assert state_dict.keys() == before.keys()
    assert all(torch.equal(state_dict[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ('name', 'zeroed', 'options'),
    [
        ('rbn', 'center_weight', dict(centering=False)),
        ('rbn', 'scale_weight', dict(scaling=False)),
        ('rbn', 'scale_weight', dict(calibrate_bias=True)),
        ('rbn', 'bias', dict(calibrate_bias=True)),
        ('ubn-released', 'bnconv.bias', {}),
        ('ubn-released', 'scale_weight', {}),
        ('ubn-released', 'scale_weight', dict(scaling=False)),
        ('ubn', 'neighbor_weight', dict(kernel_size=1)),
    ],
)
def test_what_the_layer_lacks_is_zero(name, zeroed, options):
    reference = source(name, **{zeroed: 0})
    norm = randomize(UBN(CHANNELS, **options))
    norm.load_state_dict(reference.state_dict())
    assert_same_function(norm, reference)


def test_a_5x5_kernel_with_zeros_around_3x3():
    reference = source('bnet 5x5')
    with torch.no_grad():
        inner = reference.bnconv.weight[:, :, 1:4, 1:4].clone()
        reference.bnconv.weight.zero_()[:, :, 1:4, 1:4] = inner
    norm = UBN(CHANNELS)
    norm.load_state_dict(reference.state_dict())
    assert_same_function(norm, reference)


def test_own_entries_are_left_alone():
    reference = source('ubn')
    reference.running_similarity.fill_(0.25)
    norm = UBN(CHANNELS)
    norm.load_state_dict(reference.state_dict())
    for key, value in reference.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value), key


def test_running_similarity_survives_other_arguments():
    reference = source('ubn')
    reference.running_similarity.fill_(0.25)
    norm = UBN(CHANNELS, kernel_size=5)
    norm.load_state_dict(reference.state_dict())
    assert norm.running_similarity == 0.25


@pytest.mark.parametrize('name', ['bn', 'rbn', 'bnet', 'ubn'])
def test_num_batches_tracked_is_optional(name):
    reference = source(name)
    state_dict = dict(reference.state_dict())
    del state_dict['num_batches_tracked']
    norm = UBN(CHANNELS)
    norm.load_state_dict(state_dict)
    assert_same_function(norm, reference)
    with_count = dict(state_dict, num_batches_tracked=torch.tensor(7))
    norm.load_state_dict(with_count)
    assert norm.num_batches_tracked == 7


def test_half_precision_is_rounded_once():
    reference = source('bn').half()
    norm = UBN(CHANNELS)
    norm.load_state_dict(reference.state_dict())
    assert torch.allclose(norm.weight * torch.sigmoid(torch.ones(())), reference.weight.float(), rtol=1e-6)
    assert_same_function(norm, reference.float())


def test_released_ubn_in_the_form_of_the_paper_warns():
    reference = source('ubn-released')
    norm, exact = UBN(CHANNELS), UBN(CHANNELS, calibrate_bias=True)
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
LACKS = [  # source, options of the layer, what the message names
    ('rbn', dict(centering=False), ['center_weight', 'no centering']),
    ('rbn', dict(scaling=False), ['scale_weight', 'no scaling']),
    ('rbn', dict(calibrate_bias=True), ['bias', 'multiplies']),
    ('bnet', dict(kernel_size=1), ['bnconv.weight', '1 x 1']),
    ('bnet 5x5', {}, ['bnconv.weight', '3 x 3']),
    ('ubn', dict(kernel_size=1), ['neighbor_weight', '1 x 1']),
    ('ubn', dict(centering=False), ['center_weight', 'no centering']),
    ('ubn plain', {}, ['center_weight is missing', 'norm_cfg']),
    ('ubn centering', dict(kernel_size=5), ['scale_bias is missing', 'norm_cfg']),
    ('ubn scaling', dict(calibrate_bias=True), ['center_weight is missing', 'norm_cfg']),
]
BROKEN = [  # source, keys to remove, keys to add, what the message names
    ('bn', ['weight'], {}, ['weight is missing', 'BatchNorm']),
    ('bn', ['running_var'], {}, ['running_var is missing', 'BatchNorm']),
    ('bn', ['weight', 'bias'], {}, ['missing']),
    ('bn', ['weight', 'bias', 'running_mean', 'running_var'], {}, ['missing']),
    ('bn', [], dict(weight=torch.ones(5)), ['weight', '(6,)', '(5,)', 'BatchNorm']),
    ('bn', [], dict(running_var=torch.ones(1, CHANNELS, 1, 1)), ['running_var', '(6,)', '(1, 6, 1, 1)']),
    ('bn', [], dict(weight=1.0), ['weight', 'float']),
    ('bn', [], dict(center_weight=C), ['center_weight', 'running_similarity is missing']),
    ('bn', [], dict(scale_weight=C, center_weight=C), ['center_weight', 'scale_bias is missing', 'RBN']),
    ('bn', [], dict(bnconv__bias=C), ['bnconv.bias', 'BatchNorm']),
    ('bn', [], dict(gamma=C), ['gamma', 'BatchNorm']),
    ('bn', [], dict(num_batches_tracked=torch.zeros(2)), ['num_batches_tracked', 'a scalar', '(2,)']),
    ('rbn', ['scale_bias'], {}, ['scale_bias is missing', 'RBN']),
    ('rbn', [], dict(scale_bias=torch.ones(1, 5, 1, 1)), ['scale_bias', '(6,)', '(1, 5, 1, 1)', 'RBN']),
    ('bnet', ['bnconv.bias'], {}, ['bnconv.bias is missing', 'BNET']),
    ('bnet', [], dict(bnconv__weight=torch.ones(5, 1, 3, 3)), ['bnconv.weight', '(6, 1, k, k)', '(5, 1, 3, 3)']),
    ('bnet', [], dict(bnconv__weight=torch.ones(CHANNELS, 1, 2, 2)), ['bnconv.weight', 'odd', '(6, 1, 2, 2)']),
    ('bnet', [], dict(bnconv__weight=torch.ones(CHANNELS, 6, 3, 3)), ['bnconv.weight', '(6, 6, 3, 3)']),
    ('ubn-released', ['bnconv.weight'], {}, ['bnconv.weight is missing', 'released UBN']),
    ('ubn-released', [], dict(weight=C), ['weight is none of its keys', 'released UBN']),
    *[('ubn', [key], {}, [f'{key} is missing', 'norm']) for key in ('neighbor_weight', 'center_weight')],
    ('ubn', ['scale_weight', 'scale_bias'], {}, ['scale_bias is missing', 'norm_cfg']),
    *[('ubn', [key], {}, [f'{key} is missing', 'UBN']) for key in ('scale_bias', 'weight', 'running_similarity')],
    ('ubn', [], dict(neighbor_weight=torch.ones(CHANNELS, 7)), ['neighbor_weight', '(6, 7)']),
    ('ubn', [], dict(running_mean=torch.ones(5)), ['running_mean', '(6,)', '(5,)']),
    ('ubn', [], dict(extra=C), ['extra', 'UBN']),
]


def assert_refused(model, state_dict, load, parts):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=PREFIX[:-1]) as error:
        load(model, state_dict)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert '\n' not in message
    for key, value in model.state_dict().items():  # nothing half loaded
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize('load', [load_by_torch, load_by_mmengine])
@pytest.mark.parametrize(('name', 'options', 'parts'), LACKS)
def test_refuses_what_the_layer_lacks(name, options, parts, load):
    assert_refused(inside(UBN(CHANNELS, **options)), inside(source(name)).state_dict(), load, parts)


@pytest.mark.parametrize('load', [load_by_torch, load_by_mmengine])
@pytest.mark.parametrize(('name', 'remove', 'add', 'parts'), BROKEN)
def test_refuses_what_is_of_no_layout(name, remove, add, parts, load):
    state_dict = change(inside(source(name)).state_dict(), remove, **add)
    assert_refused(inside(UBN(CHANNELS)), state_dict, load, parts)


def test_without_any_key_torch_reports_the_missing_ones():
    model = inside(UBN(CHANNELS))
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({})
    # A layer whose name only begins alike is another layer.
    result = model.load_state_dict({'layer2.0.bn10.weight': C}, strict=False)
    assert PREFIX + 'weight' in result.missing_keys
    assert result.unexpected_keys == ['layer2.0.bn10.weight']


# --- conversion of whole state dicts ----------------------------------------------------------------------------------


def build(layout, **options):
    return {
        'bn': lambda: nn.BatchNorm2d(CHANNELS),
        'rbn': RBN,
        'bnet': BNET,
        'ubn-released': ReleasedUBN,
        'ubn': lambda: UBN(CHANNELS, **options),
    }[layout]()


def exact_conversions():
    """(source, tensors set to zero, target, calibrate_bias): every pair that can be exact."""
    for target in LAYOUTS:
        yield from ((name, [], target, False) for name in ('bn', 'ubn plain') if name != target)
        if target in ('bnet', 'ubn', 'ubn-released'):
            yield 'bnet', [], target, False
        if target in ('rbn', 'ubn'):
            yield 'rbn', [], target, False
            yield 'ubn', ['neighbor_weight'], target, False
        if target in ('ubn', 'ubn-released'):
            yield 'ubn-released', [], target, True
            yield 'ubn calibrated', [], target, True
            yield 'rbn', ['bias'], target, False
        yield 'rbn', ['center_weight', 'scale_weight'], target, False
        # A constant factor is no rectification.
        yield 'ubn', ['neighbor_weight', 'center_weight', 'scale_weight'], target, False
        yield 'ubn calibrated', ['neighbor_weight', 'center_weight', 'scale_weight'], target, True


@pytest.mark.parametrize(('name', 'zeroed', 'to', 'calibrate_bias'), list(exact_conversions()))
def test_conversion_is_exact(name, zeroed, to, calibrate_bias):
    reference = source(name, **dict.fromkeys(zeroed))
    state_dict = inside(reference).state_dict()
    before = copy.deepcopy(state_dict)
    converted, counts = convert_state_dict(state_dict, to, calibrate_bias)
    assert counts.total() == 1
    norm = build(to, calibrate_bias=calibrate_bias)
    # Into the other implementation as it is: its keys, its shapes.
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in inside(norm).state_dict().items()
    }
    inside(norm).load_state_dict(converted)
    assert_same_function(norm, reference)
    assert all(torch.equal(state_dict[key], before[key]) for key in before)
    # torch.save writes what a view is a part of, too.
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in converted.values())


@pytest.mark.parametrize(
    ('name', 'to', 'calibrate_bias'),
    [
        *[('bn', to, flag) for to in ('rbn', 'bnet', 'ubn', 'ubn-released') for flag in (False, True)],
        *[('rbn', 'ubn', False), ('bnet', 'ubn', False), ('bnet', 'ubn-released', True), ('ubn-released', 'ubn', True)],
    ],
)
def test_round_trip(name, to, calibrate_bias):
    state_dict = inside(source(name)).state_dict()
    there, _ = convert_state_dict(state_dict, to, calibrate_bias)
    back, _ = convert_state_dict(there, name, calibrate_bias)
    assert there.keys() != state_dict.keys()
    assert back.keys() == state_dict.keys()
    for key, value in state_dict.items():
        assert torch.allclose(back[key], value, rtol=1e-6, atol=1e-7), key


@pytest.mark.parametrize(
    ('name', 'to', 'calibrate_bias', 'parts'),
    [
        ('ubn', 'bn', False, ['center_weight', 'BatchNorm']),
        ('ubn scaling', 'bn', True, ['scale_weight', 'BatchNorm']),
        ('ubn', 'rbn', False, ['neighbor_weight', 'RBN']),
        ('ubn', 'ubn-released', False, ['bias', 'multiplies', 'released UBN']),
        ('ubn-released', 'ubn', False, ['bnconv.bias', 'multiplies', 'UBN']),
        ('bnet', 'bn', False, ['bnconv.weight', 'BatchNorm']),
        ('rbn', 'bnet', False, ['center_weight', 'BNET']),
    ],
)
def test_conversion_that_is_not_exact_is_refused(name, to, calibrate_bias, parts):
    state_dict = inside(source(name)).state_dict()
    # The layer at fault is named, not the first.
    fine = {f'layer1.{key}': value for key, value in source('bn').state_dict().items()}
    with pytest.raises(ValueError, match=PREFIX) as error:
        convert_state_dict(fine | state_dict, to, calibrate_bias)
    assert all(part in str(error.value) for part in parts), error.value


def test_conversion_keeps_the_rest_in_its_place():
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), source('bn'), nn.GroupNorm(2, CHANNELS))
    state_dict = model.state_dict()
    converted, counts = convert_state_dict(state_dict, 'bnet')
    assert counts == {'BatchNorm': 1}
    assert [key for key in converted if not key.startswith('1.')] == ['0.weight', '0.bias', '2.weight', '2.bias']
    assert [key.split('.')[0] for key in converted] == sorted(key.split('.')[0] for key in converted)
    assert all(converted[key] is state_dict[key] for key in converted if not key.startswith('1.'))
    assert isinstance(converted, OrderedDict)
    assert converted._metadata == state_dict._metadata


def test_conversion_tells_names_apart_that_begin_alike():
    model = nn.ModuleDict({'bn1': source('bn'), 'bn10': source('rbn', center_weight=0)})
    converted, counts = convert_state_dict(model.state_dict(), 'rbn')
    assert counts == {'BatchNorm': 1, 'RBN': 1}
    other = nn.ModuleDict({'bn1': RBN(), 'bn10': RBN()})
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


@pytest.mark.parametrize('wrap', ['plain', 'state_dict', 'prefix', 'model', 'model prefix'])
def test_resnet50_through_init_cfg(tmp_path, capsys, batch_norm_resnet, wrap):
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
    model = ResNet(50, norm_cfg=dict(type='UBN'), norm_eval=False, init_cfg=init_cfg)
    model.init_weights()

    assert log.read_text().count('mmubn: ') == 1
    assert 'mmubn: 53 UBN layers read: 53 from BatchNorm\n' in log.read_text()
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

    names = ('bn', 'bn', 'rbn', 'bnet', 'ubn-released', 'ubn', 'ubn')
    state_dict = network(*map(source, names)).state_dict()
    assert logged(caplog, network(*(UBN(CHANNELS) for _ in range(8))), state_dict) == [
        'mmubn: 7 UBN layers read: 2 from BatchNorm, 1 from RBN, 1 from BNET, 1 from released UBN, its bias '
        'approximately, 2 from UBN; 1 not in the state dict'
    ]
    own = network(source('ubn'), source('ubn')).state_dict()
    del own['1.num_batches_tracked']
    # A count does not go on from the load before, even from one that was refused.
    with pytest.raises(ValueError, match='foo'):
        logged(caplog, network(UBN(CHANNELS), UBN(CHANNELS)), own | {'1.foo': C})
    assert logged(caplog, network(UBN(CHANNELS), UBN(CHANNELS)), own) == ['mmubn: 2 UBN layers read: 2 from UBN']
    assert logged(caplog, network(nn.BatchNorm2d(CHANNELS)), network(source('bn')).state_dict()) == []


class Network(BaseModel):
    def __init__(self):
        super().__init__()
        self.norm = randomize(UBN(CHANNELS))

    def forward(self, x):
        return self.norm(x)


def test_runner_loads_from_a_model_key(tmp_path):
    reference, path = source('rbn'), tmp_path / 'rbn.pth'
    torch.save({'model': nn.ModuleDict({'norm': reference}).state_dict()}, path)
    runner = Runner(Network(), str(tmp_path), load_from=str(path), experiment_name=f'{tmp_path}')
    runner.load_or_resume()
    assert_same_function(runner.model.norm, reference)
    (log,) = tmp_path.rglob('*.log')
    assert 'mmubn: 1 UBN layers read: 1 from RBN\n' in log.read_text()


def test_a_dict_with_state_dict_or_without_tensors_is_read_as_ever(tmp_path):
    tensors, path = {'weight': C}, tmp_path / 'checkpoint.pth'
    for content in (tensors, {'state_dict': tensors, 'model': {'other': C}}, {'model': {}}, {'model': 'resnet50'}):
        torch.save(content, path)
        read = mmengine_checkpoint._load_checkpoint(str(path))
        assert read.keys() == content.keys()
        assert 'state_dict' not in read or read['state_dict'].keys() == {'weight'}
