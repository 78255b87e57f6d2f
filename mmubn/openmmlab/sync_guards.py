"""Makes the conversion of a model to SyncBatchNorm an error before it replaces the first norm of this package.

These norms are BatchNorm2d, so that initialisers, optimizers and checkpoints of the ecosystem treat them as norms. The
conversion takes any ``_BatchNorm`` and would drop, without a word, what they add to one. A SyncUBN passes it and stays
what it is. (Other converters: :mod:`mmubn.layers.replacement`. What folds a BatchNorm into a convolution needs no
change: see :mod:`mmubn.layers.unfoldable_eps`.)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import nn

from mmubn.layers import SyncUBN, UnifiedNorm
from mmubn.layers.replacement import norm_cfg_of_synchronized

__all__ = ['guard_mmengine', 'guard_torch']


def guard_torch(original: classmethod) -> classmethod:
    """Guard ``SyncBatchNorm.convert_sync_batchnorm``, which calls itself for every child, by way of the class."""
    return classmethod(guard_mmengine(original.__func__))


def guard_mmengine(original: Callable) -> Callable:
    """Guard MMEngine's function, for ``sync_bn='torch'`` and ``'mmcv'``.

    It calls itself for every child by its name in its own module, so that the guard there meets also the model that a
    caller hands to a copy of the old function.

    Args:
        original: The function.

    Returns:
        A function that raises a RuntimeError, before anything is converted, for a model with a norm of this package
        that is no SyncUBN, and calls ``original`` for any other. A SyncUBN takes a process group that is given.
    """

    @functools.wraps(original)
    def guard(*args, **kwargs):
        model = next((each for each in (*args, *kwargs.values()) if isinstance(each, nn.Module)), nn.Identity())
        if isinstance(model, SyncUBN):
            group = inspect.signature(original).bind(*args, **kwargs).arguments.get('process_group')
            model.process_group = model.process_group if group is None else group
            return model
        for name, layer in model.named_modules():
            if isinstance(layer, UnifiedNorm) and not isinstance(layer, SyncUBN):
                raise RuntimeError(_error(f'{type(model).__name__}.{name}'.rstrip('.'), layer))
        return original(*args, **kwargs)

    return guard


def _error(path: str, layer: UnifiedNorm) -> str:
    kind = type(layer).__name__
    error = (
        f'convert_sync_batchnorm (sync_bn, use_syncbn) would replace {path}, of type {kind}, by a plain SyncBatchNorm'
    )
    if (norm_cfg := norm_cfg_of_synchronized(layer)) is None:
        return f'{error}, and there is no synchronised {kind}: leave sync_bn and use_syncbn out.'
    return f'{error}: build the model with norm_cfg={norm_cfg} instead, its synchronised form, which stays as it is.'
