"""Data of PASCAL VOC's format that do not fit their config are told in one line."""

import re
from types import SimpleNamespace

import pytest
from data_sets import CLASSES, check, error_of, name_classes
from mmengine.config import Config


def voc_file(*names):
    objects = ''.join(
        f'<object><name>{name}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>'
        for name in names
    )
    return f'<annotation><size><width>64</width><height>48</height></size>{objects}</annotation>'


class TestVoc:
    @pytest.fixture
    def voc(self, tmp_path):
        """Files of PASCAL VOC's format; ``objects`` are the names in each file of each split."""
        data = SimpleNamespace(folder=tmp_path)
        data.objects = dict(train=[['cat', 'dog'], ['traffic light'], []], val=[['cat'], ['dog']])
        load = [dict(type='LoadAnnotations', with_bbox=True)]
        options = dict(type='XMLDataset', data_root=str(tmp_path), metainfo=dict(classes=CLASSES), pipeline=load)
        sets = {
            split: dict(
                options, ann_file=f'{split}.txt', data_prefix=dict(sub_data_root='VOC/'), test_mode=split == 'val'
            )
            for split in data.objects
        }
        data.cfg = Config(
            dict(default_scope='mmdet', model=dict(type='FasterRCNN'))
            | {f'{split}_dataloader': dict(dataset=dataset) for split, dataset in sets.items()}
        )

        def write():
            for folder in ('Annotations', 'JPEGImages'):
                (tmp_path / 'VOC' / folder).mkdir(parents=True)
            for split, files in data.objects.items():
                (tmp_path / f'{split}.txt').write_text(''.join(f'{split}{i}\n' for i in range(len(files))))
                for i, names in enumerate(files):
                    (tmp_path / 'VOC' / 'Annotations' / f'{split}{i}.xml').write_text(voc_file(*names))
                    (tmp_path / 'VOC' / 'JPEGImages' / f'{split}{i}.jpg').touch()

        data.write = write
        return data

    def test_good(self, voc):
        assert check(voc) == [
            f"val_dataloader.dataset: no object in {voc.folder}/VOC/Annotations is called 'traffic light', of "
            'metainfo.classes.'
        ]

    @pytest.mark.parametrize(
        ('classes', 'missing'),
        [(('cat', 'Dog', 'traffic light'), "'Dog'"), (('cow', 'hen'), "'cow', 'hen'"), ((*CLASSES[:2], 'a'), "'a'")],
    )
    def test_names(self, voc, classes, missing):
        name_classes(voc, *classes)
        message = error_of(voc)
        assert message.startswith(
            f'train_dataloader.dataset.metainfo.classes names {missing}, and no object in {voc.folder}/VOC/Annotations '
            "is called so; its objects are called 'cat', 'dog', 'traffic light'."
        )
        assert ("Did you mean 'dog'?" in message) == ('Dog' in missing)

    @pytest.mark.parametrize(
        ('objects', 'wrong'),
        [([['cat'], ['hand']], False), ([['Cat'], ['dog']], True), ([['hand']], True), ([[], []], False)],
    )
    def test_names_of_validation(self, voc, objects, wrong):
        voc.objects['val'] = objects
        if wrong:
            assert error_of(voc).startswith('val_dataloader.dataset.metainfo.classes names ')
        else:
            assert 'no object' in check(voc)[0]

    def test_a_few_images_without_a_class(self, voc):
        voc.objects['train'] = [['cat'], ['dog']]
        assert "is called 'traffic light'" in check(voc)[0]

    def test_a_part_of_the_objects(self, voc):
        name_classes(voc, 'cat', 'dog')
        assert check(voc) == []

    def test_of_the_class_itself(self, voc):
        for split in ('train', 'val'):
            dataset = voc.cfg[f'{split}_dataloader'].dataset
            dataset.type = 'VOCDataset'
            del dataset.metainfo
        message = error_of(voc)
        assert 'has no metainfo.classes, so that its classes are the 20 of VOCDataset' in message
        assert "of 'cat', 'dog', 'traffic light'" in message

    def test_of_two_sets_together(self, voc):
        dataset = voc.cfg.train_dataloader.dataset
        (voc.folder / 'a.txt').write_text('train0\n')
        (voc.folder / 'b.txt').write_text('train1\n')
        both = [dataset | dict(ann_file=name) for name in ('a.txt', 'b.txt')]
        voc.cfg.train_dataloader.dataset = dict(
            type='RepeatDataset', times=3, dataset=dict(type='ConcatDataset', datasets=both)
        )
        assert len(check(voc)) == 1  # of val

    def test_unlabelled(self, voc):
        voc.objects['train'] = [[]]
        voc.cfg.train_dataloader.dataset.pipeline = [dict(type='LoadEmptyAnnotations')]
        assert len(check(voc)) == 1

    def test_no_objects(self, voc):
        voc.objects['train'] = [[], []]
        assert 'Annotations have no object; expected <object> with <name>' in error_of(voc)

    @pytest.mark.parametrize(
        ('path', 'content', 'message'),
        [
            ('train.txt', None, 'ann_file .*/train.txt cannot be read: No such file'),
            ('train.txt', '', 'ann_file .*/train.txt is empty'),
            (
                'train.txt',
                'train0.jpg\n',
                "1 of 1 .xml files are not in .*VOC/Annotations; the first: 'train0.jpg.xml'",
            ),
            ('VOC/Annotations/train1.xml', None, "train.txt: 1 of 3 .xml files are not in .*; the first: 'train1.xml'"),
            ('VOC/JPEGImages/train1.jpg', None, "train.txt: 1 of 3 .jpg files are not in .*; the first: 'train1.jpg'"),
            ('VOC/Annotations/train0.xml', '<a>', r'VOC/Annotations/train0.xml: not XML \(no element found'),
            ('VOC/Annotations/train0.xml', '<a><object/></a>', 'train0.xml: an <object> has no <name>'),
        ],
    )
    def test_files(self, voc, path, content, message):
        write = voc.write

        def spoil():
            write()
            if content is None:
                (voc.folder / path).unlink()
            else:
                (voc.folder / path).write_text(content)

        voc.write = spoil
        assert re.search(message, error_of(voc))
