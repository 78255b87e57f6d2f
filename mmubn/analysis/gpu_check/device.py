"""What the checks ask of a device, so that one and the same check runs on a GPU and, by Triton's interpreter, on a CPU.

On the CPU nothing runs beside the host: there is nothing to wait for, and one stream alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from mmubn import ops
from mmubn.analysis.gpu_check.outcome import Skip
from mmubn.layers.unified_norm import UnifiedNorm
from mmubn.ops.triton import runtime

__all__ = [
    'by_backend',
    'captured',
    'is_gpu',
    'need_gpu',
    'need_kernels',
    'need_memory',
    'on_side_stream',
    'synchronize',
    'takes_kernels',
    'without_waiting',
]


def is_gpu(device: torch.device) -> bool:
    return device.type == 'cuda'


def need_gpu(device: torch.device, what: str) -> None:
    """Skip the check elsewhere."""
    if not is_gpu(device):
        raise Skip(f'{what} needs a GPU')


def need_kernels(device: torch.device) -> None:
    """Skip the check on a GPU that the kernels are not for; a CPU has Triton's interpreter."""
    if is_gpu(device) and (problem := runtime.lacking(device)) is not None:
        raise Skip(problem)


def need_memory(device: torch.device, gib: float) -> None:
    """Skip the check where so much GPU memory is not free."""
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    if free < gib:
        raise Skip(f'needs {gib:g} GiB of GPU memory, {free:.1f} are free')


def synchronize(device: torch.device) -> None:
    """Wait for the device, which raises what went wrong there."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def by_backend(device: torch.device, name: str | None = None) -> contextlib.AbstractContextManager[None]:
    """A context in which this backend computes; by default the one that layers choose on a GPU, else ``triton``."""
    if name is None and is_gpu(device):
        return contextlib.nullcontext()
    return ops.use_backend(name or 'triton')


def takes_kernels(layer: UnifiedNorm, x: torch.Tensor) -> bool:
    """Whether the Triton kernels compute the layer for such an input."""
    with by_backend(x.device):
        return ops.backend_info(layer, x).startswith('triton')


@contextlib.contextmanager
def without_waiting(device: torch.device) -> Iterator[None]:
    """A context in which it is an error if the host waits for the device."""
    if not is_gpu(device):
        yield
        return
    synchronize(device)
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@contextlib.contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """A context that runs on a stream of its own, after what was launched before and waited for at its end."""
    if not is_gpu(device):
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step as one CUDA graph, which reads and writes the memory that it did here; on the CPU the step itself.

    It runs four times here, the last time without being computed.
    """
    with on_side_stream(device):  # what runs once only, such as the choice of an algorithm, must not be captured
        for _ in range(3):
            step()
    if not is_gpu(device):
        step()
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
