"""Finds what is wrong with a config before the first iteration, where MMEngine finds it late, unclearly or never.

A norm type that nobody registered ends in mmcv's "Cannot find None". A network that ignores ``norm_cfg``, or only heeds
it in places, trains as something else than the config says. A head with too few classes dies in the loss, on a GPU
without saying why; one with too many trains.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from mmubn.layers import UnifiedNorm

__all__ = ['ClassCountHook', 'ConfigError', 'check_norm_types', 'check_norms_used', 'norm_cfgs']


class ConfigError(ValueError):
    """A config that cannot mean what it says."""


def check_norm_types(cfg: Config) -> None:
    """Check that every norm type that ``cfg.model`` names is registered; to be called before the model is built.

    Raises:
        ConfigError: Names the type, its place and what may be missing.
    """
    with MODELS.switch_scope_and_registry(cfg.get('default_scope', 'mmengine')) as registry:
        for place, norm_cfg in norm_cfgs(cfg.model):
            if registry.get(norm_cfg['type']) is None:
                raise ConfigError(
                    f'model.{place}.type={norm_cfg["type"]!r} is not a registered norm; expected UBN, SyncUBN, RBN, '
                    'BNET, IEBN or UnitizedBN, or one of mmcv (BN, SyncBN, GN, IN): correct the name, or add the '
                    'module that registers it to custom_imports.'
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
            if not (isinstance(norm, type) and issubclass(norm, UnifiedNorm)):
                continue
            asked = f'model.{place} asks for {norm_cfg["type"]}, but {type(part).__name__}'
            remedy = 'use a network that builds all its norms from norm_cfg, or leave norm_cfg out.'
            for layer, module in part.named_modules():
                if isinstance(module, _BatchNorm) and not isinstance(module, UnifiedNorm):
                    raise ConfigError(f'{asked} makes its layer {layer} a {type(module).__name__}: {remedy}')
            if not any(isinstance(module, norm) for module in part.modules()):
                raise ConfigError(f'{asked} has no such layer: {remedy}')


class ClassCountHook(Hook):
    """Checks that every head has as many classes as the data sets that it is trained and evaluated on.

    A head is a module called ``head`` or ``..._head``, or an element of a list of that name, with a ``num_classes``.
    Left out are ``rpn_head``, which knows no classes, ``semantic_head``, which has others, and models that are told the
    classes in words (``language_model``).

    Raises:
        ConfigError: Before the first iteration. Names the head and both counts.
    """

    def before_train(self, runner: Runner) -> None:
        self._check(runner, 'train', runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner, 'val', runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        self._check(runner, 'test', runner.test_dataloader)

    def _check(self, runner: Runner, split: str, dataloader: DataLoader) -> None:
        classes = getattr(dataloader.dataset, 'metainfo', {}).get('classes')
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if classes is None or hasattr(model, 'language_model'):
            return
        for name, head in model.named_modules():
            count = getattr(head, 'num_classes', None)
            if _is_head(name) and isinstance(count, int) and count > 0 and count != len(classes):
                raise ConfigError(
                    f'model.{name}.num_classes is {count}, but the {split} data set '
                    f'({type(dataloader.dataset).__name__}) has {len(classes)} classes; set num_classes to '
                    f'{len(classes)}, or correct {split}_dataloader.dataset (its type, data_root or metainfo.classes).'
                )


def _is_head(name: str) -> bool:
    own = name.rstrip('.0123456789').rpartition('.')[2]
    return own == 'head' or (own.endswith('_head') and own not in ('rpn_head', 'semantic_head'))


def norm_cfgs(node: object, place: str = '') -> Iterator[tuple[str, dict]]:
    """Every ``norm_cfg`` with a type by name in ``node``, and where it is: ``backbone.norm_cfg``."""
    items = enumerate(node) if isinstance(node, (list, tuple)) else node.items() if isinstance(node, dict) else ()
    for key, child in items:
        here = f'{place}.{key}' if place else str(key)
        if key == 'norm_cfg' and isinstance(child, dict) and isinstance(child.get('type'), str):
            yield here, child
        else:
            yield from norm_cfgs(child, here)
