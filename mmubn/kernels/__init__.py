"""Fast and exact ways to compute a norm layer, and the one rule that chooses between them.

Needs torch alone. A :class:`Backend` offers the passes over x:

- ``reference``: :mod:`mmubn.functional`, plain torch, differentiated by autograd. What the others are tested against.
- ``torch``: :mod:`mmubn.kernels.torch_ops`, with a hand-written backward that saves x and O(N C) numbers.
- ``triton``: :mod:`mmubn.kernels.triton_kernels`, the same by kernels for NVIDIA GPUs.
- ``cpp``: :mod:`mmubn.kernels.cpp_ops`, the same by kernels for the CPU, compiled at their first use.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmubn import functional as F
from mmubn.kernels import cpp_ops, torch_ops, triton_kernels, triton_ops
from mmubn.kernels.autograd import (
    Form,
    Gate,
    Parameters,
    Statistics,
    gated_statistics,
    rectified_norm,
    reference,
    statistics,
)

__all__ = [
    'Backend',
    'Form',
    'Gate',
    'Parameters',
    'Statistics',
    'backend_info',
    'choose_backend',
    'name_and_reason',
    'use_backend',
]


class Backend(NamedTuple):
    """One way to compute a norm; every way gives the same numbers to rounding."""

    name: str
    instance_means: Callable[[Tensor], Tensor]
    instance_moments: Callable[[Tensor], tuple[Tensor, Tensor]]
    similarity_sums: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, int]]
    statistics: Callable[..., tuple]  # see autograd.statistics
    gated_statistics: Callable[..., tuple]  # see autograd.gated_statistics
    rectified_norm: Callable[[Tensor, Statistics, Form, Parameters], Tensor]


def _reference_sums(x: Tensor, a: Tensor, v: Tensor, max_samples: int) -> tuple[Tensor, int]:
    return F.similarity_sums(x, max_samples)


BACKENDS = {
    'reference': Backend(
        'reference',
        F.instance_means,
        F.instance_moments,
        _reference_sums,
        statistics,
        functools.partial(gated_statistics, _reference_sums, statistics),
        reference,
    ),
    'torch': Backend(
        'torch',
        F.instance_means,
        torch_ops.instance_moments,
        torch_ops.similarity_sums,
        statistics,
        functools.partial(gated_statistics, torch_ops.similarity_sums, statistics),
        functools.partial(rectified_norm, torch_ops),
    ),
    'triton': Backend(
        'triton',
        triton_ops.instance_means,
        triton_ops.instance_moments,
        triton_ops.similarity_sums,
        triton_ops.statistics,
        triton_ops.gated_statistics,
        functools.partial(rectified_norm, triton_ops),
    ),
    'cpp': Backend(
        'cpp',
        cpp_ops.instance_means,
        cpp_ops.instance_moments,
        cpp_ops.similarity_sums,
        cpp_ops.statistics,
        functools.partial(gated_statistics, cpp_ops.similarity_sums, cpp_ops.statistics),
        functools.partial(rectified_norm, cpp_ops),
    ),
}
_forced: str | None = None
# torch 2.6; before, an export looks like a compilation
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every layer computes by the backend ``name``, for comparisons and benchmarks."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f'there is no backend {name!r}: expected one of {", ".join(BACKENDS)}.')
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose_backend(x: Tensor, kernel_size: int) -> Backend:
    """The backend for an input: see :func:`name_and_reason`."""
    return BACKENDS[name_and_reason(x, kernel_size)[0]]


def name_and_reason(x: Tensor, kernel_size: int) -> tuple[str, str]:
    """Which backend computes a layer with such an input and kernel, and why: the first that applies.

    1. What :func:`use_backend` says.
    2. ``reference`` for an exporter or a tracer, which needs plain operators.
    3. ``triton`` where its kernels handle the input.
    4. ``reference`` for ``torch.compile``, which fuses plain operators itself.
    5. ``cpp`` where its kernels handle the input.
    6. ``torch``.
    """
    if _forced is not None:
        problem = cpp_ops.supports(x, kernel_size) if _forced == 'cpp' else None
        if problem is not None:
            raise ValueError(f'{problem}; use_backend({_forced!r}) leaves no other.')
        return _forced, f'use_backend({_forced!r})'
    if torch.jit.is_tracing() or _is_exporting():
        return 'reference', 'an export needs plain operators'
    if not x.is_cuda:
        problem = f'the Triton kernels take tensors on an NVIDIA GPU, got one on {x.device}'
    else:
        problem = triton_kernels.supports(x, kernel_size)
        if problem is None:
            return 'triton', 'the Triton kernels handle this input'
    if torch.compiler.is_compiling():
        return 'reference', f'{problem}, and torch.compile fuses plain operators itself'
    if not x.is_cuda:
        problem = cpp_ops.supports(x, kernel_size)
        if problem is None:
            return 'cpp', 'the C++ kernels handle this input'
    return 'torch', problem


def backend_info(layer: nn.Module, x: Tensor) -> str:
    """Which backend a layer takes for an input such as ``x``, and why, in one line.

    Args:
        layer: A norm layer of this package.
        x: An input, (N, C, H, W); its values do not matter, so a tensor on the meta device tells nothing of a GPU.

    Example:
        >>> mmubn.backend_info(mmubn.UBN(64), torch.zeros(2, 64, 8, 8))
        'cpp: the C++ kernels handle this input'
    """
    return ': '.join(name_and_reason(x, layer.kernel_size))
