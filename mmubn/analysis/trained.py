"""The runner of a run that is done, to look at what it trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from mmubn.analysis.plots import plt
from mmubn.analysis.predictions import last_checkpoint
from mmubn.cli.runner import build_runner
from mmubn.openmmlab.hooks.checkpoint_fit import CheckpointFitHook

__all__ = ['trained_runner']


def trained_runner(cfg: Config, run: Path, work_dir: Path, splits: Sequence[str]) -> Runner:
    """Build a runner, one of several in this process, that will load the last checkpoint of a run.

    Args:
        cfg: The config of the run, changed in place.
        run: The work dir of the run.
        work_dir: Where the runner logs.
        splits: Whose data are checked, of train, val and test.

    Raises:
        UsageError: The run has no checkpoint.
        CheckpointError: When it is loaded and not all of it fits the model.
    """
    cfg.work_dir, cfg.load_from, cfg.resume, cfg.launcher = str(work_dir), str(last_checkpoint(run)), False, 'none'
    # Runners in one process: each of its own name, with the plain visualizer, which takes that name too.
    cfg.pop('visualizer', None)
    (cfg.get('default_hooks') or {}).pop('visualization', None)
    cfg.experiment_name = f'{run.parent.name}-{run.name}-{time.time_ns()}'
    with plt.style.context('default'):  # not that of our plots: MMEngine's visualizer draws with Matplotlib
        return build_runner(cfg, CheckpointFitHook(whole=True), splits=splits)
