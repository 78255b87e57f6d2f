"""The config that a command line asks for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.hub import get_config

from mmubn.cli.errors import UsageError
from mmubn.cli.paths import check_file
from mmubn.openmmlab.config_types import find_dicts

__all__ = ['add_config_arguments', 'add_run_arguments', 'load_config', 'set_run']


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a config and change it."""
    parser.add_argument('config', help='path of a config, or PACKAGE::PATH for one of mmdet or mmpretrain')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='overrides of the config, as in model.backbone.norm_cfg.type=UBN; a list is KEY="[a,b]" or KEY=a,b',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where and on how many processes a config runs."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default: work_dirs/NAME_OF_CONFIG')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by some launchers')


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments of :func:`add_config_arguments` ask for.

    ``PACKAGE::PATH`` names a config that comes with an OpenMMLab package, such as
    ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``.

    Raises:
        UsageError: The config does not exist, inherits from none or imports what there is not, or an override does not
            fit it.
    """
    if '::' in args.config:
        try:
            cfg = get_config(args.config)
        except (FileNotFoundError, ValueError, AssertionError) as error:
            raise UsageError(f'no config {args.config}: {error}') from error
    else:
        check_file(args.config, 'the config', 'configs are in configs/; those of a package are PACKAGE::PATH')
        try:
            cfg = Config.fromfile(args.config)
            _import_classes(cfg)
        except (ConfigParsingError, ImportError) as error:
            raise UsageError(f'{args.config}: {_with_first_cause(error)}') from error
    if args.cfg_options is not None:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except (KeyError, TypeError, IndexError, AssertionError) as error:
            raise UsageError(f'--cfg-options do not fit {args.config}: {error}') from error
    return cfg


def _with_first_cause(error: BaseException) -> str:
    """In one line. MMEngine raises an error of its own for one of the module that it imports."""
    first = error
    while (cause := first.__cause__ or first.__context__) is not None:
        first = cause
    text = str(error) if str(first) in str(error) else f'{error} ({first})'
    return ' '.join(text.split())


def _import_classes(cfg: Config) -> None:
    """Import what a config in pure Python names; MMEngine does when it is asked for a value, somewhere in its run."""
    imported = getattr(cfg, '_imported_names', ())
    for key, value in dict.items(cfg._cfg_dict):
        if key not in imported:
            for _ in find_dicts(ConfigDict({key: value})):
                pass


def set_run(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the arguments of :func:`add_run_arguments` to ``cfg``."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
