"""The contract of a backend: one class with a method for each step, and the (N, C) algebra of all steps.

A backend is a subclass. It must define the five steps that pass over data of the size of x: ``instance_moments``,
``similarity_sums``, ``apply``, ``tap_sums`` and ``input_gradient``. What lies between them works on (N, C) and
(N, C, T) tensors, is written here in torch, and is overridden only where docs/performance.md has a measurement that
pays for it.

x is (N, C, H, W) in any floating dtype, a leaf of no graph: methods are called without autograd. Everything that is not
of the size of x is in the statistics dtype (:mod:`mmubn.ops.types`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from mmubn import functional
from mmubn.ops.types import (
    BatchStatistics,
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

__all__ = ['Backend']


class Backend:
    """One way to compute a norm layer; all ways give the same numbers to rounding.

    Forward, in order: :meth:`instance_moments` -> :meth:`decide` (similarity -> gate -> statistics) ->
    :meth:`coefficients` -> :meth:`apply`. Backward: :meth:`tap_sums` -> :meth:`coefficients_backward` ->
    :meth:`input_gradient`. :func:`mmubn.ops.autograd.rectified_norm` calls those from the coefficients on.
    """

    name: str

    # --- may it be used -----------------------------------------------------------------------------------------------

    def problem(self, x: Tensor, kernel_size: int) -> str | None:
        """Why this backend cannot compute a layer with such an input and kernel; None where it can.

        Looks at the traits of x only, never at its values, and has no side effects.
        """
        return None

    def prepare(self) -> str | None:
        """Do once what a first use needs, such as compiling. Return why that failed, or None."""
        return None

    # --- forward ------------------------------------------------------------------------------------------------------

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
    ) -> Decision:
        """Similarity, gate and statistics of a training batch of this process.

        Args:
            x: Input, (N, C, H, W), with elements.
            moments: Those of x.
            gate: The gate that decides by the similarity of x, or the decision itself, a 0-d bool.
            form: Of the layer.
            parameters: Of the layer.
            running: Of the layer; not written to.
        """
        similarity = self.similarity_sums(x, moments, gate.max_samples) if isinstance(gate, Gate) else None
        mean, var = functional.batch_statistics(moments.a, moments.v, parameters.center_weight)
        batch = BatchStatistics(mean, var, x.numel() // x.shape[1])
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
        inv_std = torch.rsqrt(var + form.eps)
        tap_values = kernel.flatten(1)
        d_taps = (scale[..., None] * tap_sums.products).sum(0)
        d_scale = (tap_sums.products * tap_values).sum(2)
        d_center = -scale * (tap_sums.sums * tap_values).sum(2)
        d_bias = tap_sums.sums[..., tap_values.shape[1] // 2]

        # scale = r inv_std, and r as form.scaling says.
        d_inv_std = (d_scale if r is None else d_scale * r).sum(0)
        d_a: Tensor | None = None
        d_v: Tensor | None = None
        d_scale_weight = d_scale_bias = None
        if r is not None:
            assert a is not None
            assert parameters.scale_weight is not None
            d_r = d_scale * inv_std
            if form.calibrate_bias:
                d_r, d_bias = d_r + d_bias * parameters.bias, d_bias * r
            if form.scaling == 'unitized':
                assert v is not None
                deviation = a - center
                squares = v + deviation.square()
                root = torch.rsqrt((squares * inv_std.square()).sum(1, keepdim=True) / pixels + form.eps)
                d_scale_weight = (d_r * (root - 1)).sum(0)
                d_root = (d_r * parameters.scale_weight).sum(1, keepdim=True)
                d_v = -0.5 / pixels * root**3 * d_root * inv_std.square()
                d_inv_std = d_inv_std + 2 * (d_v * squares).sum(0) / inv_std
                d_a = 2 * d_v * deviation
                d_center = d_center - d_a
            else:
                d_logit = d_r * r * (1 - r)
                pooled = (a - center) * inv_std if form.scaling == 'rectified' else a
                d_scale_weight, d_scale_bias = (d_logit * pooled).sum(0), d_logit.sum(0)
                d_a = d_logit * parameters.scale_weight
                if form.scaling == 'rectified':
                    d_inv_std = d_inv_std + (d_a * (a - center)).sum(0)
                    d_a = d_a * inv_std
                    d_center = d_center - d_a

        # center = mean - w_m a
        d_mean, d_center_weight = d_center.sum(0), None
        if parameters.center_weight is not None:
            assert a is not None
            d_center_weight = -(d_center * a).sum(0)
            through_center = parameters.center_weight * d_center
            d_a = d_a - through_center if d_a is not None else -through_center

        # mean = sum_n share m and var = sum_n share (v + (m - mean)^2), with m = (1 + w_m) a
        if statistics.condensed is not None:
            assert a is not None
            d_var = -0.5 * d_inv_std * inv_std**3
            if statistics.synchronized:
                both = torch.stack([d_mean, d_var])
                dist.all_reduce(both)
                d_mean, d_var = both
            share = statistics.condensed.to(a.dtype) * pixels / statistics.num_values
            # Not rounded to half precision.
            gain = 1 if parameters.center_weight is None else 1 + parameters.center_weight.to(a.dtype)
            d_m = share * (d_mean + 2 * d_var * (gain * a - mean))
            if d_center_weight is not None:
                d_center_weight = d_center_weight + (d_m * a).sum(0)
            d_a = gain * d_m if d_a is None else d_a + gain * d_m
            d_v = (share * d_var).expand_as(a) if d_v is None else d_v + share * d_var

        # a and v are means over H and W: the gradient of x gets d_a / HW + 2 d_v (x - a) / HW.
        of_input = InputCoefficients(
            slope=None if d_v is None else 2 / pixels * d_v, offset=None if d_a is None else d_a / pixels
        )
        return of_input, self._gradients(
            parameters, d_taps, d_bias.sum(0), d_center_weight, d_scale_weight, d_scale_bias
        )

    @staticmethod
    def _gradients(
        parameters: Parameters,
        d_taps: Tensor,
        d_bias: Tensor,
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
