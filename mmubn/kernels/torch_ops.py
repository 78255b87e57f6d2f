"""The passes over x in torch's own operators: what the CPU runs, and any device without Triton.

Chosen by what they cost on a CPU: ``mean`` reads at the speed of memory where ``var_mean`` is many times slower, and
a depthwise convolution of the (1, N*C, H, W) view takes another kernel for every sample at no cost, so that scaling by
(N, C) coefficients needs no pass of its own. Half precision is computed in float32 throughout.

Shapes: x (N, C, H, W); a, v, center, scale, slope, offset (N, C); kernel (C, 1, k, k); T = k*k taps, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmubn import functional
from mmubn.functional import statistics_dtype
from mmubn.kernels.autograd import Parameters, coefficients, coefficients_backward

__all__ = [
    'apply',
    'coefficients',
    'coefficients_backward',
    'dense',
    'depthwise_kernel',
    'input_gradient',
    'instance_moments',
    'memory_format',
    'similarity_sums',
    'tap_sums',
]

PIECE = 2**18  # values: 1 MB in float32
COLUMNS = 2**20  # of a sample at a time, in the similarity


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """``a = mean_hw x`` and ``v = mean_hw (x - a)^2``, each (N, C). In two passes: nothing cancels.

    In pieces that stay in the cache: new memory for a whole ``x - a`` costs more than the arithmetic.
    """
    x, dtype = dense(x), statistics_dtype(x)
    n, c, h, w = x.shape
    a, v = x.new_zeros(2, n, c, dtype=dtype).unbind(0)
    if x.is_contiguous():
        for plane, mean, norm in _pieces(x.view(n * c, h * w), a.view(-1), v.view(-1)):
            plane = plane.to(dtype)
            torch.mean(plane, 1, out=mean)
            torch.linalg.vector_norm(plane - mean[:, None], dim=1, out=norm)
        v.square_()
    else:
        for sample, mean, square in zip(x.permute(0, 2, 3, 1).flatten(1, 2), a, v, strict=True):
            for (pixels,) in _pieces(sample):
                mean += pixels.to(dtype).sum(0)
            mean /= h * w
            for (pixels,) in _pieces(sample):
                square += (pixels - mean).square_().sum(0)
    return a, v.div_(h * w)


def similarity_sums(x: Tensor, a: Tensor, v: Tensor, max_samples: int) -> tuple[Tensor, int]:
    """:func:`mmubn.functional.similarity_sums` with the norms from the moments: ``||f_n||^2 = HW sum_c (v + a^2)``."""
    f = dense(x[:max_samples])
    # Any order of the values within the samples will do: a view, whichever of the two layouts it is.
    f = (f if f.is_contiguous() else f.permute(0, 2, 3, 1)).flatten(1)
    n, size = f.shape[0], x.shape[2] * x.shape[3]
    squared_norm = torch.addcmul(v[:n], a[:n], a[:n]).sum(1) * size
    # u_n = f_n / ||f_n||; a sample of zeros is similar to none.
    inverse = squared_norm.rsqrt().nan_to_num(nan=torch.nan, posinf=0)
    products = sum(values.to(a.dtype) @ values.to(a.dtype).T for values in f.split(COLUMNS, dim=1))
    # NaN where a norm is not finite: 0 * inf.
    return inverse @ products.fill_diagonal_(0) @ inverse + (0 * squared_norm).sum(), n * (n - 1)


def _pieces(rows: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices along the first dimension, of ``PIECE`` values of ``rows``."""
    length = max(1, PIECE // rows.shape[1])
    return zip(*(tensor.split(length) for tensor in (rows, *others)), strict=True)


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last where x is, else NCHW."""
    is_plain = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if is_plain else torch.channels_last


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it, in NCHW or channels-last order."""
    return x.contiguous(memory_format=memory_format(x))


def depthwise_kernel(p: Parameters, dtype: torch.dtype) -> Tensor:
    """:func:`mmubn.functional.depthwise_kernel`, (C, 1, k, k)."""
    return functional.depthwise_kernel(p.weight, p.neighbor_weight).to(dtype)


def apply(x: Tensor, center: Tensor, scale: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """``y = depthwise_conv((x - center) * scale; kernel) + bias``; bias is (C,) or (N, C). In the dtype of scale."""
    u = dense(x) - center[..., None, None]
    return _scaled_conv(u, scale, kernel, bias.to(u.dtype).expand(u.shape[:2]))


def tap_sums(dy: Tensor, x: Tensor, center: Tensor, size: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """All sums over H and W that the backward needs, per sample, channel and tap t of a kernel of ``size``.

    With p over the places of dy for which p + t lies in the map:

    ``G_t = sum_p (x(p + t) - center) dy(p)`` and ``S_t = sum_p dy(p)``, each (N, C, T).

    Returns:
        ``(G, S, kept)``; :func:`input_gradient` takes ``kept``: x - center, and dy in its dtype and memory format.
    """
    u = dense(x) - center[..., None, None]
    # In dtype and memory format of u, once for both passes.
    dy = dy.to(u.dtype).contiguous(memory_format=memory_format(u))
    n, c, h, w = u.shape
    if size == 1:
        return (u * dy).sum((2, 3))[..., None], dy.sum((2, 3))[..., None], (u, dy)
    if u.is_contiguous():
        g = _weight_gradient(dy.reshape(1, n * c, h, w), u.view(1, n * c, h, w), size).view(n, c, -1)
    else:
        g = torch.stack([_weight_gradient(dy[i : i + 1], u[i : i + 1], size) for i in range(n)])
    return g, _window_sums(dy, size), (u, dy)


def input_gradient(
    dy: Tensor,
    x: Tensor,
    kept: tuple[Tensor, Tensor],
    a: Tensor | None,
    center: Tensor,
    scale: Tensor,
    kernel: Tensor,
    slope: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """``scale depthwise_conv(dy; kernel turned by half a turn) + slope (x - a) + offset``; slope, offset None are 0.

    With u = x - center, which :func:`tap_sums` kept, x - a = u + (center - a).
    """
    u, dy = kept
    bias = dy.new_zeros(dy.shape[:2]) if offset is None else offset
    if slope is None:
        return _scaled_conv(dy, scale, kernel.flip(2, 3), bias)
    dx = _scaled_conv(dy, scale, kernel.flip(2, 3), bias + slope * (center - a))
    return dx.add_(u.mul_(slope[..., None, None]))  # addcmul_ is not vectorised for NCHW


def _scaled_conv(u: Tensor, scale: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """``scale depthwise_conv(u; kernel) + bias`` for scale and bias of (N, C)."""
    n, c, h, w = u.shape
    size = kernel.shape[-1]
    scale = scale.expand(n, c)
    if size == 1:
        return torch.addcmul(bias[..., None, None], u, (scale * kernel.view(c))[..., None, None])
    if u.is_contiguous():
        kernels = (scale[..., None, None] * kernel.view(c, size, size)).view(n * c, 1, size, size)
        y = F.conv2d(u.view(1, n * c, h, w), kernels, bias.reshape(-1), padding=size // 2, groups=n * c)
        # Not .view: autograd forbids changing a view in place that left a Function, as the ReLU after a norm does.
        return torch.ops.aten._unsafe_view(y, (n, c, h, w))
    # Channels-last has no such view, but a convolution that is several times as fast.
    y = F.conv2d(u, kernel, padding=size // 2, groups=c)
    return torch.addcmul(bias[..., None, None], y, scale[..., None, None], out=y)


def _weight_gradient(dy: Tensor, u: Tensor, size: int) -> Tensor:
    """``sum_{n,p} u(p + t) dy(p)``, (C, T)."""
    channels = u.shape[1]
    weight = u.new_empty(channels, 1, size, size)
    options = ([1, 1], [size // 2] * 2, [1, 1], False, [0, 0], channels)  # stride, padding, dilation, ..., groups
    return torch.ops.aten.convolution_backward(dy, u, weight, None, *options, [False, True, False])[1].view(
        channels, -1
    )


def _window_sums(dy: Tensor, size: int) -> Tensor:
    """``S_t``: the sum of dy without the rows and columns from which tap t looks over the edge, (N, C, T)."""
    n, c, h, w = dy.shape
    rows, columns = (_looks_inside(length, size, dy.dtype, dy.device) for length in (h, w))
    inside = (rows[:, None, :, None] * columns[None, :, None, :]).view(size * size, h * w)
    if dy.is_contiguous():
        return (dy.view(n * c, h * w) @ inside.T).view(n, c, -1)
    return (inside @ dy.permute(0, 2, 3, 1).flatten(1, 2)).transpose(1, 2)


def _looks_inside(length: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 where a tap looks at a place inside, else 0, (taps, places), along one dimension."""
    place = torch.arange(length, device=device) + torch.arange(size, device=device)[:, None] - size // 2
    return ((place >= 0) & (place < length)).to(dtype)
