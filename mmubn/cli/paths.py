"""Whether the files and folders that a run reads are there, asked before anything is built."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config

from mmubn.cli.errors import UsageError
from mmubn.openmmlab.config_types import find_dicts, is_pretrained

__all__ = ['check_file', 'check_paths']

DATA_REMEDY = (
    'lay the data out as README.md (COCO) or docs/reproduce.md (ImageNet, CIFAR) says under "Data", or set '
    '{split}_dataloader.dataset.data_root with --cfg-options '
    '(the digits come from: python tools/dataset_converters/digits_to_coco.py data/digits)'
)
CHECKPOINT_REMEDY = (
    'train it as README.md says under "ImageNet checkpoints", or set imagenet_checkpoints at the top of '
    'configs/_base_/imagenet_backbone.py to the folder or URL that has it, or start from another checkpoint with '
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
                remedy = CHECKPOINT_REMEDY.format(key=key)
                check_file(node['checkpoint'], f'the pretrained checkpoint of {owner},', remedy)


def _check_split(cfg: Config, split: str) -> None:
    remedy = DATA_REMEDY.format(split=split)
    dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset', {})
    for _, node in find_dicts(dataset):
        root, ann_file, prefix = (node.get(key) or '' for key in ('data_root', 'ann_file', 'data_prefix'))
        if not isinstance(root, str) or '://' in root:
            continue
        if root and not ann_file:
            check_file(root, f'the {split} data folder', remedy)
        for name, what in [(ann_file, 'annotation file'), *((p, 'image folder') for p in _strings(prefix))]:
            if isinstance(name, str) and name:
                check_file(str(Path(root) / name), f'the {split} {what}', remedy)
    if split != 'train':
        for _, node in find_dicts(cfg.get(f'{split}_evaluator') or {}):
            if isinstance(node.get('ann_file'), str):
                check_file(node['ann_file'], f'the annotation file of {split}_evaluator', remedy)


def _strings(prefix: str | dict) -> list[str]:
    return list(prefix.values()) if isinstance(prefix, dict) else [prefix]
