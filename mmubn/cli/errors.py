"""How a tool starts and ends: its errors are one line for the user, or, with ``--debug``, the traceback."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import datetime
import hashlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.logging import MMLogger

from mmubn import openmmlab
from mmubn.checkpoints import CheckpointError
from mmubn.cli.launcher import RANK_VARIABLES
from mmubn.cli.messages import one_line_of, with_place
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.safe_reader import use_safe_reader

__all__ = ['UsageError', 'add_debug_argument', 'add_trust_argument', 'run_tool']

ASKED = 'mmubn/errors'  # in the store of a process group: how many processes have asked who reports their error
FORCE_SAFE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # an environment variable of torch


class UsageError(Exception):
    """An error that the user can fix. A tool reports it in one line, without a traceback."""


def add_debug_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug``, which :func:`run_tool` reads."""
    parser.add_argument('--debug', action='store_true', help='end an error with its traceback instead of one line')


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint``, which :func:`run_tool` reads."""
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read whatever a checkpoint holds, and run the programs in it; '
        'for files of which you trust where they come from',
    )


def run_tool(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """Run a tool from its command line to its exit status.

    The tool reads checkpoints by the list of :mod:`mmubn.openmmlab.safe_reader`, but for ``--trust-checkpoint``.

    An error ends in one line, or, with ``--debug``, in its traceback: with status 2 a UsageError, or a config,
    checkpoint or data that do not fit; with status 1 any other, whose traceback goes to the log of the run, if there is
    one. Of several processes that end with the same error, one reports it.

    Args:
        parse_args: Parses the command line with a parser that has the argument of :func:`add_debug_argument`.
        main: Does the work.
    """
    args = parse_args()
    has_group = torch.distributed.is_initialized()  # of whoever calls this, who ends it
    try:
        openmmlab.install()
        trust = getattr(args, 'trust_checkpoint', False)
        use_safe_reader(trust)
        if trust and os.environ.get(FORCE_SAFE, '0') != '0':
            raise UsageError(f'--trust-checkpoint reads everything, and {FORCE_SAFE} in the environment forbids it.')
        main(args)
        if torch.distributed.is_initialized() and not has_group:
            _leave_process_group()
    except (UsageError, ConfigError, CheckpointError) as error:
        text = with_place(error)
        if 'Original Traceback' in text:  # that of a data-loader worker
            text = one_line_of(error).partition(': ')[2]
        if _reports(text, args):
            _keep_traceback(_rank(args)[0])
            _print(text, args)
        _wait_for_others()
        sys.exit(2)
    except Exception as error:
        text = one_line_of(error)
        rank, processes = _rank(args)
        if _reports(text, args, foreign=True):
            text += _keep_traceback(rank)
            _print(text if processes == 1 else f'process {rank} of {processes}: {text}', args)
        _wait_for_others()
        sys.exit(1)


def _print(text: str, args: argparse.Namespace) -> None:
    if args.debug:
        traceback.print_exc()
    else:
        print(f'error: {text}', file=sys.stderr, flush=True)


def _rank(args: argparse.Namespace, name: str = 'RANK') -> tuple[int, int]:
    """The number of this process, or its LOCAL_RANK, and how many there are."""
    if name == 'RANK' and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    # Slurm and MPI set theirs for commands too that are one process each.
    names = RANK_VARIABLES.get(getattr(args, 'launcher', None) or 'none', {})

    def read(each: str, default: int) -> int:
        return int(os.environ.get(each, os.environ.get(names.get(each, each), default)))

    return read(name, read('RANK', 0)), read('WORLD_SIZE', 1)


def _reports(text: str, args: argparse.Namespace, foreign: bool = False) -> bool:
    """Whether this process is the one to report an error.

    Before they know of each other all processes come to the same errors of the user: one of each machine reports them.
    After that each error is reported by the process that is the first to have it.
    """
    if torch.distributed.is_initialized():
        try:
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set_timeout(datetime.timedelta(seconds=10))
            is_first = store.add(f'mmubn/error/{hashlib.sha256(text.encode()).hexdigest()}', 1) == 1
            store.add(ASKED, 1)
            return is_first
        except Exception:  # process 0, which may keep the store, has ended: it had an error too
            return foreign or torch.distributed.get_rank() == 0
    return foreign or _rank(args, 'LOCAL_RANK')[0] == 0


def _wait_for_others(seconds: float = 5) -> None:
    """Let process 0, which may keep the store, end as the last: the others ask it who reports their errors."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() != 0:
        return
    end = time.monotonic() + seconds
    with contextlib.suppress(Exception):  # an error at the end of another
        store = torch.distributed.distributed_c10d._get_default_store()
        while store.add(ASKED, 0) < torch.distributed.get_world_size() and time.monotonic() < end:
            time.sleep(0.05)


def _keep_traceback(rank: int) -> str:
    """Put the traceback into the log of this run, or of this process of it; say where it is."""
    logger = MMLogger.get_current_instance()
    path = getattr(logger, 'log_file', None)
    if path is None:
        return ' (--debug shows the traceback)'
    lines = traceback.format_exc()
    files = [each for each in logger.handlers if isinstance(each, logging.FileHandler)]
    try:
        if files:
            files[0].stream.write(lines)
            files[0].flush()
        else:  # only the first process logs
            path = f'{Path(path).with_suffix("")}_rank{rank}.log'
            with Path(path).open('a') as file:
                file.write(lines)
    except Exception:  # a full disk, for one
        return ' (--debug shows the traceback)'
    return f' (traceback in {path})'


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
