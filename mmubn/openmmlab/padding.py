"""Evaluation of MMDetection's detectors in which norms leave out the padding of a batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmubn.deploy import FoldedUBN
from mmubn.layers import UnifiedNorm, areas
from mmubn.layers.areas import ImageAreas, Running
from mmubn.openmmlab.errors import ConfigError, DataError

__all__ = ['PaddingAwareness', 'ignore_padding', 'layers_with_pooled_terms']

PARTS = ('backbone', 'neck')  # whose maps are maps of the batch


_detectors = Running()  # with the images of their batches


class PaddingAwareness:
    """What :func:`ignore_padding` has switched on.

    Attributes:
        layers: Names of the layers that leave out the padding.
    """

    def __init__(self, layers: list[str], handles: list[Any]) -> None:
        self.layers = layers
        self._handles = handles

    def remove(self) -> None:
        """Switch it off again."""
        for handle in self._handles:
            handle.remove()


def ignore_padding(model: nn.Module) -> PaddingAwareness:
    """Let a detector predict for each image as if its batch had no padding, as far as norms of this package go.

    In evaluation every norm of backbone and neck that has pooled terms computes the image's own part of a map alone
    (:func:`mmubn.layers.areas.image_areas`), which the data samples tell: ``img_shape``, or, where a ``Pad`` in the
    pipeline has enlarged it, ``ori_shape`` times ``scale_factor``. Where no image is padded, and in training,
    everything is as before. The heads stay as they are.

    Nothing of it is state of the model: checkpoints, optimizers and module names are as before. A copy of the model is
    switched on too.

    Args:
        model: A detector of MMDetection, or a model that has some, such as ``DetTTAModel``.

    Returns:
        A handle: its ``remove()`` switches it off.

    Raises:
        ConfigError: There is no detector in the model. In a forward, a norm of it is folded.
        DataError: In a forward, there are no data samples, or an image is larger than its batch.
        ValueError: In a forward, a norm of backbone or neck has an input that is no map of the batch.

    Example:
        >>> detector = init_detector(config, checkpoint)
        >>> ignore_padding(detector)
        >>> inference_detector(detector, images)
    """
    from mmdet.models.detectors import BaseDetector

    detectors = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseDetector)]
    detectors = [(name, module) for name, module in detectors if getattr(module, 'backbone', None) is not None]
    if not detectors:
        raise ConfigError(
            f'padding can be told from the image in detectors of MMDetection, and {type(model).__name__} is and has '
            'none: remove PaddingAwareHook (ignore_padding).'
        )
    handles, layers = [], []
    for prefix, detector in detectors:
        handles += _hook(detector, _enter_detector, _leave_detector)
        for name in PARTS:
            if (part := getattr(detector, name, None)) is not None:
                handles += _hook(part, _enter_part, _leave_part)
                path = f'{prefix}.{name}' if prefix else name
                layers += [f'{path}.{each}' if each else path for each in layers_with_pooled_terms(part)]
    return PaddingAwareness(layers, handles)


def layers_with_pooled_terms(module: nn.Module) -> list[str]:
    """Names of the norms of this package whose output depends on means over the whole map."""
    return [
        name
        for name, each in module.named_modules()
        if isinstance(each, UnifiedNorm) and (each.centering or each.scaling is not None)
    ]


def _hook(module: nn.Module, enter: Any, leave: Any) -> list[Any]:
    """Register both, once, however often the model is switched on."""
    if enter in module._forward_pre_hooks.values():
        return []
    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    ]


# Functions of a module, without state: a copy or a pickle of the model takes them along.


def _stay_out_of_graphs() -> None:
    """What torch.compile meets as an error it leaves to Python: the calls of a part are no part of its graph."""
    if torch.compiler.is_compiling():
        raise RuntimeError('PaddingAwareHook: image sizes cannot be part of a graph: compile without fullgraph=True.')


def _enter_detector(detector: nn.Module, args: tuple, kwargs: dict) -> None:
    _stay_out_of_graphs()
    images = None
    if not detector.training:
        inputs, data_samples, *_ = (*args, None, None)
        images = _areas_of(kwargs.get('inputs', inputs), kwargs.get('data_samples', data_samples))
    _detectors.push(detector, images, sys._getframe(1))


def _leave_detector(detector: nn.Module, *_: object) -> None:
    _detectors.pop(detector)


def _enter_part(part: nn.Module, args: tuple, kwargs: dict) -> None:
    _stay_out_of_graphs()
    _detectors.drop_stopped()
    if _detectors.entries:
        images = _detectors.entries[-1][1]
    elif part.training:
        images = None
    else:
        raise DataError(
            f'PaddingAwareHook: {type(part).__name__} was called outside of a forward of its detector, whose data '
            'samples say where an image ends: call the detector, or remove the hook (ignore_padding(...).remove()).'
        )
    if images is not None and any(isinstance(each, FoldedUBN) for each in part.modules()):
        raise ConfigError(
            f'PaddingAwareHook: {type(part).__name__} has folded norms, whose means are over the whole map: evaluate '
            'padded batches with the model as it was before mmubn.fold, or remove the hook.'
        )
    areas.push(part, images, sys._getframe(1))


def _leave_part(part: nn.Module, *_: object) -> None:
    areas.pop(part)


def _areas_of(inputs: object, data_samples: Sequence | None) -> ImageAreas | None:
    """The images of a batch; None where they fill it."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        received = str(tuple(inputs.shape)) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise DataError(f'PaddingAwareHook: expected a batch of images (N, C, H, W), got {received}; remove the hook.')
    if data_samples is None or len(data_samples) != len(inputs):
        received = 'no' if data_samples is None else str(len(data_samples))
        raise DataError(
            f'PaddingAwareHook: {len(inputs)} images came with {received} data samples, which say where an image ends: '
            'hand them over (inference_detector and test_step do), or remove the hook.'
        )
    height, width = inputs.shape[-2:]
    sizes = tuple(_size_of(sample) for sample in data_samples)
    if all(size == (height, width) for size in sizes):
        return None
    for sample, (h, w) in zip(data_samples, sizes, strict=True):
        if h > height or w > width:
            raise DataError(
                f'PaddingAwareHook: img_shape of {_path_of(sample)} is {h}x{w}, which is larger than its batch of '
                f'{height}x{width}: it must be the size of the image in the batch, before padding.'
            )
    return ImageAreas(sizes, (int(height), int(width)))


def _path_of(sample: Any) -> str:
    return str(getattr(sample, 'img_path', None) or f'the image {getattr(sample, "img_id", "without img_path")}')


def _size_of(sample: Any) -> tuple[int, int]:
    """Height and width of the image that a data sample is of, without padding."""
    shape = getattr(sample, 'img_shape', None)
    if shape is None:
        raise DataError(
            "PaddingAwareHook: a data sample has no 'img_shape', which says where the image ends: add it to meta_keys "
            'of PackDetInputs.'
        )
    height, width = int(shape[0]), int(shape[1])
    own_shape, factor = getattr(sample, 'ori_shape', None), getattr(sample, 'scale_factor', None)
    if own_shape is None or factor is None:
        return height, width
    # A Pad in the pipeline writes the padded size into img_shape; what Resize made of the image is known all the same.
    own = round(own_shape[0] * factor[1]), round(own_shape[1] * factor[0])
    if own[0] > height or own[1] > width or own == (height, width):
        return height, width
    # Which of them pad on other sides: a flip after Pad, RandomCenterCropPad, LetterResize of MMYOLO.
    unknown = next((key for key in ('flip', 'border', 'pad_param') if _is_set(getattr(sample, key, None))), None)
    if unknown is not None:
        raise DataError(
            f'PaddingAwareHook: the pipeline has padded {_path_of(sample)} from {own[0]}x{own[1]} to {height}x{width}, '
            f'and by its {unknown!r} the padding may be on any side: leave padding to the data preprocessor (no Pad in '
            'the pipeline), or remove the hook.'
        )
    return own


def _is_set(value: Any) -> bool:
    return value is not None and bool(torch.as_tensor(value).any())
