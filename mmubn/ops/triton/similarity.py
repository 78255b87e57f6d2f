"""The similarity of the samples of a batch."""

# In Triton, names in capitals are compile-time constants, and types are found by its compiler.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmubn.ops.triton import runtime, tiling
from mmubn.ops.triton.device import is_finite, jit, load_block, tl
from mmubn.ops.triton.inputs import dense_input, fail, float32

__all__ = ['SIMILARITY_PARTS', 'SimilarityParts', 'add_similarities', 'similarity_parts', 'similarity_sums']

# Partial sums: as many as one program adds up in one go.
SIMILARITY_PARTS = 1024


@jit(
    do_not_specialize=['samples', 'rounds'],
    do_not_specialize_on_alignment=['a', 'v', 'inverse_norms', 'partial'],
)
def _similarity_kernel(
    x, a, v, inverse_norms, partial, samples, channels, pixels, values, rounds,
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
            mean = load_block(a, n, channel, samples, channels)
            squares += load_block(v, n, channel, samples, channels) + mean * mean
        square = tl.sum(squares, axis=1) * pixels
        # Below the smallest normal number the reciprocal of the root is infinite on the device: such a sample is zeros.
        inverse = tl.where(square >= 1.1754943508222875e-38, tl.rsqrt(square), 0.0)
        inverse = tl.where(is_finite(square), inverse, float('nan'))
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
                inside = (position < values) & (start + i < samples)
                sample = start + i
                tiles += (tl.load(x + sample.to(tl.int64) * values + position, mask=inside, other=0.0),)
            for i in tl.static_range(UNROLL):
                u += tiles[i].to(tl.float32) * tl.load(inverse_norms + start + i, mask=start + i < samples, other=0.0)
        squares += u * u
    tl.store(partial + program, tl.sum(squares, axis=0))


@jit
def add_similarities(partial, inverse_norms, parts, samples, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of the cosines of all ordered pairs of different samples, and their number."""
    part = tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    # A sample of zeros is not among its own pairs; NaN > 0 is false, and the sum is NaN then anyway.
    nonzero = tl.load(inverse_norms + n, mask=n < samples, other=0.0) > 0
    total = tl.sum(tl.load(partial + part, mask=part < parts, other=0.0), axis=0)
    total -= tl.sum(nonzero.to(tl.float32), axis=0)
    return total, samples.to(tl.float32) * (samples - 1).to(tl.float32)


@jit(
    do_not_specialize=['parts', 'samples'],
    do_not_specialize_on_alignment=['partial', 'inverse_norms', 'sums'],
)
def _similarity_sums_kernel(
    partial, inverse_norms, sums, parts, samples, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    total, pairs = add_similarities(partial, inverse_norms, parts, samples, BLOCK, BLOCK_N)
    tl.store(sums, total)
    tl.store(sums + 1, pairs)


class SimilarityParts(NamedTuple):
    """What :func:`add_similarities` adds up."""

    partial: Tensor | None  # sums of (sum_n f_n / ||f_n||)^2, (parts,); None, as the norms, where there is none
    inverse_norms: Tensor | None  # 1 / ||f_n||, (parts, samples), all rows alike
    parts: int
    samples: int


def similarity_parts(x: Tensor, a: Tensor, v: Tensor, max_samples: int) -> SimilarityParts:
    """Arguments as for :func:`similarity_sums`."""
    x = dense_input(x)
    if max_samples < 1:
        fail(f'max_samples must be at least 1, got {max_samples}.')
    samples, channels, height, width = x.shape
    a = float32(a, 'a', x.device, samples, channels)
    v = float32(v, 'v', x.device, samples, channels)
    samples = min(samples, max_samples)
    values = channels * height * width
    # The same blocks for every map and number of channels: each other one would be compiled.
    block = 1024
    # Each program reads a and v besides its share of x: the smaller the map, the fewer programs.
    most = min(SIMILARITY_PARTS, max(64, height * width * x.element_size() // 16))
    rounds = tiling.ceil_div(tiling.ceil_div(values, block), most)
    parts = tiling.ceil_div(values, block * rounds)
    inverse_norms = a.new_empty(parts, samples)
    partial = a.new_empty(parts)
    block_n = min(tiling.power_of_two(samples), 16)
    block_c = 2048 // block_n
    runtime.launch(
        _similarity_kernel, parts, x.device,
        x, a, v, inverse_norms, partial, samples, channels, float(height * width), values, rounds,
        UNROLL=min(block_n, 8), BLOCK=block, BLOCK_N=block_n, BLOCK_C=block_c,
    )  # fmt: skip
    return SimilarityParts(partial, inverse_norms, parts, samples)


def similarity_sums(x: Tensor, a: Tensor, v: Tensor, max_samples: int) -> Tensor:
    """:func:`mmubn.functional.similarity_sums` with the norms from the moments.

    With u_n and n' as there, the sum is ``||sum_n u_n||^2 - #{n: ||f_n|| > 0}``.

    Args:
        x: Input, (N, C, H, W). Its first n' samples are read.
        a: Instance means of x, (N, C).
        v: Instance variances of x, (N, C).
        max_samples: At least 1.

    Returns:
        ``(sum, number)``, (2,), float32. The sum is NaN where a norm is not finite.
    """
    similarities = similarity_parts(x, a, v, max_samples)
    sums = x.new_empty(2, dtype=torch.float32)
    runtime.launch(
        _similarity_sums_kernel, 1, x.device,
        similarities.partial, similarities.inverse_norms, sums, similarities.parts, similarities.samples,
        BLOCK=SIMILARITY_PARTS, BLOCK_N=tiling.power_of_two(similarities.samples),
    )  # fmt: skip
    return sums
