"""Data that do not fit their config, as the user of a tool meets them: one line, and not the first number."""

import json
import shutil

import pytest
import torch
from cli import CONFIG, call, data_options, tool
from mmengine.config import Config
from mmengine.registry import MODELS


@pytest.fixture
def own(digits, tmp_path):
    """A copy of the digits, to be spoiled."""
    return shutil.copytree(digits, tmp_path / 'own')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """One that fits, as if trained on the digits."""
    with MODELS.switch_scope_and_registry('mmdet') as registry:
        model = registry.build(Config.fromfile(CONFIG).model)
    path = tmp_path_factory.mktemp('checkpoint') / 'a.pth'
    meta = dict(dataset_meta=dict(classes=tuple('0123456789')))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)
    return path


def change(folder, edit, split='train'):
    path = folder / 'annotations' / f'instances_{split}2017.json'
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def rename(content):
    content['categories'][3]['name'] = 'Three'


def test_a_class_that_the_file_does_not_have(own, tmp_path, monkeypatch, capsys):
    path = change(own, rename)
    arguments = ['--work-dir', tmp_path / 'run', '--cfg-options', *data_options(own)]
    assert call(monkeypatch, 'train.py', CONFIG, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: train_dataloader.dataset.metainfo.classes names '3', which {path} does not have")
    assert not list(tmp_path.glob('run/*/*.log'))  # before a runner is built


def test_the_test_set_is_checked(own, checkpoint, tmp_path, monkeypatch, capsys):
    path = change(own, lambda content: [each.pop('iscrowd') for each in content['annotations']], 'val')
    arguments = [checkpoint, '--work-dir', tmp_path / 'run', '--cfg-options', *data_options(own)]
    assert call(monkeypatch, 'test.py', CONFIG, *arguments) == 2
    assert f'error: {path}: ' in capsys.readouterr().err.splitlines()[-1]


def test_a_broken_image_in_a_worker(own, small, tmp_path):
    image = own / 'train2017' / '000000000003.png'
    image.write_bytes(image.read_bytes()[:60])
    options = [*small, *data_options(own), 'train_dataloader.num_workers=1']
    result = tool('train.py', CONFIG, '--work-dir', tmp_path / 'run', '--cfg-options', *options)
    assert result.returncode == 2
    assert f'error: the image {image} is broken, or no image' in result.stdout.splitlines()[-1]
    assert 'Traceback' not in result.stdout


def test_classes_in_another_order_than_the_checkpoint(own, checkpoint, tmp_path):
    change(own, lambda content: content['categories'].reverse(), 'val')
    config = tmp_path / 'reversed.py'
    names = "tuple('9876543210')"
    config.write_text(f"_base_ = '{CONFIG}'\ntest_dataloader = dict(dataset=dict(metainfo=dict(classes={names})))")
    arguments = [checkpoint, '--work-dir', tmp_path / 'run', '--cfg-options', *data_options(own)]
    result = tool('test.py', config, *arguments)
    assert result.returncode == 0, result.stdout
    warning = "trained on classes in another order: label 0 is '0' there and '9' in the test data set"
    assert warning in result.stdout
    (log,) = (tmp_path / 'run').glob('*/*.log')
    assert warning in log.read_text()
