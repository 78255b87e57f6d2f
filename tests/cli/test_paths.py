"""mmubn.cli.paths: paths are checked before anything is built, and an error is one sentence."""

import pytest
from mmengine.config import Config
from mmengine.model import PretrainedInit

from mmubn.cli import UsageError, check_file, check_paths
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
            ('annotations/train.json', 'train annotation file', 'train_dataloader.dataset.data_root'),
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
