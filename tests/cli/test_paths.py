"""mmubn.cli.paths: paths are checked before anything is built, and an error is one sentence."""

import argparse

import pytest
from mmengine.config import Config
from mmengine.model import PretrainedInit

from mmubn.cli import UsageError, check_file, check_paths
from mmubn.cli.paths import check_work_dir
from mmubn.openmmlab.pretrained import PretrainedInit as OurPretrainedInit


class TestCheckPaths:
    @pytest.fixture
    def cfg(self, tmp_path):
        for name in ('annotations/train.json', 'annotations/val.json', 'train/1.png', 'val/1.png', 'r50.pth'):
            path = tmp_path / 'data' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('')
        root = f'{tmp_path}/data/'

        def dataset(split):
            return dict(data_root=root, ann_file=f'annotations/{split}.json', data_prefix=dict(img=f'{split}/'))

        return Config(
            dict(
                train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dataset('train'))),
                val_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=[dataset('val'), dataset('val')])),
                val_evaluator=[dict(type='CocoMetric', ann_file=root + 'annotations/val.json')],
                model=dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=root + 'r50.pth'))),
            )
        )

    def test_nothing_missing(self, cfg):
        check_paths(cfg, ('train', 'val'), pretrained=True)

    @pytest.mark.parametrize(
        ('name', 'what', 'remedy'),
        [
            ('annotations/train.json', 'train annotation file', 'train_dataloader.dataset.dataset.data_root'),
            ('annotations/val.json', 'val annotation file', 'digits_to_coco.py'),
            ('train', 'train image folder', 'README.md'),
            ('r50.pth', 'checkpoint of model.backbone', 'model.backbone.init_cfg.checkpoint='),
        ],
    )
    def test_one_missing(self, cfg, tmp_path, name, what, remedy):
        (tmp_path / 'data' / name).rename(tmp_path / 'away')
        with pytest.raises(UsageError) as error:
            check_paths(cfg, ('train', 'val'), pretrained=True)
        message = str(error.value)
        assert str(tmp_path / 'data' / name) in message
        assert what in message
        assert remedy in message
        assert '\n' not in message

    def test_missing_folder_of_a_data_set_without_annotation_file(self, tmp_path):
        """ImageNet in MMPretrain: the folders are the classes."""
        dataset = dict(type='ImageNet', data_root=f'{tmp_path}/imagenet', split='train')
        with pytest.raises(UsageError, match=r'the train data folder .*imagenet does not exist'):
            check_paths(Config(dict(train_dataloader=dict(dataset=dataset))), ('train',), pretrained=False)

    def test_missing_evaluator_annotations(self, cfg, tmp_path):
        cfg.val_evaluator[0].ann_file = f'{tmp_path}/gone.json'
        with pytest.raises(UsageError, match='val_evaluator'):
            check_paths(cfg, ('val',), pretrained=False)

    def test_a_classifier_is_told_of_its_own_converter(self, tmp_path):
        dataset = dict(type='CustomDataset', data_root=f'{tmp_path}/gone')
        cfg = Config(dict(default_scope='mmpretrain', train_dataloader=dict(dataset=dataset)))
        with pytest.raises(UsageError, match=r'docs/reproduce\.md .*digits_to_imagefolder\.py') as error:
            check_paths(cfg, ('train',), pretrained=False)
        assert 'coco' not in str(error.value).lower()

    @pytest.mark.parametrize('written', ['annotations/val.json', 'data/elsewhere/val.json'])
    def test_an_evaluator_whose_annotations_lie_below_data_root(self, cfg, tmp_path, written):
        """It does not know data_root: its path is that of the data set, written whole."""
        cfg.val_evaluator[0].ann_file = written
        path = f'{tmp_path}/data/annotations/val.json'
        message = (
            rf'{written} does not exist; it is not taken below data_root: set val_evaluator\.0\.ann_file={path}\.$'
        )
        with pytest.raises(UsageError, match=message):
            check_paths(cfg, ('val',), pretrained=False)

    def test_a_path_that_has_data_root_twice(self, cfg, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        cfg.train_dataloader.dataset.dataset.update(data_root='data/', ann_file='data/annotations/train.json')
        message = r"takes it below its data_root='data/': leave that part out"
        with pytest.raises(UsageError, match=message):
            check_paths(cfg, ('train',), pretrained=False)

    @pytest.mark.parametrize(
        'kind', ['Pretrained', PretrainedInit, OurPretrainedInit, 'mmengine.model.weight_init.PretrainedInit'], ids=str
    )
    def test_a_checkpoint_however_its_initializer_is_named(self, cfg, kind):
        cfg.model.backbone.init_cfg = dict(type=kind, checkpoint='gone.pth')
        with pytest.raises(UsageError, match=r'the pretrained checkpoint of model\.backbone, gone\.pth does not exist'):
            check_paths(cfg, ('train',), pretrained=True)

    def test_a_checkpoint_among_several_initializers(self, cfg):
        pretrained = dict(type='Pretrained', checkpoint='gone.pth')
        cfg.model.backbone.init_cfg = [dict(type='Kaiming', layer='Conv2d'), pretrained]
        match = r'of model\.backbone, gone\.pth does not exist.* model\.backbone\.init_cfg\.1\.checkpoint='
        with pytest.raises(UsageError, match=match):
            check_paths(cfg, ('train',), pretrained=True)

    def test_of_the_whole_model(self, cfg):
        cfg.model.init_cfg = dict(type='Pretrained', checkpoint='gone.pth')
        with pytest.raises(UsageError, match=r'the pretrained checkpoint of model, gone\.pth does not exist'):
            check_paths(cfg, ('train',), pretrained=True)

    @pytest.mark.parametrize('checkpoint', ['torchvision://resnet50', 'https://example.org/r50.pth'])
    def test_urls_are_left_to_mmengine(self, cfg, checkpoint):
        cfg.model.backbone.init_cfg.checkpoint = checkpoint
        check_paths(cfg, ('train',), pretrained=True)


class TestCheckFile:
    def test_a_folder_where_a_file_is_meant(self, tmp_path):
        check_file(str(tmp_path), 'the data folder', 'make it')
        with pytest.raises(UsageError, match=f'^the checkpoint {tmp_path} is a folder; give a file.$'):
            check_file(str(tmp_path), 'the checkpoint', 'give a file', folder=False)

    def test_what_is_no_path(self):
        check_file('torchvision://resnet50', 'the checkpoint', 'give a file', folder=False)


class TestCheckWorkDir:
    def test_is_not_made(self, tmp_path):
        check_work_dir(str(tmp_path / 'a' / 'b'))
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize('below', ['', '/run'])
    def test_a_file_in_its_way(self, tmp_path, below):
        (tmp_path / 'file').write_text('')
        with pytest.raises(
            UsageError, match=rf'cannot be made: {tmp_path}/file is a file; give another with --work-dir'
        ):
            check_work_dir(f'{tmp_path}/file{below}')

    def test_without_permission(self, tmp_path, monkeypatch):
        monkeypatch.setattr('os.access', lambda path, mode: False)  # who runs the tests may have all permissions
        with pytest.raises(UsageError, match=rf'run cannot be written: {tmp_path} is not writable'):
            check_work_dir(f'{tmp_path}/run')

    def test_a_full_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr('shutil.disk_usage', lambda path: argparse.Namespace(free=0))
        with pytest.raises(UsageError, match=rf'run cannot be written: the disk of {tmp_path} is full'):
            check_work_dir(f'{tmp_path}/run')
