"""Where kernels can be launched, and the launch itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmubn.ops.triton.device import interpreted, triton

__all__ = ['MOST_LAUNCHED', 'Launch', 'lacking', 'launch', 'recorded']

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


_recorder: list[Launch] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within this context launches are added to the list it returns and do nothing else, on tensors of any device."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


def lacking(device: torch.device) -> str | None:
    """Why kernels cannot be launched for tensors of this device; None where they can."""
    if triton is None:
        return 'Triton is not installed'
    if _recorder is not None or interpreted():
        return None
    if device.type != 'cuda' or torch.version.hip is not None:
        return f'the kernels take tensors on an NVIDIA GPU, got one on {device}'
    # The properties, not get_device_capability: torch.compile takes only these for a constant.
    if torch.cuda.get_device_properties(device).major < 8:
        return 'the kernels need a GPU of compute capability 8.0 or later'
    return None


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
    if device.type != 'cuda':
        # the interpreter
        kernel[(programs,)](*arguments, num_warps=num_warps, **constants)
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
        return
    if len(_launched) >= MOST_LAUNCHED:
        _launched.clear()
    _launched[key] = kernel[(programs,)](*arguments, num_warps=num_warps, **constants)
