"""Whether Triton's compiler knows a GPU.

LLVM ends the process where it is to compile for a GPU that it does not know, so a process of its own tries. This file
is what runs there: it needs Triton alone, and imports nothing of this package.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import subprocess
import sys

__all__ = ['trouble']

# Compute capabilities that every Triton knows that the kernels run with.
KNOWN = {(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)}


def trouble(capability: tuple[int, int]) -> str | None:
    """Why nothing can be compiled for GPUs of a compute capability; None where something can, or may.

    Args:
        capability: Major and minor.
    """
    if capability in KNOWN or not sys.executable:
        return None
    major, minor = capability
    program = (
        f'import runpy, sys; sys.path[:] = {sys.path}; runpy.run_path({__file__!r})["compile_for"]({major}{minor})'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, errors='replace', check=False
    )
    if done.returncode >= 0:  # no signal: it is done, or says why not where the kernels are compiled
        return None
    said = next((line for line in done.stderr.splitlines() if 'ERROR' in line), 'its compiler ends the process')
    return f'this Triton does not know GPUs of compute capability {major}.{minor}: {said.strip()}'


def compile_for(architecture: int) -> None:
    """Compile a sum for GPUs of compute capability ``architecture`` / 10."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    globals()['tl'] = tl  # where the compiler looks for it
    source = ASTSource(triton.jit(_sum), {'x': '*fp32', 'y': '*fp32'}, {}, {})
    triton.compile(source, target=GPUTarget('cuda', architecture, 32))


def _sum(x, y):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, 256)), 0))  # type: ignore[name-defined] # noqa: F821
