"""The backend ``reference``: :mod:`mmubn.functional`, differentiated by autograd. The others are held to it."""

from __future__ import annotations

import torch
from torch import Tensor

from mmubn import functional
from mmubn.ops.backend import Backend
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
