"""A head with too few classes dies in the loss, on a GPU without saying why; one with too many trains."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmubn.openmmlab.errors import ConfigError

__all__ = ['ClassCountHook']


class ClassCountHook(Hook):
    """Checks that every head has as many classes as the data sets that it is trained and evaluated on.

    A head is a module called ``head`` or ``..._head``, or an element of a list of that name, with a ``num_classes``.
    Left out are ``rpn_head``, which knows no classes, ``semantic_head``, which has others, MMSegmentation's STDCHead,
    whose two classes are boundary and none, and models that get the classes in words (``language_model``).

    Raises:
        ConfigError: Before the first iteration. Names the head and both counts.
    """

    def before_train(self, runner: Runner) -> None:
        self._check(runner, 'train', runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner, 'val', runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        self._check(runner, 'test', runner.test_dataloader)

    def _check(self, runner: Runner, split: str, dataloader: DataLoader) -> None:
        classes = getattr(dataloader.dataset, 'metainfo', {}).get('classes')
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if classes is None or hasattr(model, 'language_model'):
            return
        for name, head in model.named_modules():
            count = getattr(head, 'num_classes', None)
            if not _is_head(name) or type(head).__name__ == 'STDCHead':
                continue
            if isinstance(count, int) and count > 0 and count != len(classes):
                raise ConfigError(
                    f'model.{name}.num_classes is {count}, but the {split} data set '
                    f'({type(dataloader.dataset).__name__}) has {len(classes)} classes; set num_classes to '
                    f'{len(classes)}, or correct {split}_dataloader.dataset (its type, data_root or metainfo.classes).'
                )


def _is_head(name: str) -> bool:
    own = name.rstrip('.0123456789').rpartition('.')[2]
    return own == 'head' or (own.endswith('_head') and own not in ('rpn_head', 'semantic_head'))
