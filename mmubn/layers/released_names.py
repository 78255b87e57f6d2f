"""Norms of this package read what BNET's authors saved under another name, ``bnet3`` for ``bn3``.

Torch and MMEngine give a layer the entries under its own name alone. So the module that has the layer renames them: a
hook of torch, which it gets where a norm of ours becomes a part of it under such a name.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from mmubn.checkpoints.names import has_own_name, rename_released
from mmubn.layers.unified_norm import UnifiedNorm

__all__ = ['read_released_names', 'watch_names', 'watch_parent']


def watch_names() -> None:
    """Let torch tell of modules that become parts of a module."""
    register_module_module_registration_hook(watch_parent)


def watch_parent(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Torch's hook: ``parent`` is to rename the entries of ``new`` when it loads a state dict."""
    if not isinstance(new, UnifiedNorm) or not has_own_name(name):
        return
    hooks = parent._load_state_dict_pre_hooks.values()
    if not any(getattr(each, 'hook', None) is read_released_names for each in hooks):
        parent._register_load_state_dict_pre_hook(read_released_names, with_module=True)


def read_released_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Rename the entries of the norms in ``module``; raises a CheckpointError where one has entries of both names."""
    children = module._modules

    def is_norm(parent: str, number: str) -> bool:
        return (
            parent == prefix
            and isinstance(children.get(f'bn{number}'), UnifiedNorm)
            and not {f'bnet{number}', f'bnconv{number}'} & children.keys()
        )

    rename_released(state_dict, is_norm)
