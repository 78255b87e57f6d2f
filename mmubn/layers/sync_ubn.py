"""UBN whose batch is that of all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from mmubn import functional
from mmubn.layers.ubn import UBN
from mmubn.ops import Backend, BatchStatistics, Decision, Form, Gate, Moments, Parameters, Similarity

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
    size than the others', or empty.

    In evaluation, and outside distributed training, this is :class:`~mmubn.layers.UBN`: same arguments, same state
    dict. Gradients are those of the sum of the processes' losses, as in ``nn.SyncBatchNorm``.

    Raises:
        ValueError: As UBN, but a single value per channel is an error only where no other process adds to it.
    """

    def _synchronizes(self) -> bool:
        return self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def _decide(self, x: Tensor, moments: Moments, backend: Backend, form: Form, parameters: Parameters) -> Decision:
        if not self._synchronizes():
            return super()._decide(x, moments, backend, form, parameters)
        gate, running = self._gate_and_running(x, moments)
        similarity, batch = self._gather(x, moments, backend, gate)
        return backend.decide_by(similarity, batch, gate, running)

    def _gather(
        self, x: Tensor, moments: Moments, backend: Backend, gate: Gate | Tensor
    ) -> tuple[Similarity, BatchStatistics]:
        """The sums of all processes, by one collective. A process without samples adds nothing to them."""
        a, v = moments
        count, similarity, statistics = a.new_zeros(1), a.new_zeros(2), a.new_zeros(2, self.num_features)
        if x.numel() > 0:
            count.fill_(x.numel() // self.num_features)
            statistics = torch.stack(functional.batch_statistics(a, v, self.center_weight))
            if isinstance(gate, Gate):
                own = backend.similarity_sums(x, moments, gate.max_samples)
                similarity = torch.stack([own.total, own.total.new_tensor(own.pairs)])
        gathered = _all_gather(torch.cat([count, similarity, statistics.flatten()]))
        counts, totals, pairs, means, variances = gathered.split([1, 1, 1, self.num_features, self.num_features], dim=1)
        # mean = sum_p w_p mean_p and var = sum_p w_p (var_p + (mean_p - mean)^2), w_p the share of the values
        total_count = counts.sum()
        shares = counts.flatten() / total_count.clamp_min(1)
        mean = shares @ means
        var = shares @ (variances + (means - mean).square())
        return Similarity(totals.sum(), pairs.sum()), BatchStatistics(mean, var, total_count)


def _all_gather(vector: Tensor) -> Tensor:
    """The vectors of all processes, (processes, len(vector))."""
    gathered = vector.new_empty(dist.get_world_size(), vector.numel())
    dist.all_gather(list(gathered.unbind(0)), vector)
    return gathered
