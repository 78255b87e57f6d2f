"""Norms of the sweeps: what the paper leaves open about the gate, and how a fresh kernel starts.

They are norms of one's own, by docs/extending.md, and no types of the package: configs/sweeps/digits.yml compares them,
and docs/results.md has the outcome. ``custom_imports`` of this module registers them.

The gates have buffers beside UBN's, which their state dict holds too: one of UBN or BatchNorm does not fit them. Two
things that UBN does they do not: open where a tool re-estimates the statistics (``momentum`` None or 1), and in
``reset_running_stats()``.
"""

from __future__ import annotations

import torch
from mmengine.model import update_init_info
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from torch import Tensor, nn

from mmubn import functional
from mmubn.layers import UBN, UnifiedNorm
from mmubn.layers.arguments import is_int, require
from mmubn.ops import Moments

__all__ = [
    'CenteredGateUBN',
    'InputGateUBN',
    'OppositeGateUBN',
    'OutputGateUBN',
    'PooledGateUBN',
    'RandomKernelInit',
    'RelativeGateUBN',
]


@MODELS.register_module()
class InputGateUBN(UBN):
    r"""UBN with two more choices that section 3.3.1 and Eq. 3 leave open; by default the norm that UBN is.

    .. math::
        s = \frac{1}{k (k - 1)} \sum_{i \ne j \le k} \cos(f_i, f_j), \qquad \tau \leftarrow (1 - m_s) \tau + m_s s,
        \qquad \mathrm{condensed} = \tau > T

    in each training batch, where f_i are the features of sample i, here its input x_i as one row, and k is
    ``similarity_samples``, or N where that is less. An s that is not finite, as of a single sample, leaves tau alone.
    Evaluation moves nothing.

    **When.** The gate is open at first. It is decided anew in the batches ``interval``, ``2 * interval`` and so on, for
    that batch already, and stays until the next of them.

    **Closed.** The running statistics normalise, without gradient. With ``learns_while_closed`` they move first,
    ``running <- (1 - m) running + m batch``, so that those that normalise know the batch; ``num_batches_tracked``
    counts open batches alone all the same.

    Args:
        num_features, eps, momentum, threshold, similarity_samples: As in UBN.
        interval: The gate is decided once in so many batches; at least 1.
        learns_while_closed: Whether the running statistics move while they normalise.

    Attributes:
        num_batches: Training batches so far; all but ``num_batches_tracked`` found the gate closed.
        condensed: Whether the gate is open.

    Raises:
        ValueError: As :class:`~mmubn.layers.UBN`; for another ``interval``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        threshold: float = 0.15,
        similarity_samples: int = 16,
        interval: int = 1,
        learns_while_closed: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, threshold=threshold, similarity_samples=similarity_samples)
        is_interval = is_int(interval) and interval >= 1
        require(is_interval, type(self).__name__, 'interval', interval, 'an integer of at least 1')
        self.interval = interval
        self.learns_while_closed = learns_while_closed
        self.register_buffer('num_batches', torch.tensor(0))
        self.register_buffer('condensed', torch.tensor(True))

    def _gate(self, x: Tensor, moments: Moments) -> Tensor:
        if not self._moves():
            return self.condensed.clone()
        s = functional.mean_cosine_similarity(self._features(x, moments), self.similarity_samples)
        decision = self._decision(s)
        self.running_similarity.copy_(decision[0])
        self.num_batches.add_(1)
        self.condensed.copy_(torch.where(self.num_batches % self.interval == 0, decision[1], self.condensed))
        if self.learns_while_closed:
            batch = functional.batch_statistics(*moments, self.center_weight)
            running, count = (self.running_mean, self.running_var), x.numel() // x.shape[1]
            _, moved = functional.select_statistics(batch, running, ~self.condensed, self.momentum, count)
            for buffer, value in zip(running, moved, strict=True):
                buffer.copy_(value)
        return self.condensed.clone()  # a backward may come after the next forward

    def _features(self, x: Tensor, moments: Moments) -> Tensor:
        """The features f that are compared, (N, ...)."""
        return x

    def _decision(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """The new running similarity tau from the batch's s, and whether the features are condensed."""
        tau = functional.update_running_similarity(self.running_similarity, similarity, self.similarity_momentum)
        return tau, functional.is_condensed(tau, self.threshold)


@MODELS.register_module()
class CenteredGateUBN(InputGateUBN):
    """Compares the input without the mean of each channel over the whole batch: ``f_i = x_i - mean_nhw x``."""

    def _features(self, x: Tensor, moments: Moments) -> Tensor:
        return x - moments.a.mean(0)[:, None, None].to(x.dtype)


@MODELS.register_module()
class PooledGateUBN(InputGateUBN):
    """Compares the input after global average pooling, C numbers a sample: ``f_i = a_i = mean_hw x_i``."""

    def _features(self, x: Tensor, moments: Moments) -> Tensor:
        return moments.a


@MODELS.register_module()
class OutputGateUBN(InputGateUBN):
    """Compares the layer's output, ``f_i = y_i``, of the training batch before: the gate comes before the output.

    That is the output of the norm, before the activation. The first batch has none before it: s = 1.

    Attributes:
        similarity: s of the last batch's output.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer('similarity', torch.tensor(1.0))

    def _decision(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        return super()._decision(self.similarity)

    def _normalize(self, x: Tensor) -> Tensor:
        y = super()._normalize(x)
        if self._moves():
            self.similarity.copy_(functional.mean_cosine_similarity(y.detach(), self.similarity_samples))
        return y


@MODELS.register_module()
class RelativeGateUBN(InputGateUBN):
    """A rule without a threshold: the batch's statistics where it is more alike than batches were of late.

    ``condensed = s > tau``, tau before it moves. Until the running statistics have learned from 1 / momentum batches
    they are worth little, and the gate is open. After that an s that is not finite closes it. No ``threshold`` is read.
    """

    def _decision(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        tau, _ = super()._decision(similarity)
        return tau, (similarity > self.running_similarity) | (self.num_batches_tracked * self.momentum < 1)


@MODELS.register_module()
class OppositeGateUBN(InputGateUBN):
    """The other direction of section 3.3.1, which Eq. 3 has not: condensed features take the running statistics.

    ``condensed`` here is ``not tau > T``: the gate is open to the batch's statistics while the features are *not*
    condensed. It is closed from the first batch on, so without ``learns_while_closed`` nothing would ever be learned.
    """

    def _decision(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        tau, condensed = super()._decision(similarity)
        return tau, ~condensed


@WEIGHT_INITIALIZERS.register_module()
class RandomKernelInit:
    """Lets the affine step of every BNET and UBN start as torch starts a convolution, as in the released code.

    ``weight``, ``neighbor_weight`` and ``bias`` are drawn from U(-1/k, 1/k), k * k being the inputs of an output. It is
    the last in a backbone's ``init_cfg``, since the others set ``weight`` to 1 and ``bias`` to 0. MMPretrain's ResNet
    then sets both to 0 in the last norm of each block (``zero_init_residual``), whose neighbours stay as drawn.
    """

    def __call__(self, module: nn.Module) -> None:
        for norm in module.modules():
            if isinstance(norm, UnifiedNorm) and norm.kernel_size > 1:
                bound = 1 / norm.kernel_size
                for parameter in (norm.weight, norm.neighbor_weight, norm.bias):
                    nn.init.uniform_(parameter, -bound, bound)
        update_init_info(module, init_info=f'{type(self).__name__}: U(-1/k, 1/k)')
