"""Fills Triton's cache with the kernels of recorded launches, in several processes. Needs torch with Triton, no GPU."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from mmubn.ops.triton.runtime import Launch

__all__ = ['Variant', 'cache_folder', 'compile_variants', 'variants_of']


class Variant(NamedTuple):
    """What Triton compiles a kernel for.

    Attributes:
        module, name: Of the kernel.
        arguments: As in a launch, with the dtype in place of a tensor, whose memory is aligned.
        constants: Of the launch, by name.
        num_warps: Of the launch.
    """

    module: str
    name: str
    arguments: tuple
    constants: tuple[tuple[str, int | bool], ...]
    num_warps: int


def variants_of(launches: Iterable[Launch]) -> Iterator[Variant]:
    """Of each launch its variant; those that Triton compiles once are equal."""
    for launch in launches:
        function = launch.kernel.fn
        unspecialised = set(launch.kernel.do_not_specialize or ())
        arguments = tuple(
            _traits(value, name not in unspecialised)
            for name, value in zip(launch.kernel.arg_names, launch.arguments, strict=False)
        )
        yield Variant(
            function.__module__, function.__name__, arguments, tuple(launch.constants.items()), launch.num_warps
        )


def _traits(value: Any, specialised: bool) -> Any:
    """A value that stands for all for which Triton compiles the same."""
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, float):
        return 0.5
    if isinstance(value, int) and not isinstance(value, bool):
        wide = 2**40 if value >= 2**31 else 0
        if not specialised:
            return wide + 3
        return 1 if value == 1 else wide + (16 if value % 16 == 0 else 3)
    return value


def compile_variants(variants: Iterable[Variant], architectures: Iterable[int], jobs: int) -> Iterator[Variant]:
    """Compile each variant for each architecture in ``jobs`` processes, and yield it when it is done.

    By Triton's own launch, short of launching: its cache then has what a run looks for.

    Args:
        variants: What to compile.
        architectures: 10 times the compute capability of each kind of GPU.
        jobs: How many processes compile.

    Raises:
        Exception: What Triton raises where it cannot compile.
    """
    work = [(variant, architecture) for architecture in architectures for variant in variants]
    # A process that torch has threads in must not be forked.
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(min(jobs, max(len(work), 1)), context) as pool:
        waiting = {pool.submit(_compile, *each): each[0] for each in work}
        try:
            for done in as_completed(waiting):
                done.result()
                yield waiting[done]
        finally:
            pool.shutdown(cancel_futures=True)


class _Driver:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiled for each device

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(variant: Variant, architecture: int) -> None:
    """In a process of the pool."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_Driver(architecture))
    kernel = getattr(importlib.import_module(variant.module), variant.name)
    kernel.warmup(*variant.arguments, grid=(1,), num_warps=variant.num_warps, **dict(variant.constants))


def cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    home = Path(os.environ.get('TRITON_HOME') or Path.home())
    return Path(os.environ.get('TRITON_CACHE_DIR') or home / '.triton' / 'cache')
