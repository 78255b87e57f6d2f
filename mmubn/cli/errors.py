"""How a tool starts and ends: its errors are one line for the user, or, with ``--debug``, the traceback."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import traceback
from collections.abc import Callable

import torch

from mmubn import openmmlab
from mmubn.checkpoints import CheckpointError
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.safe_reader import use_safe_reader

__all__ = ['UsageError', 'add_debug_argument', 'add_trust_argument', 'run_tool']

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

    The tool reads checkpoints by the list of :mod:`mmubn.openmmlab.safe_reader`, but for ``--trust-checkpoint``. A
    UsageError, or a config or checkpoint that does not fit, ends with status 2 and one line, or, with ``--debug``, a
    traceback. One process reports it.

    Args:
        parse_args: Parses the command line with a parser that has the argument of :func:`add_debug_argument`.
        main: Does the work.
    """
    args = parse_args()
    openmmlab.install()
    trust = getattr(args, 'trust_checkpoint', False)
    use_safe_reader(trust)
    try:
        if trust and os.environ.get(FORCE_SAFE, '0') != '0':
            raise UsageError(f'--trust-checkpoint reads everything, and {FORCE_SAFE} in the environment forbids it.')
        main(args)
        if torch.distributed.is_initialized():
            _leave_process_group()
    except (UsageError, ConfigError, CheckpointError) as error:
        if os.environ.get('RANK', '0') == '0':
            if args.debug:
                traceback.print_exc()
            else:
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
