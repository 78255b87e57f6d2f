"""A checkpoint whose classes are called otherwise than those of the data is told, and what the data checks found."""

from types import SimpleNamespace

import pytest

from mmubn.openmmlab.hooks.class_names import ClassNamesHook

CLASSES = ('cat', 'dog', 'lamp')


class Runner:
    """What the hook uses of one."""

    def __init__(self, classes, resume=False):
        dataset = SimpleNamespace() if classes is None else SimpleNamespace(metainfo=dict(classes=classes))
        self.train_dataloader = self.test_dataloader = SimpleNamespace(dataset=dataset)
        self._resume, self._load_from = resume, 'a.pth'
        self.warnings = []
        self.logger = SimpleNamespace(warning=self.warnings.append)


def warnings(meta, classes, training=False, resume=False, notes=()):
    runner, hook = Runner(classes, resume), ClassNamesHook(notes)
    if meta is not None:
        hook.after_load_checkpoint(runner, dict(meta=meta))
    (hook.before_train if training else hook.before_test)(runner)
    return runner.warnings


@pytest.mark.parametrize('meta', [dict(dataset_meta=dict(classes=CLASSES)), dict(CLASSES=list(CLASSES))])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(
    ('classes', 'what', 'label'),
    [
        (('dog', 'cat', 'lamp'), 'in another order', "label 0 is 'cat' there and 'dog'"),
        (('cat', 'dog', 'sofa'), 'of other names', "label 2 is 'lamp' there and 'sofa'"),
    ],
)
def test_others(meta, training, classes, what, label):
    (line,) = warnings(meta, classes, training)
    assert f'a.pth was trained on classes {what}: {label} in the {"train" if training else "test"} data set' in line
    assert "checkpoint: 'cat', 'dog', 'lamp'; data set: " in line


@pytest.mark.parametrize('classes', [CLASSES, list(CLASSES), ('cat', 'dog'), None])
def test_the_same_or_another_number(classes):
    """A head of another number of classes does not load."""
    assert warnings(dict(dataset_meta=dict(CLASSES=CLASSES)), classes) == []


@pytest.mark.parametrize('meta', [None, {}, dict(dataset_meta=None), dict(dataset_meta=dict(classes=None))])
def test_a_checkpoint_without(meta):
    assert warnings(meta, CLASSES) == []


def test_resumed():
    """MMEngine compares all of the dataset_meta then."""
    assert warnings(dict(CLASSES=CLASSES), CLASSES[::-1], training=True, resume=True) == []


@pytest.mark.parametrize('training', [False, True])
def test_notes(training):
    assert warnings(None, None, training, notes=['one', 'two']) == ['one', 'two']
