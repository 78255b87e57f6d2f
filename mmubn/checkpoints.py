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
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    'LAYOUTS',
    'Layout',
    'convert_state',
    'convert_state_dict',
    'is_state_dict',
    'report_layouts',
    'unwrap_model_key',
]


class Layout(NamedTuple):
    """How an implementation names and shapes the tensors of a norm layer; what each means, its key says."""

    title: str
    keys: tuple[str, ...]  # besides running_mean, running_var and, optionally, num_batches_tracked
    options: tuple[tuple[str, ...], ...] = ()  # groups of keys that are there or not, as the layer's arguments say
    vectors_4d: bool = False  # writes vectors as (1, C, 1, 1), not (C,); both are read
    calibrates_bias: bool | None = False  # whether r multiplies the bias too; None: calibrate_bias says, no key does


RECTIFICATIONS = ('center_weight', 'scale_weight', 'scale_bias')
# The name is that of the converter's --to. A layout with keys of another meaning also extends read_norm and write_norm.
LAYOUTS = {
    'bn': Layout('BatchNorm', ('weight', 'bias')),
    'rbn': Layout('RBN', ('weight', 'bias', *RECTIFICATIONS), vectors_4d=True),
    'bnet': Layout('BNET', ('bnconv.weight', 'bnconv.bias')),
    'ubn-released': Layout(
        'released UBN', (*RECTIFICATIONS, 'bnconv.weight', 'bnconv.bias'), vectors_4d=True, calibrates_bias=True
    ),
    'ubn': Layout(
        'UBN',
        ('weight', 'bias', 'running_similarity'),
        options=(('neighbor_weight',), ('center_weight',), ('scale_weight', 'scale_bias')),
        calibrates_bias=None,
    ),
}
VECTORS = ('weight', 'bias', 'bnconv.bias', *RECTIFICATIONS)
STATISTICS = ('running_mean', 'running_var')
OPTIONAL = 'num_batches_tracked'
SCALARS = ('running_similarity', OPTIONAL)


class Norm(NamedTuple):
    """A norm layer in the general form ``y = conv(r (x + w_m a - mu) / std) + beta``, or ``+ r beta`` if calibrated."""

    layout: Layout  # of the entries it was read from
    kernel: Tensor  # (C, k, k)
    bias: Tensor  # beta, (C,)
    center_weight: Tensor | None  # w_m, (C,); None for 0
    scale: tuple[Tensor, Tensor] | None  # w_v and w_b, each (C,); None for r = 1
    calibrated: bool
    buffers: dict[str, Tensor]  # of STATISTICS and SCALARS


# --- loading into a layer ---------------------------------------------------------------------------------------------


@torch.no_grad()
def convert_state(layer: _BatchNorm, state_dict: dict, prefix: str) -> None:
    """Turn what ``state_dict`` holds under ``prefix``, in any layout, into the layer's own entries.

    The layer then computes the function of the layer that was saved, in training as long as the gate is open (the
    running similarity starts at 1 where the layout has none). There is one exception, with a warning: a released UBN,
    whose factor r multiplies the bias too, in a layer without ``calibrate_bias``.

    The layer's own entries are left as they are, and so is a state dict without any key under ``prefix``: torch then
    reports the missing keys as usual.

    Args:
        layer: The layer that will load the entries; its own layout is that of its parameters and buffers.
        state_dict: Modified in place, as ``load_state_dict`` allows: it passes a copy. The tensors are not written to.
        prefix: Name of the layer in the state dict, with the trailing dot.

    Raises:
        ValueError: The entries are of no layout, of another number of channels, or of a function that the layer does
            not have. Names the key, what is expected and what was received.
    """
    tensors = _under(state_dict, prefix)
    if not tensors:
        _reads[type(layer).__name__, None] += 1
        return
    own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    calibrates = getattr(layer, 'calibrate_bias', False)
    if _shapes(tensors) == _shapes(own):
        layout = _layouts_by_keys().get(frozenset(_shapes(own)))
        _reads[type(layer).__name__, layout.title if layout else type(layer).__name__] += 1
        return

    layout = find_layout(tensors, prefix)
    norm = read_norm(tensors, layout, prefix, layer.num_features, calibrates)
    title = norm.layout.title
    if layout.calibrates_bias is None:
        # A UBN of fewer rectifications has the keys of this one with a tensor lost; nothing tells them apart.
        if missing := own.keys() - tensors.keys() - {OPTIONAL}:
            raise ValueError(
                f'{prefix}{min(missing)} is missing: expected {_listed(own)}, got {_listed(tensors)}; '
                'give norm_cfg the arguments of the UBN that was saved.'
            )
        title += ' of other arguments'
    approximate = norm.calibrated and not calibrates and _bias_depends_on_scaling(norm, own)
    if approximate:
        title += ', its bias approximately'
        # The same words for every layer, so that Python shows them once.
        warnings.warn(
            f'The checkpoint is of a {norm.layout.title}, whose scaling factor multiplies the bias too; in this '
            f'{type(layer).__name__} it does not, so its function differs: bias times the factor of an average sample, '
            'sigmoid(scale_bias), was loaded. Set calibrate_bias=True in norm_cfg for exactly the same function.',
            stacklevel=3,
        )
    neighbors = own['neighbor_weight'].shape[1] if 'neighbor_weight' in own else 0
    new = write_norm(
        norm, own, math.isqrt(neighbors + 1), calibrates, prefix, f'this {type(layer).__name__}', approximate
    )
    for key in tensors:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: tensor for key, tensor in new.items()})
    _reads[type(layer).__name__, title] += 1


def _under(state_dict: Mapping, prefix: str) -> dict:
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}


def _shapes(tensors: Mapping) -> dict:
    return {key: getattr(tensor, 'shape', None) for key, tensor in tensors.items() if key != OPTIONAL}


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
        ValueError: A layer is of no layout, or has no exact equal in the layout ``to``. Names the layer and why.
    """
    target = LAYOUTS[to]
    keys = {*target.keys, *itertools.chain(*target.options)}
    calibrates = calibrate_bias if target.calibrates_bias is None else target.calibrates_bias
    layers, owner, counts = {}, {}, Counter()
    for prefix in dict.fromkeys(_norm_prefixes(state_dict)):
        tensors = _under(state_dict, prefix)
        layout = find_layout(tensors, prefix)
        channels = tensors['running_mean'].numel()
        norm = read_norm(tensors, layout, prefix, channels, calibrate_bias)
        # A kernel of 1 would fit no layer with the default kernel_size.
        kernel_size = max(3, norm.kernel.shape[-1]) if keys & {'bnconv.weight', 'neighbor_weight'} else 1
        new = write_norm(norm, keys, kernel_size, calibrates, prefix, f'a {target.title}')
        if target.vectors_4d:
            new |= {key: new[key].reshape(1, -1, 1, 1) for key in target.keys if not key.startswith('bnconv.')}
        layers[prefix] = {prefix + key: value for key, value in new.items()}
        owner |= {prefix + key: prefix for key in tensors}
        counts[layout.title] += 1

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
def _layouts_by_keys() -> dict[frozenset[str], Layout]:
    layouts = {}
    for layout in LAYOUTS.values():
        for chosen in itertools.product((False, True), repeat=len(layout.options)):
            options = itertools.chain(*itertools.compress(layout.options, chosen))
            layouts[frozenset({*layout.keys, *options, *STATISTICS})] = layout
    return layouts


def find_layout(keys: Iterable[str], prefix: str) -> Layout:
    """The layout that has exactly these keys."""
    present = frozenset(keys) - {OPTIONAL}
    layouts = _layouts_by_keys()
    if present in layouts:
        return layouts[present]
    # Of several as near, the one that lacks keys rather than the one that has too many.
    nearest = min(layouts, key=lambda keys: (len(keys ^ present), len(present - keys)))
    wrong = [f'{prefix}{key} is missing' for key in sorted(nearest - present)]
    wrong += [f'{prefix}{key} is none of its keys' for key in sorted(present - nearest)]
    raise ValueError(
        f'the norm layer {prefix[:-1]!r} has the keys of no layout that mmubn reads; the nearest, '
        f'{layouts[nearest].title}, has {_listed(nearest)}, but {", ".join(wrong)}: got {_listed(present)}.'
    )


def _listed(keys: Iterable[str]) -> str:
    return ', '.join(sorted(keys))


def read_norm(tensors: Mapping, layout: Layout, prefix: str, channels: int, calibrate_bias: bool) -> Norm:
    """The general form of a layer whose keys are those of ``layout``; raises a ValueError for a wrong shape."""
    for key, tensor in tensors.items():
        _check_shape(prefix, key, tensor, channels, layout.title)
    vectors = {key: tensors[key].reshape(-1) for key in VECTORS if key in tensors}
    kernel = tensors['bnconv.weight'].squeeze(1) if 'bnconv.weight' in tensors else vectors['weight'][:, None, None]
    if 'neighbor_weight' in tensors:
        before, after = tensors['neighbor_weight'].chunk(2, dim=1)
        taps = torch.cat([before, kernel.flatten(1), after], dim=1)
        kernel = taps.unflatten(1, (math.isqrt(taps.shape[1]), -1))
    return Norm(
        layout=layout,
        kernel=kernel,
        bias=vectors[_bias_key(layout)],
        center_weight=vectors.get('center_weight'),
        scale=(vectors['scale_weight'], vectors['scale_bias']) if 'scale_weight' in vectors else None,
        calibrated=calibrate_bias if layout.calibrates_bias is None else layout.calibrates_bias,
        buffers={key: tensors[key] for key in (*STATISTICS, *SCALARS) if key in tensors},
    )


def _bias_key(layout: Layout) -> str:
    return 'bias' if 'bias' in layout.keys else 'bnconv.bias'


def _check_shape(prefix: str, key: str, tensor: object, channels: int, title: str) -> None:
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
    if key in SCALARS:
        fits, expected = shape in ((), (1,)), 'a scalar'
    elif key == 'bnconv.weight':
        expected = f'({channels}, 1, k, k) with odd k'
        fits = shape is not None and len(shape) == 4 and shape == (channels, 1, shape[3], shape[3]) and shape[3] % 2
    elif key == 'neighbor_weight':
        expected = f'({channels}, k*k - 1) with odd k'
        fits = shape is not None and len(shape) == 2 and shape[0] == channels and _is_odd_square(shape[1] + 1)
    elif key in STATISTICS:
        fits, expected = shape == (channels,), f'({channels},)'
    else:
        fits, expected = shape in ((channels,), (1, channels, 1, 1)), f'({channels},) or (1, {channels}, 1, 1)'
    if not fits:
        received = shape if shape is not None else type(tensor).__name__
        raise ValueError(f'{prefix}{key} of a {title}: expected shape {expected}, got {received}.')


def _is_odd_square(n: int) -> bool:
    return n > 1 and n % 2 == 1 and math.isqrt(n) ** 2 == n


def write_norm(
    norm: Norm,
    keys: Iterable[str],
    kernel_size: int,
    calibrates_bias: bool,
    prefix: str,
    target: str,
    approximate_bias: bool = False,
) -> dict[str, Tensor]:
    """The entries ``keys`` of a layer that computes ``norm``; vectors are (C,).

    Args:
        norm: The function.
        keys: Keys of the layer that is written; num_batches_tracked is written where ``norm`` has it.
        kernel_size: Size of its kernel.
        calibrates_bias: Whether its factor r multiplies the bias too.
        prefix: Name of the layer, for errors.
        target: What is written, for errors.
        approximate_bias: Where the bias has no exact equal, take the factor of an average sample, sigmoid(w_b).

    Raises:
        ValueError: There are no such entries of exactly this function.
    """

    def require_zero(tensor: Tensor, key: str, lack: str) -> None:
        if (tensor != 0).any():
            raise ValueError(
                f'{prefix}{key} of a {norm.layout.title}: expected zeros, because {target} has {lack}, '
                f'got values up to {tensor.abs().max():.3g}.'
            )

    rectifications = {}
    w_m = torch.zeros_like(norm.bias) if norm.center_weight is None else norm.center_weight
    if 'center_weight' in keys:
        rectifications['center_weight'] = w_m
    else:
        require_zero(w_m, 'center_weight', 'no centering')

    # A constant factor sigmoid(w_b) goes into the kernel, or out of it, without a trace.
    kernel, bias = norm.kernel, norm.bias
    if norm.scale is None and 'scale_weight' in keys:
        w_v, w_b = torch.zeros_like(bias), torch.ones_like(bias)
        kernel = kernel / _sigmoid(w_b)[:, None, None]
        bias = bias / _sigmoid(w_b) if calibrates_bias else bias
    elif norm.scale is not None:
        w_v, w_b = norm.scale
        if 'scale_weight' not in keys:
            require_zero(w_v, 'scale_weight', 'no scaling')
            kernel = kernel * _sigmoid(w_b)[:, None, None]
            bias = bias * _sigmoid(w_b) if norm.calibrated else bias
        elif norm.calibrated != calibrates_bias:
            if _bias_depends_on_scaling(norm, keys) and not approximate_bias:
                does, does_not = (norm.layout.title, target) if norm.calibrated else (target, norm.layout.title)
                raise ValueError(
                    f'{prefix}{_bias_key(norm.layout)} of a {norm.layout.title} has no exact equal in {target}: '
                    f'the scaling factor multiplies the bias too in {does}, but not in {does_not}.'
                )
            bias = bias * _sigmoid(w_b) if norm.calibrated else bias / _sigmoid(w_b)
    if 'scale_weight' in keys:
        rectifications |= {'scale_weight': w_v, 'scale_bias': w_b}

    # Padding with zeros makes a kernel and the same kernel amid zeros one function.
    margin = (kernel_size - kernel.shape[-1]) // 2
    if margin < 0:
        outside = kernel.clone()
        outside[:, -margin:margin, -margin:margin] = 0
        key = 'bnconv.weight' if 'bnconv.weight' in norm.layout.keys else 'neighbor_weight'
        require_zero(outside, key, f'a {kernel_size} x {kernel_size} kernel')
    kernel = F.pad(kernel, (margin,) * 4) if margin else kernel
    if 'bnconv.weight' in keys:
        affine = {'bnconv.weight': kernel[:, None], 'bnconv.bias': bias}
    else:
        before, weight, after = kernel.flatten(1).tensor_split((kernel_size**2 // 2, kernel_size**2 // 2 + 1), dim=1)
        # A copy: a view would have torch.save write the whole kernel with it.
        affine = {'weight': weight.flatten().contiguous(), 'bias': bias}
        if 'neighbor_weight' in keys:
            affine['neighbor_weight'] = torch.cat([before, after], dim=1)

    buffers = {key: norm.buffers[key] for key in (*STATISTICS, OPTIONAL) if key in norm.buffers}
    if 'running_similarity' in keys:
        open_gate = bias.new_ones((), dtype=torch.float32)
        buffers['running_similarity'] = norm.buffers.get('running_similarity', open_gate)
    return affine | rectifications | buffers


def _sigmoid(w_b: Tensor) -> Tensor:
    # In float32 at least: the entries of a half-precision checkpoint are rounded once, not twice.
    return torch.sigmoid(w_b.to(torch.promote_types(w_b.dtype, torch.float32)))


def _bias_depends_on_scaling(norm: Norm, keys: Iterable[str]) -> bool:
    """Whether r beta is no constant, in a layer that has ``keys``."""
    return norm.scale is not None and 'scale_weight' in keys and bool(((norm.scale[0] != 0) & (norm.bias != 0)).any())


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
