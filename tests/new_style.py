"""Configs in pure Python, which name parts by their classes: from configs that name them by strings."""

import mmdet.registry
from mmengine.config import Config
from mmengine.registry import Registry


def in_pure_python(cfg: Config) -> str:
    """The text of a config of MMDetection, as MMDetection's own in ``mmdet/configs`` are: imports, no scope.

    A type that is in no registry stays a name (``RoIAlign``, which MMDetection looks up in mmcv).
    """
    imports = {}

    def code(node, key=None):
        if isinstance(node, dict):
            return f'dict({", ".join(f"{name}={code(value, name)}" for name, value in node.items())})'
        if isinstance(node, list):
            return f'[{", ".join(map(code, node))}]'
        if isinstance(node, tuple):
            return f'({"".join(f"{code(each)}, " for each in node)})'
        cls = registered(node) if key == 'type' and isinstance(node, str) else None
        if cls is None:
            return repr(node)
        imports[cls.__name__] = cls.__module__
        return cls.__name__

    left_out = ('custom_imports', 'default_scope')
    lines = [f'{key} = {code(value)}' for key, value in cfg.to_dict().items() if key not in left_out]
    return '\n'.join([*(f'from {module} import {name}' for name, module in imports.items()), *lines, ''])


def registered(name):
    for registry in vars(mmdet.registry).values():
        if isinstance(registry, Registry) and registry.scope == 'mmdet' and (cls := registry.get(name)) is not None:
            return cls
    return None
