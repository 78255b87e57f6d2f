"""Checks of the Triton kernels in Triton's interpreter, which runs them on the CPU.

The interpreter must be on before triton is first imported, so ``test_triton_kernels.py`` runs this file in a process of
its own. Prints one JSON object: the name of each check, and null or how it failed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import sys
import time
import traceback
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter

from mmubn import kernels as kernels_package
from mmubn import layers
from mmubn.kernels import triton_kernels as kernels

NAMES = ('weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias')
EPS, MOMENTUM, SIMILARITY_MOMENTUM = 1e-5, 0.1, 0.3
# A float32 result may be off by some units in the last place of the largest value of its tensor, and, where it is a
# sum, by two units of the sum of the magnitudes of its terms (``size``), which may be far larger than itself.
ROUNDING, UNIT = 2e-6, 2.0**-23
# What is stored in half precision is rounded once more: by half a unit in the last place, and by a whole one in
# bfloat16, which the interpreter truncates to.
STORAGE = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}

CHECKS = {}


def check(name, *arguments):
    def register(function):
        CHECKS[name] = lambda: function(*arguments)
        return function

    return register


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


def make_case(shape, layout, dtype, k, kind, centering, calibrate, seed=0):
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
        'scale_weight': guarded(random(c)) if kind else None,
        'scale_bias': guarded(random(c) + 1) if kind else None,
    }
    running = {
        'tau': torch.tensor(0.5),
        'mean': guarded(random(c)),
        'var': guarded(random(c).abs() + 0.5),
    }
    options = {'k': k, 'kind': kind, 'calibrate': calibrate}
    return x, dy, parameters, running, options


def oracle(x, dy, parameters, running, options, threshold, max_samples):
    """The layer and its gradients in float64, from the data itself, by autograd."""
    x, dy = x.double().requires_grad_(), dy.double()
    p = {name: None if value is None else value.double().requires_grad_() for name, value in parameters.items()}
    n, c, h, w = x.shape
    out = {}
    with torch.no_grad():
        f = x[:max_samples].flatten(1)
        cosines = torch.nn.functional.normalize(f, dim=1, eps=1e-300)
        cosines = cosines @ cosines.T
        pairs = len(f) * (len(f) - 1)
        out['sums'] = torch.stack([cosines.sum() - cosines.diagonal().sum(), torch.tensor(float(pairs))])
        tau = running['tau'].double()
        if pairs:
            tau = (1 - SIMILARITY_MOMENTUM) * tau + SIMILARITY_MOMENTUM * out['sums'][0] / pairs
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
    if options['kind'] is not None:
        pooled = z.mean((2, 3), keepdim=True) if options['kind'] == 'rectified' else a
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
    pooled_size = a[..., 0, 0].abs() if options['kind'] is None else pooled[..., 0, 0].abs() + UNIT
    slope = 0.0 if options['kind'] is None else p['scale_weight'].abs()
    out['size'] = {
        # center is a float32 of the size of the mean
        'y': (scale * a[..., 0, 0].abs() * p['weight'].abs().sum(1)).max(),
        'd_x': (through * (1 + reach**2)).max() / (h * w) ** 0.5,
        'd_weight': (through * reach).sum(0).max(),
        'd_center_weight': (through * a[..., 0, 0].abs() * (1 + slope * reach) * (1 + reach**2)).sum(0).max(),
        'd_scale_weight': (through * reach * pooled_size).sum(0).max(),
        'd_scale_bias': (through * reach).sum(0).max(),
    }
    out['size'] = {name: float(size) for name, size in out['size'].items()}
    return out | {'y': y}


def layer(x, dy, parameters, running, options, threshold, max_samples, ops=kernels):
    """The same by the kernels."""
    n, _, h, w = x.shape
    k, kind, calibrate = options['k'], options['kind'], options['calibrate']
    p = parameters
    rectification = (p['center_weight'], p['scale_weight'], p['scale_bias'], kind)
    out = {}
    out['a'], out['v'] = a, v = ops.instance_moments(x)
    out['sums'] = ops.similarity_sums(x, a, v, max_samples)
    statistics = (running['mean'], running['var'])
    momenta = (n * h * w, EPS, MOMENTUM)
    if threshold is None:
        condensed = torch.tensor(True)
        outputs = ops.statistics_coefficients(a, v, *statistics, condensed, *momenta, *rectification)
    else:
        gate = (max_samples, running['tau'], SIMILARITY_MOMENTUM, threshold)
        *outputs, out['tau'], condensed = ops.gated_coefficients(x, a, v, *gate, *statistics, *momenta, *rectification)
    center, scale, mean, var, out['running_mean'], out['running_var'] = outputs
    out['var'], out['condensed'] = var, condensed
    bias = scale * (var + EPS).sqrt() * p['bias'] if calibrate else p['bias']
    centre = k * k // 2
    taps = p['weight'][:, centre], torch.cat([p['weight'][:, :centre], p['weight'][:, centre + 1 :]], dim=1)
    taps = taps if k > 1 else (taps[0], None)
    out['y'] = ops.apply(x, center, scale, *taps, bias)
    g, s = ops.tap_sums(x, dy, center, k)
    slope, offset, *gradients = ops.coefficients_backward(
        g, s, a, mean, var, EPS, condensed, scale, *taps, p['center_weight'], p['scale_weight'],
        p['bias'] if calibrate else None, kind, h * w,
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


def compare_layer(case, threshold, max_samples=16):
    x = case[0]
    inputs = [tensor.clone() for tensor in tensors_of(case)]
    out = layer(*case, threshold, max_samples)
    for tensor, before in zip(tensors_of(case), inputs, strict=True):
        assert torch.equal(tensor, before), 'a kernel wrote into its input'
    expected = oracle(*case, threshold, max_samples)
    for name in ('a', 'v', 'var', 'running_mean', 'running_var'):
        close(name, out[name], expected[name])
    close('sums', out['sums'], expected['sums'], 16 * len(x))
    if threshold is not None:
        close('tau', out['tau'], expected['tau'])
    assert bool(out['condensed']) == bool(expected['condensed'])
    for name in ('y', 'd_x', *(f'd_{name}' for name in NAMES)):
        if name in expected:
            close(name, out[name], expected[name], expected['size'].get(name, 0.0))
        else:
            assert out[name].numel() == 0, name
    assert out['y'].dtype == out['d_x'].dtype == x.dtype
    assert out['y'].stride() == out['d_x'].stride() == x.stride()


def layer_cases():
    """Every kernel size with both layouts and shapes around its tiles; dtypes and forms of the layer in turn."""
    tiny = [(2, 3, 5, 7), (3, 5, 1, 1), (1, 2, 1, 9)]
    larger = [(4, 17, 8, 8), (1, 37, 9, 6), (1, 2, 11, 17), (1, 1, 3, 65)]
    shapes = {
        1: [*tiny, *larger],
        3: [*tiny, *larger, (70, 3, 1, 2), (1, 2, 19, 16), (1, 3, 16, 8), (2, 2, 7, 14), (1, 3, 13, 10)],
        5: [*tiny, (1, 2, 5, 17), (1, 2, 7, 8)],
        7: [(3, 5, 1, 1), (1, 2, 1, 9), (1, 2, 5, 7), (1, 2, 3, 6)],
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
    for k in kernels.KERNEL_SIZES:
        for shape, layout in itertools.product(shapes[k], ('nchw', 'channels_last')):
            case = (shape, layout, next(dtypes), k, *next(forms)), next(condensed), next(programs)
            # One program for each of 70 samples would take the interpreter long.
            if shape[0] < 70 or layout == 'nchw':
                yield case


for _case, _condensed, _programs in layer_cases():
    _shape, _layout, _dtype, _k, _kind, _centering, _calibrate = _case
    _words = [
        *('layer', 'x'.join(map(str, _shape)), _layout, str(_dtype).removeprefix('torch.'), f'k{_k}'),
        *(_kind or 'unscaled', *['centered'] * _centering, *['calibrated'] * _calibrate),
        *('batch' if _condensed else 'running', f'programs{_programs}'),
    ]

    @check(' '.join(_words), _case, _condensed, _programs)
    def _(case, condensed, programs):
        with programs_aimed_at(programs):
            compare_layer(make_case(*case), -1 if condensed else 0.99)


@contextlib.contextmanager
def programs_aimed_at(programs, similarity_parts=1024):
    """The tests' maps are small: with 1 program per plane its loops run, with many the merging of parts does."""
    before = kernels.REDUCTION_PROGRAMS, kernels.MAP_PROGRAMS, kernels.SIMILARITY_PARTS
    kernels.REDUCTION_PROGRAMS = kernels.MAP_PROGRAMS = programs
    kernels.SIMILARITY_PARTS = similarity_parts
    try:
        yield
    finally:
        kernels.REDUCTION_PROGRAMS, kernels.MAP_PROGRAMS, kernels.SIMILARITY_PARTS = before


def moments_cases():
    for layout in ('nchw', 'channels_last'):
        for programs in (1, 2048):
            yield layout, programs


for _layout, _programs in moments_cases():

    @check(f'moments far from zero {_layout} programs{_programs}', _layout, _programs)
    def _(layout, programs):
        """A mean a million deviations away; one pixel, the first, that is as far from the others."""
        format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 65, 140, generator=generator)
        x[0] = 2.0**20 + x[0]
        x[1, :, 0, 0] = 1e6
        x = guarded(x.contiguous(memory_format=format))
        with programs_aimed_at(programs):
            a, v = kernels.instance_moments(x)
        x = x.double()
        for n in range(2):
            var, mean = torch.var_mean(x[n], (1, 2), correction=0)
            # The mean to the last place, of itself or of the deviation.
            assert bool(((a[n] - mean).abs() <= UNIT * (mean.abs() + 4 * var.sqrt())).all())
            close('v', v[n], var)


@check('similarity')
def _():
    generator = torch.Generator().manual_seed(0)

    def sums(x, max_samples=16):
        with programs_aimed_at(2048, similarity_parts=1):
            return kernels.similarity_sums(x, *kernels.instance_moments(x), max_samples)

    def expected(x, max_samples=16):
        f = x[:max_samples].double().flatten(1)
        norm = f.norm(dim=1)
        cosine = (f @ f.T) / (norm[:, None] * norm).clamp_min(1e-300)
        return torch.stack([cosine.sum() - cosine.diagonal().sum(), torch.tensor(1.0 * len(f) * (len(f) - 1))])

    for format in (torch.contiguous_format, torch.channels_last):
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


@check('gate')
def _():
    """tau moves by a finite similarity alone, and its new value decides which statistics are used, of every channel."""
    tau, mean, var = torch.tensor(0.25), torch.full((300,), 7.0), torch.full((300,), 3.0)
    alike = torch.ones(2, 300, 1, 2)
    alike[:, ::2] = 2
    broken = alike.clone()
    broken[1, 2] = math.nan
    batches = {'alike': (alike, 1.0), 'opposite': (torch.stack([alike[0], -alike[0]]), -1.0)}
    batches |= {'one sample': (alike[:1], None), 'not finite': (broken, None), 'zeros': (0 * alike, 0.0)}
    for (name, (x, similarity)), threshold in itertools.product(batches.items(), (-1, 0.1, 0.2, 0.3, 0.7)):
        a, v = kernels.instance_moments(x)
        gate = (16, tau, 0.5, threshold)
        _, _, used, _, _, _, new, condensed = kernels.gated_coefficients(
            x, a, v, *gate, mean, var, len(x) * 2, EPS, MOMENTUM, None, None, None, None
        )
        expected = 0.25 if similarity is None else 0.5 * 0.25 + 0.5 * similarity
        assert float(new) == pytest.approx(expected, abs=1e-6), name
        assert bool(condensed) == (expected > threshold), (name, threshold)
        assert new.shape == condensed.shape == ()
        assert condensed.dtype == torch.bool
        torch.testing.assert_close(used, a.mean(0) if condensed else mean, equal_nan=True)


@check('coefficients')
def _():
    generator = torch.Generator().manual_seed(0)
    a, v, mean, var, w_m, w_v, w_b = (
        torch.randn(5, 9, generator=generator).abs()[slice(None) if i < 2 else 0] + i for i in range(7)
    )
    for kind, center_weight in itertools.product(('rectified', 'instance', None), (w_m, None)):
        scaling = (w_v, w_b) if kind else (None, None)
        center, scale = kernels.coefficients(a, mean, var, EPS, center_weight, *scaling, kind)
        s = (var.double() + EPS).rsqrt()
        m = mean - (0 if center_weight is None else center_weight) * a.double()
        stat = {'rectified': (a - m) * s, 'instance': a.double(), None: a}[kind]
        close('center', center, m)
        close('scale', scale, s * torch.sigmoid(w_v * stat + w_b) if kind else s.expand_as(a))

    # A batch that is not finite in a channel leaves that channel's running statistics alone; so does one that is not
    # condensed, in all channels; one value has no unbiased variance.
    for index, value in ((0, math.inf), (1, math.nan)):
        broken = [a.clone(), v.clone()]
        broken[index][2, 4] = value
        for condensed in (True, False):
            *_, new_mean, new_var = kernels.statistics_coefficients(
                *broken, mean, var, torch.tensor(condensed), 20, EPS, MOMENTUM, None, None, None, None
            )
            kept = (new_mean == mean) & (new_var == var)
            assert kept.tolist() == [not condensed or c == 4 for c in range(9)]
    *_, new_var = kernels.statistics_coefficients(
        a[:1], v[:1], mean, var, torch.tensor(True), 1, EPS, MOMENTUM, None, None, None, None
    )
    close('one value', new_var, 0.9 * var.double() + 0.1 * v[0].double())


@check('strides')
def _():
    """Any strides, any alignment, and coefficients of another dtype give what a dense copy gives, to the bit."""
    case = make_case((1, 4, 3, 4), 'nchw', torch.float32, 3, 'rectified', True, False)
    x, dy, *rest = case
    wide = torch.randn(1, 8, 3, 8)
    views = {
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
    for name, (x, dy) in views.items():
        near = torch.channels_last if 'channels-last' in name else torch.contiguous_format
        out = layer(x, dy, *rest, None, 16)
        dense = layer(*(t.clone(memory_format=near) for t in (x, dy)), *rest, None, 16)
        for key in out:
            assert torch.equal(out[key], dense[key]), (name, key)
        assert out['y'].is_contiguous(memory_format=near), name
        assert out['d_x'].is_contiguous(memory_format=near), name

    x, dy, parameters, *rest = case
    half = {name: value.bfloat16() for name, value in parameters.items()}
    single = {name: value.float() for name, value in half.items()}
    out, expected = (layer(x, dy, p, *rest, None, 16) for p in (half, single))
    for key in out:
        assert torch.equal(out[key], expected[key]), key


@check('errors')
def _():
    x, dy, p, _, _ = make_case((2, 4, 5, 6), 'nchw', torch.float32, 3, None, False, False)
    ones = torch.ones(2, 4)
    arguments = (ones, ones, p['bias'], p['weight'][:, 1:], p['bias'])
    for call, words in (
        (lambda: kernels.apply(x.double(), *arguments), 'float64'),
        (lambda: kernels.apply(x[0], *arguments), '3 dimensions'),
        (lambda: kernels.apply(x[:0], *arguments), 'elements'),
        (lambda: kernels.apply(x, ones[:1], *arguments[1:]), 'center'),
        (lambda: kernels.apply(x, *arguments[:3], torch.ones(4, 15), p['bias']), 'kernel sizes'),
        (lambda: kernels.apply(x, *arguments[:3], torch.ones(4, 9), p['bias']), 'k*k - 1'),
        (lambda: kernels.apply(x, *arguments[:3], torch.ones(3, 8), p['bias']), 'neighbor_weight'),
        (lambda: kernels.apply(x, *arguments[:4], p['bias'][:3]), 'bias'),
        (lambda: kernels.apply(x, ones.to('meta'), *arguments[1:]), 'on cpu'),
        (lambda: kernels.tap_sums(x, dy.half(), ones, 3), 'dtype'),
        (lambda: kernels.tap_sums(x, dy[:1], ones, 3), 'shape'),
        (lambda: kernels.similarity_sums(x, ones, ones, 0), 'max_samples'),
        (lambda: kernels.coefficients(ones, *[ones[0]] * 2, EPS, None, ones[0], None, 'rectified'), 'together'),
        (lambda: kernels.coefficients(ones, *[ones[0]] * 2, EPS, None, None, None, 'other'), 'other'),
        (lambda: kernels.instance_moments(torch.empty(1, 1, 2**15, 2**15, device='meta')), '2^30'),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    assert kernels.supports(x, 3) is None


@check('same bits')
def _():
    case = make_case((2, 3, 9, 9), 'channels_last', torch.float16, 1, 'rectified', True, False)
    first, second = (layer(*case, None, 16) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


def operator_calls():
    """The arguments of every operator in one pass through the layer."""
    calls = {}

    class Recorder:
        def __getattr__(self, name):
            def call(*arguments):
                calls[name] = arguments
                return getattr(torch.ops.mmubn, name)(*arguments)

            return call

    x, dy, p, running, options = make_case((2, 3, 2, 3), 'channels_last', torch.float16, 3, 'rectified', True, True)
    for threshold in (0.1, None):
        layer(x.clone(), dy, p, running, options, threshold, 16, Recorder())
    a = torch.ones(2, 3)
    calls['coefficients'] = (a, a[0], a[1].clone(), EPS, None, None, None, None)
    return calls


for _name in kernels.__all__:
    if hasattr(torch.ops.mmubn, _name):

        @check(f'operator {_name}', _name)
        def _(name):
            """Schema, fake implementation and dispatch under aot_autograd agree with what the operator does."""
            torch.library.opcheck(getattr(torch.ops.mmubn, name), operator_calls()[name])


@check('torch.compile')
def _():
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True, dynamic=True)
    for seed, (shape, layout) in enumerate((((2, 3, 4, 5), 'nchw'), ((3, 3, 6, 4), 'channels_last'))):
        case = make_case(shape, layout, torch.float32, 3, 'rectified', True, True, seed)
        eager = layer(*case, 0.1, 16)
        traced = compiled(*case, 0.1, 16, torch.ops.mmubn)
        for key in eager:
            assert torch.equal(eager[key], traced[key]), key
            assert eager[key].stride() == traced[key].stride(), key


# Whole layers, by these kernels and by the reference.

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
    with kernels_package.use_backend(backend):
        y = layer(x)
        y.backward(dy)
    out = {'y': y.detach(), 'x.grad': x.grad} | {f'{name}.grad': p.grad for name, p in layer.named_parameters()}
    return out | {name: buffer.clone() for name, buffer in layer.named_buffers()}


@check('no layer by the name of a backend that there is not')
def _():
    with pytest.raises(ValueError, match='reference, torch, triton, cpp'), kernels_package.use_backend('cuda'):
        pass


for _name in LAYERS:
    for _mode in ('condensed', 'not condensed', 'evaluation', 'momentum None'):

        @check(f'{_name}, {_mode}', _name, _mode)
        def _(name, mode):
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


@check('a layer under torch.compile, by these kernels in one graph')
def _():
    x, dy = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    layer, compiled = make_layer('UBN'), make_layer('UBN')
    expected = run_layer(layer, x, dy, 'triton')
    compiled.compile(backend='aot_eager', fullgraph=True)
    for key, value in run_layer(compiled, x, dy, 'triton').items():
        torch.testing.assert_close(value, expected[key])


def patch_once_per_launch():
    """At every call of one function by another the interpreter looks for what to patch in Triton's language, a third of
    its time; here a launch patches all of it once."""
    patch, language = interpreter._patch_lang, SimpleNamespace(__globals__={'tl': tl, 'core': tl.core})
    interpreter._patch_lang = lambda kernel: patch(language)
    interpreter.InterpretedFunction.__call__ = lambda function, *args, **kwargs: function.rewrite()(*args, **kwargs)


def main():
    patch_once_per_launch()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    report, seconds = {}, {}
    for name, function in CHECKS.items():
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        start = time.perf_counter()
        try:
            function()
            report[name] = None
        except Exception as error:
            report[name] = f'{error}\n{traceback.format_exc()}'
        seconds[name] = round(time.perf_counter() - start, 2)
    print(json.dumps(report, indent=1))
    print(json.dumps(seconds, indent=1), file=sys.stderr)


if __name__ == '__main__':
    main()
