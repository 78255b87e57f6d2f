"""What a training forward decided, kept for activation checkpointing, which runs the forward a second time."""

from __future__ import annotations

import math
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, GeneratorType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ['Call', 'RecordedCalls', 'is_recomputation']

MAX_CALLS = 64  # of a layer under saved-tensor hooks that may be any


@dataclass(eq=False)
class Call:
    """One training forward: what identifies it, and what its repetition must not decide again."""

    a: Tensor  # instance means of its input, (N, C)
    v: Tensor  # instance variances, (N, C)
    mean: Tensor  # the statistics that normalised, (C,)
    var: Tensor
    condensed: Tensor  # whether they were the batch's, 0-d bool
    num_values: int | Tensor  # values per channel of the batch
    uses: int | Tensor = 0  # how often it was repeated, where contents tell; 0-d if known on the device alone


@dataclass(eq=False)
class Calls:
    """The calls of a layer in one checkpoint, in order, and how far a backward has repeated them."""

    calls: deque[Call]
    backward: int = -1  # number of torch's graph task
    position: int = 0


class RecordedCalls:
    """The training forwards of one layer that may run again.

    With activation checkpointing (``torch.utils.checkpoint``, reentrant or not; ``with_cp=True`` of a backbone) the
    forward runs again during the backward. By then the averages have moved and the gate may have flipped: the second
    run must use the first one's decision, move nothing and call no collective.

    Nothing is recorded of a forward that cannot run again: one that builds its own graph, and keeps the tensors of it.
    What runs a forward again is an object that lives as long as the graph, and the records of a layer go with it:

    - the context of an ``autograd.Function`` in whose forward the layer runs (a reentrant checkpoint, of torch or
      others), found on the stack in its forward and again in its backward;
    - the frame of a checkpoint of torch that is not reentrant, found in its saved-tensor hooks;
    - other saved-tensor hooks, of which nothing more is known.

    In the first two, the calls of a layer are repeated in their order. In the third, the instance moments tell which is
    repeated: those of the same bits, or else the nearest; of several such, the one that was used least, and of these
    the newest, since a backward goes from the end. That choice is made on the device.

    In a graph of torch.compile nothing is recorded: a repetition moves nothing and decides by the running similarity as
    the first run left it (:func:`is_recomputation`). That is the first run's decision unless the layer ran in between.

    The calls are no state: copies and pickles of a layer start without.
    """

    def __init__(self) -> None:
        self._by_owner: weakref.WeakKeyDictionary[Any, Calls] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return RecordedCalls, ()

    def __len__(self) -> int:
        return sum(len(each.calls) for each in self._by_owner.values())

    def may_run_again(self) -> bool:
        """Whether this forward is one that runs again, or may be: there is more to know of it then than its output."""
        if is_backward_running():
            return len(self._by_owner) > 0
        return _top_hooks() is not None or _inside_function()

    def record(self, call: Call) -> None:
        """Keep a call if it may run again. Never waits for the device."""
        if torch.compiler.is_compiling():
            return
        for owner in _owners():
            length = None if _is_known(owner) else MAX_CALLS
            self._by_owner.setdefault(owner, Calls(deque(maxlen=length))).calls.append(call)

    def repeated(self, a: Tensor, v: Tensor) -> Call | None:
        """The call that a forward during a backward repeats; None where this is a first run."""
        if torch.compiler.is_compiling() or not self._by_owner or not is_backward_running():
            return None
        call = None
        known = [owner for owner in _repeating() if owner in self._by_owner]
        if known:
            call = self._next(self._by_owner[known[0]])
        else:
            others = [calls for owner, calls in self._by_owner.items() if not _is_known(owner)]
            fitting = [call for each in others for call in each.calls if _is_like(call.a, a)]
            call = _choose(fitting[::-1], a, v) if fitting else None
        if call is not None:
            self.record(call)  # a checkpoint within the one that is repeated will itself run the layer again
        return call

    @staticmethod
    def _next(recorded: Calls) -> Call | None:
        backward = torch._C._current_graph_task_id()
        if recorded.backward != backward:
            recorded.backward, recorded.position = backward, 0
        recorded.position += 1
        return recorded.calls[recorded.position - 1] if recorded.position <= len(recorded.calls) else None


# torch 2.7. Before, hooks of other libraries are not seen; the checkpoints of torch are found on the stack.
_KNOWS_HOOKS = hasattr(torch._C._autograd, '_top_saved_tensors_default_hooks')


def _top_hooks() -> Any:
    """The saved-tensor hooks at work, a pair; None where there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) if _KNOWS_HOOKS else None


def is_backward_running() -> bool:
    """Whether this thread runs a backward, in which alone a forward can be a repetition."""
    return torch._C._current_graph_task_id() != -1


# The schema, since torch 2.4 cannot read annotations that are strings.
@torch.library.custom_op('mmubn::is_recomputation', mutates_args=(), schema='(Tensor like) -> Tensor')
def is_recomputation(like: Tensor) -> Tensor:
    """:func:`is_backward_running` as an operator, 0-d bool: a compiled graph runs again without any Python code."""
    return like.new_full((), is_backward_running(), dtype=torch.bool)


@is_recomputation.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


# --- what runs a forward again ----------------------------------------------------------------------------------------


def _owners() -> list[Any]:
    """What may run this forward again; most often nothing."""
    hooks = _top_hooks()
    is_inside = _inside_function()
    if hooks is None and not is_inside and _KNOWS_HOOKS:
        return []
    owners = _contexts('forward') if is_inside else []
    owners += _frames_of_checkpoints()
    if hooks is not None:
        cells = _cells(hooks[0])
        owners += [each for each in cells if _is_frame(each)]
        is_repetition = any(isinstance(each, weakref.ref) and _is_frame(each()) for each in cells)
        if not owners and not is_repetition:
            owners.append(hooks[1])  # which lives as long as the tensors that it is to unpack
    return list(dict.fromkeys(owners))


def _repeating() -> Iterator[Any]:
    """What may be running this forward again, the innermost first."""
    hooks = _top_hooks()
    if hooks is not None:
        frames = (each() for each in _cells(hooks[0]) if isinstance(each, weakref.ref))
        yield from (frame for frame in frames if _is_frame(frame))
    for name, values in _stack('backward', 'unpack_hook'):
        wanted = _is_frame if name == 'unpack_hook' else _is_context
        yield from (each for each in values if wanted(each))


def _inside_function() -> bool:
    """Whether this is the forward of an autograd.Function. ``no_grad`` alone leaves forward-mode gradients on."""
    return not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def _contexts(method: str) -> list[Any]:
    """The contexts of the autograd.Functions whose ``method`` is on the stack."""
    return [each for _, values in _stack(method) for each in values[:1] if _is_context(each)]


def _frames_of_checkpoints() -> list[Any]:
    """The checkpoints of torch that are not reentrant within which this code runs: each waits in a generator."""
    generators = [each for _, values in _stack('checkpoint') for each in values if isinstance(each, GeneratorType)]
    found = [frame.f_locals.values() for each in generators if (frame := each.gi_frame) is not None]
    return [each for values in found for each in values if _is_frame(each)]


def _stack(*names: str) -> Iterator[tuple[str, list[Any]]]:
    """The functions of these names on the stack, the innermost first, with their variables, the arguments first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in names:
            yield frame.f_code.co_name, list(frame.f_locals.values())
        frame = frame.f_back


def _cells(function: Any) -> list[Any]:
    """What a function has from the function that it is defined in."""
    cells = getattr(function, '__closure__', None) or ()
    return [cell.cell_contents for cell in cells if cell != type(cell)()]


def _is_frame(value: object) -> bool:
    """Whether this is what a checkpoint of torch that is not reentrant knows of itself."""
    return type(value).__name__ == '_CheckpointFrame'


def _is_context(value: object) -> bool:
    return isinstance(value, FunctionCtx)


def _is_known(owner: object) -> bool:
    return _is_context(owner) or _is_frame(owner)


# --- by contents ------------------------------------------------------------------------------------------------------


def _is_like(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _choose(calls: list[Call], a: Tensor, v: Tensor) -> Call:
    """The call of these, newest first, that has the instance moments a and v. The choice stays on the device."""
    if len(calls) == 1:
        return calls[0]
    distances = torch.stack([_distance(call.a, a) + _distance(call.v, v) for call in calls])
    uses = torch.stack([_as_tensor(call.uses, a) for call in calls])
    index = torch.where(distances == distances.min(), uses, math.inf).argmin()  # of equal ones, the first
    uses = uses + (torch.arange(len(calls), device=a.device) == index)
    for call, count in zip(calls, uses.unbind(), strict=True):
        call.uses = count

    def chosen(values: list[Tensor]) -> Tensor:
        return torch.stack(values).index_select(0, index.view(1))[0]

    counts = [call.num_values for call in calls if isinstance(call.num_values, Tensor)]
    return Call(
        a,
        v,
        chosen([call.mean for call in calls]),
        chosen([call.var for call in calls]),
        chosen([call.condensed for call in calls]),
        chosen(counts) if counts else calls[0].num_values,  # a number is the same for all calls of one shape
    )


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the absolute differences; values of the same bits have none, NaN and infinity included."""
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0, (one - other).abs()).nan_to_num(nan=math.inf, posinf=math.inf).sum()


def _as_tensor(value: int | Tensor, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float32)
