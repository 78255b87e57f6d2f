"""The gradient of x, the second pass of the backward."""

# In Triton, names in capitals are compile-time constants, and types are found by its compiler.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
from torch import Tensor

from mmubn.ops.triton import runtime, tiling
from mmubn.ops.triton.device import jit, lanes, load_taps, load_window, place_tiles, store_tile, tl
from mmubn.ops.triton.inputs import dense_gradient, dense_input, fail, float32, kernel_size_of

__all__ = ['input_gradient']


@jit(
    do_not_specialize=['samples', 'height', 'width', 'tiles_per_part', 'parts'],
    do_not_specialize_on_alignment=['a', 'scale', 'weight', 'neighbor_weight', 'slope', 'offset'],
)
def _input_gradient_kernel(
    dy, x, a, scale, weight, neighbor_weight, slope, offset, dx,
    samples, channels, height, width, tiles_per_part, parts,
    K: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """``dx(p) = sum_t (scale weight_t) dy(p - t) + slope (x(p) - a) + offset``; without a slope, x is not read."""
    _, index, plane_live, first, column_groups, width, stride_h, stride_w, begin, end = place_tiles(
        samples, channels, height, width, tiles_per_part, parts, CHANNELS_LAST, ROWS, COLUMNS, BLOCK_P
    )
    if slope is not None:
        slope_n = tl.load(slope + index, mask=plane_live, other=0.0)[:, None]
        mean = tl.load(a + index, mask=plane_live, other=0.0)[:, None]
    offset_n = tl.zeros([BLOCK_P, 1], tl.float32)
    if offset is not None:
        offset_n = tl.load(offset + index, mask=plane_live, other=0.0)[:, None]
    scale_n = tl.load(scale + index, mask=plane_live, other=0.0)
    taps = load_taps(weight, neighbor_weight, index % channels, plane_live, scale_n, K)

    for start in range(begin, end, BLOCK_Q):
        h, w, pixel, live = lanes(
            first, plane_live, start, end, column_groups, stride_h, stride_w, ROWS, COLUMNS, BLOCK_Q
        )
        if slope is not None:
            tile = load_window(
                x + pixel, live, h, w, height, width, stride_h, stride_w, 1, CHANNELS_LAST, ROWS, COLUMNS, TAIL
            )
        window = load_window(
            dy + pixel, live, h, w, height, width, stride_h, stride_w, K, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )
        values = ()
        for r in tl.static_range(ROWS):
            for j in tl.static_range(COLUMNS):
                value = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32) + offset_n
                if slope is not None:
                    value += slope_n * (tile[r * COLUMNS + j].to(tl.float32) - mean)
                for t in tl.static_range(K * K):
                    # p - t is the mirrored tap
                    neighbor = window[(r + t // K) * (COLUMNS + K - 1) + j + t % K]
                    value += taps[K * K - 1 - t] * neighbor.to(tl.float32)
                values += (value,)
        store_tile(
            dx + pixel, values, live, h, w, height, width, stride_h, stride_w, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )


def input_gradient(
    dy: Tensor,
    x: Tensor,
    a: Tensor | None,
    scale: Tensor,
    weight: Tensor,
    neighbor_weight: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """``dx(p) = scale sum_t weight_t dy(p - t) + slope (x(p) - a) + offset``, dy being 0 outside the map.

    Args:
        dy: Gradient of y, in the shape and dtype of x.
        x: Input, (N, C, H, W). Its values are read where there is a slope.
        a: Instance means, (N, C). None where there is no slope.
        scale: (N, C).
        weight: The centre tap, (C,).
        neighbor_weight: The other taps, row by row, (C, T - 1). None for k = 1.
        slope: (N, C). None for 0.
        offset: (N, C). None for 0.

    Returns:
        dx, in the shape, dtype and memory format of x.
    """
    if slope is not None and a is None:
        fail('a and slope come together, got a slope alone.')
    kernel_size = kernel_size_of(neighbor_weight)
    x = dense_input(x, kernel_size)
    dy = dense_gradient(dy, x)
    samples, channels = x.shape[:2]
    scale = float32(scale, 'scale', x.device, samples, channels)
    a = None if slope is None else float32(a, 'a', x.device, samples, channels)
    slope = float32(slope, 'slope', x.device, samples, channels)
    offset = float32(offset, 'offset', x.device, samples, channels)
    weight = float32(weight, 'weight', x.device, channels)
    neighbor_weight = float32(neighbor_weight, 'neighbor_weight', x.device, channels, kernel_size**2 - 1)
    dx = torch.empty_like(x)
    tiles = tiling.tile(x, kernel_size, tiling.MAP_PROGRAMS)
    runtime.launch(
        _input_gradient_kernel, tiles.programs, x.device,
        dy, x, a, scale, weight, neighbor_weight, slope, offset, dx, *tiles.arguments, **tiles.constants,
    )  # fmt: skip
    return dx
