"""BNET's released networks name the third norm of a block bnet3: its entries are read under that name everywhere."""

import copy
import pickle

import pytest
import torch
from cli import call
from helpers import batch
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from released_bnet import ResNet, detector_file, imagenet_file, named_as_before, prefixed, resnet
from torch import nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

import mmubn
from mmubn import BNET, UBN, convert_norms
from mmubn.checkpoints import CheckpointError
from mmubn.checkpoints.names import find_released_names, with_own_names
from mmubn.openmmlab.checkpoint_fit import find_fit


class Net(nn.Module):
    """Norms of ours under each name that BNET's networks may have another name for."""

    def __init__(self, norm=BNET, names=('bn', 'bn1', 'bn3')):
        super().__init__()
        for name in names:
            self.add_module(name, norm(4))
        self.conv = nn.Conv2d(3, 4, 1)


def network(norm='BNET', where='layer?.*.bn3', kernel_size=5):
    """The network of the same layers with BatchNorm, converted."""
    model = ResNet(depth=14, kernel_size=None, classes=3)
    return convert_norms(model, norm, where, kernel_size=kernel_size).eval()


@pytest.fixture(scope='module')
def released():
    return resnet(depth=14, classes=3)


X = batch((2, 3, 48, 48))


@torch.no_grad()
def assert_same(model, released):
    for found, expected in zip(model.eval()(X), released(X), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


LOADS = {
    'torch': lambda model, state_dict: model.load_state_dict(state_dict),
    'mmengine': lambda model, state_dict: mmengine_load_state_dict(model, state_dict, strict=True),
    'convert_state_dict': lambda model, state_dict: model.load_state_dict(mmubn.convert_state_dict(model, state_dict)),
}


@pytest.mark.parametrize('names', [dict, named_as_before], ids=['released', 'before'])
@pytest.mark.parametrize('load', LOADS)
def test_the_same_function(load, names, released):
    model = network()
    state_dict = names(released.state_dict())
    keys = list(state_dict)
    LOADS[load](model, state_dict)
    assert list(state_dict) == keys, "the caller's state dict stays as it was"
    assert_same(model, released)
    model.load_state_dict(model.state_dict())  # and its own is read as ever


def test_ubn_everywhere(released):
    """The types that have all of BNET's function read it too, beside BatchNorm."""
    model = network('UBN', None)
    assert model.load_state_dict(released.state_dict()) == ([], [])
    assert_same(model, released)


def test_norms_that_torchvision_s_network_was_built_with():
    released = resnet(depth=14, width=64, classes=3)
    model = TorchvisionResNet(
        Bottleneck, (1, 1, 1, 1), num_classes=3, norm_layer=lambda channels: BNET(channels, kernel_size=7)
    ).eval()
    model.load_state_dict(released.state_dict())
    with torch.no_grad():
        expected = released.fc(released(X)[-1].mean((2, 3)))
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_read_it_too(copied, released):
    model = copied(network())
    model.load_state_dict(released.state_dict())
    assert_same(model, released)
    assert len(model.layer1[0]._load_state_dict_pre_hooks) == 1


def entries(prefix, kernel_size=3):
    values = dict(running_mean=torch.randn(4), running_var=torch.rand(4) + 1)
    values |= {'bnconv.weight': torch.randn(4, 1, kernel_size, kernel_size), 'bnconv.bias': torch.randn(4)}
    return prefixed(values, prefix)


def test_every_number():
    model, state_dict = Net(), {**entries('bnet.'), **entries('bnet1.'), **entries('bnet3.')}
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    assert (missing, unexpected) == (['conv.weight', 'conv.bias'], [])
    for name in ('bn', 'bn1', 'bn3'):
        kernel = state_dict[f'{name.replace("bn", "bnet")}.bnconv.weight']
        assert torch.equal(getattr(model, name).weight, kernel[:, 0, 1, 1])


def test_blocks_of_both_kinds_are_unambiguous(released):
    """A file in which some blocks were renamed whole."""
    state_dict = {key.replace('layer2.0.bnet3', 'layer2.0.bn3'): value for key, value in released.state_dict().items()}
    model = network()
    model.load_state_dict(state_dict)
    assert_same(model, released)


TWICE = (
    r'one norm has entries under two names, (\w+\.0\.)?bn3 \(running_mean\) and (\w+\.0\.)?bnet3 \(bnconv\.bias, '
    r'bnconv\.weight, .*running_var\), as in a file that was renamed in part: expected one name for all entries of a '
    r'layer, .*; take the original file\.'
)


class TestRenamedInPart:
    @pytest.fixture
    def state_dict(self, released):
        state_dict = dict(released.state_dict())
        state_dict['layer1.0.bn3.running_mean'] = state_dict.pop('layer1.0.bnet3.running_mean')
        return state_dict

    @pytest.mark.parametrize('load', LOADS)
    def test_is_an_error(self, load, state_dict):
        with pytest.raises(CheckpointError, match=TWICE):
            LOADS[load](network(), state_dict)

    def test_of_a_tool(self, state_dict):
        fit = find_fit(network(), state_dict)
        assert len(fit.refused) == 1
        assert 'layer1.0.bn3 (running_mean)' in fit.refused[0]

    def test_of_the_converter(self, state_dict, tmp_path, monkeypatch, capsys):
        torch.save(state_dict, tmp_path / 'part.pth')
        arguments = [tmp_path / 'part.pth', tmp_path / 'out.pth', '--to', 'bnet']
        assert call(monkeypatch, 'model_converters/convert_norm.py', *arguments) == 2
        assert 'nothing was written: one norm has entries under two names' in capsys.readouterr().err
        assert not (tmp_path / 'out.pth').exists()

    def test_of_both_whole(self):
        with pytest.raises(CheckpointError, match=r'two names, bn3 \(bnconv\.bias.* and bnet3 \(bnconv\.bias'):
            Net().load_state_dict({**entries('bn3.'), **entries('bnet3.')}, strict=False)


class TestLeftAlone:
    def test_a_network_that_has_these_names(self):
        model = Net(names=('bnet3', 'bn1'))
        missing, unexpected = model.load_state_dict({**entries('bnet3.'), **entries('bnet1.')}, strict=False)
        assert (missing, unexpected) == (['conv.weight', 'conv.bias'], [])

    def test_both_in_one_network(self):
        model = Net(names=('bnet3', 'bn3'))
        state_dict = {**entries('bnet3.'), **entries('bn3.')}
        model.load_state_dict(state_dict, strict=False)
        assert torch.equal(model.bn3.weight, state_dict['bn3.bnconv.weight'][:, 0, 1, 1])
        assert torch.equal(model.bnet3.weight, state_dict['bnet3.bnconv.weight'][:, 0, 1, 1])

    def test_norms_of_others(self):
        """A BatchNorm cannot have the function, and says what is missing as ever."""
        missing, unexpected = Net(nn.BatchNorm2d, ('bn3',)).load_state_dict(entries('bnet3.'), strict=False)
        assert 'bn3.weight' in missing
        assert 'bnet3.bnconv.weight' in unexpected

    def test_without_a_norm_of_that_number(self):
        state_dict = {**entries('bnet2.'), **entries('sub.bnet1.')}
        _, unexpected = Net().load_state_dict(state_dict, strict=False)
        assert sorted(unexpected) == sorted(state_dict)

    @pytest.mark.parametrize('key', ['subnet1.weight', 'bnet3', 'bnet3.a.b', 'bn3.bnconv.weight', 'xbnet3.weight'])
    def test_other_keys(self, key):
        assert find_released_names([key]) == {}
        state_dict = {key: 1}
        assert with_own_names(state_dict) is state_dict

    def test_one_hook_in_each_module_with_such_a_norm(self):
        model = Net()
        model.bn1 = UBN(4)
        assert len(model._load_state_dict_pre_hooks) == 1
        assert not Net(nn.BatchNorm2d)._load_state_dict_pre_hooks
        assert not Net(names=('norm',))._load_state_dict_pre_hooks


class TestConverter:
    """tools/model_converters/convert_norm.py on whole files."""

    @pytest.fixture
    def run(self, monkeypatch, capsys):
        def run(*arguments):
            return call(monkeypatch, 'model_converters/convert_norm.py', *arguments), ''.join(capsys.readouterr())

        return run

    @pytest.mark.parametrize('wrap', [detector_file, imagenet_file])
    @pytest.mark.parametrize('names', [dict, named_as_before], ids=['released', 'before'])
    def test_to_our_layout(self, tmp_path, run, released, wrap, names):
        prefix = 'module.'
        torch.save(wrap(prefixed(names(released.state_dict()), prefix)), tmp_path / 'src.pth')
        status, output = run(tmp_path / 'src.pth', tmp_path / 'dst.pth', '--to', 'bnet')
        assert status == 0, output
        assert '4 layers to BNET: 4 from released BNET; BatchNorms left as they are: 13' in output
        content = torch.load(tmp_path / 'dst.pth', weights_only=False)
        state_dict = {key.removeprefix(prefix): value for key, value in content['state_dict'].items()}
        assert not [key for key in state_dict if 'bnet' in key or 'bnconv' in key]
        model = network()
        assert state_dict.keys() == model.state_dict().keys(), 'nothing is left to be converted by the layers'
        model.load_state_dict(state_dict)
        assert_same(model, released)

    @pytest.mark.parametrize('names', [dict, named_as_before], ids=['released', 'before'])
    def test_to_their_layout(self, tmp_path, run, released, names):
        """From all that there is of it, which is read and written by the tool, the network's own state dict too."""
        model = network()
        model.load_state_dict(released.state_dict())
        for state_dict in (names(released.state_dict()), model.state_dict()):
            torch.save(state_dict, tmp_path / 'src.pth')
            status, output = run(tmp_path / 'src.pth', tmp_path / 'dst.pth', '--to', 'bnet-released')
            assert status == 0, output
            assert 'BatchNorms left as they are: 13' in output
            found = torch.load(tmp_path / 'dst.pth')
            assert found.keys() == released.state_dict().keys()
            assert all(torch.equal(found[key], value) for key, value in released.state_dict().items())

    def test_to_batch_norm(self, tmp_path, run, released):
        torch.save(dict(released.state_dict()), tmp_path / 'src.pth')
        status, output = run(tmp_path / 'src.pth', tmp_path / 'dst.pth', '--to', 'bn')
        assert status == 2
        assert 'layer1.0.bn3.bnconv.weight of released BNET: expected zeros' in output
        assert 'The file has it under layer1.0.bnet3.' in output
