"""UBN's forward and backward as GPU kernels in Triton.

The functions below are the steps of :mod:`mmubn.functional`, and the same notation holds. x is the input,
(N, C, H, W), in float32, float16 or bfloat16; everything that is not x, dy, y or dx is float32, and so is every sum.
A depthwise kernel of k x k has T = k*k taps in row-major order; p + t is the pixel p shifted by tap t, so that the
centre tap shifts by nothing; p = k // 2 is the padding::

    forward    x ──► instance_moments ──► gated_coefficients ──► apply ──► y
    backward   x, dy ──► tap_sums ──► coefficients_backward ──► input_gradient ──► dx

(``statistics_coefficients`` without a similarity, ``coefficients`` with the running statistics.)

Between a layer's input and its output only ``instance_moments``, ``apply``, ``tap_sums`` and ``input_gradient`` touch
data of the size of x: the forward reads x twice (and the samples of the similarity once more) and writes y, the
backward reads x and dy twice and writes dx, which is what BatchNorm moves.

Each function launches its kernels at once. The operator of the same name in ``torch.ops.mmubn`` does the same and is
what ``torch.compile`` can trace. None has a gradient of its own, writes into its input, waits for the device or uses
atomics: the same input gives the same bits.

**Layouts.** One kernel serves NCHW and channels-last. A program owns a block of planes and goes over their pixels. In
NCHW the planes of all samples form one list and pixels are neighbours in memory; in channels-last a block stays within
one sample and planes (channels) are neighbours. Any other layout is copied to one of the two first.

**Tiles.** Where a pixel's k x k neighbourhood is needed, a lane (a thread, for one or two planes) owns a tile of
pixels: it loads them and k // 2 pixels around them once, keeps them in registers and computes all of the tile with
them.

**Reductions** run in two stages where one program per plane would leave the device idle: parts of the map first, then
the parts in the order of their numbers.

Triton is needed to launch, not to import: :func:`supports` says why an input cannot be handled.
"""

# ruff: noqa: N803 - in Triton, names in capitals are compile-time constants

from __future__ import annotations

import functools
import math
from typing import NoReturn

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the kernels below are then plain functions that nothing calls
    triton = tl = None

    def jit(function=None, **_):
        return function or (lambda function: function)


__all__ = [
    'KERNEL_SIZES',
    'apply',
    'coefficients',
    'coefficients_backward',
    'gated_coefficients',
    'input_gradient',
    'instance_moments',
    'similarity_sums',
    'statistics_coefficients',
    'supports',
    'tap_sums',
]

KERNEL_SIZES = (1, 3, 5, 7)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# kind of scaling rectification: what sigmoid(w_v * . + w_b) is taken of
KINDS = {None: 0, 'rectified': 1, 'instance': 2}

# Programs to aim at: some for each of the about 130 multiprocessors that a large GPU has. A reduction pays for more
# programs with more partial results to write and read; a map does not, and gains a shorter tail.
REDUCTION_PROGRAMS = 1024
MAP_PROGRAMS = 2048
# Partial sums of the similarity: as many as one program adds up in one go.
SIMILARITY_PARTS = 1024


# ---------------------------------------------------------------------------------------------------------------------
# Helpers of the kernels
# ---------------------------------------------------------------------------------------------------------------------


@jit
def _place(samples, channels, pixels, parts, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr):
    """Which planes and which part of their pixels belong to this program.

    Returns the part, and for each plane of the block its number n*C + c, whether it exists, and the offset of its first
    pixel. Parts come first in the order of the programs: neighbouring parts share the rows around a tile in the cache.
    """
    planes = channels if CHANNELS_LAST else samples * channels
    blocks = tl.cdiv(planes, BLOCK_P)
    program = tl.program_id(0)
    part = program % parts
    plane = (program // parts) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    live = plane < planes
    if CHANNELS_LAST:
        sample = program // parts // blocks
        index = sample * channels + plane
        first = sample.to(tl.int64) * channels * pixels + plane
    else:
        index = plane
        first = plane.to(tl.int64) * pixels
    return part, index, live, first


@jit
def _place_tiles(samples, channels, height, column_groups, tiles_per_part, parts, CHANNELS_LAST: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """:func:`_place`, then the width and the strides of a map, and the numbers of the part's first tile and of the one
    after its last."""
    width = column_groups * COLUMNS
    part, index, live, first = _place(samples, channels, height * width, parts, CHANNELS_LAST, BLOCK_P)
    stride_w = channels if CHANNELS_LAST else 1
    begin = part * tiles_per_part
    end = tl.minimum(begin + tiles_per_part, tl.cdiv(height, ROWS) * column_groups)
    return part, index, live, first, width, width * stride_w, stride_w, begin, end


@jit
def _lanes(first, live, start, end, height, column_groups, stride_h, stride_w, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr):  # fmt: skip
    """The tiles of ROWS x COLUMNS pixels from number ``start`` on, one for each lane, row by row of the map.

    Returns the row and the column of their first pixels (BLOCK_Q,), the offset of that pixel in each plane and whether
    there is such a tile (BLOCK_P, BLOCK_Q).
    """
    tile = start + tl.arange(0, BLOCK_Q)
    h = tile // column_groups * ROWS
    w = tile % column_groups * COLUMNS
    return h, w, first[:, None] + (h * stride_h + w * stride_w)[None, :], live[:, None] & (tile < end)[None, :]


@jit
def _in_map(live, h, w, height, width, i: tl.constexpr, j: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            TAIL: tl.constexpr):  # fmt: skip
    """Whether the pixel i rows below and j columns right of each lane's first is in the map."""
    # The columns of a tile are in the map, whose width COLUMNS divides, and so are its rows, but for a tail.
    inside = live
    if i < 0:
        inside = inside & (h + i >= 0)[None, :]
    if i >= ROWS or (TAIL and i > 0):
        inside = inside & (h + i < height)[None, :]
    if j < 0:
        inside = inside & (w + j >= 0)[None, :]
    if j >= COLUMNS:
        inside = inside & (w + j < width)[None, :]
    return inside


@jit
def _unpack(value, COLUMNS: tl.constexpr):
    """The columns (BLOCK_P, BLOCK_Q) of a (BLOCK_P, BLOCK_Q, COLUMNS) value; they stay in their registers.

    COLUMNS is 1, 2, 4 or 8: the value is halved until there is a column in each part.
    """
    columns = (value,)
    for level in tl.static_range(3):
        if (COLUMNS >> level) > 1:
            halves = ()
            for i in tl.static_range(1 << level):
                half = columns[i].reshape(value.shape[0], value.shape[1], 2, COLUMNS >> (level + 1))
                halves += tl.split(half.permute(0, 1, 3, 2))
            columns = halves
    flat = ()
    for i in tl.static_range(COLUMNS):
        flat += (columns[i].reshape(value.shape[0], value.shape[1]),)
    return flat


@jit
def _pack(columns, COLUMNS: tl.constexpr):
    """What :func:`_unpack` undoes."""
    for level in tl.static_range(3):
        if (COLUMNS >> level) > 1:
            pairs = ()
            for i in tl.static_range(COLUMNS >> (level + 1)):
                pair = tl.join(columns[2 * i], columns[2 * i + 1])
                if level > 0:
                    pair = pair.permute(0, 1, 3, 2).reshape(pair.shape[0], pair.shape[1], 2 << level)
                pairs += (pair,)
            columns = pairs
    return columns[0].reshape(columns[0].shape[0], columns[0].shape[1], COLUMNS)


@jit
def _load_window(
    pointers, live, h, w, height, width, stride_h, stride_w,
    K: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Each lane's tile and K // 2 pixels around it, row by row: (ROWS + K - 1) * (COLUMNS + K - 1) values, 0 outside.

    In NCHW a lane loads the columns of its tile at once. All loads come before anything that waits for one.
    """
    pad: tl.constexpr = K // 2
    values = ()
    for i in tl.static_range(-pad, ROWS + pad):
        row = pointers + i * stride_h
        for j in tl.static_range(-pad, 0):
            inside = _in_map(live, h, w, height, width, i, j, ROWS, COLUMNS, TAIL)
            values += (tl.load(row + j * stride_w, mask=inside, other=0.0),)
        inside = _in_map(live, h, w, height, width, i, 0, ROWS, COLUMNS, TAIL)
        if CHANNELS_LAST:
            for j in tl.static_range(COLUMNS):
                values += (tl.load(row + j * stride_w, mask=inside, other=0.0),)
        else:
            columns = row[:, :, None] + tl.arange(0, COLUMNS)[None, None, :]
            values += _unpack(tl.load(columns, mask=inside[:, :, None], other=0.0), COLUMNS)
        for j in tl.static_range(COLUMNS, COLUMNS + pad):
            inside = _in_map(live, h, w, height, width, i, j, ROWS, COLUMNS, TAIL)
            values += (tl.load(row + j * stride_w, mask=inside, other=0.0),)
    return values


@jit
def _less_center(window, center, live, h, w, height, width, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 TAIL: tl.constexpr):  # fmt: skip
    """A window in float32, less the center in the map: the padding is a zero of the normalised input, not of x."""
    pad: tl.constexpr = K // 2
    values = ()
    for i in tl.static_range(-pad, ROWS + pad):
        for j in tl.static_range(-pad, COLUMNS + pad):
            value = window[(i + pad) * (COLUMNS + K - 1) + j + pad].to(tl.float32)
            inside = _in_map(live, h, w, height, width, i, j, ROWS, COLUMNS, TAIL)
            values += (value - tl.where(inside, center, 0.0),)
    return values


@jit
def _store_row(pointers, inside, columns, stride_w, CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr):
    """One row of each lane's tile, given as its columns."""
    if CHANNELS_LAST:
        for j in tl.static_range(COLUMNS):
            tl.store(pointers + j * stride_w, columns[j].to(pointers.dtype.element_ty), mask=inside)
    else:
        pointers = pointers[:, :, None] + tl.arange(0, COLUMNS)[None, None, :]
        value = _pack(columns, COLUMNS).to(pointers.dtype.element_ty)
        tl.store(pointers, value, mask=inside[:, :, None])


@jit
def _load_taps(weight, neighbor_weight, channel, live, scale, K: tl.constexpr):
    """The taps of each plane times its scale, T tensors of (BLOCK_P, 1)."""
    taps = ()
    for t in tl.static_range(K * K // 2):
        taps += ((tl.load(neighbor_weight + channel * (K * K - 1) + t, mask=live, other=0.0) * scale)[:, None],)
    taps += ((tl.load(weight + channel, mask=live, other=0.0) * scale)[:, None],)
    for t in tl.static_range(K * K // 2, K * K - 1):
        taps += ((tl.load(neighbor_weight + channel * (K * K - 1) + t, mask=live, other=0.0) * scale)[:, None],)
    return taps


@jit
def _is_finite(value):
    return tl.abs(value) < float('inf')  # false for NaN


# ---------------------------------------------------------------------------------------------------------------------
# Instance moments
# ---------------------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=['samples', 'pixel_groups', 'rounds_per_part', 'parts'])
def _moments_kernel(
    x, mean_out, moment_out, origin_out, samples, channels, pixel_groups, rounds_per_part, parts,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """``origin_out`` None: a and v. Otherwise of each part the mean relative to its origin, the squares, the origin.

    A plane has ``pixel_groups * VECTOR`` pixels, so that its alignment is known; WHOLE says that they are one tile.
    """
    pixels = pixel_groups * VECTOR
    part, index, live, first = _place(samples, channels, pixels, parts, CHANNELS_LAST, BLOCK_P)
    step = channels if CHANNELS_LAST else 1
    begin = part * rounds_per_part * (UNROLL * BLOCK_X)
    end = tl.minimum(begin + rounds_per_part * (UNROLL * BLOCK_X), pixels)
    slot = tl.arange(0, BLOCK_X)

    # All values are taken relative to the mean of the first tile, so that a large mean rounds nothing off.
    pixel = begin + slot
    inside = live[:, None] & (pixel < end)[None, :]
    head = tl.load(x + first[:, None] + (pixel * step)[None, :], mask=inside, other=0.0).to(tl.float32)
    origin = tl.sum(head, axis=1) / tl.minimum(end - begin, BLOCK_X)
    if WHOLE:
        deviation = tl.where((pixel < end)[None, :], head - origin[:, None], 0.0)
        tl.store(mean_out + index, origin, mask=live)
        tl.store(moment_out + index, tl.sum(deviation * deviation, axis=1) / pixels, mask=live)
        return

    # Each slot of the tile follows the mean and the summed squared deviations of its own pixels (Welford), since the
    # first tile may be unlike the others: UNROLL pixels at a time, then, where pixels run out, one at a time. Slot i
    # holds the pixels i, i + BLOCK_X, ... of the part, so the count so far is the same for all slots that still count.
    mean = tl.zeros([BLOCK_P, BLOCK_X], tl.float32)
    moment = tl.zeros([BLOCK_P, BLOCK_X], tl.float32)
    count = 0.0
    full = begin + (end - begin) // (UNROLL * BLOCK_X) * (UNROLL * BLOCK_X)
    for start in range(begin, full, UNROLL * BLOCK_X):
        tiles = ()
        for u in tl.static_range(UNROLL):
            pixel = start + u * BLOCK_X + slot
            tiles += (tl.load(x + first[:, None] + (pixel * step)[None, :], mask=live[:, None], other=0.0),)
        total = tl.zeros([BLOCK_P, BLOCK_X], tl.float32)
        squares = tl.zeros([BLOCK_P, BLOCK_X], tl.float32)
        for u in tl.static_range(UNROLL):
            delta = tiles[u].to(tl.float32) - origin[:, None] - mean
            total += delta
            squares += delta * delta
        count += UNROLL
        shift = total * (1.0 / count)
        mean += shift
        moment += squares - total * shift
    for start in range(full, end, BLOCK_X):
        pixel = start + slot
        inside = live[:, None] & (pixel < end)[None, :]
        tile = tl.load(x + first[:, None] + (pixel * step)[None, :], mask=inside, other=0.0)
        count += 1.0
        delta = tl.where((pixel < end)[None, :], tile.to(tl.float32) - origin[:, None] - mean, 0.0)
        shift = delta * (1.0 / count)
        mean += shift
        moment += (delta - shift) * delta

    # The slots together (Chan).
    counts = tl.maximum(tl.cdiv(end - begin - slot, BLOCK_X), 0).to(tl.float32)[None, :]
    total = (end - begin).to(tl.float32)
    center = tl.sum(mean * counts, axis=1) / total
    deviation = mean - center[:, None]
    squares = tl.sum(moment + counts * deviation * deviation, axis=1)
    if origin_out is not None:
        index = part.to(tl.int64) * (samples * channels) + index
        tl.store(origin_out + index, origin, mask=live)
    else:
        center += origin
        squares /= total
    tl.store(mean_out + index, center, mask=live)
    tl.store(moment_out + index, squares, mask=live)


@jit(do_not_specialize=['size', 'pixels', 'pixels_per_part', 'parts'])
def _merge_moments_kernel(
    means, moments, origins, a, v, size, pixels, pixels_per_part, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """Chan's rule over the parts, relative to the origin of the first."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = index < size
    origin = tl.load(origins + index, mask=live, other=0.0)
    mean = tl.zeros([BLOCK], tl.float32)
    offset = index.to(tl.int64)
    for part in range(parts):
        share = tl.minimum(pixels - part * pixels_per_part, pixels_per_part) / pixels
        shift = tl.load(origins + offset, mask=live, other=0.0) - origin
        mean += share * (shift + tl.load(means + offset, mask=live, other=0.0))
        offset += size
    squares = tl.zeros([BLOCK], tl.float32)
    offset = index.to(tl.int64)
    for part in range(parts):
        count = tl.minimum(pixels - part * pixels_per_part, pixels_per_part).to(tl.float32)
        shift = tl.load(origins + offset, mask=live, other=0.0) - origin
        deviation = shift + tl.load(means + offset, mask=live, other=0.0) - mean
        squares += tl.load(moments + offset, mask=live, other=0.0) + count * deviation * deviation
        offset += size
    tl.store(a + index, origin + mean, mask=live)
    tl.store(v + index, squares / pixels, mask=live)


# ---------------------------------------------------------------------------------------------------------------------
# Similarity and gate
# ---------------------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=['samples', 'rounds'])
def _similarity_kernel(
    x, a, v, inverse_norms, partial, samples, channels, pixels, size, rounds,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of ``(sum_n f_n / ||f_n||)^2`` over this program's positions of a sample: C*H*W, in the order of memory.

    ``||f_n||^2 = HW sum_c (v + a^2)``: of a, v every program computes all norms, which is less than a launch costs.
    Each has its row of ``inverse_norms``: 1 / ||f_n||, 0 for a sample of zeros, NaN where the norm is not finite.
    """
    program = tl.program_id(0)
    inverse_norms += program.to(tl.int64) * samples
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        squares = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for first in range(0, channels, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            mean = _load_rows(a, n, channel, samples, channels)
            squares += _load_rows(v, n, channel, samples, channels) + mean * mean
        square = tl.sum(squares, axis=1) * pixels
        # Below the smallest normal number the reciprocal of the root is infinite on the device: such a sample is zeros.
        inverse = tl.where(square >= 1.1754943508222875e-38, tl.rsqrt(square), 0.0)
        inverse = tl.where(_is_finite(square), inverse, float('nan'))
        tl.store(inverse_norms + n, inverse, mask=n < samples)
    # A thread reads what other threads of its program wrote.
    tl.debug_barrier()

    begin = program.to(tl.int64) * rounds * BLOCK
    squares = tl.zeros([BLOCK], tl.float32)
    for r in range(rounds):
        position = begin + r * BLOCK + tl.arange(0, BLOCK)
        u = tl.zeros([BLOCK], tl.float32)
        for start in range(0, samples, UNROLL):
            tiles = ()
            for i in tl.static_range(UNROLL):
                inside = (position < size) & (start + i < samples)
                sample = start + i
                tiles += (tl.load(x + sample.to(tl.int64) * size + position, mask=inside, other=0.0),)
            for i in tl.static_range(UNROLL):
                u += tiles[i].to(tl.float32) * tl.load(inverse_norms + start + i, mask=start + i < samples, other=0.0)
        squares += u * u
    tl.store(partial + program, tl.sum(squares, axis=0))


@jit
def _add_similarities(partial, inverse_norms, parts, samples, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of the cosines of all ordered pairs of different samples, and their number."""
    part = tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    # A sample of zeros is not among its own pairs; NaN > 0 is false, and the sum is NaN then anyway.
    nonzero = tl.load(inverse_norms + n, mask=n < samples, other=0.0) > 0
    total = tl.sum(tl.load(partial + part, mask=part < parts, other=0.0), axis=0)
    total -= tl.sum(nonzero.to(tl.float32), axis=0)
    return total, samples.to(tl.float32) * (samples - 1).to(tl.float32)


@jit(do_not_specialize=['parts', 'samples'])
def _similarity_sums_kernel(
    partial, inverse_norms, sums, parts, samples, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    total, pairs = _add_similarities(partial, inverse_norms, parts, samples, BLOCK, BLOCK_N)
    tl.store(sums, total)
    tl.store(sums + 1, pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Coefficients, forward
# ---------------------------------------------------------------------------------------------------------------------


@jit
def _load_rows(pointer, n, channel, samples, channels):
    """(BLOCK_N, BLOCK_C) values of an (N, C) tensor; 0 outside."""
    inside = (n < samples)[:, None] & (channel < channels)[None, :]
    return tl.load(pointer + n.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)


@jit
def _store_rows(pointer, n, channel, samples, channels, value):
    inside = (n < samples)[:, None] & (channel < channels)[None, :]
    tl.store(pointer + n.to(tl.int64)[:, None] * channels + channel[None, :], value, mask=inside)


@jit
def _load_parameter(pointer, channel, channels):
    return tl.load(pointer + channel, mask=channel < channels, other=0.0)


@jit(do_not_specialize=['samples', 'parts', 'paired_samples'])
def _coefficients_kernel(
    a, v, mean, var, condensed, center_weight, scale_weight, scale_bias,
    center, scale, mean_out, var_out, new_mean, new_var,
    samples, channels, eps, momentum, correction,
    partial, inverse_norms, tau, new_tau, parts, paired_samples, similarity_momentum, threshold,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``v`` None: (mean, var) normalise. Otherwise they are the running statistics, beside the batch's, between which
    ``condensed`` decides; ``partial`` None: as it says, otherwise as the similarity says, and it is written.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < channels
    mu = _load_parameter(mean, channel, channels)
    sigma2 = _load_parameter(var, channel, channels)
    w_m = tl.zeros([BLOCK_C], tl.float32)
    if center_weight is not None:
        w_m = _load_parameter(center_weight, channel, channels)

    if v is not None:
        # The instance mean of x + w_m a is (1 + w_m) a: the law of total variance, in two loops, without cancellation.
        batch_mean = tl.zeros([BLOCK_C], tl.float32)
        batch_var = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, samples, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            batch_mean += tl.sum(_load_rows(a, n, channel, samples, channels), axis=0)
        batch_mean = (1 + w_m) * batch_mean / samples
        for start in range(0, samples, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            deviation = (1 + w_m)[None, :] * _load_rows(a, n, channel, samples, channels) - batch_mean[None, :]
            deviation = tl.where((n < samples)[:, None], deviation, 0.0)
            batch_var += tl.sum(_load_rows(v, n, channel, samples, channels) + deviation * deviation, axis=0)
        batch_var /= samples

        if partial is not None:
            # Every program adds up the same numbers in the same order.
            total, pairs = _add_similarities(partial, inverse_norms, parts, paired_samples, BLOCK, BLOCK_M)
            similarity = total / pairs
            old = tl.load(tau)
            new = tl.where(
                _is_finite(similarity), (1 - similarity_momentum) * old + similarity_momentum * similarity, old
            )
            take = tl.zeros([BLOCK_C], tl.float32) + new > threshold
            is_first = tl.program_id(0) == 0
            tl.store(new_tau, new, mask=is_first)
            tl.store(condensed, new > threshold, mask=is_first)
        else:
            take = tl.load(condensed) != 0
        move = take & _is_finite(batch_mean) & _is_finite(batch_var)
        moved_mean = (1 - momentum) * mu + momentum * batch_mean
        moved_var = (1 - momentum) * sigma2 + momentum * (batch_var * correction)
        tl.store(new_mean + channel, tl.where(move, moved_mean, mu), mask=live)
        tl.store(new_var + channel, tl.where(move, moved_var, sigma2), mask=live)
        mu = tl.where(take, batch_mean, mu)
        sigma2 = tl.where(take, batch_var, sigma2)
        tl.store(mean_out + channel, mu, mask=live)
        tl.store(var_out + channel, sigma2, mask=live)

    s = tl.rsqrt(sigma2 + eps)
    if KIND != 0:
        w_v = _load_parameter(scale_weight, channel, channels)[None, :]
        w_b = _load_parameter(scale_bias, channel, channels)[None, :]
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mean_n = _load_rows(a, n, channel, samples, channels)
        center_n = mu[None, :] - w_m[None, :] * mean_n
        scale_n = tl.zeros([BLOCK_N, BLOCK_C], tl.float32) + s[None, :]
        if KIND == 1:
            scale_n *= tl.sigmoid(w_v * ((mean_n - center_n) * s[None, :]) + w_b)
        elif KIND == 2:
            scale_n *= tl.sigmoid(w_v * mean_n + w_b)
        _store_rows(center, n, channel, samples, channels, center_n)
        _store_rows(scale, n, channel, samples, channels, scale_n)


# ---------------------------------------------------------------------------------------------------------------------
# The map forward
# ---------------------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=['samples', 'height', 'column_groups', 'tiles_per_part', 'parts'])
def _apply_kernel(
    x, center, scale, weight, neighbor_weight, bias, y,
    samples, channels, height, column_groups, tiles_per_part, parts,
    SAMPLE_BIAS: tl.constexpr, K: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    _, index, plane_live, first, width, stride_h, stride_w, begin, end = _place_tiles(
        samples, channels, height, column_groups, tiles_per_part, parts, CHANNELS_LAST, ROWS, COLUMNS, BLOCK_P
    )
    channel = index % channels
    c = tl.load(center + index, mask=plane_live, other=0.0)[:, None]
    taps = _load_taps(
        weight, neighbor_weight, channel, plane_live, tl.load(scale + index, mask=plane_live, other=0.0), K
    )
    beta = tl.load(bias + (index if SAMPLE_BIAS else channel), mask=plane_live, other=0.0)[:, None]

    for start in range(begin, end, BLOCK_Q):
        h, w, pixel, live = _lanes(
            first, plane_live, start, end, height, column_groups, stride_h, stride_w, ROWS, COLUMNS, BLOCK_Q
        )
        window = _load_window(
            x + pixel, live, h, w, height, width, stride_h, stride_w, K, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )
        centred = _less_center(window, c, live, h, w, height, width, K, ROWS, COLUMNS, TAIL)
        for r in tl.static_range(ROWS):
            values = ()
            for j in tl.static_range(COLUMNS):
                value = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32) + beta
                for t in tl.static_range(K * K):
                    value += taps[t] * centred[(r + t // K) * (COLUMNS + K - 1) + j + t % K]
                values += (value,)
            inside = _in_map(live, h, w, height, width, r, 0, ROWS, COLUMNS, TAIL)
            _store_row(y + pixel + r * stride_h, inside, values, stride_w, CHANNELS_LAST, COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@jit
def _sum_with_neighbor(window, shift_h: tl.constexpr, shift_w: tl.constexpr, h, w, height, width, K: tl.constexpr,
                       ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """Of the pixels of a tile the sum of those whose neighbor, shifted so, is in the map; a window is 0 outside it."""
    pad: tl.constexpr = K // 2
    total = tl.zeros(window[0].shape, tl.float32)
    # The inner pixels come first: up to the border, sums for different shifts are the same, and computed once.
    for column in tl.static_range(pad, COLUMNS + pad):
        column_total = tl.zeros(window[0].shape, tl.float32)
        for row in tl.static_range(pad, ROWS + pad):
            value = window[(row % ROWS + pad) * (COLUMNS + K - 1) + column % COLUMNS + pad]
            if row % ROWS + shift_h < 0:
                value = tl.where((h + (row % ROWS + shift_h) >= 0)[None, :], value, 0.0)
            if row % ROWS + shift_h >= ROWS or (TAIL and shift_h > 0):
                value = tl.where((h + (row % ROWS + shift_h) < height)[None, :], value, 0.0)
            column_total += value
        if column % COLUMNS + shift_w < 0:
            column_total = tl.where((w + (column % COLUMNS + shift_w) >= 0)[None, :], column_total, 0.0)
        if column % COLUMNS + shift_w >= COLUMNS:
            column_total = tl.where((w + (column % COLUMNS + shift_w) < width)[None, :], column_total, 0.0)
        total += column_total
    return total


@jit(do_not_specialize=['samples', 'height', 'column_groups', 'tiles_per_part', 'parts'])
def _tap_sums_kernel(
    x, dy, center, g_out, s_out,
    samples, channels, height, column_groups, tiles_per_part, parts,
    K: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """With q = p + t, ``G_t = sum_q (x(q) - center) dy(q - t)``: x is loaded once, and outside the map dy is just 0."""
    part, index, plane_live, first, width, stride_h, stride_w, begin, end = _place_tiles(
        samples, channels, height, column_groups, tiles_per_part, parts, CHANNELS_LAST, ROWS, COLUMNS, BLOCK_P
    )
    c = tl.load(center + index, mask=plane_live, other=0.0)[:, None]
    g = ()
    s = ()
    for _ in tl.static_range(K * K):
        g += (tl.zeros([BLOCK_P, BLOCK_Q], tl.float32),)
        s += (tl.zeros([BLOCK_P, BLOCK_Q], tl.float32),)

    for start in range(begin, end, BLOCK_Q):
        h, w, pixel, live = _lanes(
            first, plane_live, start, end, height, column_groups, stride_h, stride_w, ROWS, COLUMNS, BLOCK_Q
        )
        tile = _load_window(
            x + pixel, live, h, w, height, width, stride_h, stride_w, 1, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )
        raw = _load_window(
            dy + pixel, live, h, w, height, width, stride_h, stride_w, K, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )
        centred = _less_center(tile, c, live, h, w, height, width, 1, ROWS, COLUMNS, TAIL)
        window = ()
        for i in tl.static_range((ROWS + K - 1) * (COLUMNS + K - 1)):
            window += (raw[i].to(tl.float32),)

        new_g = ()
        new_s = ()
        for i in tl.static_range(K):
            for j in tl.static_range(K):
                total = g[i * K + j]
                for r in tl.static_range(ROWS):
                    for column in tl.static_range(COLUMNS):
                        neighbor = window[(r + K - 1 - i) * (COLUMNS + K - 1) + column + K - 1 - j]
                        total += centred[r * COLUMNS + column] * neighbor
                new_g += (total,)
                new_s += (
                    s[i * K + j]
                    + _sum_with_neighbor(window, i - K // 2, j - K // 2, h, w, height, width, K, ROWS, COLUMNS, TAIL),
                )
        g = new_g
        s = new_s

    index = (part.to(tl.int64) * (samples * channels) + index) * (K * K)
    for t in tl.static_range(K * K):
        tl.store(g_out + index + t, tl.sum(g[t], axis=1), mask=plane_live)
        tl.store(s_out + index + t, tl.sum(s[t], axis=1), mask=plane_live)


@jit(do_not_specialize=['size', 'parts'])
def _merge_tap_sums_kernel(g_parts, s_parts, g, s, size, parts, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < size
    offset = index
    g_total = tl.zeros([BLOCK], tl.float32)
    s_total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        g_total += tl.load(g_parts + offset, mask=live, other=0.0)
        s_total += tl.load(s_parts + offset, mask=live, other=0.0)
        offset += size
    tl.store(g + index, g_total, mask=live)
    tl.store(s + index, s_total, mask=live)


@jit(do_not_specialize=['samples'])
def _coefficients_backward_kernel(
    g, s, a, mean, var, condensed, scale, weight, neighbor_weight, center_weight, scale_weight, calibrated_bias,
    slope, offset, d_weight, d_bias, d_neighbor_weight, d_center_weight, d_scale_weight, d_scale_bias,
    samples, channels, pixels, eps,
    KIND: tl.constexpr, T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Names: ``d_z`` is the gradient of z; r = sigmoid(.); m = (1 + w_m) a; rstd = 1 / sqrt(var + eps)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < channels
    tap = tl.arange(0, BLOCK_T)
    is_centre = (tap == T // 2)[None, :]
    taps = tl.where(is_centre, _load_parameter(weight, channel, channels)[:, None], 0.0)
    if T > 1:
        neighbor_index = channel[:, None] * (T - 1) + tl.where(tap < T // 2, tap, tap - 1)[None, :]
        is_neighbor = live[:, None] & (tap < T)[None, :] & (tap != T // 2)[None, :]
        taps += tl.load(neighbor_weight + neighbor_index, mask=is_neighbor, other=0.0)
    taps = taps[None, :, :]
    mu = _load_parameter(mean, channel, channels)[None, :]
    inv_std = tl.rsqrt(_load_parameter(var, channel, channels) + eps)
    rstd = inv_std[None, :]
    w_m = tl.zeros([1, BLOCK_C], tl.float32)
    if center_weight is not None:
        w_m = _load_parameter(center_weight, channel, channels)[None, :]

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
        g_n = tl.load(g + tap_rows, mask=tap_inside, other=0.0)
        s_n = tl.load(s + tap_rows, mask=tap_inside, other=0.0)
        a_n = tl.load(a + row, mask=inside, other=0.0)
        scale_n = tl.load(scale + row, mask=inside, other=0.0)

        r = scale_n / rstd
        d_scale = tl.sum(taps * g_n, axis=2)
        d_center = -scale_n * tl.sum(taps * s_n, axis=2)
        d_r = d_scale * rstd
        d_rstd = d_scale * r
        d_bias_n = tl.sum(tl.where(is_centre[None, :, :], s_n, 0.0), axis=2)
        if calibrated_bias is not None:
            d_r += d_bias_n * _load_parameter(calibrated_bias, channel, channels)[None, :]
            d_bias_n *= r

        # center = mu - w_m a
        d_mu = d_center
        d_w_m = -d_center * a_n
        d_a = -w_m * d_center
        if KIND != 0:
            w_v = _load_parameter(scale_weight, channel, channels)[None, :]
            d_logit = d_r * r * (1 - r)
            d_stat = d_logit * w_v
            sum_w_b += tl.sum(d_logit, axis=0)
            if KIND == 1:
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
        sum_weight += tl.sum(scale_n[:, :, None] * g_n, axis=0)
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
    if KIND != 0:
        tl.store(d_scale_weight + channel, sum_w_v, mask=live)
        tl.store(d_scale_bias + channel, sum_w_b, mask=live)


@jit(do_not_specialize=['samples', 'height', 'column_groups', 'tiles_per_part', 'parts'])
def _input_gradient_kernel(
    dy, x, a, scale, weight, neighbor_weight, slope, offset, dx,
    samples, channels, height, column_groups, tiles_per_part, parts,
    K: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    _, index, plane_live, first, width, stride_h, stride_w, begin, end = _place_tiles(
        samples, channels, height, column_groups, tiles_per_part, parts, CHANNELS_LAST, ROWS, COLUMNS, BLOCK_P
    )
    mean = tl.load(a + index, mask=plane_live, other=0.0)[:, None]
    slope_n = tl.load(slope + index, mask=plane_live, other=0.0)[:, None]
    offset_n = tl.load(offset + index, mask=plane_live, other=0.0)[:, None]
    scale_n = tl.load(scale + index, mask=plane_live, other=0.0)
    taps = _load_taps(weight, neighbor_weight, index % channels, plane_live, scale_n, K)

    for start in range(begin, end, BLOCK_Q):
        h, w, pixel, live = _lanes(
            first, plane_live, start, end, height, column_groups, stride_h, stride_w, ROWS, COLUMNS, BLOCK_Q
        )
        tile = _load_window(
            x + pixel, live, h, w, height, width, stride_h, stride_w, 1, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )
        window = _load_window(
            dy + pixel, live, h, w, height, width, stride_h, stride_w, K, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )
        for r in tl.static_range(ROWS):
            values = ()
            for j in tl.static_range(COLUMNS):
                value = slope_n * (tile[r * COLUMNS + j].to(tl.float32) - mean) + offset_n
                for t in tl.static_range(K * K):
                    # p - t is the mirrored tap
                    neighbor = window[(r + t // K) * (COLUMNS + K - 1) + j + t % K]
                    value += taps[K * K - 1 - t] * neighbor.to(tl.float32)
                values += (value,)
            inside = _in_map(live, h, w, height, width, r, 0, ROWS, COLUMNS, TAIL)
            _store_row(dx + pixel + r * stride_h, inside, values, stride_w, CHANNELS_LAST, COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# Launches: inputs and block sizes
# ---------------------------------------------------------------------------------------------------------------------


def _interpreted() -> bool:
    """Whether the kernels were defined for Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    return triton is not None and not isinstance(_apply_kernel, triton.JITFunction)


def supports(x: Tensor, kernel_size: int = 1) -> str | None:
    """Why these kernels cannot handle ``x`` with a ``kernel_size`` x ``kernel_size`` kernel; None where they can.

    An input of any strides is fine: one that is dense in neither layout is copied first.
    """
    if triton is None:
        return 'Triton is not installed'
    if x.dim() != 4:
        return f'the kernels take (N, C, H, W), got {x.dim()} dimensions'
    if x.dtype not in DTYPES:
        return f'the kernels take float32, float16 and bfloat16, got {x.dtype}'
    if kernel_size not in KERNEL_SIZES:
        return f'the kernels take kernel sizes 1, 3, 5 and 7, got {kernel_size}'
    if x.numel() == 0:
        return 'the kernels take an input with elements'
    # Planes, and offsets within a sample, are counted in int32, a block beyond the end included; x may be larger.
    samples, channels, height, width = x.shape
    if max(samples * channels, channels * max(height * width, 7 * 7)) >= 2**30:
        return f'the kernels take samples of fewer than 2^30 values and as many planes, got {tuple(x.shape)}'
    return _lacking(x.device)


def _lacking(device: torch.device) -> str | None:
    """Why kernels cannot be launched for tensors of this device; None where they can."""
    if triton is None:
        return 'Triton is not installed'
    if _interpreted():
        return None
    if device.type != 'cuda' or torch.version.hip is not None:
        return f'the kernels take tensors on an NVIDIA GPU, got one on {device}'
    # The properties, not get_device_capability: torch.compile takes only these for a constant.
    if torch.cuda.get_device_properties(device).major < 8:
        return 'the kernels need a GPU of compute capability 8.0 or later'
    return None


def _check_device(device: torch.device) -> None:
    if (problem := _lacking(device)) is not None:
        _fail(f'{problem}.')


def _fail(message: str) -> NoReturn:
    raise ValueError(f'mmubn kernels: {message}')


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor) -> Tensor:
    """``x`` in NCHW or channels-last memory, whichever is nearer to its strides."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    near = x.dim() == 4 and x.stride(1) == 1 and x.stride(3) != 1
    return x.contiguous(memory_format=torch.channels_last if near else torch.contiguous_format)


def _input(x: Tensor, kernel_size: int = 1) -> Tensor:
    if (problem := supports(x, kernel_size)) is not None:
        _fail(f'{problem}.')
    return _dense(x)


def _beside(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` in the memory format of the dense ``x``."""
    for name in ('shape', 'dtype', 'device'):
        if getattr(dy, name) != getattr(x, name):
            _fail(f'dy must have the {name} of x, {getattr(x, name)}, got {getattr(dy, name)}.')
    return dy.contiguous(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)


def _float32(value: Tensor | None, name: str, device: torch.device, *shape: int) -> Tensor | None:
    """A coefficient as the kernels read it."""
    if value is None:
        return None
    if value.shape != shape:
        _fail(f'{name} must have shape {shape}, got {tuple(value.shape)}.')
    if value.device != device:
        _fail(f'{name} must be on {device}, got {value.device}.')
    # Mostly there is nothing to do, and two calls that do nothing are a third of this function's time.
    if value.dtype is torch.float32 and value.is_contiguous():
        return value
    return value.float().contiguous()


def _condensed(condensed: Tensor | None, device: torch.device) -> Tensor | None:
    if condensed is not None and (condensed.dtype != torch.bool or condensed.numel() != 1):
        _fail(f'condensed must be one bool, got {condensed.dtype} of shape {tuple(condensed.shape)}.')
    if condensed is not None and condensed.device != device:
        _fail(f'condensed must be on {device}, got {condensed.device}.')
    return condensed


def _kind(kind: str | None, scale_weight: Tensor | None, scale_bias: Tensor | None) -> int:
    if kind not in KINDS:
        _fail(f'kind must be None, rectified or instance, got {kind!r}.')
    if not (kind is None) == (scale_weight is None) == (scale_bias is None):
        _fail('kind, scale_weight and scale_bias come together.')
    return KINDS[kind]


def _number(value: float, name: str) -> float:
    if not isinstance(value, int | float):  # float() of a tensor would wait for the device
        _fail(f'{name} must be a number, got {type(value).__name__}.')
    return float(value)


def _kernel_size(neighbor_weight: Tensor | None) -> int:
    taps = 1 if neighbor_weight is None else neighbor_weight.shape[-1] + 1
    if taps > 1 and (neighbor_weight.dim() != 2 or math.isqrt(taps) ** 2 != taps):
        _fail(f'neighbor_weight must be (C, k*k - 1), got {tuple(neighbor_weight.shape)}.')
    return math.isqrt(taps)


def _power(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length()


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _split(rounds: int, groups: int, programs: int) -> tuple[int, int]:
    """How many of its rounds a program of each group takes, and in how many parts that is, to have enough programs."""
    rounds_per_part = _ceil(rounds, min(rounds, _ceil(programs, groups)))
    return rounds_per_part, _ceil(rounds, rounds_per_part)


# What Triton compiled for arguments seen before; emptied when it has grown to this many.
_launched: dict[tuple, object] = {}
MOST_LAUNCHED = 2**14


def _launch(kernel, programs: int, device: torch.device, *arguments, num_warps: int = 4, **constants) -> None:
    """Launches ``kernel``, whose parameters are ``arguments`` and then ``constants``, in their order.

    For arguments as in an earlier launch (the same numbers, tensors of the same alignment, the first of the same dtype:
    the others have that, or float32) it takes what Triton compiled then: to let Triton find it again takes the host
    longer than a small map takes the device.
    """
    if device.type != 'cuda':
        # the interpreter
        kernel[(programs,)](*arguments, num_warps=num_warps, **constants)
        return
    index = torch.cuda.current_device()
    if device.index != index:
        with torch.cuda.device(device):
            _launch(kernel, programs, device, *arguments, num_warps=num_warps, **constants)
        return
    traits = [value.data_ptr() % 16 if isinstance(value, Tensor) else value for value in arguments]
    key = (kernel.fn, index, arguments[0].dtype, num_warps, *constants.values(), *traits)
    compiled = _launched.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments, *constants.values())
        return
    if len(_launched) >= MOST_LAUNCHED:
        _launched.clear()
    _launched[key] = kernel[(programs,)](*arguments, num_warps=num_warps, **constants)


class _Tiling:
    """How programs and lanes share the planes and the pixels of a map in a kernel that needs a pixel's neighbourhood.

    A lane owns a tile of ROWS x COLUMNS pixels at a time: the larger the tile, the fewer values around it are loaded
    for other lanes too; all of it is in registers. In NCHW, COLUMNS is what one load of up to 16 bytes takes. In
    channels-last a lane has two channels, or one for a large kernel. COLUMNS divides the width.
    With k = 1 there is no neighbourhood: the map is one long row.
    """

    def __init__(self, shape: torch.Size, channels_last: bool, bytes_each: int, k: int, programs: int) -> None:
        samples, channels, height, width = shape
        if k == 1:
            height, width = 1, height * width
        planes = channels if channels_last else samples * channels
        if channels_last:
            # of those that need about as many loads for a value the one of the tallest tile
            columns = next(c for c in ((4, 5, 6, 7, 3, 2, 1) if k <= 3 else (2, 1)) if width % c == 0)
            vector = {1: 16 // bytes_each, 3: 2, 5: 2, 7: 1}[k]
        else:
            # No more than one load takes: columns stored one by one would each write to every sector of a row.
            columns = math.gcd(width, 16 // bytes_each if k <= 3 else 4 if k == 5 else 2)
            vector = 1
        # Triton compiles larger tiles in NCHW slowly.
        rows = min(8 if k <= 3 else 4, (49 if channels_last else 32) // columns)
        # A tail costs more than a tile a little lower.
        rows = next((r for r in range(rows, rows // 2, -1) if height % r == 0), min(rows, height))

        column_groups = width // columns
        tiles = _ceil(height, rows) * column_groups
        if channels_last:
            block_p = min(_power(channels), (128 if k <= 3 else 64) // bytes_each)
            block_q = min(_power(tiles), 128 * vector // block_p)
        else:
            # Few lanes for a plane leave few idle and little to add up, but neighbours should fill a sector of memory.
            choices = [lanes for lanes in (8, 16, 32) if lanes * columns * bytes_each >= 32]
            block_q = min(_power(tiles), min(choices, key=lambda lanes: (_ceil(tiles, lanes) * lanes, lanes)))
            block_p = min(_power(planes), 128 // block_q)
        num_warps = max(1, block_p * block_q // (32 * vector))

        groups = _ceil(planes, block_p) * (samples if channels_last else 1)
        rounds_per_part, self.parts = _split(_ceil(tiles, block_q), groups, programs)
        self.programs = groups * self.parts
        self.arguments = (samples, channels, height, column_groups, rounds_per_part * block_q, self.parts)
        self.constants = dict(
            K=k,
            CHANNELS_LAST=channels_last,
            ROWS=rows,
            COLUMNS=columns,
            TAIL=height % rows > 0,
            BLOCK_P=block_p,
            BLOCK_Q=block_q,
            num_warps=num_warps,
        )


@functools.lru_cache(maxsize=4096)
def _cached_tiling(*arguments) -> _Tiling:
    return _Tiling(*arguments)


def _tiling(x: Tensor, k: int, programs: int) -> _Tiling:
    return _cached_tiling(x.shape, _is_channels_last(x), x.element_size(), k, programs)


# ---------------------------------------------------------------------------------------------------------------------
# The functions
# ---------------------------------------------------------------------------------------------------------------------


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of every sample.

    ``a[n, c] = mean_hw x[n, c]`` and ``v[n, c] = mean_hw (x[n, c] - a[n, c])^2``, in one read of x.

    Args:
        x: Input, (N, C, H, W).

    Returns:
        ``(a, v)``, each (N, C), float32.
    """
    x = _input(x)
    samples, channels, height, width = x.shape
    pixels = height * width
    channels_last = _is_channels_last(x)
    planes = channels if channels_last else samples * channels
    # 32 values for each lane of a program: all of a small plane, or so many tiles of a large one
    if channels_last:
        block_p = min(_power(channels), 128 // x.element_size())
        block_x = min(_power(pixels), 4096 // block_p)
    else:
        block_x = min(_power(pixels), 4096)
        block_p = min(_power(planes), 4096 // block_x)
    whole = pixels <= block_x
    unroll = 1 if whole else 4
    block_x //= unroll
    groups = _ceil(planes, block_p) * (samples if channels_last else 1)
    rounds_per_part, parts = _split(_ceil(pixels, unroll * block_x), groups, REDUCTION_PROGRAMS)
    vector = 1 if channels_last else math.gcd(pixels, 16 // x.element_size())

    a = x.new_empty((samples, channels), dtype=torch.float32)
    v = torch.empty_like(a)
    outputs = (a, v, None) if parts == 1 else a.new_empty((3, parts, samples, channels)).unbind()
    _launch(
        _moments_kernel, groups * parts, x.device,
        x, *outputs, samples, channels, pixels // vector, rounds_per_part, parts,
        CHANNELS_LAST=channels_last, VECTOR=vector, WHOLE=whole, UNROLL=unroll, BLOCK_P=block_p, BLOCK_X=block_x,
    )  # fmt: skip
    if parts > 1:
        size = samples * channels
        _launch(
            _merge_moments_kernel, _ceil(size, 128), x.device,
            *outputs, a, v, size, pixels, rounds_per_part * unroll * block_x, parts, BLOCK=128,
        )  # fmt: skip
    return a, v


def _similarity_parts(x: Tensor, a: Tensor, v: Tensor, max_samples: int) -> tuple[Tensor, Tensor, int, int]:
    """Partial sums of ``||sum_n f_n / ||f_n|| ||^2``, the reciprocal norms, and how many there are of each."""
    x = _input(x)
    if max_samples < 1:
        _fail(f'max_samples must be at least 1, got {max_samples}.')
    samples, channels, height, width = x.shape
    a = _float32(a, 'a', x.device, samples, channels)
    v = _float32(v, 'v', x.device, samples, channels)
    samples = min(samples, max_samples)
    size = channels * height * width
    block = min(_power(size), 1024)
    # Each program reads a and v besides its share of x: the smaller the map, the fewer programs.
    most = min(SIMILARITY_PARTS, max(64, height * width * x.element_size() // 16))
    rounds = _ceil(_ceil(size, block), most)
    parts = _ceil(size, block * rounds)
    inverse_norms = a.new_empty((parts, samples))
    partial = a.new_empty(parts)
    block_n = min(_power(samples), 16)
    _launch(
        _similarity_kernel, parts, x.device,
        x, a, v, inverse_norms, partial, samples, channels, float(height * width), size, rounds,
        UNROLL=min(block_n, 8), BLOCK=block, BLOCK_N=block_n, BLOCK_C=min(_power(channels), 2048 // block_n),
    )  # fmt: skip
    return partial, inverse_norms, parts, samples


def similarity_sums(x: Tensor, a: Tensor, v: Tensor, max_samples: int) -> Tensor:
    """Sum of the cosine similarities over all ordered pairs of different samples, and the number of these pairs.

    ``||sum_n f_n / ||f_n|| ||^2 - #{n: ||f_n|| > 0}`` over ``n' (n' - 1)`` pairs, with f_n the flattened sample n,
    ``||f_n||^2 = HW sum_c (v + a^2)``, and n the first ``n' = min(N, max_samples)`` samples. A sample of zeros has
    similarity 0 to every other.

    Args:
        x: Input, (N, C, H, W). Its first n' samples are read.
        a: Instance means of x, (N, C).
        v: Instance variances of x, (N, C).
        max_samples: At least 1.

    Returns:
        ``(sum, number)``, (2,), float32. The sum is NaN where a norm is not finite.
    """
    partial, inverse_norms, parts, samples = _similarity_parts(x, a, v, max_samples)
    sums = partial.new_empty(2)
    _launch(
        _similarity_sums_kernel, 1, x.device,
        partial, inverse_norms, sums, parts, samples, BLOCK=_power(parts), BLOCK_N=_power(samples),
    )  # fmt: skip
    return sums


def statistics_coefficients(
    a: Tensor,
    v: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    condensed: Tensor,
    count: int,
    eps: float,
    momentum: float,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    kind: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of one batch, what becomes of the running statistics, and the coefficients of :func:`apply`.

    With ``m = (1 + w_m) a``: ``mu_B = mean_n m`` and ``var_B = mean_n v + mean_n (m - mu_B)^2``. ``(mu, var)`` is
    ``(mu_B, var_B)`` where condensed, else the running statistics. Then, as in :func:`coefficients`,
    ``s = 1 / sqrt(var + eps)``, ``center = mu - w_m a``, ``scale = r s`` with ``r = sigmoid(w_v stat + w_b)``.
    Where condensed, and mu_B and var_B are finite,
    ``running <- (1 - momentum) running + momentum (mu_B, count / (count - 1) var_B)``.

    Args:
        a: Instance means, (N, C).
        v: Instance variances, (N, C).
        running_mean: (C,).
        running_var: (C,).
        condensed: 0-d bool.
        count: Values per channel, N * H * W.
        eps: Added to the variance.
        momentum: Of the running statistics.
        center_weight: w_m, (C,). None for 0.
        scale_weight: w_v, (C,). None, with ``scale_bias``, for r = 1.
        scale_bias: w_b, (C,).
        kind: What stat is: 'rectified', ``(m - mu) s``, or 'instance', a. None without scaling.

    Returns:
        ``(center, scale, mu, var, running_mean, running_var)``: (N, C) the first two, (C,) the others; float32.
    """
    condensed = _condensed(condensed, a.device)
    rectification = center_weight, scale_weight, scale_bias, kind
    return _coefficients(a, v, running_mean, running_var, condensed, count, eps, momentum, *rectification, None)


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
    count: int,
    eps: float,
    momentum: float,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    kind: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`statistics_coefficients` where the similarity of the samples says whether the features are condensed.

    ``tau' = (1 - m_s) tau + m_s s`` with the ``s = sum / number`` of :func:`similarity_sums` where that is finite, else
    tau; ``condensed = tau' > T``.

    Args:
        x, a, v, max_samples: As for :func:`similarity_sums`.
        running_similarity: tau, 0-d.
        similarity_momentum: m_s.
        threshold: T.
        running_mean, running_var, count, eps, momentum, center_weight, scale_weight, scale_bias, kind: As for
            :func:`statistics_coefficients`.

    Returns:
        ``(center, scale, mu, var, running_mean, running_var, tau', condensed)``: the last two 0-d, float32 and bool.
    """
    partial, inverse_norms, parts, samples = _similarity_parts(x, a, v, max_samples)
    tau = _float32(running_similarity, 'running_similarity', x.device)
    new_tau, condensed = torch.empty_like(tau), torch.empty_like(tau, dtype=torch.bool)
    gate = (
        *(partial, inverse_norms, tau, new_tau, parts, samples),
        *(_number(similarity_momentum, 'similarity_momentum'), _number(threshold, 'threshold')),
    )
    rectification = center_weight, scale_weight, scale_bias, kind
    outputs = _coefficients(a, v, running_mean, running_var, condensed, count, eps, momentum, *rectification, gate)
    return *outputs, new_tau, condensed


def coefficients(
    a: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    kind: str | None,
) -> tuple[Tensor, Tensor]:
    """The coefficients of :func:`apply` for given statistics: :func:`statistics_coefficients` without the batch's.

    Args:
        a: Instance means, (N, C).
        mean: mu, (C,).
        var: (C,).
        eps: Added to the variance.
        center_weight: w_m, (C,). None for 0.
        scale_weight: w_v, (C,). None, with ``scale_bias``, for r = 1.
        scale_bias: w_b, (C,).
        kind: 'rectified', 'instance' or None.

    Returns:
        ``(center, scale)``, each (N, C), float32.
    """
    return _coefficients(a, None, mean, var, None, 0, eps, 0.0, center_weight, scale_weight, scale_bias, kind, None)


def _coefficients(
    a, v, mean, var, condensed, count, eps, momentum, center_weight, scale_weight, scale_bias, kind, gate
) -> tuple[Tensor, ...]:
    _check_device(a.device)
    if a.dim() != 2 or a.numel() == 0:
        _fail(f'a must be (N, C) with elements, got {tuple(a.shape)}.')
    samples, channels = a.shape
    device = a.device
    kind = _kind(kind, scale_weight, scale_bias)
    a = _float32(a, 'a', device, samples, channels)
    v = _float32(v, 'v', device, samples, channels)
    mean, var, center_weight, scale_weight, scale_bias = (
        _float32(value, name, device, channels)
        for name, value in (
            ('mean', mean),
            ('var', var),
            ('center_weight', center_weight),
            ('scale_weight', scale_weight),
            ('scale_bias', scale_bias),
        )
    )
    outputs = [torch.empty_like(a), torch.empty_like(a)]
    if v is not None:
        outputs += [torch.empty_like(mean) for _ in range(4)]
    parts, paired_samples = gate[4:6] if gate else (1, 1)
    block_n = min(_power(samples), 64)
    block_c = min(_power(channels), max(8, 256 // block_n))
    _launch(
        _coefficients_kernel, _ceil(channels, block_c), device,
        a, v, mean, var, condensed, center_weight, scale_weight, scale_bias, *outputs, *[None] * (6 - len(outputs)),
        samples, channels, _number(eps, 'eps'), _number(momentum, 'momentum'), count / max(count - 1, 1),
        *(gate or (None, None, None, None, 1, 1, 0.0, 0.0)),
        KIND=kind, BLOCK_N=block_n, BLOCK_C=block_c, BLOCK=_power(parts), BLOCK_M=_power(paired_samples),
    )  # fmt: skip
    return tuple(outputs)


def apply(
    x: Tensor, center: Tensor, scale: Tensor, weight: Tensor, neighbor_weight: Tensor | None, bias: Tensor
) -> Tensor:
    """The normalisation and the affine step: ``y(p) = sum_t weight_t z(p + t) + bias``, ``z = (x - center) * scale``.

    z is 0 outside the map.

    Args:
        x: Input, (N, C, H, W).
        center: (N, C).
        scale: (N, C).
        weight: The centre tap, (C,).
        neighbor_weight: The other taps, row by row, (C, T - 1). None for k = 1.
        bias: (C,), or (N, C).

    Returns:
        y, in the shape, dtype and memory format of x.
    """
    k = _kernel_size(neighbor_weight)
    x = _input(x, k)
    samples, channels = x.shape[:2]
    center = _float32(center, 'center', x.device, samples, channels)
    scale = _float32(scale, 'scale', x.device, samples, channels)
    weight = _float32(weight, 'weight', x.device, channels)
    neighbor_weight = _float32(neighbor_weight, 'neighbor_weight', x.device, channels, k * k - 1)
    sample_bias = bias.dim() == 2
    bias = _float32(bias, 'bias', x.device, *((samples, channels) if sample_bias else (channels,)))
    y = torch.empty_like(x)
    tiling = _tiling(x, k, MAP_PROGRAMS)
    _launch(
        _apply_kernel, tiling.programs, x.device,
        x, center, scale, weight, neighbor_weight, bias, y, *tiling.arguments,
        SAMPLE_BIAS=sample_bias, **tiling.constants,
    )  # fmt: skip
    return y


def tap_sums(x: Tensor, dy: Tensor, center: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """The sums over the map that all gradients of the parameters and statistics follow from.

    ``G[n, c, t] = sum_p (x(p + t) - center) dy(p)`` and ``S[n, c, t] = sum_p dy(p)``, both over the p of the map with
    p + t in the map, in one read of x and dy.

    Args:
        x: Input, (N, C, H, W).
        dy: Gradient of y, in the shape and dtype of x.
        center: (N, C).
        kernel_size: k.

    Returns:
        ``(G, S)``, each (N, C, T), float32.
    """
    x = _input(x, kernel_size)
    dy = _beside(dy, x)
    samples, channels = x.shape[:2]
    taps = kernel_size * kernel_size
    center = _float32(center, 'center', x.device, samples, channels)
    g = center.new_empty((samples, channels, taps))
    s = torch.empty_like(g)
    tiling = _tiling(x, kernel_size, REDUCTION_PROGRAMS)
    outputs = (g, s) if tiling.parts == 1 else g.new_empty((2, tiling.parts, samples, channels, taps)).unbind()
    _launch(
        _tap_sums_kernel, tiling.programs, x.device,
        x, dy, center, *outputs, *tiling.arguments, **tiling.constants,
    )  # fmt: skip
    if tiling.parts > 1:
        size = g.numel()
        _launch(
            _merge_tap_sums_kernel, _ceil(size, 256), x.device, *outputs, g, s, size, tiling.parts, BLOCK=256
        )  # fmt: skip
    return g, s


def coefficients_backward(
    g: Tensor,
    s: Tensor,
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
    kind: str | None,
    pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the parameters, and the coefficients of :func:`input_gradient`, from :func:`tap_sums`.

    Args:
        g: G, (N, C, T).
        s: S, (N, C, T).
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
        kind: 'rectified', 'instance' or None.
        pixels: H * W.

    Returns:
        ``(slope, offset, d_weight, d_bias, d_neighbor_weight, d_center_weight, d_scale_weight, d_scale_bias)``: slope
        and offset (N, C), d_neighbor_weight (C, T - 1), the others (C,), and (0,) the gradients of parameters that are
        None; float32.
    """
    _check_device(g.device)
    if g.dim() != 3 or g.numel() == 0:
        _fail(f'g must be (N, C, T) with elements, got {tuple(g.shape)}.')
    samples, channels, taps = g.shape
    device = g.device
    kind_code = _kind(kind, scale_weight, scale_weight)
    g = _float32(g, 'g', device, samples, channels, taps)
    s = _float32(s, 's', device, samples, channels, taps)
    a = _float32(a, 'a', device, samples, channels)
    scale = _float32(scale, 'scale', device, samples, channels)
    neighbor_weight = _float32(neighbor_weight, 'neighbor_weight', device, channels, taps - 1)
    mean, var, weight, center_weight, scale_weight, calibrated_bias = (
        _float32(value, name, device, channels)
        for name, value in (
            ('mean', mean),
            ('var', var),
            ('weight', weight),
            ('center_weight', center_weight),
            ('scale_weight', scale_weight),
            ('calibrated_bias', calibrated_bias),
        )
    )
    condensed = _condensed(condensed, device)
    outputs = _empty_gradients(a, weight, neighbor_weight, center_weight, scale_weight)
    block_c = min(_power(channels), 8)
    block_t = _power(taps)
    block_n = min(_power(samples), 64, 4096 // (block_c * block_t))
    _launch(
        _coefficients_backward_kernel, _ceil(channels, block_c), device,
        g, s, a, mean, var, condensed, scale, weight, neighbor_weight, center_weight, scale_weight, calibrated_bias,
        *outputs,
        samples, channels, float(pixels), _number(eps, 'eps'),
        KIND=kind_code, T=taps, BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_T=block_t, num_warps=8,
    )  # fmt: skip
    return outputs


def _empty_gradients(
    a: Tensor,
    weight: Tensor,
    neighbor_weight: Tensor | None,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
) -> tuple[Tensor, ...]:
    like = a, a, weight, weight, neighbor_weight, center_weight, scale_weight, scale_weight
    return tuple(a.new_empty(0) if value is None else torch.empty_like(value) for value in like)


def input_gradient(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    scale: Tensor,
    weight: Tensor,
    neighbor_weight: Tensor | None,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    """``dx(p) = scale sum_t weight_t dy(p - t) + slope (x(p) - a) + offset``, dy being 0 outside the map.

    Args:
        dy: Gradient of y, in the shape and dtype of x.
        x: Input, (N, C, H, W).
        a: Instance means, (N, C).
        scale: (N, C).
        weight: The centre tap, (C,).
        neighbor_weight: The other taps, row by row, (C, T - 1). None for k = 1.
        slope: (N, C).
        offset: (N, C).

    Returns:
        dx, in the shape, dtype and memory format of x.
    """
    k = _kernel_size(neighbor_weight)
    x = _input(x, k)
    dy = _beside(dy, x)
    samples, channels = x.shape[:2]
    a, scale, slope, offset = (
        _float32(value, name, x.device, samples, channels)
        for name, value in (('a', a), ('scale', scale), ('slope', slope), ('offset', offset))
    )
    weight = _float32(weight, 'weight', x.device, channels)
    neighbor_weight = _float32(neighbor_weight, 'neighbor_weight', x.device, channels, k * k - 1)
    dx = torch.empty_like(x)
    tiling = _tiling(x, k, MAP_PROGRAMS)
    _launch(
        _input_gradient_kernel, tiling.programs, x.device,
        dy, x, a, scale, weight, neighbor_weight, slope, offset, dx, *tiling.arguments, **tiling.constants,
    )  # fmt: skip
    return dx


# ---------------------------------------------------------------------------------------------------------------------
# Operators: the same for torch.compile
# ---------------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _fake_coefficients(a: Tensor, vectors: int) -> tuple[Tensor, ...]:
    return _rows(a, *a.shape), _rows(a, *a.shape), *(_rows(a, a.shape[1]) for _ in range(vectors))


def _fake_tap_sums(x, dy, center, kernel_size):
    shape = (*x.shape[:2], kernel_size * kernel_size)
    return _rows(x, *shape), _rows(x, *shape)


# name, schema, and what stands in for the function while torch.compile traces
_OPERATORS = (
    (
        instance_moments,
        '(Tensor x) -> (Tensor, Tensor)',
        lambda x: (_rows(x, *x.shape[:2]), _rows(x, *x.shape[:2])),
    ),
    (
        similarity_sums,
        '(Tensor x, Tensor a, Tensor v, int max_samples) -> Tensor',
        lambda x, a, v, max_samples: _rows(x, 2),
    ),
    (
        statistics_coefficients,
        '(Tensor a, Tensor v, Tensor running_mean, Tensor running_var, Tensor condensed, SymInt count, float eps,'
        ' float momentum, Tensor? center_weight, Tensor? scale_weight, Tensor? scale_bias, str? kind)'
        ' -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
        lambda a, *_: _fake_coefficients(a, 4),
    ),
    (
        gated_coefficients,
        '(Tensor x, Tensor a, Tensor v, int max_samples, Tensor running_similarity, float similarity_momentum,'
        ' float threshold, Tensor running_mean, Tensor running_var, SymInt count, float eps, float momentum,'
        ' Tensor? center_weight, Tensor? scale_weight, Tensor? scale_bias, str? kind)'
        ' -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
        lambda x, a, *_: (*_fake_coefficients(a, 4), _rows(a), a.new_empty((), dtype=torch.bool)),
    ),
    (
        coefficients,
        '(Tensor a, Tensor mean, Tensor var, float eps, Tensor? center_weight, Tensor? scale_weight,'
        ' Tensor? scale_bias, str? kind) -> (Tensor, Tensor)',
        lambda a, *_: _fake_coefficients(a, 0),
    ),
    (
        apply,
        '(Tensor x, Tensor center, Tensor scale, Tensor weight, Tensor? neighbor_weight, Tensor bias) -> Tensor',
        lambda x, *_: torch.empty_like(_dense(x)),
    ),
    (
        tap_sums,
        '(Tensor x, Tensor dy, Tensor center, int kernel_size) -> (Tensor, Tensor)',
        _fake_tap_sums,
    ),
    (
        coefficients_backward,
        '(Tensor g, Tensor s, Tensor a, Tensor mean, Tensor var, float eps, Tensor? condensed, Tensor scale,'
        ' Tensor weight, Tensor? neighbor_weight, Tensor? center_weight, Tensor? scale_weight,'
        ' Tensor? calibrated_bias, str? kind, SymInt pixels)'
        ' -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
        lambda g, s, a, mean, var, eps, condensed, scale, *parameters: _empty_gradients(
            *(None if value is None else _rows(value, *value.shape) for value in (a, *parameters[:4]))
        ),
    ),
    (
        input_gradient,
        '(Tensor dy, Tensor x, Tensor a, Tensor scale, Tensor weight, Tensor? neighbor_weight, Tensor slope,'
        ' Tensor offset) -> Tensor',
        lambda dy, x, *_: torch.empty_like(_dense(x)),
    ),
)

if hasattr(torch.library, 'custom_op'):  # torch 2.4
    for _function, _schema, _fake in _OPERATORS:
        torch.library.custom_op(
            f'mmubn::{_function.__name__}', _function, mutates_args=(), schema=_schema
        ).register_fake(_fake)
