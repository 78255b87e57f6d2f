"""How the tools read checkpoints: what a file holds is on a list, or the file is not read.

A checkpoint is a pickle, and a pickle can call any function. ``torch.load(weights_only=True)`` reads by a list, but a
caller can do without it, as onedl-mmengine does for what the list lacks, or add to it, as it does with ``getattr``. In
the process of a tool every ``torch.load`` reads by torch's list and the one here alone, whatever its caller asks for;
with ``--trust-checkpoint`` every one reads everything. :func:`read_by_list` is a replacement of the table
of :mod:`mmubn.openmmlab.patches`.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import functools
import io
import os
import pickletools
import re
import tarfile
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim.scheduler import OneCycleParamScheduler
from mmengine.runner import Runner

from mmubn.openmmlab import patches
from mmubn.openmmlab.errors import UnreadCheckpointError
from mmubn.openmmlab.versions import release

__all__ = ['ResumedConfigHook', 'raise_everywhere', 'read_by_list', 'use_safe_reader']

_trusted = False
_lock = threading.RLock()  # torch has one list for all threads


def use_safe_reader(trust: bool) -> None:
    """Let every ``torch.load`` of this process, until the next call, read by the list or, with ``trust``, everything.

    Processes that this one forks have it too.
    """
    global _trusted
    _trusted = trust
    patches.apply(patches.ON_TOOLS)


def read_by_list(original: Callable) -> Callable:
    """Make ``torch.load`` read by the list, or everything, as :func:`use_safe_reader` said last."""

    @functools.wraps(original)
    def load(f, map_location=None, pickle_module=None, *, weights_only=None, mmap=None, **others):
        start = f.tell() if hasattr(f, 'tell') else 0
        try:
            if _trusted:
                return original(f, map_location, pickle_module, weights_only=False, mmap=mmap, **others)
            with _list_alone():
                _refuse_formats(f)
                read = original(f, map_location, weights_only=True, mmap=mmap, **others)
            return _with_arrays(read, set())
        except (FileNotFoundError, MemoryError, UnreadCheckpointError):
            raise
        except Exception as error:  # whatever a file makes torch's reader run into
            raise UnreadCheckpointError(_sentence(f, start, error)) from error

    return load


def raise_everywhere(original: Callable) -> Callable:
    """Make ``load_url`` of MMEngine let no process wait for the first one where that raises an error.

    ``load_from_http`` reads in the first process, forms a barrier, and reads in the others.
    """

    @functools.wraps(original)
    def load_url(*args, **kwargs):
        try:
            return original(*args, **kwargs)
        except Exception:
            if get_world_size() > 1 and is_main_process():
                torch.distributed.barrier()  # in place of the one that it does not come to
            raise

    return load_url


# --- the list ---------------------------------------------------------------------------------------------------------


class _UnlistedError(UnpicklingError):
    """Of something that entries of the list are not for: a file holds what this says."""


class _Restored:
    """The entry of a class: its objects are restored from what a file says, but nothing of it can be called.

    A file could call a class that is itself on the list; HistoryBuffer, for one, asks NumPy to read an object of any
    kind. The reader of torch compares the class of an object with the entries by ``==``.

    Args:
        path: Name in files.
        classes: The class that has this name, and others whose objects may be restored.
        new: Whether a file may ask for an object without a state.
        methods: Those of the class that a file may refer to.
    """

    def __init__(self, path: str, *classes: type, new: bool = True, methods: tuple[str, ...] = ()) -> None:
        self.__module__, _, self.__qualname__ = path.rpartition('.')
        self.__name__ = self.__qualname__  # torch 2.5 looks here
        self.path, self.classes, self.methods = path, classes, methods
        if new:
            self.__new__ = lambda entry: classes[0].__new__(classes[0])

    def __eq__(self, other: object) -> bool:
        return other is self or any(other is each for each in self.classes)

    def __hash__(self) -> int:
        return id(self)

    def __call__(self, *_: Any) -> None:
        raise _UnlistedError(f'{self.path}()')


def _named(path: str, function: Callable) -> Callable:
    """The entry of a function: ``function``, under its name in files."""
    function.__module__, _, function.__qualname__ = path.rpartition('.')
    function.__name__ = function.__qualname__
    return function


def _of(kind: type, **how: Any) -> _Restored:
    return _Restored(f'{kind.__module__}.{kind.__qualname__}', kind, **how)


def _method(owner: object, name: str) -> Callable:
    """``getattr``, by which pickles refer to methods, for those that checkpoints refer to."""
    if not isinstance(owner, _Restored) or type(name) is not str or name not in owner.methods:
        raise _UnlistedError(f'builtins.getattr of {name!r}' if type(name) is str else 'builtins.getattr()')
    return getattr(owner.classes[0], name)


class _DType:
    """A dtype of numbers while its file is read. NumPy's own would take anything for its state, fields included."""

    def __init__(self, code: str, *_: Any) -> None:
        if type(code) is not str or not re.fullmatch(r'[biuf]\d{1,2}', code):
            raise _UnlistedError(f'numpy.dtype({code!r})' if type(code) is str else 'numpy.dtype()')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array while its file is read, for the same reason: :func:`_with_arrays` puts it in place."""

    def __init__(self, kind: object, *_: Any) -> None:
        if kind is not _ARRAY:
            raise _UnlistedError('numpy.core.multiarray._reconstruct()')

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        array = np.ndarray(shape, dtype.dtype, data, order='F' if is_fortran else 'C')
        self.array = array.astype(array.dtype.newbyteorder('='))


def _scalar(dtype: _DType, data: bytes) -> np.generic:
    return np.ndarray((), dtype.dtype, data)[()]


def _with_arrays(value: Any, seen: set[int]) -> Any:
    """What was read, in which every :class:`_Array` becomes its array, in place where it can."""
    if isinstance(value, _Array):
        return value.array
    if type(value) is tuple:
        return tuple(_with_arrays(each, seen) for each in value)
    if id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            for key, each in value.items():  # no new keys; and the update of a Counter adds
                value[key] = _with_arrays(each, seen)
        elif isinstance(value, list):
            value[:] = [_with_arrays(each, seen) for each in value]
        elif isinstance(value, (HistoryBuffer, MessageHub, Namespace)):
            _with_arrays(vars(value), seen)
    return value


_ARRAY = _Restored('numpy.ndarray', _Array, _DType, new=False)
# What checkpoints of MMEngine and of torchvision's training scripts hold besides what torch itself allows for.
_LIST = [
    _of(HistoryBuffer, methods=('min', 'max', 'mean', 'current')),
    _of(MessageHub),
    _of(Namespace),
    _of(OneCycleParamScheduler, new=False, methods=('_annealing_cos', '_annealing_linear')),
    slice,
    float,  # as which the eps of our norms is pickled
    _named('builtins.bytes', lambda: b''),  # those of an empty array
    _named('builtins.getattr', _method),
    _ARRAY,
    _named('numpy.dtype', lambda *state: _DType(*state)),
    # Under its names in files of NumPy 1 and 2.
    *(_named(f'numpy.{core}.multiarray._reconstruct', lambda *state: _Array(*state)) for core in ('core', '_core')),
    *(_named(f'numpy.{core}.multiarray.scalar', lambda *state: _scalar(*state)) for core in ('core', '_core')),
]


@contextlib.contextmanager
def _list_alone() -> Iterator[None]:
    """For the time of a context, torch's reader allows for its own list and the one here, and for nothing else."""
    with _lock:
        before = list(torch.serialization.get_safe_globals())
        _set_safe_globals(_LIST)
        try:
            yield
        finally:
            _set_safe_globals(before)


def _set_safe_globals(entries: list) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(entries))


# --- what is refused, and how it is said ------------------------------------------------------------------------------

_TORCH = release(torch.__version__)
_REMEDY = 'if you trust where it comes from, add --trust-checkpoint'
if _TORCH < (2, 5):
    _REMEDY = f'torch {_TORCH[0]}.{_TORCH[1]} knows little that could not, a newer one knows more; {_REMEDY}'


def _refuse_formats(f: Any) -> None:
    """Refuse two formats that torch reads without its list before 2.6, and refuses itself since."""
    serialization = torch.serialization
    with serialization._open_file_like(f, 'rb') as file:
        start = file.tell()
        try:
            if serialization._is_zipfile(file):
                with serialization._open_zipfile_reader(file) as archive:
                    if serialization._is_torchscript_zip(archive):
                        raise UnreadCheckpointError(f'{_name(f)} is a TorchScript program and no checkpoint.')
            elif serialization._should_read_directly(file) and _is_tar(file):
                raise UnreadCheckpointError(
                    f'{_name(f)} is in an old tar format of torch, which could run a program, so it is not read; '
                    f'{_REMEDY}.'
                )
        finally:
            file.seek(start)


def _is_tar(file: BinaryIO) -> bool:
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode='r:'):
        return True
    return False


def _sentence(f: Any, start: int, error: Exception) -> str:
    """What there is to say of a file that torch's reader raised ``error`` at; an open one was at ``start``."""
    # A file may hold what a terminal obeys.
    return ''.join(each if each.isprintable() else '?' for each in _explanation(f, start, error))


def _explanation(f: Any, start: int, error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:  # of opening it
        return f'{_name(f)} cannot be read: {error.strerror or error}.'
    if _is_empty(f):
        return f'{_name(f)} is no checkpoint: the file is empty; copy or save it again, or give another one.'
    # torch wraps what its reader says in advice of many lines.
    inner = error.__context__ if isinstance(error, UnpicklingError) and error.__context__ else error
    reason = (str(inner).splitlines() or [''])[0].partition('. ')[0].rstrip('.')
    if not isinstance(inner, (UnpicklingError, RuntimeError)):
        reason = f'{type(inner).__name__}: {reason}'.rstrip(': ')
    names, protocol = _contents(f, start)
    if _trusted:
        return f'{_name(f)} cannot be read: {reason}.'
    if protocol is None and not names:
        if not isinstance(inner, (UnpicklingError, RuntimeError)):  # of a byte that means nothing, such as of a text
            reason = 'it has no format of torch.save'
        return (
            f'{_name(f)} is no checkpoint, or only a part of one: {reason}; copy or save it again, or give another one.'
        )
    if isinstance(inner, _UnlistedError):
        names.append(str(inner))
    if names:
        return f'{_name(f)} holds {names[0][:200]}, which could run a program, so it is not read; {_REMEDY}.'
    if protocol not in (2, 3):  # 3 differs in bytes alone
        reason = f"it is a pickle of protocol {protocol or '0 or 1'}, which torch's safe reader does not know"
    elif isinstance(inner, (RuntimeError, EOFError)) and _TORCH >= (2, 5):  # before, every error of its reader is one
        return f'{_name(f)} is no checkpoint, or only a part of one: {reason}.'
    return f'{_name(f)} is no checkpoint that is safe to read: {reason}; {_REMEDY}.'


def _is_empty(f: Any) -> bool:
    with contextlib.suppress(OSError, ValueError), torch.serialization._open_file_like(f, 'rb') as file:
        return file.seek(0, os.SEEK_END) == 0
    return False


def _name(f: Any) -> str:
    return os.fspath(f) if isinstance(f, (str, os.PathLike)) else str(getattr(f, 'name', 'a checkpoint'))


def _contents(f: Any, start: int) -> tuple[list[str], int | None]:
    """The names in the pickles of a file that are not on the list, and their protocol; None where one is not whole."""
    serialization = torch.serialization
    names: list[str] = []
    protocol = None
    with contextlib.suppress(Exception), serialization._open_file_like(f, 'rb') as file:  # whatever is in the file
        file.seek(start)
        stream, count = file, 5  # of a file that is no archive: its version in three, the checkpoint, keys of tensors
        if serialization._is_zipfile(file):
            with serialization._open_zipfile_reader(file) as archive:
                stream, count = io.BytesIO(archive.get_record('data.pkl')), 1
        protocols = [_read_names(stream, names)]
        while len(protocols) < count and stream.read(1):
            stream.seek(-1, os.SEEK_CUR)
            protocols.append(_read_names(stream, names))
        protocol = max(protocols)
    allowed = {f'{entry.__module__}.{entry.__qualname__}' for entry in _LIST}
    allowed.update(torch._weights_only_unpickler._get_allowed_globals())
    return [name for name in names if name not in allowed], protocol


def _read_names(stream: BinaryIO, names: list[str]) -> int:
    """Add the names in a pickle to ``names`` without unpickling it; return its protocol."""
    protocol, strings, memo, top = 0, [], {}, None
    for opcode, argument, _ in pickletools.genops(stream):
        kind, pair = opcode.name, None
        if kind == 'PROTO':
            protocol = argument
        elif kind in ('GLOBAL', 'INST'):
            pair = tuple(argument.split(' ', 1))
        elif kind == 'STACK_GLOBAL':
            pair = tuple(strings[-2:])
        elif 'PUT' in kind or kind == 'MEMOIZE':
            memo[len(memo) if argument is None else argument] = top
            continue
        top = memo.get(argument) if 'GET' in kind else argument
        if isinstance(top, str) and ('GET' in kind or 'UNICODE' in kind or 'STRING' in kind):
            strings.append(top)
        if pair is not None:
            module, name = _compat_pickle.NAME_MAPPING.get(pair, pair) if protocol < 3 else pair
            names.append(f'{_compat_pickle.IMPORT_MAPPING.get(module, module) if protocol < 3 else module}.{name}')
    return protocol


class ResumedConfigHook(Hook):
    """Refuses to resume from a checkpoint whose ``meta`` has a ``config``: MMEngine would run this text as Python.

    Its own checkpoints have none. Those of MMCV 1 have one, and are loaded, but cannot be resumed from.

    Raises:
        UnreadCheckpointError: Before anything of the checkpoint is taken over.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
        if runner._resume and not _trusted and isinstance(meta, dict) and 'config' in meta:
            raise UnreadCheckpointError(
                f'{runner._load_from or f"the last checkpoint in {runner.work_dir}"} holds the Python text of a config '
                f'(meta.config), which resuming would run, so it is not resumed from; {_REMEDY}.'
            )
