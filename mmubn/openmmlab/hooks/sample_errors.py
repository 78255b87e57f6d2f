"""An image that cannot be read, in the middle of an epoch and in a worker process: the error names its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mmcv
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from mmubn.openmmlab.errors import DataError

__all__ = ['SampleErrorsHook', 'no_batch']


def no_batch(loader: DataLoader) -> str:
    """What is wrong with the training data loader, if it has no batch."""
    return (
        f'train_dataloader has no batch: its data set has {len(loader.dataset)} images, and drop_last=True leaves out '
        'a batch that is not full; lower train_dataloader.batch_size, or set drop_last=False.'
    )


class SampleErrorsHook(Hook):
    """Makes every error of a data set's pipeline a DataError that names the image.

    And checks that an image has the size that its annotations were made for: a photo that was rotated or scaled since
    has its boxes elsewhere. Under stock mmengine 0.10.7, training by iterations starts its worker processes before any
    hook runs: there it only acts with ``num_workers=0``.
    """

    def before_train(self, runner: Runner) -> None:
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and len(runner.train_dataloader) == 0:
            raise DataError(no_batch(runner.train_dataloader))
        _watch(runner.train_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        _watch(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        _watch(runner.test_dataloader.dataset)


def _watch(dataset: Any) -> None:
    for each in _data_sets(dataset):
        if not isinstance(each.prepare_data, _Watched):
            each.prepare_data = _Watched(each)


def _data_sets(dataset: Any) -> Iterator[BaseDataset]:
    """The data sets that read images, inside those that repeat, balance, join or mix them."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    inner = [getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())]
    for each in inner:
        if each is not None:
            yield from _data_sets(each)


class _Watched:
    """In the place of a data set's ``prepare_data``; a class, which worker processes that are spawned can be sent."""

    def __init__(self, dataset: BaseDataset):
        self.dataset = dataset

    def __call__(self, index: int) -> Any:
        try:
            sample = type(self.dataset).prepare_data(self.dataset, index)
        except DataError:
            raise
        except Exception as error:
            info = self.dataset.get_data_info(index)
            _check_image(info)
            text = ' '.join(str(error).split())
            raise DataError(
                f'{_path(info) or f"sample {index}"}: the pipeline of {type(self.dataset).__name__} ended in '
                f'{type(error).__name__}: {text}'
            ) from error
        if isinstance(sample, dict):
            packed = getattr(sample.get('data_samples'), 'metainfo', {})
            _check_size(self.dataset.get_data_info(index), sample.get('ori_shape') or packed.get('ori_shape'))
        return sample


def _path(info: Any) -> str | None:
    path = info.get('img_path') if isinstance(info, dict) else None
    return path if isinstance(path, str) else None


def _check_image(info: Any) -> None:
    """Raise a DataError if the image of a sample is what its pipeline failed on."""
    path = _path(info)
    if path is None or '://' in path:
        return
    if not Path(path).is_file():
        raise DataError(f'the image {path} does not exist; fetch it, or take it out of the data set.')
    try:
        image = mmcv.imread(path)
    except Exception:  # OpenCV's own of an empty file, for one
        image = None
    if image is None:
        what = 'is broken, or no image' if Path(path).stat().st_size else 'is empty'
        raise DataError(f'the image {path} {what}; fetch or write it again, or take it out of the data set.')
    _check_size(info, image.shape)


def _check_size(info: Any, shape: Sequence[int] | None) -> None:
    if shape is None or not isinstance(info, dict) or not {'height', 'width'} <= info.keys():
        return
    if tuple(shape[:2]) != (info['height'], info['width']):
        raise DataError(
            f'the image {_path(info)} has {shape[1]}x{shape[0]} pixels, and by the annotations '
            f'{info["width"]}x{info["height"]}, so that boxes would lie elsewhere; correct the image (readers turn '
            'one by its EXIF orientation), or its width, height and boxes in the annotations.'
        )
