"""Cases of the kernels under NVIDIA's compute-sanitizer, which sees accesses that are misaligned or out of bounds."""

from __future__ import annotations

import shutil

import torch

from mmubn.analysis.gpu_check import kernels
from mmubn.analysis.gpu_check.device import need_gpu
from mmubn.analysis.gpu_check.outcome import Check, Skip

__all__ = ['ENVIRONMENT', 'checks', 'prefix']

CASES = 8
# torch's cache of memory would hide an access beyond a tensor.
ENVIRONMENT = {'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'}


def prefix() -> list[str]:
    """What a command is put after, to be watched. It ends with another status than 0 where something was seen."""
    path = shutil.which('compute-sanitizer') or shutil.which('/usr/local/cuda/bin/compute-sanitizer')
    if path is None:
        raise Skip('compute-sanitizer is not installed; it comes with the CUDA toolkit')
    return [path, '--tool', 'memcheck', '--error-exitcode', '9']


def checks(device: torch.device) -> list[Check]:
    """Some of the checks of the stage ``kernels``, far apart in its list."""
    need_gpu(device, 'compute-sanitizer')
    prefix()
    found = kernels.checks(device)
    return found[1 :: max(1, len(found) // CASES)][:CASES]
