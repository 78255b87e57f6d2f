"""Evaluation of MMDetection's detectors in which norms leave out the padding of a batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmubn.layers import UnifiedNorm, areas
from mmubn.layers.areas import ImageAreas
from mmubn.openmmlab.errors import ConfigError, DataError

__all__ = ['PaddingAwareness', 'ignore_padding', 'layers_with_pooled_terms']

PARTS = ('backbone', 'neck')  # whose maps are maps of the batch


class PaddingAwareness:
    """What :func:`ignore_padding` has switched on.

    Attributes:
        layers: Names of the layers that leave out the padding.
        handles: Of the hooks that this call has registered; none for what was on before.
    """

    def __init__(self, model: nn.Module, layers: list[str], handles: list[Any]) -> None:
        self.layers, self.handles = layers, handles
        self._model = model

    def remove(self) -> None:
        """Switch it off in this model, whoever switched it on, in this model or in the one that it is a copy of."""
        for module in self._model.modules():
            for hooks, flags in (
                (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
                (module._forward_hooks, module._forward_hooks_always_called),
            ):
                for key in [key for key, hook in hooks.items() if hook in OWN_HOOKS]:
                    del hooks[key]
                    flags.pop(key, None)


def ignore_padding(model: nn.Module) -> PaddingAwareness:
    """Let a detector predict for each image as if its batch had no padding, as far as norms of this package go.

    In evaluation every norm of backbone and neck that has pooled terms computes the image's own part of a map alone
    (:func:`mmubn.layers.areas.image_areas`), which the data samples tell: ``img_shape``, or the size before a ``Pad``
    in the pipeline (below). Where no image is padded, and in the forward of a detector in training, everything is as
    before, a teacher in evaluation within it too. The heads stay as they are.

    A ``Pad`` writes the padded size into ``img_shape``. The size before it is ``ori_shape`` times ``scale_factor``, by
    the last ``Resize``. Where this is smaller than ``img_shape``, the input decides:

    - If all of it to the right of and below that size, up to ``img_shape``, is one constant per channel, that size.
    - Else, if ``flip``, ``border`` or ``pad_param`` say that padding may be at the left or at the top, and the input is
      constant there, it is an error.
    - Else ``img_shape``: a crop, or a ``Resize`` before the last.

    Nothing of it is state of the model: checkpoints, optimizers and module names are as before. A copy of the model is
    switched on too. To switch on twice is to switch on once.

    Args:
        model: A detector of MMDetection, or a model that has some, such as ``DetTTAModel``.

    Returns:
        A handle: its ``remove()`` switches this model off, whoever switched it on. For a copy that was switched on with
        its model: ``ignore_padding(copy).remove()``.

    Raises:
        ConfigError: There is no detector in the model.
        DataError: In a forward, there are no data samples, an image is larger than its batch, or padding is not only
            at the right and at the bottom.
        RuntimeError: In a forward, an image is padded, and a norm of backbone or neck is folded.
        ValueError: In a forward, a norm of backbone or neck has an input that is no map of the batch.

    Example:
        >>> detector = init_detector(config, checkpoint)
        >>> ignore_padding(detector)
        >>> inference_detector(detector, images)
    """
    from mmdet.models.detectors import BaseDetector

    detectors = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseDetector)]
    if not detectors:
        raise ConfigError(
            f'padding can be told from the image in detectors of MMDetection, and {type(model).__name__} is and has '
            'none: remove PaddingAwareHook (ignore_padding).'
        )
    handles, layers = [], []
    for prefix, detector in detectors:
        handles += _hook(detector, _enter_detector)
        for name in PARTS:
            if (part := getattr(detector, name, None)) is not None:
                handles += _hook(part, _enter_part)
                path = f'{prefix}.{name}' if prefix else name
                layers += [f'{path}.{each}' if each else path for each in layers_with_pooled_terms(part)]
    return PaddingAwareness(model, layers, handles)


def layers_with_pooled_terms(module: nn.Module) -> list[str]:
    """Names of the norms of this package whose output depends on means over the whole map."""
    return [name for name, each in module.named_modules() if isinstance(each, UnifiedNorm) and each.has_pooled_terms]


def _hook(module: nn.Module, enter: Any) -> list[Any]:
    """Register ``enter`` and its end, once, however often the model is switched on."""
    if enter in module._forward_pre_hooks.values():
        return []
    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(_leave, always_call=True),
    ]


# Functions of a module, without state: a copy or a pickle of the model takes them along.


def _stay_out_of_graphs() -> None:
    """What torch.compile meets as an error it leaves to Python: the calls of a part are no part of its graph."""
    if torch.compiler.is_compiling():
        raise RuntimeError('PaddingAwareHook: image sizes cannot be part of a graph: compile without fullgraph=True.')


def _enter_detector(detector: nn.Module, args: tuple, kwargs: dict) -> None:
    _stay_out_of_graphs()
    images, outer = None, areas.innermost()
    # A detector without a backbone, which holds a student and a teacher, calls methods of theirs in its training.
    if not detector.training and not (outer is not None and getattr(outer.owner, 'training', False)):
        inputs, data_samples, *_ = (*args, None, None)
        images = _areas_of(kwargs.get('inputs', inputs), kwargs.get('data_samples', data_samples))
    areas.enter(detector, images, are_maps=False, frame=sys._getframe(1))


def _enter_part(part: nn.Module, args: tuple, kwargs: dict) -> None:
    _stay_out_of_graphs()
    outer = areas.innermost()
    if outer is None and not part.training:
        raise DataError(
            f'PaddingAwareHook: {type(part).__name__} was called outside of a forward of its detector, whose data '
            'samples say where an image ends: call the detector, or remove the hook (ignore_padding(...).remove()).'
        )
    areas.enter(part, None if outer is None else outer.images, frame=sys._getframe(1))


def _leave(module: nn.Module, *_: object) -> None:
    areas.leave(module)


OWN_HOOKS = (_enter_detector, _enter_part, _leave)


def _areas_of(inputs: object, data_samples: Sequence | None) -> ImageAreas | None:
    """The images of a batch; None where they fill it."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        received = str(tuple(inputs.shape)) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise DataError(f'PaddingAwareHook: expected a batch of images (N, C, H, W), got {received}; remove the hook.')
    if len(data_samples or ()) != len(inputs):
        received = 'no' if data_samples is None else str(len(data_samples))
        raise DataError(
            f'PaddingAwareHook: {len(inputs)} images came with {received} data samples, which say where an image ends: '
            'hand them over (inference_detector and test_step do), or remove the hook.'
        )
    batch = int(inputs.shape[2]), int(inputs.shape[3])
    sizes = tuple(_size_of(sample, image) for sample, image in zip(data_samples or (), inputs, strict=True))
    return None if all(size == batch for size in sizes) else ImageAreas(sizes, batch)


def _path_of(sample: Any) -> str:
    return str(getattr(sample, 'img_path', None) or f'the image {getattr(sample, "img_id", "without img_path")}')


def _size_of(sample: Any, x: Tensor) -> tuple[int, int]:
    """Height and width of an image without padding, as :func:`ignore_padding` says.

    Args:
        sample: Its data sample.
        x: What the batch has of it, (C, H, W).
    """
    shape = getattr(sample, 'img_shape', None)
    if shape is None:
        raise DataError(
            "PaddingAwareHook: a data sample has no 'img_shape', which says where the image ends: add it to meta_keys "
            'of PackDetInputs.'
        )
    height, width = int(shape[0]), int(shape[1])
    if height > x.shape[1] or width > x.shape[2]:
        raise DataError(
            f'PaddingAwareHook: img_shape of {_path_of(sample)} is {height}x{width}, which is larger than its batch of '
            f'{x.shape[1]}x{x.shape[2]}: it must be the size of the image in the batch, before padding.'
        )
    own_shape, factor = getattr(sample, 'ori_shape', None), getattr(sample, 'scale_factor', None)
    if own_shape is None or factor is None:
        return height, width
    h, w = round(own_shape[0] * factor[1]), round(own_shape[1] * factor[0])
    if not (0 < h <= height and 0 < w <= width) or (h, w) == (height, width):
        return height, width
    x = x[:, :height, :width]
    if _is_constant(x[:, h:], x[:, :, w:]):
        return h, w
    # Which of them pad on other sides: a flip after Pad, RandomCenterCropPad, LetterResize of MMYOLO. The latter two
    # put half of it at the left or at the top.
    unknown = next((key for key in ('flip', 'border', 'pad_param') if _is_set(getattr(sample, key, None))), None)
    top, left = x[:, : (height - h + 1) // 2], x[:, :, : (width - w + 1) // 2]
    if unknown is not None and (_is_constant(top) or _is_constant(left)):
        raise DataError(
            f'PaddingAwareHook: the pipeline has padded {_path_of(sample)} from {h}x{w} to {height}x{width}, '
            f'and by its {unknown!r} the padding may be on any side: leave padding to the data preprocessor (no Pad in '
            'the pipeline), or remove the hook.'
        )
    return height, width


def _is_constant(*pieces: Tensor) -> bool:
    """Whether the pieces of one image are one number per channel, the same in each; not so where all are empty."""
    pieces = tuple(piece.flatten(1) for piece in pieces if piece.numel() > 0)
    return len(pieces) > 0 and all(bool((piece == pieces[0][:, :1]).all()) for piece in pieces)


def _is_set(value: Any) -> bool:
    return value is not None and bool(torch.as_tensor(value).any())
