"""The numbers of the Triton kernels, in Triton's interpreter, which runs them on the CPU."""

import contextlib
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('triton')

from interpreter import interpreted_kernels
from torch._subclasses.fake_tensor import FakeTensorMode

from mmubn import layers
from mmubn.ops import use_backend
from mmubn.ops.triton import inputs, moments, operators, runtime, similarity, tap_sums, tiling

# What numpy, which the interpreter computes with, says of a NaN that a test is about.
pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning:(triton|numpy)')

NAMES = ('weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias')
EPS, MOMENTUM, SIMILARITY_MOMENTUM = 1e-5, 0.1, 0.3
# A float32 result may be off by some units in the last place of the largest value of its tensor, and, where it is a
# sum, by two units of the sum of the magnitudes of its terms (``size``), which may be far larger than itself.
ROUNDING, UNIT = 2e-6, 2.0**-23
# What is stored in half precision is rounded once more: by half a unit in the last place, and by a whole one in
# bfloat16, which the interpreter truncates to.
STORAGE = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


# The interpreter


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


# What is compared


def close(name, value, expected, size=0.0):
    assert value.shape == expected.shape, (name, value.shape, expected.shape)
    dtype = value.dtype
    value, expected = value.detach().double(), expected.detach().double()
    allowed = ROUNDING * expected.abs().max() + UNIT * size + STORAGE[dtype] * expected.abs() * 1.001 + 1e-30
    error = (value - expected).abs()
    worst = (error / allowed).nan_to_num(math.inf).argmax()
    assert bool((error <= allowed).all()), (
        f'{name}: {value.flatten()[worst]:.9g}, expected {expected.flatten()[worst]:.9g}, '
        f'{float((error / allowed).max()):.2f} times the error allowed'
    )


def guarded(tensor):
    """The same values and strides, with NaN before and after them in memory, 4 bytes off any alignment."""
    storage = tensor.new_full((tensor.numel() + 66,), float('nan'))
    view = storage[33 : 33 + tensor.numel()].as_strided(tensor.shape, tensor.stride(), 33)
    return view.copy_(tensor)


def make_case(shape, layout, dtype, k, scaling, centering, calibrate, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator)

    n, c, h, w = shape
    format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
    # What the samples share makes them similar; an offset per channel, larger than the deviation, is the usual case.
    x = random(n, c, h, w) + random(1, c, h, w) + 3 * random(1, c, 1, 1)
    x = guarded(x.to(dtype).contiguous(memory_format=format))
    dy = guarded(random(n, c, h, w).to(dtype).contiguous(memory_format=format))
    parameters = {
        'weight': guarded(random(c, k * k)),
        'bias': guarded(random(c)),
        'center_weight': guarded(random(c) / 2) if centering else None,
        'scale_weight': guarded(random(c)) if scaling else None,
        'scale_bias': guarded(random(c) + 1) if scaling else None,
    }
    running = {
        'tau': torch.tensor(0.5),
        'mean': guarded(random(c)),
        'var': guarded(random(c).abs() + 0.5),
    }
    options = {'k': k, 'scaling': scaling, 'calibrate': calibrate}
    return x, dy, parameters, running, options


def oracle(x, dy, parameters, running, options, threshold, max_samples):
    """The layer and its gradients in float64, from the data itself, by autograd."""
    x, dy = x.double().requires_grad_(), dy.double()
    p = {name: None if value is None else value.double().requires_grad_() for name, value in parameters.items()}
    n, c, h, w = x.shape
    out = {}
    with torch.no_grad():
        f = x[:max_samples].flatten(1)
        cosines = F.normalize(f, dim=1, eps=1e-300)
        cosines = cosines @ cosines.T
        pairs = len(f) * (len(f) - 1)
        out['similarity_sums'] = torch.stack([cosines.sum() - cosines.diagonal().sum(), torch.tensor(float(pairs))])
        tau = running['tau'].double()
        if pairs:
            tau = (1 - SIMILARITY_MOMENTUM) * tau + SIMILARITY_MOMENTUM * out['similarity_sums'][0] / pairs
        out['tau'] = tau
        condensed = threshold is None or bool(tau > threshold)
    out['condensed'] = torch.tensor(condensed)

    a = x.mean((2, 3), keepdim=True)
    out['a'], out['v'] = a[..., 0, 0], x.var((2, 3), correction=0)
    centred = x if p['center_weight'] is None else x + p['center_weight'][:, None, None] * a
    out['running_mean'], out['running_var'] = mean, var = running['mean'].double(), running['var'].double()
    if condensed:
        mean, var = centred.mean((0, 2, 3)), centred.var((0, 2, 3), correction=0)
        count = n * h * w
        out['running_mean'] = (1 - MOMENTUM) * out['running_mean'] + MOMENTUM * mean
        out['running_var'] = (1 - MOMENTUM) * out['running_var'] + MOMENTUM * var * count / max(count - 1, 1)
    out['var'] = var
    z = (centred - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
    r = 1.0
    if options['scaling'] is not None:
        pooled = z.mean((2, 3), keepdim=True) if options['scaling'] == 'rectified' else a
        r = torch.sigmoid(p['scale_weight'][:, None, None] * pooled + p['scale_bias'][:, None, None])
    k = options['k']
    y = F.conv2d(r * z, p['weight'].view(c, 1, k, k), padding=k // 2, groups=c)
    y = y + (r if options['calibrate'] else 1.0) * p['bias'][:, None, None]
    wanted = {'x': x} | {name: value for name, value in p.items() if value is not None}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    out |= {f'd_{name}': gradient for name, gradient in zip(wanted, gradients, strict=True)}

    # Magnitudes of the terms that the gradients are sums of.
    p = {name: None if value is None else value.detach() for name, value in p.items()}
    scale = (r / (var[:, None, None] + EPS).sqrt()).expand(n, c, 1, 1)[..., 0, 0]
    through = (scale * dy.abs().sum((2, 3)) * p['weight'].abs().sum(1)).detach()
    reach = float(z.detach().abs().max())
    if options['calibrate']:
        reach += float(p['bias'].abs().max())
    pooled_size = a[..., 0, 0].abs() if options['scaling'] is None else pooled[..., 0, 0].abs() + UNIT
    slope = 0.0 if options['scaling'] is None else p['scale_weight'].abs()
    out['size'] = {
        # center is a float32 of the size of the mean
        'y': (scale * a[..., 0, 0].abs() * p['weight'].abs().sum(1)).max(),
        'd_x': (through * (1 + reach**2)).max() / (h * w) ** 0.5,
        'd_weight': (through * reach).sum(0).max(),
        'd_center_weight': (through * a[..., 0, 0].abs() * (1 + slope * reach) * (1 + reach**2)).sum(0).max(),
        'd_scale_weight': (through * reach * pooled_size).sum(0).max(),
        'd_scale_bias': (through * reach).sum(0).max(),
    }
    out['size'] = {name: float(size.detach()) for name, size in out['size'].items()}
    return out | {'y': y}


def layer(x, dy, parameters, running, options, threshold, max_samples, ops=operators):
    """The same by the kernels."""
    n, _, h, w = x.shape
    k, scaling, calibrate = options['k'], options['scaling'], options['calibrate']
    p = parameters
    rectification = (p['center_weight'], p['scale_weight'], p['scale_bias'], scaling)
    out = {}
    out['a'], out['v'] = a, v = ops.instance_moments(x)
    out['similarity_sums'] = ops.similarity_sums(x, a, v, max_samples)
    statistics = (running['mean'], running['var'])
    numbers = (n * h * w, EPS, MOMENTUM)
    if threshold is None:
        condensed = torch.tensor(True, device=x.device)
        outputs = ops.statistics_coefficients(a, v, *statistics, condensed, *numbers, *rectification)
    else:
        gate = (max_samples, running['tau'], SIMILARITY_MOMENTUM, threshold)
        *outputs, out['tau'], condensed = ops.gated_coefficients(x, a, v, *gate, *statistics, *numbers, *rectification)
    center, scale, mean, var, out['running_mean'], out['running_var'] = outputs
    out['var'], out['condensed'] = var, condensed
    bias = scale * (var + EPS).sqrt() * p['bias'] if calibrate else p['bias']
    centre = k * k // 2
    taps = p['weight'][:, centre], torch.cat([p['weight'][:, :centre], p['weight'][:, centre + 1 :]], dim=1)
    taps = taps if k > 1 else (taps[0], None)
    out['y'] = ops.apply(x, center, scale, *taps, bias)
    products, sums = ops.tap_sums(x, dy, center, k)
    slope, offset, *gradients = ops.coefficients_backward(
        products, sums, a, mean, var, EPS, condensed, scale, *taps, p['center_weight'], p['scale_weight'],
        p['bias'] if calibrate else None, scaling, h * w,
    )  # fmt: skip
    d_weight, d_bias, d_neighbors, *d_others = gradients
    d_neighbors = d_neighbors.view(len(d_weight), -1)
    d_taps = torch.cat([d_neighbors[:, :centre], d_weight[:, None], d_neighbors[:, centre:]], dim=1)
    out |= {f'd_{name}': gradient for name, gradient in zip(NAMES, (d_taps, d_bias, *d_others), strict=True)}
    out['d_x'] = ops.input_gradient(dy, x, a, scale, *taps, slope, offset)
    return out


def tensors_of(case):
    x, dy, parameters, running, _ = case
    return [t for t in (x, dy, *parameters.values(), *running.values()) if t is not None]


@contextlib.contextmanager
def programs_aimed_at(programs, similarity_parts=1024):
    """The tests' maps are small: with 1 program per plane its loops run, with many the merging of parts does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, 'REDUCTION_PROGRAMS', programs)
        patch.setattr(tiling, 'MAP_PROGRAMS', programs)
        patch.setattr(similarity, 'SIMILARITY_PARTS', similarity_parts)
        yield


# One layer, function by function


def layer_cases():
    """Every kernel size with both layouts and shapes around its tiles; dtypes and forms of the layer in turn."""
    tiny = [(2, 3, 5, 7), (3, 5, 1, 1), (1, 2, 1, 9)]
    larger = [(4, 17, 8, 8), (1, 37, 9, 6), (1, 2, 11, 17), (1, 1, 7, 29)]
    shapes = {
        1: [*tiny, *larger],
        3: [*tiny, *larger, (70, 3, 1, 2), (1, 2, 19, 16), (1, 3, 4, 8), (2, 2, 7, 14), (1, 3, 13, 8)],
        5: [*tiny, (1, 2, 4, 8), (1, 2, 7, 8)],
        7: [(3, 5, 1, 1), (1, 2, 1, 9), (1, 2, 5, 7), (1, 2, 4, 6)],
    }
    dtypes = itertools.cycle([torch.float32, torch.float16, torch.bfloat16, torch.float32, torch.bfloat16])
    forms = itertools.cycle(
        [
            ('rectified', True, False),
            (None, False, False),
            ('instance', False, False),
            ('rectified', True, True),
            ('rectified', False, False),
            (None, True, False),
            ('instance', True, True),
        ]
    )
    condensed = itertools.cycle([True, False, True])
    programs = itertools.cycle([1, 2048])
    for k in inputs.KERNEL_SIZES:
        for shape, layout in itertools.product(shapes[k], ('nchw', 'channels_last')):
            case = (shape, layout, next(dtypes), k, *next(forms)), next(condensed), next(programs)
            # One program for each of 70 samples would take the interpreter long.
            if shape[0] < 70 or layout == 'nchw':
                yield case


def name_of(case, condensed, programs):
    shape, layout, dtype, k, scaling, centering, calibrate = case
    words = [
        *('x'.join(map(str, shape)), layout, str(dtype).removeprefix('torch.'), f'k{k}'),
        *(scaling or 'unscaled', *['centered'] * centering, *['calibrated'] * calibrate),
        *('batch' if condensed else 'running', f'programs{programs}'),
    ]
    return '-'.join(words)


@pytest.mark.parametrize(
    ('case', 'condensed', 'programs'), [pytest.param(*case, id=name_of(*case)) for case in layer_cases()]
)
def test_layer(case, condensed, programs):
    threshold, max_samples = -1 if condensed else 0.99, 16
    case = make_case(*case)
    x = case[0]
    before = [tensor.clone() for tensor in tensors_of(case)]
    with programs_aimed_at(programs):
        out = layer(*case, threshold, max_samples)
    for tensor, old in zip(tensors_of(case), before, strict=True):
        assert torch.equal(tensor, old), 'a kernel wrote into its input'
    expected = oracle(*case, threshold, max_samples)
    for name in ('a', 'v', 'var', 'running_mean', 'running_var', 'tau'):
        close(name, out[name], expected[name])
    close('similarity_sums', out['similarity_sums'], expected['similarity_sums'], 16 * len(x))
    assert bool(out['condensed']) == bool(expected['condensed'])
    for name in ('y', 'd_x', *(f'd_{name}' for name in NAMES)):
        if name in expected:
            close(name, out[name], expected[name], expected['size'].get(name, 0.0))
        else:
            assert out[name].numel() == 0, name
    assert out['y'].dtype == out['d_x'].dtype == x.dtype
    assert out['y'].stride() == out['d_x'].stride() == x.stride()


def test_the_layers_reach_every_tile():
    """Among them is one for every tile that a lane may have: its rows and columns, what may be beyond the map."""
    tiles = {}
    for (shape, layout, dtype, k, *_), _, _ in layer_cases():
        for accumulates in (False, True):
            constants = tiling.tile_shape(
                torch.Size(shape), layout == 'channels_last', dtype.itemsize, k, 1, accumulates
            ).constants
            tile = tuple(constants[name] for name in ('ROWS', 'COLUMNS', 'TAIL'))
            tiles.setdefault((layout, k), set()).add(tile)
    assert tiles == {
        ('nchw', 1): {(1, 1, 0), (1, 2, 0), (1, 8, 0)},
        ('nchw', 3): {(7, 1, 0), (7, 1, 1), (7, 2, 0), (7, 2, 1), (7, 4, 1), (4, 8, 0), (4, 8, 1)},
        ('nchw', 5): {(4, 1, 1), (4, 4, 0), (4, 4, 1)},
        ('nchw', 7): {(4, 1, 1), (4, 2, 0)},
        ('channels_last', 1): {(1, 4, 0), (1, 4, 2)},
        ('channels_last', 3): {(8, 4, 0), (4, 4, 0), (7, 7, 0), (5, 4, 1), (5, 6, 1), (5, 4, 2)},
        ('channels_last', 5): {(4, 2, 0), (4, 2, 2)},
        ('channels_last', 7): {(4, 2, 0), (4, 2, 2)},
    }


@pytest.mark.parametrize('parts', [2, 150])
def test_parts_are_merged(parts):
    """More parts than a tile has, the last one short, far from zero and from each other."""
    generator = torch.Generator().manual_seed(0)
    planes, pixels_per_part = 37, 8
    pixels = parts * pixels_per_part - 3
    x = torch.randn(planes, pixels, generator=generator) + 1000
    x[:, pixels_per_part:] += 5
    origins, means, squares = torch.zeros(3, parts, planes)
    for part, values in enumerate(x.split(pixels_per_part, dim=1)):
        origins[part] = values[:, 0]
        deviation = values - values[:, :1]
        means[part] = deviation.mean(1)
        squares[part] = (deviation - means[part, :, None]).square().sum(1)
    a, v = x.new_empty(2, planes)
    runtime.launch(
        moments._merge_moments_kernel, tiling.ceil_div(planes, 16), x.device,
        means, squares, origins, a, v, planes, pixels, pixels_per_part, parts, BLOCK=16, BLOCK_PARTS=64,
    )  # fmt: skip
    var, mean = torch.var_mean(x.double(), 1, correction=0)
    close('a', a, mean)
    close('v', v, var)

    terms = torch.randn(2, parts, planes, generator=generator)
    sums = torch.full((2, planes), math.nan)
    runtime.launch(tap_sums._merge_tap_sums_kernel, 1, x.device, *terms, *sums, planes, parts, BLOCK=64, BLOCK_PARTS=32)
    close('sums', sums, terms.double().sum(1), float(terms.abs().sum(1).max()))


@pytest.mark.parametrize('programs', [1, 2048])
@pytest.mark.parametrize('layout', ['nchw', 'channels_last'])
def test_moments_far_from_zero(layout, programs):
    """A mean a million deviations away; one pixel, the first, that is as far from the others."""
    format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 65, 140, generator=generator)
    x[0] = 2.0**20 + x[0]
    x[1, :, 0, 0] = 1e6
    x = guarded(x.contiguous(memory_format=format))
    with programs_aimed_at(programs):
        a, v = operators.instance_moments(x)
    x = x.double()
    for n in range(2):
        var, mean = torch.var_mean(x[n], (1, 2), correction=0)
        # The mean to the last place, of itself or of the deviation.
        assert bool(((a[n] - mean).abs() <= UNIT * (mean.abs() + 4 * var.sqrt())).all())
        close('v', v[n], var)


@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'channels_last'])
def test_similarity(format):
    generator = torch.Generator().manual_seed(0)

    def sums(x, max_samples=16):
        with programs_aimed_at(2048, similarity_parts=1):
            return operators.similarity_sums(x, *operators.instance_moments(x), max_samples)

    def expected(x, max_samples=16):
        f = x[:max_samples].double().flatten(1)
        norm = f.norm(dim=1)
        cosine = (f @ f.T) / (norm[:, None] * norm).clamp_min(1e-300)
        return torch.stack([cosine.sum() - cosine.diagonal().sum(), torch.tensor(1.0 * len(f) * (len(f) - 1))])

    # More samples than are loaded at once, and more values than one round of the one program takes.
    x = torch.randn(11, 12, 20, 21, generator=generator) + torch.randn(12, 20, 21, generator=generator)
    x[3] = 0
    x = x.contiguous(memory_format=format)
    for max_samples in (1, 10, 16):
        close(f'{max_samples} samples', sums(x, max_samples), expected(x, max_samples), 16 * 11)
    small = x[:4, :, :3, :3].contiguous(memory_format=format)
    # The squares would overflow float16.
    large = (small * 1e4).half()
    close('float16', sums(large), expected(large), 16 * 4)
    assert sums(torch.zeros_like(small)).tolist() == [0, 12]
    for value in (math.inf, math.nan, 3e38):
        broken = small.clone()
        broken[1, 2] = value
        total, pairs = sums(broken).tolist()
        assert math.isnan(total), value
        assert pairs == 12


@pytest.mark.parametrize('name', ['alike', 'opposite', 'one sample', 'not finite', 'zeros'])
def test_gate(name):
    """tau moves by a finite similarity alone, and its new value decides which statistics are used, of every channel."""
    tau, mean, var = torch.tensor(0.25), torch.full((300,), 7.0), torch.full((300,), 3.0)
    alike = torch.ones(2, 300, 1, 2)
    alike[:, ::2] = 2
    broken = alike.clone()
    broken[1, 2] = math.nan
    batches = {'alike': (alike, 1.0), 'opposite': (torch.stack([alike[0], -alike[0]]), -1.0)}
    batches |= {'one sample': (alike[:1], None), 'not finite': (broken, None), 'zeros': (0 * alike, 0.0)}
    x, mean_similarity = batches[name]
    for threshold in (-1, 0.1, 0.2, 0.3, 0.7):
        a, v = operators.instance_moments(x)
        gate = (16, tau, 0.5, threshold)
        _, _, used, _, _, _, new, condensed = operators.gated_coefficients(
            x, a, v, *gate, mean, var, len(x) * 2, EPS, MOMENTUM, None, None, None, None
        )
        expected = 0.25 if mean_similarity is None else 0.5 * 0.25 + 0.5 * mean_similarity
        assert float(new) == pytest.approx(expected, abs=1e-6)
        assert bool(condensed) == (expected > threshold), threshold
        assert new.shape == condensed.shape == ()
        assert condensed.dtype == torch.bool
        torch.testing.assert_close(used, a.mean(0) if condensed else mean, equal_nan=True)


def seven_tensors():
    """a, v, mean, var, w_m, w_v, w_b."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 9, generator=generator).abs()[slice(None) if i < 2 else 0] + i for i in range(7)]


@pytest.mark.parametrize('centering', [True, False])
@pytest.mark.parametrize('scaling', ['rectified', 'instance', None])
def test_coefficients(scaling, centering):
    a, _, mean, var, w_m, w_v, w_b = seven_tensors()
    weights = (w_m if centering else None, *((w_v, w_b) if scaling else (None, None)))
    center, scale = operators.coefficients(a, mean, var, EPS, *weights, scaling)
    s = (var.double() + EPS).rsqrt()
    m = mean - (w_m if centering else 0) * a.double()
    stat = {'rectified': (a - m) * s, 'instance': a.double(), None: a}[scaling]
    close('center', center, m)
    close('scale', scale, s * torch.sigmoid(w_v * stat + w_b) if scaling else s.expand_as(a))


@pytest.mark.parametrize('condensed', [True, False])
@pytest.mark.parametrize(('index', 'value'), [(0, math.inf), (1, math.nan)], ids=['mean', 'variance'])
def test_channels_whose_running_statistics_stay(index, value, condensed):
    """One in which the batch is not finite, and all where it is not condensed."""
    *moments, mean, var, _, _, _ = seven_tensors()
    moments[index][2, 4] = value
    *_, new_mean, new_var = operators.statistics_coefficients(
        *moments, mean, var, torch.tensor(condensed), 20, EPS, MOMENTUM, None, None, None, None
    )
    kept = (new_mean == mean) & (new_var == var)
    assert kept.tolist() == [not condensed or c == 4 for c in range(9)]


def test_one_value_has_no_unbiased_variance():
    a, v, mean, var, *_ = seven_tensors()
    *_, new_var = operators.statistics_coefficients(
        a[:1], v[:1], mean, var, torch.tensor(True), 1, EPS, MOMENTUM, None, None, None, None
    )
    close('running_var', new_var, 0.9 * var.double() + 0.1 * v[0].double())


def small_case():
    return make_case((1, 4, 3, 4), 'nchw', torch.float32, 3, 'rectified', True, False)


def strided():
    """Inputs and gradients of many strides, in 1x4x3x4, in memory as torch aligns it."""
    x, dy = (tensor.clone() for tensor in small_case()[:2])
    wide = torch.randn(1, 8, 3, 8)
    return {
        'rows and channels skipped': (wide[:, ::2, :, ::2], wide[:, 1::2, :, 1::2]),
        'channels of a channels-last input': (
            wide[..., :4].contiguous(memory_format=torch.channels_last)[:, :4],
            wide[..., 4:].contiguous(memory_format=torch.channels_last)[:, 4:],
        ),
        'transposed': (x.transpose(2, 3).contiguous().transpose(2, 3), dy),
        'expanded': (x[:1, :1].expand_as(x), dy[:1, :1, :1, :1].expand_as(dy)),
        'other layout': (x, dy.contiguous(memory_format=torch.channels_last)),
        'channels-last and gradient in NCHW': (x.contiguous(memory_format=torch.channels_last), dy),
    }


@pytest.mark.parametrize('name', strided())
def test_strides(name):
    """Any strides give what a dense copy gives, to the bit."""
    _, _, *rest = small_case()
    x, dy = strided()[name]
    near = torch.channels_last if 'channels-last' in name else torch.contiguous_format
    out = layer(x, dy, *rest, None, 16)
    dense = layer(*(t.clone(memory_format=near) for t in (x, dy)), *rest, None, 16)
    for key in out:
        assert torch.equal(out[key], dense[key]), key
    assert out['y'].is_contiguous(memory_format=near)
    assert out['d_x'].is_contiguous(memory_format=near)


def test_parameters_of_another_dtype():
    """They give what they give in float32, to the bit."""
    x, dy, parameters, *rest = small_case()
    half = {name: value.bfloat16() for name, value in parameters.items()}
    single = {name: value.float() for name, value in half.items()}
    out, expected = (layer(x, dy, p, *rest, None, 16) for p in (half, single))
    for key in out:
        assert torch.equal(out[key], expected[key]), key


def wrong_calls():
    """Calls, and what their error says."""
    x, dy, p, _, _ = make_case((2, 4, 5, 6), 'nchw', torch.float32, 3, None, False, False)
    ones = torch.ones(2, 4)
    arguments = (ones, ones, p['bias'], p['weight'][:, 1:], p['bias'])
    return {
        'float64': lambda: operators.apply(x.double(), *arguments),
        '3 dimensions': lambda: operators.apply(x[0], *arguments),
        'elements': lambda: operators.apply(x[:0], *arguments),
        'center': lambda: operators.apply(x, ones[:1], *arguments[1:]),
        'kernel sizes': lambda: operators.apply(x, *arguments[:3], torch.ones(4, 15), p['bias']),
        'k*k - 1': lambda: operators.apply(x, *arguments[:3], torch.ones(4, 9), p['bias']),
        'neighbor_weight': lambda: operators.apply(x, *arguments[:3], torch.ones(3, 8), p['bias']),
        'bias': lambda: operators.apply(x, *arguments[:4], p['bias'][:3]),
        'on cpu': lambda: operators.apply(x, ones.to('meta'), *arguments[1:]),
        'dtype': lambda: operators.tap_sums(x, dy.half(), ones, 3),
        'shape': lambda: operators.tap_sums(x, dy[:1], ones, 3),
        'max_samples': lambda: operators.similarity_sums(x, ones, ones, 0),
        'together': lambda: operators.coefficients(ones, *[ones[0]] * 2, EPS, None, ones[0], None, 'rectified'),
        'other': lambda: operators.coefficients(ones, *[ones[0]] * 2, EPS, None, None, None, 'other'),
        '2^30': lambda: operators.instance_moments(torch.empty(1, 1, 2**15, 2**15, device='meta')),
    }


@pytest.mark.parametrize('words', wrong_calls())
def test_errors(words):
    with pytest.raises(ValueError, match=re.escape(words)):
        wrong_calls()[words]()


def test_no_problem_in_the_interpreter():
    assert inputs.problem(torch.ones(2, 4, 5, 6), 3) is None


def test_same_bits():
    case = make_case((2, 3, 9, 9), 'channels_last', torch.float16, 1, 'rectified', True, False)
    first, second = (layer(*case, None, 16) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


# Operators


def arguments_of_operators(case):
    """The arguments of every operator in one pass through the layer, with the tensors of the case."""
    calls = {}

    class Recorder:
        def __getattr__(self, name):
            def call(*arguments):
                calls[name] = arguments
                return getattr(torch.ops.mmubn, name)(*arguments)

            return call

    x, *others = case
    for threshold in (0.1, None):
        layer(x.clone(), *others, threshold, 16, Recorder())
    a = torch.ones(x.shape[:2], device=x.device)
    calls['coefficients'] = (a, a[0], a[1].clone(), EPS, None, None, None, None)
    # the same of a batch of several processes
    part = torch.ones(2, 2 * a.shape[1] + 3, device=x.device)
    rectification = a[0], a[0], a[0], 'rectified'
    calls['own_part'] = (*calls['similarity_sums'], 12, a[0])
    calls['gathered_coefficients'] = (part, a, a[0, 0], 0.1, 0.5, None, a[0], a[1], EPS, 0.1, *rectification)
    *first, condensed, scale, weight, neighbors, w_m, w_v, beta, kind, pixels = calls['coefficients_backward']
    calls['own_coefficients_backward'] = (*first, scale, weight, neighbors, w_m, w_v, beta, kind, pixels)
    calls['statistics_backward'] = (part[:, : a.shape[1]], a, a[0], condensed, a[0, 0], w_m, a, a[0], pixels)
    return calls


@pytest.fixture(scope='module')
def operator_calls():
    return arguments_of_operators(make_case((2, 3, 2, 3), 'channels_last', torch.float16, 3, 'rectified', True, True))


@pytest.mark.parametrize('name', operators.__all__)
def test_operator(operator_calls, name):
    """Schema, fake implementation and dispatch under aot_autograd agree with what the operator does."""
    torch.library.opcheck(getattr(torch.ops.mmubn, name), operator_calls[name])


def with_tensors(arguments, change):
    return [change(value) if isinstance(value, torch.Tensor) else value for value in arguments]


@pytest.mark.parametrize('name', operators.__all__)
def test_a_tensor_that_torch_negates_lazily(operator_calls, name):
    """The kernels read memory, where its negative is; so is that of an imaginary part of a conjugate."""

    def negated(value):
        return torch._neg_view(-value) if value.is_floating_point() else value

    def imaginary(value):
        if value.dtype not in (torch.float16, torch.float32):
            return value
        return torch.complex(torch.zeros_like(value), -value).conj().imag

    function, arguments = getattr(operators, name), operator_calls[name]
    expected = function(*arguments)
    for change in (negated, imaginary):
        changed = with_tensors(arguments, change)
        assert any(isinstance(value, torch.Tensor) and value.is_neg() for value in changed)
        torch.testing.assert_close(function(*changed), expected, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_of_zeros_that_are_not_in_memory(operator_calls):
    x, dy, *others = operator_calls['tap_sums']
    zeros = torch._efficientzerotensor(dy.shape, dtype=dy.dtype)
    for found in operators.tap_sums(x, zeros, *others):
        assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize('name', operators.__all__)
def test_no_kernel_reads_what_has_no_memory(operator_calls, name):
    """Nor does it write to such a tensor."""
    function, arguments = getattr(operators, name), operator_calls[name]
    with pytest.raises(ValueError, match='plain tensors, got a FakeTensor'):
        function(*with_tensors(arguments, FakeTensorMode().from_tensor))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match='plain tensors, got a FakeTensor'):
        function(*arguments)
    first, *others = arguments
    with pytest.raises(ValueError, match=r'plain tensors, got a tensor of a transform of torch\.func'):
        torch.vmap(lambda value: function(value, *others))(first[None])


@pytest.mark.slow
def test_operators_under_torch_compile():
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True, dynamic=True)
    for seed, (shape, layout) in enumerate((((2, 3, 4, 5), 'nchw'), ((3, 3, 6, 4), 'channels_last'))):
        case = make_case(shape, layout, torch.float32, 3, 'rectified', True, True, seed)
        eager = layer(*case, 0.1, 16)
        traced = compiled(*case, 0.1, 16, torch.ops.mmubn)
        for key in eager:
            assert torch.equal(eager[key], traced[key]), key
            assert eager[key].stride() == traced[key].stride(), key


# Whole layers, by these kernels and by the reference

LAYERS = {
    'UBN': (layers.UBN, {}),
    'UBN calibrated': (layers.UBN, dict(calibrate_bias=True, kernel_size=5)),
    'UBN half': (layers.UBN, {}),
    'RBN': (layers.RBN, {}),
    'BNET': (layers.BNET, {}),
    'IEBN': (layers.IEBN, {}),
    'UnitizedBN': (layers.UnitizedBN, {}),
}


def make_layer(name):
    norm, options = LAYERS[name]
    layer = norm(4, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
        layer.running_mean.copy_(torch.randn(4, generator=generator))
    return layer.half() if name.endswith('half') else layer


def run_layer(layer, x, dy, backend):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with use_backend(backend):
        y = layer(x)
        y.backward(dy)
    out = {'y': y.detach(), 'x.grad': x.grad} | {f'{name}.grad': p.grad for name, p in layer.named_parameters()}
    return out | {name: buffer.clone() for name, buffer in layer.named_buffers()}


@pytest.mark.parametrize('mode', ['condensed', 'not condensed', 'evaluation', 'momentum None'])
@pytest.mark.parametrize('name', LAYERS)
def test_layer_by_the_reference(name, mode):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 5, 6, generator=generator) + 1
    dy = torch.randn(3, 4, 5, 6, generator=generator)
    found = {}
    for backend in ('reference', 'triton'):
        layer = make_layer(name).train(mode != 'evaluation')
        if mode == 'not condensed' and 'running_similarity' in layer._buffers:
            layer.running_similarity.fill_(-1)
        if mode == 'momentum None':
            layer.momentum = None
        dtype = layer.weight.dtype
        if backend == 'reference':
            layer, dtype = layer.float(), torch.float32  # the same numbers, not rounded on the way
        found[backend] = run_layer(layer, x.half().to(dtype), dy.half().to(dtype), backend)
    # float32 throughout, and at the end one rounding to the dtype of the layer
    tolerance = dict(rtol=1e-3, atol=1e-3) if dtype == torch.half else dict(rtol=1e-4, atol=1e-5)
    for key, expected in found['reference'].items():
        value = found['triton'][key].to(expected.dtype)
        torch.testing.assert_close(value, expected, **tolerance, msg=lambda m, key=key: f'{key}: {m}')


def test_layer_under_torch_compile():
    """By these kernels in one graph."""
    x, dy = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    layer, compiled = make_layer('UBN'), make_layer('UBN')
    expected = run_layer(layer, x, dy, 'triton')
    compiled.compile(backend='aot_eager', fullgraph=True)
    for key, value in run_layer(compiled, x, dy, 'triton').items():
        torch.testing.assert_close(value, expected[key])
