"""init_cfg with strict=True: exactly the weights of the checkpoint, or an error that says what is wrong."""

from argparse import Namespace

import mmengine.runner.checkpoint
import pytest
import torch
from mmdet.registry import MODELS as DETECTION_MODELS
from mmengine.model import BaseModule
from mmengine.registry import WEIGHT_INITIALIZERS
from mmpretrain.registry import MODELS as CLASSIFICATION_MODELS
from torch import nn
from torchvision.models import resnet18

import mmubn
from mmubn.openmmlab.pretrained import PretrainedInit


def randomize(module):
    """Give every tensor values that no initializer gives."""
    generator = torch.Generator().manual_seed(0)
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        else:
            value.fill_(7)
        assert value.numel(), key
    return module


def classifier(norm='UBN', depth=18):
    """An MMPretrain classifier with a narrow ResNet."""
    backbone = dict(type='ResNet', depth=depth, stem_channels=8, base_channels=8, norm_cfg=dict(type=norm))
    head = dict(type='LinearClsHead', num_classes=10, in_channels=64 if depth == 18 else 256)
    return randomize(
        CLASSIFICATION_MODELS.build(
            dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
        )
    )


def backbone(init_cfg, norm='UBN', channels=8):
    """The same network in MMDetection, initialised as a detector does."""
    cfg = dict(type='ResNet', depth=18, stem_channels=channels, base_channels=channels, norm_cfg=dict(type=norm))
    module = DETECTION_MODELS.build(dict(cfg, init_cfg=dict(type='Pretrained', **init_cfg)))
    module.init_weights()
    return module


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'classifier.pth')


def save(path, state_dict, key='state_dict', **others):
    torch.save({key: state_dict, **others} if key else state_dict, path)
    return dict(checkpoint=path, strict=True)


@pytest.mark.parametrize('norm', ['UBN', 'SyncUBN', 'RBN', 'BNET', 'IEBN', 'UnitizedBN', 'BN'])
def test_a_classifier_of_mmpretrain(path, norm):
    state_dict = classifier(norm).state_dict()
    module = backbone(save(path, state_dict, meta=dict(epoch=100)) | dict(prefix='backbone.'), norm)
    found = module.state_dict()
    assert len(found) + 2 == len(state_dict), 'the head has a weight and a bias'
    for key, value in found.items():
        assert torch.equal(value, state_dict[f'backbone.{key}']), key


@pytest.mark.parametrize(
    ('key', 'others', 'module_prefix'),
    [
        ('model', dict(epoch=89, args=Namespace(lr=0.1)), ''),
        ('model', {}, 'module.'),
        (None, {}, ''),
        ('state_dict', {}, ''),
    ],
    ids=['training script', 'of DistributedDataParallel', 'state dict', 'state_dict'],
)
def test_a_checkpoint_of_torchvision(path, key, others, module_prefix):
    """Of BatchNorm, with its classifier: the backbone with UBN computes the same features."""
    source = resnet18().eval()
    for layer in source.modules():
        if isinstance(layer, nn.BatchNorm2d):
            randomize(layer)
    state_dict = {module_prefix + name: value for name, value in source.state_dict().items()}
    module = backbone(save(path, state_dict, key, **others), channels=64)
    module.eval()
    assert sum(isinstance(layer, mmubn.UBN) for layer in module.modules()) == 20
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = module(x)
        expected = source.maxpool(source.relu(source.bn1(source.conv1(x))))
        for stage, features in enumerate(found, 1):
            expected = getattr(source, f'layer{stage}')(expected)
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


class TestErrors:
    """Each of them only a warning in MMEngine, or an error that does not say what to do."""

    @pytest.fixture
    def state_dict(self):
        return classifier().state_dict()

    def error(self, init_cfg, **kwargs):
        with pytest.raises(ValueError, match=r'classifier\.pth') as error:
            backbone(init_cfg, **kwargs)
        message = str(error.value)
        assert '\n' not in message
        return message

    def test_missing(self, path, state_dict):
        del state_dict['backbone.layer3.1.conv2.weight']
        message = self.error(save(path, state_dict) | dict(prefix='backbone.'))
        assert 'layer3.1.conv2.weight is missing' in message
        assert 'strict=False' in message

    def test_a_whole_norm_is_missing(self, path, state_dict):
        state_dict = {key: value for key, value in state_dict.items() if '.layer4.0.bn2.' not in key}
        message = self.error(save(path, state_dict) | dict(prefix='backbone.'))
        assert 'layer4.0.bn2.weight, layer4.0.bn2.bias' in message
        assert 'are missing' in message

    def test_unexpected(self, path, state_dict):
        state_dict['backbone.layer5.conv.weight'] = torch.zeros(1)
        message = self.error(save(path, state_dict) | dict(prefix='backbone.'))
        assert 'layer5.conv.weight is unexpected' in message

    def test_another_width(self, path, state_dict):
        message = self.error(save(path, state_dict) | dict(prefix='backbone.'), channels=16)
        assert '8' in message
        assert '16' in message

    def test_another_shape_of_a_convolution(self, path, state_dict):
        state_dict['backbone.conv1.weight'] = torch.zeros(8, 3, 3, 3)
        message = self.error(save(path, state_dict) | dict(prefix='backbone.'))
        assert 'conv1.weight' in message
        assert '[8, 3, 3, 3]' in message

    def test_another_depth(self, path):
        init_cfg = save(path, classifier(depth=50).state_dict()) | dict(prefix='backbone.')
        assert 'does not fit this ResNet' in self.error(init_cfg)

    def test_another_norm(self, path, state_dict):
        """A trained UBN in a backbone of BatchNorm would lose what UBN adds."""
        message = self.error(save(path, state_dict) | dict(prefix='backbone.'), norm='BN')
        assert 'neighbor_weight' in message

    def test_a_classifier_without_prefix(self, path, state_dict):
        message = self.error(save(path, state_dict))
        assert 'conv1.weight' in message
        assert "'backbone.' in one of MMPretrain" in message

    @pytest.mark.parametrize('prefix', ['backbone.', 'model.backbone'])
    def test_a_prefix_that_no_key_has(self, path, prefix):
        message = self.error(save(path, resnet18().state_dict(), 'model') | dict(prefix=prefix), channels=64)
        assert prefix in message
        assert 'its keys start with conv1, bn1, layer1' in message
        assert 'None in one of torchvision' in message

    def test_only_fc_may_be_too_many(self, path):
        state_dict = resnet18().state_dict() | {'aux.weight': torch.zeros(1)}
        message = self.error(save(path, state_dict, 'model'), channels=64)
        assert 'aux.weight is unexpected' in message
        assert 'fc.' not in message

    def test_fc_under_a_prefix(self, path, state_dict):
        state_dict['backbone.fc.weight'] = torch.zeros(1)
        assert 'fc.weight is unexpected' in self.error(save(path, state_dict) | dict(prefix='backbone.'))

    def test_no_state_dict(self, path):
        torch.save({'epoch': 3}, path)
        assert 'expected a state dict' in self.error(dict(checkpoint=path, strict=True))

    def test_in_every_process(self, path, state_dict, monkeypatch):
        """MMEngine tells the first process alone; the others would go on, and wait for it."""
        monkeypatch.setattr(mmengine.runner.checkpoint, 'get_dist_info', lambda: (1, 2))
        del state_dict['backbone.conv1.weight']
        assert 'conv1.weight is missing' in self.error(save(path, state_dict) | dict(prefix='backbone.'))


class TestAsInMMEngine:
    def test_by_default_it_warns(self, path):
        state_dict = classifier().state_dict()
        kept = state_dict.pop('backbone.conv1.weight')
        init_cfg = save(path, state_dict) | dict(prefix='backbone.')
        del init_cfg['strict']
        module = backbone(init_cfg)
        assert not torch.equal(module.conv1.weight, kept)
        assert torch.equal(module.layer1[0].conv1.weight, state_dict['backbone.layer1.0.conv1.weight'])

    @pytest.mark.parametrize('key', ['model', 'state_dict', None])
    def test_where_the_weights_are_is_found(self, path, key):
        init_cfg = save(path, resnet18().state_dict(), key) | dict(strict=False)
        module = backbone(init_cfg, channels=64)
        content = torch.load(path, weights_only=True)
        assert torch.equal(module.conv1.weight, (content[key] if key else content)['conv1.weight'])

    def test_what_it_loads_is_noted(self, path):
        """In the list of initialisations that MMEngine writes to the log of a run."""

        class Parent(BaseModule):
            def __init__(self, init_cfg):
                super().__init__(init_cfg)
                self.conv = nn.Conv2d(1, 1, 1)

        torch.save(nn.ModuleDict({'conv': nn.Conv2d(1, 1, 1)}).state_dict(), path)
        for strict in (False, True):
            parent = Parent(dict(type='Pretrained', checkpoint=path, strict=strict))
            seen = []
            parent._dump_init_info = lambda parent=parent, seen=seen: seen.extend(parent._params_init_info.values())
            parent.init_weights()
            assert [each['init_info'] for each in seen] == [f'PretrainedInit: load from {path}'] * 2

    def test_a_prefix_that_no_key_has_is_an_error(self, path):
        init_cfg = save(path, resnet18().state_dict()) | dict(strict=False, prefix='backbone.')
        with pytest.raises(ValueError, match=r'classifier\.pth has no key that starts with backbone\., .*conv1, bn1'):
            backbone(init_cfg, channels=64)

    def test_no_state_dict(self, path):
        torch.save([1, 2], path)
        with pytest.raises(ValueError, match=r'classifier\.pth is no checkpoint: it holds a list'):
            backbone(dict(checkpoint=path))

    def test_registered_under_its_name(self):
        assert WEIGHT_INITIALIZERS.get('Pretrained') is PretrainedInit

    def test_the_children_s_initializers_do_not_run_afterwards(self, path):
        """An initializer of any other name would be undone by them."""

        class Child(BaseModule):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(3))

            def init_weights(self):
                nn.init.ones_(self.weight)

        class Parent(BaseModule):
            def __init__(self, init_cfg):
                super().__init__(init_cfg)
                self.child = Child()

        torch.save({'child.weight': torch.full((3,), 5.0)}, path)
        parent = Parent(dict(type='Pretrained', checkpoint=path, strict=True))
        parent.init_weights()
        assert parent.child.weight.tolist() == [5, 5, 5]
