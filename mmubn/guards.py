"""Keeps the norm types of this package from being silently replaced by what other libraries do to a BatchNorm.

UBN and its kin are ``_BatchNorm``, so that initialisers, optimizers and checkpoints of the ecosystem treat them as
norms. Two things that the ecosystem does to a ``_BatchNorm`` would drop what they add, without a word:

**Folding** it into the convolution before it (``fuse_conv_bn`` of mmcv, ``torch.nn.utils.fusion``, the deploy modes of
MMPretrain's RepVGG, RepLKNet, MobileOne, LeViT, ``efficient_conv_bn_eval`` of mmcv and MMEngine, and whoever else).
All of these compute ``running_var + eps``. No library is changed: a layer's ``eps`` is an :class:`UnfoldableEps`.

**Converting** it to SyncBatchNorm. :func:`install_guards` wraps the two functions that do this, and two more for an
early error or a right result (torch 2, mmengine 0.10). SyncUBN passes the conversion: it stays what it is.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from importlib import util
from typing import TYPE_CHECKING

import torch
import torch.fx
from torch import nn

if TYPE_CHECKING:
    from mmubn.layers import UnifiedNorm  # which needs this module

__all__ = ['UnfoldableEps', 'install_guards']


class UnfoldableEps(float):
    """A float for everyone who reads it, and an error for everyone who computes with it and a tensor.

    PyTorch hands an operation over to any argument that has ``__torch_function__``, a number included (torch >= 1.7).

    Args:
        value: The number.
        layer: The name of the type of the layer whose eps it is.
    """

    def __new__(cls, value: float, layer: str) -> UnfoldableEps:
        self = super().__new__(cls, value)
        self.layer = layer
        return self

    def __getnewargs__(self) -> tuple[float, str]:
        return float(self), self.layer

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        caller = sys._getframe(1).f_code.co_name
        operands = (*args, *(kwargs or {}).values())
        layer = next(value.layer for value in operands if isinstance(value, cls))
        channels = next((value.numel() for value in operands if isinstance(value, torch.Tensor)), '?')
        raise RuntimeError(
            f'{caller} treats the {layer} of {channels} channels as a BatchNorm and would drop what it adds to one, by '
            'pooled features of each image or by neighbouring pixels: leave the model as it is (no fuse_conv_bn, '
            'deploy mode or efficient_conv_bn_eval), or fold what can be with mmubn.deploy.fold.'
        )


@functools.cache
def install_guards() -> None:
    """Wrap the functions that would replace a norm of this package. Models without one pass through them as before."""
    from mmubn.layers import SyncUBN, UnifiedNorm  # these need UnfoldableEps

    def guarded(
        original: Callable, error: Callable[[str, UnifiedNorm], str], unchanged: type | tuple[type, ...] = ()
    ) -> Callable:
        """``original`` with an ``error`` for a model that contains such a norm, except where it is ``unchanged``."""

        @functools.wraps(original)
        def guard(*args, **kwargs):
            model = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, nn.Module)), nn.Identity())
            if isinstance(model, unchanged):
                return model
            for name, layer in model.named_modules():
                if isinstance(layer, UnifiedNorm) and not isinstance(layer, unchanged):
                    raise RuntimeError(error(f'{type(model).__name__}.{name}'.rstrip('.'), layer))
            return original(*args, **kwargs)

        return guard

    # torch: the method calls itself for every child, by way of the class. Used by MMDetection's RTMDet (use_syncbn).
    convert = nn.SyncBatchNorm.convert_sync_batchnorm.__func__
    nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(guarded(convert, _sync_error, unchanged=SyncUBN))

    # torch: each norm is one node of a traced graph, as those of torch.nn are, for fx tools (torch.fx.experimental,
    # torchvision's feature extraction): its forward depends on training mode, which a trace through it would freeze.
    is_leaf = torch.fx.Tracer.is_leaf_module

    @functools.wraps(is_leaf)
    def is_leaf_module(self, module, qualified_name):
        return isinstance(module, UnifiedNorm) or is_leaf(self, module, qualified_name)

    torch.fx.Tracer.is_leaf_module = is_leaf_module

    if util.find_spec('mmengine') is not None:
        # mmengine 0.10: the Runner's sync_bn, 'torch' or 'mmcv'.
        guard_sync = functools.partial(guarded, error=_sync_error, unchanged=SyncUBN)
        _replace('mmengine.model.utils', 'convert_sync_batchnorm', guard_sync)
        # mmengine 0.10: the Runner's efficient_conv_bn_eval. UnfoldableEps alone would stop it in the first validation.
        guard_efficient = functools.partial(guarded, error=_efficient_error)
        _replace(
            'mmengine.model.efficient_conv_bn_eval', 'turn_on_efficient_conv_bn_eval_for_single_model', guard_efficient
        )


def _sync_error(path: str, layer: UnifiedNorm) -> str:
    kind = type(layer).__name__
    error = (
        f'convert_sync_batchnorm (sync_bn, use_syncbn) would replace {path}, of type {kind}, by a plain SyncBatchNorm'
    )
    if (norm_cfg := _synchronized(layer)) is None:
        return f'{error}, and there is no synchronised {kind}: leave sync_bn and use_syncbn out.'
    return f'{error}: build the model with norm_cfg={norm_cfg} instead, its synchronised form, which stays as it is.'


def _synchronized(layer: UnifiedNorm) -> str | None:
    """The norm_cfg of the SyncUBN that computes what ``layer`` does; None where there is none."""
    from mmubn.layers import SyncUBN

    if layer.scaling not in (None, 'rectified'):
        return None
    arguments = {'type': 'SyncUBN'}
    for name, parameter in list(inspect.signature(SyncUBN).parameters.items())[1:]:  # all but num_features
        without = None if name == 'threshold' else parameter.default  # of a layer that has no gate
        value = layer.scaling is not None if name == 'scaling' else getattr(layer, name, without)
        if value != parameter.default:
            arguments[name] = value
    return f'dict({", ".join(f"{name}={value!r}" for name, value in arguments.items())})'


def _efficient_error(path: str, layer: UnifiedNorm) -> str:
    kind = type(layer).__name__
    return (
        f'efficient_conv_bn_eval would fold {path}, of type {kind}, into the convolution before it as if it were a '
        f'BatchNorm: leave efficient_conv_bn_eval out, or name only modules without {kind}.'
    )


def _replace(module: str, name: str, wrap: Callable[[Callable], Callable]) -> None:
    """Replace the function ``module.name``, and the same name in modules that imported it before.

    A copy under another name still meets the replacement, for every child of the model that it gets: by its name in
    ``module``, the function calls itself (convert_sync_batchnorm) or is called (the other one).
    """
    original = getattr(importlib.import_module(module), name)
    replacement = wrap(original)
    for other in list(sys.modules.values()):
        if getattr(other, '__dict__', {}).get(name) is original:
            setattr(other, name, replacement)
