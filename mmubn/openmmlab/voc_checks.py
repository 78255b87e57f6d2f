"""Annotation files of PASCAL VOC's format: objects of other names than the classes, which MMDetection leaves out."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmubn.openmmlab.annotation_checks import listed, similar
from mmubn.openmmlab.errors import DataError
from mmubn.openmmlab.local_files import missing_files

__all__ = ['check_voc']


def check_voc(sets: Mapping[str, Any], default_of: str | None, whole: bool, training: bool) -> list[str]:
    """Check the files of MMDetection's XMLDataset, and that they have objects of the classes.

    Files are read until all classes were seen, and all of them only where a class is in none: the 16,551 of VOC 2007
    and 2012 are a second, and MMDetection will read them again.

    Args:
        sets: The data sets of one split by their places in the config; built, but not read.
        default_of: The data set's class, where the config names no classes and those of the class count.
        whole: Whether these are all data sets of the split, so that a class cannot be in another one.
        training: Whether it is trained on them. A validation set may be without objects of a rare class.

    Returns:
        What is worth a warning.

    Raises:
        DataError: A file is missing or broken; no object is of the classes; or a class that is trained on has no
            object, and objects have names that are no classes.
    """
    numbers = {place: _listed_images(place, dataset) for place, dataset in sets.items()}
    place, first = next(iter(sets.items()))
    classes = first.metainfo['classes']
    seen: set[str] = set()
    for at, dataset in sets.items():
        for name in _object_names(dataset, numbers[at]):
            seen.add(name)
            if seen >= set(classes):
                return []
    missing = [name for name in classes if name not in seen]
    others = sorted(seen - set(classes))
    folder = Path(first.sub_data_root, first.ann_subdir)
    if not whole or not missing:
        return []
    wrong = others and (training or len(missing) == len(classes) or any(similar(name, others) for name in missing))
    if wrong and default_of is not None:
        raise DataError(
            f'{place} has no metainfo.classes, so that its classes are the {len(classes)} of {default_of}, and no '
            f'object in {folder} is called {listed(missing, most=3)}: set {place}.metainfo='
            f'dict(classes=(...)), of {listed(sorted(seen))}.'
        )
    if wrong:
        raise DataError(
            f'{place}.metainfo.classes names {listed(missing)}, and no object in {folder} is called so; its objects '
            f'are called {listed(sorted(seen))}.{similar(missing[0], others)} Correct the name there, or in the files.'
        )
    if training and not seen:
        raise DataError(f'{place}: the files in {folder} have no object; expected <object> with <name> and <bndbox>.')
    return [f'{place}: no object in {folder} is called {listed(missing)}, of metainfo.classes.']


def _listed_images(place: str, dataset: Any) -> list[str]:
    path = dataset.ann_file
    if not path:
        raise DataError(f'{place}.ann_file is not set; expected a text file with the name of an image on each line.')
    try:
        names = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{place}.ann_file {path} cannot be read: {getattr(error, "strerror", error)}.') from error
    if not names:
        raise DataError(f'{place}.ann_file {path} is empty; expected the name of an image on each line.')
    for folder, ending in ((dataset.ann_subdir, '.xml'), (dataset.img_subdir, '.jpg')):
        inside = str(Path(dataset.sub_data_root, folder))
        if missing := missing_files(inside, [f'{name}{ending}' for name in names]):
            raise DataError(
                f'{path}: {len(missing)} of {len(names)} {ending} files are not in {inside}; the first: {missing[0]!r}.'
                f' Expected names without an ending on its lines; correct them, or {place}.data_prefix.sub_data_root, '
                'ann_subdir or img_subdir.'
            )
    return names


def _object_names(dataset: Any, names: list[str]) -> Iterator[str]:
    for name in names:
        path = Path(dataset.sub_data_root, dataset.ann_subdir, f'{name}.xml')
        try:
            root = ET.parse(path).getroot()
        except ET.ParseError as error:
            raise DataError(f'{path}: not XML ({error}); write the file again, or correct it there.') from error
        for each in root.findall('object'):
            found = each.findtext('name')
            if not found:
                raise DataError(f'{path}: an <object> has no <name>; expected one of the classes.')
            yield found
