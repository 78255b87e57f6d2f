"""What a step of a layer costs the host on the way to a GPU, measured without one."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget

from mmubn.analysis.benchmark.measurement import without_garbage_collection
from mmubn.ops import replayed, use_backend
from mmubn.ops.triton import runtime

__all__ = ['StandInDriver', 'host_times', 'stand_in']


class StandInDriver:
    """What Triton asks of a driver: it compiles for an architecture, and a launch only goes to ``launched``.

    Args:
        launched: Called with the compiled function, the grid (three numbers) and the arguments of each launch.
        architecture: Compute capability times 10.
    """

    def __init__(self, launched: Callable[[Any, tuple, tuple], object], architecture: int = 90) -> None:
        self._launched, self._architecture, self._loaded = launched, architecture, 0
        self.utils = SimpleNamespace(
            load_binary=self._load_binary, get_device_properties=lambda _: {'max_shared_mem': 2**17}
        )

    def _load_binary(self, *_: Any) -> tuple:
        self._loaded += 1
        return 'module', self._loaded, 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable:
        launched = self._launched
        return lambda x, y, z, stream, function, *others: launched(function, (x, y, z), others[4:])

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', self._architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _ignore(*_: Any) -> None:
    pass


def _always(_: torch.device) -> bool:
    return True


def _nothing(_: torch.device | None = None) -> None:
    return None


@contextlib.contextmanager
def stand_in(driver: StandInDriver) -> Iterator[None]:
    """Within this context tensors on the CPU take the way of a GPU's, up to the launches, which are the driver's."""
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(driver)
    _forget_compiled_kernels()
    try:
        with (
            # Functions, not mocks, which take their time to be called.
            mock.patch.object(runtime, 'takes_addresses', _always),
            mock.patch.object(runtime, 'lacking', _nothing),
            mock.patch.object(runtime, '_launched', {}),
            mock.patch.object(replayed, '_steps', {}),
            mock.patch.object(torch.cuda, 'current_device', _nothing),  # the index of a CPU
        ):
            yield
    finally:
        vars(triton.runtime.driver).update(before)
        _forget_compiled_kernels()


def _forget_compiled_kernels() -> None:
    """What Triton compiled in this process launches by the driver that it was compiled for."""
    for name, module in list(sys.modules.items()):
        if name.startswith('mmubn.ops.triton.'):
            for kernel in vars(module).values():
                if isinstance(kernel, triton.JITFunction):
                    kernel.device_caches.clear()


def host_times(
    layers: dict[str, nn.Module], shape: tuple[int, int, int, int], rounds: int, steps: int = 20
) -> dict[str, dict[str, list[float]]]:
    """The time of the host's thread for a step of each layer, in microseconds, round by round.

    Args:
        layers: By name; those of this package take the Triton kernels.
        shape: Of the input, float32.
        rounds: In each, every layer has its turn.
        steps: Of a layer in a round.

    Returns:
        ``{name: {'forward': [...], 'step': [...]}}``: forward alone, and forward and backward.
    """
    found: dict[str, dict[str, list[float]]] = {name: {'forward': [], 'step': []} for name in layers}
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with stand_in(StandInDriver(_ignore)), use_backend('triton'), without_garbage_collection():
            for layer in layers.values():
                for _ in range(3):  # compiles, and is recorded
                    layer(x).backward(dy)
            for _ in range(rounds):
                for name, layer in layers.items():
                    start = time.thread_time()
                    for _ in range(steps):
                        layer(x)
                    middle = time.thread_time()
                    for _ in range(steps):
                        layer(x).backward(dy)
                    end = time.thread_time()
                    found[name]['forward'].append(1e6 * (middle - start) / steps)
                    found[name]['step'].append(1e6 * (end - middle) / steps)
    finally:
        torch.set_num_threads(threads)
    return found
