"""Finds what is wrong with a config before the first iteration, where MMEngine finds it late, unclearly or never.

A norm type that nobody registered ends in mmcv's "Cannot find None". A network that ignores ``norm_cfg``, or only heeds
it in places, trains as something else than the config says. ``efficient_conv_bn_eval`` fails in the first validation.
Class counts that differ are found by :class:`mmubn.openmmlab.hooks.class_count.ClassCountHook`.
Data that do not fit the config are found by :mod:`mmubn.openmmlab.dataset_checks`.
"""

from __future__ import annotations

import re
from types import NoneType

from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn.layers import NORMS, UnifiedNorm
from mmubn.openmmlab.arguments import arguments_of, did_you_mean, registered_names
from mmubn.openmmlab.config_types import CONVERT_NORMS, asked_norms, find_dicts
from mmubn.openmmlab.errors import ConfigError

__all__ = [
    'ConfigError',
    'check_efficient_conv_bn_eval',
    'check_norm_arguments',
    'check_norm_types',
    'check_norms_used',
]

TAKEN_OUT = ('type', 'requires_grad', '_scope_')
CHANNELS = {'num_channels', 'num_features'}


def check_norm_types(cfg: Config) -> None:
    """Check that every norm that ``cfg.model`` names is registered; to be called before the model is built.

    Raises:
        ConfigError: Names the type, its place and what may be missing; or a norm_cfg that is no dict with a type, or a
            ``where`` of ConvertNorms that is no string.
    """
    for place, node in find_dicts(cfg.get('model') or {}):
        key = f'model.{place}.norm_cfg' if place else 'model.norm_cfg'
        norm_cfg = node.get('norm_cfg')
        if norm_cfg is not None and not isinstance(norm_cfg, dict):
            example = norm_cfg if isinstance(norm_cfg, str) and norm_cfg.isidentifier() else 'UBN'
            raise ConfigError(f'{key} must be a dict, such as dict(type={example!r}), or None, got {norm_cfg!r}.')
        if norm_cfg is not None and norm_cfg.get('type') is None:
            remedy = "add one, such as type='UBN' (a dict with _delete_=True keeps none of its base)"
            raise ConfigError(f'{key}={dict(norm_cfg)} has no type: {remedy}.')
    for place, node in find_dicts(cfg.get('model') or {}):
        choice = node.get('where')
        if CONVERT_NORMS in str(node.get('type')) and not isinstance(choice, (str, NoneType)):
            key = f'model.{place}.where' if place else 'model.where'
            example = repr(f're:{choice.pattern}') if isinstance(choice, re.Pattern) else "'*.bn3' or 're:^layer[12]'"
            raise ConfigError(
                f'{key}={choice!r} must be a string, a glob or re: and a regular expression, such as {example}; what '
                'else it may be in Python cannot be read from the copy of the config that a run leaves.'
            )
    *others, last = (norm.__name__ for norm in NORMS)
    for asked in asked_norms(cfg):
        if asked.norm is None:
            key = f'{asked.place}.type' if asked.key == 'norm_cfg' else asked.place
            raise ConfigError(
                f'model.{key}={asked.name!r} is not a registered norm; expected {", ".join(others)} or '
                f'{last}, or one of mmcv (BN, SyncBN, GN, IN){did_you_mean(asked.name, registered_names(MODELS))}; '
                'correct the name, or add the module that registers it to custom_imports.'
            )


def check_norm_arguments(cfg: Config) -> None:
    """Check the arguments of every norm that ``cfg.model`` asks for: MMCV gives them to its first layer.

    Raises:
        ConfigError: Names the key, its value and what is expected.
    """
    for asked in asked_norms(cfg):
        # mmcv's build_norm_layer takes requires_grad out, and gives eps and the number of channels.
        arguments = {key: value for key, value in asked.norm_cfg.items() if key not in TAKEN_OUT}
        expected = arguments_of(asked.norm)
        for key in arguments:
            if key not in expected.names and not expected.takes_any:
                what = f'model.{asked.place}.{key}={arguments[key]!r}: {asked.name} has no such argument'
                known = expected.names - CHANNELS
                question = did_you_mean(key, known | {'_delete_'}) or f'; it has {", ".join(sorted(known))}.'
                raise ConfigError(f'{what}{question}')
        if asked.norm is nn.GroupNorm and asked.key == 'norm_cfg' and 'num_groups' not in arguments:
            raise ConfigError(f'model.{asked.place} of type {asked.name} needs num_groups, such as num_groups=32.')
        if asked.is_ours:
            try:
                asked.norm(1, **arguments)
            except (TypeError, ValueError) as error:
                raise ConfigError(f'model.{asked.place}: {error}') from error


def check_norms_used(cfg: Config, model: nn.Module) -> None:
    """Check that each part of ``model`` whose ``norm_cfg`` asks for a norm of this package has no other BatchNorm.

    So for the ``norm_layer`` of MMPretrain's TIMMBackbone.

    Parts are found by name: ``cfg.model.backbone.norm_cfg`` is that of ``model.backbone``. Where the model has no part
    of that name, nothing is checked. ConvertNorms has replaced the norms that it was to replace, and leaves others.

    Raises:
        ConfigError: Names the part, and a layer that is a BatchNorm all the same.
    """
    model = model.module if is_model_wrapper(model) else model
    for asked in asked_norms(cfg):
        try:
            part = model.get_submodule(asked.owner)
        except AttributeError:
            continue
        if not asked.is_ours:
            continue
        request = f'model.{asked.place} asks for {asked.name}, but {type(part).__name__}'
        remedy = f'use a network that builds all its norms from {asked.key}, ConvertNorms, or leave {asked.key} out.'
        for layer, module in part.named_modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, UnifiedNorm) and not asked.converts:
                raise ConfigError(f'{request} makes its layer {layer} a {type(module).__name__}: {remedy}')
        if not asked.is_converted and not any(isinstance(module, asked.norm) for module in part.modules()):
            raise ConfigError(f'{request} has no such layer: {remedy}')


def check_efficient_conv_bn_eval(cfg: Config) -> None:
    """Check that ``cfg.efficient_conv_bn_eval`` names no part of the model that is to have a norm of this package.

    Without the check the layer itself raises, in the first validation (:mod:`mmubn.layers.unfoldable_eps`).

    Raises:
        ConfigError: Names the part and the norm.
    """
    named = cfg.get('efficient_conv_bn_eval') or []
    parts = [named] if isinstance(named, str) else named
    for asked in asked_norms(cfg):
        if asked.is_ours and any(_overlap(asked.owner, part) for part in parts):
            raise ConfigError(
                f'efficient_conv_bn_eval would fold the norms of model.{asked.owner}, of type {asked.name}, into the '
                'convolutions before them as if they were BatchNorm: leave efficient_conv_bn_eval out, or name '
                f'only modules without {asked.name}.'
            )


def _overlap(one: str, other: str) -> bool:
    """Whether one dotted name is, or is inside, the other."""
    return f'{one}.'.startswith(f'{other}.') or f'{other}.'.startswith(f'{one}.') or not one
