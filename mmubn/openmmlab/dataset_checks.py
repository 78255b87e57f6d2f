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
from mmengine.registry import DATASETS, EVALUATOR, METRICS, Registry

from mmubn.openmmlab.annotation_checks import (
    Instances,
    check_classes,
    check_evaluation,
    check_instances,
    listed,
    read_annotations,
    similar,
)
from mmubn.openmmlab.config_types import find_dicts, find_type
from mmubn.openmmlab.errors import DataError
from mmubn.openmmlab.local_files import missing_files
from mmubn.openmmlab.voc_checks import check_voc

__all__ = ['check_data']


class _Source(NamedTuple):
    """A data set of a config: built, but not read."""

    place: str  # in the config
    dataset: Any
    named: bool  # whether the config names its classes
    masks: bool  # whether its pipeline loads masks
    annotated: bool  # whether its pipeline loads annotations: that of unlabelled images does not

    @property
    def keeps_empty(self) -> bool:
        """Whether it reads images without annotations too."""
        return not (self.dataset.filter_cfg or {}).get('filter_empty_gt', False)


class _Split(NamedTuple):
    """The data sets of one loader."""

    name: str
    cfg: Config
    sources: list[_Source]
    sizes: dict[str, int]  # the number of images of the sources that were read
    whole: bool  # whether the sources are all data sets of the loader

    @property
    def place(self) -> str:
        return f'{self.name}_dataloader.dataset'

    @property
    def loader(self) -> dict:
        return self.cfg.get(f'{self.name}_dataloader') or {}

    def total(self) -> int | None:
        """The number of images of an epoch; None where it is not known, as for data sets that are repeated."""
        expected = {self.place, *(f'{self.place}.datasets.{i}' for i in range(len(self.sizes)))}
        known = self.whole and len(self.sizes) == len(self.sources) and expected >= self.sizes.keys()
        return sum(self.sizes.values()) if known else None


def check_data(cfg: Config, splits: Sequence[str]) -> list[str]:
    """Check the data sets and metrics of ``splits``, of train, val and test.

    Of COCO format (MMDetection's CocoDataset and CocoMetric) are checked: that each class is a category of the file, in
    the order of the file; that the file has what is read of it; that images are left, and on the disk. Of PASCAL VOC's
    (XMLDataset): that files are there, and have objects of the classes. Of MMPretrain's CustomDataset and ImageNet:
    that folders are classes, the same in all splits, or that each line has a label.

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
    for name, each in sources.items():
        _forget(files, [source.dataset.ann_file for source in each])
        leaves = sum(_is_leaf(place, node) for place, node in _data_dicts(cfg, name))
        split = _Split(name, cfg, each, {}, len(each) == leaves)
        notes += _check_coco_split(split, files, ordered)
        notes += _check_voc_split(split)
        _check_batches(split)
    _check_folders(everything)
    return list(dict.fromkeys(notes))


def _loaded(module: str, name: str) -> Any:
    """A class of another library; None where nobody has imported it, and no data set can be of it."""
    return getattr(sys.modules.get(module), name, None)


def _data_dicts(cfg: Config, split: str) -> list[tuple[str, dict]]:
    config = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
    return list(find_dicts(config, f'{split}_dataloader.dataset'))


def _is_leaf(place: str, node: dict) -> bool:
    """Whether this is a data set, and none that repeats, balances, joins or mixes others."""
    inside = place.rpartition('.datasets.')[2].isdecimal() or place.endswith('.dataset')
    return inside and '.pipeline' not in place and not {'dataset', 'datasets'} & node.keys()


def _sources(cfg: Config, split: str, registry: Registry) -> Iterator[_Source]:
    nodes = _data_dicts(cfg, split)
    for place, node in nodes:
        kind = None if '.pipeline' in place or 'type' not in node else find_type(node['type'], registry)
        bases = (
            _loaded('mmdet.datasets.coco', 'CocoDataset'),
            _loaded('mmdet.datasets.xml_style', 'XMLDataset'),
            _loaded('mmpretrain.datasets.custom', 'CustomDataset'),
        )
        of_coco, of_voc, of_folders = (
            base is not None and isinstance(kind, type) and issubclass(kind, base) for base in bases
        )
        if not (of_coco or of_voc or of_folders) or _is_remote(node):
            continue
        _check_names(place, node, of_coco or of_voc)
        arguments = {key: copy.deepcopy(value) for key, value in node.items() if key not in ('pipeline', 'lazy_init')}
        try:
            dataset = registry.build(dict(arguments, pipeline=[], lazy_init=True))
        except Exception as error:  # the class itself tells of other arguments when the runner builds it
            if of_coco and isinstance(node.get('ann_file'), (list, tuple)):
                raise DataError(
                    f'{place}.ann_file is a list, as MMDetection 2 took it; give one file to each data set, and join '
                    "them: dict(type='ConcatDataset', datasets=[...])."
                ) from error
            continue
        named = 'classes' in (node.get('metainfo') or {}) or node.get('classes') is not None
        owners = ((at.partition('.pipeline')[0], each) for at, each in nodes if '.pipeline' in at)
        transforms = [each for owner, each in owners if f'{place}.'.startswith(f'{owner}.')]
        masks = any(each.get('with_mask') for each in transforms)
        yield _Source(place, dataset, named, masks, any(map(_loads_annotations, transforms)))


def _loads_annotations(transform: dict) -> bool:
    kind = transform.get('type')
    name = getattr(kind, '__name__', str(kind).rpartition('.')[2])
    return name.startswith('Load') and 'Annotations' in name and name != 'LoadEmptyAnnotations'


def _is_remote(node: dict) -> bool:
    prefix = node.get('data_prefix') or {}
    paths = [node.get('data_root'), node.get('ann_file'), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    return node.get('backend_args') is not None or any('://' in path for path in paths if isinstance(path, str))


def _check_names(place: str, node: dict, of_detection: bool) -> None:
    """Check that the classes which a config names are different names, and that it names them where they are read."""
    metainfo = node.get('metainfo') or {}
    if of_detection and 'classes' in node:
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


def _check_coco_split(split: _Split, files: dict[str, dict], ordered: list[str]) -> list[str]:
    coco = _loaded('mmdet.datasets.coco', 'CocoDataset')
    training = split.name == 'train'
    images: dict[str, dict] = {}
    found: dict[str, Instances] = {}
    read = [source for source in split.sources if _is_coco(source.dataset, coco)]
    for source in read:
        found[source.place], images[source.place] = _check_coco(source, files, ordered, training)
        split.sizes[source.place] = len(images[source.place])
    notes = [note for each in found.values() for note in each.notes]
    if training:
        return notes + _check_annotated(split, read, found)
    return notes + (_check_metrics(split, read, files, ordered, images) if read else [])


def _check_annotated(split: _Split, read: list[_Source], found: dict[str, Instances]) -> list[str]:
    """Check that something is left to train on. Images without objects may be there beside others."""
    empty = [source for source in read if not found[source.place].used]
    labelled = [source for source in read if source.annotated]
    if labelled and split.whole and len(read) == len(split.sources) and all(source in empty for source in labelled):
        raise DataError(_nothing_left(labelled[0], found[labelled[0].place]))
    return [
        f'{source.dataset.ann_file} ({source.place}) has no annotation of the classes: its images are background.'
        for source in empty
        if source.annotated
    ]


def _nothing_left(source: _Source, instances: Instances) -> str:
    return f'{source.dataset.ann_file}: no annotation is left to train on: {instances.reasons}'


def _check_coco(
    source: _Source, files: dict[str, dict], ordered: list[str], training: bool
) -> tuple[Instances, dict[int | str, str]]:
    """The annotations of a data set, and the names of its images by their ids."""
    place, dataset = source.place, source.dataset
    path = dataset.ann_file
    if not path:
        raise DataError(f'{place}.ann_file is not set; expected an annotation file of COCO format.')
    data = _read(path, files, training and source.annotated and not source.keeps_empty)
    categories = _chosen(source, data, path, ordered)
    instances = check_instances(data, path, categories, place, source.masks)
    if training and source.annotated and not instances.used and (instances.sizeless or not source.keeps_empty):
        raise DataError(_nothing_left(source, instances))
    left = _chosen_indices(source, _left_images(source, data, categories))
    if 'img' not in dataset.data_prefix:
        raise DataError(f"{place}.data_prefix has no 'img', the folder of the images; write data_prefix=dict(img=...).")
    folder = dataset.data_prefix['img']
    if missing := missing_files(folder, [image['file_name'] for image in left]):
        raise DataError(
            f'{path}: {len(missing)} of {len(left)} images are not in {folder or "."}; the first: {missing[0]!r}. '
            f'Correct {place}.data_prefix.img or data_root, or file_name in the file, or fetch the images.'
        )
    return instances, {image['id']: image['file_name'] for image in left}


def _chosen_indices(source: _Source, images: list[dict]) -> list[dict]:
    """Those that ``indices`` takes: so many of the first or, if it is negative, of the last, or a list of them."""
    indices = source.dataset._indices
    if indices is None:
        return images
    if isinstance(indices, int):
        chosen = images[:indices] if indices >= 0 else images[indices:]
    else:
        wrong = [i for i in indices if not -len(images) <= i < len(images)]
        if wrong:
            raise DataError(f'{source.place}.indices has {wrong[0]}, and {len(images)} images are left to choose from.')
        chosen = [images[i] for i in indices]
    if not chosen:
        raise DataError(
            f'{source.place}.indices={indices!r} chooses none of {len(images)} images of {source.dataset.ann_file}; '
            'give a number of images, or leave it out (None) for all.'
        )
    return chosen


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


def _check_metrics(
    split: _Split, read: list[_Source], files: dict[str, dict], ordered: list[str], images: dict[str, dict]
) -> list[str]:
    """Check CocoMetric's annotation file against the classes and images of the data sets whose predictions it gets."""
    notes = []
    evaluator = split.cfg.get(f'{split.name}_evaluator') or {}
    for place, node in find_dicts(evaluator, f'{split.name}_evaluator'):
        with METRICS.switch_scope_and_registry(split.cfg.get('default_scope', 'mmengine')) as registry:
            kind = find_type(node['type'], registry) if 'type' in node else None
        coco = _loaded('mmdet.evaluation.metrics.coco_metric', 'CocoMetric')  # after its name was looked up
        path = node.get('ann_file')
        if not (coco and isinstance(kind, type) and issubclass(kind, coco)) or not isinstance(path, str):
            continue
        if kind.compute_metrics is not coco.compute_metrics or '://' in path or node.get('backend_args') is not None:
            continue
        given, alone = _given_to(split, evaluator, place, read)
        if not given:
            continue
        only_writes = node.get('format_only', False)
        data = _read(path, files, not only_writes)
        categories = _chosen(given[0], data, path, ordered)
        if alone:
            notes += _check_same_images(data, path, place, given[0], images[given[0].place])
        else:
            _check_joined_images(data, path, place, given, images)
        if not only_writes:
            metric = node.get('metric', 'bbox')
            masks = 'segm' in ([metric] if isinstance(metric, str) else metric)
            notes += check_evaluation(data, path, categories, place, masks)
    return notes


def _given_to(split: _Split, evaluator: Any, place: str, read: list[_Source]) -> tuple[list[_Source], bool]:
    """The data sets whose predictions the metric at ``place`` is computed from, none where that is not known.

    MMEngine's Evaluator gives each metric all of them, MMDetection's MultiDatasetsEvaluator those of one data set.

    Returns:
        The data sets of COCO format, and whether it is a single one, and none that was not read.
    """
    everything = read, split.whole and len(split.sources) == len(read) == 1
    if not isinstance(evaluator, dict) or 'metrics' not in evaluator:
        return everything
    with EVALUATOR.switch_scope_and_registry(split.cfg.get('default_scope', 'mmengine')) as registry:
        kind = find_type(evaluator.get('type', 'Evaluator'), registry)
    name = getattr(kind, '__name__', None)
    if name == 'Evaluator':
        return everything
    number = place.removeprefix(f'{split.name}_evaluator.metrics.')
    if name != 'MultiDatasetsEvaluator' or not number.isdecimal():
        return [], False
    return [source for source in read if source.place == f'{split.place}.datasets.{number}'], True


def _check_joined_images(data: dict, path: str, place: str, sources: list[_Source], images: dict[str, dict]) -> None:
    """Check a file that joins those of several data sets. Names of images may have got folders in it."""
    own = {image['id'] for image in data['images']}
    first: dict = {}
    for source in sources:
        for number, name in images[source.place].items():
            if number not in own:
                raise DataError(
                    f'{place}.ann_file {path} does not have image {number!r} ({name}) of {source.place}, whose '
                    'predictions it is compared with; give a file of all images, or a metric to each data set '
                    "(type='MultiDatasetsEvaluator')."
                )
            other = first.setdefault(number, source)
            if other is not source and other.dataset.ann_file != source.dataset.ann_file:
                raise DataError(
                    f'{other.place} and {source.place} both have an image {number!r}, and {place} would take their '
                    "predictions for those of one image; give each data set its metric (type='MultiDatasetsEvaluator')."
                )


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


def _check_voc_split(split: _Split) -> list[str]:
    base = _loaded('mmdet.datasets.xml_style', 'XMLDataset')
    labelled = [source for source in split.sources if source.annotated or split.name != 'train']
    names = ('load_data_list', 'parse_data_info', '_parse_instance_info')
    read = [
        source
        for source in labelled
        if base is not None
        and isinstance(source.dataset, base)
        and all(getattr(type(source.dataset), name) is getattr(base, name) for name in names)
    ]
    sets = {source.place: source.dataset for source in read}
    default = next((type(source.dataset).__name__ for source in read if not source.named), None)
    whole = split.whole and len(read) == len(labelled)
    return check_voc(sets, default, whole, split.name == 'train') if sets else []


def _check_batches(split: _Split) -> None:
    """Check that a training that leaves out the last batch, if it is not full, has another one."""
    loader, total = split.loader, split.total()
    batches = loader.get('batch_sampler') or {}
    keys = {'drop_last': loader.get('drop_last', False), 'batch_sampler.drop_last': batches.get('drop_last', False)}
    key = next((key for key, value in keys.items() if value is True), None)
    size, sampler = loader.get('batch_size'), (loader.get('sampler') or {}).get('type')
    if total is None or key is None or not isinstance(size, int) or str(sampler).rpartition('.')[2] != 'DefaultSampler':
        return
    ranks = int(os.environ.get('WORLD_SIZE', 1)) if split.cfg.get('launcher') == 'pytorch' else 1
    if -(-total // ranks) < size:
        place = f'{split.name}_dataloader'
        among = f', {-(-total // ranks)} for each of {ranks} processes' if ranks > 1 else ''
        raise DataError(
            f'{place} has no batch: its data set has {total} images{among}, fewer than {place}.batch_size={size}, and '
            f'{place}.{key}=True leaves out a batch that is not full; lower batch_size, or set it to False.'
        )


def _check_folders(sources: list[_Source]) -> None:
    """Check MMPretrain's data sets whose classes are folders, sorted by name, or whose labels are in a text file."""
    base = _loaded('mmpretrain.datasets.custom', 'CustomDataset')
    first: tuple[_Source, list[str]] | None = None
    for source in sources:
        dataset = source.dataset
        if base is None or not isinstance(dataset, base):
            continue
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
