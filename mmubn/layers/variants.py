"""The norm types that UBN is compared with and built from, each a choice of what the core does."""

from __future__ import annotations

from typing import ClassVar

import torch

from mmubn.layers.unified_norm import UnifiedNorm

__all__ = ['BNET', 'IEBN', 'RBN', 'UnitizedBN']


class RBN(UnifiedNorm):
    r"""Representative Batch Normalization: BatchNorm with centering and scaling calibrated per image.

    .. math::
        y = \gamma \, \mathrm{sigmoid}(w_v K_s + w_b) \, \frac{x + w_m a - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    a is the mean of x over H and W, K_s that of the normalised input, mu and sigma are the statistics of x + w_m a.
    A UBN without gate and with ``kernel_size=1``.

    Args:
        num_features: C, the number of channels.
        eps: Added to the variance.
        momentum: Momentum of the running mean and variance, in [0, 1]; None for their plain average over all batches.
        affine, track_running_stats, device, dtype: As in ``nn.BatchNorm2d``; affine is True.

    Shape:
        Input (N, C, H, W) of any floating dtype; output the same.

    Raises:
        ValueError: As :class:`~mmubn.layers.UBN`.

    Source: Representative Batch Normalization with Feature Calibration, CVPR 2021.
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
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, centering=True, scaling='rectified'
        )


class BNET(UnifiedNorm):
    r"""BatchNorm whose affine step is a depthwise convolution.

    .. math::
        y = \mathrm{conv}_k\left( \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \right) + \beta

    Args:
        num_features: C, the number of channels.
        eps: Added to the variance.
        momentum: Momentum of the running mean and variance, in [0, 1]; None for their plain average over all batches.
        affine, track_running_stats, device, dtype: As in ``nn.BatchNorm2d``; affine is True.
        kernel_size: k, odd.

    Shape:
        Input (N, C, H, W) of any floating dtype; output the same.

    Raises:
        ValueError: As :class:`~mmubn.layers.UBN`.

    Source: BNET, arXiv 2011.14150.
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
        kernel_size: int = 3,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, kernel_size=kernel_size
        )


class IEBN(UnifiedNorm):
    r"""Instance Enhancement Batch Normalization: BatchNorm times a factor of the image's own channel mean.

    .. math::
        y = \gamma \, \mathrm{sigmoid}(w_v a + w_b) \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    a is the mean of the raw x over H and W; w_v starts at 0 and w_b at -1.

    Args:
        num_features: C, the number of channels.
        eps: Added to the variance.
        momentum: Momentum of the running mean and variance, in [0, 1]; None for their plain average over all batches.
        affine, track_running_stats, device, dtype: As in ``nn.BatchNorm2d``; affine is True.

    Shape:
        Input (N, C, H, W) of any floating dtype; output the same.

    Raises:
        ValueError: As :class:`~mmubn.layers.UBN`.

    Source: arXiv 1908.04008.
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
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, scaling='instance')


class UnitizedBN(UnifiedNorm):
    r"""BatchNorm whose output moves, channel by channel, towards that of samples of unit length.

    .. math::
        y = \gamma \left( \frac{\alpha}{\sqrt{q_n + \epsilon}} + 1 - \alpha \right) x_s + \beta,
        \qquad q_n = \frac{1}{(HW)^2} \sum_{c,h,w} x_s^2

    x_s is x normalised by the batch's statistics; alpha is ``scale_weight``, (C,), and starts at 0: BatchNorm.

    Args:
        num_features: C, the number of channels.
        eps: Added to the variance, and to q.
        momentum: Momentum of the running mean and variance, in [0, 1]; None for their plain average over all batches.
        affine, track_running_stats, device, dtype: As in ``nn.BatchNorm2d``; affine is True.

    Shape:
        Input (N, C, H, W) or (N, C) of any floating dtype; output the same.

    Raises:
        ValueError: As :class:`~mmubn.layers.UBN`.

    Source: arXiv 2001.02814.
    """

    input_dims: ClassVar[dict[int, str]] = {2: '(N, {})', 4: '(N, {}, H, W)'}

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, scaling='unitized')
