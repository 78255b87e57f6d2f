"""The values that layers, backends and the backward hand to each other, each with a name.

Shapes: N samples, C channels, H x W pixels, T = k*k taps of a depthwise kernel. "Statistics dtype" is that of
:func:`mmubn.functional.statistics_dtype`: float32, or float64 for a float64 input. Symbols are those of
:mod:`mmubn.functional`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    'KERNEL_SCALINGS',
    'BatchStatistics',
    'Buffers',
    'Coefficients',
    'Constants',
    'Decision',
    'Form',
    'Gate',
    'Gradients',
    'InputCoefficients',
    'Moments',
    'Parameters',
    'Running',
    'Similarity',
    'Statistics',
    'TapSums',
    'Taps',
]


# The kinds of the factor r that the C++ and Triton kernels know; for any other they take Backend's own algebra. The
# Triton kernels know each by its place here.
KERNEL_SCALINGS = (None, 'rectified', 'instance')


class Form(NamedTuple):
    """What a norm type computes; constant for a layer."""

    eps: float  # added to the variance
    scaling: str | None  # what the factor r depends on, see mmubn.functional.coefficients
    calibrate_bias: bool  # whether r multiplies the bias too
    kernel_size: int  # k


class Parameters(NamedTuple):
    """The learned tensors of a layer; None where the layer has no such parameter."""

    weight: Tensor  # centre tap, (C,)
    bias: Tensor  # beta, (C,)
    neighbor_weight: Tensor | None  # the other taps, row by row: (C * (T - 1),) in a layer, (C, T - 1) in a backend
    center_weight: Tensor | None  # w_m, (C,)
    scale_weight: Tensor | None  # w_v, (C,)
    scale_bias: Tensor | None  # w_b, (C,)

    def by_channel(self) -> Parameters:
        """With a row of neighbor taps for each channel."""
        weight, bias, neighbor_weight, *rectifications = self
        if neighbor_weight is None:
            return self
        # Not _replace, which torch.compile (2.7) cannot trace.
        return Parameters(weight, bias, neighbor_weight.view(len(weight), -1), *rectifications)

    def detach(self) -> Parameters:
        """The same values without gradients of any kind."""
        tensors: list[Any] = [None if tensor is None else tensor.detach() for tensor in self]
        return Parameters(*tensors)


class Gradients(NamedTuple):
    """The gradients of :class:`Parameters`, in the same order; None where there is none."""

    weight: Tensor | None
    bias: Tensor | None
    neighbor_weight: Tensor | None
    center_weight: Tensor | None
    scale_weight: Tensor | None
    scale_bias: Tensor | None


class Moments(NamedTuple):
    """Instance moments of a batch, in the statistics dtype."""

    a: Tensor  # means over H and W, (N, C)
    v: Tensor  # biased variances over H and W, (N, C)


class Similarity(NamedTuple):
    """What :func:`mmubn.functional.similarity_sums` returns: the mean cosine similarity is ``total / pairs``."""

    total: Tensor  # 0-d; NaN where a norm is not finite
    pairs: int | Tensor  # a 0-d tensor where it is known on the device alone


class Gate(NamedTuple):
    """A decision by the similarity of the batch: ``tau <- (1 - m_s) tau + m_s s``, ``condensed = tau > T``."""

    running_similarity: Tensor  # tau, 0-d
    momentum: float | Tensor  # m_s; 0-d where it is known on the device alone
    threshold: float  # T
    max_samples: int  # the similarity is that of the first samples of the batch, at most this many


class Running(NamedTuple):
    """The running statistics of a layer, and how far a batch moves them."""

    mean: Tensor  # running_mean, (C,)
    var: Tensor  # running_var, (C,)
    momentum: float | Tensor  # m; 0-d where it depends on the batches counted so far


class Buffers(NamedTuple):
    """What a batch moves, in place; None where the layer has no such buffer, or it stays."""

    mean: Tensor  # running_mean, (C,)
    var: Tensor  # running_var, (C,)
    similarity: Tensor | None  # tau, 0-d
    num_batches: Tensor | None  # num_batches_tracked, 0-d


class BatchStatistics(NamedTuple):
    """Statistics of the centred input of a batch, in the statistics dtype."""

    mean: Tensor  # mu_B, (C,)
    var: Tensor  # var_B, (C,)
    num_values: int | Tensor  # values per channel; 0-d where it is known on the device alone


class Coefficients(NamedTuple):
    """The rectified normalisation ``(x - center) * scale``, in the statistics dtype."""

    center: Tensor  # (N or 1, C)
    scale: Tensor  # (N or 1, C)
    factor: Tensor | None  # r, (N, C); None without scaling, and where the backend finds r in ``scale``


class Constants(NamedTuple):
    """What evaluation holds constant: ``y = depthwise_conv(r (x + s); kernel) + bias`` with zero padding.

    ``s = shift + center_weight a``, ``r = sigmoid(scale_weight (a + s) + scale_bias)``; what is None counts as 0, and r
    as 1 without a scale_weight. In any floating dtype.
    """

    shift: Tensor  # (C,)
    center_weight: Tensor | None  # (C,)
    scale_weight: Tensor | None  # (C,)
    scale_bias: Tensor | None  # (C,), None where scale_weight is
    kernel: Tensor  # (C, 1, k, k)
    bias: Tensor  # (C,)
    calibrate_bias: bool  # whether r multiplies the bias too


class Decision(NamedTuple):
    """What the gate and the statistics of a training batch come to. Nothing here has a gradient."""

    mean: Tensor  # mu, which normalises, (C,)
    var: Tensor  # (C,)
    condensed: Tensor  # whether mu and var are those of the batch; 0-d bool
    num_values: int | Tensor  # values per channel of the batch
    running_mean: Tensor  # the new one, (C,)
    running_var: Tensor  # the new one, (C,)
    running_similarity: Tensor | None  # the new tau, 0-d; None where no similarity decided
    coefficients: Coefficients | None = None  # of this batch, from a backend that computes them in the same step


class Statistics(NamedTuple):
    """What normalises a batch. Nothing here has a gradient; ``condensed`` says what depends on x."""

    a: Tensor | None  # instance means, (N, C); None where nothing depends on them
    v: Tensor | None  # instance variances, (N, C); None where nothing depends on them
    mean: Tensor  # mu, (C,)
    var: Tensor  # (C,)
    condensed: Tensor | None = None  # in training, whether mean and var are those of the batch; 0-d bool
    num_values: int | Tensor = 0  # values per channel of that batch
    processes: ProcessGroup | None = None  # whose batch that is; None where it is this process's own
    coefficients: Coefficients | None = None  # where they came with the statistics


class Taps(NamedTuple):
    """The depthwise kernel of the affine step."""

    weight: Tensor  # centre tap, (C,)
    neighbor_weight: Tensor | None  # the other taps, (C, T - 1); None for k = 1
    kernel: Tensor | None  # all of them, (C, 1, k, k), for a backend that reads them so


class TapSums(NamedTuple):
    """The sums over the map that all gradients follow from, in the statistics dtype.

    Over the pixels p of the map for which p + t, p shifted by tap t, lies in the map too:
    ``products[n, c, t] = sum_p (x(p + t) - center) dy(p)`` and ``sums[n, c, t] = sum_p dy(p)``.
    """

    products: Tensor  # (N, C, T)
    sums: Tensor  # (N, C, T)
    kept: tuple[Tensor, Tensor] | None = None  # what the backend's input_gradient reads again


class InputCoefficients(NamedTuple):
    """What the gradient of x needs besides the scale and the taps; None stands for 0.

    ``dx = scale depthwise_conv(dy; kernel turned by half a turn) + slope (x - a) + offset``.
    """

    slope: Tensor | None  # (N or 1, C)
    offset: Tensor | None  # (N, C)
