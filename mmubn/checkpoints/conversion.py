"""Norm layers in one general form: read from any layout, written in another where that is exact.

``y = conv_k(r (x + w_m a - mu) / sqrt(var + eps)) + beta``, or ``+ r beta`` where the bias is calibrated; symbols as in
:mod:`mmubn.functional`. What is not exact is an error, so that no layer is ever half loaded.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmubn.checkpoints.layouts import (
    BATCH_COUNT,
    FACTORS,
    INITIAL_SCALE_BIAS,
    LAYOUTS,
    SCALARS,
    STATISTICS,
    VECTORS,
    CheckpointError,
    Layout,
    find_layout,
)
from mmubn.checkpoints.names import with_own_names
from mmubn.functional import depthwise_kernel

__all__ = ['Norm', 'Target', 'convert_state_dict', 'read_norm', 'write_norm']


class Factor(NamedTuple):
    """The factor r: what it depends on, None for r = 1, with w_v and, where it has one, w_b, each (C,)."""

    scaling: str | None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Norm(NamedTuple):
    """A norm layer in the general form ``y = conv(r (x + w_m a - mu) / std) + beta``, or ``+ r beta`` if calibrated."""

    layout: Layout  # of the entries it was read from
    kernel: Tensor  # (C, k, k)
    bias: Tensor  # beta, (C,)
    center_weight: Tensor | None  # w_m, (C,); None for 0
    factor: Factor
    calibrated: bool  # whether r multiplies the bias too
    buffers: dict[str, Tensor]  # of STATISTICS and SCALARS


class Target(NamedTuple):
    """What a norm is written as."""

    title: str  # for errors
    keys: Set[str]  # by our names
    scaling: str | None
    kernel_size: int
    calibrates_bias: bool


@torch.no_grad()
def convert_state_dict(state_dict: Mapping, to: str, calibrate_bias: bool = False) -> tuple[OrderedDict, Counter[str]]:
    """A state dict in which every norm layer with running statistics has the layout ``to``; the rest as it is.

    A layer that has the name of BNET's networks, ``bnet3``, is ``bn3`` in the result, unless that is of their layout.

    Args:
        state_dict: Not modified; tensors that do not change are shared with it.
        to: A key of ``LAYOUTS``.
        calibrate_bias: The argument of the UBN layers that were saved, or that will load the result.

    Returns:
        The new state dict, and how many layers had which layout.

    Raises:
        CheckpointError: A layer is of no layout, or has no exact equal in the layout ``to``. Names the layer and why.
    """
    layout = LAYOUTS[to]
    names = {layout.names.get(key, key): key for key in (*layout.keys, *itertools.chain(*layout.options))}
    calibrates = calibrate_bias if layout.calibrates_bias is None else layout.calibrates_bias
    state_dict = state_dict if to == 'bnet-released' else with_own_names(state_dict)
    layers: dict[str, dict[str, Tensor]] = {}
    owner: dict[str, str] = {}  # key -> prefix of its layer
    counts: Counter[str] = Counter()
    for prefix in dict.fromkeys(_norm_prefixes(state_dict)):
        tensors = entries_under(state_dict, prefix)
        source = find_layout(tensors, prefix)
        norm = read_norm(tensors, source, prefix, tensors['running_mean'].numel(), calibrate_bias)
        # A kernel of 1 would fit no layer with the default kernel_size.
        kernel_size = max(3, norm.kernel.shape[-1]) if names.keys() & {'kernel', 'neighbor_weight'} else 1
        target = Target(f'the layout of {layout.title}', names.keys(), layout.scaling, kernel_size, calibrates)
        layers[prefix] = {}
        for name, tensor in write_norm(norm, target, prefix).items():
            key = names.get(name, name)
            vector = layout.released and key in VECTORS
            layers[prefix][prefix + key] = tensor.reshape(1, -1, 1, 1) if vector else tensor
        owner |= {prefix + key: prefix for key in tensors}
        counts[source.title] += 1

    converted: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        converted.update(layers[owner[key]] if key in owner else {key: value})
    if hasattr(state_dict, '_metadata'):
        converted._metadata = state_dict._metadata  # type: ignore[attr-defined, union-attr] # as state_dict() of a module has it
    return converted, counts


def _norm_prefixes(state_dict: Mapping) -> Iterable[str]:
    for key in state_dict:
        prefix, dot, name = key.rpartition('.')
        if name in STATISTICS:
            yield prefix + dot


def entries_under(state_dict: Mapping, prefix: str) -> dict[str, Any]:
    """The entries of the layer that ``prefix`` names, by their names in the layer."""
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}


def read_norm(tensors: Mapping, layout: Layout, prefix: str, channels: int, calibrate_bias: bool) -> Norm:
    """The general form of a layer whose keys are those of ``layout``; raises a CheckpointError for a wrong shape."""
    for key, tensor in tensors.items():
        _check_shape(prefix, key, tensor, channels, layout)
    named = {layout.names.get(key, key): tensors[key] for key in tensors}
    vectors = {name: named[name].reshape(-1) for name in VECTORS if name in named}
    neighbors = named['neighbor_weight'].reshape(channels, -1) if 'neighbor_weight' in named else None
    kernel = named['kernel'] if 'kernel' in named else depthwise_kernel(vectors['weight'], neighbors)
    scaling = layout.scaling if 'scale_weight' in named else None
    return Norm(
        layout=layout,
        kernel=kernel.squeeze(1),
        bias=vectors['bias'],
        center_weight=vectors.get('center_weight'),
        factor=Factor(scaling, vectors.get('scale_weight'), vectors.get('scale_bias')),
        calibrated=calibrate_bias if layout.calibrates_bias is None else layout.calibrates_bias,
        buffers={key: tensors[key] for key in (*STATISTICS, *SCALARS) if key in tensors},
    )


def _check_shape(prefix: str, key: str, tensor: object, channels: int, layout: Layout) -> None:
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
    if key in SCALARS:
        fits, expected = shape in ((), (1,)), 'a scalar'
    elif key == 'bnconv.weight':
        expected = f'({channels}, 1, k, k) with odd k'
        fits = (
            shape is not None and len(shape) == 4 and shape == (channels, 1, shape[3], shape[3]) and shape[3] % 2 == 1
        )
    elif key == 'neighbor_weight':
        expected = f'({channels} * (k*k - 1),) or ({channels}, k*k - 1) with odd k'
        neighbors, rest = divmod(math.prod(shape or ()), channels)
        fits = shape in ((channels * neighbors,), (channels, neighbors)) and rest == 0 and _is_odd_square(neighbors + 1)
    elif key in VECTORS and layout.released:
        fits, expected = shape in ((channels,), (1, channels, 1, 1)), f'({channels},) or (1, {channels}, 1, 1)'
    else:
        fits, expected = shape == (channels,), f'({channels},)'
    if not fits:
        received = shape if shape is not None else type(tensor).__name__
        raise CheckpointError(f'{prefix}{key} of {layout.title}: expected shape {expected}, got {received}.')


def _is_odd_square(n: int) -> bool:
    return n > 1 and n % 2 == 1 and math.isqrt(n) ** 2 == n


def write_norm(norm: Norm, target: Target, prefix: str, approximate_bias: bool = False) -> dict[str, Tensor]:
    """The entries ``target.keys`` of a layer that computes ``norm``; vectors are (C,).

    Args:
        norm: The function.
        target: What is written; num_batches_tracked is written where ``norm`` has it.
        prefix: Name of the layer, for errors.
        approximate_bias: Where the bias has no exact equal, take the factor of an average sample, sigmoid(w_b).

    Raises:
        CheckpointError: There are no such entries of exactly this function.
    """
    center_weight = torch.zeros_like(norm.bias) if norm.center_weight is None else norm.center_weight
    if 'center_weight' not in target.keys:
        _require_zero(center_weight, 'center_weight', norm, prefix, f'{target.title} has no centering')
    factor, kernel, bias = _scale(norm, target, prefix, approximate_bias)
    kernel = _resize(kernel, norm, target, prefix)

    if 'kernel' in target.keys:
        entries = {'kernel': kernel[:, None], 'bias': bias}
    else:
        middle = target.kernel_size**2 // 2
        before, weight, after = kernel.flatten(1).tensor_split((middle, middle + 1), dim=1)
        # A copy: a view would have torch.save write the whole kernel with it.
        entries = {'weight': weight.flatten().contiguous(), 'bias': bias}
        if 'neighbor_weight' in target.keys:
            entries['neighbor_weight'] = torch.cat([before, after], dim=1).flatten()
    if 'center_weight' in target.keys:
        entries['center_weight'] = center_weight
    if factor.weight is not None:
        entries['scale_weight'] = factor.weight
    if factor.bias is not None:
        entries['scale_bias'] = factor.bias
    entries |= {key: norm.buffers[key] for key in (*STATISTICS, BATCH_COUNT) if key in norm.buffers}
    if 'running_similarity' in target.keys:
        open_gate = norm.bias.new_ones((), dtype=torch.float32)
        entries['running_similarity'] = norm.buffers.get('running_similarity', open_gate)
    return entries


def _scale(norm: Norm, target: Target, prefix: str, approximate_bias: bool) -> tuple[Factor, Tensor, Tensor]:
    """The factor as the target has it, and the kernel and bias that go with it."""
    factor, kernel, bias = norm.factor, norm.kernel, norm.bias
    if factor.scaling != target.scaling:
        if factor.weight is not None:
            _require_zero(factor.weight, 'scale_weight', norm, prefix, different_factors(norm, target))
        # A constant factor moves into the kernel, and that of the target out of it.
        new = _initial_factor(target.scaling, bias)
        r, new_r = _constant_factor(factor, bias), _constant_factor(new, bias)
        bias = bias * r if norm.calibrated else bias
        bias = bias / new_r if target.calibrates_bias else bias
        return new, kernel * r[:, None, None] / new_r[:, None, None], bias

    if factor.scaling is not None and norm.calibrated != target.calibrates_bias:
        if bias_depends_on_factor(norm, target) and not approximate_bias:
            does, does_not = norm.layout.title, target.title
            if target.calibrates_bias:
                does, does_not = does_not, does
            raise CheckpointError(
                f'{prefix}{_key(norm.layout, "bias")} of {norm.layout.title} has no exact equal in {target.title}: '
                f'the scaling factor multiplies the bias too in {does}, but not in {does_not}.'
            )
        r = _constant_factor(factor, bias)
        bias = bias * r if norm.calibrated else bias / r
    return factor, kernel, bias


def _resize(kernel: Tensor, norm: Norm, target: Target, prefix: str) -> Tensor:
    """The kernel in the target's size: with zeros around it, or without them, it is the same function."""
    size = target.kernel_size
    margin = (size - kernel.shape[-1]) // 2
    if margin < 0:
        outside = kernel.clone()
        outside[:, -margin:margin, -margin:margin] = 0
        name = 'kernel' if 'kernel' in norm.layout.names.values() else 'neighbor_weight'
        _require_zero(outside, name, norm, prefix, f'{target.title} has a {size} x {size} kernel')
    return F.pad(kernel, (margin,) * 4) if margin else kernel


def _require_zero(tensor: Tensor, name: str, norm: Norm, prefix: str, because: str) -> None:
    if (tensor != 0).any():
        raise CheckpointError(
            f'{prefix}{_key(norm.layout, name)} of {norm.layout.title}: expected zeros, because {because}; '
            f'got values up to {tensor.abs().max():.3g}.'
        )


def _key(layout: Layout, name: str) -> str:
    """The key of ``layout`` for our ``name``."""
    return next((key for key, other in layout.names.items() if other == name), name)


def _initial_factor(scaling: str | None, like: Tensor) -> Factor:
    """That of a fresh layer, which is a constant."""
    weight = torch.zeros_like(like) if scaling is not None else None
    bias = torch.full_like(like, INITIAL_SCALE_BIAS[scaling]) if scaling in INITIAL_SCALE_BIAS else None
    return Factor(scaling, weight, bias)


def _constant_factor(factor: Factor, like: Tensor) -> Tensor:
    """The factor r where w_v is 0, (C,)."""
    if factor.bias is None:
        return torch.ones_like(like)
    # In float32 at least: the entries of a half-precision checkpoint are rounded once, not twice.
    return torch.sigmoid(factor.bias.to(torch.promote_types(like.dtype, torch.float32)))


def different_factors(norm: Norm, target: Target) -> str:
    """What the factors of the two depend on, in words."""
    assert norm.factor.scaling is not None
    source = f'the scaling factor of {norm.layout.title} depends on {FACTORS[norm.factor.scaling]}'
    if target.scaling is None:
        return f'{source} and {target.title} has no scaling'
    return f'{source}, that of {target.title} on {FACTORS[target.scaling]}'


def bias_depends_on_factor(norm: Norm, target: Target) -> bool:
    """Whether ``r beta`` varies between samples, in a layer whose factor depends on the same."""
    if norm.factor.weight is None or norm.factor.scaling != target.scaling:
        return False
    return bool(((norm.factor.weight != 0) & (norm.bias != 0)).any())
