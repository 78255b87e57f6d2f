"""The backend ``reference``: :mod:`mmubn.functional`, differentiated by autograd. The others are held to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmubn import functional
from mmubn.ops.backend import Backend
from mmubn.ops.processes import SECOND_DERIVATIVE, all_reduce
from mmubn.ops.types import Form, Moments, Parameters, Similarity, Statistics

__all__ = ['ReferenceBackend', 'reference_norm']


class ReferenceBackend(Backend):
    """Plain torch, for any device, dtype, kernel size and transform. Its map is :func:`reference_norm`."""

    name = 'reference'

    def instance_means(self, x: Tensor) -> Tensor:
        return functional.instance_means(x)

    def instance_moments(self, x: Tensor) -> Moments:
        return Moments(*functional.instance_moments(x))

    def similarity_sums(self, x: Tensor, moments: Moments, max_samples: int) -> Similarity:
        return Similarity(*functional.similarity_sums(x, max_samples))


def reference_norm(x: Tensor, statistics: Statistics, form: Form, parameters: Parameters) -> Tensor:
    """The layer's output in plain torch, differentiable any number of times.

    What depends on x is computed from x once more, for autograd to see.

    Args:
        x: Input, (N, C, H, W).
        statistics: What normalises x.
        form: Of the layer.
        parameters: Of the layer.

    Returns:
        (N, C, H, W), in the dtype of x.
    """
    parameters = parameters.by_channel()
    a = v = None
    mean, var = statistics.mean, statistics.var
    if statistics.condensed is not None:
        a, v = functional.instance_moments(x)
        batch_mean, batch_var = functional.batch_statistics(a, v, parameters.center_weight)
        if statistics.processes is not None:
            values = x.numel() // x.shape[1]
            batch_mean, batch_var = _of_all_processes(batch_mean, batch_var, values, statistics)
        mean = torch.where(statistics.condensed, batch_mean, mean)
        var = torch.where(statistics.condensed, batch_var, var)
    elif form.scaling == 'unitized':
        a, v = functional.instance_moments(x)
    elif parameters.center_weight is not None or form.scaling is not None:
        a = functional.instance_means(x)
    center, scale, factor = ReferenceBackend().coefficients(
        Statistics(a, v, mean, var), form, parameters, x.shape[2] * x.shape[3]
    )
    bias = parameters.bias if factor is None or not form.calibrate_bias else factor * parameters.bias
    y = functional.affine(functional.normalize(x, center, scale), parameters.weight, bias, parameters.neighbor_weight)
    return y.to(x.dtype)


def _of_all_processes(mean: Tensor, var: Tensor, num_values: int, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """The statistics of a batch of several processes, as functions of this process's part of it.

    Their values are those of ``statistics``. ``mean`` and ``var`` of this process are in them as in
    :func:`mmubn.ops.processes.merge`; ``var`` depends on the processes' means by their deviations alone, since
    ``sum_p w_p (mean_p - mean) = 0``.
    """
    share = num_values / statistics.num_values
    own = share * mean, share * (var + (mean - statistics.mean).square())
    return _Statistics.apply(statistics.processes, statistics.mean, statistics.var, *own)


class _Statistics(torch.autograd.Function):
    """Statistics, of which each process knows its own summands: the gradient of one is the sum over the processes."""

    @staticmethod
    def forward(
        ctx: Any, processes: Any, mean: Tensor, var: Tensor, own_mean: Tensor, own_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.processes = processes
        return mean.clone(), var.clone()

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(SECOND_DERIVATIVE)
        both = all_reduce(torch.stack([d_mean, d_var]), ctx.processes)
        return None, None, None, *both
