"""A small data set of COCO format and its config, to be spoiled by the tests of the data checks."""

import json
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from mmubn.openmmlab.dataset_checks import check_data
from mmubn.openmmlab.errors import DataError

CLASSES = ('cat', 'dog', 'traffic light')
RLE = {'size': [48, 64], 'counts': [0, 48 * 64]}
POLYGON = [[4, 4, 20, 4, 20, 20]]


def annotation(number, **changes):
    return (
        dict(
            id=number,
            image_id=1 + number % 3,
            category_id=10 * (1 + number % len(CLASSES)),
            bbox=[4, 4, 16, 16],
            area=128,
            iscrowd=0,
            segmentation=RLE if number % 2 else POLYGON,
        )
        | changes
    )


def coco(split):
    return dict(
        images=[dict(id=i, file_name=f'{split}{i}.jpg', width=64, height=48) for i in (1, 2, 3)],
        categories=[dict(id=10 * i, name=name) for i, name in enumerate(CLASSES, start=1)],
        annotations=[annotation(number) for number in range(1, 7)],
    )


def detection_data(tmp_path):
    """A data set of COCO format and its config; ``write`` puts its files into the folder."""
    data = SimpleNamespace(folder=tmp_path, train=coco('train'), val=coco('val'))
    options = dict(type='CocoDataset', data_root=str(tmp_path), metainfo=dict(classes=CLASSES))
    load = [dict(type='LoadAnnotations', with_mask=True)]
    sets = {
        split: dict(options, ann_file=f'{split}.json', data_prefix=dict(img=f'{split}/'), pipeline=load)
        for split in ('train', 'val')
    }
    sets['train']['filter_cfg'] = dict(filter_empty_gt=True, min_size=32)
    sets['val']['test_mode'] = True
    data.cfg = Config(
        dict(
            default_scope='mmdet',
            model=dict(type='MaskRCNN'),
            train_dataloader=dict(dataset=sets['train']),
            val_dataloader=dict(dataset=sets['val']),
            val_evaluator=dict(type='CocoMetric', ann_file=str(tmp_path / 'val.json'), metric=['bbox', 'segm']),
        )
    )

    def write():
        for split in ('train', 'val'):
            (tmp_path / split).mkdir()
            content = getattr(data, split)
            (tmp_path / f'{split}.json').write_text(content if isinstance(content, str) else json.dumps(content))
            for i in (1, 2, 3):
                (tmp_path / split / f'{split}{i}.jpg').touch()

    data.write = write
    return data


def check(data):
    data.write()
    return check_data(data.cfg, ('train', 'val'))


def error_of(data):
    with pytest.raises(DataError) as caught:
        check(data)
    message = str(caught.value)
    assert '\n' not in message
    return message


def name_classes(data, *classes):
    for split in ('train', 'val'):
        data.cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=classes)
