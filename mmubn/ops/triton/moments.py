"""Instance moments: the mean and the biased variance of every channel of every sample."""

# In Triton, names in capitals are compile-time constants, and types are found by its compiler.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
from torch import Tensor

from mmubn.ops.triton import runtime, tiling
from mmubn.ops.triton.device import jit, place, tl
from mmubn.ops.triton.inputs import dense_input, is_channels_last

__all__ = ['instance_moments']


@jit(
    do_not_specialize=['samples', 'pixel_groups', 'rounds_per_part', 'parts'],
    do_not_specialize_on_alignment=['mean_out', 'moment_out', 'origin_out'],
)
def _moments_kernel(
    x, mean_out, moment_out, origin_out, samples, channels, pixel_groups, rounds_per_part, parts,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """``origin_out`` None: a and v. Otherwise of each part the mean relative to its origin, the squares, the origin.

    A plane has ``pixel_groups * VECTOR`` pixels, so that its alignment is known; WHOLE says that they are one tile.
    """
    pixels = pixel_groups * VECTOR
    part, index, live, first = place(samples, channels, pixels, parts, CHANNELS_LAST, BLOCK_P)
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


@jit(
    do_not_specialize=['planes', 'pixels', 'pixels_per_part', 'parts'],
    do_not_specialize_on_alignment=['means', 'moments', 'origins', 'a', 'v'],
)
def _merge_moments_kernel(
    means, moments, origins, a, v, planes, pixels, pixels_per_part, parts,
    BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Chan's rule over the parts, relative to the origin of the first."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = index < planes
    origin = tl.load(origins + index, mask=live, other=0.0)
    mean = tl.zeros([BLOCK_PARTS, BLOCK], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        offset = part.to(tl.int64)[:, None] * planes + index[None, :]
        inside = (part < parts)[:, None] & live[None, :]
        share = tl.minimum(pixels - part * pixels_per_part, pixels_per_part) / pixels
        shift = tl.load(origins + offset, mask=inside, other=0.0) - origin[None, :]
        mean += tl.where(inside, share[:, None] * (shift + tl.load(means + offset, mask=inside, other=0.0)), 0.0)
    center = tl.sum(mean, axis=0)
    squares = tl.zeros([BLOCK_PARTS, BLOCK], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        offset = part.to(tl.int64)[:, None] * planes + index[None, :]
        inside = (part < parts)[:, None] & live[None, :]
        count = tl.minimum(pixels - part * pixels_per_part, pixels_per_part).to(tl.float32)
        shift = tl.load(origins + offset, mask=inside, other=0.0) - origin[None, :]
        deviation = shift + tl.load(means + offset, mask=inside, other=0.0) - center[None, :]
        moment = tl.load(moments + offset, mask=inside, other=0.0)
        squares += tl.where(inside, moment + count[:, None] * deviation * deviation, 0.0)
    tl.store(a + index, origin + center, mask=live)
    tl.store(v + index, tl.sum(squares, axis=0) / pixels, mask=live)


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`mmubn.functional.instance_moments` in one read of x.

    Args:
        x: Input, (N, C, H, W).

    Returns:
        ``(a, v)``, each (N, C), float32.
    """
    x = dense_input(x)
    samples, channels, height, width = x.shape
    pixels = height * width
    channels_last = is_channels_last(x)
    planes = channels if channels_last else samples * channels
    # Few kinds of blocks, as in tiling.tile_shape, of 32 values for each lane: a small plane is one; a large plane in
    # NCHW has a warp.
    vector = 1
    if channels_last:
        block_p = min(tiling.power_of_two(channels), 128 // x.element_size())
        block_x = min(max(64, tiling.power_of_two(pixels)), 4096 // block_p)
        whole = pixels <= block_x
    else:
        block_x = next((block for block in (64, 256, 1024) if pixels <= block), 4096)
        whole = block_x < 4096
        block_p = 4096 // block_x if whole else 4
        vector = next(v for v in (8, 4, 1) if pixels % v == 0 and v * x.element_size() <= 16 and (v < 8 or not whole))
    unroll = 1 if whole else 4
    if not whole:
        block_x = 1024 // block_p
    groups = tiling.ceil_div(planes, block_p) * (samples if channels_last else 1)
    rounds = tiling.ceil_div(pixels, unroll * block_x)
    rounds_per_part, parts = tiling.split(rounds, groups, tiling.REDUCTION_PROGRAMS)

    a = x.new_empty(samples, channels, dtype=torch.float32)
    v = torch.empty_like(a)
    outputs = (a, v, None) if parts == 1 else a.new_empty(3, parts, samples, channels).unbind()
    runtime.launch(
        _moments_kernel, groups * parts, x.device,
        x, *outputs, samples, channels, pixels // vector, rounds_per_part, parts,
        CHANNELS_LAST=channels_last, VECTOR=vector, WHOLE=whole, UNROLL=unroll, BLOCK_P=block_p, BLOCK_X=block_x,
    )  # fmt: skip
    if parts > 1:
        planes = samples * channels
        runtime.launch(
            _merge_moments_kernel, tiling.ceil_div(planes, 16), x.device,
            *outputs, a, v, planes, pixels, rounds_per_part * unroll * block_x, parts, BLOCK=16, BLOCK_PARTS=64,
        )  # fmt: skip
    return a, v
