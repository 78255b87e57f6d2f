"""Unified Batch Normalization as a layer: the state, and the order of the steps."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import functional as F
from mmubn.checkpoints import convert_state
from mmubn.guards import UnfoldableEps
from mmubn.layers.recomputation import Call, RecentCalls

__all__ = ['UBN']


class UBN(_BatchNorm):
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
    state dict loads to exactly BatchNorm's function. A ``momentum`` of None or 1, as set by tools that re-estimate
    statistics (``torch.optim.swa_utils.update_bn``, MMPretrain's PreciseBNHook), always takes the batch's statistics
    and leaves tau alone.

    Args:
        num_features: C, the number of channels.
        eps: Added to the variance.
        momentum: Momentum m of the running mean and variance, in [0, 1].
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
        neighbor_weight: The other taps, row by row without the centre, (C, k*k - 1), None for k = 1. Starts at 0.
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
        momentum: float = 0.1,
        threshold: float | None = 0.15,
        similarity_momentum: float = 0.1,
        similarity_samples: int = 16,
        centering: bool = True,
        scaling: bool = True,
        kernel_size: int = 3,
        calibrate_bias: bool = False,
    ) -> None:
        _require(_is_int(num_features) and num_features > 0, 'num_features', num_features, 'a positive integer')
        _require(_is_number(eps, 0) and eps > 0, 'eps', eps, 'a positive number')
        _require(_is_number(momentum, 0, 1), 'momentum', momentum, 'a number in [0, 1]')
        _require(
            threshold is None or _is_number(threshold, -1, 1), 'threshold', threshold, 'a number in [-1, 1], or None'
        )
        _require(
            _is_number(similarity_momentum, 0, 1), 'similarity_momentum', similarity_momentum, 'a number in [0, 1]'
        )
        _require(
            _is_int(similarity_samples) and similarity_samples >= 2,
            'similarity_samples',
            similarity_samples,
            'an integer of at least 2, since a similarity takes two samples',
        )
        _require(
            _is_int(kernel_size) and kernel_size > 0 and kernel_size % 2 == 1,
            'kernel_size',
            kernel_size,
            'a positive odd integer',
        )
        for name, value in (('centering', centering), ('scaling', scaling), ('calibrate_bias', calibrate_bias)):
            _require(isinstance(value, bool), name, value, 'True or False')
        _require(scaling or not calibrate_bias, 'calibrate_bias', calibrate_bias, 'False where scaling is False')

        super().__init__(num_features, eps=eps, momentum=momentum)
        self.threshold = threshold
        self.similarity_momentum = similarity_momentum
        self.similarity_samples = similarity_samples
        self.centering = centering
        self.scaling = scaling
        self.kernel_size = kernel_size
        self.calibrate_bias = calibrate_bias

        def vector(present: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(num_features, *shape)) if present else None

        self.neighbor_weight = vector(kernel_size > 1, kernel_size**2 - 1)
        self.center_weight = vector(centering)
        self.scale_weight = vector(scaling)
        self.scale_bias = vector(scaling)
        self.register_buffer('running_similarity', torch.ones((), dtype=torch.float32))
        self._calls = RecentCalls()
        self._reset_rectifications()

    @property
    def eps(self) -> float:
        """Added to the variance. Others may read and set it; adding it to a tensor folds the layer away: an error."""
        return UnfoldableEps(self._eps)

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = float(value)

    def reset_parameters(self) -> None:
        """Set every parameter and buffer to its initial value."""
        super().reset_parameters()
        # The base class calls this from its constructor, before the rectifications exist.
        if 'running_similarity' in self._buffers:
            self._reset_rectifications()

    def _reset_rectifications(self) -> None:
        with torch.no_grad():
            self.running_similarity.fill_(1)
            for name, value in self.initial_rectifications().items():
                getattr(self, name).copy_(value)

    def initial_rectifications(self) -> dict[str, Tensor]:
        """Initial values of the parameters that BatchNorm lacks: with these, UBN is sigmoid(1) times BatchNorm."""
        initial = {'neighbor_weight': 0.0, 'center_weight': 0.0, 'scale_weight': 0.0, 'scale_bias': 1.0}
        return {
            name: torch.full_like(parameter, initial[name], requires_grad=False)
            for name, parameter in self.named_parameters(recurse=False)
            if name in initial
        }

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        if x.numel() == 0:
            return self._forward_empty(x)
        # Autocast would run the convolution in half precision; the mixed precision here is float32 inside.
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._forward(x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.training:
            a, v = F.instance_moments(x)
            statistics = self._training_statistics(x, a, v)
        else:
            # The mean alone: var_mean is by far slower on the CPU.
            a = x.to(F.statistics_dtype(x)).mean((2, 3))
            statistics = self._running_statistics(a.dtype)
        center, scale, r = F.coefficients(
            a, statistics, self._eps, self.center_weight, self.scale_weight, self.scale_bias
        )
        bias = r * self.bias if self.calibrate_bias else self.bias
        y = F.affine(F.normalize(x, center, scale), self.weight.to(a.dtype), bias, self.neighbor_weight)
        return y.to(x.dtype)

    def _forward_empty(self, x: Tensor) -> Tensor:
        """Nothing to normalise, but DistributedDataParallel expects every parameter in the graph."""
        return x + self._zero(x).to(x.dtype)

    def _zero(self, x: Tensor) -> Tensor:
        """A zero that depends on the input and on every parameter."""
        return 0 * sum((parameter.sum() for parameter in self.parameters()), start=x.sum())

    def _running_statistics(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copies: an update of the buffers by a later call must not change what this call's backward reads."""
        return self.running_mean.to(dtype, copy=True), self.running_var.to(dtype, copy=True)

    def _training_statistics(self, x: Tensor, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics that normalise a training batch. Moves the buffers, in place, without a host decision."""
        call = self._calls.recomputed(a)
        sums = F.similarity_sums(x, self.similarity_samples) if call is None and self._gate_acts() else None
        batch, count, sums, exchanged = self._reduce(x, a, v, sums, call)
        if call is None:
            running = self._running_statistics(a.dtype)
            with torch.no_grad():
                condensed = self._gate(sums)
                self._update(running, batch, count, condensed)
            call = Call(a.detach(), condensed, torch.stack(running), exchanged)
            self._calls.record(call)
        return tuple(torch.where(call.condensed, new, old) for new, old in zip(batch, call.running, strict=True))

    def _reduce(
        self, x: Tensor, a: Tensor, v: Tensor, sums: tuple[Tensor, Tensor] | None, call: Call | None
    ) -> tuple[tuple[Tensor, Tensor], int | Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
        """What the batch says: its statistics, its values per channel, its similarity sums, and what was exchanged."""
        count = x.numel() // self.num_features
        if count == 1:
            raise ValueError(
                f'UBN needs more than 1 value per channel in training, got input of shape {tuple(x.shape)}; '
                'use a larger batch or call eval() on the layer.'
            )
        return F.batch_statistics(a, v, self.center_weight), count, sums, None

    def _gate_acts(self) -> bool:
        """Not without a threshold, and not while a tool re-estimates the running statistics, batch after batch."""
        return self.threshold is not None and self.momentum is not None and self.momentum < 1

    def _gate(self, sums: tuple[Tensor, Tensor] | None) -> Tensor:
        if sums is None:
            return F.is_condensed(self.running_similarity, None)
        total, pairs = sums
        tau = F.update_running_similarity(self.running_similarity, total / pairs, self.similarity_momentum)
        # By a view of shape (1,): torch.compile (2.12) loses an in-place update of a 0-d float64 buffer.
        self.running_similarity.view(1).copy_(tau)
        return F.is_condensed(tau, self.threshold)

    def _update(
        self, running: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor], count: int | Tensor, condensed: Tensor
    ) -> None:
        self.num_batches_tracked.add_(condensed)
        # As in BatchNorm, momentum None is the plain average over all batches tracked.
        momentum = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.to(batch[0].dtype)
        updated = F.update_running_statistics(running, batch, momentum, count)
        for buffer, old, new in zip((self.running_mean, self.running_var), running, updated, strict=True):
            buffer.copy_(torch.where(condensed, new, old))

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f'UBN expected input of shape (N, {self.num_features}, H, W), got {tuple(x.shape)}; '
                'num_features must be the number of channels of the layer before.'
            )
        if not x.is_floating_point():
            raise ValueError(f'UBN expected a floating point input, got {x.dtype}; convert it with .float().')

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        convert_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f'{self.num_features}, eps={self.eps}, momentum={self.momentum}, threshold={self.threshold}, '
            f'similarity_momentum={self.similarity_momentum}, similarity_samples={self.similarity_samples}, '
            f'centering={self.centering}, scaling={self.scaling}, kernel_size={self.kernel_size}, '
            f'calibrate_bias={self.calibrate_bias}'
        )


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object, low: float, high: float = math.inf) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high


def _require(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise ValueError(f'UBN: {name} must be {expected}, got {value!r}.')
