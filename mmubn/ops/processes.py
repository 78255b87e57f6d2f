"""A batch of several processes: what each adds to its statistics, and the two collectives.

A process sends one vector of 2 C + 3 numbers: mean and variance of each of its channels, its number of values per
channel, and the sum and the number of its similarities. One that has no samples sends zeros. All arithmetic stays on
the device, and nothing here reads from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch import distributed as dist

from mmubn.ops.types import BatchStatistics, Similarity

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ['SECOND_DERIVATIVE', 'AllReduce', 'all_gather', 'all_reduce', 'merge', 'own_part', 'part_length']

SECOND_DERIVATIVE = 'SyncUBN has no second derivative across processes: use UBN where create_graph=True is needed.'


def part_length(channels: int) -> int:
    """Numbers that each process sends."""
    return 2 * channels + 3


def own_part(similarity: Similarity | None, batch: BatchStatistics) -> Tensor:
    """What this process sends: (2 C + 3,), in the statistics dtype. Without a similarity its sums are 0."""
    mean, var, num_values = batch
    if similarity is None:
        return torch.cat([mean, var, _filled(mean, num_values), mean.new_zeros(2)])
    return torch.cat([mean, var, _filled(mean, num_values), similarity.total.view(1), _filled(mean, similarity.pairs)])


def _filled(like: Tensor, number: int | Tensor) -> Tensor:
    """A number of the host's, (1,), filled in on the device: a copy from the host would wait for it."""
    return like.new_full((1,), cast(int, number))


def merge(parts: Tensor) -> tuple[Similarity, BatchStatistics]:
    """The batch of all processes from what they sent, with w_p the process's share of the values:

    ``mean = sum_p w_p mean_p``, ``var = sum_p w_p (var_p + (mean_p - mean)^2)``.

    The same numbers in the same order give every process the same bits, and so the same decision.

    Args:
        parts: Those of all processes, (P, 2 C + 3).
    """
    channels = (parts.shape[1] - 3) // 2
    num_values, total, pairs = parts[:, 2 * channels :].sum(0).unbind()
    means, variances = parts[:, :channels], parts[:, channels : 2 * channels]
    shares = parts[:, 2 * channels, None] / num_values.clamp_min(1)
    # No matrix products: they may be in TF32.
    mean = (shares * means).sum(0)
    deviations = means - mean
    var = (shares * torch.addcmul(variances, deviations, deviations)).sum(0)
    return Similarity(total, pairs), BatchStatistics(mean, var, num_values)


def all_gather(part: Tensor, processes: ProcessGroup) -> Tensor:
    """The parts of all processes, (P, len(part)), in the order of their ranks."""
    world = dist.get_world_size(processes)
    gathered = part.new_empty(world * len(part))
    dist.all_gather_into_tensor(gathered, part, group=processes)
    return gathered.view(world, len(part))


def all_reduce(tensor: Tensor, processes: ProcessGroup) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    dist.all_reduce(tensor, group=processes)
    return tensor


class AllReduce:
    """:func:`all_reduce`, started here and done after :meth:`wait`. What is launched in between runs beside it.

    Neither makes the host wait for a GPU.
    """

    def __init__(self, tensor: Tensor, processes: ProcessGroup) -> None:
        self._tensor = tensor
        # A compiler knows only the other form, and places the wait itself.
        self._work = dist.all_reduce(tensor, group=processes, async_op=not torch.compiler.is_compiling())

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._tensor
