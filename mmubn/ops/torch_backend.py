"""The backend ``torch``: the passes over x in torch's own operators, for what no kernel of ours takes.

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
from mmubn.ops.backend import Backend
from mmubn.ops.types import Coefficients, InputCoefficients, Moments, Similarity, Taps, TapSums

__all__ = ['TorchBackend', 'dense', 'memory_format']

PIECE = 2**18  # values: 1 MB in float32
COLUMNS = 2**20  # of a sample at a time, in the similarity


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last where x is, else NCHW."""
    is_plain = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if is_plain else torch.channels_last


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it, in NCHW or channels-last order."""
    return x.contiguous(memory_format=memory_format(x))


class TorchBackend(Backend):
    """torch's operators, on any device."""

    name = 'torch'

    def instance_means(self, x: Tensor) -> Tensor:
        return functional.instance_means(x)

    def instance_moments(self, x: Tensor) -> Moments:
        """In two passes: nothing cancels. In pieces that stay in the cache: new memory for a whole ``x - a`` costs more
        than the arithmetic."""
        x, dtype = dense(x), functional.statistics_dtype(x)
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
        return Moments(a, v.div_(h * w))

    def similarity_sums(self, x: Tensor, moments: Moments, max_samples: int) -> Similarity:
        """With the norms from the moments."""
        f = dense(x[:max_samples])
        # Any order of the values within the samples will do: a view, whichever of the two layouts it is.
        f = (f if f.is_contiguous() else f.permute(0, 2, 3, 1)).flatten(1)
        n, pixels = f.shape[0], x.shape[2] * x.shape[3]
        means = moments.a[:n]
        squared_norm = torch.addcmul(moments.v[:n], means, means).sum(1) * pixels
        # u_n = f_n / ||f_n||; a sample of zeros is similar to none.
        inverse = squared_norm.rsqrt().nan_to_num(nan=torch.nan, posinf=0)
        products = sum(values.to(means.dtype) @ values.to(means.dtype).T for values in f.split(COLUMNS, dim=1))
        # NaN where a norm is not finite: 0 * inf.
        total = inverse @ products.fill_diagonal_(0) @ inverse + (0 * squared_norm).sum()
        return Similarity(total, n * (n - 1))

    def apply(self, x: Tensor, coefficients: Coefficients, taps: Taps, bias: Tensor) -> Tensor:
        """In the statistics dtype."""
        assert taps.kernel is not None
        u = dense(x) - coefficients.center[..., None, None]
        return _scaled_conv(u, coefficients.scale, taps.kernel, bias.to(u.dtype).expand(u.shape[:2]))

    def tap_sums(self, dy: Tensor, x: Tensor, center: Tensor, kernel_size: int) -> TapSums:
        """Keeps x - center, and dy in its dtype and memory format, for :meth:`input_gradient`."""
        u = dense(x) - center[..., None, None]
        # In dtype and memory format of u, once for both passes.
        dy = dy.to(u.dtype).contiguous(memory_format=memory_format(u))
        n, c, h, w = u.shape
        if kernel_size == 1:
            return TapSums((u * dy).sum((2, 3))[..., None], dy.sum((2, 3))[..., None], (u, dy))
        if u.is_contiguous():
            flat = u.view(1, n * c, h, w)
            products = _weight_gradient(dy.reshape(1, n * c, h, w), flat, kernel_size).view(n, c, -1)
        else:
            samples = [_weight_gradient(dy[i : i + 1], u[i : i + 1], kernel_size) for i in range(n)]
            products = torch.stack(samples)
        return TapSums(products, _window_sums(dy, kernel_size), (u, dy))

    def input_gradient(
        self,
        dy: Tensor,
        x: Tensor,
        tap_sums: TapSums,
        a: Tensor | None,
        coefficients: Coefficients,
        taps: Taps,
        of_input: InputCoefficients,
    ) -> Tensor:
        """With the u = x - center that :meth:`tap_sums` kept: x - a = u + (center - a). Writes over it."""
        assert tap_sums.kept is not None
        assert taps.kernel is not None
        u, dy = tap_sums.kept
        slope, offset = of_input
        scale, turned = coefficients.scale, taps.kernel.flip(2, 3)
        bias = dy.new_zeros(dy.shape[:2]) if offset is None else offset
        if slope is None:
            return _scaled_conv(dy, scale, turned, bias)
        assert a is not None
        dx = _scaled_conv(dy, scale, turned, bias + slope * (coefficients.center - a))
        return dx.add_(u.mul_(slope[..., None, None]))  # addcmul_ is not vectorised for NCHW


def _pieces(rows: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices along the first dimension, of ``PIECE`` values of ``rows``."""
    length = max(1, PIECE // rows.shape[1])
    return zip(*(tensor.split(length) for tensor in (rows, *others)), strict=True)


def _scaled_conv(u: Tensor, scale: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """``scale depthwise_conv(u; kernel) + bias`` for scale and bias of (N, C)."""
    n, c, h, w = u.shape
    kernel_size = kernel.shape[-1]
    scale = scale.expand(n, c)
    if kernel_size == 1:
        return torch.addcmul(bias[..., None, None], u, (scale * kernel.view(c))[..., None, None])
    if u.is_contiguous():
        kernels = (scale[..., None, None] * kernel[:, 0]).view(n * c, 1, kernel_size, kernel_size)
        y = F.conv2d(u.view(1, n * c, h, w), kernels, bias.reshape(-1), padding=kernel_size // 2, groups=n * c)
        # Not .view: autograd forbids changing a view in place that left a Function, as the ReLU after a norm does.
        return torch.ops.aten._unsafe_view(y, (n, c, h, w))
    # Channels-last has no such view, but a convolution that is several times as fast.
    y = F.conv2d(u, kernel, padding=kernel_size // 2, groups=c)
    return torch.addcmul(bias[..., None, None], y, scale[..., None, None], out=y)


def _weight_gradient(dy: Tensor, u: Tensor, kernel_size: int) -> Tensor:
    """``sum_{n,p} u(p + t) dy(p)``, (C, T)."""
    channels = u.shape[1]
    weight = u.new_empty(channels, 1, kernel_size, kernel_size)
    options = (
        [1, 1],
        [kernel_size // 2] * 2,
        [1, 1],
        False,
        [0, 0],
        channels,
    )  # stride, padding, dilation, ..., groups
    return torch.ops.aten.convolution_backward(dy, u, weight, None, *options, [False, True, False])[1].view(
        channels, -1
    )


def _window_sums(dy: Tensor, kernel_size: int) -> Tensor:
    """``sums`` of TapSums, (N, C, T): dy without the rows and columns from which tap t looks over the edge."""
    n, c, h, w = dy.shape
    rows, columns = (_looks_inside(length, kernel_size, dy.dtype, dy.device) for length in (h, w))
    inside = (rows[:, None, :, None] * columns[None, :, None, :]).view(kernel_size**2, h * w)
    if dy.is_contiguous():
        return (dy.view(n * c, h * w) @ inside.T).view(n, c, -1)
    return (inside @ dy.permute(0, 2, 3, 1).flatten(1, 2)).transpose(1, 2)


def _looks_inside(length: int, kernel_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Along one dimension: 1 where a tap looks at a place inside the map, else 0, (k, length)."""
    place = torch.arange(length, device=device) + torch.arange(kernel_size, device=device)[:, None] - kernel_size // 2
    return ((place >= 0) & (place < length)).to(dtype)
