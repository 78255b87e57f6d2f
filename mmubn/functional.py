"""Unified Batch Normalization as pure functions: the readable reference.

Everything here is stateless plain torch and reads in the order in which the data flows::

    x ──► moments ──► similarity ──► gate ──► statistics ──► coefficients ──► apply ──► y

Notation, used by every docstring: x is the input, (N, C, H, W). a and v are the mean and the biased
variance of x over H and W, one pair per sample and channel (N, C). mu and var are the statistics that
normalise, one pair per channel (C,). All statistics are float32, or float64 where x is float64, whatever
the dtype of x and whether or not autocast is on.

Sources: UBN, arXiv 2311.15993 ("the paper"); its centering and scaling rectification come from
Representative Batch Normalization (RBN, CVPR 2021), its affine rectification from BNET (arXiv 2011.14150).
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    'affine',
    'batch_statistics',
    'coefficients',
    'depthwise_kernel',
    'instance_means',
    'instance_moments',
    'is_condensed',
    'mean_cosine_similarity',
    'normalize',
    'select_statistics',
    'similarity_sums',
    'statistics_dtype',
    'unit_vectors',
    'update_running_similarity',
    'without_autocast',
]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype that statistics of ``x`` are computed in: at least float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """A context without autocast. Does nothing where it is off: an exported graph is plainer without the switch."""
    # The first two have autocast, and torch.compile (2.6) cannot trace the question.
    is_available = device in ('cpu', 'cuda') or torch.amp.is_autocast_available(device)
    if is_available and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def instance_means(x: Tensor) -> Tensor:
    """``a[n, c] = mean_hw x[n, c]``, (N, C), in :func:`statistics_dtype`: all that evaluation needs of the moments."""
    return x.to(statistics_dtype(x)).mean((2, 3))


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of every sample.

    ``a[n, c] = mean_hw x[n, c]`` and ``v[n, c] = mean_hw (x[n, c] - a[n, c])^2``.

    Args:
        x: Input, (N, C, H, W).

    Returns:
        ``(a, v)``, each (N, C), in :func:`statistics_dtype`.
    """
    x = x.to(statistics_dtype(x))
    a = x.mean((2, 3), keepdim=True)
    return a.flatten(1), (x - a).square().mean((2, 3))


def mean_cosine_similarity(x: Tensor, max_samples: int = 16) -> Tensor:
    """Mean cosine similarity over all pairs of different samples: :func:`similarity_sums`, sum over number.

    Args:
        x: Input, (N, ...). Only the first ``max_samples`` samples are read.
        max_samples: At least 2.

    Returns:
        s, 0-d tensor in :func:`statistics_dtype`, without gradient. NaN where there is no evidence: fewer than two
        samples, or a sample whose norm is not finite.

    Source: the paper, Definition 1 and section 3.3.1.
    """
    total, pairs = similarity_sums(x, max_samples)
    return total / pairs


@torch.no_grad()
def similarity_sums(x: Tensor, max_samples: int = 16) -> tuple[Tensor, int]:
    """Sum of the cosine similarities over all ordered pairs of different samples, and the number of these pairs.

    With ``u_n = f_n / ||f_n||``, ``f_n`` the flattened sample n and n' the number of samples used,

    ``sum_{i != j} u_i . u_j = ||sum_n u_n||^2 - sum_n ||u_n||^2`` over ``n' (n' - 1)`` pairs,

    which is linear in the data: no tensor of all pairs exists. A sample of zeros has similarity 0 to every other.

    Args:
        x: Input, (N, ...). Only the first ``max_samples`` samples are read.
        max_samples: At least 2.

    Returns:
        ``(sum, number)``: the sum 0-d in :func:`statistics_dtype`, NaN where a norm is not finite.
    """
    u = unit_vectors(x[:max_samples])
    n = u.shape[0]
    return u.sum(0).square().sum() - u.square().sum(), n * (n - 1)


def unit_vectors(x: Tensor) -> Tensor:
    """``u_n = f_n / ||f_n||``, ``f_n`` the flattened sample n.

    Args:
        x: Input, (N, ...), of D values per sample.

    Returns:
        (N, D), in :func:`statistics_dtype`. A sample of zeros stays zero; one whose norm is not finite becomes NaN.
    """
    f = x.flatten(1).to(statistics_dtype(x))
    # Normalise before any product: a dot product over C*H*W values would leave the range of float16.
    norm = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    # A finite sample of infinite norm (its square overflowed) would pass for a sample of zeros.
    return f / torch.where(norm.isfinite(), norm.clamp_min(torch.finfo(f.dtype).tiny), float('nan'))


def update_running_similarity(running_similarity: Tensor, similarity: Tensor, momentum: float | Tensor) -> Tensor:
    """The running similarity after one training batch.

    ``tau <- (1 - m_s) tau + m_s s``; a similarity that is not finite is no evidence and leaves tau as it is.

    Args:
        running_similarity: tau, 0-d.
        similarity: s of the batch, 0-d, from :func:`mean_cosine_similarity`.
        momentum: m_s.

    Returns:
        The new tau, a new 0-d tensor.

    Source: the paper, Eq. 3.
    """
    updated = torch.lerp(running_similarity, similarity.to(running_similarity.dtype), momentum)
    return torch.where(_is_finite(similarity), updated, running_similarity)


def is_condensed(running_similarity: Tensor, threshold: float | None) -> Tensor:
    """The gate: whether the features are condensed, so that the batch's own statistics may be used.

    ``condensed = tau > T``. The result stays on the device; nothing here waits for it.

    Args:
        running_similarity: tau, 0-d.
        threshold: T, the feature condensation threshold. None turns the gate off: always condensed.

    Returns:
        0-d bool tensor.

    Source: the paper, Eq. 3.
    """
    if threshold is None:
        return torch.ones_like(running_similarity, dtype=torch.bool)
    return running_similarity > threshold


def batch_statistics(a: Tensor, v: Tensor, center_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the centred input ``x_c = x + w_m a`` over the batch, from the instance moments.

    The instance mean of x_c is ``(1 + w_m) a`` and its instance variance is still v, so, by the law of total variance,

    ``mu_B = mean_n (1 + w_m) a`` and ``var_B = mean_n v + var_n (1 + w_m) a``: no second pass over x, no cancellation.

    Args:
        a: Instance means, (N, C).
        v: Instance variances, (N, C).
        center_weight: w_m, (C,). None for no centering rectification (w_m = 0).

    Returns:
        ``(mu_B, var_B)``, each (C,).

    Source: the paper, Eqs. 2 and 4; RBN for the centering.
    """
    # Not (1 + w_m) a: the sum would be rounded to the dtype of a half-precision w_m.
    centred = a if center_weight is None else a + center_weight * a
    mean = centred.mean(0)
    return mean, v.mean(0) + (centred - mean).square().mean(0)


def select_statistics(
    batch: tuple[Tensor, Tensor],
    running: tuple[Tensor, Tensor],
    condensed: Tensor,
    momentum: float | Tensor,
    count: int | Tensor,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The statistics that normalise a training batch, and what becomes of the running ones.

    While the features are condensed, the batch's normalise and the running ones move as in ``nn.BatchNorm2d``,
    ``running <- (1 - m) running + m batch``, with the unbiased batch variance, ``count / (count - 1) var_B``.
    Otherwise the running ones normalise and stay. A channel whose batch statistics are not finite keeps its running
    ones, so that one bad batch does not stay for good.

    Args:
        batch: ``(mu_B, var_B)`` of :func:`batch_statistics`, each (C,).
        running: ``(running_mean, running_var)``, each (C,).
        condensed: From :func:`is_condensed`.
        momentum: m.
        count: Values per channel, N * H * W; 0-d where it is known on the device alone.

    Returns:
        ``(mu, var)``, and the new ``(running_mean, running_var)``, which have no gradient.

    Source: the paper, Eqs. 2 and 3.
    """
    (mean, var), (old_mean, old_var) = batch, running
    selected = torch.where(condensed, mean, old_mean.to(mean.dtype)), torch.where(condensed, var, old_var.to(var.dtype))
    # In the dtype of the running ones, which in a half-precision layer may be too narrow for the variance.
    new_mean = mean.detach().to(old_mean.dtype)
    new_var = (var.detach() * (count / (count - 1 + (count <= 1)))).to(old_var.dtype)
    moves = _is_finite(new_mean) & _is_finite(new_var) & condensed
    moved_mean = torch.where(moves, torch.lerp(old_mean, new_mean, momentum), old_mean)
    moved_var = torch.where(moves, torch.lerp(old_var, new_var, momentum), old_var)
    return selected, (moved_mean, moved_var)


def _is_finite(x: Tensor) -> Tensor:
    """``x.isfinite()`` in half as many operations."""
    return x - x == 0


def coefficients(
    a: Tensor | None,
    v: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    eps: float,
    size: int | Tensor,
    scaling: str | None,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rectified normalisation of each sample and channel: ``r x_s = (x - center) * scale``.

    ``x_s = (x + w_m a - mu) / sqrt(var + eps)``, so ``center = mu - w_m a`` and ``scale = r / sqrt(var + eps)``.
    The factor r is one number per sample and channel; ``scaling`` says what it depends on:

    - ``'rectified'`` (UBN, RBN): ``r = sigmoid(w_v K_s + w_b)``, K_s the instance mean of x_s;
    - ``'instance'`` (IEBN): ``r = sigmoid(w_v a + w_b)``;
    - ``'unitized'`` (UnitizedBN): ``r = 1 + w_v (1 / sqrt(q + eps) - 1)``, where
      ``q_n = sum_chw x_s^2 / (HW)^2 = sum_c (v + (a - mu)^2) / (var + eps) / (HW)``;
    - None: r = 1.

    Args:
        a: Instance means, (N, C). May be None without centering and scaling.
        v: Instance variances, (N, C). Needed for ``'unitized'`` alone.
        statistics: ``(mu, var)``, each (C,).
        eps: Added to the variance, and to q.
        size: H * W.
        scaling: See above.
        center_weight: w_m, (C,). None for no centering rectification.
        scale_weight: w_v, (C,). None without scaling.
        scale_bias: w_b, (C,). None without scaling, and for ``'unitized'``.

    Returns:
        ``(center, scale, r)``: center and scale broadcast to (N, C); r is (N, C), or None without scaling.

    Source: the paper, Eq. 4 (section 3.3.2), and RBN (CVPR 2021); IEBN, arXiv 1908.04008; unitization,
    arXiv 2001.02814.
    """
    mu, var = statistics
    inv_std = torch.rsqrt(var + eps)
    if center_weight is None:
        center = mu.unsqueeze(0)
    else:
        assert a is not None, 'centering needs the instance means'
        center = mu - center_weight * a
    if scaling is None:
        return center, inv_std.unsqueeze(0), None
    assert a is not None, 'scaling needs the instance means'
    assert scale_weight is not None, 'scaling needs a scale_weight'
    if scaling == 'unitized':
        assert v is not None, 'this scaling needs the instance variances'
        q = ((v + (a - center).square()) * inv_std.square()).sum(1, keepdim=True) / size
        r = 1 + scale_weight * (torch.rsqrt(q + eps) - 1)
    else:
        assert scale_bias is not None, 'this scaling needs a scale_bias'
        pooled = (a - center) * inv_std if scaling == 'rectified' else a
        r = torch.sigmoid(scale_weight * pooled + scale_bias)
    return center, r * inv_std, r


def normalize(x: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """``(x - center) * scale`` in :func:`statistics_dtype`, for x of (N, C, H, W) and coefficients of (N or 1, C).

    Subtracting first keeps the digits that ``scale * x + shift`` loses when the mean is large beside the deviation.
    """
    return (x.to(statistics_dtype(x)) - center[:, :, None, None]) * scale[:, :, None, None]


def affine(x: Tensor, weight: Tensor, bias: Tensor, neighbor_weight: Tensor | None) -> Tensor:
    """Affine rectification: a depthwise k x k convolution with zero padding k // 2 takes the place of gamma.

    ``y = depthwise_conv(x; kernel) + beta``, and for k = 1 ``y = gamma x + beta``, the affine step of BatchNorm.

    Args:
        x: Normalised input, (N, C, H, W).
        weight: Centre tap of the kernel, (C,): gamma of BatchNorm.
        bias: beta: (C,), or (N, C) where it differs between samples.
        neighbor_weight: The other taps, row by row without the centre, (C, k*k - 1). None for k = 1.

    Returns:
        (N, C, H, W).

    Source: the paper, Eq. 5 (section 3.3.3); BNET.
    """
    kernel = depthwise_kernel(weight, neighbor_weight).to(x.dtype)
    if neighbor_weight is None:
        y = x * kernel[..., 0]
    else:
        y = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=kernel.shape[0])
    return y + bias[..., None, None]


def depthwise_kernel(weight: Tensor, neighbor_weight: Tensor | None) -> Tensor:
    """The kernel (C, 1, k, k) from its centre tap (C,) and the other taps (C, k*k - 1), row by row; None for k = 1."""
    if neighbor_weight is None:
        return weight[:, None, None, None]
    channels, neighbors = neighbor_weight.shape
    # Slices, not split: an ONNX exporter then folds the kernel to a constant.
    before, after = neighbor_weight[:, : neighbors // 2], neighbor_weight[:, neighbors // 2 :]
    size = math.isqrt(int(neighbors) + 1)
    return torch.cat([before, weight[:, None], after], dim=1).view(channels, 1, size, size)
