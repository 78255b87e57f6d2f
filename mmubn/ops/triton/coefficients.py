"""From the moments of a batch to its statistics and to the coefficients of ``apply``: the gate, the statistics and the
coefficients in one launch.

Where the batch is that of several processes, one launch writes what this process sends, and the same kernel, which then
reads what all have sent in the place of the moments, does the rest.
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
from mmubn.ops.triton.similarity import SIMILARITY_PARTS, SimilarityParts, add_similarities, similarity_parts

__all__ = [
    'block_of_samples',
    'coefficients',
    'gated_coefficients',
    'gathered_coefficients',
    'own_part',
    'statistics_coefficients',
]


# --- kernels ----------------------------------------------------------------------------------------------------------


@jit
def batch_statistics(a, v, w_m, channel, samples, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and variance of x + w_m a over the samples. Its instance mean is (1 + w_m) a: the law of total variance, in
    two loops, without cancellation.
    """
    mean = tl.zeros([BLOCK_C], tl.float32)
    var = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mean += tl.sum(load_block(a, n, channel, samples, channels), axis=0)
    mean = (1 + w_m) * mean / samples
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        deviation = (1 + w_m)[None, :] * load_block(a, n, channel, samples, channels) - mean[None, :]
        deviation = tl.where((n < samples)[:, None], deviation, 0.0)
        var += tl.sum(load_block(v, n, channel, samples, channels) + deviation * deviation, axis=0)
    return mean, var / samples


@jit
def merge(gathered, channel, channels, processes, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """What :func:`mmubn.ops.processes.merge` returns of the parts of all processes, (P, 2 C + 3).

    BLOCK_P and BLOCK_C are the same in every process, whatever its batch, and so are the bits.
    """
    length = 2 * channels + 3
    num_values = tl.zeros([BLOCK_P], tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    pairs = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, processes, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        numbers = gathered + p.to(tl.int64) * length + 2 * channels
        num_values += tl.load(numbers, mask=p < processes, other=0.0)
        total += tl.load(numbers + 1, mask=p < processes, other=0.0)
        pairs += tl.load(numbers + 2, mask=p < processes, other=0.0)
    num_values = tl.sum(num_values, axis=0)
    mean = tl.zeros([BLOCK_C], tl.float32)
    var = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, processes, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < processes)[:, None] & (channel < channels)[None, :]
        row = gathered + p.to(tl.int64) * length
        share = tl.load(row + 2 * channels, mask=p < processes, other=0.0) / tl.maximum(num_values, 1.0)
        means = tl.load(row[:, None] + channel[None, :], mask=inside, other=0.0)
        mean += tl.sum(share[:, None] * means, axis=0)
    for start in range(0, processes, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < processes)[:, None] & (channel < channels)[None, :]
        row = gathered + p.to(tl.int64) * length
        share = tl.load(row + 2 * channels, mask=p < processes, other=0.0) / tl.maximum(num_values, 1.0)
        deviation = tl.load(row[:, None] + channel[None, :], mask=inside, other=0.0) - mean[None, :]
        variances = tl.load(row[:, None] + (channels + channel)[None, :], mask=inside, other=0.0)
        terms = share[:, None] * (variances + deviation * deviation)
        var += tl.sum(tl.where(inside, terms, 0.0), axis=0)
    return mean, var, num_values, tl.sum(total, axis=0), tl.sum(pairs, axis=0)


@jit(
    do_not_specialize=['samples', 'parts', 'paired_samples'],
    do_not_specialize_on_alignment=['a', 'v', 'center_weight', 'partial', 'inverse_norms', 'part'],
)
def _own_part_kernel(
    a, v, center_weight, partial, inverse_norms, part, samples, channels, num_values, parts, paired_samples,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``partial`` None: there is no similarity."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < channels
    w_m = tl.zeros([BLOCK_C], tl.float32)
    if center_weight is not None:
        w_m = load_parameter(center_weight, channel, channels)
    mean, var = batch_statistics(a, v, w_m, channel, samples, channels, BLOCK_N, BLOCK_C)
    tl.store(part + channel, mean, mask=live)
    tl.store(part + channels + channel, var, mask=live)
    total = 0.0
    pairs = 0.0
    if partial is not None:
        total, pairs = add_similarities(partial, inverse_norms, parts, paired_samples, BLOCK, BLOCK_M)
    is_first = tl.program_id(0) == 0
    tl.store(part + 2 * channels, num_values, mask=is_first)
    tl.store(part + 2 * channels + 1, total, mask=is_first)
    tl.store(part + 2 * channels + 2, pairs, mask=is_first)


@jit(
    do_not_specialize=['samples', 'processes', 'parts', 'paired_samples'],
    do_not_specialize_on_alignment=[
        'a',
        'v',
        'gathered',
        'mean',
        'var',
        'condensed',
        'center_weight',
        'scale_weight',
        'scale_bias',
        'center',
        'scale',
        'mean_out',
        'var_out',
        'new_mean',
        'new_var',
        'num_values_out',
        'partial',
        'inverse_norms',
        'tau',
        'new_tau',
    ],
)
def _coefficients_kernel(
    a, v, gathered, mean, var, condensed, center_weight, scale_weight, scale_bias,
    center, scale, mean_out, var_out, new_mean, new_var, num_values_out,
    samples, channels, processes, eps, momentum, correction,
    partial, inverse_norms, parts, paired_samples, tau, new_tau, similarity_momentum, threshold,
    SCALING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``mean_out`` None: (mean, var) normalise. Otherwise they are the running statistics, beside the batch's, between
    which ``condensed`` decides; ``tau`` None: as it says, otherwise as the similarity says, and it is written.

    The batch's statistics are those of a and v, or, where it is of several processes, of what these have ``gathered``.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < channels
    is_first = tl.program_id(0) == 0
    mu = load_parameter(mean, channel, channels)
    sigma2 = load_parameter(var, channel, channels)
    w_m = tl.zeros([BLOCK_C], tl.float32)
    if center_weight is not None:
        w_m = load_parameter(center_weight, channel, channels)

    if mean_out is not None:
        if gathered is not None:
            batch_mean, batch_var, num_values, total, pairs = merge(
                gathered, channel, channels, processes, BLOCK_P, BLOCK_C
            )
            # NaN where no process has a value: nothing moves then.
            correction = num_values / tl.where(num_values > 1, num_values - 1, num_values)
            tl.store(num_values_out, num_values, mask=is_first)
        else:
            batch_mean, batch_var = batch_statistics(a, v, w_m, channel, samples, channels, BLOCK_N, BLOCK_C)
            if partial is not None:
                # Every program adds up the same numbers in the same order.
                total, pairs = add_similarities(partial, inverse_norms, parts, paired_samples, BLOCK, BLOCK_M)

        if tau is not None:
            similarity = total / pairs
            old = tl.load(tau)
            new = tl.where(
                is_finite(similarity), (1 - similarity_momentum) * old + similarity_momentum * similarity, old
            )
            take = tl.zeros([BLOCK_C], tl.float32) + new > threshold
            tl.store(new_tau, new, mask=is_first)
            tl.store(condensed, new > threshold, mask=is_first)
        else:
            take = tl.load(condensed) != 0
        unbiased_var = batch_var * correction
        move = take & is_finite(batch_mean) & is_finite(unbiased_var)
        moved_mean = (1 - momentum) * mu + momentum * batch_mean
        moved_var = (1 - momentum) * sigma2 + momentum * unbiased_var
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


# --- launches ---------------------------------------------------------------------------------------------------------


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
    batch = _Batch(v, None, one_bool(condensed, a.device), number(momentum, 'momentum'), num_values)
    rectification = center_weight, scale_weight, scale_bias, scaling
    center, scale, mean, var, new_mean, new_var = _launch_forward(
        a, running_mean, running_var, eps, *rectification, batch
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
    tau = float32(running_similarity, 'running_similarity', x.device)
    new_tau, condensed = torch.empty_like(tau), torch.empty_like(tau, dtype=torch.bool)
    gate = _Gate(
        *similarity_parts(x, a, v, max_samples),
        tau,
        new_tau,
        number(similarity_momentum, 'similarity_momentum'),
        number(threshold, 'threshold'),
    )
    batch = _Batch(v, None, condensed, number(momentum, 'momentum'), num_values)
    rectification = center_weight, scale_weight, scale_bias, scaling
    center, scale, mean, var, new_mean, new_var = _launch_forward(
        a, running_mean, running_var, eps, *rectification, batch, gate
    )
    return center, scale, mean, var, new_mean, new_var, new_tau, condensed


def own_part(
    x: Tensor, a: Tensor, v: Tensor, max_samples: int | None, num_values: int, center_weight: Tensor | None
) -> Tensor:
    """What this process adds to a batch of several: :func:`mmubn.ops.processes.own_part`.

    Args:
        x, a, v, max_samples: As for :func:`~mmubn.ops.triton.similarity.similarity_sums`; ``max_samples`` None: there
            is no similarity, and its sums are 0.
        num_values: Values per channel, N * H * W.
        center_weight: w_m, (C,). None for 0.

    Returns:
        (2 C + 3,), float32.
    """
    device = a.device
    check_device(device)
    if a.dim() != 2 or a.numel() == 0:
        fail(f'a must be (N, C) with elements, got {tuple(a.shape)}.')
    samples, channels = a.shape
    a = float32(a, 'a', device, samples, channels)
    v = float32(v, 'v', device, samples, channels)
    center_weight = float32(center_weight, 'center_weight', device, channels)
    similarities = _NO_SIMILARITY if max_samples is None else similarity_parts(x, a, v, max_samples)
    part = a.new_empty(2 * channels + 3)
    block_n, block_c = block_of_samples(samples, channels)
    runtime.launch(
        _own_part_kernel, tiling.ceil_div(channels, block_c), device,
        a, v, center_weight, similarities.partial, similarities.inverse_norms, part,
        samples, channels, float(num_values), similarities.parts, similarities.samples,
        BLOCK_N=block_n, BLOCK_C=block_c,
        BLOCK=SIMILARITY_PARTS, BLOCK_M=tiling.power_of_two(similarities.samples),
    )  # fmt: skip
    return part


def gathered_coefficients(
    gathered: Tensor,
    a: Tensor,
    running_similarity: Tensor | None,
    similarity_momentum: float,
    threshold: float,
    condensed: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    momentum: float,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    scaling: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`gated_coefficients` for the batch of several processes, from what these have sent.

    Args:
        gathered: The parts of all processes, (P, 2 C + 3): :func:`own_part`, zeros of a process without samples.
        a: Instance means of this process's input, (N, C). N may be 0.
        running_similarity, similarity_momentum, threshold: As for :func:`gated_coefficients`. None, and ``condensed``
            decides.
        condensed: 0-d bool, or None where the similarity decides.
        running_mean, running_var, eps, momentum, center_weight, scale_weight, scale_bias, scaling: As for
            :func:`statistics_coefficients`.

    Returns:
        ``(center, scale, mu, var, running_mean, running_var, num_values, tau, condensed)``: the first six as from
        :func:`statistics_coefficients`; the values per channel of all processes, the new tau and the decision, 0-d.
        The last two have no elements where ``condensed`` was given.
    """
    if (running_similarity is None) == (condensed is None):
        fail('either running_similarity or condensed must be given.')
    if gathered.dim() != 2 or len(gathered) == 0:
        fail(f'gathered must be (P, 2 C + 3) with elements, got {tuple(gathered.shape)}.')
    gathered = float32(gathered, 'gathered', a.device, len(gathered), 2 * a.shape[-1] + 3)
    new_tau, decision, gate = a.new_empty(0), a.new_empty(0, dtype=torch.bool), _NO_GATE
    if running_similarity is not None:
        tau = float32(running_similarity, 'running_similarity', a.device)
        new_tau, decision = torch.empty_like(tau), torch.empty_like(tau, dtype=torch.bool)
        numbers = number(similarity_momentum, 'similarity_momentum'), number(threshold, 'threshold')
        gate = _Gate(*_NO_SIMILARITY, tau, new_tau, *numbers)
    decides = decision if condensed is None else one_bool(condensed, a.device)
    batch = _Batch(None, gathered, decides, number(momentum, 'momentum'), 0)
    rectification = center_weight, scale_weight, scale_bias, scaling
    center, scale, mean, var, new_mean, new_var, num_values = _launch_forward(
        a, running_mean, running_var, eps, *rectification, batch, gate
    )
    return center, scale, mean, var, new_mean, new_var, num_values, new_tau, decision


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
    parts: int
    paired_samples: int
    tau: Tensor | None
    new_tau: Tensor | None
    similarity_momentum: float
    threshold: float


class _Batch(NamedTuple):
    """A training batch. A gate writes ``condensed``."""

    v: Tensor | None  # instance variances, (N, C), of a batch of this process
    gathered: Tensor | None  # (P, 2 C + 3), of a batch of several
    condensed: Tensor | None
    momentum: float
    num_values: int  # of a batch of this process


_NO_SIMILARITY = SimilarityParts(None, None, 1, 1)
_NO_GATE = _Gate(*_NO_SIMILARITY, None, None, 0.0, 0.0)
_NO_BATCH = _Batch(None, None, None, 0.0, 0)


def _launch_forward(
    a: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    scaling: str | None,
    batch: _Batch = _NO_BATCH,
    gate: _Gate = _NO_GATE,
) -> list[Tensor]:
    """center and scale; of a batch also mean and var, which normalise, and the new running ones; of several processes
    also their number of values.
    """
    v, gathered, condensed, momentum, num_values = batch
    device = a.device
    check_device(device)
    # A process may have no samples.
    if a.dim() != 2 or (a.numel() == 0 and gathered is None):
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
    if v is not None or gathered is not None:
        outputs += [torch.empty_like(mean) for _ in range(4)]
    if gathered is None:
        processes = 1
        block_n, block_c = block_of_samples(samples, channels)
    else:
        outputs.append(mean.new_empty(()))
        processes = len(gathered)
        # Whatever the number of samples: see merge.
        block_n, block_c = 8, min(tiling.power_of_two(channels), 32)
    runtime.launch(
        _coefficients_kernel, tiling.ceil_div(channels, block_c), device,
        a, v, gathered, mean, var, condensed, center_weight, scale_weight, scale_bias,
        *outputs, *[None] * (7 - len(outputs)),
        samples, channels, processes, number(eps, 'eps'), momentum, num_values / max(num_values - 1, 1), *gate,
        SCALING=code, BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_P=min(tiling.power_of_two(processes), 64),
        BLOCK=SIMILARITY_PARTS, BLOCK_M=tiling.power_of_two(gate.paired_samples),
    )  # fmt: skip
    return outputs


def block_of_samples(samples: int, channels: int) -> tuple[int, int]:
    """BLOCK_N and BLOCK_C of the kernels that go over (N, C) tensors."""
    block_n = min(tiling.power_of_two(samples), 64)
    return block_n, min(tiling.power_of_two(channels), max(8, 256 // block_n))
