"""The runner of a config, in process groups that CPUs can form too."""

from __future__ import annotations

import datetime
import os

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mmubn.openmmlab.pretrained  # noqa: F401 - the tools know init_cfg.strict, whatever a config imports
from mmubn.cli.errors import UsageError
from mmubn.cli.launcher import end_with_launcher
from mmubn.openmmlab.config_checks import check_efficient_conv_bn_eval, check_norm_types, check_norms_used
from mmubn.openmmlab.config_types import name_types
from mmubn.openmmlab.hooks.class_count import ClassCountHook
from mmubn.openmmlab.hooks.resumed_model import ResumedModelHook
from mmubn.openmmlab.safe_reader import ResumedConfigHook

__all__ = ['build_runner']

# How Slurm and Open MPI name what torch.distributed reads from the environment.
RANK_VARIABLES = {
    'slurm': {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'},
    'mpi': {
        'RANK': 'OMPI_COMM_WORLD_RANK',
        'WORLD_SIZE': 'OMPI_COMM_WORLD_SIZE',
        'LOCAL_RANK': 'OMPI_COMM_WORLD_LOCAL_RANK',
    },
}


def build_runner(cfg: Config) -> Runner:
    """Build the runner of ``cfg``, in its launcher's process group, on GPUs or, without one, on CPU processes (gloo).

    Raises:
        UsageError: More processes than GPUs on this machine.
        ConfigError: A norm type that is not registered, a network that does not use the norm that its config names, or
            a config that asks MMEngine to replace norms of this package. The runner itself raises one, before its first
            iteration, where class counts differ, and a CheckpointError where it is to resume a run with another norm.
    """
    name_types(cfg)
    check_norm_types(cfg)
    check_efficient_conv_bn_eval(cfg)
    if cfg.launcher == 'pytorch':
        end_with_launcher()
    if cfg.launcher != 'none':
        if get_device() == 'cpu':
            _init_cpu_process_group(cfg)
        elif torch.cuda.is_available():
            processes, gpus = int(os.environ.get('LOCAL_WORLD_SIZE', 1)), torch.cuda.device_count()
            if processes > gpus:
                raise UsageError(f'{processes} processes were asked for on a machine with {gpus} GPUs; ask for {gpus}.')
    runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    check_norms_used(cfg, runner.model)
    for hook in (ClassCountHook(), ResumedConfigHook(), ResumedModelHook()):
        runner.register_hook(hook, priority='VERY_HIGH')
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
