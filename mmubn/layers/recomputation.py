"""What a forward decided, kept for activation checkpointing, which runs it a second time."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ['Call', 'RecentCalls']


class Call(NamedTuple):
    """One training forward: what identifies it, and what its repetition must not decide again."""

    a: Tensor  # instance means of its input, (N, C)
    mean: Tensor  # the statistics that normalised, (C,)
    var: Tensor
    condensed: Tensor  # whether they were the batch's, 0-d bool
    num_values: int | Tensor  # values per channel of the batch


class RecentCalls:
    """The last training forwards of one layer.

    With activation checkpointing (``torch.utils.checkpoint``, reentrant or not; ``with_cp=True`` of a backbone) the
    forward runs again during the backward. By then the averages have moved and the gate may have flipped: the second
    run must use the first one's decision, move nothing and call no collective. Its input identifies the call that it
    repeats; the choice is made on the device.

    The calls are no state: copies and pickles of a layer start without.
    """

    def __init__(self, length: int = 16) -> None:
        self._calls: deque[Call] = deque(maxlen=length)

    def __reduce__(self) -> tuple:
        return RecentCalls, (self._calls.maxlen,)

    def record(self, call: Call) -> None:
        if not torch.compiler.is_compiling():  # a compiled graph repeats what it saved, not the layer's Python code
            self._calls.append(call)

    def recomputed(self, a: Tensor) -> Call | None:
        """The call that is being repeated, found by its instance means; None where this is a first run."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return None
        calls = [call for call in self._calls if (call.a.shape, call.a.device) == (a.shape, a.device)]
        if len(calls) < 2:
            return calls[0] if calls else None
        nearest = torch.stack([(call.a - a).abs().sum() for call in calls]).argmin()

        def choose(values: list[Tensor]) -> Tensor:
            return torch.stack(values)[nearest]

        counts = [call.num_values for call in calls if isinstance(call.num_values, Tensor)]
        return Call(
            a,
            choose([call.mean for call in calls]),
            choose([call.var for call in calls]),
            choose([call.condensed for call in calls]),
            choose(counts) if counts else calls[0].num_values,  # a number is the same for all calls of one shape
        )
