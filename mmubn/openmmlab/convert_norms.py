"""``ConvertNorms`` in a config: a part of a model whose norms are replaced when it is built.

backbone = dict(
    type='ConvertNorms',
    module=dict(type='ResNet', depth=50),
    norm_cfg=dict(type='BNET', kernel_size=5),
    where='*.bn3',
)
"""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from mmubn.convert import Conversion, Where
from mmubn.openmmlab.config_types import CONVERT_NORMS, find_type
from mmubn.openmmlab.errors import ConfigError

__all__ = ['ConvertNorms']


@MODELS.register_module(name=CONVERT_NORMS)
def ConvertNorms(  # noqa: N802 - a type of configs, as classes are
    module: dict | None = None,
    norm_cfg: dict | None = None,
    where: Where = None,
    strict: bool = True,
    data_preprocessor: dict | None = None,
) -> nn.Module:
    """Build ``module`` and replace norms of it by others of the same function (:func:`mmubn.convert_norms`).

    The result is the module itself, so that its keys in a state dict, its ``init_cfg``, ``frozen_stages`` and
    ``norm_eval`` are as without. The log says what was replaced.

    Args:
        module: Config of the module, built in the scope of the config.
        norm_cfg: Type and options of the norm. ``requires_grad=False`` freezes the chosen norms, as in mmcv; with True
            they are as frozen as those they replace.
        where: Which norms, by their names in the module: a glob, or ``re:`` and a regular expression that is searched
            for in the name, as ``'re:^layer[12]'``. None: all.
        strict: Whether a norm without an exact equal is an error. If not, it stays.
        data_preprocessor: Of MMEngine's Runner, where the module is the whole model.

    Raises:
        ConfigError: The norm is not registered or takes no such options, ``where`` chooses nothing, or a norm has no
            exact equal.
    """
    if not isinstance(module, dict) or not isinstance(norm_cfg, dict) or norm_cfg.get('type') is None:
        raise ConfigError(
            f'ConvertNorms needs module=dict(type=...) and norm_cfg=dict(type=...), got {module!r} and {norm_cfg!r}.'
        )
    requires_grad = norm_cfg.get('requires_grad', True)
    for name, value in (('strict', strict), ('norm_cfg.requires_grad', requires_grad)):
        if not isinstance(value, bool):
            raise ConfigError(f'ConvertNorms: {name} must be True or False, got {value!r}.')
    options: dict[str, Any] = {key: value for key, value in norm_cfg.items() if key not in ('type', 'requires_grad')}
    with MODELS.switch_scope_and_registry(None) as registry:  # that of the config
        norm = find_type(norm_cfg['type'], registry)
        if norm is None:
            raise ConfigError(f'ConvertNorms: norm_cfg.type={norm_cfg["type"]!r} is not a registered norm.')
        extra = {} if data_preprocessor is None else {'data_preprocessor': data_preprocessor}
        built = registry.build(module, default_args=extra)
    try:
        conversion = Conversion(built, norm, where, strict=strict, **options)  # type: ignore[arg-type] # it checks
    except (TypeError, ValueError) as error:
        text = str(error).removeprefix('convert_norms: ')
        raise ConfigError(f'ConvertNorms of {type(built).__name__}: {text}') from error
    print_log(f'mmubn: ConvertNorms of {type(built).__name__}: {conversion.summary}', logger='current')
    if not requires_grad:
        for norm in (*(each.new for each in conversion.replacements), *conversion.right):
            norm.requires_grad_(False)
    return conversion.apply()
