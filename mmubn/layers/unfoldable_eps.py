"""An ``eps`` that keeps other code from folding a norm of this package into a convolution.

Whoever folds a BatchNorm (``fuse_conv_bn`` of mmcv, ``torch.nn.utils.fusion``, the deploy modes of MMPretrain's
networks, ``efficient_conv_bn_eval`` of mmcv and MMEngine) computes ``running_var + eps``. That would drop what these
layers add to a BatchNorm, without a word. No library is changed to prevent it: this addition itself is the error.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import nn

__all__ = ['UnfoldableEps']


class UnfoldableEps(float):
    """A float for everyone, and an error for who computes with it and the variance of the layer that it is from.

    PyTorch hands an operation over to any argument that has ``__torch_function__``, a number included (torch >= 1.7).
    With other tensors it is a number; copied or pickled it is a plain float.

    Args:
        value: The number.
        layer: The layer that has this eps.
    """

    _layer: weakref.ref[nn.Module]

    def __new__(cls, value: float, layer: nn.Module) -> UnfoldableEps:
        self = super().__new__(cls, value)
        self._layer = weakref.ref(layer)
        return self

    def __reduce__(self) -> tuple:
        return float, (float(self),)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return self.__reduce__()

    @property
    def layer(self) -> nn.Module | None:
        """The layer that has this eps; None where it is gone."""
        return self._layer()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = (*args, *kwargs.values())
        for eps in operands:
            layer: Any = eps.layer if isinstance(eps, cls) else None
            if any(_is_variance(operand, layer) for operand in operands):
                caller = sys._getframe(1).f_code.co_name
                raise RuntimeError(
                    f'{caller} treats the {type(layer).__name__} of {layer.num_features} channels as a '
                    'BatchNorm and would drop what it adds to one, by pooled features of each image or by neighbouring '
                    'pixels: leave the model as it is (no fuse_conv_bn, deploy mode or efficient_conv_bn_eval), or '
                    'fold what can be with mmubn.deploy.fold.'
                )
        return func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, UnfoldableEps) else value


def _is_variance(operand: Any, layer: nn.Module | None) -> bool:
    """Whether ``operand`` is the running variance of ``layer``: itself, a view of it, or a copy in any dtype."""
    var = getattr(layer, 'running_var', None)
    if not isinstance(operand, torch.Tensor) or var is None:
        return False
    if type(operand) not in (torch.Tensor, nn.Parameter) or operand.is_meta or var.is_meta:
        return True  # of a trace or a transform: it has no values to compare
    if operand.untyped_storage().data_ptr() == var.untyped_storage().data_ptr():
        return True
    if operand.numel() != var.numel() or operand.device != var.device:
        return False
    # A variance of ones is that of any fresh norm.
    copy = var.detach().to(operand.dtype)
    return bool((var != 1).any()) and torch.equal(operand.detach().reshape(copy.shape), copy)
