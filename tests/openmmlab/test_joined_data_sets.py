"""Data sets that are joined are checked together: some may be without annotations, each has its metric."""

import copy
import json
import re

import pytest
from data_sets import check, detection_data, error_of

from mmubn.openmmlab.dataset_checks import check_data


@pytest.fixture
def detection(tmp_path):
    return detection_data(tmp_path)


def join(data, split, *kinds, wrap=False):
    """Join the data set of ``split`` with others: changes of its config and of its file."""
    dataset = data.cfg[f'{split}_dataloader'].dataset
    joined = [dataset]
    for i, (options, edit) in enumerate(kinds):
        content = copy.deepcopy(getattr(data, split))
        edit(content)
        (data.folder / f'{split}-{i}.json').write_text(json.dumps(content))
        joined.append(copy.deepcopy(dataset) | dict(ann_file=f'{split}-{i}.json') | options)
    joined = dict(type='ConcatDataset', datasets=joined)
    if wrap:
        joined = dict(type='RepeatDataset', times=2, dataset=dict(type='ClassBalancedDataset', dataset=joined))
    data.cfg[f'{split}_dataloader'].dataset = joined


def no_key(content):
    del content['annotations']


def no_entries(content):
    content['annotations'] = []


def of_no_class(content):
    content['categories'].append(dict(id=99, name='lamp'))
    for each in content['annotations']:
        each['category_id'] = 99


def without_masks(content):
    for each in content['annotations']:
        del each['segmentation']


def relative_boxes(content):
    for each in content['annotations']:
        each['bbox'] = [0.1, 0.1, 0.2, 0.2]


UNLABELLED = dict(filter_cfg=dict(filter_empty_gt=False), pipeline=[dict(type='LoadEmptyAnnotations')])
BACKGROUND = dict(filter_cfg=dict(filter_empty_gt=False))


class TestSeveralForTraining:
    @pytest.mark.parametrize('wrap', [False, True])
    @pytest.mark.parametrize('edit', [no_key, no_entries, of_no_class, without_masks, relative_boxes])
    def test_unlabelled(self, detection, edit, wrap):
        join(detection, 'train', (UNLABELLED, edit), wrap=wrap)
        assert not [note for note in check(detection) if 'background' in note]

    @pytest.mark.parametrize('edit', [no_key, no_entries, of_no_class])
    @pytest.mark.parametrize('options', [BACKGROUND, dict(filter_cfg=None)])
    def test_background(self, detection, edit, options):
        join(detection, 'train', (options, edit))
        assert [note for note in check(detection) if 'train-0.json' in note and 'images are background' in note]

    def test_all_background(self, detection):
        detection.cfg.train_dataloader.dataset.update(BACKGROUND)
        detection.train['annotations'] = []
        join(detection, 'train', (BACKGROUND, no_entries))
        assert 'train.json: no annotation is left to train on: it has none.' in error_of(detection)

    def test_labelled_without_annotations(self, detection):
        detection.train['annotations'] = []
        detection.cfg.train_dataloader.dataset.update(BACKGROUND)
        join(detection, 'train', (UNLABELLED, lambda content: None))
        assert 'train.json: no annotation is left to train on: it has none.' in error_of(detection)

    def test_without_labels_at_all(self, detection):
        detection.cfg.train_dataloader.dataset.update(UNLABELLED)
        detection.train['annotations'] = []
        assert check(detection) == []

    @pytest.mark.parametrize('edit', [no_key, no_entries, of_no_class])
    def test_filtered(self, detection, edit):
        join(detection, 'train', ({}, edit))
        assert 'train-0.json' in error_of(detection)

    def test_relative_boxes(self, detection):
        join(detection, 'train', (BACKGROUND, relative_boxes))
        assert 'train-0.json: no annotation is left to train on: 6 of 6' in error_of(detection)

    def test_masks_of_each(self, detection):
        join(detection, 'train', (dict(pipeline=[dict(type='LoadAnnotations', with_bbox=True)]), without_masks))
        assert check(detection) == []

    def test_masks_of_a_pipeline_around(self, detection):
        dataset = detection.cfg.train_dataloader.dataset
        pipeline = dataset.pop('pipeline')
        around = dict(type='MultiImageMixDataset', dataset=dict(dataset, pipeline=[]), pipeline=pipeline)
        detection.cfg.train_dataloader.dataset = around
        without_masks(detection.train)
        assert 'have no or an empty "segmentation"' in error_of(detection)

    def test_list_of_files(self, detection):
        detection.cfg.train_dataloader.dataset.ann_file = ['train.json', 'val.json']
        assert 'ann_file is a list, as MMDetection 2 took it' in error_of(detection)


class TestSeveralForValidation:
    def metrics(self, data, *files, kind='MultiDatasetsEvaluator'):
        each = [dict(type='CocoMetric', ann_file=str(data.folder / name), metric='bbox') for name in files]
        data.cfg.val_evaluator = dict(type=kind, metrics=each)
        if kind == 'MultiDatasetsEvaluator':
            data.cfg.val_evaluator.dataset_prefixes = list('abc'[: len(files)])

    @staticmethod
    def other_images(content):
        for image in content['images']:
            image['file_name'] = image['file_name'].replace('val', 'train')

    def join(self, data):
        """Two data sets that have the same ids of images."""
        join(data, 'val', (dict(data_prefix=dict(img='train/')), self.other_images))

    def test_a_metric_to_each(self, detection):
        self.join(detection)
        self.metrics(detection, 'val.json', 'val-0.json')
        assert check(detection) == []

    def test_of_the_other(self, detection):
        self.join(detection)
        self.metrics(detection, 'val-0.json', 'val.json')
        assert re.search(
            r'val_evaluator.metrics.0.ann_file .*val-0.json is of other images than val_dataloader.dataset.datasets.0,',
            error_of(detection),
        )

    @pytest.mark.parametrize('kind', ['Evaluator', 'list'])
    def test_same_ids_in_one_metric(self, detection, kind):
        self.join(detection)
        self.metrics(detection, 'val.json', kind='Evaluator')
        if kind == 'list':
            detection.cfg.val_evaluator = detection.cfg.val_evaluator.metrics
        assert re.search(
            r'datasets.0 and .*datasets.1 both have an image 1, .*MultiDatasetsEvaluator', error_of(detection)
        )

    @pytest.mark.parametrize(('name', 'good'), [('joined.json', True), ('val.json', False)])
    def test_a_file_that_joins(self, detection, name, good):
        def renumber(content):
            self.other_images(content)
            for image in content['images']:
                image['id'] += 3
            for each in content['annotations']:
                each['image_id'] += 3
                each['id'] += 6

        joined, other = copy.deepcopy(detection.val), copy.deepcopy(detection.val)
        renumber(other)
        joined['annotations'] += other['annotations']
        joined['images'] += [dict(image, file_name=f'b/{image["file_name"]}') for image in other['images']]
        (detection.folder / 'joined.json').write_text(json.dumps(joined))
        join(detection, 'val', (dict(data_prefix=dict(img='train/')), renumber))
        self.metrics(detection, name, kind='Evaluator')
        if good:
            assert check(detection) == []
        else:
            assert 'val.json does not have image 4 (train1.jpg) of val_dataloader.dataset.datasets.1' in error_of(
                detection
            )

    def test_beside_a_data_set_that_is_not_read(self, detection):
        self.join(detection)
        detection.cfg.val_dataloader.dataset.datasets[1].type = 'LVISV1Dataset'
        more = copy.deepcopy(detection.val)
        more['images'].append(dict(id=4, file_name='4.jpg', width=64, height=48))
        (detection.folder / 'more.json').write_text(json.dumps(more))
        self.metrics(detection, 'more.json', kind='Evaluator')
        assert check(detection) == []

    def test_test_set_without_annotations(self, detection):
        detection.write()
        detection.cfg.test_dataloader = detection.cfg.val_dataloader
        detection.cfg.test_evaluator = dict(detection.cfg.val_evaluator, format_only=True, outfile_prefix='results')
        no_key(detection.val)
        (detection.folder / 'val.json').write_text(json.dumps(detection.val))
        assert check_data(detection.cfg, ('test',)) == []

    def test_a_class_without_annotations(self, detection):
        detection.val['annotations'] = [each for each in detection.val['annotations'] if each['category_id'] != 20]
        assert check(detection) == []


class TestBatches:
    def loader(self, data, **options):
        data.cfg.train_dataloader.update(dict(batch_size=4, sampler=dict(type='DefaultSampler')) | options)
        return data

    @pytest.mark.parametrize(
        ('options', 'key'),
        [
            (dict(drop_last=True), 'drop_last'),
            (dict(batch_sampler=dict(type='AspectRatioBatchSampler', drop_last=True)), 'batch_sampler.drop_last'),
        ],
    )
    def test_none(self, detection, options, key):
        message = error_of(self.loader(detection, **options))
        assert (
            'train_dataloader has no batch: its data set has 3 images, fewer than train_dataloader.batch_size=4'
            in message
        )
        assert f'train_dataloader.{key}=True' in message

    @pytest.mark.parametrize(
        'options',
        [
            dict(drop_last=False),
            dict(drop_last=True, batch_size=3),
            dict(drop_last=True, sampler=dict(type='InfiniteSampler')),
            dict(batch_sampler=dict(type='AspectRatioBatchSampler')),
        ],
    )
    def test_some(self, detection, options):
        assert check(self.loader(detection, **options)) == []

    @pytest.mark.parametrize('wrap', [False, True])
    def test_some_of_several(self, detection, wrap):
        join(detection, 'train', ({}, lambda content: None), wrap=wrap)
        assert check(self.loader(detection, drop_last=True, batch_size=6)) == []

    def test_of_several_processes(self, detection, monkeypatch):
        monkeypatch.setenv('WORLD_SIZE', '2')
        detection.cfg.launcher = 'pytorch'
        assert '3 images, 2 for each of 2 processes' in error_of(self.loader(detection, batch_size=3, drop_last=True))

    @pytest.mark.parametrize('indices', [0, []])
    def test_no_indices(self, detection, indices):
        detection.cfg.train_dataloader.dataset.indices = indices
        assert f'train_dataloader.dataset.indices={indices} chooses none of 3 images' in error_of(detection)

    def test_wrong_indices(self, detection):
        detection.cfg.train_dataloader.dataset.indices = [0, 3]
        assert 'indices has 3, and 3 images are left' in error_of(detection)
