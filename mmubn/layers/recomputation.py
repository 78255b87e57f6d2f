"""What a training forward decided, kept for activation checkpointing, which runs the forward a second time."""

from __future__ import annotations

import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ['Call', 'RecordedCalls', 'is_backward_running', 'is_recomputation']

MAX_CALLS = 64  # of a layer, between a forward without a graph and its backward


@dataclass(eq=False)
class Call:
    """One training forward: what identifies it, and what its repetition must not decide again."""

    a: Tensor  # instance means of its input, (N, C)
    mean: Tensor  # the statistics that normalised, (C,)
    var: Tensor
    condensed: Tensor  # whether they were the batch's, 0-d bool
    num_values: int | Tensor  # values per channel of the batch
    number: int = 0  # how many calls of the layer were recorded before
    uses: int | Tensor = 0  # how often it was repeated; 0-d where that is known on the device alone


class RecordedCalls:
    """The training forwards of one layer that may run again.

    With activation checkpointing (``torch.utils.checkpoint``, reentrant or not; ``with_cp=True`` of a backbone) the
    forward runs again during the backward. By then the averages have moved and the gate may have flipped: the second
    run must use the first one's decision, move nothing and call no collective.

    Nothing is recorded of a forward that cannot run again: one that builds its own graph, and keeps the tensors of it.
    Two kinds may:

    - under saved-tensor hooks (a checkpoint that is not reentrant): the hooks hold the graph's tensors, and a record is
      forgotten with the last of them;
    - inside the forward of an ``autograd.Function`` (a reentrant checkpoint), where gradients of both kinds are off: a
      record is forgotten when the layer records again after all were used, or after 64 others. (What was used is
      kept until then for a second backward through the same graph.)

    Of several recorded calls the repetition's instance means tell which it is: those of the same bits, or else the
    nearest; of several such, the one that was used least, and of these the newest, since a backward goes from the end.
    All of that is done on the device; one call needs none of it.

    In a graph of torch.compile nothing is recorded: a repetition moves nothing and decides by the running similarity as
    the first run left it (:func:`is_recomputation`). That is the first run's decision unless the layer ran in between.

    The calls are no state: copies and pickles of a layer start without.
    """

    def __init__(self) -> None:
        self._by_hook: weakref.WeakKeyDictionary[Any, list[Call]] = weakref.WeakKeyDictionary()
        self._without_graph: deque[Call] = deque(maxlen=MAX_CALLS)
        self._num_recorded = 0
        self._num_repeated = 0  # of those without a graph

    def __reduce__(self) -> tuple:
        return RecordedCalls, ()

    def __len__(self) -> int:
        return len(self._without_graph) + sum(map(len, self._by_hook.values()))

    def record(self, call: Call) -> None:
        """Keep a call if it may run again. Never waits for the device."""
        if torch.compiler.is_compiling():
            return
        unpack_hook = _unpack_hook()
        if unpack_hook is None and not _inside_function():
            return
        call.number = self._num_recorded
        self._num_recorded += 1
        if unpack_hook is not None:
            self._by_hook.setdefault(unpack_hook, []).append(call)
            return
        if self._num_repeated >= len(self._without_graph):
            self._without_graph.clear()
            self._num_repeated = 0
        self._without_graph.append(call)

    def repeated(self, a: Tensor) -> Call | None:
        """The call that a forward during a backward repeats, by its instance means; None where this is a first run."""
        if torch.compiler.is_compiling() or not is_backward_running():
            return None
        with_graph = [call for calls in self._by_hook.values() for call in calls]
        fitting = [call for call in (*with_graph, *self._without_graph) if _is_like(call.a, a)]
        if not fitting:
            return None
        if not with_graph:
            self._num_repeated += 1
        if len(fitting) == 1:
            fitting[0].uses += 1
            return fitting[0]
        return _choose(sorted(fitting, key=lambda call: -call.number), a)


def is_backward_running() -> bool:
    """Whether this thread runs a backward, in which a forward can only be one that is repeated."""
    return torch._C._current_graph_task_id() != -1


# The schema, since torch 2.4 cannot read annotations that are strings.
@torch.library.custom_op('mmubn::is_recomputation', mutates_args=(), schema='(Tensor like) -> Tensor')
def is_recomputation(like: Tensor) -> Tensor:
    """:func:`is_backward_running` as an operator, 0-d bool: a compiled graph runs again without any Python code."""
    return like.new_full((), is_backward_running(), dtype=torch.bool)


@is_recomputation.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


def _unpack_hook() -> Any:
    """The innermost of torch's saved-tensor hooks; it lives as long as the tensors that it is to unpack."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[1]


def _inside_function() -> bool:
    """Whether this is the forward of an autograd.Function. ``no_grad`` alone leaves forward-mode gradients on."""
    return not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def _is_like(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _choose(calls: list[Call], a: Tensor) -> Call:
    """The call of these, newest first, that has the instance means a. The choice stays on the device."""
    distances = torch.stack([_distance(call.a, a) for call in calls])
    uses = torch.stack([_as_tensor(call.uses, a) for call in calls])
    index = torch.where(distances == distances.min(), uses, math.inf).argmin()  # of equal ones, the first
    uses = uses + (torch.arange(len(calls), device=a.device) == index)
    for call, count in zip(calls, uses.unbind(), strict=True):
        call.uses = count

    def chosen(values: list[Tensor]) -> Tensor:
        return torch.stack(values).index_select(0, index.view(1))[0]

    counts = [call.num_values for call in calls]
    return Call(
        a,
        chosen([call.mean for call in calls]),
        chosen([call.var for call in calls]),
        chosen([call.condensed for call in calls]),
        # A number is the same for all calls of one shape.
        chosen([count for count in counts if isinstance(count, Tensor)])
        if isinstance(counts[0], Tensor)
        else counts[0],
    )


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the absolute differences; values of the same bits have none, NaN and infinity included."""
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0, (one - other).abs()).nan_to_num(nan=math.inf, posinf=math.inf).sum()


def _as_tensor(value: int | Tensor, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float32)
