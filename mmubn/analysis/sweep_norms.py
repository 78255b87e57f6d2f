"""Norms of the sweeps: what the paper leaves open about the gate, and how a fresh kernel starts.

They are norms of one's own, by docs/extending.md, and no types of the package: configs/sweeps/digits.yml compares them,
and docs/results.md has the outcome. ``custom_imports`` of this module registers them.
"""

from __future__ import annotations

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmubn import functional
from mmubn.layers import BNET, UBN
from mmubn.ops import Moments

__all__ = [
    'CenteredGateUBN',
    'InputGateUBN',
    'OutputGateUBN',
    'PooledGateUBN',
    'RandomKernelBNET',
    'RandomKernelUBN',
    'RelativeGateUBN',
]


@MODELS.register_module()
class InputGateUBN(UBN):
    """UBN with two more choices that section 3.3.1 and Eq. 3 leave open; by default the norm that UBN is.

    Args:
        num_features, eps, momentum, threshold, similarity_samples: As in UBN.
        interval: The gate is decided anew after so many batches, by the running similarity, and stays until then.
        learns_while_closed: Whether the running statistics move while they normalise, with the momentum of ever.
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
        self.interval = interval
        self.learns_while_closed = learns_while_closed
        self.register_buffer('num_batches', torch.tensor(0))
        self.register_buffer('condensed', torch.tensor(True))

    def _gate(self, x: Tensor, moments: Moments) -> Tensor:
        if not self._moves():
            return self.condensed
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
        return self.condensed

    def _features(self, x: Tensor, moments: Moments) -> Tensor:
        """The features that are compared, a row for each sample."""
        return x

    def _decision(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """The new running similarity, and whether the features are condensed."""
        tau = functional.update_running_similarity(self.running_similarity, similarity, self.similarity_momentum)
        return tau, functional.is_condensed(tau, self.threshold)


@MODELS.register_module()
class CenteredGateUBN(InputGateUBN):
    """Compares what the batch's mean of each channel leaves of the input."""

    def _features(self, x: Tensor, moments: Moments) -> Tensor:
        return x - moments.a.mean(0)[:, None, None].to(x.dtype)


@MODELS.register_module()
class PooledGateUBN(InputGateUBN):
    """Compares the means of each channel, C numbers a sample."""

    def _features(self, x: Tensor, moments: Moments) -> Tensor:
        return moments.a


@MODELS.register_module()
class OutputGateUBN(InputGateUBN):
    """Compares the layer's outputs, those of the batch before, since the output is not known before the gate."""

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

    That is ``s > tau``, tau before this batch. Until the running statistics are an average of 1 / momentum batches they
    are worth nothing, and the gate is open.
    """

    def _decision(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        tau, _ = super()._decision(similarity)
        return tau, (similarity > self.running_similarity) | (self.num_batches_tracked * self.momentum < 1)


class RandomKernel:
    """The affine step starts as torch starts a convolution, as in the released code, and not as the identity.

    ``init_weights`` is called by MMEngine after the backbone's own initialiser, which sets ``weight`` to 1.
    """

    def init_weights(self) -> None:
        bound = 1 / self.kernel_size
        for parameter in (self.weight, self.neighbor_weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)


@MODELS.register_module()
class RandomKernelUBN(RandomKernel, UBN):
    """UBN with a :class:`RandomKernel`."""


@MODELS.register_module()
class RandomKernelBNET(RandomKernel, BNET):
    """BNET with a :class:`RandomKernel`."""
