"""The contract of a backend: one class with a method for each step, and the (N, C) algebra of all steps.

A backend is a subclass. It must define the five steps that pass over data of the size of x: ``instance_moments``,
``similarity_sums``, ``apply``, ``tap_sums`` and ``input_gradient``. What lies between them works on (N, C) and
(N, C, T) tensors, is written here in torch, and is overridden only where docs/performance.md has a measurement that
pays for it.

x is (N, C, H, W) in any floating dtype, a leaf of no graph: methods are called without autograd. Everything that is not
of the size of x is in the statistics dtype (:mod:`mmubn.ops.types`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmubn import functional
from mmubn.ops.processes import AllReduce, all_gather, merge, own_part, part_length
from mmubn.ops.types import (
    BatchStatistics,
    Buffers,
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

__all__ = ['Backend', 'center_has_gradient']


class Backend:
    """One way to compute a norm layer; all ways give the same numbers to rounding.

    Forward, in order: :meth:`instance_moments` -> :meth:`decide` (similarity -> gate -> statistics) ->
    :meth:`coefficients` -> :meth:`apply`. Backward: :meth:`tap_sums` -> :meth:`coefficients_backward` ->
    :meth:`input_gradient`. :func:`mmubn.ops.autograd.rectified_norm` calls those from the coefficients on.
    """

    name: str
    replays = False  # whether its steps do nothing but launch kernels, see mmubn.ops.replayed

    # --- may it be used -----------------------------------------------------------------------------------------------

    def problem(self, x: Tensor, kernel_size: int) -> str | None:
        """Why this backend cannot compute a layer with such an input and kernel; None where it can.

        Looks at the traits of x only, never at its values, and has no side effects.
        """
        return None

    def prepare(self, device: torch.device) -> str | None:
        """Do what a first use on a device needs, such as compiling, once. Return why that failed, or None.

        After a failure :meth:`problem` says the same of every input on the device.
        """
        return None

    # --- forward ------------------------------------------------------------------------------------------------------

    def dense(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        """x, or its gradient ``like`` it, in memory that the passes can read: one copy for all of them."""
        return x

    def instance_means(self, x: Tensor) -> Tensor:
        """:func:`mmubn.functional.instance_means`: (N, C)."""
        return self.instance_moments(x).a

    def instance_moments(self, x: Tensor) -> Moments:
        """:func:`mmubn.functional.instance_moments`."""
        raise NotImplementedError

    def similarity_sums(self, x: Tensor, moments: Moments, max_samples: int) -> Similarity:
        """:func:`mmubn.functional.similarity_sums` of the first ``max_samples`` samples.

        A backend may take the norms from the moments: ``||f_n||^2 = HW sum_c (v + a^2)``.
        """
        raise NotImplementedError

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
        """Similarity, gate and statistics of a training batch.

        Args:
            x: Input, (N, C, H, W), with elements; with ``processes`` it may have none.
            moments: Those of x.
            gate: The gate that decides by the similarity of x, or the decision itself, a 0-d bool.
            form: Of the layer.
            parameters: Of the layer.
            running: Of the layer; not written to.
            processes: Whose inputs are the batch, by one collective. None: x is.
        """
        if processes is not None and x.numel() == 0:
            part = moments.a.new_zeros(part_length(x.shape[1]))
            return self.decide_by(*merge(all_gather(part, processes)), gate, running)
        similarity = self.similarity_sums(x, moments, gate.max_samples) if isinstance(gate, Gate) else None
        mean, var = functional.batch_statistics(moments.a, moments.v, parameters.center_weight)
        batch = BatchStatistics(mean, var, x.numel() // x.shape[1])
        if processes is not None:
            similarity, batch = merge(all_gather(own_part(similarity, batch), processes))
        return self.decide_by(similarity, batch, gate, running)

    def decide_by(
        self, similarity: Similarity | None, batch: BatchStatistics, gate: Gate | Tensor, running: Running
    ) -> Decision:
        """The same from sums, which may be those of all processes: :meth:`condense`, then the statistics.

        Args:
            similarity: Needed where ``gate`` decides by it.
            batch: Statistics of the batch.
            gate, running: As for :meth:`decide`.
        """
        running_similarity, condensed = self.condense(similarity, gate)
        (mean, var), (running_mean, running_var) = functional.select_statistics(
            (batch.mean, batch.var), (running.mean, running.var), condensed, running.momentum, batch.num_values
        )
        return Decision(mean, var, condensed, batch.num_values, running_mean, running_var, running_similarity)

    def condense(self, similarity: Similarity | None, gate: Gate | Tensor) -> tuple[Tensor | None, Tensor]:
        """The gate: the new running similarity, None where no similarity decides, and ``condensed``, a 0-d bool."""
        if not isinstance(gate, Gate) or similarity is None:
            assert isinstance(gate, Tensor), 'a gate needs a similarity to decide by'
            return None, gate
        mean_similarity = similarity.total / similarity.pairs
        tau = functional.update_running_similarity(gate.running_similarity, mean_similarity, gate.momentum)
        return tau, functional.is_condensed(tau, gate.threshold)

    def running_statistics(
        self, x: Tensor, form: Form, parameters: Parameters, running: Running, with_copies: bool
    ) -> Statistics:
        """The running statistics, and the moments of x that the coefficients depend on.

        Args:
            x: Input, (N, C, H, W), with elements.
            form, parameters, running: Of the layer.
            with_copies: Whether they are to stay when the buffers move: a later call must not change what the backward
                of this one reads.
        """
        a = v = None
        if form.scaling == 'unitized':
            a, v = self.instance_moments(x)
        elif parameters.center_weight is not None or form.scaling is not None:
            a = self.instance_means(x)
        dtype = functional.statistics_dtype(x)
        mean, var = self.copies(running, dtype) if with_copies else (running.mean.to(dtype), running.var.to(dtype))
        return Statistics(a, v, mean, var)

    def copies(self, running: Running, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The running mean and variance in other memory."""
        return running.mean.to(dtype, copy=True), running.var.to(dtype, copy=True)

    def move(self, decision: Decision, buffers: Buffers) -> None:
        """Write what becomes of the buffers, in place: DDP, EMA and CUDA graphs hold references to them."""
        moved, values = [buffers.mean, buffers.var], [decision.running_mean, decision.running_var]
        if decision.running_similarity is not None and buffers.similarity is not None:
            # By a view of shape (1,): torch.compile (2.12) loses an in-place update of a 0-d float64 buffer.
            moved.append(buffers.similarity.view(1))
            values.append(decision.running_similarity.view(1))
        torch._foreach_copy_(moved, values)
        if buffers.num_batches is not None:
            buffers.num_batches.add_(decision.condensed)

    def coefficients(self, statistics: Statistics, form: Form, parameters: Parameters, pixels: int) -> Coefficients:
        """:func:`mmubn.functional.coefficients`; ``pixels`` is H * W."""
        center, scale, factor = functional.coefficients(
            statistics.a,
            statistics.v,
            (statistics.mean, statistics.var),
            form.eps,
            pixels,
            form.scaling,
            parameters.center_weight,
            parameters.scale_weight,
            parameters.scale_bias,
        )
        return Coefficients(center, scale, factor)

    def taps(self, parameters: Parameters, dtype: torch.dtype) -> Taps:
        """The depthwise kernel as :meth:`apply` and :meth:`input_gradient` read it, in the statistics dtype."""
        kernel = functional.depthwise_kernel(parameters.weight, parameters.neighbor_weight).to(dtype)
        return Taps(parameters.weight, parameters.neighbor_weight, kernel)

    def apply(self, x: Tensor, coefficients: Coefficients, taps: Taps, bias: Tensor) -> Tensor:
        """``y = depthwise_conv((x - center) * scale; taps) + bias`` with zero padding.

        Args:
            x: Input, (N, C, H, W), with elements.
            coefficients: center and scale.
            taps: What :meth:`taps` returned.
            bias: (C,), or (N, C) where it differs between samples.

        Returns:
            y, (N, C, H, W), in the dtype of x or in the statistics dtype.
        """
        raise NotImplementedError

    def evaluate(self, x: Tensor, constants: Constants) -> Tensor:
        """The output of a layer of which evaluation holds all but the means of x constant, in the dtype of x.

        Args:
            x: Input, (N, C, H, W), with elements.
            constants: Of the layer.
        """
        dtype, x = functional.statistics_dtype(x), self.dense(x)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in constants[:-1]]
        shift, center_weight, scale_weight, scale_bias, kernel, bias = tensors
        assert shift is not None
        assert kernel is not None
        assert bias is not None
        scale = torch.ones_like(shift).unsqueeze(0)
        if center_weight is not None or scale_weight is not None:
            a = self.instance_means(x)
            shift = shift.unsqueeze(0) if center_weight is None else torch.addcmul(shift, center_weight, a)
            if scale_weight is not None:
                assert scale_bias is not None
                scale = torch.sigmoid(torch.addcmul(scale_bias, scale_weight, a + shift))
        else:
            shift = shift.unsqueeze(0)
        if constants.calibrate_bias:
            bias = scale * bias
        flat = kernel.flatten(1)
        centre = flat.shape[1] // 2
        neighbors = torch.cat([flat[:, :centre], flat[:, centre + 1 :]], dim=1) if centre else None
        taps = Taps(flat[:, centre].contiguous(), neighbors, kernel)
        return self.apply(x, Coefficients(-shift, scale, None), taps, bias).to(x.dtype)

    # --- backward -----------------------------------------------------------------------------------------------------

    def tap_sums(self, dy: Tensor, x: Tensor, center: Tensor, kernel_size: int) -> TapSums:
        """The sums over the map that :class:`~mmubn.ops.types.TapSums` defines.

        Args:
            dy: Gradient of y, (N, C, H, W), in any floating dtype and of any strides.
            x: Input, (N, C, H, W).
            center: (N or 1, C).
            kernel_size: k.
        """
        raise NotImplementedError

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
        """From the sums over the map to the gradients of the parameters, and to what each value of x still needs.

        Args:
            tap_sums: What :meth:`tap_sums` returned.
            statistics, form, parameters, taps, coefficients: Of the forward.
            pixels: H * W.

        Returns:
            The coefficients of :meth:`input_gradient`, and the gradients of the parameters that the layer has.
        """
        a, v, mean, var = statistics.a, statistics.v, statistics.mean, statistics.var
        center, scale, r = coefficients
        kernel = taps.kernel if taps.kernel is not None else Backend.taps(self, parameters, scale.dtype).kernel
        assert kernel is not None
        tap_values = kernel.flatten(1)
        d_bias = tap_sums.sums[..., tap_values.shape[1] // 2]
        is_batch = statistics.condensed is not None
        d_scale = inv_std = None
        if is_batch or r is not None:
            d_scale, inv_std = _over_taps(tap_sums.products, tap_values), torch.rsqrt(var + form.eps)

        # scale = r inv_std, and r as form.scaling says.
        d_a: Tensor | None = None
        d_v: Tensor | None = None
        d_scale_weight = d_scale_bias = None  # as d_bias, of each sample: summed at the end
        by_sample = d_scale  # the gradient of inv_std
        if r is not None:
            assert a is not None
            assert d_scale is not None
            assert inv_std is not None
            assert parameters.scale_weight is not None
            by_sample = d_scale * r if is_batch else None
            d_r = d_scale * inv_std
            if form.calibrate_bias:
                d_r, d_bias = torch.addcmul(d_r, d_bias, parameters.bias), d_bias * r
            if form.scaling == 'unitized':
                assert v is not None
                deviation = a - center
                squares = torch.addcmul(v, deviation, deviation)
                inv_var = inv_std.square()
                root = torch.rsqrt((squares * inv_var).sum(1, keepdim=True) / pixels + form.eps)
                d_scale_weight = d_r * (root - 1)
                d_root = (d_r * parameters.scale_weight).sum(1, keepdim=True)
                d_v = -0.5 / pixels * root**3 * d_root * inv_var
                if by_sample is not None:
                    by_sample = torch.addcdiv(by_sample, d_v * squares, inv_std, value=2)
                d_a = 2 * d_v * deviation
            else:
                d_logit = torch.ops.aten.sigmoid_backward(d_r, r)
                d_pooled = d_logit * parameters.scale_weight
                if form.scaling == 'rectified':
                    deviation = a - center
                    pooled, d_a = deviation * inv_std, d_pooled * inv_std
                    if by_sample is not None:
                        by_sample = torch.addcmul(by_sample, d_pooled, deviation)
                else:
                    pooled, d_a = a, d_pooled
                d_scale_weight, d_scale_bias = d_logit * pooled, d_logit

        # x - center is what the convolution takes, and a - center what r depends on.
        minus_d_center = None
        if center_has_gradient(statistics, form, parameters):
            by_taps = _over_taps(tap_sums.sums, tap_values)
            if d_a is None or form.scaling == 'instance':
                minus_d_center = scale * by_taps
            else:
                minus_d_center = torch.addcmul(d_a, scale, by_taps)

        # center = mean - w_m a
        of_all = None
        if is_batch:
            assert by_sample is not None
            assert inv_std is not None
            assert minus_d_center is not None
            d_mean, d_var = -minus_d_center.sum(0), -0.5 * by_sample.sum(0) * inv_std**3
            if statistics.processes is not None:
                of_all = AllReduce(torch.stack([d_mean, d_var]), statistics.processes)
        # What needs no other process runs beside the collective. (T, C): the centre tap's lie side by side.
        d_taps = (scale[..., None] * tap_sums.products).transpose(1, 2).sum(0)

        # mean = sum_n share m and var = sum_n share (v + (m - mean)^2), with m = (1 + w_m) a
        w_m = parameters.center_weight
        d_w_m_a = minus_d_center  # of the product w_m a, in the center and in m
        if statistics.condensed is not None:
            assert a is not None
            if of_all is not None:
                d_mean, d_var = of_all.wait()
            share = statistics.condensed.to(a.dtype) * (pixels / statistics.num_values)
            m = a if w_m is None else torch.addcmul(a, w_m, a)
            d_m = share * torch.addcmul(d_mean, d_var, m - mean, value=2)
            d_a = d_m if d_a is None else d_a + d_m
            d_v = (share * d_var).expand_as(a) if d_v is None else d_v + share * d_var
            if w_m is not None:
                assert minus_d_center is not None
                d_w_m_a = minus_d_center + d_m
        d_center_weight = None
        if w_m is not None:
            assert a is not None
            assert d_w_m_a is not None
            d_center_weight = d_w_m_a * a
            d_a = w_m * d_w_m_a if d_a is None else torch.addcmul(d_a, w_m, d_w_m_a)

        # a and v are means over H and W: the gradient of x gets d_a / HW + 2 d_v (x - a) / HW.
        of_input = InputCoefficients(
            slope=None if d_v is None else 2 / pixels * d_v, offset=None if d_a is None else d_a / pixels
        )
        vectors = _sums_over_samples(d_bias, d_center_weight, d_scale_weight, d_scale_bias)
        return of_input, self._gradients(parameters, d_taps.T, *vectors)

    @staticmethod
    def _gradients(
        parameters: Parameters,
        d_taps: Tensor,
        d_bias: Tensor | None,
        d_center_weight: Tensor | None,
        d_scale_weight: Tensor | None,
        d_scale_bias: Tensor | None,
    ) -> Gradients:
        """Gradients in the layout of the parameters, from those of all taps, (C, T), and of the others, (C,)."""
        centre = d_taps.shape[1] // 2
        d_neighbors = None
        if parameters.neighbor_weight is not None:
            d_neighbors = torch.cat([d_taps[:, :centre], d_taps[:, centre + 1 :]], dim=1)
        return Gradients(d_taps[:, centre], d_bias, d_neighbors, d_center_weight, d_scale_weight, d_scale_bias)

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
        """The gradient of x, by the formula of :class:`~mmubn.ops.types.InputCoefficients`.

        Args:
            dy, x: As for :meth:`tap_sums`.
            tap_sums: What :meth:`tap_sums` returned for them.
            a: Instance means, (N, C). May be None where ``of_input.slope`` is.
            coefficients, taps: Of the forward.
            of_input: slope and offset.

        Returns:
            (N, C, H, W), in the dtype of x or in the statistics dtype.
        """
        raise NotImplementedError


def center_has_gradient(statistics: Statistics, form: Form, parameters: Parameters) -> bool:
    """Whether anything with a gradient depends on the center, so that ``sums`` of TapSums count for every tap."""
    depends_on_x = statistics.condensed is not None or parameters.center_weight is not None
    return depends_on_x or form.scaling in ('rectified', 'unitized')


def _over_taps(values: Tensor, taps: Tensor) -> Tensor:
    """Sum over the taps: (N, C) from (N, C, T) and (C, T)."""
    return values[..., 0] * taps[:, 0] if taps.shape[1] == 1 else (values * taps).sum(2)


def _sums_over_samples(*values: Tensor | None) -> list[Tensor | None]:
    """(C,) for each (N, C) and None for None, all in one go."""
    present = [value for value in values if value is not None]
    sums = iter(torch.stack(present).sum(1) if len(present) > 1 else [value.sum(0) for value in present])
    return [None if value is None else next(sums) for value in values]
