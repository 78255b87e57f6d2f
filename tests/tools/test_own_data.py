"""docs/own-data.md, from the first command to the last, on a small set of screws and nuts that look like digits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import ROOT, script, tool
from markdown_it import MarkdownIt
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

PAGE = ROOT / 'docs' / 'own-data.md'

# What is said after a config of the page: no download, small pictures, a small network and one epoch.
SMALL = {
    'my_detector.py': """
load_from = 'coco.pth'
model['backbone'].update(depth=18)
model['neck'] = dict(in_channels=[64, 128, 256, 512])
model['test_cfg'] = dict(rpn=dict(nms_pre=50, max_per_img=20))
train_cfg = dict(max_epochs=1)
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (64, 64)
train_dataloader['dataset'].update(pipeline=train_pipeline)
val_dataloader['dataset'].update(pipeline=test_pipeline)
""",
    'my_classifier.py': """
model['backbone'].update(depth=18)
model['backbone']['init_cfg'].update(checkpoint='imagenet.pth')
model['head'].update(in_channels=512)
train_cfg = dict(max_epochs=1)
train_dataloader['batch_size'] = 4
""",
}

# Bash goes through variables and patterns; what a command comes to is written down, but for the programs in a line.
WRITE_DOWN = r"""
python() { if [ "$1" = -c ]; then command python "$@"; else printf '%s\0' "$@" >&3; echo >&3; fi; }
"""


@pytest.fixture
def folder(tmp_path, digits, monkeypatch):
    """The folder of the repository, as far as the page goes: its tools, and the data that a user has."""
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    (tmp_path / 'data' / 'mine' / 'images').mkdir(parents=True)
    for split in ('train', 'val'):
        content = json.loads((digits / 'annotations' / f'instances_{split}2017.json').read_text())
        digit = {each['id']: int(each['name']) for each in content['categories']}
        content['categories'] = [dict(id=1, name='screw'), dict(id=2, name='nut')]
        for each in content['annotations']:
            each['category_id'] = 1 + digit[each['category_id']] % 2
        for image in content['images']:
            name = f'{split}_{image["file_name"]}'
            shutil.copy(digits / f'{split}2017' / image['file_name'], tmp_path / 'data' / 'mine' / 'images' / name)
            image['file_name'] = name
        (tmp_path / 'data' / 'mine' / f'{split}.json').write_text(json.dumps(content))
    result = tool('dataset_converters/digits_to_imagefolder.py', tmp_path / 'digits')
    assert result.returncode == 0, result.stdout
    for split in ('train', 'val'):
        for digit, name in enumerate(('screw', 'nut')):
            new = tmp_path / 'data' / 'mine-classes' / split / name
            new.mkdir(parents=True)
            for picture in sorted((tmp_path / 'digits' / split / str(digit)).iterdir())[:6]:
                shutil.copy(picture, new)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_with_batch_norm(path, config, **changes):
    """What a user downloads: a network with BatchNorm and the number of classes of ``config``."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(changes)
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), path)


def test_the_page(folder):
    register_all_modules(init_default_scope=False)
    detector = {
        'model.backbone.depth': 18,
        'model.backbone.init_cfg': None,
        'model.neck.in_channels': [64, 128, 256, 512],
    }
    base = Path(sys.modules['mmdet'].__file__).parent / '.mim' / 'configs'
    save_with_batch_norm('coco.pth', base / 'faster_rcnn' / 'faster-rcnn_r50_fpn_1x_coco.py', **detector)
    weights = torch.load('coco.pth')['state_dict'].items()
    torch.save({key[9:]: value for key, value in weights if key.startswith('backbone.')}, 'imagenet.pth')
    outputs = {}
    for token in MarkdownIt().parse(PAGE.read_text()):
        if token.info == 'python':
            name = token.content.split()[1]
            Path(name).write_text(token.content + SMALL.get(name, ''))
        elif token.info == 'bash':
            subprocess.run(
                ['bash', '-euc', f'exec 3> command; {WRITE_DOWN} {token.content}'],
                check=True,
                env=os.environ | {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'},
            )
            (command,) = Path('command').read_text().splitlines()
            arguments = command.split('\0')[:-1]
            result = script(folder, *arguments)
            assert result.returncode == 0, f'{token.content}\n{result.stdout}'
            outputs[' '.join(arguments[:2])] = result.stdout
    for name in ('my_detector.py', 'my_classifier.py'):
        assert 'mmubn: 20 UBN layers read: 20 from BatchNorm' in outputs[f'tools/train.py {name}']
    pictures = {
        'browse': 8,
        'detected/vis': 12,
        'classified': 12,
        'my_detector/*/drawings': 4,
        'my_classifier/*/drawings': 12,
    }
    for name, number in pictures.items():
        found = [path for path in folder.glob(f'work_dirs/{name}/**/*') if path.suffix in ('.png', '.jpg')]
        assert len(found) == number, name
