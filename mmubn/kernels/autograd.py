"""The layer's function with its gradient written by hand: saves x and nothing else of its size."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from mmubn import functional as F

__all__ = [
    'Form',
    'Gate',
    'Parameters',
    'RectifiedNorm',
    'Statistics',
    'coefficients',
    'coefficients_backward',
    'gated_statistics',
    'gradients',
    'rectified_norm',
    'reference',
    'statistics',
]


class Form(NamedTuple):
    """What a norm type computes; see :func:`mmubn.functional.coefficients`."""

    eps: float
    scaling: str | None  # 'rectified', 'instance', 'unitized'
    calibrate_bias: bool  # r multiplies the bias too
    kernel_size: int  # k


class Gate(NamedTuple):
    """A decision by the batch's similarity: ``tau <- (1 - m_s) tau + m_s s``, ``condensed = tau > T``."""

    running_similarity: Tensor  # tau, 0-d
    momentum: float  # m_s
    threshold: float  # T
    max_samples: int  # the similarity is taken over so many samples of the batch


class Statistics(NamedTuple):
    """What normalises a batch; values alone, without a graph."""

    a: Tensor | None  # instance means, (N, C)
    v: Tensor | None  # instance variances, (N, C)
    mean: Tensor  # (C,)
    var: Tensor  # (C,)
    condensed: Tensor | None = None  # in training, whether mean and var are the batch's and depend on x; 0-d bool
    count: int | Tensor = 0  # values per channel of the batch that they are of
    synchronized: bool = False  # whether that batch is of all processes
    coefficients: tuple[Tensor, Tensor] | None = None  # center and scale, each (N, C), where they came with these


class Parameters(NamedTuple):
    """The learned tensors of a layer; None where it has no such part."""

    weight: Tensor
    bias: Tensor
    neighbor_weight: Tensor | None
    center_weight: Tensor | None
    scale_weight: Tensor | None
    scale_bias: Tensor | None


def reference(x: Tensor, statistics: Statistics, form: Form, parameters: Parameters) -> Tensor:
    """The function in plain torch, differentiable any number of times: :mod:`mmubn.functional` in its order."""
    p = parameters
    a = v = None
    mean, var = statistics.mean, statistics.var
    if statistics.condensed is not None:
        a, v = F.instance_moments(x)
        batch = F.batch_statistics(a, v, p.center_weight)
        mean, var = (torch.where(statistics.condensed, new, old) for new, old in zip(batch, (mean, var), strict=True))
    elif form.scaling == 'unitized':
        a, v = F.instance_moments(x)
    elif p.center_weight is not None or form.scaling is not None:
        a = F.instance_means(x)
    statistics = statistics._replace(a=a, v=v, mean=mean, var=var)
    center, scale, r = coefficients(statistics, form, p, x.shape[2] * x.shape[3])
    bias = r * p.bias if form.calibrate_bias else p.bias
    return F.affine(F.normalize(x, center, scale), p.weight, bias, p.neighbor_weight).to(x.dtype)


def rectified_norm(ops: ModuleType, x: Tensor, statistics: Statistics, form: Form, parameters: Parameters) -> Tensor:
    """:func:`reference` by the functions of ``ops``, with a backward written by hand."""
    if not torch.is_grad_enabled():
        return _forward(ops, x, statistics, form, parameters)[0]
    return RectifiedNorm.apply(ops, form, statistics[5:], x, *statistics[:5], *parameters)


def _forward(
    ops: ModuleType, x: Tensor, statistics: Statistics, form: Form, p: Parameters
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The output, and what the backward needs: center, scale, r, and the kernel, None where it is just parameters."""
    if x.numel() == 0:
        empty = statistics.mean.new_empty((0, len(p.weight)))
        return torch.empty_like(x), (empty, empty, empty if form.scaling else None, None)
    center, scale, r = ops.coefficients(statistics, form, p, x.shape[2] * x.shape[3])
    bias = r * p.bias if form.calibrate_bias else p.bias
    kernel = ops.depthwise_kernel(p, statistics.mean.dtype)
    y = ops.apply(x, center, scale, kernel, bias).to(x.dtype)
    return y, (center, scale, r, kernel if isinstance(kernel, Tensor) else None)


class RectifiedNorm(torch.autograd.Function):
    """What :func:`rectified_norm` applies. Saves x and O(N C) numbers. A second derivative is the reference's."""

    @staticmethod
    def forward(ctx, ops: ModuleType, form: Form, batch: tuple, x: Tensor, *tensors: Tensor | None) -> Tensor:
        y, saved = _forward(ops, x, Statistics(*tensors[:5], *batch), form, Parameters(*tensors[5:]))
        ctx.ops, ctx.form, ctx.batch = ops, form, batch[:2]
        ctx.save_for_backward(x, *tensors, *saved)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors, center, scale, r, kernel = ctx.saved_tensors
        statistics, p = Statistics(*tensors[:5], *ctx.batch), Parameters(*tensors[5:])
        with F.without_autocast(dy.device.type):
            if torch.is_grad_enabled():
                grads = _differentiable_backward(ctx, dy, x, statistics, p)
            else:
                grads = _backward(ctx, dy, x, statistics, p, center, scale, r, kernel)
        return None, None, None, grads[0], *[None] * 5, *grads[1:]


def _backward(
    ctx,
    dy: Tensor,
    x: Tensor,
    statistics: Statistics,
    p: Parameters,
    center: Tensor,
    scale: Tensor,
    r: Tensor | None,
    kernel: Tensor | None,
) -> list[Tensor | None]:
    size = x.shape[2] * x.shape[3]
    if x.numel() == 0:
        kernel = F.depthwise_kernel(p.weight, p.neighbor_weight).to(scale.dtype)
        g = s = scale.new_zeros((0, kernel.shape[0], kernel[0].numel()))
        grads = coefficients_backward(g, s, statistics, ctx.form, p, kernel, center, scale, r, size)[2]
        return [torch.zeros_like(x), *grads]
    ops = ctx.ops
    if kernel is None:
        kernel = ops.depthwise_kernel(p, scale.dtype)
    g, s, kept = ops.tap_sums(dy, x, center, ctx.form.kernel_size)
    slope, offset, grads = ops.coefficients_backward(g, s, statistics, ctx.form, p, kernel, center, scale, r, size)
    dx = None
    if ctx.needs_input_grad[3]:
        dx = ops.input_gradient(dy, x, kept, statistics.a, center, scale, kernel, slope, offset).to(x.dtype)
    return [dx, *grads]


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
    """:func:`mmubn.functional.select_statistics` of the moments of a batch.

    Returns:
        ``(selected, moved, coefficients)``: mean and variance that normalise, the new running ones, and what
        ``Statistics.coefficients`` says, if a backend has it from the same launch.
    """
    batch = F.batch_statistics(a, v, p.center_weight)
    return *F.select_statistics(batch, running, condensed, momentum, count), None


def gated_statistics(
    similarity_sums: Callable[..., tuple[Tensor, int]],
    statistics: Callable[..., tuple],
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
    """``statistics`` of a batch whose similarity decides; what it returns, the running similarity and the decision."""
    total, pairs = similarity_sums(x, a, v, gate.max_samples)
    tau = F.update_running_similarity(gate.running_similarity, total / pairs, gate.momentum)
    condensed = F.is_condensed(tau, gate.threshold)
    return *statistics(a, v, form, p, running, condensed, momentum, count), tau, condensed


def coefficients(statistics: Statistics, form: Form, p: Parameters, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`mmubn.functional.coefficients` of what a layer has; size is H * W."""
    a, v, mean, var = statistics[:4]
    return F.coefficients(
        a, v, (mean, var), form.eps, size, form.scaling, p.center_weight, p.scale_weight, p.scale_bias
    )


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
    """From the sums over H and W to the gradients of the parameters, and to what is left to do for each value of x.

    Args:
        g, s: ``G`` and ``S`` of ``tap_sums``, (N, C, T).
        statistics, form, p: Of the forward.
        kernel: (C, 1, k, k).
        center, scale, r: :func:`mmubn.functional.coefficients` gave these in the forward.
        size: H * W.

    Returns:
        ``(slope, offset, gradients)`` with ``dx = scale conv(dy; kernel turned) + slope (x - a) + offset``, slope and
        offset (N, C), None for 0.
    """
    a, v, mean, var = statistics[:4]
    inv_std = torch.rsqrt(var + form.eps)
    taps = kernel.flatten(1)
    d_taps = (scale[..., None] * g).sum(0)
    d_scale = (g * taps).sum(2)
    d_center = -scale * (s * taps).sum(2)
    d_bias = s[..., taps.shape[1] // 2]

    # scale = r inv_std, and r as form.scaling says.
    d_inv_std = (d_scale if r is None else d_scale * r).sum(0)
    d_a = d_v = d_scale_weight = d_scale_bias = None
    if r is not None:
        d_r = d_scale * inv_std
        if form.calibrate_bias:
            d_r, d_bias = d_r + d_bias * p.bias, d_bias * r
        if form.scaling == 'unitized':
            deviation = a - center
            q = v + deviation.square()
            root = torch.rsqrt((q * inv_std.square()).sum(1, keepdim=True) / size + form.eps)
            d_scale_weight = (d_r * (root - 1)).sum(0)
            d_v = -0.5 / size * root**3 * (d_r * p.scale_weight).sum(1, keepdim=True) * inv_std.square()
            d_inv_std = d_inv_std + 2 * (d_v * q).sum(0) / inv_std
            d_a = 2 * d_v * deviation
            d_center = d_center - d_a
        else:
            d_logit = d_r * r * (1 - r)
            pooled = (a - center) * inv_std if form.scaling == 'rectified' else a
            d_scale_weight, d_scale_bias = (d_logit * pooled).sum(0), d_logit.sum(0)
            d_a = d_logit * p.scale_weight
            if form.scaling == 'rectified':
                d_inv_std = d_inv_std + (d_a * (a - center)).sum(0)
                d_a = d_a * inv_std
                d_center = d_center - d_a

    # center = mean - w_m a
    d_mean, d_center_weight = d_center.sum(0), None
    if p.center_weight is not None:
        d_center_weight = -(d_center * a).sum(0)
        d_a = d_a - p.center_weight * d_center if d_a is not None else -p.center_weight * d_center

    # mean = sum_n share m and var = sum_n share (v + (m - mean)^2), with m = (1 + w_m) a
    if statistics.condensed is not None:
        d_var = -0.5 * d_inv_std * inv_std**3
        if statistics.synchronized:
            both = torch.stack([d_mean, d_var])
            dist.all_reduce(both)
            d_mean, d_var = both
        share = statistics.condensed.to(a.dtype) * size / statistics.count
        gain = 1 if p.center_weight is None else 1 + p.center_weight.to(a.dtype)  # not rounded to half precision
        d_m = share * (d_mean + 2 * d_var * (gain * a - mean))
        if p.center_weight is not None:
            d_center_weight = d_center_weight + (d_m * a).sum(0)
        d_a = gain * d_m if d_a is None else d_a + gain * d_m
        d_v = (share * d_var).expand_as(a) if d_v is None else d_v + share * d_var

    # a and v are means over H and W: the gradient of x gets d_a / HW + 2 d_v (x - a) / HW.
    slope = None if d_v is None else 2 / size * d_v
    offset = None if d_a is None else d_a / size

    return slope, offset, gradients(p, d_taps, d_bias.sum(0), d_center_weight, d_scale_weight, d_scale_bias)


def gradients(p: Parameters, d_taps: Tensor, *others: Tensor | None) -> Parameters:
    """Gradients of the parameters that there are, from those of the taps (C, T) and of the other parameters."""
    centre = d_taps.shape[1] // 2
    d_neighbors = torch.cat([d_taps[:, :centre], d_taps[:, centre + 1 :]], dim=1)
    grads = d_taps[:, centre], others[0], d_neighbors, *others[1:]
    return Parameters(*(None if value is None else grad for value, grad in zip(p, grads, strict=True)))


def _differentiable_backward(ctx, dy: Tensor, x: Tensor, statistics: Statistics, p: Parameters) -> list[Tensor | None]:
    """The gradients with a graph of their own, for a second derivative: those of the reference."""
    if statistics.synchronized:
        raise NotImplementedError(
            'SyncUBN has no second derivative across processes: use UBN where create_graph=True is needed.'
        )
    inputs = [x, *p]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    grads = iter(torch.autograd.grad(reference(x, statistics, ctx.form, p), wanted, dy, create_graph=True))
    return [next(grads) if tensor is not None and tensor.requires_grad else None for tensor in inputs]
