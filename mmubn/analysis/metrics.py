"""In which unit a metric is logged: its own, which the values do not tell. 0.8 may be an AP, or an accuracy in %."""

from __future__ import annotations

import re

__all__ = ['FRACTION', 'PERCENT', 'axis_label', 'decimals', 'shown', 'unit_of']

PERCENT = '%'
FRACTION = 'from 0 to 1'

# What MMPretrain and MMDetection put before the names of a metric.
UNITS = {
    PERCENT: ('accuracy', 'single-label', 'multi-label', 'retrieval', 'coco_panoptic'),
    FRACTION: (
        'coco',
        'lvis',
        'lvis_fixed_ap',
        'pascal_voc',
        'openimages',
        'crowd_human',
        'cityscapes',
        'youtube_vis',
        'reid-metric',
    ),
}
# The names themselves, where an evaluator has another prefix or the user gives the last part of a tag alone.
NAMES = {PERCENT: r'top\d+(_.+)?', FRACTION: r'(bbox|segm|proposal)_m?AP.*|(bbox_|segm_)?AR_?[sml]?@\d+'}
COUNTS = ('support',)


def unit_of(tag: str) -> str:
    """Return PERCENT, FRACTION or, where it is not known, an empty text for a tag such as ``coco/bbox_mAP``."""
    *prefixes, name = tag.split('/')
    if name.partition('_')[0] in COUNTS:
        return ''
    for unit, known in UNITS.items():
        # task0_accuracy is the prefix in a model of several tasks.
        if prefixes and (prefixes[-1] in known or prefixes[-1].rpartition('_')[2] in known):
            return unit
    return next((unit for unit, pattern in NAMES.items() if re.fullmatch(pattern, name)), '')


def axis_label(tag: str) -> str:
    """Return the last part of the tag with its unit."""
    name, unit = tag.split('/')[-1], unit_of(tag)
    return f'{name} ({unit})' if unit else name


def decimals(tag: str) -> int:
    """Return how many digits behind the point are shown."""
    return 2 if unit_of(tag) == PERCENT else 3


def shown(tag: str, value: float) -> str:
    """Write a value of the metric with its unit, if it is percent."""
    return f'{value:.{decimals(tag)}f}{"%" if unit_of(tag) == PERCENT else ""}'
