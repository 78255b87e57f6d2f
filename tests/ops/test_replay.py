"""A replay of a step's launches is the step: the same bits, in Triton's interpreter."""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import randomize
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

pytest.importorskip('triton')

from interpreter import interpreted_kernels

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN
from mmubn.ops import replayed, use_backend
from mmubn.ops.triton.backend import TritonBackend
from mmubn.ops.triton.replay import Tape, record

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning:(triton|numpy)')

SHAPE = (3, 2, 3, 4)
GATE = dict(similarity_momentum=0.9, threshold=0.3)  # which the batches below open and close
NORMS = {
    'UBN': (UBN, GATE),
    'UBN k1': (UBN, dict(kernel_size=1, **GATE)),
    'UBN k5': (UBN, dict(kernel_size=5, **GATE)),
    'UBN without a gate': (UBN, dict(threshold=None)),
    'UBN without centering': (UBN, dict(centering=False, **GATE)),
    'UBN without scaling': (UBN, dict(scaling=False, **GATE)),
    'UBN calibrated': (UBN, dict(calibrate_bias=True, **GATE)),
    'SyncUBN': (SyncUBN, GATE),
    'RBN': (RBN, {}),
    'BNET': (BNET, {}),
    'IEBN': (IEBN, {}),
    'UnitizedBN': (UnitizedBN, {}),
}
FORMATS = torch.contiguous_format, torch.channels_last


@pytest.fixture(scope='module', autouse=True)
def interpreted():
    with interpreted_kernels(), use_backend('triton'):
        yield


@pytest.fixture(autouse=True)
def replays(monkeypatch):
    """The tapes that were replayed. Nothing was recorded before."""
    monkeypatch.setattr(replayed, '_steps', {})
    found, replay = [], Tape.replay

    def counted(tape, inputs):
        found.append(tape)
        return replay(tape, inputs)

    monkeypatch.setattr(Tape, 'replay', counted)
    return found


@pytest.fixture
def without(monkeypatch):
    """Runs a function without replays."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(TritonBackend, 'replays', False)
            return function(*args)

    return run


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def batches(number=4, dtype=torch.float32, format=torch.contiguous_format, shape=SHAPE):
    """Of similar samples and of others by turns, so that a gate opens and closes, and their gradients."""
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        x = torch.randn(shape, generator=generator) + (i % 2) * torch.randn(1, *shape[1:], generator=generator)
        dy = torch.randn(shape, generator=generator)
        yield tuple(each.to(dtype).contiguous(memory_format=format) for each in (x, dy))


def step(layer, x, dy):
    """Everything that a step gives: output, gradients, buffers."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {'y': y.detach(), 'dx': x.grad, **gradients, **{n: b.clone() for n, b in layer.named_buffers()}}


def steps(layer, *args):
    return [step(layer, x, dy) for x, dy in batches(*args)]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if value is None:
                assert other[name] is None, name
            else:
                assert value.dtype == other[name].dtype, name
                assert value.stride() == other[name].stride(), name
                torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True, msg=name)


FLOAT, HALF = (torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)
# The interpreter is slow, with bfloat16 most of all: that is for UBN, and for all in the slow tests.
QUICK = {
    *[(name, True, FLOAT) for name in NORMS],
    # In evaluation the types with a replay of their own.
    *[(name, False, FLOAT) for name in ('UBN', 'UBN k1', 'SyncUBN', 'BNET', 'UnitizedBN')],
    ('UBN', True, HALF),
    ('UBN', False, HALF),
}


@pytest.mark.parametrize(
    ('name', 'training', 'traits'),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in itertools.product(NORMS, (True, False), (FLOAT, HALF))
    ],
)
def test_it_is_the_step(name, training, traits, without, replays):
    norm, options = NORMS[name]
    layer = randomize(norm(SHAPE[1], **options)).train(training)
    expected = without(steps, copy.deepcopy(layer), 3, *traits)
    assert not replays
    same(steps(layer, 3, *traits), expected)
    launches_alone = norm is not UnitizedBN and (training or norm is not BNET) and 'calibrate_bias' not in options
    assert len(replays) == (2 + 1 if launches_alone else 0)  # the first forward and the first two backwards are steps


def test_a_recorded_gate_closes_and_opens(replays):
    """The decision is the device's: one tape serves both."""
    layer = randomize(UBN(SHAPE[1], **GATE))
    counts = [int(layer.num_batches_tracked)]
    for x, dy in batches(6):
        step(layer, x, dy)
        counts.append(int(layer.num_batches_tracked))
    moved = [after - before for before, after in itertools.pairwise(counts)]
    assert {0, 1} == set(moved[1:]), moved
    assert len({id(tape) for tape in replays}) == 2


def test_buffers_that_move_between_forward_and_backward(without):
    """What a backward reads is of its own forward, in training and in evaluation."""

    def run(layer):
        outputs = []
        for x, dy in batches(3):
            x = x.requires_grad_()
            y = layer.eval()(x)
            with torch.no_grad():
                layer.running_mean.add_(1)
                layer.running_var.mul_(2)
            other = layer.train()(x)
            layer(x.detach() + 1)
            outputs.append(torch.autograd.grad([y, other], [x, *layer.parameters()], [dy, dy]))
        return outputs

    layer = randomize(UBN(SHAPE[1], **GATE))
    expected = without(run, copy.deepcopy(layer))
    for one, other in zip(run(layer), expected, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize('wanted', ['nothing', 'x', 'parameters', 'bias'])
def test_which_gradients_are_wanted(wanted, without, replays):
    def run(layer):
        results = []
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(wanted in ('parameters', name))
        for x, dy in batches(3):
            layer.zero_grad()
            y = layer(x.requires_grad_(wanted == 'x'))
            if y.requires_grad:
                y.backward(dy)
            results.append({'y': y.detach(), 'dx': x.grad, **{n: p.grad for n, p in layer.named_parameters()}})
        return results

    layer = randomize(UBN(SHAPE[1], **GATE))
    expected = without(run, copy.deepcopy(layer))
    same(run(layer), expected)
    assert replays


@pytest.mark.parametrize(
    'change',
    [
        lambda layer: layer.half(),
        slow(lambda layer: layer.double()),
        lambda layer: setattr(layer, 'momentum', None),
        slow(lambda layer: setattr(layer, 'momentum', 0.0)),
        lambda layer: setattr(layer, 'track_running_stats', False),
        lambda layer: setattr(layer, 'num_batches_tracked', None),
        slow(lambda layer: setattr(layer, 'num_batches_tracked', torch.tensor(3.0))),
        slow(lambda layer: setattr(layer, 'num_batches_tracked', torch.tensor(3, dtype=torch.int32))),
        lambda layer: setattr(layer, 'running_similarity', torch.tensor(0.9, dtype=torch.float64)),
        lambda layer: setattr(layer, '_gate', lambda x, moments: torch.zeros((), dtype=torch.bool)),
        slow(lambda layer: setattr(layer, 'momentum', np.float32(0.3))),
        lambda layer: [setattr(layer, name, None) for name in list(layer._buffers)],
        lambda layer: setattr(layer, 'bias', torch.nn.Parameter(torch.ones(2 * SHAPE[1])[::2])),
        slow(lambda layer: setattr(layer, 'eps', 0.1)),
        lambda layer: setattr(layer, 'threshold', -1.0),
        lambda layer: torch.nn.utils.parametrize.register_parametrization(layer, 'weight', torch.nn.Tanh()),
    ],
)
def test_a_layer_that_changes_in_between(change, without):
    def run(layer):
        before = steps(layer, 3)
        change(layer)
        return before + steps(layer, 3)

    layer = randomize(UBN(SHAPE[1], kernel_size=1, **GATE))  # the kernels of one tap are the quickest here
    expected = without(run, copy.deepcopy(layer))
    same(run(layer), expected)


@pytest.mark.slow
def test_inputs_of_other_traits(without):
    """Another shape, layout, dtype or alignment is another step; a gradient may have any strides, or be the input."""
    traits = (SHAPE, torch.float32, FORMATS[0]), ((1, 2, 4, 4), torch.half, FORMATS[1])

    def run(layer):
        results = []
        for shape, dtype, format in traits:
            for x, dy in batches(3, dtype, format, shape):
                for gradient in (dy, dy[:1, :, :1].expand(shape), x):
                    results.append(step(layer, x, gradient))
            apart = torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(shape)
            results.append(step(layer, apart, apart))
            turned = x.transpose(2, 3).contiguous().transpose(2, 3)
            results.append(step(layer, turned, turned))
        return results

    layer = randomize(UBN(SHAPE[1], **GATE))
    expected = without(run, copy.deepcopy(layer))
    same(run(layer), expected)


def test_what_autograd_does_besides(without):
    """Two backwards of one graph, several forwards before a backward, second derivatives, batched gradients."""

    def run(layer):
        results = []
        for x, dy in batches(3):
            x = x.requires_grad_()
            first, second = layer(x), layer(2 * x)
            results += torch.autograd.grad(second, [x, *layer.parameters()], dy, retain_graph=True)
            results += torch.autograd.grad(second, x, dy)
            (dx,) = torch.autograd.grad(first, x, dy, create_graph=True)
            results += torch.autograd.grad(dx.square().sum(), [x, layer.weight])
            y = layer(x)
            results += torch.autograd.grad(y, x, torch.stack([dy, 2 * dy]), is_grads_batched=True)
        return results

    layer = randomize(UBN(SHAPE[1], **GATE))
    expected = without(run, copy.deepcopy(layer))
    for one, other in zip(run(layer), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_checkpoint_takes_the_steps(reentrant, without):
    """A forward that runs again is none of the kind that is replayed; one beside it is."""

    def run(layer):
        results = []
        for x, dy in batches(3):
            x = x.requires_grad_()
            y = checkpoint(layer, x, use_reentrant=reentrant) + layer(x)
            y.backward(dy)
            results.append({'y': y.detach(), 'dx': x.grad, **{n: b.clone() for n, b in layer.named_buffers()}})
        return results

    layer = randomize(UBN(SHAPE[1], **GATE))
    expected = without(run, copy.deepcopy(layer))
    same(run(layer), expected)


def unwatched(function):
    def call(*args):
        with _disable_current_modes():
            return function(*args)

    return call


@pytest.mark.parametrize('norm', [UBN, RBN])
@pytest.mark.parametrize('training', [True, False])
def test_the_host_does_little_but_launch(norm, training, replays, monkeypatch):
    """A replay makes its outputs and two tensors more; it saves x, the parameters and one of the two."""

    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    layer = randomize(norm(SHAPE[1])).train(training)
    steps(layer)
    monkeypatch.setattr('mmubn.ops.dispatch._observer', lambda x: None)
    monkeypatch.setattr(replayed, '_is_watched', lambda: False)
    monkeypatch.setattr(Tape, '_views', unwatched(Tape._views))  # which only the interpreter takes
    (x, dy), *_ = batches()
    x, number = x.requires_grad_(), len(replays)
    with Operators() as forward:
        y = layer(x)
    saved = [each for each in y.grad_fn.saved_tensors if each is not None]
    with Operators() as backward:
        torch.autograd.grad(y, [x, *layer.parameters()], dy)
    assert len(replays) == number + 2
    without_a_gate = training and norm is RBN
    assert sorted(forward.names) == ['aten::empty', 'aten::empty', 'aten::empty_like'] + without_a_gate * ['aten::ones']
    parameters = len(list(layer.parameters()))
    made = [name for name in backward.names if name not in ('aten::detach', 'aten::view')]
    assert len(made) == parameters + 2
    assert set(made) <= {'aten::empty', 'aten::empty_like', 'aten::empty_strided'}
    assert len(saved) == 2 + parameters + without_a_gate


def test_addresses_are_those_of_the_views(replays):
    """A GPU is given numbers, the interpreter tensors: they are at the same places."""
    layer = randomize(UBN(SHAPE[1]))
    steps(layer)
    assert replays
    for tape in replays:
        generator = torch.Generator().manual_seed(0)
        count = 1 + max(place.number for place in tape._places)
        tensors = [torch.empty(2**12).uniform_(generator=generator) for _ in range(count)]
        for address, view, place in zip(tape._addresses(tensors), tape._views(tensors), tape._places, strict=True):
            assert address == view.data_ptr()
            assert (tuple(view.shape), view.stride(), view.dtype) == place[2:]


def test_what_is_no_launch_is_not_recorded():
    x = torch.ones(4)
    for function in (lambda: ([x + 1], []), lambda: ([x.clone()], []), lambda: ([x.add_(1)], []), lambda: ([x], [])):
        assert record(function, [x])[2] is None


def test_a_gradient_that_is_not_in_memory(replays):
    """A replay reads at an address, where there must be something."""
    layer = randomize(UBN(SHAPE[1]))
    steps(layer)
    (x, dy), *_ = batches()
    y, number = layer(x.requires_grad_()), len(replays)
    zeros = torch._efficientzerotensor(dy.shape)
    expected = torch.autograd.grad(y, x, torch.zeros_like(dy), retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, zeros, retain_graph=True)[0], expected[0])
    assert len(replays) == number + 2
    with pytest.raises(ValueError, match='plain tensors, got a FakeTensor'):
        torch.autograd.grad(y, x, FakeTensorMode().from_tensor(dy))


def test_a_moved_buffer_is_known_to_have_moved(replays):
    """A graph that holds the old values says so, as after a BatchNorm."""
    layer = randomize(UBN(SHAPE[1]))
    steps(layer)
    factor = torch.ones(SHAPE[1], requires_grad=True)
    for name in ('running_mean', 'running_var'):
        number = len(replays)
        loss = (factor * getattr(layer, name)).sum()
        layer(next(batches(1))[0])
        assert len(replays) == number + 1
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            loss.backward()


def test_an_odd_layer_does_not_keep_others_from_replays(replays):
    tied = randomize(UBN(SHAPE[1]))
    tied.scale_weight = tied.weight
    layer = randomize(UBN(SHAPE[1]))
    (x, _), *_ = batches(1)
    tied(x)
    layer(x)
    layer(x)
    assert len(replays) == 1
