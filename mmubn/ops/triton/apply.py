"""The normalisation and the affine step of a map."""

# In Triton, names in capitals are compile-time constants, and types are found by its compiler.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
from torch import Tensor

from mmubn.ops.triton import runtime, tiling
from mmubn.ops.triton.device import jit, lanes, less_center, load_taps, load_window, place_tiles, store_tile, tl
from mmubn.ops.triton.inputs import dense_input, float32, kernel_size_of

__all__ = ['apply']


@jit(
    do_not_specialize=['samples', 'height', 'width', 'tiles_per_part', 'parts'],
    do_not_specialize_on_alignment=['center', 'scale', 'weight', 'neighbor_weight', 'bias'],
)
def _apply_kernel(
    x, center, scale, weight, neighbor_weight, bias, y,
    samples, channels, height, width, tiles_per_part, parts,
    SAMPLE_BIAS: tl.constexpr, K: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """``y(p) = bias + sum_t (scale weight_t) (x(p + t) - center)``, with 0 for what is outside the map."""
    _, index, plane_live, first, column_groups, width, stride_h, stride_w, begin, end = place_tiles(
        samples, channels, height, width, tiles_per_part, parts, CHANNELS_LAST, ROWS, COLUMNS, BLOCK_P
    )
    channel = index % channels
    c = tl.load(center + index, mask=plane_live, other=0.0)[:, None]
    taps = load_taps(
        weight, neighbor_weight, channel, plane_live, tl.load(scale + index, mask=plane_live, other=0.0), K
    )
    beta = tl.load(bias + (index if SAMPLE_BIAS else channel), mask=plane_live, other=0.0)[:, None]

    for start in range(begin, end, BLOCK_Q):
        h, w, pixel, live = lanes(
            first, plane_live, start, end, column_groups, stride_h, stride_w, ROWS, COLUMNS, BLOCK_Q
        )
        window = load_window(
            x + pixel, live, h, w, height, width, stride_h, stride_w, K, CHANNELS_LAST, ROWS, COLUMNS, TAIL
        )
        centred = less_center(window, c, live, h, w, height, width, K, ROWS, COLUMNS, TAIL)
        values = ()
        for r in tl.static_range(ROWS):
            for j in tl.static_range(COLUMNS):
                value = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32) + beta
                for t in tl.static_range(K * K):
                    value += taps[t] * centred[(r + t // K) * (COLUMNS + K - 1) + j + t % K]
                values += (value,)
        store_tile(y + pixel, values, live, h, w, height, width, stride_h, stride_w, CHANNELS_LAST, ROWS, COLUMNS, TAIL)


def apply(
    x: Tensor, center: Tensor, scale: Tensor, weight: Tensor, neighbor_weight: Tensor | None, bias: Tensor
) -> Tensor:
    """``y(p) = sum_t weight_t z(p + t) + bias`` with ``z = (x - center) * scale``, which is 0 outside the map.

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
    kernel_size = kernel_size_of(neighbor_weight)
    x = dense_input(x, kernel_size)
    samples, channels = x.shape[:2]
    center = float32(center, 'center', x.device, samples, channels)
    scale = float32(scale, 'scale', x.device, samples, channels)
    weight = float32(weight, 'weight', x.device, channels)
    neighbor_weight = float32(neighbor_weight, 'neighbor_weight', x.device, channels, kernel_size**2 - 1)
    sample_bias = bias.dim() == 2
    bias = float32(bias, 'bias', x.device, *((samples, channels) if sample_bias else (channels,)))
    y = torch.empty_like(x)
    tiles = tiling.tile(x, kernel_size, tiling.MAP_PROGRAMS)
    runtime.launch(
        _apply_kernel, tiles.programs, x.device,
        x, center, scale, weight, neighbor_weight, bias, y, *tiles.arguments,
        SAMPLE_BIAS=sample_bias, **tiles.constants,
    )  # fmt: skip
    return y
