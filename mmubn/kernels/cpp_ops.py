"""The kernels of ``cpp_kernels.cpp`` under the names and conventions that :mod:`mmubn.kernels.autograd` expects.

What they do not cover (UnitizedBN's factor, statistics of several processes, a momentum that is a tensor, buffers in
half precision) takes the same small (N, C) functions as the torch backend; the passes over x are the kernels' all the
same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmubn import functional as F
from mmubn.kernels import autograd, cpp_library
from mmubn.kernels.autograd import Form, Parameters, Statistics
from mmubn.kernels.torch_ops import dense, depthwise_kernel, memory_format

__all__ = [
    'apply',
    'coefficients',
    'coefficients_backward',
    'depthwise_kernel',
    'input_gradient',
    'instance_means',
    'instance_moments',
    'similarity_sums',
    'statistics',
    'supports',
    'tap_sums',
]

SIZES = (1, 3, 5, 7)
DTYPES = {getattr(torch, name): name for name in cpp_library.DTYPES}
SERIAL = 2**14  # values up to which one thread is as fast


def supports(x: Tensor, kernel_size: int) -> str | None:
    """Why the kernels cannot compute a layer with such an input and kernel; None where they can."""
    if x.device.type != 'cpu':
        return f'the C++ kernels take tensors on the CPU, got one on {x.device}'
    if x.dtype not in DTYPES:
        return f'the C++ kernels take float32, float64 or bfloat16, got {str(x.dtype).removeprefix("torch.")}'
    if kernel_size not in SIZES:
        return f'the C++ kernels have kernel sizes {", ".join(map(str, SIZES))}, got {kernel_size}'
    # A subclass (a fake tensor, a distributed one) has no plain memory of its own, nor has a lazy negation.
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.is_neg() or x._is_zerotensor():
        return f'the C++ kernels take plain tensors, got {type(x).__name__} of layout {x.layout}'
    if torch._C._are_functorch_transforms_active():
        return 'the C++ kernels take plain tensors, got one within a transform of torch.func'
    library, problem = cpp_library.library()
    return None if library is not None else f'the C++ kernels are not there: {problem}'


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Calls ``name_dtype``. Tensors, contiguous, are passed by address and held by ``arguments`` until it returns."""
    function = getattr(cpp_library.library()[0], f'{name}_{DTYPES[dtype]}')
    function(*[value.data_ptr() if isinstance(value, Tensor) else value for value in arguments])


def _threads(values: int) -> int:
    return 1 if values <= SERIAL else torch.get_num_threads()


def _plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.detach().to(dtype).contiguous()


def _rows(tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """A tensor that broadcasts to (N, C), as memory and the step from a sample to the next."""
    if tensor is None:
        return None, 0
    tensor = _plain(tensor, dtype)
    return tensor, shape[1] if tensor.numel() == shape.numel() else 0


def _is_channels_last(x: Tensor) -> bool:
    return memory_format(x) == torch.channels_last


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`mmubn.functional.instance_moments`."""
    x = dense(x)
    n, c, h, w = x.shape
    a, v = x.new_empty((2, n, c), dtype=F.statistics_dtype(x)).unbind(0)
    _call('moments', x.dtype, x, a, v, n, c, h * w, _is_channels_last(x), _threads(x.numel()))
    return a, v


def instance_means(x: Tensor) -> Tensor:
    """:func:`mmubn.functional.instance_means`."""
    x = dense(x)
    n, c, h, w = x.shape
    a = x.new_empty((n, c), dtype=F.statistics_dtype(x))
    _call('moments', x.dtype, x, a, None, n, c, h * w, _is_channels_last(x), _threads(x.numel()))
    return a


def similarity_sums(x: Tensor, a: Tensor, v: Tensor, max_samples: int) -> tuple[Tensor, int]:
    """:func:`mmubn.functional.similarity_sums` with the norms from the moments: ``||f_n||^2 = HW sum_c (v + a^2)``."""
    f = dense(x)
    n, c, h, w = f.shape
    n = min(n, max_samples)
    total = a.new_empty(())
    _call('similarity', f.dtype, f, a, v, total, n, c, h * w, _threads(n * c * h * w))
    return total, n * (n - 1)


def statistics(
    a: Tensor,
    v: Tensor,
    form: Form,
    p: Parameters,
    running: tuple[Tensor, Tensor],
    condensed: Tensor,
    momentum: float | Tensor,
    count: int,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], None]:
    """:func:`mmubn.kernels.autograd.statistics`."""
    if isinstance(momentum, Tensor) or {buffer.dtype for buffer in running} != {a.dtype}:
        return autograd.statistics(a, v, form, p, running, condensed, momentum, count)
    center_weight = _plain(p.center_weight, a.dtype)
    running = [buffer.contiguous() for buffer in running]
    mean, var, *moved = a.new_empty(4, a.shape[1]).unbind(0)
    values = a, v, center_weight, *running, condensed, float(momentum), count, mean, var, *moved, *a.shape
    _call('statistics', a.dtype, *values)
    return (mean, var), tuple(moved), None


def coefficients(s: Statistics, form: Form, p: Parameters, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`mmubn.functional.coefficients`."""
    if form.scaling == 'unitized' or s.a is None:
        return autograd.coefficients(s, form, p, size)
    dtype = s.a.dtype
    parameters = [_plain(tensor, dtype) for tensor in (p.center_weight, p.scale_weight, p.scale_bias)]
    mean, var = _plain(s.mean, dtype), _plain(s.var, dtype)
    center, inv_std = torch.empty_like(s.a), torch.empty_like(mean)
    logit = torch.empty_like(s.a) if form.scaling else None
    is_rectified = form.scaling == 'rectified'
    _call(
        'coefficients', dtype, s.a, mean, var, form.eps, is_rectified, *parameters, center, inv_std, logit, *s.a.shape
    )
    if logit is None:
        return center, inv_std.unsqueeze(0), None
    r = logit.sigmoid_()
    return center, r * inv_std, r


def apply(x: Tensor, center: Tensor, scale: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """``y = depthwise_conv((x - center) * scale; kernel) + bias``; bias is (C,) or (N, C)."""
    return _convolve(dense(x), kernel, center, scale, bias)


def input_gradient(
    dy: Tensor,
    x: Tensor,
    kept: None,
    a: Tensor | None,
    center: Tensor,
    scale: Tensor,
    kernel: Tensor,
    slope: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """``scale depthwise_conv(dy; kernel turned by half a turn) + slope (x - a) + offset``; None is 0."""
    x = dense(x)
    dy = _like(dy, x)
    others = (None, None, None) if slope is None else (x, a, slope)
    return _convolve(dy, kernel, None, scale, offset, *others, turned=True)


def _convolve(
    values: Tensor,
    kernel: Tensor,
    center: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    other: Tensor | None = None,
    other_center: Tensor | None = None,
    slope: Tensor | None = None,
    turned: bool = False,
) -> Tensor:
    """``scale depthwise_conv(values - center; kernel) + bias + slope (other - other_center)``."""
    shape, dtype = values.shape[:2], F.statistics_dtype(values)
    out = torch.empty_like(values)
    kernel = _plain(kernel, dtype)
    tensors, steps = zip(*(_rows(tensor, shape, dtype) for tensor in (center, scale, bias, slope)), strict=True)
    options = kernel.shape[-1], turned, _is_channels_last(values), _threads(values.numel())
    pointers = kernel, *tensors[:3], other_center, tensors[3]
    _call('convolve', values.dtype, values, other, out, *pointers, *steps, *values.shape, *options)
    return out


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """dy in dtype and memory format of x, as values and not as a negation to come."""
    return dy.to(x.dtype).resolve_neg().contiguous(memory_format=memory_format(x))


def tap_sums(dy: Tensor, x: Tensor, center: Tensor, size: int) -> tuple[Tensor, Tensor, None]:
    """:func:`mmubn.kernels.torch_ops.tap_sums`; nothing is kept."""
    x = dense(x)
    dy = _like(dy, x)
    n, c = x.shape[:2]
    center, step = _rows(center, x.shape[:2], F.statistics_dtype(x))
    g, s = center.new_empty(2, n, size * size, c).unbind(0)
    values = x, dy, center, step, g, s, *x.shape, size, _is_channels_last(x), _threads(x.numel())
    _call('tap_sums', x.dtype, *values)
    return g.transpose(1, 2), s.transpose(1, 2), None


def coefficients_backward(
    g: Tensor,
    s: Tensor,
    statistics: Statistics,
    form: Form,
    p: Parameters,
    kernel: Tensor,
    center: Tensor,
    scale: Tensor,
    r: Tensor | None,
    size: int,
) -> tuple[Tensor | None, Tensor | None, Parameters]:
    """:func:`mmubn.kernels.autograd.coefficients_backward`."""
    n, c, taps = g.shape
    if form.scaling == 'unitized' or statistics.synchronized or n == 0:
        return autograd.coefficients_backward(g, s, statistics, form, p, kernel, center, scale, r, size)
    dtype = g.dtype
    mean, var = _plain(statistics.mean, dtype), _plain(statistics.var, dtype)
    center, center_step = _rows(center, g.shape[:2], dtype)
    scale, scale_step = _rows(scale, g.shape[:2], dtype)
    kernel = _plain(kernel, dtype)
    calibrated_bias = _plain(p.bias, dtype) if form.calibrate_bias else None
    center_weight, scale_weight = _plain(p.center_weight, dtype), _plain(p.scale_weight, dtype)
    d_taps, d_bias = g.new_empty(taps, c), g.new_empty(c)
    d_others = [
        None if tensor is None else g.new_empty(c) for tensor in (p.center_weight, p.scale_weight, p.scale_bias)
    ]
    slope = None if statistics.condensed is None else g.new_empty(c)
    has_offset = slope is not None or p.center_weight is not None or r is not None
    offset = g.new_empty(n, c) if has_offset else None
    _call(
        'coefficients_backward',
        dtype,
        g.transpose(1, 2).contiguous(),
        s.transpose(1, 2).contiguous(),
        statistics.a,
        mean,
        var,
        statistics.condensed,
        float(statistics.count),
        form.eps,
        form.scaling == 'rectified',
        kernel,
        center,
        center_step,
        scale,
        scale_step,
        r,
        calibrated_bias,
        center_weight,
        scale_weight,
        slope,
        offset,
        d_taps,
        d_bias,
        *d_others,
        n,
        c,
        taps,
        size,
        _threads(g.numel()),
    )
    return slope, offset, autograd.gradients(p, d_taps.T, d_bias, *d_others)
