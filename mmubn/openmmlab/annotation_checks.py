"""Annotation files of COCO format: what MMDetection leaves out without a word, or stumbles over hours later.

MMDetection (3.3) and pycocotools number labels by the order of the file's categories, skip names that the file does not
have, boxes of no size and annotations of unknown images or categories, and need keys that they ask for in the middle of
a run: ``area`` when the data set is read, ``iscrowd`` and ``segmentation`` after the first validation.
"""

from __future__ import annotations

import difflib
import gc
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mmubn.openmmlab.errors import DataError

__all__ = [
    'Instances',
    'Problems',
    'check_classes',
    'check_evaluation',
    'check_instances',
    'listed',
    'read_annotations',
    'similar',
]

KEYS = {
    'categories': {'id', 'name'},
    'images': {'id', 'file_name', 'height', 'width'},
    'annotations': {'id', 'image_id', 'category_id'},
}
MARGIN = 2  # pixels that a box may reach beyond its image, by rounding
FEWEST_NUMBERS = 6  # of a polygon: three points


def read_annotations(path: str, annotated: bool = True) -> dict:
    """Read an annotation file: a dict with ``images``, ``categories`` and ``annotations``, whose ids are unique.

    Args:
        path: Of the file.
        annotated: Whether ``annotations`` are needed. Without, they may be left out, as in the test sets of COCO.

    Raises:
        DataError: It cannot be read, is no JSON or not of COCO format.
    """
    collecting = gc.isenabled()
    gc.disable()  # it would look through millions of new objects, again and again, and find nothing
    try:
        with Path(path).open() as file:
            data = json.load(file)
    except json.JSONDecodeError as error:
        if not error.doc.strip():
            raise DataError(f'{path} is empty; expected JSON of COCO format.') from error
        raise DataError(
            f'{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); write the file again, '
            'or correct it there.'
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is no text ({error}); expected JSON of COCO format.') from error
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}.') from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(data, dict):
        raise DataError(
            f'{path} is not of COCO format: expected a dict with images, categories and annotations, '
            f'got a {type(data).__name__} of JSON.'
        )
    if not annotated:
        data.setdefault('annotations', [])
    for name, keys in KEYS.items():
        if not isinstance(data.get(name), list):
            found = listed(data) if name not in data else f'{name} is a {type(data[name]).__name__}'
            raise DataError(f'{path} is not of COCO format: expected a list under the key "{name}" (found: {found}).')
        _check_entries(path, name, data[name], keys)
    if not data['images']:
        raise DataError(f'{path} has no images.')
    for key, name in (('image_id', 'images'), ('category_id', 'categories')):
        _check_references(path, data, key, name)
    return data


def _check_references(path: str, data: dict, key: str, name: str) -> None:
    """Check that annotations have ids of the same type as the images and categories: '3' is not 3."""
    ids = {entry['id'] for entry in data[name]}
    texts = {str(each) for each in ids}
    for annotation in data['annotations']:
        value = annotation[key]
        if not isinstance(value, (int, float, str)):
            raise DataError(f'{path}: annotation {annotation["id"]!r} has the {key} {value!r}; expected a number.')
        if value not in ids and str(value) in texts:
            other = next(each for each in ids if str(each) == str(value))
            raise DataError(
                f'{path}: annotation {annotation["id"]!r} has the {key} {value!r}, and {name} have the id {other!r}, '
                'which is not the same: write numbers without quotes in both.'
            )


def _check_entries(path: str, name: str, entries: list, keys: set[str]) -> None:
    wrong = [i for i, entry in enumerate(entries) if not (isinstance(entry, dict) and keys <= entry.keys())]
    if wrong:
        first = entries[wrong[0]]
        missing = listed(sorted(keys - first.keys())) if isinstance(first, dict) else listed(sorted(keys))
        raise DataError(
            f'{path}: {len(wrong)} of {len(entries)} {name} have no {missing}; the first: {name}[{wrong[0]}].'
        )
    seen: set = set()
    for entry in entries:
        if not isinstance(entry['id'], (int, str)):
            raise DataError(f'{path}: an id in {name} is {entry["id"]!r}; expected a number.')
        if entry['id'] in seen:
            raise DataError(f'{path}: several {name} have the id {entry["id"]!r}; each needs one of its own.')
        seen.add(entry['id'])
    if name == 'images':
        for image in entries:
            if not all(isinstance(image[side], (int, float)) and image[side] > 0 for side in ('height', 'width')):
                raise DataError(
                    f'{path}: image {image["id"]!r} has height {image["height"]!r} and width {image["width"]!r}; '
                    'expected its numbers of pixels.'
                )


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names for an error, in quotes; of many the first ones."""
    names = [repr(name) for name in names]
    return ', '.join(names) if len(names) <= most else f'{", ".join(names[:most])}, ... ({len(names)} in all)'


def similar(name: str, names: Iterable[str]) -> str:
    """A remedy: the name that was meant, if one of ``names`` is like it; empty otherwise."""
    plain = {_plain(each): each for each in names}
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.75)
    return f' Did you mean {plain[close[0]]!r}?' if close else ''


def _plain(name: str) -> str:
    return ' '.join(name.replace('_', ' ').replace('-', ' ').casefold().split())


def check_classes(
    data: dict,
    path: str,
    classes: Sequence[str],
    place: str,
    default_of: str | None = None,
    other: str | None = None,
) -> list[dict]:
    """Check that ``classes`` are categories of the file, in the order of the file.

    Args:
        data: Of :func:`read_annotations`.
        path: Of the file.
        classes: Names, as the config has them or as MMDetection takes them.
        place: Of the data set in the config.
        default_of: The data set's class, where the config names no classes and those of the class count.
        other: Another file of the run, whose categories have the order of the classes.

    Returns:
        The categories of the classes.

    Raises:
        DataError: A class is no category, several categories have its name, or the order is another one.
    """
    names = [category['name'] for category in data['categories']]
    source = f'{place}.metainfo.classes'
    if missing := [name for name in classes if name not in names]:
        if default_of is not None:
            raise DataError(
                f'{place} has no metainfo.classes, so that its classes are the {len(classes)} of {default_of}, and '
                f'{listed(missing, most=3)} {_are(missing)} no categories of {path}: set {place}.metainfo='
                f'dict(classes=({", ".join(map(repr, names[:12]))},{" ..." if len(names) > 12 else ""})).'
            )
        raise DataError(
            f'{source} names {listed(missing)}, which {path} does not have; its categories are {listed(names)}.'
            f'{similar(missing[0], names)} Correct the name there, or in the file.'
        )
    categories = [category for category in data['categories'] if category['name'] in set(classes)]
    ordered = [category['name'] for category in categories]
    if len(ordered) > len(classes):
        twice = next(name for name in ordered if ordered.count(name) > 1)
        ids = [category['id'] for category in categories if category['name'] == twice]
        raise DataError(f'{path} has {len(ids)} categories called {twice!r} (ids {listed(ids)}); make them one.')
    if ordered != list(classes):
        if other is not None:
            raise DataError(
                f'{path} has its categories in another order than {other}: {listed(ordered)}, not {listed(classes)}. '
                'MMDetection numbers the labels by it, so that they would stand for other classes; give both files '
                'one order of categories.'
            )
        first = next(i for i, name in enumerate(ordered) if name != classes[i])
        raise DataError(
            f'{source} has another order than the categories of {path}, by whose order MMDetection numbers the labels: '
            f'label {first} would be {ordered[first]!r} and be called {classes[first]!r}; write '
            f'classes=({", ".join(map(repr, ordered))}).'
        )
    return categories


def _are(names: Sequence) -> str:
    return 'is' if len(names) == 1 else 'are'


@dataclass
class Problems:
    """How many annotations have a problem, and the id of the first one that has."""

    total: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    firsts: dict[str, object] = field(default_factory=dict)

    def add(self, problem: str, annotation: dict) -> None:
        self.counts[problem] = self.counts.get(problem, 0) + 1
        self.firsts.setdefault(problem, annotation['id'])

    def __contains__(self, problem: str) -> bool:
        return problem in self.counts

    def text(self, problem: str) -> str:
        """``3 of 40 annotations have no "area" (the first: id 7)``."""
        return f'{self.counts[problem]} of {self.total} annotations {problem} (the first: id {self.firsts[problem]!r})'


NO_CATEGORY = 'have a category_id that is not among the categories'
NO_IMAGE = 'have an image_id that is not among the images'
NO_BOX = 'have no "bbox" of four numbers [x, y, width, height]'
NO_AREA = 'have no number under "area"'
NO_CROWD = 'have no "iscrowd"'
NO_MASK = 'have no or an empty "segmentation"'
NO_POLYGON = 'have a "segmentation" that is neither a list of polygons [[x1, y1, x2, y2, x3, y3, ...]] nor an RLE'
OTHER_SIZE = 'have an RLE of another size than their image'
NO_SIZE = 'have a box of no size, less than a pixel, or outside their image'
OUTSIDE = 'have a box that reaches beyond their image'
OTHER_CLASS = 'are of categories that the classes leave out'
ZERO_ID = 'have the id 0'

MASK_REMEDY = (
    '{place} {uses} masks: add a polygon or an RLE to each, or use a config without masks (Faster R-CNN, for one).'
)


class Instances(NamedTuple):
    """What MMDetection's CocoDataset takes of a file.

    Attributes:
        notes: What is worth a warning: annotations that are left out, or look wrong.
        used: How many annotations are read.
        reasons: Why the others are not.
        sizeless: Whether it has boxes of the classes, and all of no size or outside their images.
    """

    notes: list[str]
    used: int
    reasons: str
    sizeless: bool


def check_instances(data: dict, path: str, categories: Sequence[dict], place: str, masks: bool) -> Instances:
    """Check what MMDetection's CocoDataset reads of annotations.

    Args:
        data: Of :func:`read_annotations`.
        path: Of the file.
        categories: Those of the classes.
        place: Of the data set in the config.
        masks: Whether its pipeline loads masks.

    Raises:
        DataError: Names the key, the first annotation and how many are like it.
    """
    images = {image['id']: image for image in data['images']}
    known = {category['id'] for category in data['categories']}
    chosen = {category['id'] for category in categories}
    problems = Problems(len(data['annotations']))
    used = 0
    for annotation in data['annotations']:
        if annotation['category_id'] not in known:
            problems.add(NO_CATEGORY, annotation)
            continue
        image = images.get(annotation['image_id'])
        if image is None:
            problems.add(NO_IMAGE, annotation)
            continue
        if annotation.get('ignore'):
            continue
        if (box := _box(annotation)) is None:
            problems.add(NO_BOX, annotation)
            continue
        if not isinstance(area := annotation.get('area'), (int, float)):
            problems.add(NO_AREA, annotation)
            continue
        x, y, width, height = box
        right, bottom = x + width, y + height
        if annotation['category_id'] not in chosen:
            problems.add(OTHER_CLASS, annotation)
            continue
        inside = right > 0 and bottom > 0 and x < image['width'] and y < image['height']
        if not inside or width < 1 or height < 1 or area <= 0:
            problems.add(NO_SIZE, annotation)
            continue
        if min(x, y) < -MARGIN or right > image['width'] + MARGIN or bottom > image['height'] + MARGIN:
            problems.add(OUTSIDE, annotation)
        if masks and (wrong := _wrong_mask(annotation, image)):
            problems.add(wrong, annotation)
        used += 1
    needed = {
        NO_CATEGORY: 'correct the ids; are they counted from 0 in one place and from 1 in the other?',
        NO_BOX: 'MMDetection reads one of every annotation.',
        NO_AREA: 'MMDetection asks for it: width * height of the box, or that of the mask.',
        NO_MASK: MASK_REMEDY.format(place=place, uses='loads'),
        NO_POLYGON: MASK_REMEDY.format(place=place, uses='loads'),
        OTHER_SIZE: 'correct "size" ([height, width]) there, or height and width of the image.',
    }
    for problem, remedy in needed.items():
        if problem in problems:
            raise DataError(f'{path}: {problems.text(problem)}; {remedy}')
    noted = (NO_IMAGE, NO_SIZE, OTHER_CLASS)
    reasons = '; '.join(problems.text(problem) for problem in noted if problem in problems) or 'it has none'
    remedy = ' Boxes are [x, y, width, height] in pixels.' if NO_SIZE in problems else ''
    notes = [f'{path}: {problems.text(problem)} and are left out.' for problem in noted[:2] if problem in problems]
    if OTHER_CLASS in problems:
        names = [category['name'] for category in data['categories'] if category['id'] not in chosen]
        count = problems.counts[OTHER_CLASS]
        notes.append(
            f'{path}: {place}.metainfo.classes leaves out the categories {listed(names)}, and {count} of '
            f'{problems.total} annotations with them.'
        )
    if OUTSIDE in problems:
        notes.append(
            f'{path}: {problems.text(OUTSIDE)}; a box is [x, y, width, height] in pixels, not [x1, y1, x2, y2].'
        )
    return Instances(notes, used, f'{reasons}.{remedy}', used == 0 and NO_SIZE in problems)


def _box(annotation: dict) -> tuple | None:
    try:
        x, y, width, height = annotation['bbox']
        finite = (total := x + y + width + height) - total == 0
    except (KeyError, TypeError, ValueError):
        return None
    return (x, y, width, height) if finite else None


def _wrong_mask(annotation: dict, image: dict) -> str | None:
    mask = annotation.get('segmentation')
    if not mask:
        return NO_MASK
    if isinstance(mask, dict):
        if not (isinstance(mask.get('counts'), (str, list)) and isinstance(mask.get('size'), list)):
            return NO_POLYGON
        return OTHER_SIZE if mask['size'] != [image['height'], image['width']] else None
    polygons = isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)
    if not polygons or not any(len(polygon) >= FEWEST_NUMBERS and len(polygon) % 2 == 0 for polygon in mask):
        return NO_POLYGON
    return None


def check_evaluation(data: dict, path: str, categories: Sequence[dict], place: str, masks: bool) -> list[str]:
    """Check what MMDetection's CocoMetric reads of annotations, after the first validation.

    Args:
        data: Of :func:`read_annotations`.
        path: Of the file.
        categories: Those of the classes.
        place: Of the metric in the config.
        masks: Whether it measures masks (``segm``).

    Returns:
        What is worth a warning.

    Raises:
        DataError: Names the key, the first annotation and how many are like it; or no annotation is of the classes.
    """
    images = {image['id']: image for image in data['images']}
    chosen = {category['id'] for category in categories}
    counted = [each for each in data['annotations'] if each['image_id'] in images and each['category_id'] in chosen]
    problems = Problems(len(data['annotations']))
    if not counted:
        raise DataError(
            f'{path}: none of its {problems.total} annotations is of its images and the classes, so that '
            f'{place} has nothing to compare with (its AP would be -1); give a file with annotations.'
        )
    for annotation in counted:
        if 'iscrowd' not in annotation:
            problems.add(NO_CROWD, annotation)
        if _box(annotation) is None:
            problems.add(NO_BOX, annotation)
        if not isinstance(annotation.get('area'), (int, float)):
            problems.add(NO_AREA, annotation)
        if masks and (wrong := _wrong_mask(annotation, images[annotation['image_id']])):
            problems.add(wrong, annotation)
        if annotation['id'] == 0:
            problems.add(ZERO_ID, annotation)
    needed = {
        NO_CROWD: f'{place} asks for it: 0 for a single object.',
        NO_BOX: f'{place} compares them.',
        NO_AREA: f'{place} asks for it: width * height of the box, or that of the mask.',
        NO_MASK: f"{MASK_REMEDY.format(place=place, uses='measures')} To measure boxes alone set metric='bbox'.",
        NO_POLYGON: MASK_REMEDY.format(place=place, uses='measures'),
        OTHER_SIZE: 'correct "size" ([height, width]) there, or height and width of the image.',
    }
    for problem, remedy in needed.items():
        if problem in problems:
            raise DataError(f'{path}: {problems.text(problem)}; {remedy}')
    if ZERO_ID in problems:
        return [f'{path}: an annotation has the id 0, which pycocotools always counts as missed; number them from 1.']
    return []
