"""Lets networks of timm have the norms of this package where they make a norm and its activation in one layer.

EfficientNet, RegNet, DenseNet and others ask timm's ``get_norm_act_layer(norm_layer, act_layer)`` for what makes such a
layer. It knows timm's own types alone, and a function, such as MMPretrain's TIMMBackbone gives it, is never told of
the activation: a network without activations is built. With the change here, a norm of this package is made with two
children, ``drop`` and ``act``, as in timm's BatchNormAct2d, through which its output goes.

This is part of the table in :mod:`mmubn.openmmlab.patches`. timm is not imported here; the change waits for it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from importlib import abc, machinery, util
from typing import Any

from torch import nn

from mmubn.layers import UnifiedNorm

__all__ = ['keep_activations', 'with_our_norms']

MODULE = 'timm.layers.create_norm_act'
FUNCTION = 'get_norm_act_layer'


def keep_activations() -> None:
    """Change timm's function where timm is loaded; else wait in ``sys.meta_path`` until it is."""
    if MODULE in sys.modules:
        _change(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _Finder())


def _change(module: types.ModuleType) -> None:
    """Change the function, and its copies in modules that imported it."""
    original = getattr(module, FUNCTION)
    new = with_our_norms(original, module.BatchNormAct2d)
    for each in list(sys.modules.values()):
        if getattr(each, '__dict__', {}).get(FUNCTION) is original:
            setattr(each, FUNCTION, new)


class _Finder(abc.MetaPathFinder):
    """Lets the loader of the module with timm's function change it, before any other module can copy it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)  # it has found what it waits for, and the others are to find it too
        spec = util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(abc.Loader):
    """Another loader, and the change after it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: machinery.ModuleSpec) -> types.ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader  # as if this one had not been there
        self.loader.exec_module(module)
        _change(module)


def with_our_norms(original: Callable, batch_norm_act: type) -> Callable:
    """timm's ``get_norm_act_layer`` that knows the norms of this package, and is ``original`` for any other.

    It knows them as a class (or a subclass of one's own), in a ``functools.partial``, and in the function that
    TIMMBackbone makes of the name of a registered norm. Any other function must make norm and activation itself; one
    that makes a norm of this package alone is an error when it does.

    Args:
        original: The function.
        batch_norm_act: timm's BatchNormAct2d, whose arguments the network gives.
    """
    theirs = inspect.signature(batch_norm_act).parameters.keys() - inspect.signature(nn.BatchNorm2d).parameters.keys()

    # A function with keywords alone, which timm's can take apart and bind again, as DPN lets it.
    def norm_with_activation(*args: Any, norm_type: type[UnifiedNorm], **kwargs: Any) -> UnifiedNorm:
        made = batch_norm_act(1, **{name: kwargs.pop(name) for name in theirs & kwargs.keys()})
        layer = norm_type(*args, **kwargs)
        layer.drop, layer.act = made.drop, made.act
        return layer

    @functools.wraps(original)
    def get_norm_act_layer(norm_layer: Any, act_layer: Any = None) -> Any:
        norm, options = _norm_and_options(norm_layer)
        if isinstance(norm, type) and issubclass(norm, UnifiedNorm):
            return functools.partial(norm_with_activation, norm_type=norm, **{'act_layer': act_layer, **options})
        make = original(norm_layer, act_layer)
        return _checked(make, act_layer) if isinstance(make, types.FunctionType) else make

    return get_norm_act_layer


def _norm_and_options(norm_layer: Any) -> tuple[Any, dict]:
    """What is in a partial, or in TIMMBackbone's function, and the keywords on the way to it."""
    if isinstance(norm_layer, functools.partial):
        norm, options = _norm_and_options(norm_layer.func)
        return norm, {**options, **norm_layer.keywords}
    if isinstance(norm_layer, types.FunctionType) and (norm_layer.__module__ or '').endswith('.timm_backbone'):
        return _norm_and_options(inspect.getclosurevars(norm_layer).nonlocals.get('norm_class'))
    return norm_layer, {}


def _checked(make: Callable, act_layer: Any) -> Callable:
    """A function that makes a norm and its activation, or an error where the activation is missing in one of ours."""

    @functools.wraps(make)
    def checked(*args: Any, **kwargs: Any) -> Any:
        layer = make(*args, **kwargs)
        is_wanted = act_layer is not None and kwargs.get('apply_act', True)
        if is_wanted and isinstance(layer, UnifiedNorm) and 'act' not in layer._modules:
            name = type(layer).__name__
            raise TypeError(
                f'norm_layer is a function and makes a {name} without the activation that this network of timm wants '
                f'in the same layer: give timm the class, or functools.partial({name}, ...) for arguments of it.'
            )
        return layer

    return checked
