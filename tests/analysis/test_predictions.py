"""mmubn.analysis.predictions. tests/tools/test_make_report.py has those of a detector and of a classifier."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmubn.analysis.predictions import draw_sample, last_checkpoint
from mmubn.cli import UsageError


def test_a_moved_work_dir_has_its_checkpoint(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_2.pth\n')
    (tmp_path / 'epoch_2.pth').touch()
    assert last_checkpoint(tmp_path) == tmp_path / 'epoch_2.pth'


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
