"""The one rule that chooses a backend for an input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmubn.ops.backend import Backend
from mmubn.ops.cpp.backend import CppBackend
from mmubn.ops.reference import ReferenceBackend
from mmubn.ops.torch_backend import TorchBackend
from mmubn.ops.triton.backend import TritonBackend

__all__ = ['BACKENDS', 'backend_info', 'choose_backend', 'name_and_reason', 'use_backend']

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (ReferenceBackend(), TorchBackend(), TritonBackend(), CppBackend())
}
_forced: str | None = None
# torch 2.6; before, an export looks like a compilation
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every layer computes by the backend ``name``, for comparisons and benchmarks.

    Raises:
        ValueError: There is no such backend. From a layer: the backend cannot compute its input.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f'there is no backend {name!r}: expected one of {", ".join(BACKENDS)}.')
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose_backend(x: Tensor, kernel_size: int) -> Backend:
    """The backend that :func:`name_and_reason` names, ready for use.

    A backend that fails to get ready reports it once, and from then on says so in :meth:`Backend.problem`.
    """
    name, _ = name_and_reason(x, kernel_size)
    if BACKENDS[name].prepare() is not None:
        name, _ = name_and_reason(x, kernel_size)
    return BACKENDS[name]


def name_and_reason(x: Tensor, kernel_size: int) -> tuple[str, str]:
    """Name the backend that computes a layer with such an input and kernel, and say why.

    docs/performance.md has the rule in words. Compiles and launches nothing.

    Raises:
        ValueError: :func:`use_backend` names one that cannot compute the input.
    """
    if _forced is not None:
        # The Triton kernels check their input themselves: in Triton's interpreter they take tensors on the CPU too.
        problem = None if _forced == 'triton' else BACKENDS[_forced].problem(x, kernel_size)
        if problem is not None:
            raise ValueError(f'{problem}; use_backend({_forced!r}) leaves no other.')
        return _forced, f'use_backend({_forced!r})'
    if torch.jit.is_tracing() or _is_exporting():
        return 'reference', 'an export needs plain operators'
    problem = BACKENDS['triton'].problem(x, kernel_size)
    if problem is None:
        return 'triton', 'the Triton kernels handle this input'
    if torch.compiler.is_compiling():
        return 'reference', f'{problem}, and torch.compile fuses plain operators itself'
    if not x.is_cuda:
        problem = BACKENDS['cpp'].problem(x, kernel_size)
        if problem is None:
            return 'cpp', 'the C++ kernels handle this input'
    return 'torch', problem


def backend_info(layer: Any, x: Tensor) -> str:
    """Which backend a layer takes for an input such as ``x``, and why, in one line. Compiles and launches nothing.

    Args:
        layer: A norm layer of this package.
        x: An input, (N, C, H, W). Its values do not matter, but its device does: a meta tensor says nothing of a GPU.

    Example:
        >>> mmubn.backend_info(mmubn.UBN(64), torch.zeros(2, 64, 8, 8))
        'cpp: the C++ kernels handle this input'
    """
    return ': '.join(name_and_reason(x, layer.kernel_size))
