"""The ``type`` of a part of a config: a name or, in a config in pure Python, the class itself.

Such configs (``with read_base()``) import what they name: ``from mmubn import UBN``, ``norm_cfg=dict(type=UBN)``.
MMEngine imports it when it is first asked for; until then it is a LazyObject. In the copy of the config that a run
leaves it is a dotted name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import NamedTuple

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS, Registry

from mmubn.layers import UnifiedNorm
from mmubn.openmmlab.errors import ConfigError

__all__ = [
    'CONVERT_NORMS',
    'AskedNorm',
    'asked_norms',
    'find_dicts',
    'find_type',
    'is_pretrained',
    'name_types',
    'norm_cfgs',
]


CONVERT_NORMS = 'ConvertNorms'  # the type of mmubn.openmmlab.convert_norms
TIMM_BACKBONE, NORM_LAYER = 'TIMMBackbone', 'norm_layer'  # of MMPretrain


class AskedNorm(NamedTuple):
    """A norm that a config asks for.

    Attributes:
        place: Of its norm_cfg in the model: ``backbone.norm_cfg``; or of norm_layer, which has a type alone.
        name: Of its type, as the config or the class has it.
        norm: The class; None where no such name is registered.
        norm_cfg: The dict; of a norm_layer, one made of it.
        owner: The part of the model: ``backbone``; empty for the model itself.
        converts: Whether the norm takes the place of norms that the part was built with, by ConvertNorms.
        is_converted: Whether ConvertNorms may replace it.
    """

    place: str
    name: str
    norm: type | None
    norm_cfg: dict
    owner: str
    converts: bool
    is_converted: bool

    @property
    def key(self) -> str:
        """Where its type is: ``norm_cfg`` or ``norm_layer``."""
        return self.place.rpartition('.')[2]

    @property
    def is_ours(self) -> bool:
        """Whether it is a norm of this package."""
        return isinstance(self.norm, type) and issubclass(self.norm, UnifiedNorm)


def asked_norms(cfg: Config) -> list[AskedNorm]:
    """The norms that ``cfg.model`` asks for, looked up in the scope of ``cfg``.

    Raises:
        ConfigError: The config has no model.
    """
    if cfg.get('model') is None:
        raise ConfigError('the config has no model: it must have a dict of this name, with a type.')
    with MODELS.switch_scope_and_registry(cfg.get('default_scope', 'mmengine')) as registry:
        asked = []
        conversions = {place for place, node in find_dicts(cfg.model) if _is_conversion(node, registry)}
        of_timm = [(place, {'type': node[NORM_LAYER]}) for place, node in _norm_layers(cfg, registry)]
        for place, norm_cfg in [*norm_cfgs(cfg.model), *of_timm]:
            kind = _imported(norm_cfg['type'])
            norm = find_type(kind, registry)
            config = place.rpartition('.')[0]
            owner, is_converted = _part(config, conversions)
            name = kind if isinstance(kind, str) else _name(kind)
            asked.append(AskedNorm(place, name, norm, norm_cfg, owner, config in conversions, is_converted))
        return asked


def _norm_layers(cfg: Config, registry: Registry) -> Iterator[tuple[str, dict]]:
    """Each ``norm_layer`` of MMPretrain's TIMMBackbone, the name of a norm: where it is, and the dict that has it."""
    for place, node in find_dicts(cfg.model):
        if node.get(NORM_LAYER) is not None and _name(find_type(node.get('type'), registry)) == TIMM_BACKBONE:
            yield f'{place}.{NORM_LAYER}'.removeprefix('.'), node


def _is_conversion(node: dict, registry: Registry) -> bool:
    """Whether it is a dict of ConvertNorms, which is no part of the model, but for its module."""
    return {'type', 'module', 'norm_cfg'} <= node.keys() and _name(find_type(node['type'], registry)) == CONVERT_NORMS


def _part(config: str, conversions: set[str]) -> tuple[str, bool]:
    """The part of the model that is built from the dict at the place ``config``, and whether it is in a conversion."""
    place, part, inside = '', [], False
    for key in filter(None, config.split('.')):
        if place in conversions and key == 'module':
            inside = True
        else:
            part.append(key)
        place = f'{place}.{key}' if place else key
    return '.'.join(part), inside


def norm_cfgs(node: object) -> Iterator[tuple[str, dict]]:
    """Every ``norm_cfg`` with a type in ``node``, and where it is: ``backbone.norm_cfg``."""
    for place, each in find_dicts(node):
        if place.rpartition('.')[2] == 'norm_cfg' and each.get('type') is not None:
            yield place, each


def find_dicts(node: object, place: str = '') -> Iterator[tuple[str, dict]]:
    """All dicts in ``node``, itself included, and where they are: ``roi_head.bbox_head.0``."""
    if isinstance(node, dict):
        yield place, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, child in items:
        yield from find_dicts(child, f'{place}.{key}' if place else str(key))


def find_type(kind: object, registry: Registry) -> object:
    """What a ``type`` stands for: the class itself, or what is registered under the name; None where nothing is."""
    kind = _imported(kind)
    if isinstance(kind, str):
        kind = registry.get(kind)
    # MMEngine takes a name that nobody registered for that of a module, a file in this folder for one.
    return None if inspect.ismodule(kind) else kind


def is_pretrained(init_cfg: dict) -> bool:
    """Whether this is an ``init_cfg`` that reads a checkpoint."""
    kind = find_type(init_cfg.get('type'), WEIGHT_INITIALIZERS)
    return isinstance(kind, type) and issubclass(kind, PretrainedInit)


def name_types(cfg: Config) -> None:
    """Put names in the place of classes in ``cfg.model``, where other code knows a type by its name alone.

    These are the norms of this package, which MMPretrain's ``build_norm_layer`` does not take as classes, and
    PretrainedInit in ``init_cfg``: MMEngine runs it last, so that nothing overwrites what it loads, under the name
    Pretrained; the class by that name is the one that knows ``strict``, in the tools.
    """
    with MODELS.switch_scope_and_registry(cfg.get('default_scope', 'mmengine')) as registry:
        for asked in asked_norms(cfg):
            name = _name(asked.norm)
            if asked.is_ours and asked.name == name != asked.norm_cfg['type'] and registry.get(name) is asked.norm:
                asked.norm_cfg['type'] = name
        for _, node in _norm_layers(cfg, registry):
            norm = find_type(node[NORM_LAYER], registry)
            if not isinstance(node[NORM_LAYER], str) and registry.get(_name(norm)) is norm:
                node[NORM_LAYER] = _name(norm)
    pretrained = (PretrainedInit, WEIGHT_INITIALIZERS.get('Pretrained'))
    for place, each in find_dicts(cfg.model):
        is_init_cfg = 'init_cfg' in place.split('.')[-2:]  # one of a list has a number behind it
        if is_init_cfg and find_type(each.get('type'), WEIGHT_INITIALIZERS) in pretrained:
            each['type'] = 'Pretrained'


def _name(kind: object) -> str:
    return getattr(kind, '__name__', str(kind))


def _imported(kind: object) -> object:
    """The class behind a LazyObject, which only a config that is not one of MMEngine's own shows."""
    return kind.build() if isinstance(kind, (LazyObject, LazyAttr)) else kind
