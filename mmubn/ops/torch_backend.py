"""The backend ``torch``: the passes over x in torch's own operators, for what no kernel of ours takes.

Two ways, by what they cost (:class:`InPieces` on a CPU, :class:`InOnePass` on any other device), which give the same
numbers to rounding. Half precision is computed in float32 throughout.

A depthwise convolution of the (1, N*C, H, W) view takes another kernel for every sample at no cost, so that scaling by
(N, C) coefficients needs no pass of its own.

Shapes: x (N, C, H, W); a, v, center, scale, slope, offset (N, C); kernel (C, 1, k, k); T = k*k taps, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmubn import functional
from mmubn.ops.backend import Backend, center_has_gradient
from mmubn.ops.types import (
    Coefficients,
    Form,
    Gradients,
    InputCoefficients,
    Moments,
    Parameters,
    Similarity,
    Statistics,
    Taps,
    TapSums,
)

__all__ = ['InOnePass', 'InPieces', 'TorchBackend', 'dense', 'memory_format']

PIECE = 2**18  # values: 1 MB in float32
COLUMNS = 2**20  # of a sample at a time, in the similarity
# Values that torch's depthwise kernels for a GPU take at once: their offsets are 32-bit integers.
MOST_VALUES = 2**31 - 1
# Where torch's reductions read half precision and sum in float32 as they go
MIXED_REDUCTIONS = ('cuda', 'meta')


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
        return _way(x).instance_means(x)

    def instance_moments(self, x: Tensor) -> Moments:
        return _way(x).instance_moments(x)

    def similarity_sums(self, x: Tensor, moments: Moments, max_samples: int) -> Similarity:
        return _way(x).similarity_sums(x, moments, max_samples)

    def apply(self, x: Tensor, coefficients: Coefficients, taps: Taps, bias: Tensor) -> Tensor:
        return _way(x).apply(x, coefficients, taps, bias)

    def tap_sums(self, dy: Tensor, x: Tensor, center: Tensor, kernel_size: int) -> TapSums:
        """Keeps what :meth:`input_gradient` reads again."""
        return _way(x).tap_sums(dy, x, center, kernel_size)

    def coefficients_backward(
        self,
        tap_sums: TapSums,
        statistics: Statistics,
        form: Form,
        parameters: Parameters,
        taps: Taps,
        coefficients: Coefficients,
        pixels: int,
    ) -> tuple[InputCoefficients, Gradients]:
        way = _way(tap_sums.products)
        return way.coefficients_backward(tap_sums, statistics, form, parameters, taps, coefficients, pixels)

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
        """With the u = x - center that :meth:`tap_sums` kept: x - a = u + (center - a)."""
        return _way(x).input_gradient(dy, x, tap_sums, a, coefficients, taps, of_input)


def _way(x: Tensor) -> Backend:
    """How the operators go over x."""
    return IN_PIECES if x.device.type == 'cpu' else IN_ONE_PASS


class InPieces(Backend):
    """In pieces that stay in a CPU's cache, in the order in which x lies in memory.

    ``mean`` reads at the speed of memory where ``var_mean`` is many times slower.
    """

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


class InOnePass(Backend):
    """Few operators, each over all of x, for devices where the start of an operator counts. Never waits for the device.

    Nothing that may be in TF32 or that torch.use_deterministic_algorithms may refuse, as a product of matrices: what is
    a sum is summed, and a depthwise convolution of float32 or float64 in NCHW is a kernel of torch's own on an NVIDIA
    GPU. In channels-last it would be cuDNN's, in TF32 by default and with one kernel for all samples: maps are put into
    NCHW on their way to a convolution. No global flag is set, which other threads would see.

    Memory, besides x and y, or dy and dx: x - center; where dtype or layout are to be changed, the convolution's
    output and dy too. All in the statistics dtype.
    """

    name = 'torch'

    def instance_means(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), dtype=functional.statistics_dtype(x))

    def instance_moments(self, x: Tensor) -> Moments:
        """In one read. By Welford's recurrence in float32, which a GPU takes, v is off by some 4e-8 |a| / sqrt(v),
        relative to v: as much as y is by the rounding of the mean.
        """
        dtype = functional.statistics_dtype(x)
        if x.dtype == dtype or x.device.type not in MIXED_REDUCTIONS:
            v, a = torch.var_mean(x.to(dtype), (2, 3), correction=0)
            return Moments(a, v)
        a = self.instance_means(x)
        # Into float32, which var_mean does not offer.
        return Moments(a, torch.var(x, (2, 3), correction=0, out=torch.empty_like(a)))

    def similarity_sums(self, x: Tensor, moments: Moments, max_samples: int) -> Similarity:
        """As :func:`mmubn.functional.similarity_sums`, with the norms from the moments."""
        f = x[:max_samples]
        n, pixels = f.shape[0], f.shape[2] * f.shape[3]
        means = moments.a[:n]
        mean_square = torch.addcmul(moments.v[:n], means, means).sum(1)  # ||f_n||^2 / HW
        # A sample of zeros is similar to none.
        inverse = mean_square.clamp_min(torch.finfo(means.dtype).tiny).rsqrt()
        total = (f * inverse[:, None, None, None]).sum(0).square().sum()
        # sum_n ||u_n||^2: the number of samples but those of zeros, and NaN where a norm is not finite: 0 * inf
        own = (inverse.square() * mean_square).sum()
        return Similarity(torch.sub(total, own, alpha=pixels) / pixels, n * (n - 1))

    def apply(self, x: Tensor, coefficients: Coefficients, taps: Taps, bias: Tensor) -> Tensor:
        """In the dtype and the memory format of x."""
        assert taps.kernel is not None
        center, scale = coefficients.center, coefficients.scale
        if taps.kernel.shape[-1] == 1:
            return torch.addcmul(
                bias[..., None, None],
                x - center[..., None, None],
                (scale * taps.kernel.flatten())[..., None, None],
                out=torch.empty_like(x),
            )
        u = _centred_in_nchw(x, center)
        if u.dtype == x.dtype and memory_format(x) == torch.contiguous_format:
            return _convolve(u, scale, taps.kernel, bias)
        # The bias with the change of dtype or layout: both in one go.
        y = _convolve(u, scale, taps.kernel, None)
        return torch.add(y, bias[..., None, None], out=torch.empty_like(x))

    def tap_sums(self, dy: Tensor, x: Tensor, center: Tensor, kernel_size: int) -> TapSums:
        """Keeps x - center and dy. The sums are not there yet, but for a kernel of 1: see the next step."""
        if kernel_size == 1:
            u = x - center[..., None, None]
            return TapSums((u * dy).sum((2, 3))[..., None], dy.sum((2, 3), dtype=u.dtype)[..., None], (u, dy))
        u = _centred_in_nchw(x, center)
        dy = dy.to(u.dtype, memory_format=torch.contiguous_format).contiguous()
        return TapSums(_products(dy, u, kernel_size), dy.new_empty(0), (u, dy))

    def coefficients_backward(
        self,
        tap_sums: TapSums,
        statistics: Statistics,
        form: Form,
        parameters: Parameters,
        taps: Taps,
        coefficients: Coefficients,
        pixels: int,
    ) -> tuple[InputCoefficients, Gradients]:
        """With the sums of all taps where they count, else with those of the centre tap."""
        if form.kernel_size > 1:
            assert tap_sums.kept is not None
            _, dy = tap_sums.kept
            if center_has_gradient(statistics, form, parameters):
                sums = _window_sums_by_rows(dy, form.kernel_size)
            else:
                sums = dy.sum((2, 3))[..., None].expand_as(tap_sums.products)
            tap_sums = tap_sums._replace(sums=sums)
        return super().coefficients_backward(tap_sums, statistics, form, parameters, taps, coefficients, pixels)

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
        """With the u = x - center that :meth:`tap_sums` kept: x - a = u + (center - a). In dtype and format of x."""
        assert tap_sums.kept is not None
        assert taps.kernel is not None
        u, dy = tap_sums.kept
        slope, offset = of_input
        scale, bias = coefficients.scale, offset
        if slope is not None:
            assert a is not None
            difference = coefficients.center - a
            bias = slope * difference if offset is None else torch.addcmul(offset, slope, difference)
        if taps.kernel.shape[-1] == 1:
            factor = (scale * taps.kernel.flatten())[..., None, None]
            dx = dy * factor if bias is None else torch.addcmul(bias[..., None, None], dy, factor)
        else:
            dx = _convolve(dy, scale, taps.kernel.flip(2, 3), bias)
        if slope is not None:
            has_place = dx.dtype == x.dtype and memory_format(dx) == memory_format(x)
            return torch.addcmul(dx, u, slope[..., None, None], out=dx if has_place else torch.empty_like(x))
        return dx.to(x.dtype, memory_format=memory_format(x))


def _centred_in_nchw(x: Tensor, center: Tensor) -> Tensor:
    """``x - center`` in the dtype of the center, in NCHW."""
    return torch.sub(x, center[..., None, None], out=center.new_empty(x.shape))


def _convolve(u: Tensor, scale: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """``scale depthwise_conv(u; kernel) + bias`` for u in NCHW, scale of (N or 1, C), bias of (C,) or (N or 1, C)."""
    n, c, h, w = u.shape
    padding = kernel.shape[-1] // 2
    kernels = scale[..., None, None] * kernel[:, 0]
    bias = None if bias is None else bias.to(u.dtype)
    if len(scale) == 1 < c and (bias is None or bias.dim() == 1) and u.numel() <= MOST_VALUES:
        return F.conv2d(u, kernels.transpose(0, 1), bias, padding=padding, groups=c)

    def convolve(u: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(u[None], kernels[:, None], bias, padding=padding, groups=len(u))[0]

    rows = [u.view(n * c, h, w), kernels.expand(n, -1, -1, -1).flatten(0, 1)]
    if bias is not None:
        rows.append(bias.expand(n, c).flatten())
    # Not .view: autograd forbids changing a view in place that left a Function, as the ReLU after a norm does.
    return torch.ops.aten._unsafe_view(_by_planes(convolve, *rows), (n, c, h, w))


def _products(dy: Tensor, u: Tensor, kernel_size: int) -> Tensor:
    """``products`` of TapSums, (N, C, T), for dy and u in NCHW."""
    n, c, h, w = u.shape

    def products(dy: Tensor, u: Tensor) -> Tensor:
        return _weight_gradient(dy[None], u[None], kernel_size)

    return _by_planes(products, dy.view(n * c, h, w), u.view(n * c, h, w)).view(n, c, -1)


def _by_planes(function: Callable[..., Tensor], planes: Tensor, *others: Tensor) -> Tensor:
    """What a function of planes, (planes, H, W), and of others with as many rows, returns for each plane."""
    if planes.numel() <= MOST_VALUES:
        if len(planes) > 1:
            return function(planes, *others)
        # A single plane is no depthwise convolution to torch: it would be cuDNN's, in TF32.
        return function(*(tensor.expand(2, *tensor.shape[1:]).contiguous() for tensor in (planes, *others)))[:1]
    length = max(1, MOST_VALUES // planes[0].numel())
    parts = zip(*(tensor.split(length) for tensor in (planes, *others)), strict=True)
    return torch.cat([_by_planes(function, *part) for part in parts])


def _window_sums_by_rows(dy: Tensor, kernel_size: int) -> Tensor:
    """``sums`` of TapSums, (N, C, T), for dy in NCHW.

    The windows of the taps differ in the first and the last k // 2 rows alone, so those between them are summed first.
    """
    edge = kernel_size // 2
    inner = dy.shape[2] - 2 * edge
    if inner > 1:
        first, middle, last = dy.split([edge, inner, edge], 2)
        dy = torch.cat([first, middle.sum(2, keepdim=True), last], 2)
    return _products(dy, torch.ones_like(dy), kernel_size)


IN_PIECES, IN_ONE_PASS = InPieces(), InOnePass()
