"""Finds what is wrong with a config before the first iteration, where MMEngine finds it late, unclearly or never.

A norm type that nobody registered ends in mmcv's "Cannot find None". A network that ignores ``norm_cfg``, or only heeds
it in places, trains as something else than the config says. ``efficient_conv_bn_eval`` fails in the first validation.
Class counts that differ are found by :class:`mmubn.openmmlab.hooks.class_count.ClassCountHook`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn.layers import NORMS, UnifiedNorm
from mmubn.openmmlab.errors import ConfigError

__all__ = ['ConfigError', 'check_efficient_conv_bn_eval', 'check_norm_types', 'check_norms_used', 'norm_cfgs']


def check_norm_types(cfg: Config) -> None:
    """Check that every norm type that ``cfg.model`` names is registered; to be called before the model is built.

    Raises:
        ConfigError: Names the type, its place and what may be missing.
    """
    *others, last = (norm.__name__ for norm in NORMS)
    ours = f'{", ".join(others)} or {last}'
    with MODELS.switch_scope_and_registry(cfg.get('default_scope', 'mmengine')) as registry:
        for place, norm_cfg in norm_cfgs(cfg.model):
            if registry.get(norm_cfg['type']) is None:
                raise ConfigError(
                    f'model.{place}.type={norm_cfg["type"]!r} is not a registered norm; expected {ours}, or one of '
                    'mmcv (BN, SyncBN, GN, IN): correct the name, or add the module that registers it to '
                    'custom_imports.'
                )


def check_norms_used(cfg: Config, model: nn.Module) -> None:
    """Check that each part of ``model`` whose ``norm_cfg`` asks for a norm of this package has no other BatchNorm.

    Parts are found by name: ``cfg.model.backbone.norm_cfg`` is that of ``model.backbone``. Where the model has no part
    of that name, nothing is checked.

    Raises:
        ConfigError: Names the part, and a layer that is a BatchNorm all the same.
    """
    model = model.module if is_model_wrapper(model) else model
    with MODELS.switch_scope_and_registry(cfg.get('default_scope', 'mmengine')) as registry:
        for place, norm_cfg in norm_cfgs(cfg.model):
            norm = registry.get(norm_cfg['type'])
            name = place.rpartition('.')[0]
            try:
                part = model.get_submodule(name)
            except AttributeError:
                continue
            if not _is_ours(norm):
                continue
            asked = f'model.{place} asks for {norm_cfg["type"]}, but {type(part).__name__}'
            remedy = 'use a network that builds all its norms from norm_cfg, or leave norm_cfg out.'
            for layer, module in part.named_modules():
                if isinstance(module, _BatchNorm) and not isinstance(module, UnifiedNorm):
                    raise ConfigError(f'{asked} makes its layer {layer} a {type(module).__name__}: {remedy}')
            if not any(isinstance(module, norm) for module in part.modules()):
                raise ConfigError(f'{asked} has no such layer: {remedy}')


def check_efficient_conv_bn_eval(cfg: Config) -> None:
    """Check that ``cfg.efficient_conv_bn_eval`` names no part of the model that is to have a norm of this package.

    Without the check the layer itself raises, in the first validation (:mod:`mmubn.layers.unfoldable_eps`).

    Raises:
        ConfigError: Names the part and the norm.
    """
    named = cfg.get('efficient_conv_bn_eval') or []
    parts = [named] if isinstance(named, str) else named
    with MODELS.switch_scope_and_registry(cfg.get('default_scope', 'mmengine')) as registry:
        for place, norm_cfg in norm_cfgs(cfg.model):
            owner, kind = place.rpartition('.')[0], norm_cfg['type']
            if any(_overlap(owner, part) for part in parts) and _is_ours(registry.get(kind)):
                raise ConfigError(
                    f'efficient_conv_bn_eval would fold the norms of model.{owner}, of type {kind}, into the '
                    'convolutions before them as if they were BatchNorm: leave efficient_conv_bn_eval out, or name '
                    f'only modules without {kind}.'
                )


def _overlap(one: str, other: str) -> bool:
    """Whether one dotted name is, or is inside, the other."""
    return f'{one}.'.startswith(f'{other}.') or f'{other}.'.startswith(f'{one}.') or not one


def _is_ours(norm: object) -> bool:
    return isinstance(norm, type) and issubclass(norm, UnifiedNorm)


def norm_cfgs(node: object, place: str = '') -> Iterator[tuple[str, dict]]:
    """Every ``norm_cfg`` with a type by name in ``node``, and where it is: ``backbone.norm_cfg``."""
    items = enumerate(node) if isinstance(node, (list, tuple)) else node.items() if isinstance(node, dict) else ()
    for key, child in items:
        here = f'{place}.{key}' if place else str(key)
        if key == 'norm_cfg' and isinstance(child, dict) and isinstance(child.get('type'), str):
            yield here, child
        else:
            yield from norm_cfgs(child, here)
