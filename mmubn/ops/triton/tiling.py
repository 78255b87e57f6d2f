"""How programs and lanes share the planes and the pixels of a map."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmubn.ops.triton.inputs import is_channels_last

__all__ = [
    'MAP_PROGRAMS',
    'REDUCTION_PROGRAMS',
    'MapArguments',
    'Tiling',
    'ceil_div',
    'power_of_two',
    'split',
    'tile',
    'tile_shape',
]

# Programs to aim at: some for each of the about 130 multiprocessors that a large GPU has. A reduction pays for more
# programs with more partial results to write and read; a map does not, and gains a shorter tail.
REDUCTION_PROGRAMS = 1024
MAP_PROGRAMS = 2048


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def split(rounds: int, groups: int, programs: int) -> tuple[int, int]:
    """How many of its rounds a program of each group takes, and in how many parts that is, to have enough programs."""
    rounds_per_part = ceil_div(rounds, min(rounds, ceil_div(programs, groups)))
    return rounds_per_part, ceil_div(rounds, rounds_per_part)


class MapArguments(NamedTuple):
    """What every kernel that works by tiles takes after its tensors, in this order."""

    samples: int
    channels: int
    height: int
    width: int
    tiles_per_part: int
    parts: int


class Tiling(NamedTuple):
    """What a launch of a kernel that works by tiles takes."""

    programs: int
    arguments: MapArguments
    constants: dict[str, int | bool]  # after its other arguments; with num_warps


def tile(x: Tensor, kernel_size: int, programs: int, accumulates: bool = False) -> Tiling:
    """:func:`tile_shape` of a dense x."""
    return tile_shape(x.shape, is_channels_last(x), x.element_size(), kernel_size, programs, accumulates)


@functools.lru_cache(maxsize=4096)
def tile_shape(
    shape: torch.Size, channels_last: bool, bytes_each: int, kernel_size: int, programs: int, accumulates: bool = False
) -> Tiling:
    """The tiles of a map for a kernel that needs the ``kernel_size`` x ``kernel_size`` neighbourhood of each pixel.

    A lane owns a tile of ROWS x COLUMNS pixels at a time: the larger the tile, the fewer values around it are loaded
    for other lanes too; all of it is in registers, beside the sums of a kernel that ``accumulates``. With k = 1 there
    is no neighbourhood: the map is one long row. In NCHW, COLUMNS divides the width.

    Few kinds of tiles, since each is compiled, for seconds: sizes of the map, of which detection has hundreds, choose
    among them by what divides them, and where nothing does, tiles have a TAIL beyond the map.
    """
    samples, channels, height, width = shape
    if kernel_size == 1:
        height, width = 1, height * width
    if channels_last:
        rows, columns, tail = _channels_last_tile(height, width, kernel_size, accumulates)
        tiles = ceil_div(height, rows) * ceil_div(width, columns)
        # A lane has two channels, or one for a large kernel.
        vector = {1: 16 // bytes_each, 3: 2, 5: 2, 7: 1}[kernel_size]
        block_p = min(power_of_two(channels), (128 if kernel_size <= 3 else 64) // bytes_each)
        block_q = min(power_of_two(tiles), 128 * vector // block_p)
        groups = ceil_div(channels, block_p) * samples
    else:
        # What one load of up to 16 bytes takes: columns stored one by one would each write to every sector of a row.
        columns = math.gcd(width, 16 // bytes_each if kernel_size <= 3 else 4 if kernel_size == 5 else 2)
        rows = 1 if kernel_size == 1 else 4 if columns == 8 or kernel_size > 3 else 7
        tiles = ceil_div(height, rows) * (width // columns)
        # Odd widths are rare, and come with any height: of those, only 7x7 and the like have a kernel without a tail.
        tail = 1 if height % rows or (columns == 1 and height > rows) else 0
        # Few lanes for a plane leave few idle and little to add up.
        vector, block_p, block_q = 1, 16, 8
        groups = ceil_div(samples * channels, block_p)
    rounds_per_part, parts = split(ceil_div(tiles, block_q), groups, programs)
    return Tiling(
        programs=groups * parts,
        arguments=MapArguments(samples, channels, height, width, rounds_per_part * block_q, parts),
        constants=dict(
            K=kernel_size,
            CHANNELS_LAST=channels_last,
            ROWS=rows,
            COLUMNS=columns,
            TAIL=tail,
            BLOCK_P=block_p,
            BLOCK_Q=block_q,
            num_warps=max(1, block_p * block_q // (32 * vector)),
        ),
    )


def _channels_last_tile(height: int, width: int, kernel_size: int, accumulates: bool) -> tuple[int, int, int]:
    """ROWS, COLUMNS and TAIL."""
    if kernel_size != 3:
        rows, columns = (1, 4) if kernel_size == 1 else (4, 2)
        return rows, columns, 2 if height % rows or width % columns else 0
    for rows, columns in ((4, 4), (7, 7)) if accumulates else ((8, 4), (4, 4), (7, 7)):
        if height % rows == 0 and width % columns == 0:
            return rows, columns, 0
    # Rows beyond the map cost less than columns beyond it.
    return next(((5, columns, 1) for columns in (4, 6) if width % columns == 0), (5, 4, 2))
