"""UBN whose batch is that of all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import functional as F
from mmubn.kernels import Backend, Form, Parameters
from mmubn.layers.ubn import UBN

__all__ = ['SyncUBN']


class SyncUBN(UBN, _BatchNorm):
    """UBN with batch statistics over all processes and one gate for all, for few images per GPU.

    In distributed training, mean and variance are those of the samples of all processes, weighted by their number of
    values, and the similarity is the mean over all pairs of samples *of the same process*,

    ``s = sum_p sum_{i != j in p} cos(x_i, x_j) / sum_p n_p (n_p - 1)``,

    with the first ``similarity_samples`` samples of each process p. (Pairs across processes would need the maps
    themselves to travel, and their sizes differ where each process pads its own images.) So every process takes the
    same decision and moves the same running statistics. One collective per forward (2 C + 3 numbers from each process)
    and one per backward (2 C numbers), whatever the gate says and whatever the process's batch: it may be of another
    size than the others', or empty.

    In evaluation, and outside distributed training, this is :class:`~mmubn.layers.UBN`: same arguments, same state
    dict. Gradients are those of the sum of the processes' losses, as in ``nn.SyncBatchNorm``.

    Raises:
        ValueError: As UBN, but a single value per channel is an error only where no other process adds to it.
    """

    def _synchronizes(self) -> bool:
        return self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def _decide(
        self, x: Tensor, a: Tensor, v: Tensor, backend: Backend, form: Form, parameters: Parameters
    ) -> tuple[Tensor, Tensor, Tensor, int | Tensor, tuple[Tensor, Tensor] | None]:
        if not self._synchronizes():
            return super()._decide(x, a, v, backend, form, parameters)
        count, pairs, statistics = a.new_zeros(1), a.new_zeros(2), a.new_zeros(2, self.num_features)
        if x.numel() > 0:  # a process without samples adds nothing, but the others wait for it
            count.fill_(x.numel() // self.num_features)
            statistics = torch.stack(F.batch_statistics(a, v, self.center_weight))
            if self._gate_acts():
                total, number = backend.similarity_sums(x, a, v, self.similarity_samples)
                pairs = torch.stack([total, total.new_tensor(number)])
        gathered = _all_gather(torch.cat([count, pairs, statistics.flatten()]))
        counts, totals, pairs = gathered[:, :3].unbind(1)
        # mean = sum_p w_p mean_p and var = sum_p w_p (var_p + (mean_p - mean)^2), w_p the share of the values
        share = counts / counts.sum().clamp_min(1)
        means, variances = gathered[:, 3:].chunk(2, dim=1)
        mean = share @ means
        batch = mean, share @ (variances + (means - mean).square())

        tau, threshold = self.running_similarity, None
        if self._gate_acts():
            threshold = self.threshold
            tau = F.update_running_similarity(tau, totals.sum() / pairs.sum(), self.similarity_momentum)
        condensed = F.is_condensed(tau, threshold)
        running = self.running_mean, self.running_var
        selected, moved = F.select_statistics(batch, running, condensed, self._momentum(condensed), counts.sum())
        self._move(moved, tau)
        return *selected, condensed, counts.sum(), None


def _all_gather(vector: Tensor) -> Tensor:
    """The vectors of all processes, (processes, len(vector))."""
    gathered = vector.new_empty(dist.get_world_size(), vector.numel())
    dist.all_gather(list(gathered.unbind(0)), vector)
    return gathered
