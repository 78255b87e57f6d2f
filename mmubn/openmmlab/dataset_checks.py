"""Checks the data sets of a run before anything is built: their class names, annotation files and images.

Each annotation file is read once more than MMDetection does, by the first process alone, and forgotten. Data sets that
are not on a local disk, of other classes or with readers of their own are left to the libraries.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, Registry

from mmubn.openmmlab.annotation_checks import (
    check_classes,
    check_evaluation,
    check_instances,
    listed,
    read_annotations,
    similar,
)
from mmubn.openmmlab.config_types import find_dicts, find_type
from mmubn.openmmlab.errors import DataError

__all__ = ['check_data', 'missing_files']


class _Source(NamedTuple):
    """A data set of a config: built, but not read."""

    place: str  # in the config
    dataset: Any
    named: bool  # whether the config names its classes
    masks: bool  # whether its pipeline loads masks


def check_data(cfg: Config, splits: Sequence[str]) -> list[str]:
    """Check the data sets and metrics of ``splits``, of train, val and test.

    Of COCO format (MMDetection's CocoDataset and CocoMetric) are checked: that each class is a category of the file, in
    the order of the file; that the file has what is read of it; that images are left, and on the disk. Of MMPretrain's
    CustomDataset and ImageNet: that folders are classes, the same in all splits, or that each line has a label.

    Returns:
        Lines for the log, about what is left out or looks wrong.

    Raises:
        DataError: One line with the file or folder, the key and what to do.
    """
    notes: list[str] = []
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope', 'mmengine')) as registry:
        sources = {split: list(_sources(cfg, split, registry)) for split in splits}
    everything = [source for each in sources.values() for source in each]
    if 'language_model' not in (cfg.get('model') or {}):  # there each data set may have classes of its own
        _check_same_classes(everything)
    files: dict[str, dict] = {}
    ordered: list[str] = []
    coco = _loaded('mmdet.datasets.coco', 'CocoDataset')
    for split, each in sources.items():
        _forget(files, [source.dataset.ann_file for source in each])
        images: dict = {}
        read = [source for source in each if _is_coco(source.dataset, coco)]
        for source in read:
            notes += _check_coco(source, files, ordered, images, split == 'train')
        if split != 'train' and read:
            notes += _check_metrics(cfg, split, read[0], files, ordered, images)
    _check_folders([source for source in everything if coco is None or not isinstance(source.dataset, coco)])
    return list(dict.fromkeys(notes))


def _loaded(module: str, name: str) -> Any:
    """A class of another library; None where nobody has imported it, and no data set can be of it."""
    return getattr(sys.modules.get(module), name, None)


def _sources(cfg: Config, split: str, registry: Registry) -> Iterator[_Source]:
    config = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
    masks = any(node.get('with_mask') for _, node in find_dicts(config))
    for place, node in find_dicts(config, f'{split}_dataloader.dataset'):
        kind = None if '.pipeline' in place or 'type' not in node else find_type(node['type'], registry)
        bases = (_loaded('mmdet.datasets.coco', 'CocoDataset'), _loaded('mmpretrain.datasets.custom', 'CustomDataset'))
        of_coco, of_folders = (base is not None and isinstance(kind, type) and issubclass(kind, base) for base in bases)
        if not (of_coco or of_folders) or _is_remote(node):
            continue
        _check_names(place, node, of_coco)
        arguments = {key: copy.deepcopy(value) for key, value in node.items() if key not in ('pipeline', 'lazy_init')}
        try:
            dataset = registry.build(dict(arguments, pipeline=[], lazy_init=True))
        except Exception:  # an argument that does not fit, of which the class itself tells when the runner builds it
            continue
        named = 'classes' in (node.get('metainfo') or {}) or node.get('classes') is not None
        yield _Source(place, dataset, named, masks)


def _is_remote(node: dict) -> bool:
    prefix = node.get('data_prefix') or {}
    paths = [node.get('data_root'), node.get('ann_file'), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    return node.get('backend_args') is not None or any('://' in path for path in paths if isinstance(path, str))


def _check_names(place: str, node: dict, of_coco: bool) -> None:
    """Check that the classes which a config names are different names, and that it names them where they are read."""
    metainfo = node.get('metainfo') or {}
    if of_coco and 'classes' in node:
        raise DataError(f'{place}.classes is not read by {_name(node)}: write metainfo=dict(classes=(...)).')
    if 'CLASSES' in metainfo and 'classes' not in metainfo:
        raise DataError(f'{place}.metainfo.CLASSES is how MMDetection 2 wrote it: write metainfo=dict(classes=(...)).')
    for key, classes in (
        (f'{place}.metainfo.classes', metainfo.get('classes')),
        (f'{place}.classes', node.get('classes')),
    ):
        if classes is None:
            continue
        if isinstance(classes, str):
            if Path(classes).expanduser().is_file():
                continue
            raise DataError(
                f'{key} is the string {classes!r}, and no file of that name exists: a tuple of one class needs a '
                f'comma, classes=({classes!r},).'
            )
        if not isinstance(classes, (tuple, list)):
            raise DataError(f'{key} is a {type(classes).__name__}; expected a tuple of names.')
        for name in classes:
            if not isinstance(name, str):
                raise DataError(f'{key} has {name!r}, a {type(name).__name__}; expected names in quotes.')
            if list(classes).count(name) > 1:
                raise DataError(f'{key} names {name!r} {list(classes).count(name)} times; name each class once.')


def _name(node: dict) -> str:
    return getattr(node['type'], '__name__', str(node['type']))


def _check_same_classes(sources: list[_Source]) -> None:
    known = [(source, tuple(classes)) for source in sources if (classes := source.dataset.metainfo.get('classes'))]
    for source, classes in known[1:]:
        first, expected = known[0]
        if classes == expected:
            continue
        for one, other in ((source, first), (first, source)):
            if not one.named and other.named:
                raise DataError(
                    f'{one.place} has no metainfo.classes, so that its classes are the '
                    f'{len(one.dataset.metainfo["classes"])} of {type(one.dataset).__name__}, other than those of '
                    f'{other.place}; give both the same metainfo=dict(classes=(...)).'
                )
        raise DataError(
            f'{first.place} and {source.place} have other classes: {listed(expected)} and {listed(classes)}; give both '
            'the same metainfo=dict(classes=(...)).'
        )


def _is_coco(dataset: Any, coco: Any) -> bool:
    """Whether it reads its file as CocoDataset does. Those of LVIS, panoptic and other formats have other readers."""
    if coco is None or not isinstance(dataset, coco):
        return False
    own = type(dataset)
    return own.COCOAPI is coco.COCOAPI and all(
        getattr(own, name) is getattr(coco, name) for name in ('load_data_list', 'parse_data_info')
    )


def _forget(files: dict[str, dict], needed: list[str]) -> None:
    """Free what was read of other files: that of COCO's training images takes gigabytes."""
    for path in set(files) - set(needed):
        del files[path]


def _read(path: str, files: dict[str, dict], annotated: bool) -> dict:
    if path not in files:
        files[path] = read_annotations(path, annotated)
    return files[path]


def _check_coco(source: _Source, files: dict[str, dict], ordered: list[str], images: dict, training: bool) -> list[str]:
    place, dataset = source.place, source.dataset
    path = dataset.ann_file
    if not path:
        raise DataError(f'{place}.ann_file is not set; expected an annotation file of COCO format.')
    data = _read(path, files, training)
    categories = _chosen(source, data, path, ordered)
    notes = check_instances(data, path, categories, place, source.masks, training)
    left = _left_images(source, data, categories)
    if isinstance(dataset._indices, int):
        left = left[: dataset._indices] if dataset._indices >= 0 else left[dataset._indices :]
    images.update({image['id']: image['file_name'] for image in left})
    if 'img' not in dataset.data_prefix:
        raise DataError(f"{place}.data_prefix has no 'img', the folder of the images; write data_prefix=dict(img=...).")
    folder = dataset.data_prefix['img']
    if missing := missing_files(folder, [image['file_name'] for image in left]):
        raise DataError(
            f'{path}: {len(missing)} of {len(left)} images are not in {folder or "."}; the first: {missing[0]!r}. '
            f'Correct {place}.data_prefix.img or data_root, or file_name in the file, or fetch the images.'
        )
    return notes


def _chosen(source: _Source, data: dict, path: str, ordered: list[str]) -> list[dict]:
    """The categories of the classes, checked; ``ordered`` are files whose categories have the order of the classes."""
    default = None if source.named else type(source.dataset).__name__
    other = next((each for each in ordered if each != path), None)
    categories = check_classes(data, path, source.dataset.metainfo['classes'], source.place, default, other)
    ordered.append(path)
    return categories


def _left_images(source: _Source, data: dict, categories: list[dict]) -> list[dict]:
    """The images that CocoDataset.filter_data leaves."""
    dataset, images = source.dataset, data['images']
    if dataset.test_mode or not dataset.filter_cfg:
        return images
    least = dataset.filter_cfg.get('min_size', 0)
    left = [image for image in images if min(image['width'], image['height']) >= least]
    small = len(images) - len(left)
    if dataset.filter_cfg.get('filter_empty_gt', False):
        chosen = {category['id'] for category in categories}
        annotated = {each['image_id'] for each in data['annotations'] if each['category_id'] in chosen}
        left = [image for image in left if image['id'] in annotated]
    if not left:
        raise DataError(
            f'{dataset.ann_file}: no image is left of {len(images)}: {small} are smaller than {least} pixels, and '
            f'{len(images) - small} have no annotation of the classes; change {source.place}.filter_cfg '
            f'(min_size={least}, filter_empty_gt={dataset.filter_cfg.get("filter_empty_gt", False)}), or the file.'
        )
    return left


def missing_files(folder: str, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are not in ``folder``.

    Folders are listed, and not asked for each file: on network storage that is seconds for COCO, and not minutes.
    """
    there: dict[str, set[str]] = {}
    for parent in {name.rpartition('/')[0] for name in names}:
        try:
            with os.scandir(Path(folder, parent)) as entries:
                there[parent] = {entry.name for entry in entries}
        except OSError:
            there[parent] = set()
    split = ((name, *name.rpartition('/')) for name in names)
    return [name for name, parent, _, base in split if base not in there[parent]]


def _check_metrics(
    cfg: Config, split: str, source: _Source, files: dict[str, dict], ordered: list[str], images: dict
) -> list[str]:
    """Check CocoMetric's annotation file against the classes and images of the data set whose predictions it gets."""
    notes = []
    for place, node in find_dicts(cfg.get(f'{split}_evaluator') or {}, f'{split}_evaluator'):
        with METRICS.switch_scope_and_registry(cfg.get('default_scope', 'mmengine')) as registry:
            kind = find_type(node['type'], registry) if 'type' in node else None
        coco = _loaded('mmdet.evaluation.metrics.coco_metric', 'CocoMetric')  # after its name was looked up
        path = node.get('ann_file')
        if not (coco and isinstance(kind, type) and issubclass(kind, coco)) or not isinstance(path, str):
            continue
        if kind.compute_metrics is not coco.compute_metrics or '://' in path or node.get('backend_args') is not None:
            continue
        only_writes = node.get('format_only', False)
        data = _read(path, files, not only_writes)
        categories = _chosen(source, data, path, ordered)
        notes += _check_same_images(data, path, place, source, images)
        if not only_writes:
            metric = node.get('metric', 'bbox')
            masks = 'segm' in ([metric] if isinstance(metric, str) else metric)
            notes += check_evaluation(data, path, categories, place, masks)
    return notes


def _check_same_images(data: dict, path: str, place: str, source: _Source, images: dict) -> list[str]:
    own = {image['id']: image['file_name'] for image in data['images']}
    same = f'give both the same file ({source.dataset.ann_file}).'
    for number, name in images.items():
        if own.get(number) != name:
            found = f'calls {own[number]!r}' if number in own else 'does not have'
            raise DataError(
                f'{place}.ann_file {path} is of other images than {source.place}, whose image {number!r} ({name}) it '
                f'{found}; {same}'
            )
    if len(own) == len(images):
        return []
    fewer = f'{path} has {len(own)} images, and {source.place} reads {len(images)} of them'
    if source.dataset._indices is None:
        raise DataError(f'{place}.ann_file {fewer}: the objects of the others would count as missed; {same}')
    return [f'{fewer} (indices): the objects of the others count as missed, and {place} measures too little.']


def _check_folders(sources: list[_Source]) -> None:
    """Check MMPretrain's data sets whose classes are folders, sorted by name, or whose labels are in a text file."""
    base = _loaded('mmpretrain.datasets.custom', 'CustomDataset')
    first: tuple[_Source, list[str]] | None = None
    for source in sources:
        dataset = source.dataset
        if type(dataset).load_data_list is not base.load_data_list or not dataset.with_label:
            continue
        if dataset.ann_file:
            _check_label_file(source)
            continue
        try:
            folders = sorted(entry.name for entry in os.scandir(dataset.img_prefix or '.') if entry.is_dir())
        except OSError as error:
            raise DataError(f'{source.place}: {dataset.img_prefix} cannot be read: {error.strerror}.') from error
        if not folders:
            raise DataError(f'{source.place}: {dataset.img_prefix} has no folders; expected one for each class.')
        if source.named:
            _check_folder_names(source, folders)
        elif dataset.CLASSES is not None and len(dataset.CLASSES) != len(folders):
            raise DataError(
                f'{source.place} has no metainfo.classes, so that its classes are the {len(dataset.CLASSES)} of '
                f'{type(dataset).__name__}, and {dataset.img_prefix} has {len(folders)} folders: set {source.place}.'
                f'metainfo=dict(classes=(...)), in the order of {listed(folders)}.'
            )
        if first is None:
            first = (source, folders)
        elif folders != first[1]:
            _raise_other_folders(*first, source, folders)


def _check_folder_names(source: _Source, folders: list[str]) -> None:
    classes = list(source.dataset.CLASSES)
    plain = [[name.strip().casefold() for name in names] for names in (classes, folders)]
    key = f'{source.place}.metainfo.classes'
    if len(classes) == len(folders) and (plain[0] == plain[1] or not set(plain[0]) & set(plain[1])):
        return  # the same, or other names for all, as ImageNet has for its folders
    missing = [name for name in classes if name not in folders]
    if missing:
        raise DataError(
            f'{key} names {listed(missing)}, for which {source.dataset.img_prefix} has no folder; its folders are '
            f'{listed(folders)}.{similar(missing[0], folders)} Correct the name, or make the folder (it may be empty).'
        )
    if len(classes) != len(folders):
        extra = [name for name in folders if name not in classes]
        raise DataError(
            f'{source.dataset.img_prefix} has folders that {key} does not name: {listed(extra)}; name them, or move '
            'them away.'
        )
    raise DataError(
        f'{key} has another order than the folders of {source.dataset.img_prefix}, which are numbered by name: write '
        f'classes=({", ".join(map(repr, folders))}).'
    )


def _raise_other_folders(first: _Source, expected: list[str], source: _Source, folders: list[str]) -> None:
    here, there = source.dataset.img_prefix, first.dataset.img_prefix
    missing, extra = (
        [name for name in one if name not in other] for one, other in ((expected, folders), (folders, expected))
    )
    texts = [f'lacks {listed(missing)}'] if missing else []
    texts += [f'has {listed(extra)} besides'] if extra else []
    raise DataError(
        f'{here} ({source.place}) {" and ".join(texts)}, other than {there} ({first.place}): folders are numbered by '
        'name, so that labels would stand for other classes; give both the same folders (they may be empty).'
    )


def _check_label_file(source: _Source) -> None:
    dataset, names = source.dataset, []
    try:
        lines = Path(dataset.ann_file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{source.place}.ann_file {dataset.ann_file} cannot be read: {error}.') from error
    if not lines:
        raise DataError(f'{source.place}.ann_file {dataset.ann_file} is empty; expected lines "PATH LABEL".')
    count = len(dataset.CLASSES) if dataset.CLASSES is not None else None
    for number, line in enumerate(lines, start=1):
        name, _, label = line.strip().rpartition(' ')
        if not name or not label.isdecimal():
            raise DataError(
                f'{dataset.ann_file}, line {number}: expected "PATH LABEL", the label a number, got {line!r}.'
            )
        if count is not None and int(label) >= count:
            raise DataError(
                f'{dataset.ann_file}, line {number}: label {label} of {count} classes, which are numbered from 0 to '
                f'{count - 1}; correct it, or {source.place}.metainfo.classes.'
            )
        names.append(name)
    if missing := missing_files(dataset.img_prefix, names):
        raise DataError(
            f'{dataset.ann_file}: {len(missing)} of {len(names)} images are not in {dataset.img_prefix}; '
            f'the first: {missing[0]!r}. Correct {source.place}.data_prefix or data_root, or the paths in the file.'
        )
