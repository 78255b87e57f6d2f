"""Whether the files and folders that a run reads are there, asked before anything is built."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mmengine.config import Config

from mmubn.cli.errors import UsageError
from mmubn.openmmlab.config_types import find_dicts, is_pretrained
from mmubn.openmmlab.own_configs import own_file

__all__ = ['check_file', 'check_paths', 'check_work_dir']

DATA_REMEDY = 'lay the data out as {page} says under "Data", or set {key}.data_root with --cfg-options ({digits})'
# Where the layout is described, and what makes the digits in which folder of data/.
OF_DETECTORS = ('README.md (COCO)', 'digits_to_coco.py', 'digits')
OF_CLASSIFIERS = ('docs/reproduce.md (ImageNet, CIFAR)', 'digits_to_imagefolder.py', 'digits-classes')
CHECKPOINT_REMEDY = (
    'train it as README.md says under "ImageNet checkpoints", or set imagenet_checkpoints at the top of '
    '{config} to the folder or URL that has it, or start from another checkpoint with '
    '--cfg-options {key}.checkpoint=PATH_OR_URL {key}.prefix=None (torchvision://resnet50, for one)'
)


def check_file(path: str, what: str, remedy: str, folder: bool = True) -> None:
    """Raise a UsageError that names ``path`` and the ``remedy`` unless it is a URL, a file or, maybe, a ``folder``."""
    if '://' in path:
        return
    if not Path(path).expanduser().exists():
        raise UsageError(f'{what} {path} does not exist; {remedy}.')
    if not folder and Path(path).expanduser().is_dir():
        raise UsageError(f'{what} {path} is a folder; {remedy}.')


def check_paths(cfg: Config, splits: tuple[str, ...], pretrained: bool) -> None:
    """Check that the files and folders that a run reads are there.

    Args:
        cfg: The config.
        splits: Which dataloaders will be used, of train, val and test.
        pretrained: Whether the checkpoints named by ``init_cfg`` will be read.

    Raises:
        UsageError: Names the first path that is missing and what to do.
    """
    for split in splits:
        _check_split(cfg, split)
    if pretrained:
        for key, node in find_dicts(cfg.get('model') or {}, 'model'):
            owner, _, rest = key.rpartition('.init_cfg')
            if owner and (not rest or rest[1:].isdigit()) and is_pretrained(node):
                config = own_file('configs/_base_/imagenet_backbone.py')
                remedy = CHECKPOINT_REMEDY.format(key=key, config=config)
                check_file(node['checkpoint'], f'the pretrained checkpoint of {owner},', remedy)


def _check_split(cfg: Config, split: str) -> None:
    dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset', {})
    annotations = []  # of the data sets
    for key, node in find_dicts(dataset, f'{split}_dataloader.dataset'):
        remedy = _data_remedy(cfg, key)
        root, ann_file, prefix = (node.get(name) or '' for name in ('data_root', 'ann_file', 'data_prefix'))
        if not isinstance(root, str) or '://' in root:
            continue
        if root and not ann_file:
            check_file(root, f'the {split} data folder', remedy)
        for name, what in [(ann_file, 'annotation file'), *((p, 'image folder') for p in _strings(prefix))]:
            if not isinstance(name, str) or not name:
                continue
            path = Path(root) / name
            if root and not path.exists() and Path(name).exists():
                remedy = f'{name} does, but {key} takes it below its data_root={root!r}: leave that part out of it'
            check_file(str(path), f'the {split} {what}', remedy)
            if name is ann_file:
                annotations.append((Path(root), path))
    if split != 'train':
        for key, node in find_dicts(cfg.get(f'{split}_evaluator') or {}, f'{split}_evaluator'):
            if isinstance(node.get('ann_file'), str):
                remedy = f'set {key}.ann_file to that of the {split} data'
                below = [root / node['ann_file'] for root, _ in annotations if (root / node['ann_file']).is_file()]
                for path in [*below, *(path for _, path in annotations)][:1]:
                    remedy = f'it is not taken below data_root: set {key}.ann_file={path}'
                check_file(node['ann_file'], f'the annotation file of {key},', remedy)


def check_work_dir(path: str) -> None:
    """Check, without making it, that a folder can be written.

    Raises:
        UsageError: Names the file or folder that is in its way.
    """
    if '://' in path:
        return
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    remedy = 'give another with --work-dir'
    if not folder.is_dir():
        raise UsageError(f'the work dir {path} cannot be made: {folder} is a file; {remedy}.')
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f'the work dir {path} cannot be written: {folder} is not writable for this user; {remedy}.')
    if shutil.disk_usage(folder).free == 0:
        raise UsageError(f'the work dir {path} cannot be written: the disk of {folder} is full; {remedy}.')


def _data_remedy(cfg: Config, key: str) -> str:
    scope = cfg.get('default_scope')
    if scope in ('mmseg', 'mmrotate'):
        return f'lay the data out as the documentation of {scope} says, or set {key}.data_root with --cfg-options'
    page, script, folder = OF_CLASSIFIERS if scope == 'mmpretrain' else OF_DETECTORS
    digits = f'the digits come from: python {own_file(f"tools/dataset_converters/{script}")} data/{folder}'
    return DATA_REMEDY.format(key=key, page=page, digits=digits)


def _strings(prefix: str | dict) -> list[str]:
    return list(prefix.values()) if isinstance(prefix, dict) else [prefix]
