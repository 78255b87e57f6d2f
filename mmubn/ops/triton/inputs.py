"""What the functions that launch ask of their inputs, and how the kernels read them."""

from __future__ import annotations

import math
import numbers
from typing import NoReturn, overload

import torch
from torch import Tensor

from mmubn.ops.triton import runtime
from mmubn.ops.types import KERNEL_SCALINGS

__all__ = [
    'DTYPES',
    'KERNEL_SIZES',
    'check_device',
    'dense',
    'dense_gradient',
    'dense_input',
    'fail',
    'float32',
    'is_channels_last',
    'kernel_size_of',
    'number',
    'one_bool',
    'problem',
    'scaling_code',
]

KERNEL_SIZES = (1, 3, 5, 7)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# SCALING of the kernels, which compare it with 0, 1 and 2
SCALINGS = {scaling: code for code, scaling in enumerate(KERNEL_SCALINGS)}


def problem(x: Tensor, kernel_size: int = 1) -> str | None:
    """Why the kernels cannot handle ``x`` with a ``kernel_size`` x ``kernel_size`` kernel; None where they can.

    An input of any strides is fine: one that is dense in neither layout is copied first. One without elements is, too:
    no kernel is launched for it, but those that a batch of several processes needs.
    """
    if (reason := runtime.lacking(x.device)) is not None:
        return reason
    if x.dim() != 4:
        return f'the kernels take (N, C, H, W), got {x.dim()} dimensions'
    if x.dtype not in DTYPES:
        return f'the kernels take float32, float16 and bfloat16, got {x.dtype}'
    if kernel_size not in KERNEL_SIZES:
        return f'the kernels take kernel sizes 1, 3, 5 and 7, got {kernel_size}'
    if x.layout != torch.strided:
        return f'the kernels take a dense tensor, got one of layout {x.layout}'
    # Planes, and offsets within a sample, are counted in int32, a block beyond the end included; x may be larger.
    samples, channels, height, width = x.shape
    if max(samples * channels, channels * max(height * width, 7 * 7)) >= 2**30:
        return f'the kernels take samples of fewer than 2^30 values and as many planes, got {tuple(x.shape)}'
    return None


def fail(message: str) -> NoReturn:
    raise ValueError(f'mmubn kernels: {message}')


def check_device(device: torch.device) -> None:
    if (reason := runtime.lacking(device)) is not None:
        fail(f'{reason}.')


def _in_memory(value: Tensor) -> Tensor:
    """``value`` with its values in memory: torch may negate lazily, and keeps no zeros where all are."""
    if value._is_zerotensor():
        return value.clone()
    return value.resolve_neg() if value.is_neg() else value


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """``x`` in NCHW or channels-last memory, whichever is nearer to its strides."""
    x = _in_memory(x)
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    near = x.dim() == 4 and x.stride(1) == 1 and x.stride(3) != 1
    return x.contiguous(memory_format=torch.channels_last if near else torch.contiguous_format)


def dense_input(x: Tensor, kernel_size: int = 1) -> Tensor:
    """:func:`dense`, or an error where there is a :func:`problem`."""
    if (reason := problem(x, kernel_size)) is not None:
        fail(f'{reason}.')
    if x.numel() == 0:
        fail(f'the kernels take an input with elements, got {tuple(x.shape)}.')
    runtime.check_plain(x)
    return dense(x)


def dense_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` in the memory format of the dense ``x``."""
    traits = ('shape', dy.shape, x.shape), ('dtype', dy.dtype, x.dtype), ('device', dy.device, x.device)
    for name, found, expected in traits:
        if found != expected:
            fail(f'dy must have the {name} of x, {expected}, got {found}.')
    runtime.check_plain(dy)
    return _in_memory(dy).contiguous(
        memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format
    )


@overload
def float32(value: Tensor, name: str, device: torch.device, *shape: int) -> Tensor: ...
@overload
def float32(value: None, name: str, device: torch.device, *shape: int) -> None: ...
@overload
def float32(value: Tensor | None, name: str, device: torch.device, *shape: int) -> Tensor | None: ...
def float32(value: Tensor | None, name: str, device: torch.device, *shape: int) -> Tensor | None:
    """A coefficient as the kernels read it."""
    if value is None:
        return None
    if value.shape != shape:
        fail(f'{name} must have shape {shape}, got {tuple(value.shape)}.')
    if value.device != device:
        fail(f'{name} must be on {device}, got {value.device}.')
    value = _in_memory(value)
    # Mostly there is nothing to do, and two calls that do nothing are a third of this function's time.
    if value.dtype is torch.float32 and value.is_contiguous():
        return value
    return value.float().contiguous()


def one_bool(condensed: Tensor | None, device: torch.device) -> Tensor | None:
    """``condensed``, checked."""
    if condensed is not None and (condensed.dtype != torch.bool or condensed.numel() != 1):
        fail(f'condensed must be one bool, got {condensed.dtype} of shape {tuple(condensed.shape)}.')
    if condensed is not None and condensed.device != device:
        fail(f'condensed must be on {device}, got {condensed.device}.')
    return condensed


def scaling_code(scaling: str | None, scale_weight: Tensor | None, scale_bias: Tensor | None) -> int:
    """SCALING of the kernels."""
    if scaling not in SCALINGS:
        fail(f'scaling must be None, rectified or instance, got {scaling!r}.')
    if not (scaling is None) == (scale_weight is None) == (scale_bias is None):
        fail('scaling, scale_weight and scale_bias come together.')
    return SCALINGS[scaling]


def number(value: float, name: str) -> float:
    """``value`` as a float, if it is on the host: float() of a tensor would wait for the device."""
    if not isinstance(value, numbers.Real):  # NumPy's too
        fail(f'{name} must be a number, got {type(value).__name__}.')
    return float(value)


def kernel_size_of(neighbor_weight: Tensor | None) -> int:
    """k of the taps beside the centre, (C, k*k - 1); 1 where there are none."""
    if neighbor_weight is None:
        return 1
    taps = neighbor_weight.shape[-1] + 1
    if taps > 1 and (neighbor_weight.dim() != 2 or math.isqrt(taps) ** 2 != taps):
        fail(f'neighbor_weight must be (C, k*k - 1), got {tuple(neighbor_weight.shape)}.')
    return math.isqrt(taps)
