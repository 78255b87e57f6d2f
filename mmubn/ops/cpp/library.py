"""Compiles the C++ kernels for the machine at hand, once, and loads them.

A compiled library is kept as ``kernels-{key}-{hash}.so``: the key is of all that it is made from, the hash of its own
content, so that a file that was cut off or changed is never loaded. It is code that runs as this user: it comes from a
folder that no other user may write to, or not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mmubn.ops.cpp import boundary
from mmubn.ops.first_use import FirstUse

__all__ = ['cache_folder', 'load', 'prepare', 'problem']

SOURCES = Path(__file__).with_name('kernels')
MAIN = 'kernels.cpp'  # includes the others
# For this processor: the compiled file stays on machines like this one, see _key.
FLAGS = ['-O3', '-march=native', '-std=c++17', '-fopenmp', '-fPIC', '-shared']
CPU = torch.device('cpu')


def problem() -> str | None:
    """Say why there is no library; None where there is one, and where :func:`prepare` may yet find or make one.

    Compiles nothing and starts no process.
    """
    if CPU in _first_use.outcomes:
        return _first_use.outcomes[CPU]
    try:
        _compiler()
        if (folder := cache_folder()).is_dir():
            _check_access(folder)
    except (OSError, RuntimeError) as error:
        return _reason(error)
    return None


def prepare() -> str | None:
    """Load the library at the first call, and compile it where that is still to be done.

    Returns:
        Why there is none; None where it is loaded.
    """
    return _first_use(CPU)


def _bind(_: torch.device) -> str | None:
    try:
        boundary.bind(load(cache_folder()))
    except (OSError, RuntimeError) as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return f'the C++ kernels are not there: {str(error).strip().splitlines()[0]}'


def _report(line: str) -> None:
    """Print a line, from one process of each machine."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'mmubn: {line}', file=sys.stderr, flush=True)


_first_use = FirstUse(_bind, lambda reason: _report(f"{reason}; torch's operators are used instead"))


def cache_folder() -> Path:
    """Return where compiled kernels are kept: ``mmubn/kernels`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmubn' / 'kernels'


def load(folder: Path) -> ctypes.CDLL:
    """Load the library from ``folder``, and compile it first where it is not there.

    Raises:
        RuntimeError: There is no C++ compiler, or it fails; or others may write to the folder or to the library.
        OSError: The folder cannot be written, or the library not loaded.
    """
    compiler = _compiler()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_access(folder)
    name = f'kernels-{_key(compiler)}'
    for path in sorted(folder.glob(f'{name}-*.so')):
        with contextlib.suppress(FileNotFoundError):  # another process removed it, for the same reason
            if path == _full_path(folder, name, path):
                _check_access(path)
                return ctypes.CDLL(str(path))
            path.unlink()  # it was cut off, or changed
    return ctypes.CDLL(str(_compile(compiler, folder, name)))


def _compile(compiler: list[str], folder: Path, name: str) -> Path:
    """Compile the library into ``folder`` and return its path."""
    _report(f'compiling the C++ kernels for this machine, about 15 s; kept in {_shown(folder)}')
    # Several processes may be here at once: each writes its own file and puts it in place in one step.
    handle, temporary = tempfile.mkstemp(suffix='.so', dir=folder)
    os.close(handle)
    try:
        command = [*compiler, *FLAGS, str(SOURCES / MAIN), '-o', temporary]
        done = _run(command)
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if 'error' in line), done.stderr.strip())
            raise RuntimeError(f'{" ".join(compiler)} cannot compile them: {reason or "it does not say why"}')
        Path(temporary).chmod(0o700)  # whatever the umask
        return Path(temporary).replace(_full_path(folder, name, Path(temporary)))
    finally:
        Path(temporary).unlink(missing_ok=True)


def _full_path(folder: Path, name: str, library: Path) -> Path:
    """Return the path at which a library with the content of this file is kept."""
    return folder / f'{name}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so'


def _check_access(path: Path) -> None:
    """Raise a RuntimeError for a file or folder that another user owns or may write to."""
    if os.name != 'posix':
        return
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise RuntimeError(
            f'{path} belongs to another user, whose code would run as you: set XDG_CACHE_HOME to a folder of your own'
        )
    if status.st_mode & 0o022:
        raise RuntimeError(
            f'{path} may be written to by other users, whose code would run as you: run `chmod go-w {path}` or set '
            'XDG_CACHE_HOME to a folder of your own'
        )


def _shown(path: Path) -> str:
    """Return the path with ``~`` for the home folder."""
    try:
        return f'~/{path.relative_to(Path.home())}'
    except (RuntimeError, ValueError):  # there is no home, or it is elsewhere
        return str(path)


def _compiler() -> list[str]:
    try:
        named = shlex.split(os.environ.get('CXX', ''))
    except ValueError as error:
        raise RuntimeError(f'CXX is no command: {error}') from error
    for command in [named] if named else [['c++'], ['g++'], ['clang++']]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f'there is no C++ compiler {" ".join(named) or "c++, g++ or clang++"}')


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Whatever the language and encoding of the compiler.
    return subprocess.run(command, capture_output=True, text=True, errors='replace', check=False)


def _key(compiler: list[str]) -> str:
    """Tell sources, compilers and processors apart: machines of different kinds may share a home folder."""
    version = _run([*compiler, '--version']).stdout
    cpu = platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        cpu += next((line for line in info.read_text().splitlines() if line.startswith(('flags', 'Features'))), '')
    paths = sorted(path for path in SOURCES.iterdir() if path.suffix in ('.h', '.cpp'))
    sources = [text for path in paths for text in (path.name, path.read_text())]
    content = '\n'.join([*sources, *compiler, *FLAGS, version, cpu])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
