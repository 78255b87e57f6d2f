"""The Triton kernels of a batch of several processes, in Triton's interpreter and without other processes.

Held to the kernels of one process on the joined batch, which test_triton_numbers.py holds to float64, and to
:mod:`mmubn.ops.processes`. Real processes: tests/layers/test_sync_ubn.py.
"""

import pytest
import torch
from torch import distributed as dist

pytest.importorskip('triton')

from interpreter import interpreted_kernels

from mmubn.analysis.launches import Launches
from mmubn.layers import UBN, SyncUBN
from mmubn.ops import processes, use_backend
from mmubn.ops.triton import operators, runtime

# What numpy, which the interpreter computes with, says of a NaN that a test is about.
pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning:(triton|numpy)')

EPS, MOMENTUM, SIMILARITY_MOMENTUM = 1e-5, 0.1, 0.3
CHANNELS, HEIGHT, WIDTH, K = 37, 3, 4, 3
PIXELS = HEIGHT * WIDTH
# Of rounding in float32; sums of a few hundred values of size 1
CLOSE = dict(rtol=1e-5, atol=1e-5)
SIZES = {'even': (2, 2), 'uneven': (1, 5, 2), 'one is empty': (3, 0, 2), 'more than a block of samples': (9, 11)}
FORMS = {  # scaling, centering, calibrated
    'rectified': ('rectified', True, False),
    'calibrated': ('rectified', True, True),
    'instance': ('instance', False, False),
    'plain': (None, False, False),
    'centred': (None, True, False),
}


@pytest.fixture(scope='module', autouse=True)
def interpreted():
    with interpreted_kernels():
        yield


@pytest.fixture(scope='module', autouse=True)
def new_memory_is_nan():
    """torch fills new memory with NaN where algorithms are deterministic: what no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(samples):
    """Samples that are alike, with an offset for each channel that is larger than the deviation."""
    return (
        random(samples, CHANNELS, HEIGHT, WIDTH) + random(CHANNELS, 1, 1, seed=1) + 3 * random(CHANNELS, 1, 1, seed=2)
    )


class Layer:
    """The tensors of a layer."""

    def __init__(self, scaling, centering, calibrated):
        self.scaling = scaling
        self.center_weight = random(CHANNELS, seed=3) / 2 if centering else None
        self.scale_weight = random(CHANNELS, seed=4) if scaling else None
        self.scale_bias = random(CHANNELS, seed=5) + 1 if scaling else None
        self.bias = random(CHANNELS, seed=6) if calibrated else None
        self.taps = random(CHANNELS, seed=7), random(CHANNELS, K * K - 1, seed=8)
        self.running = random(CHANNELS, seed=9), random(CHANNELS, seed=10).abs() + 0.5
        self.tau = torch.tensor(0.5)
        self.rectification = self.center_weight, self.scale_weight, self.scale_bias, scaling


def moments_of(x):
    return operators.instance_moments(x) if len(x) else (x.new_empty(0, CHANNELS), x.new_empty(0, CHANNELS))


def parts_of(layer, inputs, max_samples):
    """What each process sends; zeros of one that has no samples."""
    return [
        operators.own_part(x, *moments_of(x), max_samples, len(x) * PIXELS, layer.center_weight)
        if len(x)
        else torch.zeros(2 * CHANNELS + 3)
        for x in inputs
    ]


def several(layer, inputs, threshold):
    """What each process computes of the forward, the gate open or closed where ``threshold`` is None."""
    gated = not isinstance(threshold, bool)
    gate = (layer.tau, SIMILARITY_MOMENTUM, threshold, None) if gated else (None, 0.0, 0.0, torch.tensor(threshold))
    gathered = torch.stack(parts_of(layer, inputs, 4 if gated else None))
    arguments = (*gate, *layer.running, EPS, MOMENTUM, *layer.rectification)
    return gathered, [operators.gathered_coefficients(gathered, moments_of(x)[0], *arguments) for x in inputs]


@pytest.mark.parametrize('threshold', [-1.0, 0.99, True, False], ids=['open', 'closed', 'given', 'given, closed'])
@pytest.mark.parametrize('sizes', SIZES)
def test_forward(sizes, threshold):
    """Statistics, decision and coefficients are those of the joined batch, and of the same bits in every process."""
    layer, x = Layer(*FORMS['rectified']), batch(sum(SIZES[sizes]))
    inputs = x.split(SIZES[sizes])
    gathered, found = several(layer, inputs, threshold)
    for name, values in zip(range(2, 9), zip(*(one[2:] for one in found), strict=True), strict=True):
        assert all(torch.equal(value, values[0]) for value in values), name

    condensed = threshold if isinstance(threshold, bool) else threshold < 0
    centers, scales = (torch.cat(values) for values in list(zip(*found, strict=True))[:2])
    _, _, mean, var, running_mean, running_var, num_values, tau, decision = found[0]
    expected = operators.statistics_coefficients(
        *moments_of(x), *layer.running, torch.tensor(condensed), len(x) * PIXELS, EPS, MOMENTUM, *layer.rectification
    )
    torch.testing.assert_close((centers, scales, mean, var, running_mean, running_var), expected, **CLOSE)
    assert num_values == len(x) * PIXELS
    assert num_values.shape == ()

    if isinstance(threshold, bool):
        assert tau.numel() == decision.numel() == 0
        assert not gathered[:, -2:].any(), 'no similarity is sent'
        return
    unit = [part[:4].double().flatten(1) for part in inputs]
    unit = [part / part.norm(dim=1, keepdim=True) for part in unit]
    total = sum(float((u @ u.T).sum()) - len(u) for u in unit)
    pairs = sum(len(u) * (len(u) - 1) for u in unit)
    assert gathered[:, -1].sum() == pairs
    assert float(tau) == pytest.approx((1 - SIMILARITY_MOMENTUM) * 0.5 + SIMILARITY_MOMENTUM * total / pairs, abs=1e-6)
    assert (tau.shape, decision.shape, decision.dtype) == ((), (), torch.bool)
    assert bool(decision) == condensed


@pytest.mark.parametrize('number', [1, 5, 70])
def test_merge(number):
    """As by torch in float64, of more processes than a block has, of which some have no samples."""
    generator = torch.Generator().manual_seed(0)
    gathered = torch.rand(number, 2 * CHANNELS + 3, generator=generator) + 0.5
    gathered[:, :CHANNELS] += 1000  # the means: the variance of these must not cancel
    gathered[:, 2 * CHANNELS] = torch.randint(1, 50, (number,), generator=generator)
    gathered[1::3] = 0
    layer = Layer(*FORMS['plain'])
    _, _, mean, var, _, running_var, num_values, tau, _ = operators.gathered_coefficients(
        gathered, torch.zeros(1, CHANNELS), layer.tau, 1.0, -9.0, None, *layer.running, EPS, 1.0, *layer.rectification
    )
    similarity, expected = processes.merge(gathered.double())
    assert num_values == expected.num_values
    torch.testing.assert_close(mean.double(), expected.mean, rtol=5e-7, atol=0)
    torch.testing.assert_close(var.double(), expected.var, rtol=1e-5, atol=0)
    count = expected.num_values
    torch.testing.assert_close(running_var, var * (count / (count - 1)).float(), rtol=1e-6, atol=0)
    assert float(tau) == pytest.approx(float(similarity.total / similarity.pairs), rel=1e-6)


@pytest.mark.parametrize('values', [0, 1])
def test_of_no_value_or_one(values):
    """No value moves nothing; a single one has no unbiased variance."""
    layer = Layer(*FORMS['plain'])
    gathered = torch.zeros(2, 2 * CHANNELS + 3)
    gathered[1, : 2 * CHANNELS], gathered[1, 2 * CHANNELS] = values * 2.0, values
    center, scale, _, _, *moved, num_values, tau, _ = operators.gathered_coefficients(
        gathered, torch.empty(0, CHANNELS), layer.tau, 0.5, -1.0, None, *layer.running, EPS, 0.5, *layer.rectification
    )
    expected = layer.running if values == 0 else [0.5 * old + 1 for old in layer.running]
    torch.testing.assert_close(moved, list(expected))
    assert num_values == values
    assert tau == layer.tau, 'no pair is no evidence'
    assert center.shape == scale.shape == (0, CHANNELS)


def test_a_value_that_is_not_finite_stays_in_its_channel():
    layer, x = Layer(*FORMS['rectified']), batch(4)
    x[0, 5, 1, 1] = float('nan')
    _, found = several(layer, x.split(2), 0.0)
    for _, _, mean, _, running_mean, running_var, _, tau, _ in found:
        assert tau == layer.tau
        assert mean.isfinite().tolist() == [channel != 5 for channel in range(CHANNELS)]
        assert running_mean[5] == layer.running[0][5]
        assert running_var[5] == layer.running[1][5]
        assert (running_mean != layer.running[0]).sum() == CHANNELS - 1


@pytest.mark.parametrize('condensed', [True, False])
@pytest.mark.parametrize('form', FORMS)
def test_backward(form, condensed):
    """The sum of the processes' gradients is that of the joined batch, and so is what each value of x still needs."""
    layer, sizes = Layer(*FORMS[form]), (1, 11, 2)
    x = batch(sum(sizes))
    products, sums = (random(len(x), CHANNELS, K * K, seed=seed) for seed in (11, 12))
    decision = torch.tensor(condensed)
    a, v = moments_of(x)
    numbers = (len(x) * PIXELS, EPS, MOMENTUM)
    _, scale, mean, var, *_ = operators.statistics_coefficients(
        a, v, *layer.running, decision, *numbers, *layer.rectification
    )
    weights = (*layer.taps, layer.center_weight, layer.scale_weight, layer.bias, layer.scaling, PIXELS)
    expected = operators.coefficients_backward(products, sums, a, mean, var, EPS, decision, scale, *weights)

    parts = list(zip(*(tensor.split(sizes) for tensor in (products, sums, a, scale)), strict=True))
    own = [operators.own_coefficients_backward(p, s, a_p, mean, var, EPS, r, *weights) for p, s, a_p, r in parts]
    statistic_sums = sum(one[0] for one in own)
    rest = [
        operators.statistics_backward(
            statistic_sums, a_p, mean, decision, torch.tensor(1.0 * numbers[0]), layer.center_weight,
            offset, d_center_weight, PIXELS,
        )
        for (_, _, a_p, _), (_, offset, _, _, _, d_center_weight, *_) in zip(parts, own, strict=True)
    ]  # fmt: skip
    slopes, offsets, d_center_weights = zip(*rest, strict=True)
    _, _, d_weight, d_bias, d_neighbors, _, *d_scales = (
        sum(values[1:], values[0]) if i != 1 else None for i, values in enumerate(zip(*own, strict=True))
    )
    found = torch.cat(slopes), torch.cat(offsets), d_weight, d_bias, d_neighbors, sum(d_center_weights), *d_scales
    for i, (value, one) in enumerate(zip(found, expected, strict=True)):
        size = 1.0 if one.numel() == 0 else float(one.abs().max())
        torch.testing.assert_close(value, one, rtol=1e-5, atol=2e-6 * size, msg=lambda m, i=i: f'{i}: {m}')
    assert bool(found[0].any()) == condensed, 'no gradient goes through the running statistics'


def wrong_calls():
    """Calls, and what their error says."""
    layer = Layer(*FORMS['plain'])
    gathered, a = torch.zeros(2, 2 * CHANNELS + 3), torch.zeros(2, CHANNELS)
    gate = (layer.tau, 0.1, 0.1, None)
    others = (*layer.running, EPS, MOMENTUM, *layer.rectification)
    return {
        'either running_similarity or condensed': (gathered, a, layer.tau, 0.1, 0.1, torch.tensor(True), *others),
        r'gathered must be \(P, 2 C \+ 3\)': (gathered[:0], a, *gate, *others),
        'gathered must have shape': (gathered[:, 1:], a, *gate, *others),
    }


@pytest.mark.parametrize('words', wrong_calls())
def test_errors(words):
    with pytest.raises(ValueError, match=words):
        operators.gathered_coefficients(*wrong_calls()[words])
    a = torch.zeros(0, CHANNELS)
    with pytest.raises(ValueError, match='with elements'):
        operators.own_part(batch(1)[:0], a, a, None, 0, None)


# A layer, with one process in the place of several


@pytest.fixture
def collectives(monkeypatch):
    """SyncUBN takes this process for two, of which the other one sends nothing.

    Returns the collectives in order: name, group, shape of what is sent, launches before it where these are recorded.
    """
    calls = []

    def called(name, group, tensor):
        calls.append((name, group, tuple(tensor.shape), len(runtime._recorder or ())))

    def all_gather(output, part, group):
        called('all_gather', group, part)
        if not runtime.is_recording():
            output.zero_()[: len(part)] = part

    def all_reduce(tensor, group, async_op=False):
        called('all_reduce', group, tensor)

    monkeypatch.setattr(SyncUBN, '_processes', lambda self: 'both' if self.training else None)
    monkeypatch.setattr(dist, 'get_world_size', lambda group: 2)
    monkeypatch.setattr(dist, 'all_gather_into_tensor', all_gather)
    monkeypatch.setattr(dist, 'all_reduce', all_reduce)
    return calls


@pytest.mark.parametrize('backend', ['triton', 'torch', 'reference'])
@pytest.mark.parametrize('options', [{}, dict(threshold=None), dict(momentum=None), dict(calibrate_bias=True)], ids=str)
def test_layer(collectives, options, backend):
    found = []
    for norm in (UBN, SyncUBN):
        torch.manual_seed(0)
        layer = norm(CHANNELS, **options)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += torch.randn(parameter.shape) / 4
        x = batch(3).requires_grad_()
        with use_backend(backend):
            y = layer(x)
            y.backward(random(*y.shape, seed=1))
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    sent = [('all_gather', 'both', (2 * CHANNELS + 3,)), ('all_reduce', 'both', (2, CHANNELS))]
    assert [call[:3] for call in collectives] == sent


class Operators(Launches):
    """Keeps the names of all operators, of which Launches counts those that launch."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return super().__torch_dispatch__(func, types, args, kwargs)


def step_of(norm, samples=3, device='meta', backend='triton'):
    """What a step launches, forward and backward, and its operators. Nothing is computed by the kernels."""
    layer = norm(CHANNELS).to(device)
    x = torch.zeros(samples, CHANNELS, HEIGHT, WIDTH, device=device, requires_grad=True)
    with runtime.recorded() as launches, use_backend(backend), Operators() as found:
        y = layer(x)
        of_forward = len(launches)
        y.backward(torch.empty_like(y))
    names = [launch.kernel.fn.__name__.strip('_').removesuffix('_kernel') for launch in launches]
    return names[:of_forward], names[of_forward:], found


def test_one_launch_on_each_side_of_a_collective(collectives):
    forward, backward, found = step_of(UBN)
    of_forward, of_backward, of_sync_ubn = step_of(SyncUBN)
    before, after = forward.index('coefficients'), backward.index('coefficients_backward') + 1
    assert of_forward == [*forward[:before], 'own_part', *forward[before:]]
    assert of_backward == [*backward[:after], 'statistics_backward', *backward[after:]]
    places = [('all_gather', before + 1), ('all_reduce', len(of_forward) + after)]
    assert [(name, launched) for name, _, _, launched in collectives] == places
    assert of_sync_ubn.by_operator == found.by_operator, 'operators of torch that launch'


@pytest.mark.parametrize('samples', [3, 0])
@pytest.mark.parametrize('backend', ['triton', 'torch'])
def test_the_host_waits_for_nothing(collectives, backend, samples):
    """No value of a tensor is read, which a meta tensor refuses, and no tensor is made of a value on the host."""
    step_of(SyncUBN, samples, 'meta', backend)
    assert [name for name, *_ in collectives] == ['all_gather', 'all_reduce']
    names = step_of(SyncUBN, samples, 'cpu', backend)[-1].names
    assert 'aten::new_zeros' in names or 'aten::new_full' in names or backend == 'triton', 'operators are seen'
    assert names.isdisjoint({'aten::_local_scalar_dense', 'aten::is_nonzero', 'aten::lift_fresh'})
