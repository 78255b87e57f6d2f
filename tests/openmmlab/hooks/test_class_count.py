"""A head with another number of classes than its data is told before the first iteration."""

from types import SimpleNamespace

import pytest
from torch import nn
from torch.utils.data import Dataset

from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.hooks.class_count import ClassCountHook


class Data(Dataset):
    def __init__(self, *classes):
        self.metainfo = dict(classes=classes)


class WithHead(nn.Module):
    def __init__(self, **heads):
        super().__init__()
        for path, count in heads.items():
            parent, head = self, nn.Module()
            *parents, name = path.split('__')
            for part in parents:
                parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            head.num_classes = count
            parent.add_module(name, head)


def runner(model, train, val=None):
    def loader(data):
        return SimpleNamespace(dataset=data)

    return SimpleNamespace(
        model=model,
        train_dataloader=loader(train),
        val_dataloader=loader(val),
        test_dataloader=loader(val),
        val_loop=None if val is None else SimpleNamespace(),
    )


class TestClassCount:
    @pytest.mark.parametrize('name', ['head', 'bbox_head', 'roi_head__bbox_head', 'roi_head__mask_head__0'])
    @pytest.mark.parametrize('count', [1, 3])
    def test_differs(self, name, count):
        model = WithHead(**{name: count})
        place = name.replace('__', r'\.')
        message = rf'model\.{place}\.num_classes is {count}, but the train data set \(Data\) has 2 classes'
        with pytest.raises(ConfigError, match=message):
            ClassCountHook().before_train(runner(model, Data('a', 'b')))

    def test_of_validation_is_told_before_training(self):
        with pytest.raises(ConfigError, match='the val data set'):
            ClassCountHook().before_train(runner(WithHead(head=2), Data('a', 'b'), Data('a')))

    def test_of_test(self):
        with pytest.raises(ConfigError, match='the test data set'):
            ClassCountHook().before_test(runner(WithHead(head=2), Data('a', 'b'), Data('a')))

    @pytest.mark.parametrize(
        'heads', [dict(head=2), dict(rpn_head=1), dict(roi_head__semantic_head=183), dict(backbone=1000), dict(head=-1)]
    )
    def test_agrees_or_is_no_head_for_these_classes(self, heads):
        ClassCountHook().before_train(runner(WithHead(**heads), Data('a', 'b')))

    def test_a_head_of_mmsegmentation_that_finds_boundaries(self):
        head = type('STDCHead', (nn.Module,), {'num_classes': 2})()
        model = WithHead()
        model.auxiliary_head = nn.ModuleList([head])
        ClassCountHook().before_train(runner(model, Data('a', 'b', 'c')))

    def test_without_classes(self):
        ClassCountHook().before_train(runner(WithHead(head=2), Dataset()))

    def test_classes_in_words(self):
        model = WithHead(bbox_head=256)
        model.language_model = nn.Identity()
        ClassCountHook().before_train(runner(model, Data('a')))
