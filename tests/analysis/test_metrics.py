"""mmubn.analysis.metrics: the unit is the metric's own."""

import pytest
import torch
from mmpretrain.evaluation import Accuracy

from mmubn.analysis.metrics import FRACTION, PERCENT, axis_label, shown, unit_of


@pytest.mark.parametrize(
    ('unit', 'tags'),
    [
        (
            PERCENT,
            ['accuracy/top1', 'top5', 'top1_thr-0.10', 'val/accuracy/top1', 'task0_accuracy/top1', 'multi-label/mAP'],
        ),
        (FRACTION, ['coco/bbox_mAP', 'segm_mAP_50', 'bbox_mAP', 'pascal_voc/mAP', 'coco/AR@100', 'mine/bbox_mAP']),
        ('', ['acc', 'mAP', 'motchallenge-metric/IDSW', 'single-label/support', 'coconut/score']),
    ],
)
def test_the_unit_goes_by_the_name(unit, tags):
    assert {tag: unit_of(tag) for tag in tags} == dict.fromkeys(tags, unit)


def test_mmpretrains_accuracy_is_percent():
    """Of four predictions one is right."""
    result = Accuracy.calculate(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 0]))
    assert float(result) == 25
    assert unit_of(f'{Accuracy.default_prefix}/top1') == PERCENT


def test_text():
    assert axis_label('accuracy/top1') == 'top1 (%)'
    assert axis_label('coco/bbox_mAP') == 'bbox_mAP (from 0 to 1)'
    assert axis_label('acc') == 'acc'
    assert (shown('accuracy/top1', 0.5), shown('coco/bbox_mAP', 0.5), shown('acc', 50)) == ('0.50%', '0.500', '50.000')
