"""What the tools share: reading a config, checking the paths in it, process groups on the CPU, errors in one line."""

from __future__ import annotations

import argparse
import atexit
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.hub import get_config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmubn.checkpoints import CheckpointError
from mmubn.checks import ClassCountHook, ConfigError, check_norm_types, check_norms_used
from mmubn.faults import end_with_launcher

__all__ = [
    'UsageError',
    'add_config_arguments',
    'add_run_arguments',
    'build_runner',
    'check_file',
    'check_paths',
    'load_config',
    'run_tool',
    'set_run',
]


class UsageError(Exception):
    """Something the user can mend: told in one line, without a traceback."""


def run_tool(main: Callable[[], None]) -> None:
    """Run the ``main`` of a tool, and end well.

    A UsageError, or a config or checkpoint that does not fit, ends with status 2 and one line, told by one process.
    """
    try:
        main()
        if torch.distributed.is_initialized():
            _leave_process_group()
    except (UsageError, ConfigError, CheckpointError) as error:
        if os.environ.get('RANK', '0') == '0':
            print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)


def _leave_process_group() -> None:
    if torch.distributed.get_backend() != 'gloo':
        torch.distributed.destroy_process_group()
        return
    # torch (2.12) joins gloo's threads under the lock that they wait for, or not at all: a process whose work is done
    # then hangs or aborts at its end. So this one does what Python does at its end, and ends.
    torch.distributed.barrier()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a config and change it."""
    parser.add_argument('config', help='path of a config, or PACKAGE::PATH for one of mmdet or mmpretrain')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='overrides of the config, as in model.backbone.norm_cfg.type=UBN; a list is KEY="[a,b]" or KEY=a,b',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say where and on how many processes a config runs."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default: work_dirs/NAME_OF_CONFIG')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by some launchers')


def load_config(args: argparse.Namespace) -> Config:
    """The config that the arguments of :func:`add_config_arguments` ask for.

    ``PACKAGE::PATH`` names a config that comes with an OpenMMLab package, such as
    ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``.

    Raises:
        UsageError: The config does not exist, or an override does not fit it.
    """
    if '::' in args.config:
        try:
            cfg = get_config(args.config)
        except (FileNotFoundError, ValueError, AssertionError) as error:
            raise UsageError(f'no config {args.config}: {error}') from error
    else:
        check_file(args.config, 'the config', 'configs are in configs/; those of a package are PACKAGE::PATH')
        cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except (KeyError, TypeError, IndexError, AssertionError) as error:
            raise UsageError(f'--cfg-options do not fit {args.config}: {error}') from error
    return cfg


def set_run(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the arguments of :func:`add_run_arguments` to ``cfg``."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)


def check_file(path: str, what: str, remedy: str) -> None:
    """Raise a UsageError that names ``path`` and the ``remedy`` unless it is a URL or exists."""
    if '://' not in path and not Path(path).expanduser().exists():
        raise UsageError(f'{what} {path} does not exist; {remedy}.')


DATA_REMEDY = (
    'lay the data out as README.md (COCO) or docs/reproduce.md (ImageNet, CIFAR) says under "Data", or set '
    '{split}_dataloader.dataset.data_root with --cfg-options '
    '(the digits come from: python tools/dataset_converters/digits_to_coco.py data/digits)'
)
CHECKPOINT_REMEDY = (
    'train it as README.md says under "ImageNet checkpoints", or set imagenet_checkpoints at the top of '
    'configs/_base_/imagenet_backbone.py to the folder or URL that has it, or start from another checkpoint with '
    '--cfg-options {key}.init_cfg.checkpoint=PATH_OR_URL {key}.init_cfg.prefix=None (torchvision://resnet50, for one)'
)


def check_paths(cfg: Config, splits: tuple[str, ...], pretrained: bool) -> None:
    """Check, before anything is built, that the files and folders a run will read are there.

    Args:
        cfg: The config.
        splits: Which dataloaders will be used, of train, val and test.
        pretrained: Whether the checkpoints named by ``init_cfg`` will be read.

    Raises:
        UsageError: Names the first path that is missing and what to do.
    """
    for split in splits:
        remedy = DATA_REMEDY.format(split=split)
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset', {})
        for _, node in _dicts(dataset):
            root, ann_file, prefix = (node.get(key) or '' for key in ('data_root', 'ann_file', 'data_prefix'))
            if not isinstance(root, str) or '://' in root:
                continue
            if root and not ann_file:
                check_file(root, f'the {split} data folder', remedy)
            for name, what in [(ann_file, 'annotation file'), *((p, 'image folder') for p in _strings(prefix))]:
                if isinstance(name, str) and name:
                    check_file(str(Path(root) / name), f'the {split} {what}', remedy)
        if split != 'train':
            for _, node in _dicts(cfg.get(f'{split}_evaluator') or {}):
                if isinstance(node.get('ann_file'), str):
                    check_file(node['ann_file'], f'the annotation file of {split}_evaluator', remedy)
    if pretrained:
        for key, node in _dicts(cfg.get('model') or {}, 'model'):
            init_cfg = node.get('init_cfg')
            if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
                remedy = CHECKPOINT_REMEDY.format(key=key)
                check_file(init_cfg['checkpoint'], f'the pretrained checkpoint of {key},', remedy)


def _strings(prefix: str | dict) -> list[str]:
    return list(prefix.values()) if isinstance(prefix, dict) else [prefix]


def _dicts(node: object, key: str = '') -> Iterator[tuple[str, dict]]:
    """All dicts in ``node``, itself included, each with its dotted key."""
    if isinstance(node, dict):
        yield key, node
        children = node.items()
    elif isinstance(node, (list, tuple)):
        children = enumerate(node)
    else:
        return
    for name, child in children:
        yield from _dicts(child, f'{key}.{name}')


def build_runner(cfg: Config) -> Runner:
    """The runner of ``cfg``, in a process group of its launcher, on GPUs or, without one, on CPU processes (gloo).

    Raises:
        UsageError: More processes than GPUs on this machine.
        ConfigError: A norm type that is not registered, or a network that does not use the norm it is told to. The
            runner itself raises one, before its first iteration, where class counts differ.
    """
    check_norm_types(cfg)
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
    runner.register_hook(ClassCountHook(), priority='VERY_HIGH')
    return runner


# How Slurm and Open MPI name what torch.distributed reads from the environment.
RANK_VARIABLES = {
    'slurm': {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'},
    'mpi': {
        'RANK': 'OMPI_COMM_WORLD_RANK',
        'WORLD_SIZE': 'OMPI_COMM_WORLD_SIZE',
        'LOCAL_RANK': 'OMPI_COMM_WORLD_LOCAL_RANK',
    },
}


def _init_cpu_process_group(cfg: Config) -> None:
    """MMEngine's launchers all select a CUDA device; it leaves a process group that exists already as it is."""
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
