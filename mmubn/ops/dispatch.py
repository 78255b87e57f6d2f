"""The one rule that chooses a backend for an input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mmubn.ops.backend import Backend
from mmubn.ops.cpp.backend import CppBackend
from mmubn.ops.reference import ReferenceBackend
from mmubn.ops.torch_backend import TorchBackend
from mmubn.ops.triton.backend import TritonBackend

__all__ = [
    'BACKENDS',
    'backend_info',
    'choose_backend',
    'is_exporting',
    'is_transformed',
    'name_and_reason',
    'use_backend',
]

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (ReferenceBackend(), TorchBackend(), TritonBackend(), CppBackend())
}
_forced: str | None = None
# torch 2.6; before, an export looks like a compilation
is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


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
    if (observer := _observer(x)) is not None:
        return 'reference', f'{observer} needs plain operators'
    if _forced is not None:
        # The Triton kernels check their input themselves: in Triton's interpreter they take tensors on the CPU too.
        problem = None if _forced == 'triton' else BACKENDS[_forced].problem(x, kernel_size)
        if problem is not None:
            raise ValueError(f'{problem}; use_backend({_forced!r}) leaves no other.')
        return _forced, f'use_backend({_forced!r})'
    if torch.jit.is_tracing() or is_exporting():
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


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work, other than within a compiler."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _observer(x: Tensor) -> str | None:
    """What must see every operator on x, where there is something: kernels would go past it."""
    if torch.compiler.is_compiling():
        return None  # the compiler knows the kernels' operators
    if is_transformed():
        return 'a transform of torch.func or forward-mode differentiation'
    if torch._C._len_torch_dispatch_stack() > 0:
        return 'a mode that watches or replaces operators'
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f'a {type(x).__name__}'
    return None


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
