"""A way to run the tools as a user does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = ROOT / 'configs' / 'digits' / 'mask-rcnn_r18_fpn_ubn_digits.py'


def run(*command, **environment):
    """Run a command from the root of the repository; stdout and stderr in one text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def tool(name, *arguments, **environment):
    return run(sys.executable, ROOT / 'tools' / name, *arguments, **environment)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def data_options(folder):
    """--cfg-options that put any COCO config on the data set in ``folder``, without worker processes."""
    options = []
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.dataset.data_root={folder}/',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
    annotations = f'{folder}/annotations/instances_val2017.json'
    return [*options, f'val_evaluator.ann_file={annotations}', f'test_evaluator.ann_file={annotations}']


def metrics(work_dir):
    """What the last test run in ``work_dir`` measured."""
    path = max(Path(work_dir).glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(path.read_text())
