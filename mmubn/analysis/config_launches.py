"""What the norms of a config launch on a GPU in a training run, found without one. Needs OpenMMLab and Triton.

The model is built on the meta device and sees each size of image that its pipelines produce; each norm then takes one
step, recorded, for each input that it was given. No weights, no data and no GPU are needed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmubn import ops
from mmubn.analysis.machine_code import launches_of_a_step
from mmubn.layers import UnifiedNorm
from mmubn.openmmlab.errors import ConfigError
from mmubn.ops.triton import probe, runtime
from mmubn.ops.triton.runtime import Launch

__all__ = [
    'Call',
    'Scales',
    'Split',
    'calls_of',
    'launches_of',
    'launches_of_probe',
    'scales_of',
    'sizes_of',
    'splits_of',
]

Size = tuple[int, int]  # height, width


class Scales(NamedTuple):
    """Images that keep their shape: the short side is ``lowest`` or more, the long one ``longest`` or less."""

    lowest: int
    longest: int


class Split(NamedTuple):
    """How a part of a run computes.

    Attributes:
        training: Whether the model trains.
        dtype: Of the data that norms see.
        batch_size: Images of a batch.
        sizes: Of the batches, padding included.
    """

    training: bool
    dtype: torch.dtype
    batch_size: int
    sizes: tuple[Size, ...]


class Call(NamedTuple):
    """A norm, the first of those that are alike, and the input that it is given."""

    norm: UnifiedNorm
    training: bool
    wants_gradient: bool
    shape: tuple[int, int, int, int]


def splits_of(cfg: Config, dtypes: Iterable[torch.dtype] = (), sizes: Iterable[Size] = ()) -> list[Split]:
    """Training and validation of a config.

    Args:
        cfg: The config.
        dtypes: Of the data; by default float32, or in training what AmpOptimWrapper computes in.
        sizes: Of batches; by default all that the pipelines and the padding of batches produce.

    Raises:
        ConfigError: The pipelines do not say which sizes they produce.
    """
    dtypes, sizes = tuple(dtypes), tuple(sizes)
    found = []
    for split, training in (('train', True), ('val', False)):
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            continue
        own = sizes or tuple(_sizes(cfg, split))
        for dtype in dtypes or (_dtype(cfg, training),):
            found.append(Split(training, dtype, loader.get('batch_size') or 1, own))
    if not found:
        raise ConfigError('the config has neither a train_dataloader nor a val_dataloader: nothing runs.')
    return found


def _sizes(cfg: Config, split: str) -> Iterator[Size]:
    """Those of a split; where its pipeline leaves images as they are, those of the other."""
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    for name in (split, 'train', 'val'):
        loader = cfg.get(f'{name}_dataloader')
        scales = scales_of(_pipeline(loader.dataset)) if loader else None
        if scales is not None:
            return sizes_of(scales, preprocessor.get('pad_size_divisor', 1))
    raise ConfigError('no transform of a pipeline says which size images have: give the sizes, --sizes H,W ...')


def _dtype(cfg: Config, training: bool) -> torch.dtype:
    """What convolutions compute in; MMEngine validates in float32 unless it is told to use float16."""
    if not training:
        return torch.float16 if (cfg.get('val_cfg') or {}).get('fp16') else torch.float32
    wrapper = cfg.get('optim_wrapper') or {}
    kind = wrapper.get('type', '')
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))
    if not name.endswith('AmpOptimWrapper'):
        return torch.float32
    return getattr(torch, wrapper.get('dtype') or 'float16')


def _pipeline(dataset: Any) -> list:
    """The transforms of a dataset and of those that it wraps, in the order in which they are applied."""
    inner = dataset.get('dataset') or next(iter(dataset.get('datasets') or ()), None)
    return [*(_pipeline(inner) if inner else ()), *(dataset.get('pipeline') or ())]


# ---- sizes


def scales_of(pipeline: Iterable[dict]) -> Size | Scales | None:
    """Which sizes the images have that a pipeline produces; None where no transform says so.

    Raises:
        ConfigError: A transform that says it in a way that is not known here.
    """
    found: Size | Scales | None = None
    for transform in pipeline:
        name = transform['type']
        name = name if isinstance(name, str) else getattr(name, '__name__', str(name))
        reader = READERS.get(name.rpartition('.')[2])
        if reader is not None:
            found = reader(transform, found) or found
    return found


def _pair(value: Any) -> Size:
    """(height, width) of a scale of MMCV, which is (width, height) or one number."""
    width, height = (value, value) if isinstance(value, int) else value
    return height, width


def _of_resize(transform: dict, before: Any) -> Size | Scales | None:
    if transform.get('scale') is None:
        return None
    if not transform.get('keep_ratio', False):
        return _pair(transform['scale'])
    return Scales(min(_pair(transform['scale'])), max(_pair(transform['scale'])))


def _of_choice(transform: dict, before: Any) -> Size | Scales:
    scales = [_pair(scale) for scale in transform['scales']]
    if not transform.get('keep_ratio', False):
        raise ConfigError('RandomChoiceResize without keep_ratio has several sizes: give them, --sizes H,W ...')
    return Scales(min(map(min, scales)), max(map(max, scales)))


def _of_range(transform: dict, before: Any) -> Scales:
    scale = transform['scale']
    pairs = [_pair(scale)] if isinstance(scale, int) or isinstance(scale[0], int) else [_pair(each) for each in scale]
    low, high = transform.get('ratio_range') or (1, 1)
    return Scales(int(min(map(min, pairs)) * low), int(max(map(max, pairs)) * high))


def _of_crop(key: str) -> Callable[[dict, Any], Size | None]:
    def read(transform: dict, before: Any) -> Size | None:
        value = transform.get(key)
        absolute = transform.get('crop_type', 'absolute') == 'absolute'
        if value is None or not absolute:
            return None
        # crop_size is (height, width) in MMPretrain and MMDetection alike; a scale of RandomResizedCrop too.
        return (value, value) if isinstance(value, int) else (value[0], value[1])

    return read


def _of_pad(transform: dict, before: Any) -> Size | None:
    return None if transform.get('size') is None else _pair(transform['size'])


READERS: dict[str, Callable[[dict, Any], Size | Scales | None]] = {
    'Resize': _of_resize,
    'FixScaleResize': _of_resize,
    'RandomChoiceResize': _of_choice,
    'RandomResize': _of_range,
    'RandomResizedCrop': _of_crop('scale'),
    'RandomCrop': _of_crop('crop_size'),
    'CenterCrop': _of_crop('crop_size'),
    'Pad': _of_pad,
}


def sizes_of(scales: Size | Scales, divisor: int) -> Iterator[Size]:
    """The sizes of batches of such images, padded to the largest of them and to multiples of ``divisor``.

    Of images that keep their shape: all between the lowest and the longest side, in both directions, as batches of
    upright and of wide images have them; and images up to twice as narrow, which are as long as they may be.
    """
    if not isinstance(scales, Scales):
        height, width = scales
        yield _up(height, divisor), _up(width, divisor)
        return
    if divisor < 8:
        raise ConfigError(
            f'images of any size, padded to multiples of {divisor}, have too many sizes: give some, --sizes H,W ...'
        )
    low, high = scales.lowest, _up(scales.longest, divisor)
    usual = range(_up(low, divisor), high + 1, divisor)
    yield from itertools.product(usual, usual)
    for narrow in range(_up(low // 2, divisor), _up(low, divisor), divisor):
        yield from ((narrow, high), (high, narrow))


def _up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


# ---- norms


def calls_of(cfg: Config, splits: Iterable[Split]) -> tuple[dict[Split, list[Call]], list[str]]:
    """Which inputs each norm of the model is given; and the names of norms that were given none.

    Height and width of a map are taken to follow from those of the image alone, each from its own.

    Raises:
        ConfigError: There is no norm of this package in the model, or it has no ``extract_feat``.
    """
    with MODELS.switch_scope_and_registry(cfg.get('default_scope', 'mmengine')) as registry:
        model = registry.build(cfg.model).to('meta')  # some models read values while they are built
    names = {module: name for name, module in model.named_modules() if isinstance(module, UnifiedNorm)}
    first: dict[str, UnifiedNorm] = {}
    alike = {module: first.setdefault(_kind(module), module) for module in names}
    if not names:
        raise ConfigError('the model of the config has no norm of mmubn: there is nothing to compile.')
    if not callable(getattr(model, 'extract_feat', None)):
        raise ConfigError(f'{type(model).__name__} has no extract_feat, by which its norms would be reached.')
    found: dict[Split, list[Call]] = {}
    reached: set[nn.Module] = set()
    for split in splits:
        model.train(split.training)
        given = functools.cache(functools.partial(_given, model, split))
        calls: dict[Call, None] = {}
        for height, width in split.sizes:
            for by_height, by_width in zip(given(height), given(width), strict=True):
                n, c, h, _ = by_height.shape
                calls[by_height._replace(norm=alike[by_height.norm], shape=(n, c, h, by_width.shape[3]))] = None
                reached.add(by_height.norm)
        found[split] = list(calls)
    return found, [name for module, name in names.items() if module not in reached]


def _kind(norm: UnifiedNorm) -> str:
    """Equal for norms that launch the same."""
    return f'{norm!r} {[(name, p.dtype, p.requires_grad) for name, p in norm.named_parameters()]}'


def _given(model: nn.Module, split: Split, side: int) -> list[Call]:
    """The calls of norms for square images."""
    calls = []

    def note(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        wants = split.training and (x.requires_grad or any(p.requires_grad for p in norm.parameters()))
        calls.append(Call(norm, norm.training, wants, tuple(x.shape)))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, UnifiedNorm)]
    try:
        with torch.set_grad_enabled(split.training), runtime.recorded(), ops.use_backend('triton'):
            features = model.extract_feat(torch.empty(split.batch_size, 3, side, side, device='meta'))
            head = getattr(model, 'bbox_head', None) or getattr(model, 'rpn_head', None)
            if isinstance(head, nn.Module):
                head(features)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def launches_of(call: Call, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Launch]:
    """What a norm launches for such an input, forward and, where a gradient is wanted, backward."""
    call.norm.train(call.training)
    x = torch.empty(call.shape, dtype=dtype, device='meta').to(memory_format=memory_format)
    with torch.set_grad_enabled(call.wants_gradient), runtime.recorded() as launches, ops.use_backend('triton'):
        y = call.norm(x.requires_grad_(call.wants_gradient))
        if y.requires_grad:
            y.backward(torch.empty_like(y))
    return launches


def launches_of_probe() -> list[Launch]:
    """What the probe launches (:mod:`mmubn.ops.triton.probe`), by which every process begins."""
    kernel_size = probe.FORM.kernel_size
    return [
        launch
        for case in probe.CASES
        for launch in launches_of_a_step(case.shape, case.dtype, case.memory_format, kernel_size)
    ]
