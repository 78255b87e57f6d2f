"""The config that a command line asks for."""

from __future__ import annotations

import argparse
import os
import traceback
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.config.utils import ConfigParsingError
from mmengine.hub import get_config

from mmubn.cli.errors import UsageError
from mmubn.cli.messages import first_cause, shortened, where
from mmubn.cli.overrides import OverrideAction, override
from mmubn.cli.paths import check_file, check_work_dir
from mmubn.openmmlab.config_types import find_dicts
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.own_configs import PREFIX, find_config

__all__ = ['add_config_arguments', 'add_run_arguments', 'load_config', 'own_config', 'read_config', 'set_run']


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a config and change it."""
    parser.add_argument('config', help='path of a config, or PACKAGE::PATH for one of mmubn, mmdet or mmpretrain')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OverrideAction,
        metavar='KEY=VALUE',
        help='overrides of the config, as in model.backbone.norm_cfg.type=UBN; a list is KEY="[a,b]" or KEY=a,b; '
        '+KEY=VALUE adds a key that nothing is known to read',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where and on how many processes a config runs."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default: work_dirs/NAME_OF_CONFIG')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by some launchers')


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments of :func:`add_config_arguments` ask for.

    ``PACKAGE::PATH`` names a config that comes with this package or one of OpenMMLab's, such as
    ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``.

    Raises:
        UsageError: The config does not exist or cannot be read, inherits from none or imports what there is not, or an
            override does not fit it (:func:`mmubn.cli.overrides.override`).
    """
    cfg = read_config(args.config)
    if args.cfg_options:
        override(cfg, args.cfg_options, args.config)
    return cfg


def read_config(path: str) -> Config:
    """Read a config: a file, or ``PACKAGE::PATH``.

    Raises:
        UsageError: Names the file and, where it is known, the line or key that is wrong.
    """
    of_others = '::' in path and not path.startswith(PREFIX)
    if '::' not in path:
        check_file(path, 'the config', f'those that come with mmubn are {PREFIX}PATH', folder=False)
    file = own_config(path)
    try:
        if of_others:
            return get_config(path)
        cfg = Config.fromfile(Path(file).expanduser())
        _import_classes(cfg)
        return cfg
    except (FileNotFoundError, ValueError, AssertionError) as error:
        if of_others and not isinstance(error, SyntaxError):
            raise UsageError(f'no config {path}: {shortened(_without_list(str(error)))}') from error
        raise UsageError(_what_is_wrong(path, error)) from error
    except Exception as error:  # a config is a program
        raise UsageError(_what_is_wrong(path, error)) from error


def own_config(name: str) -> str:
    """Return the file of ``mmubn::PATH``; a name without that prefix as it is.

    Raises:
        UsageError: There is none of this name.
    """
    if not name.startswith(PREFIX):
        return name
    try:
        return str(find_config(name))
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _what_is_wrong(path: str, error: Exception) -> str:
    """The file, which may be one that the config inherits from, the line or key, and the error, in one line."""
    frames = list(traceback.walk_tb(error.__traceback__))
    readers = {'_file2dict', '_parse_lazy_import', '_is_lazy_import'}
    files = [str(frame.f_locals['filename']) for frame, _ in frames if frame.f_code.co_name in readers]
    # MMEngine's merge calls itself for each dict in a dict.
    merges = [str(frame.f_locals.get('k', '?')) for frame, _ in frames if frame.f_code.co_name == '_merge_a_into_b']
    file = files[-1] if files else path
    missing = str(error.filename) if isinstance(error, FileNotFoundError) and error.filename else None
    if missing is not None and missing == file:
        others = [each for each in files if Path(each).absolute() != Path(missing).absolute()]
        return f'{_short(others[-1] if others else path, path)}: its _base_ {_short(missing, path)} does not exist.'
    if isinstance(error, RecursionError) and '_file2dict' in {frame.f_code.co_name for frame, _ in frames}:
        return f'{path}: its _base_ leads back to itself.'
    if isinstance(error, SyntaxError):
        inside = error.filename if error.filename and Path(error.filename).is_file() else file
        return f'{_short(inside, path)}, line {error.lineno}: {error.msg}.'
    text = _without_list(first_cause(error))
    if isinstance(error, (ConfigParsingError, ImportError)):
        return f'{_short(file, path)}: {text}'
    place = _short(file, path)
    lines = [line for frame, line in frames if frame.f_code.co_filename == file]
    if lines:
        place += f', line {lines[-1]}'
    elif merges:
        place += f', {".".join(merges)}'
    if isinstance(error, (AttributeError, TypeError)) and not lines and not merges and not file.endswith('.py'):
        return f'{place}: it holds no keys with values.'
    if isinstance(error, (OSError, ValueError)) or merges:
        return f'{place}: {text}'
    is_theirs = lines or 'mmengine' in frames[-1][0].f_code.co_filename
    return f'{place}: {type(error).__name__}: {text}{"" if is_theirs else where(error)}'


def _without_list(text: str) -> str:
    """Without all configs of a package, which MMEngine lists."""
    return text.partition(' (Expected configs')[0]


def _short(file: str, path: str) -> str:
    """As the user wrote it, or from here."""
    if Path(path).expanduser().absolute() == Path(file).absolute():
        return path
    relative = os.path.relpath(file)
    return file if relative.startswith('..') else relative


def _import_classes(cfg: Config) -> None:
    """Import what a config in pure Python names; MMEngine does when it is asked for a value, somewhere in its run."""
    imported = getattr(cfg, '_imported_names', ())
    for key, value in dict.items(cfg._cfg_dict):
        if key not in imported:
            for _ in find_dicts(ConfigDict({key: value})):
                pass


def set_run(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the arguments of :func:`add_run_arguments` to ``cfg``.

    Raises:
        UsageError: The work dir cannot be written.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    check_work_dir(cfg.work_dir)
