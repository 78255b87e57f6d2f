"""Lets the counters of parameters and FLOPs of MMEngine and mmcv count the norm types of this package.

Per value of its input a layer costs, in evaluation,

- for the moments of each image and channel: 1 for the mean (UBN, SyncUBN, RBN, IEBN; not without centering and
  scaling), 2 for mean and mean square (UnitizedBN), 0 for none (BNET),
- 1 for the normalisation, a multiplication and an addition,
- k * k for the depthwise convolution.

That is what the counters count for a global average pooling of each moment, a BatchNorm without affine step and a
depthwise convolution (mmcv adds 1 for a convolution's bias). For k = 1, the last two are a BatchNorm: 2. So a UBN is 11
by default and, with every rectification off, counts as BatchNorm does; RBN and IEBN are 3, UnitizedBN 4, BNET
1 + k * k. MMEngine's counter follows the mode of the model: in training, moments, statistics and normalisation are 4
for every type, and the similarity is not counted. What is done per channel, not per value, nobody counts.

The two replacements here are part of the table in :mod:`mmubn.openmmlab.patches`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mmubn.layers import UnifiedNorm

__all__ = ['count_in_mmcv', 'count_in_mmengine']


def count_in_mmengine(original: Callable) -> Callable:
    """Make ``_get_scoped_trace_graph``, whose operations MMEngine's counter counts, trace stand-ins for our layers."""

    @functools.wraps(original)
    def trace_stand_ins(module: nn.Module, *args, **kwargs):
        layers = [layer for layer in module.modules() if isinstance(layer, UnifiedNorm)]
        for layer in layers:
            layer.forward = functools.partial(_stand_in_and_act, layer)
        try:
            return original(module, *args, **kwargs)
        finally:
            for layer in layers:
                del layer.forward

    return trace_stand_ins


def count_in_mmcv(original: Callable) -> Callable:
    """Make ``get_modules_mapping``, mmcv's table of the very types that it counts, name our layers."""

    def count(layer: UnifiedNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        affine = 1 if layer.kernel_size == 1 else layer.kernel_size**2 + 1
        layer.__flops__ += output.numel() * (_moments(layer) + 1 + affine)

    @functools.wraps(original)
    def with_our_norms() -> dict:
        return original() | dict.fromkeys(_subclasses(UnifiedNorm), count)

    return with_our_norms


def _moments(layer: UnifiedNorm) -> int:
    """How many moments of each image and channel the layer needs in evaluation."""
    if layer.scaling == 'unitized':
        return 2
    return int(layer.has_pooled_terms)


def _stand_in(layer: UnifiedNorm, x: Tensor) -> Tensor:
    """As many operations as ``layer`` does, of the kinds that the counter knows. Moves no buffers."""
    mean, var = (None, None) if layer.training else (layer.running_mean, layer.running_var)
    if not layer.training:
        maps = x.detach() if x.dim() == 4 else x.detach()[..., None, None]
        # In the place of the running statistics, since a trace drops what nothing uses.
        if _moments(layer) > 0:
            mean = F.adaptive_avg_pool2d(maps, 1)[0].flatten()
        if _moments(layer) > 1:
            var = F.adaptive_avg_pool2d(maps, 1)[0].flatten().clamp(min=0)
    if layer.kernel_size == 1:
        return F.batch_norm(x, mean, var, layer.weight, layer.bias, layer.training)
    kernel = layer.weight[:, None, None, None].expand(-1, 1, layer.kernel_size, layer.kernel_size)
    x = F.batch_norm(x, mean, var, training=layer.training)
    return F.conv2d(x, kernel, layer.bias, padding=layer.kernel_size // 2, groups=layer.num_features)


def _stand_in_and_act(layer: UnifiedNorm, x: Tensor) -> Tensor:
    return layer.drop_and_act(_stand_in(layer, x))


def _subclasses(norm: type) -> list[type]:
    return [each for child in norm.__subclasses__() for each in (child, *_subclasses(child))]
