"""mmubn.analysis.predictions. tests/tools/test_make_report.py has those of a detector and of a classifier."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.structures import InstanceData
from PIL import Image

from mmubn.analysis.predictions import _build_visualizer, draw_sample, enlarge, last_checkpoint
from mmubn.cli import UsageError


def test_a_moved_work_dir_has_its_checkpoint(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_2.pth\n')
    (tmp_path / 'epoch_2.pth').touch()
    assert last_checkpoint(tmp_path) == tmp_path / 'epoch_2.pth'


def test_a_copied_work_dir_has_its_own_checkpoint(tmp_path):
    """Its last_checkpoint names that of the original, which has been trained on or anew since."""
    for name in ('original', 'copy'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'epoch_2.pth').touch()
        (tmp_path / name / 'last_checkpoint').write_text(str(tmp_path / 'original' / 'epoch_2.pth'))
    assert last_checkpoint(tmp_path / 'copy') == tmp_path / 'copy' / 'epoch_2.pth'


def test_a_checkpoint_in_the_hooks_out_dir(tmp_path):
    saved = tmp_path / 'out' / 'run' / 'epoch_2.pth'
    for folder in (saved.parent, tmp_path / 'run'):
        folder.mkdir(parents=True)
    saved.touch()
    (tmp_path / 'run' / 'last_checkpoint').write_text(str(saved))
    assert last_checkpoint(tmp_path / 'run') == saved


def test_a_checkpoint_that_is_gone(tmp_path):
    with pytest.raises(UsageError, match=f'{tmp_path}/last_checkpoint does not exist'):
        last_checkpoint(tmp_path)
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_2.pth')
    with pytest.raises(UsageError, match=f'{tmp_path}/epoch_2.pth, which {tmp_path}/last_checkpoint names, does not'):
        last_checkpoint(tmp_path)


def test_an_image_that_has_no_file_is_drawn_from_the_data(tmp_path):
    """As in CIFAR, whose data set is one file."""
    seen = []
    visualizer = SimpleNamespace(visualize_cls=lambda image, sample, resize, out_file: seen.append((image, out_file)))
    inputs = torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4)
    draw_sample(visualizer, {'inputs': inputs}, {}, tmp_path, 0)
    ((image, out_file),) = seen
    np.testing.assert_array_equal(image, np.arange(24).reshape(3, 2, 4).transpose(1, 2, 0))
    assert out_file == str(tmp_path / '1-image.png')


def detection(boxes, image_size, path, scores=None):
    """A sample with the same boxes, and masks that fill them, annotated and predicted."""
    masks = np.zeros((len(boxes), *image_size), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    boxes, labels = torch.tensor(boxes, dtype=torch.float), torch.zeros(len(boxes), dtype=torch.long)
    sample = DetDataSample(metainfo=dict(img_path=str(path)))
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(boxes), labels=labels, masks=BitmapMasks(masks, *image_size)
    )
    scores = torch.ones(len(boxes)) if scores is None else torch.tensor(scores)
    sample.pred_instances = InstanceData(
        bboxes=boxes, labels=labels, masks=torch.from_numpy(masks.astype(bool)), scores=scores
    )
    return sample


def test_a_small_image_is_enlarged_with_its_boxes_and_masks():
    image = np.arange(100 * 50 * 3, dtype=np.uint8).reshape(100, 50, 3)
    sample = detection([[10, 20, 30, 60]], (100, 50), 'a.png')
    large, changed = enlarge(image, sample)
    assert large.shape == (500, 250, 3)
    np.testing.assert_array_equal(large[2::5, 2::5], image)
    for instances in (changed.gt_instances, changed.pred_instances):
        assert instances.bboxes.tolist() == [[50, 100, 150, 300]]
        mask = np.asarray(getattr(instances.masks, 'masks', instances.masks))[0].astype(bool)
        assert mask.shape == (500, 250)
        assert mask[100:300, 50:150].all()
        assert mask.sum() == 200 * 100
    assert sample.pred_instances.bboxes.tolist() == [[10, 20, 30, 60]], 'a copy is changed'


def test_a_large_image_stays_as_it_is():
    image, sample = np.zeros((400, 300, 3), np.uint8), detection([[10, 20, 30, 60]], (400, 300), 'a.png')
    assert enlarge(image, sample) == (image, sample)


@pytest.fixture
def labels(monkeypatch):
    """Draw a sample; the places of all labels (left, top, right, bottom), in the halves as they are saved."""

    def draw(sample, folder):
        places = []
        cfg = Config(dict(visualizer=dict(type='mmdet.DetLocalVisualizer')))
        visualizer = _build_visualizer(cfg, f'test of {folder}')
        visualizer.dataset_meta = dict(classes=['a class with a name'], palette=[(200, 0, 0)])
        kind = type(visualizer)
        get_image = kind.get_image

        def read(self):
            texts = [self._frame(text) for text in self.ax_save.texts]
            if texts:
                places.append([(left, top, left + width, top + height) for left, top, width, height in texts])
            return get_image(self)

        monkeypatch.setattr(kind, 'get_image', read)
        draw_sample(visualizer, {}, sample, folder, 0)
        return places

    return draw


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_labels_stand_on_their_boxes_within_the_picture_and_apart(labels, tmp_path):
    """Boxes in the middle (two, almost equal), in the upper left corner and at the right edge; 4 times enlarged."""
    Image.new('RGB', (128, 128), (128, 128, 128)).save(tmp_path / 'small.png')
    boxes = [[40, 60, 60, 90], [41, 60, 61, 90], [0, 0, 12, 12], [118, 100, 128, 120]]
    places = labels(detection(boxes, (128, 128), tmp_path / 'small.png'), tmp_path)
    assert places
    for frames in places:
        assert len(frames) == len(boxes)
        for left, top, right, bottom in frames:
            assert min(left, top) > -1.5
            assert max(right, bottom) < 512 + 1.5
        for i in (0, 1, 3):
            assert frames[i][3] <= 4 * boxes[i][1] + 2, 'the label is above the box'
            assert frames[i][3] > 4 * boxes[i][1] - 50, 'and near it'
        assert not any(overlap(a, b) for i, a in enumerate(frames) for b in frames[:i])
    with Image.open(tmp_path / '1-small.png') as image:
        assert image.width == 1024
        assert image.height > 512
        strip = np.asarray(image.convert('L'))[: image.height - 512]
    assert all(half.min() < 100 < 250 < half.max() for half in np.split(strip, 2, axis=1)), 'each half is named'
