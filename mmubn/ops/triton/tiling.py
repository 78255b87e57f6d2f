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
    column_groups: int  # width // COLUMNS
    tiles_per_part: int
    parts: int


class Tiling(NamedTuple):
    """What a launch of a kernel that works by tiles takes."""

    programs: int
    arguments: MapArguments
    constants: dict[str, int | bool]  # after its other arguments; with num_warps


def tile(x: Tensor, kernel_size: int, programs: int) -> Tiling:
    """:func:`tile_shape` of a dense x."""
    return tile_shape(x.shape, is_channels_last(x), x.element_size(), kernel_size, programs)


@functools.lru_cache(maxsize=4096)
def tile_shape(shape: torch.Size, channels_last: bool, bytes_each: int, kernel_size: int, programs: int) -> Tiling:
    """The tiles of a map for a kernel that needs the ``kernel_size`` x ``kernel_size`` neighbourhood of each pixel.

    A lane owns a tile of ROWS x COLUMNS pixels at a time: the larger the tile, the fewer values around it are loaded
    for other lanes too; all of it is in registers. In NCHW, COLUMNS is what one load of up to 16 bytes takes. In
    channels-last a lane has two channels, or one for a large kernel. COLUMNS divides the width.
    With k = 1 there is no neighbourhood: the map is one long row.
    """
    samples, channels, height, width = shape
    if kernel_size == 1:
        height, width = 1, height * width
    planes = channels if channels_last else samples * channels
    if channels_last:
        # of those that need about as many loads for a value the one of the tallest tile
        columns = next(c for c in ((4, 5, 6, 7, 3, 2, 1) if kernel_size <= 3 else (2, 1)) if width % c == 0)
        vector = {1: 16 // bytes_each, 3: 2, 5: 2, 7: 1}[kernel_size]
    else:
        # No more than one load takes: columns stored one by one would each write to every sector of a row.
        columns = math.gcd(width, 16 // bytes_each if kernel_size <= 3 else 4 if kernel_size == 5 else 2)
        vector = 1
    # Triton compiles larger tiles in NCHW slowly.
    rows = min(8 if kernel_size <= 3 else 4, (49 if channels_last else 32) // columns)
    # A tail costs more than a tile a little lower.
    rows = next((r for r in range(rows, rows // 2, -1) if height % r == 0), min(rows, height))

    column_groups = width // columns
    tiles = ceil_div(height, rows) * column_groups
    if channels_last:
        block_p = min(power_of_two(channels), (128 if kernel_size <= 3 else 64) // bytes_each)
        block_q = min(power_of_two(tiles), 128 * vector // block_p)
    else:
        # Few lanes for a plane leave few idle and little to add up, but neighbours should fill a sector of memory.
        choices = [lanes for lanes in (8, 16, 32) if lanes * columns * bytes_each >= 32]
        block_q = min(power_of_two(tiles), min(choices, key=lambda lanes: (ceil_div(tiles, lanes) * lanes, lanes)))
        block_p = min(power_of_two(planes), 128 // block_q)
    num_warps = max(1, block_p * block_q // (32 * vector))

    groups = ceil_div(planes, block_p) * (samples if channels_last else 1)
    rounds_per_part, parts = split(ceil_div(tiles, block_q), groups, programs)
    return Tiling(
        programs=groups * parts,
        arguments=MapArguments(samples, channels, height, column_groups, rounds_per_part * block_q, parts),
        constants=dict(
            K=kernel_size,
            CHANNELS_LAST=channels_last,
            ROWS=rows,
            COLUMNS=columns,
            TAIL=height % rows > 0,
            BLOCK_P=block_p,
            BLOCK_Q=block_q,
            num_warps=num_warps,
        ),
    )
