"""Data that do not fit their config are told before anything is built, in one line; data that do are not."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
from data_sets import CLASSES, RLE, check, detection_data, error_of, name_classes
from mmengine.config import Config
from PIL import Image

from mmubn.openmmlab.annotation_checks import read_annotations
from mmubn.openmmlab.dataset_checks import check_data
from mmubn.openmmlab.errors import ConfigError, DataError
from mmubn.openmmlab.local_files import missing_files


@pytest.fixture
def detection(tmp_path):
    return detection_data(tmp_path)


def test_a_good_set(detection):
    assert check(detection) == []


def test_is_an_error_of_the_config():
    assert issubclass(DataError, ConfigError)


class TestClasses:
    @pytest.mark.parametrize(
        ('classes', 'missing'),
        [(('cat', 'cow', 'traffic light'), "'cow'"), ((*CLASSES, 'cow'), "'cow'"), (('cow', 'hen'), "'cow', 'hen'")],
        ids=['one', 'fewer categories', 'all'],
    )
    def test_missing(self, detection, classes, missing):
        name_classes(detection, *classes)
        assert error_of(detection).startswith(
            f'train_dataloader.dataset.metainfo.classes names {missing}, which {detection.folder}/train.json does not '
            "have; its categories are 'cat', 'dog', 'traffic light'."
        )

    @pytest.mark.parametrize('name', ['Dog', ' dog', 'dogs', 'DOG '])
    def test_almost(self, detection, name):
        name_classes(detection, 'cat', name, 'traffic light')
        assert "Did you mean 'dog'?" in error_of(detection)

    def test_missing_in_validation(self, detection):
        detection.val['categories'].pop(1)
        assert re.search("val_dataloader.* names 'dog', which .*/val.json does not have", error_of(detection))

    def test_missing_in_the_file_of_the_metric(self, detection):
        other = dict(detection.val, categories=detection.val['categories'][:2])
        (detection.folder / 'other.json').write_text(json.dumps(other))
        detection.cfg.val_evaluator.ann_file = str(detection.folder / 'other.json')
        assert re.search("names 'traffic light', which .*/other.json does not have", error_of(detection))

    def test_in_another_order(self, detection):
        name_classes(detection, 'dog', 'cat', 'traffic light')
        message = error_of(detection)
        assert "label 0 would be 'cat' and be called 'dog'" in message
        assert "write classes=('cat', 'dog', 'traffic light')" in message

    def test_order_of_the_validation_file(self, detection):
        detection.val['categories'].reverse()
        assert re.search('val.json has its categories in another order than .*train.json', error_of(detection))

    def test_of_the_class_itself(self, detection):
        for split in ('train', 'val'):
            del detection.cfg[f'{split}_dataloader'].dataset.metainfo
        message = error_of(detection)
        assert 'has no metainfo.classes, so that its classes are the 80 of CocoDataset' in message
        assert "metainfo=dict(classes=('cat', 'dog', 'traffic light',))" in message

    def test_of_the_class_itself_in_validation(self, detection):
        del detection.cfg.val_dataloader.dataset.metainfo
        assert error_of(detection).startswith('val_dataloader.dataset has no metainfo.classes')

    @pytest.mark.parametrize(
        ('classes', 'message'),
        [
            (('cat'), r"is the string 'cat', .* a tuple of one class needs a comma, classes=\('cat',\)"),
            ((0, 1), 'has 0, a int; expected names in quotes'),
            (('cat', 'dog', 'cat'), "names 'cat' 2 times"),
            (3, 'is a int; expected a tuple of names'),
        ],
        ids=['string', 'numbers', 'twice', 'number'],
    )
    def test_no_names(self, detection, classes, message):
        detection.cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
        assert re.search(f'^train_dataloader.dataset.metainfo.classes {message}', error_of(detection))

    def test_in_a_file(self, detection):
        path = detection.folder / 'names.txt'
        path.write_text('\n'.join(CLASSES))
        for split in ('train', 'val'):
            detection.cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=str(path))
        assert check(detection) == []

    @pytest.mark.parametrize('where', ['argument', 'capitals'])
    def test_as_in_version_2(self, detection, where):
        dataset = detection.cfg.train_dataloader.dataset
        del dataset.metainfo
        dataset.update(dict(classes=CLASSES) if where == 'argument' else dict(metainfo=dict(CLASSES=CLASSES)))
        assert 'write metainfo=dict(classes=(...))' in error_of(detection)

    def test_inside_other_data_sets(self, detection):
        dataset = detection.cfg.train_dataloader.dataset
        other = copy.deepcopy(dataset)
        other.metainfo = dict(classes=('cat', 'dog', 'lamp'))
        repeated = dict(type='RepeatDataset', times=2, dataset=dataset)
        detection.cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[repeated, other])
        assert re.search(r'datasets\.0\.dataset and .*datasets\.1 have other classes: .*lamp', error_of(detection))

    def test_two_categories_of_one_name(self, detection):
        detection.train['categories'].append(dict(id=7, name='dog'))
        assert "2 categories called 'dog' (ids 20, 7)" in error_of(detection)

    def test_a_part_of_the_categories(self, detection):
        name_classes(detection, 'cat', 'traffic light')
        notes = check(detection)
        assert len(notes) == 2  # of train and of val
        assert "classes leaves out the categories 'dog', and 2 of 6 annotations" in notes[0]

    def test_an_empty_category_more(self, detection):
        detection.train['categories'].insert(0, dict(id=1, name='animals'))  # as Roboflow writes
        assert check(detection) == []


class TestFile:
    @pytest.mark.parametrize(
        ('text', 'message'),
        [
            ('', 'is empty'),
            ('{"images": [],\n "categories" []}', 'line 2, column 15: not JSON'),
            ('[]', 'expected a dict with images, categories and annotations, got a list of JSON'),
            ('{"image": []}', 'expected a list under the key "categories" \\(found: \'image\'\\)'),
            ('{"categories": {}}', '"categories" \\(found: categories is a dict\\)'),
        ],
        ids=['empty', 'broken', 'list', 'other keys', 'dict'],
    )
    def test_not_coco(self, detection, text, message):
        detection.train = text
        assert re.search(f'^{detection.folder}/train.json.*{message}', error_of(detection))

    def test_none(self, detection):
        detection.cfg.train_dataloader.dataset.ann_file = ''
        assert error_of(detection).startswith('train_dataloader.dataset.ann_file is not set')

    def test_no_text(self, tmp_path):
        (tmp_path / 'a.json').write_bytes(b'\x89PNG\xff')
        with pytest.raises(DataError, match='is no text'):
            read_annotations(str(tmp_path / 'a.json'))

    @pytest.mark.parametrize('entries', ['images', 'categories', 'annotations'])
    def test_ids_twice(self, detection, entries):
        first = detection.train[entries][0]
        detection.train[entries].append(dict(first, name='more'))
        assert f'several {entries} have the id {first["id"]}' in error_of(detection)

    @pytest.mark.parametrize(
        ('entries', 'key'),
        [('images', 'height'), ('images', 'file_name'), ('categories', 'name'), ('annotations', 'image_id')],
    )
    def test_missing_keys(self, detection, entries, key):
        del detection.train[entries][1][key]
        count = len(detection.train[entries])
        assert f"1 of {count} {entries} have no '{key}'; the first: {entries}[1]" in error_of(detection)

    @pytest.mark.parametrize('height', [0, None, '48'])
    def test_no_height(self, detection, height):
        detection.train['images'][1]['height'] = height
        assert f'image 2 has height {height!r}' in error_of(detection)


class TestAnnotations:
    @pytest.mark.parametrize(
        ('changes', 'message'),
        [
            (dict(segmentation=[]), 'have no or an empty "segmentation"'),
            (dict(segmentation=None), 'have no or an empty "segmentation"'),
            (dict(segmentation=[4, 4, 20, 4, 20, 20]), 'neither a list of polygons'),
            (dict(segmentation=[[4, 4]]), 'neither a list of polygons'),
            (dict(segmentation=dict(RLE, size=[64, 48])), 'have an RLE of another size than their image'),
            (dict(area=None), 'have no number under "area"'),
            (dict(bbox=[1, 2, 3]), 'have no "bbox" of four numbers'),
            (dict(bbox=[1, 2, 3, float('nan')]), 'have no "bbox" of four numbers'),
            (dict(bbox=['1', '2', '3', '4']), 'have no "bbox" of four numbers'),
            (dict(category_id=0), 'have a category_id that is not among the categories'),
        ],
    )
    @pytest.mark.parametrize('split', ['train', 'val'])
    def test_needed(self, detection, split, changes, message):
        annotations = getattr(detection, split)['annotations']
        for each in annotations[2:4]:
            each.update(changes)
        expected = f'{detection.folder}/{split}.json: 2 of 6 annotations .*{message}'
        assert re.search(rf'^{expected}.* \(the first: id 3\)', error_of(detection))

    @pytest.mark.parametrize('key', ['segmentation', 'area', 'bbox'])
    def test_missing_in_all(self, detection, key):
        for each in detection.train['annotations']:
            del each[key]
        message = error_of(detection)
        assert '6 of 6 annotations have no' in message
        assert key in message

    def test_no_masks_without_a_mask_head(self, detection):
        for split in ('train', 'val'):
            detection.cfg[f'{split}_dataloader'].dataset.pipeline = [dict(type='LoadAnnotations', with_bbox=True)]
            for each in getattr(detection, split)['annotations']:
                del each['segmentation']
        assert 'val_evaluator measures masks' in error_of(detection)

    def test_boxes_alone(self, detection):
        detection.cfg.val_evaluator.metric = 'bbox'
        for split in ('train', 'val'):
            detection.cfg[f'{split}_dataloader'].dataset.pipeline = []
            for each in getattr(detection, split)['annotations']:
                del each['segmentation']
        assert check(detection) == []

    def test_iscrowd_is_needed_by_the_metric(self, detection):
        for each in detection.train['annotations'] + detection.val['annotations'][:1]:
            del each['iscrowd']
        assert 'val.json: 1 of 6 annotations have no "iscrowd" (the first: id 1)' in error_of(detection)

    @pytest.mark.parametrize('split', ['train', 'val'])
    def test_none(self, detection, split):
        getattr(detection, split)['annotations'] = []
        assert re.search(f'{split}.json: no(ne of its 0)? annotation', error_of(detection))

    def test_no_list_of_them(self, detection):
        del detection.val['annotations']
        assert 'val.json: none of its 0 annotations' in error_of(detection)

    def test_a_test_set_without(self, detection):
        del detection.val['annotations']
        detection.cfg.val_evaluator.format_only = True
        assert check(detection) == []

    @pytest.mark.parametrize('changes', [dict(bbox=[0.1, 0.1, 0.2, 0.2]), dict(image_id=99), dict(area=0)])
    def test_none_left(self, detection, changes):
        for each in detection.train['annotations']:
            each.update(changes)
        assert 'no annotation is left to train on: 6 of 6' in error_of(detection)

    @pytest.mark.parametrize(
        ('changes', 'note'),
        [
            (dict(bbox=[4, 4, 0, 16]), 'have a box of no size'),
            (dict(bbox=[100, 4, 16, 16]), 'have a box of no size'),
            (dict(image_id=99), 'have an image_id that is not among the images'),
            (dict(bbox=[30, 30, 60, 40]), 'have a box that reaches beyond their image'),
        ],
    )
    def test_some_left_out(self, detection, changes, note):
        detection.train['annotations'][1].update(changes)
        (line,) = check(detection)
        assert f'train.json: 1 of 6 annotations {note}' in line
        assert '(the first: id 2)' in line

    def test_id_0(self, detection):
        detection.val['annotations'][0]['id'] = 0
        (line,) = check(detection)
        assert 'val.json: an annotation has the id 0, which pycocotools always counts as missed' in line


class TestImages:
    def test_none_left(self, detection):
        detection.cfg.train_dataloader.dataset.filter_cfg.min_size = 50
        assert 'no image is left of 3: 3 are smaller than 50 pixels' in error_of(detection)

    def test_no_images(self, detection):
        detection.train['images'] = []
        assert 'train.json has no images' in error_of(detection)

    @pytest.mark.parametrize('split', ['train', 'val'])
    def test_missing(self, detection, split):
        getattr(detection, split)['images'][1]['file_name'] = 'a/b.jpg'
        if split == 'val':
            detection.cfg.val_evaluator = []
        expected = f"{split}.json: 1 of 3 images are not in {detection.folder}/{split}/; the first: 'a/b.jpg'"
        assert expected in error_of(detection)

    def test_missing_but_not_read(self, detection):
        detection.train['images'].append(dict(id=4, file_name='none.jpg', width=64, height=48))  # has no annotation
        assert check(detection) == []

    def test_another_folder(self, detection):
        detection.cfg.train_dataloader.dataset.data_prefix = dict(img='val/')
        assert '3 of 3 images are not in' in error_of(detection)

    def test_in_folders(self, tmp_path):
        (tmp_path / 'a').mkdir()
        (tmp_path / 'a' / '1.jpg').touch()
        (tmp_path / '2.jpg').touch()
        names = ['a/1.jpg', '2.jpg', '1.jpg', 'a/2.jpg', 'b/1.jpg', str(tmp_path / '2.jpg'), './2.jpg']
        assert missing_files(str(tmp_path), names) == ['1.jpg', 'a/2.jpg', 'b/1.jpg']

    def test_metric_of_other_images(self, detection):
        detection.cfg.val_evaluator.ann_file = str(detection.folder / 'train.json')
        assert re.search(
            r"val_evaluator.ann_file .*train.json is of other images .* calls 'train1.jpg'", error_of(detection)
        )

    def test_metric_of_more_images(self, detection):
        detection.cfg.val_evaluator.ann_file = str(detection.folder / 'more.json')
        more = copy.deepcopy(detection.val)
        more['images'].append(dict(id=4, file_name='4.jpg', width=64, height=48))
        (detection.folder / 'more.json').write_text(json.dumps(more))
        assert 'has 4 images, and val_dataloader.dataset reads 3 of them' in error_of(detection)

    def test_indices(self, detection):
        detection.cfg.val_dataloader.dataset.indices = 2
        (line,) = check(detection)
        assert 'has 3 images, and val_dataloader.dataset reads 2 of them (indices)' in line


class TestReferences:
    @pytest.mark.parametrize('split', ['train', 'val'])
    @pytest.mark.parametrize(('key', 'name'), [('image_id', 'images'), ('category_id', 'categories')])
    def test_text_instead_of_numbers(self, detection, split, key, name):
        each = getattr(detection, split)['annotations'][1]
        value = each[key]
        each[key] = str(value)
        expected = f"{split}.json: annotation 2 has the {key} '{value}', and {name} have the id {value}, which is not"
        assert expected in error_of(detection)

    def test_numbers_instead_of_text(self, detection):
        for each in detection.val['images']:
            each['id'] = str(each['id'])
        assert "has the image_id 2, and images have the id '2'" in error_of(detection)

    def test_no_number(self, detection):
        detection.train['annotations'][0]['image_id'] = [1]
        assert 'annotation 1 has the image_id [1]; expected a number' in error_of(detection)


@pytest.mark.parametrize('changes', [dict(data_root='s3://bucket/'), dict(backend_args=dict(backend='petrel'))])
def test_remote_data_are_not_read(detection, changes):
    for split in ('train', 'val'):
        detection.cfg[f'{split}_dataloader'].dataset.update(changes)
    assert check_data(detection.cfg, ('train', 'val')) == []


def test_other_data_sets_are_left_alone():
    cfg = Config(dict(default_scope='mmengine', model=dict(), train_dataloader=dict(dataset=dict(type='Anything'))))
    assert check_data(cfg, ('train', 'val')) == []


class TestFolders:
    @pytest.fixture
    def classes(self, tmp_path):
        """Folders of classes and the config of a classifier on them."""
        pytest.importorskip('mmpretrain')
        for split in ('train', 'val'):
            for name in ('cat', 'dog', 'lamp'):
                (tmp_path / split / name).mkdir(parents=True)
                Image.new('RGB', (4, 4)).save(tmp_path / split / name / '1.png')
        sets = {
            f'{split}_dataloader': dict(
                dataset=dict(type='CustomDataset', data_root=str(tmp_path), data_prefix=split, pipeline=[])
            )
            for split in ('train', 'val')
        }
        return SimpleNamespace(
            folder=tmp_path, cfg=Config(dict(default_scope='mmpretrain', model=dict(), **sets)), write=lambda: None
        )

    @pytest.mark.parametrize('names', [None, ('cat', 'dog', 'lamp'), ('Cat', 'Dog', 'Lamp'), ('n1', 'n2', 'n3')])
    def test_good(self, classes, names):
        if names:
            name_classes(classes, *names)
        assert check(classes) == []

    @pytest.mark.parametrize(
        ('change', 'message'),
        [
            (lambda val: (val / 'dog').rename(val / 'puppy'), "lacks 'dog' and has 'puppy' besides, other than"),
            (lambda val: (val / 'ant').mkdir(), "has 'ant' besides, other than"),
            (lambda val: (val / 'dog').rename(val / 'cat' / 'dog'), "lacks 'dog', other than"),
        ],
    )
    def test_other_folders_in_validation(self, classes, change, message):
        change(classes.folder / 'val')
        assert f'{classes.folder}/val (val_dataloader.dataset) {message} {classes.folder}/train' in error_of(classes)

    @pytest.mark.parametrize(
        ('names', 'message'),
        [
            (('cat', 'dogs', 'lamp'), "names 'dogs', for which .*/train has no folder; .* Did you mean 'dog'"),
            (('dog', 'cat', 'lamp'), r"another order than the folders .* write classes=\('cat', 'dog', 'lamp'\)"),
            (('cat', 'dog'), "has folders that .* does not name: 'lamp'"),
            (('cat', 'cat', 'lamp'), "names 'cat' 2 times"),
        ],
    )
    def test_names(self, classes, names, message):
        name_classes(classes, *names)
        assert re.search(message, error_of(classes))

    def test_of_the_class_itself(self, classes):
        classes.cfg.train_dataloader.dataset.update(type='ImageNet', split='train', data_prefix='')
        message = error_of(SimpleNamespace(cfg=Config(dict(classes.cfg, val_dataloader=None)), write=classes.write))
        assert 'its classes are the 1000 of ImageNet, and ' in message
        assert 'has 3 folders' in message

    def test_no_folders(self, classes):
        classes.cfg.train_dataloader.dataset.data_prefix = 'train/cat'
        assert 'train/cat has no folders; expected one for each class' in error_of(classes)

    @pytest.mark.parametrize(
        ('lines', 'message'),
        [
            (['cat/1.png 0', 'dog/1.png,1'], 'line 2: expected "PATH LABEL", .* got \'dog/1.png,1\''),
            (['cat/1.png 0', 'dog/1.png dog'], 'line 2: expected "PATH LABEL"'),
            (['cat/1.png 0', ''], 'line 2: expected "PATH LABEL"'),
            (['cat/1.png 3'], 'line 1: label 3 of 3 classes, which are numbered from 0 to 2'),
            (['cat/1.png 0', 'cat/2.png 0'], "1 of 2 images are not in .*; the first: 'cat/2.png'"),
            ([], 'is empty; expected lines "PATH LABEL"'),
        ],
    )
    def test_label_file(self, classes, lines, message):
        name_classes(classes, 'cat', 'dog', 'lamp')
        (classes.folder / 'labels.txt').write_text(''.join(f'{line}\n' for line in lines))
        classes.cfg.train_dataloader.dataset.ann_file = 'labels.txt'
        assert re.search(message, error_of(classes))
