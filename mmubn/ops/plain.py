"""Which tensors are torch's own: kernels read memory, and go past what a subclass or a transform does with values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ['wrapped']


def wrapped(x: Tensor) -> str | None:
    """What ``x`` is where it is no plain tensor: it may have no memory then, or mean something else by its values."""
    kind = type(x)
    if kind is not Tensor and kind is not nn.Parameter:
        return f'a {kind.__name__}'
    if torch._C._are_functorch_transforms_active() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        return 'a tensor of a transform of torch.func'
    return None
