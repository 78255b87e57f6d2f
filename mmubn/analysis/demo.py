"""Where the demos put their results."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from mmubn.analysis.outputs import replacing
from mmubn.cli import UsageError

__all__ = ['new_result']


@contextlib.contextmanager
def new_result(folder: Path) -> Iterator[Path]:
    """Give a folder that :func:`~mmubn.analysis.outputs.replacing` puts in the place of ``folder`` at the end.

    Where the work fails or is interrupted, by SIGTERM too, a line says what is where.

    Raises:
        UsageError: The folder cannot be written, or another demo is writing it.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = False
    try:
        with replacing(folder) as new:
            started = True
            yield new
    except BaseException as error:
        if not started:
            if isinstance(error, OSError):
                raise UsageError(f'{folder} cannot be written: {error}.') from error
            raise
        left = f'the result of an earlier one is still in {folder}' if folder.exists() else 'there is no earlier one'
        print(f'the demo did not come to its end: what it did is in {new}; {left}.', file=sys.stderr, flush=True)
        if isinstance(error, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
