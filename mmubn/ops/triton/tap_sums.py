"""The sums over the map that all gradients follow from, the first pass of the backward."""

# In Triton, names in capitals are compile-time constants, and types are found by its compiler.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
from torch import Tensor

from mmubn.ops.triton import runtime, tiling
from mmubn.ops.triton.device import jit, lanes, less_center, load_window, place_tiles, tl
from mmubn.ops.triton.inputs import dense_gradient, dense_input, float32

__all__ = ['tap_sums']


@jit
def _sums_of_columns(window, shift: tl.constexpr, h, height, K: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """Of each column of a tile, the sum of the pixels whose neighbor ``shift`` rows below is in the map; a window is 0
    outside it."""
    pad: tl.constexpr = K // 2
    sums = ()
    for column in tl.static_range(pad, COLUMNS + pad):
        total = tl.zeros(window[0].shape, tl.float32)
        # The inner pixels come first: up to the border, sums for different shifts are the same, and computed once.
        for i in tl.static_range(pad, ROWS + pad):
            value = window[(i % ROWS + pad) * (COLUMNS + K - 1) + column]
            if i % ROWS + shift < 0:
                value = tl.where((h + (i % ROWS + shift) >= 0)[None, :], value, 0.0)
            if i % ROWS + shift >= ROWS or (TAIL > 0 and shift > 0):
                value = tl.where((h + (i % ROWS + shift) < height)[None, :], value, 0.0)
            total += value
        sums += (total,)
    return sums


@jit
def _sum_of_columns(columns, first: tl.constexpr, shift: tl.constexpr, w, width, PAD: tl.constexpr,
                    COLUMNS: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """Of a tile's sums of columns, those from number ``first`` on, the sum of those whose neighbor ``shift`` columns to
    the right is in the map."""
    total = tl.zeros(columns[0].shape, tl.float32)
    for i in tl.static_range(PAD, COLUMNS + PAD):
        value = columns[first + i % COLUMNS]
        if i % COLUMNS + shift < 0:
            value = tl.where((w + (i % COLUMNS + shift) >= 0)[None, :], value, 0.0)
        if i % COLUMNS + shift >= COLUMNS or (TAIL == 2 and shift > 0):
            value = tl.where((w + (i % COLUMNS + shift) < width)[None, :], value, 0.0)
        total += value
    return total


@jit(
    do_not_specialize=['samples', 'height', 'width', 'tiles_per_part', 'parts'],
    do_not_specialize_on_alignment=['center', 'products_out', 'sums_out'],
)
def _tap_sums_kernel(
    x, dy, center, products_out, sums_out,
    samples, channels, height, width, tiles_per_part, parts,
    K: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """With q = p + t, ``products_t = sum_q (x(q) - center) dy(q - t)``: x is loaded once, and dy is 0 outside."""
    part, index, plane_live, first, column_groups, width, stride_h, stride_w, begin, end = place_tiles(
        samples, channels, height, width, tiles_per_part, parts, CHANNELS_LAST, ROWS, COLUMNS, BLOCK_P
    )
    c = tl.load(center + index, mask=plane_live, other=0.0)[:, None]
    products = ()
    sums = ()
    for _ in tl.static_range(K * K):
        products += (tl.zeros([BLOCK_P, BLOCK_Q], tl.float32),)
        sums += (tl.zeros([BLOCK_P, BLOCK_Q], tl.float32),)

    for start in range(begin, end, BLOCK_Q):
        h, w, pixel, live = lanes(
            first, plane_live, start, end, column_groups, stride_h, stride_w, ROWS, COLUMNS, BLOCK_Q
        )
        tile = load_window(
            x + pixel, live, h, w, height, width, stride_h, stride_w, 1, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )
        raw = load_window(
            dy + pixel, live, h, w, height, width, stride_h, stride_w, K, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )
        centred = less_center(tile, c, live, h, w, height, width, 1, ROWS, COLUMNS, TAIL)
        window = ()
        for i in tl.static_range((ROWS + K - 1) * (COLUMNS + K - 1)):
            window += (raw[i].to(tl.float32),)
        columns = ()
        for i in tl.static_range(K):
            columns += _sums_of_columns(window, i - K // 2, h, height, K, ROWS, COLUMNS, TAIL)

        new_products = ()
        new_sums = ()
        for i in tl.static_range(K):
            for j in tl.static_range(K):
                total = products[i * K + j]
                for r in tl.static_range(ROWS):
                    for column in tl.static_range(COLUMNS):
                        neighbor = window[(r + K - 1 - i) * (COLUMNS + K - 1) + column + K - 1 - j]
                        total += centred[r * COLUMNS + column] * neighbor
                new_products += (total,)
                of_tile = _sum_of_columns(columns, i * COLUMNS, j - K // 2, w, width, K // 2, COLUMNS, TAIL)
                new_sums += (sums[i * K + j] + of_tile,)
        products = new_products
        sums = new_sums

    index = (part.to(tl.int64) * (samples * channels) + index) * (K * K)
    for t in tl.static_range(K * K):
        tl.store(products_out + index + t, tl.sum(products[t], axis=1), mask=plane_live)
        tl.store(sums_out + index + t, tl.sum(sums[t], axis=1), mask=plane_live)


@jit(
    do_not_specialize=['values', 'parts'],
    do_not_specialize_on_alignment=['products_parts', 'sums_parts', 'products', 'sums'],
)
def _merge_tap_sums_kernel(
    products_parts, sums_parts, products, sums, values, parts, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < values
    products_total = tl.zeros([BLOCK_PARTS, BLOCK], tl.float32)
    sums_total = tl.zeros([BLOCK_PARTS, BLOCK], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        offset = part.to(tl.int64)[:, None] * values + index[None, :]
        inside = (part < parts)[:, None] & live[None, :]
        products_total += tl.load(products_parts + offset, mask=inside, other=0.0)
        sums_total += tl.load(sums_parts + offset, mask=inside, other=0.0)
    tl.store(products + index, tl.sum(products_total, axis=0), mask=live)
    tl.store(sums + index, tl.sum(sums_total, axis=0), mask=live)


def tap_sums(x: Tensor, dy: Tensor, center: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """:class:`mmubn.ops.types.TapSums` in one read of x and dy.

    Args:
        x: Input, (N, C, H, W).
        dy: Gradient of y, in the shape and dtype of x.
        center: (N, C).
        kernel_size: k.

    Returns:
        ``(products, sums)``, each (N, C, T), float32.
    """
    x = dense_input(x, kernel_size)
    dy = dense_gradient(dy, x)
    samples, channels = x.shape[:2]
    taps = kernel_size * kernel_size
    center = float32(center, 'center', x.device, samples, channels)
    products = center.new_empty(samples, channels, taps)
    sums = torch.empty_like(products)
    tiles = tiling.tile(x, kernel_size, tiling.REDUCTION_PROGRAMS, accumulates=True)
    parts = tiles.arguments.parts
    outputs: tuple[Tensor, ...] = (products, sums)
    if parts > 1:
        outputs = products.new_empty(2, parts, samples, channels, taps).unbind()
    runtime.launch(
        _tap_sums_kernel, tiles.programs, x.device,
        x, dy, center, *outputs, *tiles.arguments, **tiles.constants,
    )  # fmt: skip
    if parts > 1:
        values = products.numel()
        runtime.launch(
            _merge_tap_sums_kernel, tiling.ceil_div(values, 64), x.device,
            *outputs, products, sums, values, parts, BLOCK=64, BLOCK_PARTS=32,
        )  # fmt: skip
    return products, sums
