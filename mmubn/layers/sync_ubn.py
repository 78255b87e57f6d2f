"""UBN whose batch is that of all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from mmubn import functional as F
from mmubn.layers.recomputation import Call
from mmubn.layers.ubn import UBN

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

    def _forward_empty(self, x: Tensor) -> Tensor:
        if not self._synchronizes():
            return super()._forward_empty(x)
        # The others wait for this process in both collectives.
        a = x.new_zeros((0, self.num_features), dtype=F.statistics_dtype(x))
        mean, var = self._training_statistics(x, a, a)
        return super()._forward_empty(x) + 0 * (mean.nan_to_num().sum() + var.nan_to_num().sum()).to(x.dtype)

    def _reduce(
        self, x: Tensor, a: Tensor, v: Tensor, sums: tuple[Tensor, Tensor] | None, call: Call | None
    ) -> tuple[tuple[Tensor, Tensor], int | Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
        if not self._synchronizes():
            return super()._reduce(x, a, v, sums, call)
        if x.numel():
            mean, var = F.batch_statistics(a, v, self.center_weight)
        else:
            mean = var = self._zero(x).to(a.dtype).expand(self.num_features)
        if call is None:
            count = a.new_full((1,), x.numel() // self.num_features)
            pairs = a.new_zeros(2) if sums is None else torch.stack(sums)
            exchanged = _all_gather(torch.cat([count, pairs, mean.detach(), var.detach()]))
        else:
            exchanged = call.exchanged
        counts, totals, pairs = exchanged[:, :3].unbind(1)
        batch = _CombinedStatistics.apply(mean, var, exchanged[:, 3:], counts)
        return batch, counts.sum(), sums and (totals.sum(), pairs.sum()), exchanged


def _all_gather(vector: Tensor) -> Tensor:
    """The vectors of all processes, (processes, len(vector))."""
    gathered = vector.new_empty(dist.get_world_size(), vector.numel())
    dist.all_gather(list(gathered.unbind(0)), vector)
    return gathered


class _CombinedStatistics(torch.autograd.Function):
    """Mean and biased variance over all processes from those of each, by the law of total variance.

    ``mu = sum_p w_p mu_p`` and ``var = sum_p w_p (var_p + (mu_p - mu)^2)``, with ``w_p`` the share of the values.
    The backward adds up the gradients of all processes' losses: the second collective.
    """

    @staticmethod
    def forward(ctx, mean: Tensor, var: Tensor, gathered: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        share = counts / counts.sum().clamp_min(1)
        means, variances = gathered.chunk(2, dim=1)
        mu = share @ means
        total = share @ (variances + (means - mu) ** 2)
        ctx.save_for_backward(mean - mu, share[dist.get_rank()])
        return mu, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_mu: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        deviation, share = ctx.saved_tensors
        grads = torch.stack([grad_mu, grad_var])
        dist.all_reduce(grads)
        grad_mu, grad_var = grads
        return share * (grad_mu + 2 * grad_var * deviation), share * grad_var, None, None
