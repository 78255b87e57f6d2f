"""Norm layers in one general form: read from any layout, written in another where that is exact.

``y = conv_k(r (x + w_m a - mu) / sqrt(var + eps)) + beta``, or ``+ r beta`` where the bias is calibrated; symbols as in
:mod:`mmubn.functional`. What is not exact is an error, so that no layer is ever half loaded.
"""

from __future__ import annotations

import functools
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
from mmubn.checkpoints.names import find_released_names, released_name, with_own_names
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
def convert_state_dict(
    state_dict: Mapping, to: str, calibrate_bias: bool = False
) -> tuple[OrderedDict, Counter[str], int]:
    """A state dict in which the norm layers with running statistics have the layout ``to``; the rest as it is.

    Where all of them are plain BatchNorm, all are converted. Where only some are, these stay: a network that has its
    norms in some places, as BNET's have in the third of each bottleneck, keeps them there.

    In the layout ``bnet-released`` a converted layer ``bn3`` has its name in BNET's networks, ``bnet3``; in any other
    it is ``bn3``. Entries keep the dtype of the layer that they were read from.

    Args:
        state_dict: Not modified; tensors that do not change are shared with it.
        to: A key of ``LAYOUTS``.
        calibrate_bias: The argument of the UBN layers that were saved, or that will load the result.

    Returns:
        The new state dict, how many of the converted layers had which layout, and how many BatchNorms stayed.

    Raises:
        CheckpointError: A layer is of no layout, or has no exact equal in the layout ``to``. Names the layer and why.
    """
    layout = LAYOUTS[to]
    names = {layout.names.get(key, key): key for key in (*layout.keys, *itertools.chain(*layout.options))}
    calibrates = calibrate_bias if layout.calibrates_bias is None else layout.calibrates_bias
    in_file = {own: key for key, own in find_released_names(state_dict).items()}
    state_dict = with_own_names(state_dict)
    norms = {prefix: entries_under(state_dict, prefix) for prefix in _norm_prefixes(state_dict)}
    plain = {prefix for prefix, tensors in norms.items() if _is_plain(tensors)}
    kept = plain if len(plain) < len(norms) else set()
    layers: dict[str, dict[str, Tensor]] = {}
    owner: dict[str, str] = {}  # key -> prefix of its layer
    counts: Counter[str] = Counter()
    for prefix, tensors in norms.items():
        if prefix in kept:
            continue
        try:
            source = find_layout(tensors, prefix)
            norm = read_norm(tensors, source, prefix, tensors['running_mean'].numel(), calibrate_bias)
            # A kernel of 1 would fit no layer with the default kernel_size.
            kernel_size = max(3, norm.kernel.shape[-1]) if names.keys() & {'kernel', 'neighbor_weight'} else 1
            target = Target(f'the layout of {layout.title}', names.keys(), layout.scaling, kernel_size, calibrates)
            entries = _rounded(write_norm(norm, target, prefix), norm, tensors)
        except CheckpointError as error:
            theirs = next((in_file[prefix + key] for key in tensors if prefix + key in in_file), None)
            if theirs is None:
                raise
            raise CheckpointError(f'{error} The file has it under {theirs.rpartition(".")[0]}.') from error
        new_prefix = released_name(prefix) if to == 'bnet-released' else prefix
        layers[prefix] = {}
        for name, tensor in entries.items():
            key = names.get(name, name)
            vector = layout.released and key in VECTORS
            layers[prefix][new_prefix + key] = tensor.reshape(1, -1, 1, 1) if vector else tensor
        # As state_dict() has it: those of a convolution in the layer, bnconv, come last.
        layers[prefix] = dict(sorted(layers[prefix].items(), key=lambda item: item[0].count('.')))
        owner |= {prefix + key: prefix for key in tensors}
        counts[source.title] += 1

    converted: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        converted.update(layers[owner[key]] if key in owner else {key: value})
    if hasattr(state_dict, '_metadata'):
        converted._metadata = state_dict._metadata  # type: ignore[attr-defined] # as state_dict() of a module has it
    return converted, counts, len(kept)


def _norm_prefixes(state_dict: Mapping) -> Iterable[str]:
    for key in state_dict:
        prefix, dot, name = key.rpartition('.')
        if name in STATISTICS:
            yield prefix + dot


def _is_plain(tensors: Mapping) -> bool:
    """Whether these are the keys of a BatchNorm. Of a layer that has lost keys, only its conversion tells."""
    return tensors.keys() - {BATCH_COUNT} == {*LAYOUTS['bn'].keys, *STATISTICS}


def _rounded(entries: Mapping[str, Tensor], norm: Norm, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries in the dtype of the layer's parameters, which :func:`write_norm` computes in float32 at least."""
    parameters = [tensor.dtype for key, tensor in tensors.items() if key not in (*STATISTICS, *SCALARS)]
    dtype = functools.reduce(torch.promote_types, parameters)
    dtypes = {key: buffer.dtype for key, buffer in norm.buffers.items()}
    # That of a fresh layer has the dtype of its statistics.
    dtypes.setdefault('running_similarity', norm.buffers['running_mean'].dtype)
    return {key: tensor.to(dtypes.get(key, dtype)) for key, tensor in entries.items()}


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
        because, of = f'{target.title} has a {size} x {size} kernel', kernel.shape[-1]
        # A UBN of 1 x 1 has no neighbor_weight.
        takes_size = not {'neighbor_weight', 'running_similarity'}.isdisjoint(target.keys)
        remedy = f'; set kernel_size={of} (norm_cfg.kernel_size)' if takes_size else ''
        got = f'a {of} x {of} kernel with values up to {{:.3g}} around these{remedy}'
        _require_zero(outside, name, norm, prefix, because, got)
    return F.pad(kernel, (margin,) * 4) if margin else kernel


def _require_zero(
    tensor: Tensor, name: str, norm: Norm, prefix: str, because: str, got: str = 'values up to {:.3g}'
) -> None:
    if (tensor != 0).any():
        raise CheckpointError(
            f'{prefix}{_key(norm.layout, name)} of {norm.layout.title}: expected zeros, because {because}; '
            f'got {got.format(tensor.abs().max())}.'
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
