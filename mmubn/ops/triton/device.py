"""What the kernels share: where a program works, the tiles of its lanes, blocks of (N, C) tensors.

``jit`` and ``tl`` are Triton's. Where it is not installed, or too old, the kernels are plain functions that nothing
calls.

A depthwise kernel of K x K has T = K*K taps in row-major order; p + t is the pixel p shifted by tap t, so that the
centre tap shifts by nothing.
"""

# In Triton, names in capitals are compile-time constants, and types are found by its compiler.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

import re

LOWEST_TRITON = 3, 3  # before, kernels that build tuples do not compile


def problem_of(version: str) -> str | None:
    """Why the kernels do not run with a version of Triton; None where they do."""
    release = re.match(r'(\d+)\.(\d+)', version)
    if release is None or tuple(map(int, release.groups())) >= LOWEST_TRITON:
        return None
    lowest = '.'.join(map(str, LOWEST_TRITON))
    return f'the kernels need Triton {lowest} or later, which torch 2.7 brings, got Triton {version}'


try:
    import triton
    import triton.language as tl

    TRITON_PROBLEM = problem_of(triton.__version__)
except ImportError:
    triton = tl = None
    TRITON_PROBLEM = 'Triton is not installed'

if TRITON_PROBLEM is None:
    jit = triton.jit
else:

    def jit(function=None, **_):
        return function or (lambda function: function)


__all__ = [
    'TRITON_PROBLEM',
    'in_map',
    'interpreted',
    'is_finite',
    'jit',
    'lanes',
    'less_center',
    'load_block',
    'load_parameter',
    'load_taps',
    'load_window',
    'place',
    'place_tiles',
    'problem_of',
    'store_block',
    'store_tile',
    'tl',
    'triton',
]


def interpreted() -> bool:
    """Whether the kernels were defined for Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    return TRITON_PROBLEM is None and not isinstance(place, triton.JITFunction)


# --- maps: places, tiles, windows, taps -------------------------------------------------------------------------------


@jit
def place(samples, channels, pixels, parts, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr):
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
def place_tiles(samples, channels, height, width, tiles_per_part, parts, CHANNELS_LAST: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """:func:`place`, then the number of tiles side by side, the width and the strides of a map, and the numbers of the
    part's first tile and of the one after its last."""
    column_groups = tl.cdiv(width, COLUMNS)
    if not CHANNELS_LAST:
        width = column_groups * COLUMNS  # as it is, and so the compiler knows how rows are aligned
    part, index, live, first = place(samples, channels, height * width, parts, CHANNELS_LAST, BLOCK_P)
    stride_w = channels if CHANNELS_LAST else 1
    begin = part * tiles_per_part
    end = tl.minimum(begin + tiles_per_part, tl.cdiv(height, ROWS) * column_groups)
    return part, index, live, first, column_groups, width, width * stride_w, stride_w, begin, end


@jit
def lanes(first, live, start, end, column_groups, stride_h, stride_w, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           BLOCK_Q: tl.constexpr):  # fmt: skip
    """The tiles of ROWS x COLUMNS pixels from number ``start`` on, one for each lane, row by row of the map.

    Returns the row and the column of their first pixels (BLOCK_Q,), the offset of that pixel in each plane and whether
    there is such a tile (BLOCK_P, BLOCK_Q).
    """
    tile = start + tl.arange(0, BLOCK_Q)
    h = tile // column_groups * ROWS
    w = tile % column_groups * COLUMNS
    return h, w, first[:, None] + (h * stride_h + w * stride_w)[None, :], live[:, None] & (tile < end)[None, :]


@jit
def in_map(live, h, w, height, width, i: tl.constexpr, j: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            TAIL: tl.constexpr):  # fmt: skip
    """Whether the pixel i rows below and j columns right of each lane's first is in the map."""
    # The first pixel of a tile is. TAIL 0: all are; 1: not all rows may be; 2: neither all rows nor all columns.
    inside = live
    if i < 0:
        inside = inside & (h + i >= 0)[None, :]
    if i >= ROWS or (TAIL > 0 and i > 0):
        inside = inside & (h + i < height)[None, :]
    if j < 0:
        inside = inside & (w + j >= 0)[None, :]
    if j >= COLUMNS or (TAIL == 2 and j > 0):
        inside = inside & (w + j < width)[None, :]
    return inside


@jit
def unpack(value, COLUMNS: tl.constexpr):
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
def pack(columns, COLUMNS: tl.constexpr):
    """What :func:`unpack` undoes."""
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
def load_window(
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
        if CHANNELS_LAST:
            for j in tl.static_range(-pad, COLUMNS + pad):
                inside = in_map(live, h, w, height, width, i, j, ROWS, COLUMNS, TAIL)
                values += (tl.load(row + j * stride_w, mask=inside, other=0.0),)
        else:
            for j in tl.static_range(-pad, 0):
                inside = in_map(live, h, w, height, width, i, j, ROWS, COLUMNS, TAIL)
                values += (tl.load(row + j, mask=inside, other=0.0),)
            inside = in_map(live, h, w, height, width, i, 0, ROWS, COLUMNS, TAIL)
            columns = row[:, :, None] + tl.arange(0, COLUMNS)[None, None, :]
            values += unpack(tl.load(columns, mask=inside[:, :, None], other=0.0), COLUMNS)
            for j in tl.static_range(COLUMNS, COLUMNS + pad):
                inside = in_map(live, h, w, height, width, i, j, ROWS, COLUMNS, TAIL)
                values += (tl.load(row + j, mask=inside, other=0.0),)
    return values


@jit
def less_center(window, center, live, h, w, height, width, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 TAIL: tl.constexpr):  # fmt: skip
    """A window in float32, less the center in the map: the padding is a zero of the normalised input, not of x."""
    pad: tl.constexpr = K // 2
    values = ()
    for i in tl.static_range(-pad, ROWS + pad):
        for j in tl.static_range(-pad, COLUMNS + pad):
            value = window[(i + pad) * (COLUMNS + K - 1) + j + pad].to(tl.float32)
            inside = in_map(live, h, w, height, width, i, j, ROWS, COLUMNS, TAIL)
            values += (value - tl.where(inside, center, 0.0),)
    return values


@jit
def store_tile(
    pointers, values, live, h, w, height, width, stride_h, stride_w,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Each lane's tile, given row by row as ROWS * COLUMNS values."""
    for i in tl.static_range(ROWS):
        row = pointers + i * stride_h
        if CHANNELS_LAST:
            for j in tl.static_range(COLUMNS):
                inside = in_map(live, h, w, height, width, i, j, ROWS, COLUMNS, TAIL)
                tl.store(row + j * stride_w, values[i * COLUMNS + j].to(pointers.dtype.element_ty), mask=inside)
        else:
            inside = in_map(live, h, w, height, width, i, 0, ROWS, COLUMNS, TAIL)
            columns = ()
            for j in tl.static_range(COLUMNS):
                columns += (values[i * COLUMNS + j],)
            value = pack(columns, COLUMNS).to(pointers.dtype.element_ty)
            columns = row[:, :, None] + tl.arange(0, COLUMNS)[None, None, :]
            tl.store(columns, value, mask=inside[:, :, None])


@jit
def load_taps(weight, neighbor_weight, channel, live, scale, K: tl.constexpr):
    """The taps of each plane times its scale, T tensors of (BLOCK_P, 1)."""
    taps = ()
    for t in tl.static_range(K * K // 2):
        taps += ((tl.load(neighbor_weight + channel * (K * K - 1) + t, mask=live, other=0.0) * scale)[:, None],)
    taps += ((tl.load(weight + channel, mask=live, other=0.0) * scale)[:, None],)
    for t in tl.static_range(K * K // 2, K * K - 1):
        taps += ((tl.load(neighbor_weight + channel * (K * K - 1) + t, mask=live, other=0.0) * scale)[:, None],)
    return taps


# --- blocks of (N, C) and (C,) tensors --------------------------------------------------------------------------------


@jit
def load_block(pointer, n, channel, samples, channels):
    """(BLOCK_N, BLOCK_C) values of an (N, C) tensor; 0 outside."""
    inside = (n < samples)[:, None] & (channel < channels)[None, :]
    return tl.load(pointer + n.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)


@jit
def store_block(pointer, n, channel, samples, channels, value):
    inside = (n < samples)[:, None] & (channel < channels)[None, :]
    tl.store(pointer + n.to(tl.int64)[:, None] * channels + channel[None, :], value, mask=inside)


@jit
def load_parameter(pointer, channel, channels):
    return tl.load(pointer + channel, mask=channel < channels, other=0.0)


@jit
def is_finite(value):
    return tl.abs(value) < float('inf')  # false for NaN
