"""What of a checkpoint fits a model: differences that are none, and those that are."""

from collections import OrderedDict

import pytest
import torch
from mmengine.model import BaseTTAModel
from torch import nn

from mmubn import UBN
from mmubn.checkpoints import CheckpointError
from mmubn.openmmlab.checkpoint_fit import describe_file, find_fit, find_weights


class Net(nn.Module):
    def __init__(self, norm=UBN, classes=2, channels=4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, channels, 1), norm(channels))
        self.head = nn.Linear(channels, classes)
        self.register_buffer('mean', torch.zeros(3), persistent=False)


class Merging(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        raise NotImplementedError


def weights_of(net, **others):
    return {**net.state_dict(), **others}


class TestWhole:
    @pytest.mark.parametrize(
        'checkpoint',
        [
            weights_of(Net(nn.BatchNorm2d)),
            {'state_dict': weights_of(Net())},
            {f'module.{key}': value for key, value in weights_of(Net()).items()},
            {key: value for key, value in weights_of(Net()).items() if 'num_batches_tracked' not in key},
            weights_of(Net(), mean=torch.ones(3)),
        ],
        ids=['BatchNorm', 'state_dict', 'module', 'old BatchNorm', 'buffer not saved today'],
    )
    @pytest.mark.parametrize('wrapped', [False, True], ids=['model', 'TTA'])
    def test_no_difference(self, checkpoint, wrapped):
        model = Net()
        model.test_step = None
        weights = find_weights(checkpoint, 'file')
        fit = find_fit(Merging(model) if wrapped else model, weights)
        assert fit.is_whole, str(fit)
        assert fit.loaded == fit.total > 5

    def test_versions_of_modules_are_kept(self):
        weights = Net(nn.BatchNorm2d).state_dict()
        assert find_weights({'state_dict': weights}, 'file')._metadata == weights._metadata
        assert type(find_weights(dict(weights), 'file')) is OrderedDict

    def test_a_module_may_take_keys_away(self):
        net = Net()
        net.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
        assert find_fit(net, {'head.bias': torch.ones(2)}).is_whole


class TestPartial:
    def test_other_classes(self):
        fit = find_fit(Net(classes=3), weights_of(Net()))
        assert 'head.weight is (2, 4) there and (3, 4) here, head.bias is (2) there and (3) here' in str(fit)
        assert str(fit).startswith('2 keys have another shape')
        assert fit.total - fit.loaded == 2

    def test_missing_and_unexpected(self):
        weights = weights_of(Net())
        del weights['head.weight']
        weights['neck.weight'] = torch.ones(1)
        fit = find_fit(Net(), weights)
        assert str(fit) == (
            f'1 of the {fit.total} keys of the model are missing (head.weight); 1 key is not in the model (neck.weight)'
        )

    def test_a_norm_that_refuses_its_entries(self):
        weights = weights_of(Net())
        del weights['backbone.1.scale_bias']
        fit = find_fit(Net(), weights)
        assert 'backbone.1.scale_bias is missing' in str(fit)
        assert len(fit.refused) == 1
        assert fit.loaded == 4, 'convolution and head'

    def test_nothing(self):
        fit = find_fit(Net(), {'conv.weight': torch.ones(1)})
        assert fit.loaded == 0
        assert f'{fit.total} of the {fit.total} keys' in str(fit)
        assert '10 more' in str(fit)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ([1], 'holds a list'),
        (torch.ones(1), 'holds a Tensor'),
        ({}, 'it holds nothing'),
        ({'epoch': 3, 'net': {}}, 'it holds epoch, net'),
        ({'state_dict': {}}, 'it holds state_dict'),
        ({'state_dict': [1]}, 'it holds state_dict'),
    ],
)
def test_no_weights(content, message):
    with pytest.raises(CheckpointError, match=f'file .*{message}'):
        find_weights(content, 'file')


def test_what_a_file_is():
    meta = dict(cfg="model = dict(type='mmdet.MaskRCNN')", epoch=12, dataset_meta=dict(classes=('cat', 'd\x1bg')))
    text = describe_file({'meta': meta}, weights_of(Net()))
    assert text == (
        'The file is from a training of MaskRCNN, epoch 12, 2 classes (cat, d?g); its keys start with backbone (12), '
        'head (2)'
    )
    assert describe_file({'meta': 3}, {'a': 1}) == "The file's keys start with a"
