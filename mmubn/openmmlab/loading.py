"""How MMEngine reads checkpoints: what it accepts in a file, where it finds the weights, and what it says about norms.

The functions here are replacements and actions of the table in :mod:`mmubn.openmmlab.patches`, and what
:mod:`mmubn.openmmlab.pretrained` shares with them.
"""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from logging import Logger
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log

from mmubn.checkpoints import counted_reads, is_state_dict, report_reads
from mmubn.openmmlab.versions import release

__all__ = [
    'accept_checkpoints',
    'accepted_checkpoints',
    'log_layouts',
    'log_reads',
    'unwrap_model_key',
    'with_state_dict',
]

# --- what torch.load(weights_only=True) accepts -----------------------------------------------------------------------


def accept_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)``, the default since torch 2.6, read what training checkpoints hold."""
    torch.serialization.add_safe_globals(_missing_safe_globals())


@contextlib.contextmanager
def accepted_checkpoints() -> Iterator[None]:
    """:func:`accept_checkpoints` for the time of a context."""
    missing = _missing_safe_globals()
    if not missing:  # so always with torch < 2.6
        yield
        return
    with torch.serialization.safe_globals(missing):  # takes away at the end what it is given
        yield


def _missing_safe_globals() -> list[tuple[Any, str]]:
    """What must be added for the log history of MMEngine and for the arguments of torchvision's training scripts.

    The history is of HistoryBuffer objects made of NumPy arrays, the arguments are a Namespace, a plain record. Stock
    MMEngine up to 0.10.7 does not allow for the history and fails to load any checkpoint of its own. (onedl-mmengine
    brings a list of its own, with all of ``getattr`` in it.) The names here build arrays and look up four methods; they
    run nothing else.
    """
    if release(torch.__version__) < (2, 6):
        return []  # there, the default is to load anything
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    dtypes = {type(np.dtype(name)) for name in ('bool', 'int32', 'int64', 'uint8', 'float32', 'float64')}
    allowed = [HistoryBuffer, Namespace, bytes, np.ndarray, np.dtype, *dtypes]
    # A HistoryBuffer pickles its statistics methods by getattr, under the name it had in Python 2 for old protocols.
    lookups = [(_history_buffer_method, f'{module}.getattr') for module in ('builtins', '__builtin__')]
    # With their names: the plain objects are on onedl-mmengine's own list, which it takes away again after each load.
    names = [(item, f'{item.__module__}.{item.__qualname__}') for item in allowed]
    for core in ('core', '_core'):  # of NumPy 1 and 2
        names += [
            (item, f'numpy.{core}.multiarray.{item.__name__}') for item in (multiarray._reconstruct, multiarray.scalar)
        ]
    present = torch.serialization.get_safe_globals()
    return [each for each in (*names, *lookups) if each not in present]


def _history_buffer_method(owner: type, name: str) -> Callable:
    """``getattr`` for the methods of HistoryBuffer that a checkpoint of MMEngine refers to, and for nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise UnpicklingError(f'a checkpoint of MMEngine does not refer to {name!r} of {owner!r}')
    return getattr(owner, name)


# --- where the weights are --------------------------------------------------------------------------------------------


def unwrap_model_key(original: classmethod) -> classmethod:
    """Make ``CheckpointLoader.load_checkpoint``, by which Runner and ``init_cfg`` read, return a ``state_dict``."""

    @functools.wraps(original.__func__)
    def load_checkpoint(cls, *args, **kwargs):
        return with_state_dict(original.__func__(cls, *args, **kwargs))

    return classmethod(load_checkpoint)


def with_state_dict(checkpoint: object) -> object:
    """A checkpoint ``{'model': state_dict, ...}`` with the state dict as ``state_dict`` too; any other as it is.

    torchvision's training scripts write the former. MMEngine looks for the key ``state_dict`` alone; it takes any other
    dict for a state dict itself.
    """
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint and is_state_dict(checkpoint.get('model')):
        return {**checkpoint, 'state_dict': checkpoint['model']}
    return checkpoint


# --- what was read ----------------------------------------------------------------------------------------------------


def log_layouts(original: Callable) -> Callable:
    """Make ``mmengine.runner.checkpoint.load_state_dict`` log how many layers were read from which layout.

    A layer sees its own part of the state dict alone, and MMEngine calls nothing at the end of a load.
    """

    @functools.wraps(original)
    def load_state_dict(module, state_dict, strict=False, logger=None):
        # Without a logger MMEngine prints, and the log file of the run would not have the line.
        with log_reads(logger or 'current'):
            return original(module, state_dict, strict, logger)

    return load_state_dict


_is_logging: ContextVar[bool] = ContextVar('_is_logging', default=False)


@contextlib.contextmanager
def log_reads(logger: Logger | str) -> Iterator[None]:
    """Log at the end, once, what layers of this package read within. A context within another one logs nothing."""
    if _is_logging.get():
        yield
        return
    token = _is_logging.set(True)
    try:
        with counted_reads() as reads:
            yield
    finally:
        _is_logging.reset(token)
    for line in report_reads(reads):
        print_log(line, logger=logger)
