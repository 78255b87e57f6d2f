"""What makes a training run, killed at any moment, resume exactly: two hooks, and what puts them in a config.

Importing this module registers both hooks.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from mmubn.checkpoints import CheckpointError
from mmubn.openmmlab.config_types import find_type
from mmubn.openmmlab.hooks.checkpoint import AtomicCheckpointHook
from mmubn.openmmlab.hooks.iteration_seed import IterationSeedHook

__all__ = ['AtomicCheckpointHook', 'IterationSeedHook', 'find_last_checkpoint', 'make_resumable']


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


def find_last_checkpoint(cfg: Config) -> str | None:
    """The checkpoint that ``last_checkpoint`` in ``cfg.work_dir`` names; None where the folder has no checkpoint.

    MMEngine writes an absolute path there, which is that of another run in a folder that was copied and of none in one
    that was renamed. What counts here is the name, in the work dir itself or where the checkpoint hook's ``out_dir``
    puts the checkpoints of a run of this name.

    Raises:
        CheckpointError: ``last_checkpoint`` names none that is there, or there are checkpoints without it.
    """
    work_dir = Path(cfg.work_dir)
    file = work_dir / 'last_checkpoint'
    saved = [path for path in work_dir.glob('*.pth') if re.fullmatch(r'(epoch|iter)_\d+', path.stem)]
    newest = max(saved, key=lambda path: int(path.stem.rpartition('_')[2]), default=None)
    remedy = f'give --resume the checkpoint to go on from{f", such as {newest}" if newest else ""}'
    if not file.is_file():
        if newest is not None:
            raise CheckpointError(
                f'{work_dir} has checkpoints, but no last_checkpoint that names the last one; {remedy}.'
            )
        return None
    recorded = file.read_text(errors='replace').strip()
    if '://' in recorded:
        return recorded
    name = Path(recorded).name
    out_dir = ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('out_dir')
    folders = [work_dir, *([Path(out_dir) / work_dir.absolute().name] if out_dir and '://' not in out_dir else [])]
    for folder in folders:
        if name and (folder / name).exists():
            return str(folder / name)
    raise CheckpointError(f'{file} names {recorded or "nothing"}, which is not in {work_dir}; {remedy}.')
