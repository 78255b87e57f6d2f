"""Whether the kernels work on a device: before their first use there, a tiny layer is computed and compared.

Triton compiles its launcher with a C compiler and Python's headers, writes to a folder, and must know the GPU. What is
missing shows in its first launch alone. The numbers that are expected come from the CPU in float64, so that nothing but
the kernels is at work on the device.
"""

from __future__ import annotations

import errno
import subprocess
import sysconfig
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmubn.ops.backend import Backend
from mmubn.ops.first_use import NotNowError
from mmubn.ops.reference import ReferenceBackend, reference_norm
from mmubn.ops.replayed import Forward, Step
from mmubn.ops.triton import architecture, runtime
from mmubn.ops.types import Buffers, Form, Gate, Parameters, Running, Statistics

__all__ = ['WrongNumbersError', 'check', 'report', 'trouble']


class Case(NamedTuple):
    """A layer that is computed, and its input."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]


# One for each layout, with a dtype of each width and few columns: their kernels compile in a second or two.
CASES = (
    Case(torch.float32, torch.contiguous_format, (2, 16, 6, 7)),
    Case(torch.bfloat16, torch.channels_last, (2, 16, 5, 1)),
)
ITERATIONS = 3  # the forward is replayed from the second on, the backward in the third
FORM = Form(eps=1e-5, scaling='rectified', calibrate_bias=False, kernel_size=3)
# Of the largest value. Code for a wrong GPU is off by more; rounding, of bfloat16 to 8 bits, by less.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7, torch.int64: 0.0}


class WrongNumbersError(Exception):
    """The kernels ran, but computed something else."""


def trouble(backend: Backend, device: torch.device) -> str | None:
    """Why the kernels do not work on a CUDA device; None where they do.

    In a thread of its own, where no mode of the caller holds: autocast, inference, autograd, a stream, what watches or
    replaces operators, a trace. Draws no random numbers, and keeps no memory.

    Raises:
        NotNowError: The device has no memory left, or a CUDA graph is captured, to which this must not belong.
    """
    if runtime.is_virtual() or device.type != 'cuda' or torch.cuda.is_current_stream_capturing():
        raise NotNowError
    raised: list[BaseException] = []

    def run() -> None:
        try:
            torch.cuda.set_device(device)
            if (reason := architecture.trouble(torch.cuda.get_device_capability(device))) is not None:
                raise RuntimeError(reason)
            check(backend, device)
        except BaseException as error:  # whatever ends the thread
            raised.append(error.with_traceback(None))  # whose frames hold tensors

    thread = threading.Thread(target=run, name='mmubn-probe', daemon=True)
    thread.start()
    thread.join()
    if not raised:
        return None
    (error,) = raised
    if _is_out_of_memory(error):
        raise NotNowError
    return f'the Triton kernels do not work on {device}: {_reason(error)}; {_remedy(error)}'


def report(trouble: str) -> None:
    warnings.warn(
        f"mmubn: {trouble}. Layers compute by torch's operators there, slower but as exact, unless told otherwise; "
        'MMUBN_BACKEND=torch does so without a try.',
        RuntimeWarning,
        stacklevel=2,
    )


def check(backend: Backend, device: torch.device) -> None:
    """Train a tiny layer, for each of :data:`CASES`.

    Args:
        backend: Which computes, a :class:`~mmubn.ops.triton.backend.TritonBackend`.
        device: Where.

    Raises:
        WrongNumbersError: It computes something else than the reference does on the CPU in float64.
        Exception: What Triton raises where it cannot compile or launch.
    """
    for case in CASES:
        # The samples have a mean in common, by which they are similar.
        x, dy = _values(1, *case.shape) + 1, _values(2, *case.shape)
        x, dy = (value.to(case.dtype, memory_format=case.memory_format) for value in (x, dy))
        layer = _Layer.of(case.shape[1])
        found = _training(backend, layer.to(torch.float32, device), x.to(device), dy.to(device))
        expected = _reference_training(layer.to(torch.float64, x.device), x.double(), dy.double())
        for iteration, (step, right_step) in enumerate(zip(found, expected, strict=True)):
            for name, value in step.items():
                value, right = value.cpu(), right_step[name]
                error = (value.double() - right).abs().max() / right.abs().max()
                if not error <= TOLERANCES[value.dtype]:  # nor NaN
                    layout = 'NCHW' if case.memory_format == torch.contiguous_format else 'channels-last'
                    dtype = str(case.dtype).removeprefix('torch.')
                    raise WrongNumbersError(
                        f'{name} of a layer in {dtype} and {layout} is off by {float(error):.1e} of its largest value '
                        f'in iteration {iteration + 1} of {ITERATIONS}'
                    )


def _values(seed: int, *shape: int) -> Tensor:
    """Numbers of about -1 to 1 that follow no pattern of the shape, on the CPU."""
    count = torch.Size(shape).numel()
    place = torch.arange(1, count + 1, dtype=torch.float64, device='cpu')
    return (place * place * (0.1 + 0.01 * seed)).sin().view(shape)


class _Layer(NamedTuple):
    """The tensors of a layer, which moves its running statistics."""

    parameters: Parameters
    mean: Tensor
    var: Tensor
    tau: Tensor
    num_batches: Tensor

    @classmethod
    def of(cls, c: int) -> _Layer:
        """One whose numbers float32 has."""
        w, b, w_m, w_v, w_b, mean, var = (_values(seed, c) for seed in range(3, 10))
        parameters = Parameters(w, b, _values(10, c * (FORM.kernel_size**2 - 1)), w_m, w_v, w_b)
        tau, count = torch.full((), 0.5, device='cpu'), torch.zeros((), dtype=torch.int64, device='cpu')
        return cls(parameters, mean, var.square() + 0.5, tau, count).to(torch.float32, tau.device)

    def to(self, dtype: torch.dtype, device: torch.device) -> _Layer:
        """A copy."""
        parameters: list[Any] = [
            None if value is None else value.to(device, dtype, copy=True) for value in self.parameters
        ]
        mean, var, tau = (value.to(device, dtype, copy=True) for value in (self.mean, self.var, self.tau))
        return _Layer(Parameters(*parameters), mean, var, tau, self.num_batches.to(device, copy=True))

    def gate_and_running(self) -> tuple[Gate, Running]:
        return Gate(self.tau, momentum=0.5, threshold=0.15, max_samples=16), Running(self.mean, self.var, 0.1)

    def results(self, y: Tensor, gradients: Iterable[Tensor | None]) -> dict[str, Tensor]:
        """What a step comes to, by name: the output, the gradients of x and of the parameters, the buffers."""
        found = {'the output': y}
        for name, gradient in zip(('x', *Parameters._fields), gradients, strict=True):
            assert gradient is not None
            found[f'the gradient of {name}'] = gradient
        buffers = dict(running_mean=self.mean, running_var=self.var, running_similarity=self.tau)
        buffers['num_batches_tracked'] = self.num_batches
        return found | {name: buffer.clone() for name, buffer in buffers.items()}


@torch.no_grad()
def _training(backend: Backend, layer: _Layer, x: Tensor, dy: Tensor) -> Iterator[dict[str, Tensor]]:
    """The results of each iteration. Without autograd, whose thread for the device may be waiting for this one."""
    gate, running = layer.gate_and_running()
    step = Step(backend, FORM, wants_grad=True)
    for _ in range(ITERATIONS):
        y, kept, tape = step.forward(
            Forward(x, layer.parameters, gate, running, moves=True, num_batches=layer.num_batches)
        )
        yield layer.results(y, step.backward(dy, x, layer.parameters, None, kept, tape, wants_dx=True))


def _reference_training(layer: _Layer, x: Tensor, dy: Tensor) -> Iterator[dict[str, Tensor]]:
    backend = ReferenceBackend()
    gate, running = layer.gate_and_running()
    for _ in range(ITERATIONS):
        with torch.no_grad():
            moments = backend.instance_moments(x)
            decision = backend.decide(x, moments, gate, FORM, layer.parameters, running)
            backend.move(decision, Buffers(layer.mean, layer.var, layer.tau, layer.num_batches))
        statistics = Statistics(*moments, decision.mean, decision.var, decision.condensed)
        inputs = [value.detach().requires_grad_() for value in (x, *layer.parameters) if value is not None]
        with torch.enable_grad():
            y = reference_norm(inputs[0], statistics, FORM, Parameters(*inputs[1:]))
        yield layer.results(y.detach(), torch.autograd.grad(y, inputs, dy))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.cuda.OutOfMemoryError) or getattr(error, 'errno', None) == errno.ENOMEM:
        return True
    return 'out of memory' in str(error).lower()


def _reason(error: BaseException) -> str:
    """What the error says, in one line."""
    if isinstance(error, subprocess.CalledProcessError):
        return f'{error.cmd[0]} fails with exit status {error.returncode}'
    lines = str(getattr(error, 'error_message', None) or error).strip().splitlines()
    said = next((line for line in lines if 'fatal' in line), lines[0] if lines else 'it does not say why')
    kind = '' if isinstance(error, WrongNumbersError) else f'{type(error).__name__}: '
    return kind + said.strip().rstrip('.')


def _remedy(error: BaseException) -> str:
    """What to do about it."""
    said = str(error)
    if 'libcuda' in said or 'ldconfig' in said:
        return 'set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1, or run ldconfig as root'
    if 'ptxas' in said.lower() or 'does not know GPUs' in said:
        return (
            'install a newer Triton, or set TRITON_PTXAS_PATH to the ptxas of a newer CUDA where that alone is too old'
        )
    if 'C compiler' in said:
        return 'install a C compiler such as gcc, or set CC to one'
    if isinstance(error, subprocess.CalledProcessError):
        if not Path(sysconfig.get_paths()['include'], 'Python.h').is_file():
            return 'install the headers of Python (python3-dev or python3-devel)'
        return 'see what the C compiler says above, or set CC to another'
    if isinstance(error, FileNotFoundError):
        return 'install what is missing, or set CC to a C compiler and TRITON_CACHE_DIR to a folder that can be written'
    if isinstance(error, OSError | ImportError) or 'cache dir' in said:
        return 'set TRITON_CACHE_DIR to a folder of yours that can be written and holds programs'
    return 'please report it with the output of `python -m torch.utils.collect_env`'
