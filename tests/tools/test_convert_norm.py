"""tools/model_converters/convert_norm.py."""

import argparse
import errno
import os
import zipfile

import pytest
import torch
from cli import call
from torch import nn

from mmubn import BNET, IEBN, RBN, UBN, UnitizedBN

TOOL = 'model_converters/convert_norm.py'


@pytest.fixture
def run(monkeypatch, capsys):
    """The tool in this process: (exit status, what it said)."""

    def run(*arguments):
        return call(monkeypatch, TOOL, *arguments), ''.join(capsys.readouterr())

    return run


def network(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1), norm(4))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.dim():
                tensor.normal_()
    return model.eval()


@pytest.mark.parametrize('wrapper', ['plain', 'model', 'state_dict'])
def test_there_and_back(tmp_path, run, wrapper):
    model, x = network(nn.BatchNorm2d), torch.randn(2, 3, 8, 8)
    rest = {
        'plain': {},
        'model': {'args': argparse.Namespace(lr=0.1), 'epoch': 3},
        'state_dict': {'meta': {'epoch': 3}, 'ema_state_dict': model.state_dict(), 'optimizer': {'state': {}}},
    }[wrapper]
    source, converted, back = (tmp_path / f'{name}.pth' for name in ('source', 'converted', 'back'))
    torch.save({wrapper: model.state_dict(), **rest} if rest else model.state_dict(), source)

    status, output = run(source, converted, '--to', 'ubn')
    assert status == 0, output
    assert '2 layers to UBN: 2 from BatchNorm' in output
    assert ('do not resume' in output) == ('optimizer' in rest)
    content = torch.load(converted, weights_only=False)
    state_dict = content[wrapper] if rest else content
    other = network(UBN)
    # Already in UBN's own layout: nothing is left to be converted by the layer.
    assert {key: value.shape for key, value in state_dict.items()} == {
        key: value.shape for key, value in other.state_dict().items()
    }
    other.load_state_dict(state_dict)
    with torch.no_grad():
        assert torch.allclose(other(x), model(x), rtol=1e-4, atol=1e-5)
    assert {key: content[key] for key in rest if key != 'ema_state_dict'} == {
        key: value for key, value in rest.items() if key != 'ema_state_dict'
    }
    if 'ema_state_dict' in rest:
        assert content['ema_state_dict'].keys() == state_dict.keys()

    status, output = run(converted, back, '--to', 'bn')
    assert status == 0, output
    content = torch.load(back, weights_only=False)
    state_dict = content[wrapper] if rest else content
    assert list(state_dict) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.allclose(state_dict[key], value, rtol=1e-6), key


@pytest.mark.parametrize(('norm', 'to'), [(RBN, 'rbn'), (BNET, 'bnet'), (IEBN, 'iebn'), (UnitizedBN, 'unitizedbn')])
def test_batch_norm_to_each_type_and_back(tmp_path, run, norm, to):
    model, other, x = network(nn.BatchNorm2d), network(norm), torch.randn(2, 3, 8, 8)
    source, converted, back = (tmp_path / f'{name}.pth' for name in ('source', 'converted', 'back'))
    torch.save(model.state_dict(), source)
    status, output = run(source, converted, '--to', to)
    assert status == 0, output
    assert f'2 layers to {norm.__name__}: 2 from BatchNorm' in output
    assert torch.load(converted).keys() == other.state_dict().keys()
    other.load_state_dict(torch.load(converted))
    with torch.no_grad():
        assert torch.allclose(other(x), model(x), rtol=1e-4, atol=1e-5)
    status, output = run(converted, back, '--to', 'bn')
    assert status == 0, output
    for key, value in torch.load(back).items():
        assert torch.allclose(value, model.state_dict()[key], rtol=1e-6), key


@pytest.mark.parametrize(
    ('norm', 'key', 'shape'),
    [
        (RBN, 'center_weight', (1, 8, 1, 1)),
        (BNET, 'bnconv.weight', (8, 1, 3, 3)),
        (IEBN, 'weight_readjust', (1, 8, 1, 1)),
    ],
)
def test_to_the_layout_of_the_authors_and_back(tmp_path, run, norm, key, shape):
    to = norm.__name__.lower()
    model = network(norm)
    source, released, back = (tmp_path / f'{name}.pth' for name in ('source', 'released', 'back'))
    torch.save(model.state_dict(), source)
    status, output = run(source, released, '--to', f'{to}-released')
    assert status == 0, output
    assert f'2 layers to released {norm.__name__}: 2 from {norm.__name__}' in output
    assert torch.load(released)[f'1.{key}'].shape == shape
    status, output = run(released, back, '--to', to)
    assert status == 0, output
    content = torch.load(back)
    assert content.keys() == model.state_dict().keys()
    assert all(torch.equal(content[key], value) for key, value in model.state_dict().items())


def test_released_layout_needs_the_argument_of_the_layers(tmp_path, run):
    source, converted = tmp_path / 'source.pth', tmp_path / 'converted.pth'
    torch.save({'state_dict': network(UBN).state_dict()}, source)
    status, output = run(source, converted, '--to', 'ubn-released')
    assert status == 2
    assert 'error: nothing was written: 1.bias of UBN has no exact equal in the layout of released UBN' in output
    assert not converted.exists()
    status, output = run(source, converted, '--to', 'ubn-released', '--calibrate-bias')
    assert status == 0, output
    assert torch.load(converted)['state_dict']['1.bnconv.weight'].shape == (8, 1, 3, 3)


def test_refuses_with_one_line(tmp_path, run):
    source, target, text = tmp_path / 'source.pth', tmp_path / 'target.pth', tmp_path / 'text.pth'
    text.write_text('no checkpoint')
    letters, empty = tmp_path / 'letters.pth', tmp_path / 'empty.pth'
    letters.write_text('abc')  # which unpickling takes for opcodes
    empty.touch()

    def refuses(src, dst, message):
        status, output = run(src, dst, '--to', 'bn')
        assert status == 2
        assert output.startswith('error: ')
        assert message in output
        assert output.count('\n') == 1
        assert not dst.exists()

    for content, message in [
        ({'state_dict': network(UBN).state_dict()}, '1.center_weight of UBN: expected zeros'),
        ({'state_dict': network(IEBN).state_dict()}, '1.scale_weight of IEBN: expected zeros'),
        ({'state_dict': {'weight': torch.ones(1)}}, 'no norm layer with running statistics'),
        ({'state_dict': {'bn.running_mean': torch.ones(1)}}, 'bn.running_var is missing'),
        ({'epoch': 3}, 'no state dict, itself or as state_dict, ema_state_dict, model, model_ema; it holds epoch'),
        ({}, 'it holds nothing'),
        ([torch.ones(1)], 'holds a list'),
        (torch.ones(1), 'holds a Tensor'),
    ]:
        torch.save(content, source)
        refuses(source, target, message)
    for path in (text, letters, empty):
        refuses(path, target, f'{path.name} is no checkpoint')
    refuses(tmp_path / 'none.pth', target, 'none.pth does not exist')
    refuses(source, tmp_path / 'none' / 'target.pth', 'the folder of')
    refuses(tmp_path, target, f'{tmp_path} is a folder')


def test_a_part_of_a_file(tmp_path, run):
    source, target = tmp_path / 'source.pth', tmp_path / 'target.pth'
    torch.save(network(nn.BatchNorm2d).state_dict(), source)
    content = source.read_bytes()
    with zipfile.ZipFile(tmp_path / 'other.pth', 'w') as archive:
        archive.writestr('text', 'no checkpoint')
    source.write_bytes(content[: len(content) // 2])
    for path in (source, tmp_path / 'other.pth'):
        status, output = run(path, target, '--to', 'ubn')
        assert (status, output.count('\n')) == (2, 1)
        assert output.startswith(f'error: {path} is no checkpoint, or only a part of one'), output
        assert not target.exists()


def test_the_destination(tmp_path, run, monkeypatch):
    source, target = tmp_path / 'source.pth', tmp_path / 'target.pth'
    torch.save(network(nn.BatchNorm2d).state_dict(), source)
    before = source.read_bytes()
    (tmp_path / 'link.pth').symlink_to(source)
    target.write_text('old')
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
    for dst, message in [
        (tmp_path, f'{tmp_path} is a folder; give the path of the file to write'),
        (source, f'{source} is the file to read, too; write to another one'),
        (tmp_path / 'link.pth', 'link.pth is the file to read, too'),
        (target, f'{target} could not be written: No space left on device; make room there'),
    ]:
        status, output = run(source, dst, '--to', 'ubn')
        assert status == 2
        assert message in output.splitlines()[-1]
        assert (source.read_bytes(), target.read_text()) == (before, 'old')
    assert len(list(tmp_path.iterdir())) == 3, 'nothing half-written'
