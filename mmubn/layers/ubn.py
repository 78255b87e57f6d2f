"""Unified Batch Normalization as a layer: the gate on top of the core."""

from __future__ import annotations

import torch
from torch import Tensor

from mmubn import functional
from mmubn.layers.arguments import is_int, is_number, require
from mmubn.layers.unified_norm import UnifiedNorm
from mmubn.ops import Gate

__all__ = ['UBN']


class UBN(UnifiedNorm):
    r"""Unified Batch Normalization over a 4-D input.

    .. math::
        y = \mathrm{conv}_k\left( r_{nc} \, \frac{x + w_m a - \mu}{\sqrt{\sigma^2 + \epsilon}} \right) + \beta,
        \qquad r_{nc} = \mathrm{sigmoid}(w_v K_s + w_b)

    where a is the mean of x over H and W, K_s the mean over H and W of the normalised input, conv_k a depthwise
    k x k convolution with zero padding, and w_m, w_v, w_b, beta one value per channel.

    **Which statistics.** In training, the running mean cosine similarity tau of the batch's samples moves first
    (``tau <- (1 - m_s) tau + m_s s``). While ``tau > threshold`` the features are condensed: the batch's mean
    and variance normalise and move ``running_mean`` and ``running_var``, as in BatchNorm. Otherwise the running
    statistics normalise, without gradient, and stay as they are. Evaluation uses the running statistics and moves
    nothing. ``num_batches_tracked`` counts the batches that moved the running statistics.

    **As a BatchNorm.** With every rectification off (``threshold=None, centering=False, scaling=False,
    kernel_size=1``) this is ``nn.BatchNorm2d``. A fresh UBN is a BatchNorm scaled by sigmoid(1), and a BatchNorm
    state dict loads to BatchNorm's function, up to rounding. A ``momentum`` of None or 1, as set by tools that
    re-estimate statistics (``torch.optim.swa_utils.update_bn``, MMPretrain's PreciseBNHook), always takes the batch's
    statistics and leaves tau alone. ``reset_running_stats()`` sets tau to 1: the gate opens.

    Args:
        num_features: C, the number of channels.
        eps: Added to the variance.
        momentum: Momentum m of the running mean and variance, in [0, 1]; None for their plain average over all batches.
        affine, track_running_stats, device, dtype: As in ``nn.BatchNorm2d``; affine is True.
        threshold: Feature condensation threshold T, in [-1, 1]. None turns the gate off: always the batch's statistics.
        similarity_momentum: Momentum m_s of the running similarity, in [0, 1].
        similarity_samples: The similarity is taken over the first samples of the batch, at most this many; at least 2.
        centering: Whether to rectify centering (w_m).
        scaling: Whether to rectify scaling (w_v, w_b).
        kernel_size: k of the affine step, odd. 1 is BatchNorm's affine step.
        calibrate_bias: Multiply r onto beta too, as the authors' implementation does; the paper leaves it outside.

    Attributes:
        weight: Centre tap of the depthwise kernel, (C,): BatchNorm's gamma. Starts at 1.
        bias: beta, (C,). Starts at 0.
        neighbor_weight: The other taps of each channel in turn, row by row without the centre, (C * (k*k - 1),), None
            for k = 1. Starts at 0.
        center_weight: w_m, (C,), None without centering. Starts at 0.
        scale_weight, scale_bias: w_v and w_b, each (C,), None without scaling. Start at 0 and 1.
        running_mean, running_var, num_batches_tracked: As in BatchNorm.
        running_similarity: tau, 0-d. Starts at 1.

    Shape:
        Input (N, C, H, W) of any floating dtype; output the same shape and dtype. Statistics are float32 or better.
        An input without elements gives an output without elements and leaves the state alone.

    Raises:
        ValueError: For an argument outside its range; for an input that is not 4-D, has another number of channels or
            is not floating point; for a training input with one value per channel, which has no variance.

    Source: arXiv 2311.15993, Eqs. 3-5. Centering and scaling: Representative Batch Normalization, CVPR 2021.
    Affine: BNET, arXiv 2011.14150.

    Example:
        >>> norm = UBN(64)
        >>> norm(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 64, 32, 32])
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
    ) -> None:
        name = type(self).__name__
        require(
            threshold is None or is_number(threshold, -1, 1),
            name,
            'threshold',
            threshold,
            'a number in [-1, 1], or None',
        )
        require(
            is_number(similarity_momentum, 0, 1), name, 'similarity_momentum', similarity_momentum, 'a number in [0, 1]'
        )
        require(
            is_int(similarity_samples) and similarity_samples >= 2,
            name,
            'similarity_samples',
            similarity_samples,
            'an integer of at least 2, since a similarity takes two samples',
        )
        for argument, value in (('centering', centering), ('scaling', scaling), ('calibrate_bias', calibrate_bias)):
            require(isinstance(value, bool), name, argument, value, 'True or False')
        require(scaling or not calibrate_bias, name, 'calibrate_bias', calibrate_bias, 'False where scaling is False')
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            centering=centering,
            scaling='rectified' if scaling else None,
            kernel_size=kernel_size,
            calibrate_bias=calibrate_bias,
            gated=True,
        )
        self.threshold = threshold
        self.similarity_momentum = similarity_momentum
        self.similarity_samples = similarity_samples

    def _gate_acts(self) -> bool:
        """Whether the similarity decides: not without a threshold, and not while a tool re-estimates the statistics."""
        return self.threshold is not None and self.momentum is not None and self.momentum < 1

    def _own_gate(self, x: Tensor) -> Gate | Tensor:
        if self.threshold is None or not self._gate_acts() or not self._has_running_statistics():
            return super()._own_gate(x)
        tau = self._own('running_similarity')
        if tau is None or tau.dim() != 0:
            received = None if tau is None else tuple(tau.shape)
            raise ValueError(f'{type(self).__name__}: running_similarity must have shape (), got {received}.')
        if not self._moves():
            return functional.is_condensed(tau, self.threshold)
        return Gate(tau, self.similarity_momentum, self.threshold, self.similarity_samples)
