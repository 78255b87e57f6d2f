"""The backend ``triton``.

What the kernels do not cover (UnitizedBN's factor, the backward of statistics of several processes, a momentum that is
a tensor, running statistics that are not float32) takes the small (N, C) functions of
:class:`mmubn.ops.backend.Backend`; the passes over x are Triton's all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmubn.ops.backend import Backend
from mmubn.ops.triton import inputs, operators
from mmubn.ops.types import (
    KERNEL_SCALINGS,
    Coefficients,
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

__all__ = ['TritonBackend']


def _kernels() -> Any:
    """The functions that launch, or, for a compiler, the same as operators that it need not look into."""
    return torch.ops.mmubn if torch.compiler.is_compiling() else operators


class TritonBackend(Backend):
    """Kernels for NVIDIA GPUs. In Triton's interpreter they take CPU tensors, but only :func:`mmubn.ops.use_backend`
    chooses them for those."""

    name = 'triton'

    def problem(self, x: Tensor, kernel_size: int) -> str | None:
        if not x.is_cuda:
            return f'the Triton kernels take tensors on an NVIDIA GPU, got one on {x.device}'
        return inputs.problem(x, kernel_size)

    def instance_moments(self, x: Tensor) -> Moments:
        a, v = _kernels().instance_moments(x)
        return Moments(a, v)

    def similarity_sums(self, x: Tensor, moments: Moments, max_samples: int) -> Similarity:
        samples = min(x.shape[0], max_samples)
        sums = _kernels().similarity_sums(x, moments.a, moments.v, max_samples)
        return Similarity(sums[0], samples * (samples - 1))

    def decide(
        self,
        x: Tensor,
        moments: Moments,
        gate: Gate | Tensor,
        form: Form,
        parameters: Parameters,
        running: Running,
    ) -> Decision:
        """With the coefficients: in one launch where the decision is given, in two where the similarity decides."""
        # The kernels move float32: of another dtype, a layer must see whether its own still holds the variance.
        if isinstance(running.momentum, Tensor) or running.mean.dtype != torch.float32:
            return super().decide(x, moments, gate, form, parameters, running)
        scaling = form.scaling
        if scaling not in KERNEL_SCALINGS:
            # The coefficients are computed by themselves then.
            scaling, parameters = None, parameters._replace(scale_weight=None, scale_bias=None)
        num_values = x.numel() // x.shape[1]
        if isinstance(gate, Gate):
            center, scale, mean, var, running_mean, running_var, running_similarity, condensed = (
                _kernels().gated_coefficients(
                    x,
                    moments.a,
                    moments.v,
                    gate.max_samples,
                    gate.running_similarity,
                    gate.momentum,
                    gate.threshold,
                    running.mean,
                    running.var,
                    num_values,
                    form.eps,
                    running.momentum,
                    parameters.center_weight,
                    parameters.scale_weight,
                    parameters.scale_bias,
                    scaling,
                )
            )
        else:
            running_similarity, condensed = None, gate
            center, scale, mean, var, running_mean, running_var = _kernels().statistics_coefficients(
                moments.a,
                moments.v,
                running.mean,
                running.var,
                condensed,
                num_values,
                form.eps,
                running.momentum,
                parameters.center_weight,
                parameters.scale_weight,
                parameters.scale_bias,
                scaling,
            )
        coefficients = Coefficients(center, scale, None) if form.scaling in KERNEL_SCALINGS else None
        return Decision(mean, var, condensed, num_values, running_mean, running_var, running_similarity, coefficients)

    def coefficients(self, statistics: Statistics, form: Form, parameters: Parameters, pixels: int) -> Coefficients:
        """Those that came with the statistics, or in one launch."""
        if form.scaling not in KERNEL_SCALINGS or statistics.a is None:
            return super().coefficients(statistics, form, parameters, pixels)
        found = statistics.coefficients
        if found is None:
            center, scale = _kernels().coefficients(
                statistics.a,
                statistics.mean,
                statistics.var,
                form.eps,
                parameters.center_weight,
                parameters.scale_weight,
                parameters.scale_bias,
                form.scaling,
            )
            found = Coefficients(center, scale, None)
        if form.scaling is None or not (form.calibrate_bias or statistics.synchronized):
            # The kernel of the backward finds r in scale.
            return found
        return found._replace(factor=found.scale * (statistics.var + form.eps).sqrt())

    def taps(self, parameters: Parameters, dtype: torch.dtype) -> Taps:
        """As the parameters have them."""
        return Taps(parameters.weight, parameters.neighbor_weight, None)

    def apply(self, x: Tensor, coefficients: Coefficients, taps: Taps, bias: Tensor) -> Tensor:
        return _kernels().apply(
            x,
            _for_each_sample(coefficients.center, x),
            _for_each_sample(coefficients.scale, x),
            taps.weight,
            taps.neighbor_weight,
            bias,
        )

    def tap_sums(self, dy: Tensor, x: Tensor, center: Tensor, kernel_size: int) -> TapSums:
        products, sums = _kernels().tap_sums(x, dy, _for_each_sample(center, x), kernel_size)
        return TapSums(products, sums)

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
        """In one launch."""
        if form.scaling not in KERNEL_SCALINGS or statistics.a is None or statistics.synchronized:
            return super().coefficients_backward(tap_sums, statistics, form, parameters, taps, coefficients, pixels)
        slope, offset, d_weight, d_bias, d_neighbor_weight, d_center_weight, d_scale_weight, d_scale_bias = (
            _kernels().coefficients_backward(
                tap_sums.products,
                tap_sums.sums,
                statistics.a,
                statistics.mean,
                statistics.var,
                form.eps,
                statistics.condensed,
                coefficients.scale,
                taps.weight,
                taps.neighbor_weight,
                parameters.center_weight,
                parameters.scale_weight,
                parameters.bias if form.calibrate_bias else None,
                form.scaling,
                pixels,
            )
        )
        return InputCoefficients(slope, offset), Gradients(
            d_weight,
            d_bias,
            None if parameters.neighbor_weight is None else d_neighbor_weight,
            None if parameters.center_weight is None else d_center_weight,
            None if parameters.scale_weight is None else d_scale_weight,
            None if parameters.scale_bias is None else d_scale_bias,
        )

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
        scale = coefficients.scale
        a, slope, offset = (
            scale.new_zeros(x.shape[:2]) if value is None else value for value in (a, of_input.slope, of_input.offset)
        )
        return _kernels().input_gradient(
            dy, x, a, _for_each_sample(scale, x), taps.weight, taps.neighbor_weight, slope, offset
        )


def _for_each_sample(value: Tensor, x: Tensor) -> Tensor:
    """(1, C) as (N, C)."""
    shape = x.shape[:2]
    return value if value.shape == shape else value.expand(shape)
