"""Keeps UBN from being silently replaced by what other libraries do to a BatchNorm.

A UBN is a ``_BatchNorm``, so that initialisers, optimizers and checkpoints of the ecosystem treat it as a norm. Two
things that the ecosystem does to a ``_BatchNorm`` would drop what UBN adds, without a word:

**Folding** it into the convolution before it (``fuse_conv_bn`` of mmcv, ``torch.nn.utils.fusion``, the deploy modes of
MMPretrain's RepVGG, RepLKNet, MobileOne, LeViT, ``efficient_conv_bn_eval`` of mmcv and MMEngine, and whoever else).
All of these compute ``running_var + eps``. No library is changed: UBN's ``eps`` is an :class:`UnfoldableEps`.

**Converting** it to SyncBatchNorm. :func:`install_guards` wraps the two functions that do this, and two more for an
early error or a right result (torch 2, mmengine 0.10). SyncUBN passes the conversion: it stays what it is.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib import util

import torch
import torch.fx
from torch import nn

__all__ = ['UnfoldableEps', 'install_guards']


class UnfoldableEps(float):
    """A float for everyone who reads it, and an error for everyone who computes with it and a tensor.

    PyTorch hands an operation over to any argument that has ``__torch_function__``, a number included (torch >= 1.7).
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        caller = sys._getframe(1).f_code.co_name
        operands = (*args, *(kwargs or {}).values())
        channels = next((value.numel() for value in operands if isinstance(value, torch.Tensor)), '?')
        raise RuntimeError(
            f'{caller} treats a UBN of {channels} channels as a BatchNorm, but UBN depends on the pooled features of '
            'each image and on neighbouring pixels and cannot be folded into a convolution: leave the model as it is '
            '(no fuse_conv_bn, deploy mode or efficient_conv_bn_eval), or fold what can be with mmubn.deploy.fold.'
        )


@functools.cache
def install_guards() -> None:
    """Wrap the functions that would replace UBN. Models without UBN pass through them as before."""
    from mmubn.layers import SyncUBN, UnifiedNorm  # these need UnfoldableEps

    def guarded(original: Callable, message: str, unchanged: type | tuple[type, ...] = ()) -> Callable:
        """``original`` with an error for a model that contains a UBN, except where it is one of ``unchanged``."""

        @functools.wraps(original)
        def guard(*args, **kwargs):
            model = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, nn.Module)), nn.Identity())
            if isinstance(model, unchanged):
                return model
            for name, layer in model.named_modules():
                if isinstance(layer, UnifiedNorm) and not isinstance(layer, unchanged):
                    raise RuntimeError(message.format(layer=f'{type(model).__name__}.{name}'.rstrip('.')))
            return original(*args, **kwargs)

        return guard

    sync_message = (
        'convert_sync_batchnorm (sync_bn, use_syncbn) would replace {layer}, a UBN, by a plain SyncBatchNorm: build '
        "the model with norm_cfg=dict(type='SyncUBN') instead, which stays as it is."
    )
    # torch: the method calls itself for every child, by way of the class. Used by MMDetection's RTMDet (use_syncbn).
    convert = nn.SyncBatchNorm.convert_sync_batchnorm.__func__
    nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(guarded(convert, sync_message, unchanged=SyncUBN))

    # torch: UBN is one node of a traced graph, as the norms of torch.nn are, for fx tools (torch.fx.experimental,
    # torchvision's feature extraction): its forward depends on training mode, which a trace through it would freeze.
    is_leaf = torch.fx.Tracer.is_leaf_module

    @functools.wraps(is_leaf)
    def is_leaf_module(self, module, qualified_name):
        return isinstance(module, UnifiedNorm) or is_leaf(self, module, qualified_name)

    torch.fx.Tracer.is_leaf_module = is_leaf_module

    if util.find_spec('mmengine') is not None:
        # mmengine 0.10: the Runner's sync_bn, 'torch' or 'mmcv'.
        guard_sync = functools.partial(guarded, message=sync_message, unchanged=SyncUBN)
        _replace('mmengine.model.utils', 'convert_sync_batchnorm', guard_sync)
        # mmengine 0.10: the Runner's efficient_conv_bn_eval. UnfoldableEps alone would stop it in the first validation.
        efficient_message = (
            'efficient_conv_bn_eval would fold {layer}, a UBN, into the convolution before it as if it were a '
            'BatchNorm: leave efficient_conv_bn_eval out, or name only modules without UBN.'
        )
        guard_efficient = functools.partial(guarded, message=efficient_message)
        _replace(
            'mmengine.model.efficient_conv_bn_eval', 'turn_on_efficient_conv_bn_eval_for_single_model', guard_efficient
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
