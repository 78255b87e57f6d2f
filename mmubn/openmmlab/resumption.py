"""What makes a training run, killed at any moment, resume exactly: two hooks, and what puts them in a config.

Importing this module registers both hooks.
"""

from __future__ import annotations

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from mmubn.openmmlab.config_types import find_type
from mmubn.openmmlab.hooks.checkpoint import AtomicCheckpointHook
from mmubn.openmmlab.hooks.iteration_seed import IterationSeedHook

__all__ = ['AtomicCheckpointHook', 'IterationSeedHook', 'make_resumable']


def make_resumable(cfg: Config) -> None:
    """Let ``cfg`` train with :class:`AtomicCheckpointHook`, in MMEngine's place, and :class:`IterationSeedHook`.

    A checkpoint hook of another type stays as it is. The config imports this module, so that the copy of it that
    MMEngine leaves in the work dir works in other tools too.
    """
    hooks = cfg.get('default_hooks') or {}
    checkpoint = hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
    if checkpoint and find_type(checkpoint.get('type'), HOOKS) is CheckpointHook:
        cfg.default_hooks = dict(hooks, checkpoint=dict(checkpoint, type='AtomicCheckpointHook'))
    custom = cfg.get('custom_hooks') or []
    if not any(find_type(hook.get('type'), HOOKS) is IterationSeedHook for hook in custom if isinstance(hook, dict)):
        cfg.custom_hooks = [*custom, dict(type='IterationSeedHook')]
    imports = (cfg.get('custom_imports') or {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else list(imports)
    if __name__ not in imports:
        cfg.custom_imports = dict(cfg.get('custom_imports') or {}, imports=[*imports, __name__])
