"""An image that cannot be read is named, and so is one of another size than its annotations."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from PIL import Image

from mmubn.openmmlab.errors import DataError
from mmubn.openmmlab.hooks.sample_errors import SampleErrorsHook


class Images(BaseDataset):
    """Three images of 8x6 pixels."""

    def load_data_list(self):
        return [dict(img_path=f'{self.data_root}/{i}.png', width=8, height=6) for i in range(3)]


def fail(sample):
    if sample['img_path'].endswith('1.png'):
        raise KeyError('mask\nof it')
    return sample


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.new('RGB', (8, 6)).save(tmp_path / f'{i}.png')
    return tmp_path


def images(folder, *pipeline):
    return Images(data_root=str(folder), pipeline=[LoadImageFromFile(), *pipeline], serialize_data=True)


def watched(dataset, event='before_train'):
    loader = SimpleNamespace(dataset=dataset)
    runner = SimpleNamespace(train_loop=None, train_dataloader=loader, val_dataloader=loader, test_dataloader=loader)
    getattr(SampleErrorsHook(), event)(runner)
    return dataset


def spoil(path, how):
    if how == 'missing':
        path.unlink()
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'truncated':
        path.write_bytes(path.read_bytes()[:50])
    elif how == 'text':
        path.write_text('no image')
    elif how == 'larger':
        Image.new('RGB', (9, 6)).save(path)
    elif how == 'turned':
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: a quarter turn
        Image.new('RGB', (8, 6)).save(path, format='JPEG', exif=exif)


REASONS = dict(
    missing='does not exist',
    empty='is empty',
    truncated='is broken, or no image',
    text='is broken, or no image',
    larger='has 9x6 pixels, and by the annotations 8x6',
    turned='has 6x8 pixels, and by the annotations 8x6',
)


@pytest.mark.parametrize('how', REASONS)
def test_names_the_image(folder, how):
    dataset = watched(images(folder))
    spoil(folder / '1.png', how)
    assert dataset[0]['img'].shape == (6, 8, 3)
    with pytest.raises(DataError) as caught:
        dataset[1]
    assert str(caught.value).startswith(f'the image {folder}/1.png {REASONS[how]}')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('event', ['before_train', 'before_val', 'before_test'])
def test_other_errors_of_a_pipeline(folder, event):
    dataset = watched(images(folder, fail), event)
    with pytest.raises(DataError, match=f'^{folder}/1.png: the pipeline of Images ended in KeyError: .*of it'):
        dataset[1]


@pytest.mark.parametrize(
    'wrap', [lambda data: RepeatDataset(data, times=2), lambda data: ConcatDataset([data, copy.deepcopy(data)])]
)
def test_inside_other_data_sets(folder, wrap):
    dataset = watched(wrap(images(folder)))
    spoil(folder / '2.png', 'empty')
    for index in (2, 5):
        with pytest.raises(DataError, match=r'2\.png is empty'):
            dataset[index]


def test_twice_and_pickled(folder):
    dataset = pickle.loads(pickle.dumps(watched(watched(images(folder)))))
    spoil(folder / '1.png', 'empty')
    with pytest.raises(DataError, match=r'1\.png is empty'):
        dataset[1]
    assert dataset[2]['img'].shape == (6, 8, 3)


def test_other_data_sets_are_left_alone():
    data = torch.utils.data.TensorDataset(torch.arange(3))
    assert watched(data)[1] == (torch.tensor(1),)
