"""The one rule that chooses a backend for an input, and the switch that overrules it."""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmubn.ops.backend import Backend
from mmubn.ops.cpp.backend import CppBackend
from mmubn.ops.plain import wrapped
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
# torch 2.6; before, an export looks like a compilation
is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


class Switch(NamedTuple):
    """A backend that is used whatever the rule says."""

    backend: str
    source: str  # what says so


def _switch_of_environment() -> Switch | None:
    """What the environment variable MMUBN_BACKEND says; None where it is not set, or empty."""
    name = os.environ.get('MMUBN_BACKEND')
    if not name:
        return None
    if name not in BACKENDS:
        raise ValueError(f'MMUBN_BACKEND must be one of {", ".join(BACKENDS)}, got {name!r}.')
    return Switch(name, f'MMUBN_BACKEND={name}')


_switch = _switch_of_environment()


class use_backend(contextlib.ContextDecorator):  # noqa: N801 - called like a function, as torch.set_grad_enabled is
    """Let every layer of this process compute by the backend ``name``, from now on or within a context.

    ``use_backend('torch')`` holds until the next call; ``with use_backend('torch'): ...`` ends as it began, and
    so does a call of a function with ``@use_backend('torch')``.
    ``use_backend(None)`` leaves the choice to the rule again, also where the environment variable MMUBN_BACKEND, which
    does the same from the start of a process, says otherwise.

    Args:
        name: ``'reference'``, ``'torch'``, ``'triton'`` or ``'cpp'``, or None.

    Raises:
        ValueError: There is no such backend. From a layer: the backend cannot compute its input.
    """

    def __init__(self, name: str | None) -> None:
        global _switch
        if name is not None and (not isinstance(name, str) or name not in BACKENDS):
            raise ValueError(f'there is no backend {name!r}: expected one of {", ".join(BACKENDS)}, or None.')
        self._before: Switch | None = _switch
        self._switch = _switch = None if name is None else Switch(name, f'use_backend({name!r})')

    def __call__(self, function: Any) -> Any:
        """Decorate a function: only within its calls."""
        global _switch
        _switch = self._before
        return super().__call__(function)

    def __enter__(self) -> None:
        global _switch
        if _switch is not self._switch:  # not at once after the call
            self._before, _switch = _switch, self._switch

    def __exit__(self, *_: object) -> None:
        global _switch
        _switch = self._before


def choose_backend(x: Tensor, kernel_size: int) -> Backend:
    """The backend that :func:`name_and_reason` names, ready for use.

    A backend that fails to get ready reports it once, and from then on says so in :meth:`Backend.problem`.
    """
    name, _ = name_and_reason(x, kernel_size)
    backend = BACKENDS[name]
    if backend.prepare(x.device) is None:
        return backend
    name, _ = name_and_reason(x, kernel_size)
    return BACKENDS[name]


def name_and_reason(x: Tensor, kernel_size: int) -> tuple[str, str]:
    """Name the backend that computes a layer with such an input and kernel, and say why.

    docs/performance.md has the rule in words. Compiles and launches nothing.

    Raises:
        ValueError: :func:`use_backend` or MMUBN_BACKEND names one that cannot compute the input.
    """
    if (observer := _observer(x)) is not None:
        return 'reference', f'{observer} needs plain operators'
    if _switch is not None:
        if _switch.backend in ('cpp', 'triton') and (torch.jit.is_tracing() or is_exporting()):
            problem: str | None = 'an export needs plain operators'
        else:
            problem = BACKENDS[_switch.backend].problem(x, kernel_size)
        if problem is not None:
            raise ValueError(f'{problem}; {_switch.source} leaves no other.')
        return _switch
    if torch.jit.is_tracing() or is_exporting():
        return 'reference', 'an export needs plain operators'
    problem = None
    if x.is_cuda:  # in Triton's interpreter its kernels take tensors on the CPU, too
        problem = BACKENDS['triton'].problem(x, kernel_size)
        if problem is None:
            return 'triton', 'the Triton kernels handle this input'
    if torch.compiler.is_compiling():
        reason = 'torch.compile fuses plain operators itself'
        return 'reference', reason if problem is None else f'{problem}, and {reason}'
    if problem is None:
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
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return 'a transform of torch.func or forward-mode differentiation'
    if torch._C._len_torch_dispatch_stack() > 0:
        return 'a mode that watches or replaces operators'
    return None if type(x) is Tensor else wrapped(x)  # sooner for most


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
