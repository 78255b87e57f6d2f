"""Names of classes: what the data checks found, and a checkpoint whose classes are called otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmubn.openmmlab.annotation_checks import listed

__all__ = ['ClassNamesHook']


class ClassNamesHook(Hook):
    """Warns where the checkpoint's head was trained on as many classes of other names, or in another order.

    A head of another number of classes does not load (:mod:`mmubn.openmmlab.hooks.class_count` checks the new one). A
    run that resumes is left to MMEngine, which compares all of ``dataset_meta``.

    Args:
        notes: Lines for the log of the run, which begins after they were found.
    """

    def __init__(self, notes: Sequence[str] = ()):
        self.notes = notes
        self.trained: list[str] = []

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        meta = checkpoint.get('meta') or {}
        names = {key.lower(): value for key, value in (meta.get('dataset_meta') or meta).items()}.get('classes')
        self.trained = list(names) if isinstance(names, (tuple, list)) else []

    def before_train(self, runner: Runner) -> None:
        if not runner._resume:
            self._compare(runner, 'train', runner.train_dataloader)
        self._tell(runner)

    def before_test(self, runner: Runner) -> None:
        self._compare(runner, 'test', runner.test_dataloader)
        self._tell(runner)

    def _compare(self, runner: Runner, split: str, dataloader: DataLoader) -> None:
        own = list(getattr(dataloader.dataset, 'metainfo', {}).get('classes') or ())
        if len(own) != len(self.trained) or own == self.trained:
            return
        what = 'in another order' if sorted(own) == sorted(self.trained) else 'of other names'
        label = next(i for i in range(len(own)) if own[i] != self.trained[i])
        effect = 'Predictions count and are drawn as' if split == 'test' else 'Its head is trained further, for'
        runner.logger.warning(
            f'The checkpoint {runner._load_from} was trained on classes {what}: label {label} is '
            f'{self.trained[label]!r} there and {own[label]!r} in the {split} data set (checkpoint: '
            f'{listed(self.trained)}; data set: {listed(own)}). {effect} those of the data set.'
        )

    def _tell(self, runner: Runner) -> None:
        for note in self.notes:
            runner.logger.warning(note)
