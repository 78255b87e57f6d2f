"""Where kernels can be launched, and the launch itself."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mmubn.ops.plain import wrapped
from mmubn.ops.triton.device import TRITON_PROBLEM, interpreted

__all__ = [
    'MOST_LAUNCHED',
    'Launch',
    'Launched',
    'check_plain',
    'is_recording',
    'is_virtual',
    'lacking',
    'launch',
    'observed',
    'recorded',
    'takes_addresses',
]

# What Triton compiled for arguments seen before; emptied when it has grown to this many.
MOST_LAUNCHED = 2**14
_launched: dict[tuple, Any] = {}


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    programs: int
    arguments: tuple  # the first parameters of the kernel
    constants: dict[str, int | bool]  # the others
    num_warps: int


class Launched(NamedTuple):
    """What was launched, ready to be launched again."""

    run: Callable  # the compiled kernel on its grid, which takes all arguments
    arguments: tuple
    constants: tuple


class _Observer(threading.local):
    launches: list[Launched] | None = None


_recorder: list[Launch] | None = None
_observer = _Observer()


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within this context launches are added to the list it returns and do nothing else, on tensors of any device."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


def is_recording() -> bool:
    """Whether launches are recorded and do nothing."""
    return _recorder is not None


@contextlib.contextmanager
def observed() -> Iterator[list[Launched]]:
    """Within this context the launches of this thread are added to the list it returns, besides being launched."""
    before, _observer.launches = _observer.launches, []
    try:
        yield _observer.launches
    finally:
        _observer.launches = before


_lacking: dict[torch.device, str | None] = {}  # what does not change while a process runs


def lacking(device: torch.device) -> str | None:
    """Why kernels cannot be launched for tensors of this device; None where they can."""
    try:
        found = _lacking[device]
    except KeyError:
        found = _lacking[device] = _what_lacks(device)
    if found is None or (TRITON_PROBLEM is None and is_virtual()):
        return None
    return found


# A compiler takes what it returns for a constant. By torch.compiler.assume_constant_result, which sets this, an import
# of mmubn would load the compiler.
lacking._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_virtual() -> bool:
    """Whether launches reach no device: they are recorded, or run in Triton's interpreter."""
    return _recorder is not None or interpreted()


def _what_lacks(device: torch.device) -> str | None:
    if TRITON_PROBLEM is not None:
        return TRITON_PROBLEM
    if device.type != 'cuda' or torch.version.hip is not None:
        return f'the kernels take tensors on an NVIDIA GPU, got one on {device}'
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        found = f'{properties.name} has {properties.major}.{properties.minor}'
        return f'the kernels need a GPU of compute capability 8.0 or later, {found}'
    return None


def takes_addresses(device: torch.device) -> bool:
    """Whether launches are those of a GPU; Triton's interpreter takes tensors on the CPU."""
    return device.type == 'cuda'


def check_plain(value: Tensor) -> None:
    """Raise a ValueError for a tensor that has no memory of its own, which kernels would read or write."""
    if (kind := wrapped(value)) is not None:
        raise ValueError(f'mmubn kernels: they take plain tensors, got {kind}: call the layer, which takes others too.')


def launch(
    kernel: Any, programs: int, device: torch.device, *arguments: Any, num_warps: int = 4, **constants: int | bool
) -> None:
    """Launch ``kernel``, whose parameters are ``arguments`` and then ``constants``, in their order.

    For arguments as in an earlier launch (the same numbers, tensors of the same alignment, the first of the same dtype:
    the others have that, or float32) it takes what Triton compiled then: to let Triton find it again takes the host
    longer than a small map takes the device.
    """
    if _recorder is not None:
        _recorder.append(Launch(kernel, programs, arguments, constants, num_warps))
        return
    for value in arguments:
        if isinstance(value, Tensor):
            check_plain(value)
    if not takes_addresses(device):
        interpret = functools.partial(_interpret, kernel, programs, num_warps)
        interpret(*arguments, *constants.values())
        _note(interpret, arguments, constants)
        return
    index = torch.cuda.current_device()
    if device.index != index:
        with torch.cuda.device(device):
            launch(kernel, programs, device, *arguments, num_warps=num_warps, **constants)
        return
    traits = [value.data_ptr() % 16 if isinstance(value, Tensor) else value for value in arguments]
    key = (kernel.fn, index, arguments[0].dtype, num_warps, *constants.values(), *traits)
    compiled = _launched.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments, *constants.values())
    else:
        if len(_launched) >= MOST_LAUNCHED:
            _launched.clear()
        compiled = _launched[key] = kernel[(programs,)](*arguments, num_warps=num_warps, **constants)
    _note(compiled[(programs, 1, 1)], arguments, constants)


def _note(run: Callable, arguments: tuple, constants: dict[str, int | bool]) -> None:
    if _observer.launches is not None:
        _observer.launches.append(Launched(run, arguments, tuple(constants.values())))


def _interpret(kernel: Any, programs: int, num_warps: int, *arguments: Any) -> None:
    with _disable_current_modes():  # which watch a step, not how the interpreter does it
        kernel[(programs,)](*arguments, num_warps=num_warps)
