"""The net for code that puts another norm in the place of one of this package, taking it for a BatchNorm.

Converters of all libraries go over the modules of a model, make a SyncBatchNorm, a frozen or a quantized norm from each
BatchNorm, and set it in its place. Torch tells of every module that is set as a part of another one, so that a
replacement of ours is seen whoever makes it, and no library is changed. It is an error where the new norm is made from
the old one, by its eps or its tensors. A norm that owes the old one nothing is the user's own choice.

Not seen: a norm that is a whole model by itself; a part of a new model rather than of the old one; what is written into
``_modules``; and what goes by ``del`` first.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from mmubn.layers.sync_ubn import SyncUBN
from mmubn.layers.unfoldable_eps import UnfoldableEps
from mmubn.layers.unified_norm import UnifiedNorm

__all__ = ['norm_cfg_of_synchronized', 'watch_replacements']

# Norms of others that were constructed with the eps of a layer.
_made_for: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()


def watch_replacements() -> None:
    """Let torch tell of modules, parameters and buffers that become parts of a module."""
    register_module_module_registration_hook(_check_replacement)  # type: ignore[arg-type] # may return a module
    register_module_buffer_registration_hook(_make_eps_plain)
    register_module_parameter_registration_hook(_make_eps_plain)


def _make_eps_plain(module: nn.Module, name: str, tensor: Any) -> None:
    """In a norm of another type, the eps of ours is a plain number. Its tensors come after its eps."""
    eps = module.__dict__.get('eps')
    if isinstance(eps, UnfoldableEps):
        if eps.layer is not None:
            _made_for[module] = weakref.ref(eps.layer)
        module.__dict__['eps'] = float(eps)


def _check_replacement(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module | None:
    """Torch's hook: raises, or returns the module to set, None for ``new``."""
    old = parent._modules.get(name)
    if not isinstance(old, UnifiedNorm) or isinstance(new, UnifiedNorm) or not _is_made_from(new, old):
        return None
    if isinstance(old, SyncUBN) and isinstance(new, nn.SyncBatchNorm):
        if new.process_group is not None:
            old.process_group = new.process_group
        return old
    kind = type(old).__name__
    error = (
        f'{type(parent).__name__}.{name}, of type {kind}, would be replaced by a {type(new).__name__} made from its '
        f'tensors or its eps, which drops what a {kind} adds to a BatchNorm: leave the conversion out'
    )
    synchronized = norm_cfg_of_synchronized(old) if isinstance(new, nn.SyncBatchNorm) else None
    if synchronized is not None:
        error += f' and build the model with norm_cfg={synchronized}, the synchronised form'
    raise RuntimeError(f'{error}, or, to replace it all the same, delete the old one first (del parent.{name}).')


def _is_made_from(new: nn.Module | None, old: UnifiedNorm) -> bool:
    """Whether ``new`` is a norm with running statistics that has the eps object, tensors or statistics of ``old``."""
    if new is None:
        return False
    tensors_of_new = [*new.named_buffers(recurse=False), *new.named_parameters(recurse=False)]
    if not {'running_mean', 'running_var'} <= {name for name, _ in tensors_of_new}:
        return False
    eps = new.__dict__.get('eps')
    if isinstance(eps, UnfoldableEps) and eps.layer is old:
        return True
    if new in _made_for and _is_copy(_made_for[new](), old):
        return True
    names = ('weight', 'bias', 'running_mean', 'running_var')
    pairs = [(getattr(new, name, None), getattr(old, name)) for name in names]
    tensors = [(one, other) for one, other in pairs if one is not None and other is not None]
    if any(one is other or _same_memory(one, other) for one, other in tensors):
        return True
    var = old.running_var
    fresh = var is None or var.is_meta or bool((var == 1).all())
    return not fresh and _same_values(dict(tensors_of_new)['running_var'], var)


def _is_copy(one: nn.Module | None, other: nn.Module) -> bool:
    """Whether the layers are the same, or may be copies: timm prunes a copy of a model by the eps of the original."""
    return one is other or (type(one) is type(other) and one.num_features == other.num_features)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout != torch.strided or one.is_meta or other.is_meta:
        return False
    return one.data_ptr() == other.data_ptr() != 0


def _same_values(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.is_meta or one.numel() != other.numel():
        return False
    one = one.to_dense() if one.layout != torch.strided else one
    return torch.equal(one.detach().flatten().to('cpu', torch.float32), other.detach().to('cpu', torch.float32))


def norm_cfg_of_synchronized(layer: UnifiedNorm) -> str | None:
    """The norm_cfg of the SyncUBN that computes what ``layer`` does; None where there is none."""
    if layer.scaling not in (None, 'rectified'):
        return None
    arguments: dict[str, Any] = {'type': 'SyncUBN'}
    for name, parameter in list(inspect.signature(SyncUBN).parameters.items())[1:]:  # all but num_features
        without = None if name == 'threshold' else parameter.default  # of a layer that has no gate
        value = layer.scaling is not None if name == 'scaling' else getattr(layer, name, without)
        if value != parameter.default:
            arguments[name] = value
    return f'dict({", ".join(f"{name}={value!r}" for name, value in arguments.items())})'
