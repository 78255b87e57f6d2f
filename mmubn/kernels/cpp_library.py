"""Compiles ``cpp_kernels.cpp`` for the machine at hand, once, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

# The functions of the library and their arguments: p a pointer, i an integer, d a double, b a bool.
ARGUMENTS = {
    'moments': 'ppp iii bi',
    'similarity': 'pppp iii i',
    'convolve': 'ppp pppppp iiii iiiii bbi',
    'tap_sums': 'pppipp iiiii bi',
    'statistics': 'pppppp di pppp ii',
    'coefficients': 'ppp db ppp ppp ii',
    'coefficients_backward': 'pppppp dd b p pi pi p ppp pp ppppp iiiii',
}
DTYPES = ('float32', 'float64', 'bfloat16')
TYPES = {'p': ctypes.c_void_p, 'i': ctypes.c_int64, 'd': ctypes.c_double, 'b': ctypes.c_bool}

__all__ = ['cache_folder', 'library', 'load']

SOURCE = Path(__file__).with_name('cpp_kernels.cpp')
# For this processor: the compiled file stays on machines like this one, see _key.
FLAGS = ['-O3', '-march=native', '-std=c++17', '-fopenmp', '-fPIC', '-shared']


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/mmubn``, by default ``~/.cache/mmubn``."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmubn'


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library, compiled at the first call in some ten seconds; or None and the reason in words."""
    try:
        return load(cache_folder()), ''
    except (OSError, RuntimeError) as error:
        return None, str(error).strip().splitlines()[0]


def load(folder: Path) -> ctypes.CDLL:
    """The library from ``folder``, compiled if it is not there.

    Raises:
        RuntimeError: There is no C++ compiler, or it fails.
        OSError: The folder cannot be written, or the library not loaded.
    """
    compiler = _compiler()
    path = folder / f'cpp_kernels-{_key(compiler)}.so'
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may be here at once: each writes its own file and puts it in place in one step.
        handle, temporary = tempfile.mkstemp(suffix='.so', dir=folder)
        os.close(handle)
        try:
            logging.getLogger('mmubn').info('compiling %s with %s for this machine', SOURCE.name, compiler[0])
            command = [*compiler, *FLAGS, str(SOURCE), '-o', temporary]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                reason = next((line for line in done.stderr.splitlines() if 'error' in line), done.stderr.strip())
                raise RuntimeError(f'{" ".join(compiler)} cannot compile them: {reason}')
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    library = ctypes.CDLL(str(path))
    for name, arguments in ARGUMENTS.items():
        for dtype in DTYPES:
            function = getattr(library, f'{name}_{dtype}', None)  # the small functions compute in float32 or float64
            if function is not None:
                function.argtypes = [TYPES[letter] for letter in arguments.replace(' ', '')]
                function.restype = None
    return library


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get('CXX', ''))
    for command in [named] if named else [['c++'], ['g++'], ['clang++']]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f'there is no C++ compiler {" ".join(named) or "c++, g++ or clang++"}')


def _key(compiler: list[str]) -> str:
    """Tells sources, compilers and processors apart: a home folder may be shared by machines of different kinds."""
    version = subprocess.run([*compiler, '--version'], capture_output=True, text=True, check=False).stdout
    cpu = platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        cpu += next((line for line in info.read_text().splitlines() if line.startswith(('flags', 'Features'))), '')
    content = '\n'.join([SOURCE.read_text(), *compiler, *FLAGS, version, cpu])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
