"""UBN whose batch is that of all processes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from mmubn.layers.arguments import require
from mmubn.layers.ubn import UBN

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ['SyncUBN']


class SyncUBN(UBN):
    """UBN with batch statistics over all processes and one gate for all, for few images per GPU.

    In distributed training, mean and variance are those of the samples of all processes, weighted by their number of
    values, and the similarity is the mean over all pairs of samples *of the same process*,

    ``s = sum_p sum_{i != j in p} cos(x_i, x_j) / sum_p n_p (n_p - 1)``,

    with the first ``similarity_samples`` samples of each process p. (Pairs across processes would need the maps
    themselves to travel, and their sizes differ where each process pads its own images.) So every process takes the
    same decision and moves the same running statistics. One collective per forward (2 C + 3 numbers from each process)
    and one per backward (2 C numbers), whatever the gate says and whatever the process's batch: it may be of another
    size than the others', or empty. The host waits for neither, nor for the GPU.

    In evaluation, outside distributed training and in a group of one process, this is :class:`~mmubn.layers.UBN`: same
    arguments, same state dict. Gradients are those of the sum of the processes' losses, as in ``nn.SyncBatchNorm``.

    Args:
        process_group: The processes whose samples are one batch, as in ``nn.SyncBatchNorm``: a group of
            ``torch.distributed.new_group`` that this process is in. None: all processes. It is no part of the state
            dict; a copy of the layer is in the same group.
        num_features: C. It and every argument that is not named here are as in UBN.

    Raises:
        ValueError: As UBN, but a single value per channel is an error only where no other process adds to it. For a
            ``process_group`` that is no group, or one that this process is not in.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        threshold: float | None = 0.15,
        similarity_momentum: float = 0.1,
        similarity_samples: int = 16,
        centering: bool = True,
        scaling: bool = True,
        kernel_size: int = 3,
        calibrate_bias: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            threshold=threshold,
            similarity_momentum=similarity_momentum,
            similarity_samples=similarity_samples,
            centering=centering,
            scaling=scaling,
            kernel_size=kernel_size,
            calibrate_bias=calibrate_bias,
        )
        # torch.distributed.new_group returns another object to processes that are not in the group.
        require(
            process_group is None or (dist.is_available() and isinstance(process_group, dist.ProcessGroup)),
            type(self).__name__,
            'process_group',
            process_group,
            'None, or a group of torch.distributed.new_group that this process is in; give each process its own group',
        )
        self.process_group = process_group

    def _processes(self) -> ProcessGroup | None:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncUBN:
        """With the same process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__dict__, memo))
        return other
