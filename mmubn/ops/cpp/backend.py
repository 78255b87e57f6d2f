"""The backend ``cpp``: kernels for the CPU, compiled at their first use.

They do the passes over x, and the (N, C) steps of a layer that moves its statistics as most do. The other steps
(UnitizedBN's factor, statistics of several processes, a momentum that is a tensor, buffers in half precision) are those
of :class:`~mmubn.ops.backend.Backend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmubn import functional
from mmubn.ops.backend import Backend
from mmubn.ops.cpp import library
from mmubn.ops.cpp.boundary import DTYPES, KERNEL_SIZES, call
from mmubn.ops.plain import wrapped
from mmubn.ops.torch_backend import dense, memory_format
from mmubn.ops.types import (
    KERNEL_SCALINGS,
    Coefficients,
    Constants,
    Decision,
    Form,
    Gate,
    Gradients,
    InputCoefficients,
    Moments,
    Parameters,
    Running,
    Similarity,
    Statistics,
    Taps,
    TapSums,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ['CppBackend']

SERIAL = 2**14  # values up to which one thread is as fast


class CppBackend(Backend):
    """The C++ kernels, for plain tensors on the CPU."""

    name = 'cpp'

    def problem(self, x: Tensor, kernel_size: int) -> str | None:
        if x.device.type != 'cpu':
            return f'the C++ kernels take tensors on the CPU, got one on {x.device}'
        if x.dtype not in DTYPES:
            return f'the C++ kernels take float32, float64 or bfloat16, got {str(x.dtype).removeprefix("torch.")}'
        if kernel_size not in KERNEL_SIZES:
            return f'the C++ kernels have kernel sizes {", ".join(map(str, KERNEL_SIZES))}, got {kernel_size}'
        # A subclass (a fake tensor, a distributed one) has no memory of its own, and torch may negate lazily.
        if wrapped(x) is not None or x.layout != torch.strided or x.is_neg() or x._is_zerotensor():
            return f'the C++ kernels take plain tensors, got {type(x).__name__} of layout {x.layout}'
        return library.problem()

    def prepare(self, device: torch.device) -> str | None:
        """Load the kernels, and compile them at the first use on a machine."""
        return library.prepare()

    # --- forward ------------------------------------------------------------------------------------------------------

    def instance_means(self, x: Tensor) -> Tensor:
        x = dense(x)
        a = x.new_empty(x.shape[:2], dtype=functional.statistics_dtype(x))
        _moments(x, a, None)
        return a

    def instance_moments(self, x: Tensor) -> Moments:
        x = dense(x)
        a, v = x.new_empty((2, *x.shape[:2]), dtype=functional.statistics_dtype(x)).unbind(0)
        _moments(x, a, v)
        return Moments(a, v)

    def similarity_sums(self, x: Tensor, moments: Moments, max_samples: int) -> Similarity:
        """Take the norms from the moments."""
        x = dense(x)
        n, c, h, w = x.shape
        samples = min(n, max_samples)
        total = moments.a.new_empty(())
        call(
            'similarity',
            x.dtype,
            x=x,
            a=moments.a,
            v=moments.v,
            total=total,
            n=n,
            c=c,
            pixels=h * w,
            samples=samples,
            threads=_threads(samples * c * h * w),
        )
        return Similarity(total, samples * (samples - 1))

    def decide(
        self,
        x: Tensor,
        moments: Moments,
        gate: Gate | Tensor,
        form: Form,
        parameters: Parameters,
        running: Running,
        processes: ProcessGroup | None = None,
    ) -> Decision:
        """Compute batch statistics, choose between them and the running ones, and move these, in one call."""
        dtype = moments.a.dtype
        is_plain = not isinstance(running.momentum, Tensor) and running.mean.dtype == running.var.dtype == dtype
        if processes is not None or not is_plain:
            return super().decide(x, moments, gate, form, parameters, running, processes)
        similarity = self.similarity_sums(x, moments, gate.max_samples) if isinstance(gate, Gate) else None
        running_similarity, condensed = self.condense(similarity, gate)
        n, c = moments.a.shape
        num_values = x.numel() // c
        mean, var, new_mean, new_var = moments.a.new_empty(4, c).unbind(0)
        call(
            'statistics',
            dtype,
            a=moments.a,
            v=moments.v,
            center_weight=_plain_or_none(parameters.center_weight, dtype),
            running_mean=_plain(running.mean, dtype),
            running_var=_plain(running.var, dtype),
            condensed=condensed,
            mean=mean,
            var=var,
            new_mean=new_mean,
            new_var=new_var,
            momentum=float(running.momentum),
            num_values=num_values,
            n=n,
            c=c,
        )
        return Decision(mean, var, condensed, num_values, new_mean, new_var, running_similarity)

    def coefficients(self, statistics: Statistics, form: Form, parameters: Parameters, pixels: int) -> Coefficients:
        if form.scaling not in KERNEL_SCALINGS or statistics.a is None:
            return super().coefficients(statistics, form, parameters, pixels)
        dtype = statistics.a.dtype
        a, mean = _plain(statistics.a, dtype), _plain(statistics.mean, dtype)
        n, c = a.shape
        center, inv_std = torch.empty_like(a), torch.empty_like(mean)
        logit = torch.empty_like(a) if form.scaling else None
        call(
            'coefficients',
            dtype,
            a=a,
            mean=mean,
            var=_plain(statistics.var, dtype),
            center_weight=_plain_or_none(parameters.center_weight, dtype),
            scale_weight=_plain_or_none(parameters.scale_weight, dtype),
            scale_bias=_plain_or_none(parameters.scale_bias, dtype),
            center=center,
            inv_std=inv_std,
            logit=logit,
            eps=form.eps,
            n=n,
            c=c,
            rectified=form.scaling == 'rectified',
        )
        if logit is None:
            return Coefficients(center, inv_std.unsqueeze(0), None)
        r = logit.sigmoid_()
        return Coefficients(center, r * inv_std, r)

    def apply(self, x: Tensor, coefficients: Coefficients, taps: Taps, bias: Tensor) -> Tensor:
        """Return y in the dtype of x."""
        return _convolve(dense(x), taps, coefficients.center, coefficients.scale, bias)

    def evaluate(self, x: Tensor, constants: Constants) -> Tensor:
        """In one call, which reads each plane of an NCHW input for its mean right before it is convolved."""
        x = dense(x)
        n, c, h, w = x.shape
        dtype = functional.statistics_dtype(x)
        output = torch.empty_like(x)
        call(
            'evaluate',
            x.dtype,
            x=x,
            output=output,
            kernel=_plain(constants.kernel, dtype),
            shift=_plain(constants.shift, dtype),
            center_weight=_plain_or_none(constants.center_weight, dtype),
            scale_weight=_plain_or_none(constants.scale_weight, dtype),
            scale_bias=_plain_or_none(constants.scale_bias, dtype),
            bias=_plain(constants.bias, dtype),
            n=n,
            c=c,
            h=h,
            w=w,
            kernel_size=constants.kernel.shape[-1],
            threads=_threads(x.numel()),
            calibrate_bias=constants.calibrate_bias,
            channels_last=_is_channels_last(x),
        )
        return output

    # --- backward -----------------------------------------------------------------------------------------------------

    def tap_sums(self, dy: Tensor, x: Tensor, center: Tensor, kernel_size: int) -> TapSums:
        x = dense(x)
        n, c, h, w = x.shape
        center = _plain(center, functional.statistics_dtype(x))
        products, sums = center.new_empty(2, n, kernel_size**2, c).unbind(0)
        call(
            'tap_sums',
            x.dtype,
            x=x,
            dy=_like(dy, x),
            center=center,
            products=products,
            sums=sums,
            n=n,
            c=c,
            h=h,
            w=w,
            kernel_size=kernel_size,
            threads=_threads(x.numel()),
            channels_last=_is_channels_last(x),
        )
        return TapSums(products.transpose(1, 2), sums.transpose(1, 2))

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
        if form.scaling not in KERNEL_SCALINGS or statistics.processes is not None:
            return super().coefficients_backward(tap_sums, statistics, form, parameters, taps, coefficients, pixels)
        assert taps.kernel is not None
        products, sums = (values.transpose(1, 2).contiguous() for values in (tap_sums.products, tap_sums.sums))
        n, number_of_taps, c = products.shape
        dtype = products.dtype

        def channels_for(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else products.new_empty(c)

        d_taps, d_bias = products.new_empty(number_of_taps, c), products.new_empty(c)
        d_center_weight = channels_for(parameters.center_weight)
        d_scale_weight = channels_for(parameters.scale_weight)
        d_scale_bias = channels_for(parameters.scale_bias)
        slope = channels_for(statistics.condensed)
        has_offset = slope is not None or parameters.center_weight is not None or coefficients.factor is not None
        offset = products.new_empty(n, c) if has_offset else None
        call(
            'coefficients_backward',
            dtype,
            products=products,
            sums=sums,
            a=_plain_or_none(statistics.a, dtype),
            mean=_plain(statistics.mean, dtype),
            var=_plain(statistics.var, dtype),
            condensed=statistics.condensed,
            kernel=_plain(taps.kernel, dtype),
            center=_plain(coefficients.center, dtype),
            scale=_plain(coefficients.scale, dtype),
            r=_plain_or_none(coefficients.factor, dtype),
            calibrated_bias=_plain(parameters.bias, dtype) if form.calibrate_bias else None,
            center_weight=_plain_or_none(parameters.center_weight, dtype),
            scale_weight=_plain_or_none(parameters.scale_weight, dtype),
            slope=slope,
            offset=offset,
            d_taps=d_taps,
            d_bias=d_bias,
            d_center_weight=d_center_weight,
            d_scale_weight=d_scale_weight,
            d_scale_bias=d_scale_bias,
            eps=form.eps,
            num_values=float(statistics.num_values),
            n=n,
            c=c,
            taps=number_of_taps,
            pixels=pixels,
            threads=_threads(products.numel()),
            rectified=form.scaling == 'rectified',
        )
        gradients = self._gradients(parameters, d_taps.T, d_bias, d_center_weight, d_scale_weight, d_scale_bias)
        return InputCoefficients(slope, offset), gradients

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
        """Return the gradient in the dtype of x."""
        x = dense(x)
        slope, offset = of_input
        return _convolve(
            _like(dy, x),
            taps,
            None,
            coefficients.scale,
            offset,
            other=None if slope is None else x,
            other_center=a,
            slope=slope,
            turned=True,
        )


def _moments(x: Tensor, a: Tensor, v: Tensor | None) -> None:
    """Write the moments of a dense x."""
    n, c, h, w = x.shape
    call(
        'moments',
        x.dtype,
        x=x,
        a=a,
        v=v,
        n=n,
        c=c,
        pixels=h * w,
        threads=_threads(x.numel()),
        channels_last=_is_channels_last(x),
    )


def _convolve(
    values: Tensor,
    taps: Taps,
    center: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    other: Tensor | None = None,
    other_center: Tensor | None = None,
    slope: Tensor | None = None,
    turned: bool = False,
) -> Tensor:
    """Compute ``scale depthwise_conv(values - center; taps) + bias + slope (other - other_center)``; None stands for 0.

    Args:
        values, other: (N, C, H, W), of one dtype and memory format.
        taps: Of the layer.
        center, scale, bias, slope: (C,) or (N or 1, C).
        other_center: (N, C).
        turned: Whether the kernel is turned by half a turn.
    """
    assert taps.kernel is not None
    n, c, h, w = values.shape
    dtype = functional.statistics_dtype(values)
    output = torch.empty_like(values)
    call(
        'convolve',
        values.dtype,
        input=values,
        other=other,
        output=output,
        kernel=_plain(taps.kernel, dtype),
        center=_plain_or_none(center, dtype),
        scale=_plain(scale, dtype),
        bias=_plain_or_none(bias, dtype),
        other_center=_plain_or_none(other_center, dtype),
        slope=_plain_or_none(slope, dtype),
        n=n,
        c=c,
        h=h,
        w=w,
        kernel_size=taps.kernel.shape[-1],
        threads=_threads(values.numel()),
        turned=turned,
        channels_last=_is_channels_last(values),
    )
    return output


def _threads(values: int) -> int:
    """Return how many threads so many values are worth."""
    return 1 if values <= SERIAL else torch.get_num_threads()


def _is_channels_last(x: Tensor) -> bool:
    return memory_format(x) == torch.channels_last


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy in dtype and memory format of x. torch may negate lazily; the kernels read memory."""
    return dy.to(x.dtype).resolve_neg().contiguous(memory_format=memory_format(x))


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor, or a contiguous copy of it in this dtype, as the kernels read it."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def _plain_or_none(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _plain(tensor, dtype)
