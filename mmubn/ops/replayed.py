"""The steps of a layer as launches: the first forward or backward of a kind is recorded, the others are replays of it.

What is recorded are the steps of :class:`~mmubn.ops.backend.Backend`, in the order in which a layer and
:func:`~mmubn.ops.autograd.rectified_norm` take them. :mod:`mmubn.ops.triton.replay` has the recording.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmubn import functional
from mmubn.ops import autograd
from mmubn.ops.backend import Backend
from mmubn.ops.triton import runtime
from mmubn.ops.triton.inputs import dense_gradient
from mmubn.ops.triton.replay import Tape, record
from mmubn.ops.types import Buffers, Coefficients, Form, Gate, Parameters, Running, Statistics

__all__ = ['Forward', 'Step', 'replayed_norm']

# Detection with images of all sizes has about 6,000; each takes some 10 KB.
MOST_STEPS = 2**13
TRIES = 3  # to record a step, since tensors that share memory say nothing of those of another layer
_steps: dict[tuple, Step] = {}
_PLAIN = (Tensor, nn.Parameter)
_DTYPES_OF_GATES = torch.bool, torch.float32  # of a decision, and of a running similarity


class Forward(NamedTuple):
    """One forward of a layer."""

    x: Tensor  # (N, C, H, W), with elements
    parameters: Parameters
    gate: Gate | Tensor | None  # as for Backend.decide; None where the running statistics normalise
    running: Running
    moves: bool  # whether the batch moves the buffers
    num_batches: Tensor | None  # num_batches_tracked, if there is one


def replayed_norm(backend: Backend, form: Form, forward: Forward) -> Tensor | None:
    """The output of a layer, and its moved buffers, by a replay, or by a first run that is recorded.

    Args:
        backend: Whose steps are launches.
        form: Of the layer.
        forward: Its input and its tensors.

    Returns:
        (N, C, H, W), in the dtype of x, with gradients of x and of the parameters. None, and nothing done, for what is
        not replayed: tensors that the kernels do not take as they are, or steps that do more than to launch.
    """
    x, parameters, gate, running, moves, num_batches = forward
    device = x.device
    tensor_of_gate = _tensor_of(gate)
    for vector in (*parameters, running.mean, running.var, tensor_of_gate, num_batches):
        if vector is not None and not (
            type(vector) in _PLAIN
            and vector.device == device
            and vector.is_contiguous()
            and not vector.is_neg()
            and (vector.dtype is torch.float32 or vector is num_batches or vector is tensor_of_gate)
        ):
            return None
    if num_batches is not None and num_batches.dtype is not torch.int64:
        return None
    if tensor_of_gate is not None and tensor_of_gate.dtype is not _DTYPES_OF_GATES[isinstance(gate, Gate)]:
        return None
    in_memory = not (x.is_neg() or x._is_zerotensor())
    if isinstance(running.momentum, Tensor) or not in_memory or runtime.is_recording():
        return None
    wants_grad = torch.is_grad_enabled()
    key = (
        (backend, form, x.shape, x.stride(), x.dtype, device, x.data_ptr() % 16),
        (running.momentum, moves, wants_grad, *(each is None for each in parameters), num_batches is None),
        gate[1:] if isinstance(gate, Gate) else gate is None,
    )
    step = _steps.get(key)
    if step is None:
        if len(_steps) >= MOST_STEPS:
            del _steps[next(iter(_steps))]  # the oldest
        step = _steps[key] = Step(backend, form, wants_grad)
    if not step.is_replayable:
        return None
    if wants_grad:
        return _ReplayedNorm.apply(step, forward, x, *parameters)
    return step.forward(forward)[0]


class Step:
    """The forwards of one kind, and their backwards."""

    def __init__(self, backend: Backend, form: Form, wants_grad: bool) -> None:
        self.backend, self.form, self.wants_grad = backend, form, wants_grad
        self._tries = 0
        self.tape: Tape | None = None
        self._backward_tapes: dict[tuple, Tape] = {}

    @property
    def is_replayable(self) -> bool:
        """Whether it is recorded, or may yet be."""
        return self.tape is not None or self._tries < TRIES

    def forward(self, forward: Forward) -> tuple[Tensor, tuple[Tensor | None, ...], Tape | None]:
        """The output, what a backward needs, and the tape by whose numbers that is the workspace alone."""
        inputs = _present(
            forward.x,
            *forward.parameters,
            forward.running.mean,
            forward.running.var,
            _tensor_of(forward.gate),
            forward.num_batches if forward.moves else None,
        )
        if self.tape is not None:
            (y,), workspace = self.tape.replay(inputs)
            assert y is not None
            if forward.moves:
                buffers = forward.running.mean, forward.running.var, _tensor_of(forward.gate), forward.num_batches
                torch._C._increment_version([each for each in buffers if each is not None])
            return y, (workspace,), self.tape
        with functional.without_autocast(forward.x.device.type):
            (y,), kept, self.tape = record(lambda: self._steps(forward), inputs)
        assert y is not None
        self._tries += 1
        return y, tuple(kept), None

    def _steps(self, forward: Forward) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The output, and what a backward needs: the statistics and the coefficients."""
        x, parameters, gate, running, moves, num_batches = forward
        backend, form = self.backend, self.form
        if gate is None:
            statistics = backend.running_statistics(x, form, parameters, running, self.wants_grad)
        else:
            moments = backend.instance_moments(x)
            decision = backend.decide(x, moments, gate, form, parameters, running)
            if moves:
                tau = gate.running_similarity if isinstance(gate, Gate) else None
                backend.move(decision, Buffers(running.mean, running.var, tau, num_batches))
            statistics = Statistics(
                *moments, decision.mean, decision.var, decision.condensed, coefficients=decision.coefficients
            )
        y, coefficients, _ = autograd.forward(backend, x, statistics, form, parameters)
        if not self.wants_grad:
            return [y], []
        a, v, mean, var, condensed, *_ = statistics
        return [y], [a, v, mean, var, condensed if isinstance(gate, Gate) else None, *coefficients]

    def backward(
        self, dy: Tensor, x: Tensor, parameters: Parameters, condensed: Tensor | None, kept: tuple, tape: Tape | None,
        wants_dx: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        """The gradients of x, if it is wanted, and of the parameters."""
        is_as_x = type(dy) is Tensor and dy.dtype is x.dtype and dy.stride() == x.stride()
        if not is_as_x or dy.is_neg() or dy._is_zerotensor():
            dy = dense_gradient(dy, x)
        key = dy.data_ptr() % 16, wants_dx
        inputs = _present(dy, x, *parameters, condensed, *kept)
        is_watched = _is_watched()
        if tape is not None and not is_watched and (known := self._backward_tapes.get(key)) is not None:
            return known.replay(inputs)[0]

        def steps() -> tuple[list[Tensor | None], list[Tensor | None]]:
            saved = self.saved(x, parameters, condensed, kept, tape)
            dx, gradients = autograd.backward(self.backend, dy, saved, self.form, wants_dx)
            return [dx, *gradients], []

        if tape is None or is_watched:
            return steps()[0]
        outputs, _, found = record(steps, inputs)
        if found is not None:
            self._backward_tapes[key] = found
        return list(outputs)

    def saved(
        self, x: Tensor, parameters: Parameters, condensed: Tensor | None, kept: tuple, tape: Tape | None
    ) -> autograd.Saved:
        """What the backward of the steps reads."""
        if tape is not None:
            kept = tuple(None if place is None else place.view(kept[0]) for place in tape.kept)
        a, v, mean, var, decided, *coefficients = kept
        condensed = decided if condensed is None else condensed
        num_values = x.numel() // x.shape[1]
        statistics = Statistics(a, v, mean, var, condensed, num_values)
        return autograd.Saved(x, parameters, statistics, Coefficients(*coefficients), None)


class _ReplayedNorm(torch.autograd.Function):
    """As :class:`~mmubn.ops.autograd.RectifiedNorm`, with the statistics."""

    @staticmethod
    def forward(ctx: Any, step: Step, forward: Forward, x: Tensor, *parameters: Tensor | None) -> Tensor:
        y, kept, ctx.tape = step.forward(forward)
        ctx.step = step
        condensed = forward.gate if isinstance(forward.gate, Tensor) else None
        ctx.save_for_backward(x, *parameters, condensed, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        parameters, condensed, kept = Parameters(*others[:6]), others[6], tuple(others[7:])
        step: Step = ctx.step
        with functional.without_autocast(dy.device.type):
            if torch.is_grad_enabled() or autograd.is_batched(dy):
                saved = step.saved(x, parameters, condensed, kept, ctx.tape)
                dx, found = autograd.differentiable_backward(dy, saved, step.form)
                gradients = [dx, *found]
            else:
                gradients = step.backward(dy, x, parameters, condensed, kept, ctx.tape, ctx.needs_input_grad[2])
        return None, None, *gradients


def _is_watched() -> bool:
    """Whether a mode sees operators, and may give them other memory."""
    return torch._C._len_torch_dispatch_stack() > 0


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _tensor_of(gate: Gate | Tensor | None) -> Tensor | None:
    return gate.running_similarity if isinstance(gate, Gate) else gate
