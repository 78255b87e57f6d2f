"""An ``eps`` that keeps other code from folding a norm of this package into a convolution.

Whoever folds a BatchNorm (``fuse_conv_bn`` of mmcv, ``torch.nn.utils.fusion``, the deploy modes of MMPretrain's
networks, ``efficient_conv_bn_eval`` of mmcv and MMEngine) computes ``running_var + eps``. That would drop what these
layers add to a BatchNorm, without a word. No library is changed to prevent it: the addition itself is the error.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ['UnfoldableEps']


class UnfoldableEps(float):
    """A float for everyone who reads it, and an error for everyone who computes with it and a tensor.

    PyTorch hands an operation over to any argument that has ``__torch_function__``, a number included (torch >= 1.7).

    Args:
        value: The number.
        layer: Name of the type of the layer that has this eps.
    """

    layer: str

    def __new__(cls, value: float, layer: str) -> UnfoldableEps:
        self = super().__new__(cls, value)
        self.layer = layer
        return self

    def __getnewargs__(self) -> tuple[float, str]:  # type: ignore[override] # float's own has the number alone
        return float(self), self.layer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        caller = sys._getframe(1).f_code.co_name
        operands = (*args, *(kwargs or {}).values())
        layer = next(value.layer for value in operands if isinstance(value, cls))
        channels = next((value.numel() for value in operands if isinstance(value, torch.Tensor)), '?')
        raise RuntimeError(
            f'{caller} treats the {layer} of {channels} channels as a BatchNorm and would drop what it adds to one, by '
            'pooled features of each image or by neighbouring pixels: leave the model as it is (no fuse_conv_bn, '
            'deploy mode or efficient_conv_bn_eval), or fold what can be with mmubn.deploy.fold.'
        )
