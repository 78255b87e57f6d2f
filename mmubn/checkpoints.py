"""State-dict layouts of norm layers: recognised by their keys, read into one general form, written in another layout.

docs/checkpoints.md lists the layouts and says when a conversion is exact. What is not exact is an error, so that no
layer is ever half loaded. Needs torch alone; :func:`report_layouts` and :func:`unwrap_model_key` mend MMEngine.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmubn.functional import depthwise_kernel

if TYPE_CHECKING:
    from mmubn.layers import UnifiedNorm

__all__ = [
    'LAYOUTS',
    'CheckpointError',
    'Layout',
    'convert_state',
    'convert_state_dict',
    'is_state_dict',
    'report_layouts',
    'unwrap_model_key',
]


class CheckpointError(ValueError):
    """Entries of a checkpoint that no norm layer has, or that this one cannot take over exactly."""


class Layout(NamedTuple):
    """How an implementation names and shapes the tensors of a norm layer."""

    title: str
    keys: tuple[str, ...]  # besides running_mean, running_var and, optionally, num_batches_tracked
    options: tuple[tuple[str, ...], ...] = ()  # groups of keys that are there or not, as the layer's arguments say
    names: Mapping[str, str] = MappingProxyType({})  # what this module calls a key, where that is another name
    scaling: str | None = None  # what its factor r depends on, where it has a scale_weight: a key of FACTORS
    calibrates_bias: bool | None = False  # whether r multiplies the bias too; None: calibrate_bias says, no key does
    released: bool = False  # by its authors: vectors are written as (1, C, 1, 1), not (C,), and read as either
    starts: bool = True  # whether a layer of more keys takes these for a start, not for its own with a tensor lost


AFFINE = ('weight', 'bias')
SCALE = ('scale_weight', 'scale_bias')
RECTIFICATIONS = ('center_weight', *SCALE)
CONVOLUTION = {'bnconv.weight': 'kernel', 'bnconv.bias': 'bias'}
READJUST = {'weight_readjust': 'scale_weight', 'bias_readjust': 'scale_bias'}
# The name is that of the converter's --to.
LAYOUTS = {
    'bn': Layout('BatchNorm', AFFINE),
    'rbn': Layout('RBN', (*AFFINE, *RECTIFICATIONS), scaling='rectified'),
    'bnet': Layout('BNET', (*AFFINE, 'neighbor_weight')),
    'iebn': Layout('IEBN', (*AFFINE, *SCALE), scaling='instance', starts=False),
    'unitizedbn': Layout('UnitizedBN', (*AFFINE, 'scale_weight'), scaling='unitized', starts=False),
    'ubn': Layout(
        'UBN',
        (*AFFINE, 'running_similarity'),
        options=(('neighbor_weight',), ('center_weight',), SCALE),
        scaling='rectified',
        calibrates_bias=None,
        starts=False,
    ),
    'rbn-released': Layout('released RBN', (*AFFINE, *RECTIFICATIONS), scaling='rectified', released=True),
    'bnet-released': Layout('released BNET', tuple(CONVOLUTION), names=CONVOLUTION, released=True),
    'iebn-released': Layout('released IEBN', (*AFFINE, *READJUST), names=READJUST, scaling='instance', released=True),
    'ubn-released': Layout(
        'released UBN',
        (*RECTIFICATIONS, *CONVOLUTION),
        names=CONVOLUTION,
        scaling='rectified',
        calibrates_bias=True,
        released=True,
    ),
}
VECTORS = (*AFFINE, *RECTIFICATIONS, *READJUST)
STATISTICS = ('running_mean', 'running_var')
OPTIONAL = 'num_batches_tracked'
SCALARS = ('running_similarity', OPTIONAL)

# What the factor r of each kind of scaling depends on; with a scale_weight of zeros it is a constant.
FACTORS = {
    'rectified': 'the mean of the normalised input',
    'instance': 'the mean of the raw input',
    'unitized': 'the length of the normalised input',
}
# w_b of a fresh layer, where its kind of scaling has one: r is then the sigmoid of this, and 1 where it has none.
INITIAL_SCALE_BIAS = {'rectified': 1.0, 'instance': -1.0}


class Scaling(NamedTuple):
    """The factor r: of which kind, None for r = 1, with w_v and, where the kind has one, w_b, each (C,)."""

    kind: str | None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Norm(NamedTuple):
    """A norm layer in the general form ``y = conv(r (x + w_m a - mu) / std) + beta``, or ``+ r beta`` if calibrated."""

    layout: Layout  # of the entries it was read from
    kernel: Tensor  # (C, k, k)
    bias: Tensor  # beta, (C,)
    center_weight: Tensor | None  # w_m, (C,); None for 0
    scaling: Scaling
    calibrated: bool
    buffers: dict[str, Tensor]  # of STATISTICS and SCALARS


class Target(NamedTuple):
    """What a norm is written as."""

    title: str  # for errors
    keys: Collection[str]  # as this module calls them
    scaling: str | None
    kernel_size: int
    calibrates_bias: bool


# --- loading into a layer ---------------------------------------------------------------------------------------------


@torch.no_grad()
def convert_state(layer: UnifiedNorm, state_dict: dict, prefix: str) -> None:
    """Turn what ``state_dict`` holds under ``prefix``, in any layout, into the layer's own entries.

    The layer then computes the function of the layer that was saved, in training as long as the gate of a UBN is open
    (the running similarity starts at 1 where the layout has none). There is one exception, with a warning: a released
    UBN, whose factor r multiplies the bias too, in a UBN without ``calibrate_bias``.

    The layer's own entries are left as they are, and so is a state dict without any key under ``prefix``: torch then
    reports the missing keys as usual.

    Args:
        layer: The layer that will load the entries; its own layout is that of its parameters and buffers.
        state_dict: Modified in place, as ``load_state_dict`` allows: it passes a copy. The tensors are not written to.
        prefix: Name of the layer in the state dict, with the trailing dot.

    Raises:
        CheckpointError: The entries are of no layout, of another number of channels, or of a function that the layer
            does not have. Names the key, what is expected and what was received.
    """
    name = type(layer).__name__
    tensors = _under(state_dict, prefix)
    if not tensors:
        _reads[name, None] += 1
        return
    own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    if _shapes(tensors) == _shapes(own):
        layout = _layouts_by_keys(released=False).get(frozenset(own) - {OPTIONAL})
        _reads[name, layout.title if layout else name] += 1
        return

    layout = find_layout(tensors, prefix)
    norm = read_norm(tensors, layout, prefix, layer.num_features, layer.calibrate_bias)
    target = Target(f'this {name}', own.keys(), layer.scaling, layer.kernel_size, layer.calibrate_bias)
    _check_complete(norm, target, tensors, prefix)
    gated = 'running_similarity' in own
    approximate = gated and norm.calibrated and not layer.calibrate_bias and _bias_depends_on_scaling(norm, target)
    title = layout.title
    if layout.calibrates_bias is None and gated:
        title += ' of other arguments'
    elif layout.calibrates_bias is None and norm.scaling.kind is not None:
        title += ' taken to be without calibrate_bias'
    if approximate:
        title += ', its bias approximately'
        # The same words for every layer, so that Python shows them once.
        warnings.warn(
            f'The checkpoint is of {layout.title}, whose scaling factor multiplies the bias too; in this {name} it '
            'does not, so its function differs: bias times the factor of an average sample, sigmoid(scale_bias), was '
            'loaded. Set calibrate_bias=True in norm_cfg for exactly the same function.',
            stacklevel=3,
        )
    new = write_norm(norm, target, prefix, approximate)
    for key in tensors:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: tensor for key, tensor in new.items()})
    _reads[name, title] += 1


def _check_complete(norm: Norm, target: Target, tensors: Mapping, prefix: str) -> None:
    """Refuse what may be the layer's own entries with a tensor lost, although another layer has just these keys."""
    present = tensors.keys() - {OPTIONAL}
    lost = target.keys - present - {OPTIONAL}
    if norm.layout.starts or not lost or not present < target.keys:
        return
    if norm.layout.calibrates_bias is None:
        remedy = 'Give norm_cfg the arguments of the UBN that was saved.'
    else:
        remedy = (
            f'If it is a whole {norm.layout.title}, tools/model_converters/convert_norm.py converts it where that is '
            f'exact; {_different_factors(norm, target)}.'
        )
    missing = ', '.join(f'{prefix}{key} is missing' for key in sorted(lost))
    raise CheckpointError(f'{missing}: expected {_listed(target.keys - {OPTIONAL})}, got {_listed(present)}. {remedy}')


def _under(state_dict: Mapping, prefix: str) -> dict:
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}


def _shapes(tensors: Mapping) -> dict:
    return {OPTIONAL: torch.Size()} | {key: getattr(tensor, 'shape', None) for key, tensor in tensors.items()}


# --- converting a whole state dict ------------------------------------------------------------------------------------


@torch.no_grad()
def convert_state_dict(state_dict: Mapping, to: str, calibrate_bias: bool = False) -> tuple[OrderedDict, Counter[str]]:
    """A state dict in which every norm layer with running statistics has the layout ``to``; the rest as it is.

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
    layers, owner, counts = {}, {}, Counter()
    for prefix in dict.fromkeys(_norm_prefixes(state_dict)):
        tensors = _under(state_dict, prefix)
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

    converted = OrderedDict()
    for key, value in state_dict.items():
        converted.update(layers[owner[key]] if key in owner else {key: value})
    if hasattr(state_dict, '_metadata'):
        converted._metadata = state_dict._metadata
    return converted, counts


def _norm_prefixes(state_dict: Mapping) -> Iterable[str]:
    for key in state_dict:
        prefix, dot, name = key.rpartition('.')
        if name in STATISTICS:
            yield prefix + dot


# --- layouts in, one general form, layouts out ------------------------------------------------------------------------


@functools.cache
def _layouts_by_keys(released: bool) -> dict[frozenset[str], Layout]:
    """Layouts by their keys; ``released``: those alone. RBN has the same keys in both."""
    layouts = {}
    for layout in LAYOUTS.values():
        if layout.released or not released:
            for chosen in itertools.product((False, True), repeat=len(layout.options)):
                options = itertools.chain(*itertools.compress(layout.options, chosen))
                layouts.setdefault(frozenset({*layout.keys, *options, *STATISTICS}), layout)
    return layouts


def find_layout(tensors: Mapping, prefix: str) -> Layout:
    """The layout that has exactly these keys."""
    present = frozenset(tensors) - {OPTIONAL}
    # RBN's entries without center_weight have IEBN's keys, but not, as released, its shapes.
    released = any(getattr(tensors[key], 'ndim', 0) == 4 for key in present.intersection(VECTORS))
    layouts = _layouts_by_keys(released)
    if present in layouts:
        return layouts[present]
    # Of several as near, the one that lacks keys rather than the one that has too many.
    nearest = min(layouts, key=lambda keys: (len(keys ^ present), len(present - keys)))
    wrong = [f'{prefix}{key} is missing' for key in sorted(nearest - present)]
    wrong += [f'{prefix}{key} is none of its keys' for key in sorted(present - nearest)]
    shapes = ' with vectors of shape (1, C, 1, 1)' if released else ''
    raise CheckpointError(
        f'the norm layer {prefix[:-1]!r} has the keys of no layout{shapes} that mmubn reads; the nearest, '
        f'{layouts[nearest].title}, has {_listed(nearest)}, but {", ".join(wrong)}: got {_listed(present)}.'
    )


def _listed(keys: Iterable[str]) -> str:
    return ', '.join(sorted(keys))


def read_norm(tensors: Mapping, layout: Layout, prefix: str, channels: int, calibrate_bias: bool) -> Norm:
    """The general form of a layer whose keys are those of ``layout``; raises a CheckpointError for a wrong shape."""
    for key, tensor in tensors.items():
        _check_shape(prefix, key, tensor, channels, layout)
    named = {layout.names.get(key, key): tensors[key] for key in tensors}
    vectors = {name: named[name].reshape(-1) for name in VECTORS if name in named}
    kernel = named['kernel'] if 'kernel' in named else depthwise_kernel(vectors['weight'], named.get('neighbor_weight'))
    kind = layout.scaling if 'scale_weight' in named else None
    return Norm(
        layout=layout,
        kernel=kernel.squeeze(1),
        bias=vectors['bias'],
        center_weight=vectors.get('center_weight'),
        scaling=Scaling(kind, vectors.get('scale_weight'), vectors.get('scale_bias')),
        calibrated=calibrate_bias if layout.calibrates_bias is None else layout.calibrates_bias,
        buffers={key: tensors[key] for key in (*STATISTICS, *SCALARS) if key in tensors},
    )


def _check_shape(prefix: str, key: str, tensor: object, channels: int, layout: Layout) -> None:
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
    if key in SCALARS:
        fits, expected = shape in ((), (1,)), 'a scalar'
    elif key == 'bnconv.weight':
        expected = f'({channels}, 1, k, k) with odd k'
        fits = shape is not None and len(shape) == 4 and shape == (channels, 1, shape[3], shape[3]) and shape[3] % 2
    elif key == 'neighbor_weight':
        expected = f'({channels}, k*k - 1) with odd k'
        fits = shape is not None and len(shape) == 2 and shape[0] == channels and _is_odd_square(shape[1] + 1)
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
    scaling, kernel, bias = _scale(norm, target, prefix, approximate_bias)
    kernel = _resize(kernel, norm, target, prefix)

    if 'kernel' in target.keys:
        entries = {'kernel': kernel[:, None], 'bias': bias}
    else:
        middle = target.kernel_size**2 // 2
        before, weight, after = kernel.flatten(1).tensor_split((middle, middle + 1), dim=1)
        # A copy: a view would have torch.save write the whole kernel with it.
        entries = {'weight': weight.flatten().contiguous(), 'bias': bias}
        if 'neighbor_weight' in target.keys:
            entries['neighbor_weight'] = torch.cat([before, after], dim=1)
    if 'center_weight' in target.keys:
        entries['center_weight'] = center_weight
    entries |= {name: value for name, value in zip(SCALE, scaling[1:], strict=True) if value is not None}
    entries |= {key: norm.buffers[key] for key in (*STATISTICS, OPTIONAL) if key in norm.buffers}
    if 'running_similarity' in target.keys:
        open_gate = norm.bias.new_ones((), dtype=torch.float32)
        entries['running_similarity'] = norm.buffers.get('running_similarity', open_gate)
    return entries


def _scale(norm: Norm, target: Target, prefix: str, approximate_bias: bool) -> tuple[Scaling, Tensor, Tensor]:
    """The factor as the target has it, and the kernel and bias that go with it."""
    scaling, kernel, bias = norm.scaling, norm.kernel, norm.bias
    if scaling.kind != target.scaling:
        if scaling.kind is not None:
            _require_zero(scaling.weight, 'scale_weight', norm, prefix, _different_factors(norm, target))
        # A constant factor goes into the kernel, and that of the target out of it, without a trace.
        new = _initial_scaling(target.scaling, bias)
        r, new_r = _constant_factor(scaling, bias), _constant_factor(new, bias)
        bias = bias * r if norm.calibrated else bias
        bias = bias / new_r if target.calibrates_bias else bias
        return new, kernel * r[:, None, None] / new_r[:, None, None], bias

    if scaling.kind is not None and norm.calibrated != target.calibrates_bias:
        if _bias_depends_on_scaling(norm, target) and not approximate_bias:
            does, does_not = norm.layout.title, target.title
            if target.calibrates_bias:
                does, does_not = does_not, does
            raise CheckpointError(
                f'{prefix}{_key(norm.layout, "bias")} of {norm.layout.title} has no exact equal in {target.title}: '
                f'the scaling factor multiplies the bias too in {does}, but not in {does_not}.'
            )
        r = _constant_factor(scaling, bias)
        bias = bias * r if norm.calibrated else bias / r
    return scaling, kernel, bias


def _resize(kernel: Tensor, norm: Norm, target: Target, prefix: str) -> Tensor:
    """Padding with zeros makes a kernel and the same kernel amid zeros one function."""
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
    """What ``layout`` calls what this module calls ``name``."""
    return next((key for key, other in layout.names.items() if other == name), name)


def _initial_scaling(kind: str | None, like: Tensor) -> Scaling:
    """That of a fresh layer: its factor is a constant."""
    weight = torch.zeros_like(like) if kind is not None else None
    bias = torch.full_like(like, INITIAL_SCALE_BIAS[kind]) if kind in INITIAL_SCALE_BIAS else None
    return Scaling(kind, weight, bias)


def _constant_factor(scaling: Scaling, like: Tensor) -> Tensor:
    """The factor r where w_v is 0, (C,)."""
    if scaling.bias is None:
        return torch.ones_like(like)
    # In float32 at least: the entries of a half-precision checkpoint are rounded once, not twice.
    return torch.sigmoid(scaling.bias.to(torch.promote_types(like.dtype, torch.float32)))


def _different_factors(norm: Norm, target: Target) -> str:
    source = f'the scaling factor of {norm.layout.title} depends on {FACTORS[norm.scaling.kind]}'
    if target.scaling is None:
        return f'{source} and {target.title} has no scaling'
    return f'{source}, that of {target.title} on {FACTORS[target.scaling]}'


def _bias_depends_on_scaling(norm: Norm, target: Target) -> bool:
    """Whether r beta is no constant, in a layer with the same kind of scaling."""
    same = norm.scaling.kind is not None and norm.scaling.kind == target.scaling
    return same and bool(((norm.scaling.weight != 0) & (norm.bias != 0)).any())


# --- MMEngine ---------------------------------------------------------------------------------------------------------

_reads: Counter[tuple[str, str | None]] = Counter()  # (type of the layer, title of what it read), since the load began


@functools.cache
def report_layouts() -> None:
    """Make MMEngine say, once per load, how many layers were read from which layout.

    A layer sees its own part of the state dict alone and MMEngine calls nothing at the end of a load, so this wraps
    ``mmengine.runner.checkpoint.load_state_dict``, through which Runner, EMAHook and ``init_cfg`` load (mmengine
    0.10.7, onedl-mmengine 0.10.12).
    """
    from mmengine.logging import print_log
    from mmengine.runner import checkpoint

    original = checkpoint.load_state_dict

    @functools.wraps(original)
    def load_state_dict(module, state_dict, strict=False, logger=None):
        _reads.clear()
        original(module, state_dict, strict, logger)
        for line in _report():
            # Without a logger MMEngine prints, and the log file of the run would not have the line.
            print_log(line, logger=logger or 'current')

    checkpoint.load_state_dict = load_state_dict


def _report() -> list[str]:
    lines = []
    for name in dict.fromkeys(name for name, _ in _reads):
        counts = {title: count for (layer, title), count in _reads.items() if layer == name}
        missing = counts.pop(None, 0)
        line = f'mmubn: {sum(counts.values())} {name} layers read'
        if counts:
            line += ': ' + ', '.join(f'{count} from {title}' for title, count in counts.items())
        lines.append(line + (f'; {missing} not in the state dict' if missing else ''))
    return lines


@functools.cache
def unwrap_model_key() -> None:
    """Make MMEngine read ``{'model': state_dict, ...}``, as torchvision's training scripts write it.

    MMEngine (0.10.7, onedl-mmengine 0.10.12) looks for the key ``state_dict`` alone. It takes any other dict for a
    state dict itself, finds no key of the model in it, and trains on from random weights with no more than a warning.
    ``CheckpointLoader.load_checkpoint`` is the one place through which Runner and ``init_cfg`` read.

    These scripts also save their arguments, an ``argparse.Namespace``, which ``torch.load(weights_only=True)`` must be
    told to accept: it is a plain record.
    """
    from argparse import Namespace

    from mmengine.runner.checkpoint import CheckpointLoader

    original = CheckpointLoader.load_checkpoint

    @functools.wraps(original)
    def load_checkpoint(cls, *args, **kwargs):
        checkpoint = original(*args, **kwargs)
        if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint and is_state_dict(checkpoint.get('model')):
            checkpoint = {**checkpoint, 'state_dict': checkpoint['model']}
        return checkpoint

    CheckpointLoader.load_checkpoint = classmethod(load_checkpoint)
    torch.serialization.add_safe_globals([Namespace])


def is_state_dict(value: object) -> bool:
    """Whether this can be a state dict: names, and tensors among what they name."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, Tensor) for item in value.values())
    )
