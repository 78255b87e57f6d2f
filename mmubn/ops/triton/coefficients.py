"""From the moments of a batch to statistics and coefficients, and from the sums over the map back.

Forward: the gate, the statistics and the coefficients of a batch in one launch. Backward: the gradients of all
parameters, and the coefficients of the gradient of x, in one.
"""

# In Triton, names in capitals are compile-time constants, and types are found by its compiler.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmubn.ops.triton import runtime, tiling
from mmubn.ops.triton.device import is_finite, jit, load_block, load_parameter, store_block, tl
from mmubn.ops.triton.inputs import check_device, fail, float32, number, one_bool, scaling_code
from mmubn.ops.triton.similarity import add_similarities, similarity_parts

__all__ = ['coefficients', 'coefficients_backward', 'empty_gradients', 'gated_coefficients', 'statistics_coefficients']


# --- forward ----------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=['samples', 'parts', 'paired_samples'])
def _coefficients_kernel(
    a, v, mean, var, condensed, center_weight, scale_weight, scale_bias,
    center, scale, mean_out, var_out, new_mean, new_var,
    samples, channels, eps, momentum, correction,
    partial, inverse_norms, tau, new_tau, parts, paired_samples, similarity_momentum, threshold,
    SCALING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``v`` None: (mean, var) normalise. Otherwise they are the running statistics, beside the batch's, between which
    ``condensed`` decides; ``partial`` None: as it says, otherwise as the similarity says, and it is written.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < channels
    mu = load_parameter(mean, channel, channels)
    sigma2 = load_parameter(var, channel, channels)
    w_m = tl.zeros([BLOCK_C], tl.float32)
    if center_weight is not None:
        w_m = load_parameter(center_weight, channel, channels)

    if v is not None:
        # The instance mean of x + w_m a is (1 + w_m) a: the law of total variance, in two loops, without cancellation.
        batch_mean = tl.zeros([BLOCK_C], tl.float32)
        batch_var = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, samples, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            batch_mean += tl.sum(load_block(a, n, channel, samples, channels), axis=0)
        batch_mean = (1 + w_m) * batch_mean / samples
        for start in range(0, samples, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            deviation = (1 + w_m)[None, :] * load_block(a, n, channel, samples, channels) - batch_mean[None, :]
            deviation = tl.where((n < samples)[:, None], deviation, 0.0)
            batch_var += tl.sum(load_block(v, n, channel, samples, channels) + deviation * deviation, axis=0)
        batch_var /= samples

        if partial is not None:
            # Every program adds up the same numbers in the same order.
            total, pairs = add_similarities(partial, inverse_norms, parts, paired_samples, BLOCK, BLOCK_M)
            similarity = total / pairs
            old = tl.load(tau)
            new = tl.where(
                is_finite(similarity), (1 - similarity_momentum) * old + similarity_momentum * similarity, old
            )
            take = tl.zeros([BLOCK_C], tl.float32) + new > threshold
            is_first = tl.program_id(0) == 0
            tl.store(new_tau, new, mask=is_first)
            tl.store(condensed, new > threshold, mask=is_first)
        else:
            take = tl.load(condensed) != 0
        move = take & is_finite(batch_mean) & is_finite(batch_var)
        moved_mean = (1 - momentum) * mu + momentum * batch_mean
        moved_var = (1 - momentum) * sigma2 + momentum * (batch_var * correction)
        tl.store(new_mean + channel, tl.where(move, moved_mean, mu), mask=live)
        tl.store(new_var + channel, tl.where(move, moved_var, sigma2), mask=live)
        mu = tl.where(take, batch_mean, mu)
        sigma2 = tl.where(take, batch_var, sigma2)
        tl.store(mean_out + channel, mu, mask=live)
        tl.store(var_out + channel, sigma2, mask=live)

    inv_std = tl.rsqrt(sigma2 + eps)
    if SCALING != 0:
        w_v = load_parameter(scale_weight, channel, channels)[None, :]
        w_b = load_parameter(scale_bias, channel, channels)[None, :]
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mean_n = load_block(a, n, channel, samples, channels)
        center_n = mu[None, :] - w_m[None, :] * mean_n
        scale_n = tl.zeros([BLOCK_N, BLOCK_C], tl.float32) + inv_std[None, :]
        if SCALING == 1:
            scale_n *= tl.sigmoid(w_v * ((mean_n - center_n) * inv_std[None, :]) + w_b)
        elif SCALING == 2:
            scale_n *= tl.sigmoid(w_v * mean_n + w_b)
        store_block(center, n, channel, samples, channels, center_n)
        store_block(scale, n, channel, samples, channels, scale_n)


def statistics_coefficients(
    a: Tensor,
    v: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    condensed: Tensor,
    num_values: int,
    eps: float,
    momentum: float,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    scaling: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of one batch, what becomes of the running statistics, and the coefficients of ``apply``.

    :func:`mmubn.functional.batch_statistics`, then :func:`mmubn.functional.select_statistics`, then
    :func:`mmubn.functional.coefficients` without r.

    Args:
        a: Instance means, (N, C).
        v: Instance variances, (N, C).
        running_mean: (C,).
        running_var: (C,).
        condensed: 0-d bool.
        num_values: Values per channel, N * H * W.
        eps: Added to the variance.
        momentum: Of the running statistics.
        center_weight: w_m, (C,). None for 0.
        scale_weight: w_v, (C,). None, with ``scale_bias``, for r = 1.
        scale_bias: w_b, (C,).
        scaling: What r depends on: 'rectified', 'instance' or None.

    Returns:
        ``(center, scale, mu, var, running_mean, running_var)``: (N, C) the first two, (C,) the others; float32.
    """
    condensed = one_bool(condensed, a.device)
    rectification = center_weight, scale_weight, scale_bias, scaling
    center, scale, mean, var, new_mean, new_var = _launch_forward(
        a, running_mean, running_var, eps, *rectification, v, condensed, num_values, momentum
    )
    return center, scale, mean, var, new_mean, new_var


def gated_coefficients(
    x: Tensor,
    a: Tensor,
    v: Tensor,
    max_samples: int,
    running_similarity: Tensor,
    similarity_momentum: float,
    threshold: float,
    running_mean: Tensor,
    running_var: Tensor,
    num_values: int,
    eps: float,
    momentum: float,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    scaling: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`statistics_coefficients` where the similarity of the samples says whether the features are condensed.

    That is decided by :func:`mmubn.functional.update_running_similarity` and :func:`mmubn.functional.is_condensed`.

    Args:
        x, a, v, max_samples: As for :func:`~mmubn.ops.triton.similarity.similarity_sums`.
        running_similarity: tau, 0-d.
        similarity_momentum: m_s.
        threshold: T.
        running_mean, running_var, num_values, eps, momentum, center_weight, scale_weight, scale_bias, scaling: As for
            :func:`statistics_coefficients`.

    Returns:
        ``(center, scale, mu, var, running_mean, running_var, tau, condensed)``: the last two are the new tau and the
        decision, 0-d, float32 and bool.
    """
    similarities = similarity_parts(x, a, v, max_samples)
    tau = float32(running_similarity, 'running_similarity', x.device)
    new_tau, condensed = torch.empty_like(tau), torch.empty_like(tau, dtype=torch.bool)
    gate = _Gate(
        similarities.partial,
        similarities.inverse_norms,
        tau,
        new_tau,
        similarities.parts,
        similarities.samples,
        number(similarity_momentum, 'similarity_momentum'),
        number(threshold, 'threshold'),
    )
    rectification = center_weight, scale_weight, scale_bias, scaling
    center, scale, mean, var, new_mean, new_var = _launch_forward(
        a, running_mean, running_var, eps, *rectification, v, condensed, num_values, momentum, gate
    )
    return center, scale, mean, var, new_mean, new_var, new_tau, condensed


def coefficients(
    a: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    scaling: str | None,
) -> tuple[Tensor, Tensor]:
    """The coefficients of ``apply`` for given statistics: :func:`mmubn.functional.coefficients` without r.

    Args:
        a: Instance means, (N, C).
        mean: mu, (C,).
        var: (C,).
        eps, center_weight, scale_weight, scale_bias, scaling: As for :func:`statistics_coefficients`.

    Returns:
        ``(center, scale)``, each (N, C), float32.
    """
    center, scale = _launch_forward(a, mean, var, eps, center_weight, scale_weight, scale_bias, scaling)
    return center, scale


class _Gate(NamedTuple):
    """What decides in the kernel whether the features are condensed."""

    partial: Tensor | None
    inverse_norms: Tensor | None
    tau: Tensor | None
    new_tau: Tensor | None
    parts: int
    paired_samples: int
    similarity_momentum: float
    threshold: float


_NO_GATE = _Gate(None, None, None, None, 1, 1, 0.0, 0.0)


def _launch_forward(
    a: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    scaling: str | None,
    v: Tensor | None = None,
    condensed: Tensor | None = None,
    num_values: int = 0,
    momentum: float = 0.0,
    gate: _Gate = _NO_GATE,
) -> list[Tensor]:
    """center and scale; where there is v, of a batch, also mean and var, which normalise, and the new running ones.

    A gate writes ``condensed``.
    """
    device = a.device
    check_device(device)
    if a.dim() != 2 or a.numel() == 0:
        fail(f'a must be (N, C) with elements, got {tuple(a.shape)}.')
    samples, channels = a.shape
    code = scaling_code(scaling, scale_weight, scale_bias)
    a = float32(a, 'a', device, samples, channels)
    v = float32(v, 'v', device, samples, channels)
    mean = float32(mean, 'mean', device, channels)
    var = float32(var, 'var', device, channels)
    center_weight = float32(center_weight, 'center_weight', device, channels)
    scale_weight = float32(scale_weight, 'scale_weight', device, channels)
    scale_bias = float32(scale_bias, 'scale_bias', device, channels)
    outputs = [torch.empty_like(a), torch.empty_like(a)]
    if v is not None:
        outputs += [torch.empty_like(mean) for _ in range(4)]
    block_n = min(tiling.power_of_two(samples), 64)
    block_c = min(tiling.power_of_two(channels), max(8, 256 // block_n))
    runtime.launch(
        _coefficients_kernel, tiling.ceil_div(channels, block_c), device,
        a, v, mean, var, condensed, center_weight, scale_weight, scale_bias,
        *outputs, *[None] * (6 - len(outputs)),
        samples, channels, number(eps, 'eps'), number(momentum, 'momentum'), num_values / max(num_values - 1, 1), *gate,
        SCALING=code, BLOCK_N=block_n, BLOCK_C=block_c,
        BLOCK=tiling.power_of_two(gate.parts), BLOCK_M=tiling.power_of_two(gate.paired_samples),
    )  # fmt: skip
    return outputs


# --- backward ---------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=['samples'])
def _coefficients_backward_kernel(
    products, sums, a, mean, var, condensed, scale,
    weight, neighbor_weight, center_weight, scale_weight, calibrated_bias,
    slope, offset, d_weight, d_bias, d_neighbor_weight, d_center_weight, d_scale_weight, d_scale_bias,
    samples, channels, pixels, eps,
    SCALING: tl.constexpr, T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Names: ``d_z`` is the gradient of z; r = sigmoid(w_v stat + w_b); m = (1 + w_m) a; rstd = 1 / sqrt(var + eps)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < channels
    tap = tl.arange(0, BLOCK_T)
    is_centre = (tap == T // 2)[None, :]
    taps = tl.where(is_centre, load_parameter(weight, channel, channels)[:, None], 0.0)
    if T > 1:
        neighbor_index = channel[:, None] * (T - 1) + tl.where(tap < T // 2, tap, tap - 1)[None, :]
        is_neighbor = live[:, None] & (tap < T)[None, :] & (tap != T // 2)[None, :]
        taps += tl.load(neighbor_weight + neighbor_index, mask=is_neighbor, other=0.0)
    taps = taps[None, :, :]
    mu = load_parameter(mean, channel, channels)[None, :]
    inv_std = tl.rsqrt(load_parameter(var, channel, channels) + eps)
    rstd = inv_std[None, :]
    w_m = tl.zeros([1, BLOCK_C], tl.float32)
    if center_weight is not None:
        w_m = load_parameter(center_weight, channel, channels)[None, :]

    sum_weight = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    sum_w_m = tl.zeros([BLOCK_C], tl.float32)
    sum_w_v = tl.zeros([BLOCK_C], tl.float32)
    sum_w_b = tl.zeros([BLOCK_C], tl.float32)
    sum_mu = tl.zeros([BLOCK_C], tl.float32)
    sum_rstd = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < samples)[:, None] & live[None, :]
        row = n.to(tl.int64)[:, None] * channels + channel[None, :]
        tap_rows = row[:, :, None] * T + tap[None, None, :]
        tap_inside = inside[:, :, None] & (tap < T)[None, None, :]
        products_n = tl.load(products + tap_rows, mask=tap_inside, other=0.0)
        sums_n = tl.load(sums + tap_rows, mask=tap_inside, other=0.0)
        a_n = tl.load(a + row, mask=inside, other=0.0)
        scale_n = tl.load(scale + row, mask=inside, other=0.0)

        r = scale_n / rstd
        d_scale = tl.sum(taps * products_n, axis=2)
        d_center = -scale_n * tl.sum(taps * sums_n, axis=2)
        d_r = d_scale * rstd
        d_rstd = d_scale * r
        d_bias_n = tl.sum(tl.where(is_centre[None, :, :], sums_n, 0.0), axis=2)
        if calibrated_bias is not None:
            d_r += d_bias_n * load_parameter(calibrated_bias, channel, channels)[None, :]
            d_bias_n *= r

        # center = mu - w_m a
        d_mu = d_center
        d_w_m = -d_center * a_n
        d_a = -w_m * d_center
        if SCALING != 0:
            w_v = load_parameter(scale_weight, channel, channels)[None, :]
            d_logit = d_r * r * (1 - r)
            d_stat = d_logit * w_v
            sum_w_b += tl.sum(d_logit, axis=0)
            if SCALING == 1:
                # stat = (m - mu) / sqrt(.)
                deviation = tl.where(inside, (1 + w_m) * a_n - mu, 0.0)
                sum_w_v += tl.sum(d_logit * deviation * rstd, axis=0)
                d_rstd += d_stat * deviation
                d_m = d_stat * rstd
                d_mu -= d_m
                d_w_m += d_m * a_n
                d_a += (1 + w_m) * d_m
            else:
                sum_w_v += tl.sum(d_logit * a_n, axis=0)
                d_a += d_stat
        sum_weight += tl.sum(scale_n[:, :, None] * products_n, axis=0)
        sum_bias += tl.sum(d_bias_n, axis=0)
        sum_w_m += tl.sum(d_w_m, axis=0)
        sum_mu += tl.sum(d_mu, axis=0)
        sum_rstd += tl.sum(d_rstd, axis=0)
        tl.store(offset + row, d_a / pixels, mask=inside)

    sum_var = sum_rstd * (-0.5 * inv_std * inv_std * inv_std)

    # mu = mean_n m and var = mean_n (v + (m - mu)^2), where the statistics are the batch's.
    take = 0.0
    if condensed is not None:
        take = (tl.load(condensed) != 0).to(tl.float32)
    sum_mu = (take * sum_mu / samples)[None, :]
    sum_var = (take * sum_var / samples)[None, :]
    # A thread may read what another thread of its program wrote.
    tl.debug_barrier()
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < samples)[:, None] & live[None, :]
        row = n.to(tl.int64)[:, None] * channels + channel[None, :]
        a_n = tl.load(a + row, mask=inside, other=0.0)
        d_m = sum_mu + 2 * sum_var * ((1 + w_m) * a_n - mu)
        sum_w_m += tl.sum(d_m * a_n, axis=0)
        d_a = tl.load(offset + row, mask=inside, other=0.0)
        tl.store(offset + row, d_a + (1 + w_m) * d_m / pixels, mask=inside)
        tl.store(slope + row, tl.zeros_like(a_n) + 2 * sum_var / pixels, mask=inside)

    tl.store(d_weight + channel, tl.sum(tl.where(is_centre, sum_weight, 0.0), axis=1), mask=live)
    if T > 1:
        tl.store(d_neighbor_weight + neighbor_index, sum_weight, mask=is_neighbor)
    tl.store(d_bias + channel, sum_bias, mask=live)
    if center_weight is not None:
        tl.store(d_center_weight + channel, sum_w_m, mask=live)
    if SCALING != 0:
        tl.store(d_scale_weight + channel, sum_w_v, mask=live)
        tl.store(d_scale_bias + channel, sum_w_b, mask=live)


def coefficients_backward(
    products: Tensor,
    sums: Tensor,
    a: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    condensed: Tensor | None,
    scale: Tensor,
    weight: Tensor,
    neighbor_weight: Tensor | None,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    calibrated_bias: Tensor | None,
    scaling: str | None,
    pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the parameters, and the coefficients of ``input_gradient``.

    Args:
        products, sums: What ``tap_sums`` returned, (N, C, T).
        a: Instance means, (N, C).
        mean: mu, the mean that normalised, (C,).
        var: The variance that normalised, (C,).
        eps: Added to it.
        condensed: Whether mu and var were the batch's and so depend on x: 0-d bool. None for False.
        scale: (N, C), of the forward.
        weight: The centre tap, (C,).
        neighbor_weight: The other taps, (C, T - 1), or None.
        center_weight: w_m, (C,), or None.
        scale_weight: w_v, (C,), or None.
        calibrated_bias: beta, (C,), where the bias was ``r beta``; None where it was beta.
        scaling: 'rectified', 'instance' or None.
        pixels: H * W.

    Returns:
        ``(slope, offset, d_weight, d_bias, d_neighbor_weight, d_center_weight, d_scale_weight, d_scale_bias)``: slope
        and offset (N, C), d_neighbor_weight (C, T - 1), the others (C,), and (0,) the gradients of parameters that are
        None; float32.
    """
    device = products.device
    check_device(device)
    if products.dim() != 3 or products.numel() == 0:
        fail(f'products must be (N, C, T) with elements, got {tuple(products.shape)}.')
    samples, channels, taps = products.shape
    code = scaling_code(scaling, scale_weight, scale_weight)
    products = float32(products, 'products', device, samples, channels, taps)
    sums = float32(sums, 'sums', device, samples, channels, taps)
    a = float32(a, 'a', device, samples, channels)
    scale = float32(scale, 'scale', device, samples, channels)
    neighbor_weight = float32(neighbor_weight, 'neighbor_weight', device, channels, taps - 1)
    mean = float32(mean, 'mean', device, channels)
    var = float32(var, 'var', device, channels)
    weight = float32(weight, 'weight', device, channels)
    center_weight = float32(center_weight, 'center_weight', device, channels)
    scale_weight = float32(scale_weight, 'scale_weight', device, channels)
    calibrated_bias = float32(calibrated_bias, 'calibrated_bias', device, channels)
    condensed = one_bool(condensed, device)
    outputs = empty_gradients(a, weight, neighbor_weight, center_weight, scale_weight)
    block_c = min(tiling.power_of_two(channels), 8)
    block_t = tiling.power_of_two(taps)
    block_n = min(tiling.power_of_two(samples), 64, 4096 // (block_c * block_t))
    runtime.launch(
        _coefficients_backward_kernel, tiling.ceil_div(channels, block_c), device,
        products, sums, a, mean, var, condensed, scale,
        weight, neighbor_weight, center_weight, scale_weight, calibrated_bias,
        *outputs,
        samples, channels, float(pixels), number(eps, 'eps'),
        SCALING=code, T=taps, BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_T=block_t, num_warps=8,
    )  # fmt: skip
    return outputs


def empty_gradients(
    a: Tensor,
    weight: Tensor,
    neighbor_weight: Tensor | None,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`coefficients_backward` returns, before it is written."""
    return (
        torch.empty_like(a),
        torch.empty_like(a),
        torch.empty_like(weight),
        torch.empty_like(weight),
        _like(neighbor_weight, a),
        _like(center_weight, a),
        _like(scale_weight, a),
        _like(scale_weight, a),
    )


def _like(value: Tensor | None, other: Tensor) -> Tensor:
    """An empty tensor such as ``value``; one of no elements on the device of ``other`` where there is none."""
    return other.new_empty(0) if value is None else torch.empty_like(value)
