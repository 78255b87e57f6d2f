"""The runner of a config, in process groups that CPUs can form too."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mmubn.openmmlab.pretrained  # noqa: F401 - the tools know init_cfg.strict, whatever a config imports
from mmubn.cli.errors import UsageError
from mmubn.cli.launcher import RANK_VARIABLES, end_with_launcher
from mmubn.openmmlab.config_checks import (
    check_efficient_conv_bn_eval,
    check_norm_arguments,
    check_norm_types,
    check_norms_used,
)
from mmubn.openmmlab.config_types import name_types
from mmubn.openmmlab.dataset_checks import check_data
from mmubn.openmmlab.hooks.checkpoint_fit import CheckpointFitHook
from mmubn.openmmlab.hooks.class_count import ClassCountHook
from mmubn.openmmlab.hooks.class_names import ClassNamesHook
from mmubn.openmmlab.hooks.resumed_model import ResumedModelHook
from mmubn.openmmlab.hooks.resumed_run import ResumedRunHook
from mmubn.openmmlab.hooks.sample_errors import SampleErrorsHook
from mmubn.openmmlab.hooks.validated_statistics import ValidatedStatisticsHook
from mmubn.openmmlab.safe_reader import ResumedConfigHook

__all__ = ['build_runner']


def build_runner(cfg: Config, fit: CheckpointFitHook | None = None, splits: Sequence[str] = ()) -> Runner:
    """Build the runner of ``cfg``, in its launcher's process group, on GPUs or, without one, on CPU processes (gloo).

    Args:
        cfg: The config.
        fit: Which checkpoints the runner takes; by default, those of which something fits.
        splits: Whose data the first process checks before anything is built, of train, val and test.

    Raises:
        UsageError: More processes than GPUs on this machine.
        DataError: Data that do not fit the config (:mod:`mmubn.openmmlab.dataset_checks`).
        ConfigError: A norm that is not registered or whose arguments are wrong, a network that does not use the norm
            that its config names, or a config that asks MMEngine to replace norms of this package. The runner itself
            raises one, before its first iteration, where class counts differ, and a CheckpointError where its
            checkpoint does not fit the model or is not that of the run that it is to resume.
    """
    name_types(cfg)
    check_norm_types(cfg)
    check_norm_arguments(cfg)
    check_efficient_conv_bn_eval(cfg)
    if cfg.launcher == 'pytorch':
        end_with_launcher()
    rank = 0 if cfg.launcher == 'none' else os.environ.get(RANK_VARIABLES.get(cfg.launcher, {}).get('RANK', 'RANK'), 0)
    notes = check_data(cfg, splits) if int(rank) == 0 else []  # the others wait for the first one to join their group
    if cfg.launcher != 'none':
        if get_device() == 'cpu':
            _init_cpu_process_group(cfg)
        elif torch.cuda.is_available():
            processes, gpus = int(os.environ.get('LOCAL_WORLD_SIZE', 1)), torch.cuda.device_count()
            if processes > gpus:
                raise UsageError(f'{processes} processes were asked for on a machine with {gpus} GPUs; ask for {gpus}.')
    runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    check_norms_used(cfg, runner.model)
    checkpoint = (ResumedConfigHook(), ResumedRunHook(), ResumedModelHook(), fit or CheckpointFitHook())
    data = (ClassCountHook(), ClassNamesHook(notes), SampleErrorsHook())
    for hook in (*checkpoint, *data):
        runner.register_hook(hook, priority='VERY_HIGH')
    runner.register_hook(ValidatedStatisticsHook())
    return runner


def _init_cpu_process_group(cfg: Config) -> None:
    """Form a process group of CPUs, and let the config use it.

    MMEngine's launchers all select a CUDA device, but it leaves a process group that exists already as it is."""
    for name, source in RANK_VARIABLES.get(cfg.launcher, {}).items():
        if source not in os.environ:
            raise UsageError(
                f'--launcher {cfg.launcher} found no {source} in the environment; start it with {cfg.launcher}.'
            )
        os.environ[name] = os.environ[source]
    os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
    os.environ.setdefault('MASTER_PORT', '29500')
    timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)
    torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=timeout))
    wrapper = ConfigDict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper.update(cfg.get('model_wrapper_cfg') or {}, device_ids=None)
    cfg.model_wrapper_cfg = wrapper
