"""The digits as a COCO data set."""

import hashlib
import json
import sys

import numpy as np
import pytest
from cli import ROOT, run, tool
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.datasets import load_digits

ARGUMENTS = ['--num-train', '6', '--num-val', '5', '--canvas', '96', '--digits', '2', '4', '--size', '16', '32']


def make(folder, *arguments):
    result = tool('dataset_converters/digits_to_coco.py', folder, *ARGUMENTS, *arguments)
    assert result.returncode == 0, result.stdout
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'digits'
    result = run(sys.executable, ROOT / 'tools' / 'dataset_converters' / 'digits_to_coco.py', folder, *ARGUMENTS)
    assert result.returncode == 0, result.stdout
    return folder


def annotations(folder, split):
    return json.loads((folder / 'annotations' / f'instances_{split}2017.json').read_text())


def fingerprint(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def test_arguments(folder):
    for split, count in (('train', 6), ('val', 5)):
        content = annotations(folder, split)
        assert len(content['images']) == count == len(list((folder / f'{split}2017').glob('*.png')))
        for image in content['images']:
            pixels = np.asarray(Image.open(folder / f'{split}2017' / image['file_name']))
            assert pixels.shape == (image['height'], image['width'], 3) == (96, 96, 3)
            number = sum(a['image_id'] == image['id'] for a in content['annotations'])
            assert 1 <= number <= 4
        for annotation in content['annotations']:
            assert max(annotation['bbox'][2:]) <= 32


def test_no_digit_is_in_both_splits(folder):
    train, val = ({a['digit_index'] for a in annotations(folder, split)['annotations']} for split in ('train', 'val'))
    assert train
    assert val
    assert not train & val


def test_labels_are_those_of_the_digits(folder):
    labels = load_digits().target
    for annotation in annotations(folder, 'train')['annotations']:
        assert annotation['category_id'] == labels[annotation['digit_index']] + 1


def test_masks_are_the_dark_pixels(folder):
    coco = COCO(folder / 'annotations' / 'instances_val2017.json')
    for image in coco.loadImgs(coco.getImgIds()):
        grey = np.asarray(Image.open(folder / 'val2017' / image['file_name']))[..., 0].astype(float)
        masks = [coco.annToMask(a).astype(bool) for a in coco.loadAnns(coco.getAnnIds(image['id']))]
        assert np.sum(masks, axis=0).max() == 1, 'digits must not overlap'
        ink = np.any(masks, axis=0)
        assert grey[ink].mean() < grey[~ink].mean() - 30
        for mask, annotation in zip(masks, coco.loadAnns(coco.getAnnIds(image['id'])), strict=True):
            rows, columns = np.nonzero(mask)
            x, y, w, h = annotation['bbox']
            assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert annotation['area'] == mask.sum()


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_pycocotools_gives_the_annotations_a_perfect_score(folder, kind):
    coco = COCO(folder / 'annotations' / 'instances_val2017.json')
    results = coco.loadRes([a | {'score': 1.0} for a in annotations(folder, 'val')['annotations']])
    evaluation = COCOeval(coco, results, kind)
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_the_same_command_gives_the_same_bytes(folder, tmp_path):
    again = fingerprint(make(tmp_path / 'again'))
    assert again == fingerprint(folder)
    assert 'preview_train.png' in again
    other = fingerprint(make(tmp_path / 'other', '--seed', '1'))
    assert other.keys() == again.keys()
    assert not {k for k in other if k.endswith('.png') and other[k] == again[k]}


def test_a_smaller_set_leaves_no_images_of_a_larger_one(tmp_path):
    make(tmp_path / 'digits')
    make(tmp_path / 'digits', '--num-train', '2')
    assert len(list((tmp_path / 'digits' / 'train2017').glob('*.png'))) == 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--size', '40', '100'], 'does not fit the canvas of 96'),
        (['--size', '4', '10'], 'at least 8'),
        (['--digits', '3', '2'], 'got 3 2'),
        (['--num-val', '0'], '--num-val must be positive, got 0'),
        (['--val-share', '1'], 'between 0 and 1, got 1.0'),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    result = tool('dataset_converters/digits_to_coco.py', tmp_path / 'digits', *ARGUMENTS, *arguments)
    assert result.returncode == 2
    assert message in result.stdout
    assert not (tmp_path / 'digits').exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    result = tool('dataset_converters/digits_to_coco.py', tmp_path, *ARGUMENTS)
    assert result.returncode == 2
    assert 'holds other files' in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']
