"""``python -m mmubn``: whether an installation works."""

from importlib import metadata, util

import pytest
import torch

import mmubn
from mmubn import __main__ as check


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr('sys.argv', ['mmubn'])


def test_another_argument(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['mmubn', '--foo'])
    with pytest.raises(SystemExit, match='2'):
        check.main()
    assert 'unrecognized arguments: --foo' in capsys.readouterr().err


def test_an_installation_that_works(capsys):
    assert check.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'mmubn {mmubn.__version__} in ')
    assert f'torch {metadata.version("torch")}' in lines
    assert f'UBN on cpu: {mmubn.backend_info(mmubn.UBN(8), torch.zeros(1, 8, 2, 2))}' in lines
    assert lines[-1] == 'works'


@pytest.mark.parametrize(
    ('missing', 'status', 'line'),
    [
        ('mmdet', 1, "mmdet: not installed; detectors need it: pip install --no-build-isolation 'onedl-mmdetection"),
        ('mmpretrain', 0, 'mmpretrain: not installed; classifiers need it: '),
        ('mmcv._ext', 1, 'mmcv has no compiled operators'),
    ],
)
def test_what_is_missing_is_named(monkeypatch, capsys, missing, status, line):
    find_spec = util.find_spec
    monkeypatch.setattr(util, 'find_spec', lambda name: None if name == missing else find_spec(name))
    assert check.main() == status
    assert line in capsys.readouterr().out


def test_wrong_numbers_are_seen(monkeypatch, capsys):
    forward, factors = mmubn.UBN.forward, iter([1.01, 1])  # of the layer, and of the reference
    monkeypatch.setattr(mmubn.UBN, 'forward', lambda layer, x: forward(layer, x) * next(factors))
    assert check.main() == 1
    output = capsys.readouterr().out
    assert 'UBN on cpu does not work: Tensor-likes are not close!' in output
    assert output.endswith('does not work: UBN on cpu\n')


def test_a_layer_that_fails(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError('no such luck')

    monkeypatch.setattr(mmubn.UBN, 'forward', fail)
    assert check.main() == 1
    assert 'UBN on cpu does not work: no such luck' in capsys.readouterr().out
