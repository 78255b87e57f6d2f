"""From the sums over the map to the gradients of all parameters and the coefficients of the gradient of x: one launch.

Where the batch is that of several processes, one launch does what needs no other process and writes what the collective
adds up, and another one goes on from there.
"""

# In Triton, names in capitals are compile-time constants, and types are found by its compiler.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
from torch import Tensor

from mmubn.ops.triton import runtime, tiling
from mmubn.ops.triton.coefficients import block_of_samples
from mmubn.ops.triton.device import jit, load_parameter, tl
from mmubn.ops.triton.inputs import check_device, fail, float32, number, one_bool, scaling_code

__all__ = ['coefficients_backward', 'empty_gradients', 'own_coefficients_backward', 'statistics_backward']


# --- kernels ----------------------------------------------------------------------------------------------------------


@jit
def add_through_statistics(
    a, own_offset, offset, slope, mu, w_m, d_mu, d_var, channel, samples, channels, pixels,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds to the offsets what each sample gets by way of mu = mean_n m and var = mean_n (v + (m - mu)^2), and writes
    the slopes. ``d_mu`` and ``d_var`` are the gradients of these, times a sample's share. Returns their part of d_w_m.
    """
    sum_w_m = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < samples)[:, None] & (channel < channels)[None, :]
        row = n.to(tl.int64)[:, None] * channels + channel[None, :]
        a_n = tl.load(a + row, mask=inside, other=0.0)
        d_m = d_mu[None, :] + 2 * d_var[None, :] * ((1 + w_m) * a_n - mu)
        sum_w_m += tl.sum(d_m * a_n, axis=0)
        d_a = tl.load(own_offset + row, mask=inside, other=0.0)
        tl.store(offset + row, d_a + (1 + w_m) * d_m / pixels, mask=inside)
        tl.store(slope + row, tl.zeros_like(a_n) + 2 * d_var[None, :] / pixels, mask=inside)
    return sum_w_m


@jit(
    do_not_specialize=['samples'],
    do_not_specialize_on_alignment=[
        'products',
        'sums',
        'a',
        'mean',
        'var',
        'condensed',
        'scale',
        'weight',
        'neighbor_weight',
        'center_weight',
        'scale_weight',
        'calibrated_bias',
        'statistic_sums',
        'slope',
        'offset',
        'd_weight',
        'd_bias',
        'd_neighbor_weight',
        'd_center_weight',
        'd_scale_weight',
        'd_scale_bias',
    ],
)
def _coefficients_backward_kernel(
    products, sums, a, mean, var, condensed, scale,
    weight, neighbor_weight, center_weight, scale_weight, calibrated_bias,
    statistic_sums, slope, offset, d_weight, d_bias, d_neighbor_weight, d_center_weight, d_scale_weight, d_scale_bias,
    samples, channels, pixels, eps,
    SCALING: tl.constexpr, T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Names: ``d_z`` is the gradient of z; r = sigmoid(w_v stat + w_b); m = (1 + w_m) a; rstd = 1 / sqrt(var + eps).

    With ``statistic_sums`` (2, C), d_mu and d_var are written there, and what follows from them is left out.
    """
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

    if statistic_sums is not None:
        tl.store(statistic_sums + channel, sum_mu, mask=live)
        tl.store(statistic_sums + channels + channel, sum_var, mask=live)
    else:
        # A sample's share, where the statistics are the batch's.
        share = 0.0
        if condensed is not None:
            share = (tl.load(condensed) != 0).to(tl.float32) / samples
        # A thread may read what another thread of its program wrote.
        tl.debug_barrier()
        sum_w_m += add_through_statistics(
            a, offset, offset, slope, mu, w_m, share * sum_mu, share * sum_var, channel, samples, channels, pixels,
            BLOCK_N, BLOCK_C,
        )  # fmt: skip

    tl.store(d_weight + channel, tl.sum(tl.where(is_centre, sum_weight, 0.0), axis=1), mask=live)
    if T > 1:
        tl.store(d_neighbor_weight + neighbor_index, sum_weight, mask=is_neighbor)
    tl.store(d_bias + channel, sum_bias, mask=live)
    if center_weight is not None:
        tl.store(d_center_weight + channel, sum_w_m, mask=live)
    if SCALING != 0:
        tl.store(d_scale_weight + channel, sum_w_v, mask=live)
        tl.store(d_scale_bias + channel, sum_w_b, mask=live)


@jit(
    do_not_specialize=['samples'],
    do_not_specialize_on_alignment=[
        'statistic_sums',
        'a',
        'mean',
        'condensed',
        'num_values',
        'center_weight',
        'own_offset',
        'own_d_center_weight',
        'slope',
        'offset',
        'd_center_weight',
    ],
)
def _statistics_backward_kernel(
    statistic_sums, a, mean, condensed, num_values, center_weight, own_offset, own_d_center_weight,
    slope, offset, d_center_weight, samples, channels, pixels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mu = load_parameter(mean, channel, channels)[None, :]
    w_m = tl.zeros([1, BLOCK_C], tl.float32)
    if center_weight is not None:
        w_m = load_parameter(center_weight, channel, channels)[None, :]
    share = tl.where(tl.load(condensed) != 0, pixels / tl.load(num_values), 0.0)
    d_mu = share * load_parameter(statistic_sums, channel, channels)
    d_var = share * load_parameter(statistic_sums + channels, channel, channels)
    sum_w_m = add_through_statistics(
        a, own_offset, offset, slope, mu, w_m, d_mu, d_var, channel, samples, channels, pixels, BLOCK_N, BLOCK_C
    )
    if center_weight is not None:
        sum_w_m += load_parameter(own_d_center_weight, channel, channels)
        tl.store(d_center_weight + channel, sum_w_m, mask=channel < channels)


# --- launches ---------------------------------------------------------------------------------------------------------


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
    slope = a.new_empty(a.shape, dtype=torch.float32)
    gradients = _launch_backward(
        products, sums, a, mean, var, eps, one_bool(condensed, products.device), scale, weight, neighbor_weight,
        center_weight, scale_weight, calibrated_bias, scaling, pixels, None, slope,
    )  # fmt: skip
    return slope, *gradients


def own_coefficients_backward(
    products: Tensor,
    sums: Tensor,
    a: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    scale: Tensor,
    weight: Tensor,
    neighbor_weight: Tensor | None,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    calibrated_bias: Tensor | None,
    scaling: str | None,
    pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`coefficients_backward` of a batch of several processes, as far as this process knows it.

    Args:
        products, ..., pixels: As for :func:`coefficients_backward`.

    Returns:
        ``(statistic_sums, offset, d_weight, d_bias, d_neighbor_weight, d_center_weight, d_scale_weight,
        d_scale_bias)``: statistic_sums (2, C) are the gradients of mu and of var by the outputs of this process, which
        the processes have to add up; offset and d_center_weight are without what comes through the statistics, for
        :func:`statistics_backward`.
    """
    statistic_sums = mean.new_empty((2, *mean.shape), dtype=torch.float32)
    gradients = _launch_backward(
        products, sums, a, mean, var, eps, None, scale, weight, neighbor_weight, center_weight, scale_weight,
        calibrated_bias, scaling, pixels, statistic_sums, None,
    )  # fmt: skip
    return statistic_sums, *gradients


def statistics_backward(
    statistic_sums: Tensor,
    a: Tensor,
    mean: Tensor,
    condensed: Tensor,
    num_values: Tensor,
    center_weight: Tensor | None,
    own_offset: Tensor,
    own_d_center_weight: Tensor,
    pixels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest of :func:`own_coefficients_backward`.

    Args:
        statistic_sums: (2, C), added up over the processes.
        a, mean, condensed, center_weight, pixels: As for :func:`coefficients_backward`.
        num_values: Values per channel of all processes, 0-d.
        own_offset, own_d_center_weight: What :func:`own_coefficients_backward` returned.

    Returns:
        ``(slope, offset, d_center_weight)``, as :func:`coefficients_backward`.
    """
    device = a.device
    check_device(device)
    if a.dim() != 2 or a.numel() == 0:
        fail(f'a must be (N, C) with elements, got {tuple(a.shape)}.')
    samples, channels = a.shape
    statistic_sums = float32(statistic_sums, 'statistic_sums', device, 2, channels)
    a = float32(a, 'a', device, samples, channels)
    mean = float32(mean, 'mean', device, channels)
    num_values = float32(num_values, 'num_values', device)
    center_weight = float32(center_weight, 'center_weight', device, channels)
    own_offset = float32(own_offset, 'own_offset', device, samples, channels)
    own_d_center_weight = float32(own_d_center_weight, 'own_d_center_weight', device, *_shape(center_weight))
    slope, offset, d_center_weight = torch.empty_like(a), torch.empty_like(a), _like(center_weight, a)
    block_n, block_c = block_of_samples(samples, channels)
    runtime.launch(
        _statistics_backward_kernel, tiling.ceil_div(channels, block_c), device,
        statistic_sums, a, mean, one_bool(condensed, device), num_values, center_weight,
        own_offset, own_d_center_weight, slope, offset, d_center_weight,
        samples, channels, float(pixels), BLOCK_N=block_n, BLOCK_C=block_c,
    )  # fmt: skip
    return slope, offset, d_center_weight


def _launch_backward(
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
    statistic_sums: Tensor | None,
    slope: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Writes ``statistic_sums`` or ``slope``, whichever is given, and returns the rest."""
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
    gradients = empty_gradients(a, weight, neighbor_weight, center_weight, scale_weight)
    block_c = min(tiling.power_of_two(channels), 8)
    block_t = tiling.power_of_two(taps)
    block_n = min(tiling.power_of_two(samples), 64, 4096 // (block_c * block_t))
    runtime.launch(
        _coefficients_backward_kernel, tiling.ceil_div(channels, block_c), device,
        products, sums, a, mean, var, condensed, scale,
        weight, neighbor_weight, center_weight, scale_weight, calibrated_bias,
        statistic_sums, slope, *gradients,
        samples, channels, float(pixels), number(eps, 'eps'),
        SCALING=code, T=taps, BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_T=block_t, num_warps=8,
    )  # fmt: skip
    return gradients


def empty_gradients(
    a: Tensor,
    weight: Tensor,
    neighbor_weight: Tensor | None,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`coefficients_backward` returns after the slope, before it is written."""
    return (
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


def _shape(value: Tensor | None) -> torch.Size:
    """That of what :func:`_like` returns."""
    return torch.Size([0]) if value is None else value.shape
