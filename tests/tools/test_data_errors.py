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


@pytest.fixture
def voc(digits, tmp_path):
    """A config of data in PASCAL VOC's format, made of the digits."""
    content = json.loads((digits / 'annotations' / 'instances_train2017.json').read_text())
    names = {category['id']: category['name'] for category in content['categories']}
    shutil.copytree(digits / 'train2017', tmp_path / 'JPEGImages')
    (tmp_path / 'Annotations').mkdir()
    for image in content['images']:
        stem = image['file_name'].removesuffix('.png')
        (tmp_path / 'JPEGImages' / image['file_name']).rename(tmp_path / 'JPEGImages' / f'{stem}.jpg')
        objects = ''
        for each in content['annotations']:
            if each['image_id'] == image['id']:
                x, y, width, height = map(int, each['bbox'])
                box = dict(xmin=x + 1, ymin=y + 1, xmax=x + width, ymax=y + height)
                box = ''.join(f'<{side}>{value}</{side}>' for side, value in box.items())
                objects += f'<object><name>{names[each["category_id"]]}</name><bndbox>{box}</bndbox></object>'
        size = f'<size><width>{image["width"]}</width><height>{image["height"]}</height></size>'
        (tmp_path / 'Annotations' / f'{stem}.xml').write_text(f'<annotation>{size}{objects}</annotation>')
    stems = [image['file_name'].removesuffix('.png') for image in content['images']]
    (tmp_path / 'all.txt').write_text('\n'.join(stems))
    config = tmp_path / 'voc.py'
    config.write_text(
        f"""_base_ = '{CONFIG}'
train = dict(
    _delete_=True,
    type='XMLDataset',
    data_root='{tmp_path}/',
    ann_file='all.txt',
    data_prefix=dict(sub_data_root=''),
    metainfo=dict(classes=tuple('0123456789')),
    filter_cfg=dict(filter_empty_gt=True),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')],
)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=train)
val_dataloader = val_cfg = val_evaluator = test_dataloader = test_cfg = test_evaluator = None
"""
    )
    return config


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            ['dataset.metainfo.classes=[0a,0b]'],
            "dataset.metainfo.classes names '0a', '0b', and no object",
        ),
        (['dataset.filter_cfg.min_size=999'], "no images are left of it (ann_file='{folder}/all.txt', filter_cfg={{'"),
        (['dataset.indices=0'], 'indices=0): '),
        (
            ['drop_last=True', 'batch_sampler=None', 'batch_size=64'],
            'train_dataloader has no batch: its data set has 8 images',
        ),
    ],
    ids=['names', 'filtered', 'indices', 'batches'],
)
def test_no_images_to_train_on(voc, tmp_path, monkeypatch, capsys, options, message):
    arguments = ['--work-dir', tmp_path / 'run', '--cfg-options', *(f'train_dataloader.{each}' for each in options)]
    assert call(monkeypatch, 'train.py', voc, *arguments) != 0
    assert message.format(folder=tmp_path) in capsys.readouterr().err.splitlines()[-1]


def test_no_batch_without_schedulers(voc, tmp_path, monkeypatch, capsys):
    options = [f'train_dataloader.{each}' for each in ('drop_last=True', 'batch_sampler=None', 'batch_size=64')]
    arguments = ['--work-dir', tmp_path / 'run', '--cfg-options', *options, 'param_scheduler=None']
    assert call(monkeypatch, 'train.py', voc, *arguments) == 2
    assert 'train_dataloader has no batch: its data set has 8 images' in capsys.readouterr().err.splitlines()[-1]
