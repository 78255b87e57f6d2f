"""The backend ``triton``.

What the kernels do not cover (UnitizedBN's factor, a momentum that is a tensor, running statistics that are not
float32) takes the small (N, C) functions of
:class:`mmubn.ops.backend.Backend`; the passes over x are Triton's all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmubn.ops.backend import Backend
from mmubn.ops.first_use import FirstUse
from mmubn.ops.processes import all_gather, all_reduce, part_length
from mmubn.ops.triton import inputs, operators, probe
from mmubn.ops.triton.running import copy_statistics
from mmubn.ops.types import (
    KERNEL_SCALINGS,
    Buffers,
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

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ['TritonBackend']


def _prepare(device: torch.device) -> str | None:
    return _first_use(device)


def _trouble(device: torch.device) -> str | None:
    return _first_use.outcomes.get(device)


# torch.compile takes what they return for a constant, see runtime.lacking.
_prepare._dynamo_marked_constant = _trouble._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _kernels() -> Any:
    """The functions that launch, or, for a compiler, the same as operators that it need not look into."""
    return torch.ops.mmubn if torch.compiler.is_compiling() else operators


class TritonBackend(Backend):
    """Kernels for NVIDIA GPUs. In Triton's interpreter they take CPU tensors, but only :func:`mmubn.ops.use_backend`
    chooses them for those."""

    name = 'triton'
    replays = True

    def problem(self, x: Tensor, kernel_size: int) -> str | None:
        reason = inputs.problem(x, kernel_size)
        return _trouble(x.device) if reason is None else reason

    def prepare(self, device: torch.device) -> str | None:
        """Try the kernels on the device, see :mod:`~mmubn.ops.triton.probe`."""
        return _prepare(device)

    def dense(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        # A compiler knows the strides of its own tensors, and the operators copy what has others.
        if torch.compiler.is_compiling():
            return x
        return inputs.dense(x) if like is None else inputs.dense_gradient(x, like)

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
        processes: ProcessGroup | None = None,
    ) -> Decision:
        """With the coefficients: in one launch where the decision is given, in two where the similarity decides, and in
        one more where the batch is that of several processes: one before the collective that gathers it, one after it.
        """
        # The kernels move float32: of another dtype, a layer must see whether its own still holds the variance.
        if isinstance(running.momentum, Tensor) or running.mean.dtype != torch.float32:
            return super().decide(x, moments, gate, form, parameters, running, processes)
        scaling = form.scaling
        if scaling not in KERNEL_SCALINGS:
            # The coefficients are computed by themselves then.
            scaling, parameters = None, parameters._replace(scale_weight=None, scale_bias=None)
        num_values: int | Tensor = x.numel() // x.shape[1]
        if processes is not None:
            part = self._own_part(x, moments, gate, parameters)
            center, scale, mean, var, running_mean, running_var, num_values, tau, decision = (
                _kernels().gathered_coefficients(
                    all_gather(part, processes),
                    moments.a,
                    *(
                        (gate.running_similarity, gate.momentum, gate.threshold, None)
                        if isinstance(gate, Gate)
                        else (None, 0.0, 0.0, gate)
                    ),
                    running.mean,
                    running.var,
                    form.eps,
                    running.momentum,
                    parameters.center_weight,
                    parameters.scale_weight,
                    parameters.scale_bias,
                    scaling,
                )
            )
            running_similarity, condensed = (tau, decision) if isinstance(gate, Gate) else (None, gate)
        elif isinstance(gate, Gate):
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

    def _own_part(self, x: Tensor, moments: Moments, gate: Gate | Tensor, parameters: Parameters) -> Tensor:
        """What this process sends; of no samples, zeros."""
        channels = x.shape[1]
        if x.numel() == 0:
            return moments.a.new_zeros(part_length(channels))
        max_samples = gate.max_samples if isinstance(gate, Gate) else None
        return _kernels().own_part(x, *moments, max_samples, x.numel() // channels, parameters.center_weight)

    def copies(self, running: Running, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """In one launch."""
        if not _is_float32(running.mean, running.var):
            return super().copies(running, dtype)
        mean, var = torch.empty_like(running.mean), torch.empty_like(running.var)
        copy_statistics(running.mean, running.var, mean, var)
        return mean, var

    def move(self, decision: Decision, buffers: Buffers) -> None:
        """In one launch."""
        tau = None if buffers.similarity is None else decision.running_similarity
        new = decision.running_mean, decision.running_var, tau
        to = buffers.mean, buffers.var, None if tau is None else buffers.similarity
        if not _is_float32(*new, *to) or (buffers.num_batches is not None and buffers.num_batches.dtype != torch.int64):
            super().move(decision, buffers)
            return
        condensed = None if buffers.num_batches is None else decision.condensed
        copy_statistics(*new[:2], *to[:2], tau, to[2], condensed, buffers.num_batches)
        torch._C._increment_version([each for each in (*to, buffers.num_batches) if each is not None])

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
        if form.scaling is None or not form.calibrate_bias:
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
        """In one launch; where the batch is that of several processes, in one before the collective and one after it.

        The first does all that needs no other process, the gradients of the parameters included, since it reads what
        they are made of anyway. So nothing runs beside the collective, and the device waits for it.
        """
        if form.scaling not in KERNEL_SCALINGS or statistics.a is None:
            return super().coefficients_backward(tap_sums, statistics, form, parameters, taps, coefficients, pixels)
        sums = tap_sums.products, tap_sums.sums
        of_forward = statistics.a, statistics.mean, statistics.var, form.eps
        weights = (
            coefficients.scale,
            taps.weight,
            taps.neighbor_weight,
            parameters.center_weight,
            parameters.scale_weight,
            parameters.bias if form.calibrate_bias else None,
            form.scaling,
            pixels,
        )
        if statistics.condensed is None or statistics.processes is None:
            slope, offset, d_weight, d_bias, d_neighbor_weight, d_center_weight, d_scale_weight, d_scale_bias = (
                _kernels().coefficients_backward(*sums, *of_forward, statistics.condensed, *weights)
            )
        else:
            (
                statistic_sums,
                offset,
                d_weight,
                d_bias,
                d_neighbor_weight,
                d_center_weight,
                d_scale_weight,
                d_scale_bias,
            ) = _kernels().own_coefficients_backward(*sums, *of_forward, *weights)
            slope, offset, d_center_weight = _kernels().statistics_backward(
                all_reduce(statistic_sums, statistics.processes),
                statistics.a,
                statistics.mean,
                statistics.condensed,
                statistics.num_values,
                parameters.center_weight,
                offset,
                d_center_weight,
                pixels,
            )
        # Of statistics that do not depend on x the slope is 0.
        return InputCoefficients(None if statistics.condensed is None else slope, offset), Gradients(
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
        slope, offset = of_input
        return _kernels().input_gradient(
            dy,
            x,
            a,
            _for_each_sample(coefficients.scale, x),
            taps.weight,
            taps.neighbor_weight,
            None if slope is None else _for_each_sample(slope, x),
            offset,
        )


def _is_float32(*tensors: Tensor | None) -> bool:
    """Whether a kernel can read and write them as they are; not while a compiler traces."""
    if torch.compiler.is_compiling():
        return False
    return all(each is None or (each.dtype == torch.float32 and each.is_contiguous()) for each in tensors)


def _for_each_sample(value: Tensor, x: Tensor) -> Tensor:
    """(1, C) as (N, C)."""
    shape = x.shape[:2]
    return value if value.shape == shape else value.expand(shape)


_first_use = FirstUse(lambda device: probe.trouble(TritonBackend(), device), probe.report)
