"""The Triton kernels under the names and conventions that :mod:`mmubn.kernels.autograd` expects.

What the kernels do not cover (UnitizedBN's factor, statistics of several processes, a momentum that is a tensor) takes
the same small (N, C) functions as the torch backend; the passes over x are Triton's all the same.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmubn.kernels import autograd, torch_ops, triton_kernels
from mmubn.kernels.autograd import Form, Gate, Parameters, Statistics

__all__ = [
    'apply',
    'coefficients',
    'coefficients_backward',
    'depthwise_kernel',
    'gated_statistics',
    'input_gradient',
    'instance_means',
    'instance_moments',
    'similarity_sums',
    'statistics',
    'tap_sums',
]


Taps = tuple[Tensor, Tensor | None]  # weight and neighbor_weight


def _kernels() -> ModuleType:
    """The functions that launch, or, for a compiler, the same as operators that it need not look into."""
    return torch.ops.mmubn if torch.compiler.is_compiling() else triton_kernels


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`mmubn.functional.instance_moments`."""
    return _kernels().instance_moments(x)


def instance_means(x: Tensor) -> Tensor:
    """``a = mean_hw x``, (N, C); the variance comes with it at no cost."""
    return _kernels().instance_moments(x)[0]


def similarity_sums(x: Tensor, a: Tensor, v: Tensor, max_samples: int) -> tuple[Tensor, int]:
    """:func:`mmubn.functional.similarity_sums`."""
    n = min(len(x), max_samples)
    return _kernels().similarity_sums(x, a, v, max_samples)[0], n * (n - 1)


def statistics(
    a: Tensor,
    v: Tensor,
    form: Form,
    p: Parameters,
    running: tuple[Tensor, Tensor],
    condensed: Tensor,
    momentum: float | Tensor,
    count: int,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """:func:`mmubn.kernels.autograd.statistics` in one launch, with the coefficients."""
    if isinstance(momentum, Tensor) or not _moves(running):
        return autograd.statistics(a, v, form, p, running, condensed, momentum, count)
    center, scale, mean, var, *moved = _kernels().statistics_coefficients(
        a, v, *running, condensed, count, form.eps, momentum, *_rectification(form, p)
    )
    return (mean, var), tuple(moved), None if form.scaling == 'unitized' else (center, scale)


def gated_statistics(
    x: Tensor,
    a: Tensor,
    v: Tensor,
    gate: Gate,
    form: Form,
    p: Parameters,
    running: tuple[Tensor, Tensor],
    momentum: float,
    count: int,
) -> tuple:
    """:func:`mmubn.kernels.autograd.gated_statistics` in two launches, with the coefficients."""
    if not _moves(running):
        return autograd.gated_statistics(similarity_sums, statistics, x, a, v, gate, form, p, running, momentum, count)
    tau, similarity_momentum, threshold, max_samples = gate
    center, scale, mean, var, *moved, tau, condensed = _kernels().gated_coefficients(
        *(x, a, v, max_samples, tau, similarity_momentum, threshold),
        *(*running, count, form.eps, momentum, *_rectification(form, p)),
    )
    return (mean, var), tuple(moved), (center, scale), tau, condensed


def _moves(running: tuple[Tensor, Tensor]) -> bool:
    """The kernels move float32: of another dtype, a layer must see whether its own still holds the variance."""
    return running[0].dtype == torch.float32


def _rectification(form: Form, p: Parameters) -> tuple[Tensor | None, Tensor | None, Tensor | None, str | None]:
    if form.scaling == 'unitized':
        return p.center_weight, None, None, None
    return p.center_weight, p.scale_weight, p.scale_bias, form.scaling


def coefficients(s: Statistics, form: Form, p: Parameters, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`mmubn.functional.coefficients`."""
    if form.scaling == 'unitized' or s.a is None:
        return autograd.coefficients(s, form, p, size)
    center, scale = s.coefficients or _kernels().coefficients(s.a, s.mean, s.var, form.eps, *_rectification(form, p))
    # The kernel of the backward finds r in scale; else only a calibrated bias needs it.
    r = scale * (s.var + form.eps).sqrt() if form.scaling and (form.calibrate_bias or s.synchronized) else None
    return center, scale, r


def depthwise_kernel(p: Parameters, dtype: torch.dtype) -> Taps:
    """The kernel as the parameters have it."""
    return p.weight, p.neighbor_weight


def apply(x: Tensor, center: Tensor, scale: Tensor, kernel: Taps, bias: Tensor) -> Tensor:
    """``y = depthwise_conv((x - center) * scale; kernel) + bias``."""
    return _kernels().apply(x, _rows(center, x), _rows(scale, x), *kernel, bias)


def tap_sums(dy: Tensor, x: Tensor, center: Tensor, size: int) -> tuple[Tensor, Tensor, None]:
    """:func:`mmubn.kernels.torch_ops.tap_sums`; nothing is kept."""
    return *_kernels().tap_sums(x, dy, _rows(center, x), size), None


def coefficients_backward(
    g: Tensor,
    s: Tensor,
    statistics: Statistics,
    form: Form,
    p: Parameters,
    kernel: Taps,
    center: Tensor,
    scale: Tensor,
    r: Tensor | None,
    size: int,
) -> tuple[Tensor | None, Tensor | None, Parameters]:
    """:func:`mmubn.kernels.autograd.coefficients_backward`."""
    if form.scaling == 'unitized' or statistics.a is None or statistics.synchronized:
        kernel = torch_ops.depthwise_kernel(p, scale.dtype)
        return autograd.coefficients_backward(g, s, statistics, form, p, kernel, center, scale, r, size)
    slope, offset, *gradients = _kernels().coefficients_backward(
        g,
        s,
        statistics.a,
        statistics.mean,
        statistics.var,
        form.eps,
        statistics.condensed,
        scale,
        *kernel,
        p.center_weight,
        p.scale_weight,
        p.bias if form.calibrate_bias else None,
        form.scaling,
        size,
    )
    return slope, offset, Parameters(*(None if old is None else new for old, new in zip(p, gradients, strict=True)))


def input_gradient(
    dy: Tensor,
    x: Tensor,
    kept: None,
    a: Tensor | None,
    center: Tensor,
    scale: Tensor,
    kernel: Taps,
    slope: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """``scale depthwise_conv(dy; kernel turned by half a turn) + slope (x - a) + offset``; None is 0."""
    a, slope, offset = (scale.new_zeros(x.shape[:2]) if value is None else value for value in (a, slope, offset))
    return _kernels().input_gradient(dy, x, a, _rows(scale, x), *kernel, slope, offset)


def _rows(value: Tensor, x: Tensor) -> Tensor:
    """(C,) or (1, C) as (N, C)."""
    shape = x.shape[:2]
    return value if value.shape == shape else value.expand(shape)
