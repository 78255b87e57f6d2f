"""Ways to run the tools as a user does."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import forks
import torch

from mmubn.openmmlab.loading import accepted_checkpoints

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
    """``run(sys.executable, ROOT / 'tools' / name, *arguments, **environment)``, without waiting for imports."""
    return forks.together(_run_tool, (name, arguments, environment))[0]


def script(folder, path, *arguments):
    """``python path arguments`` in ``folder``, as :func:`tool` does it."""
    return forks.together(_run_script, (folder, path, arguments))[0]


def call(monkeypatch, name, *arguments):
    """Run a tool as ``__main__`` in this process; its exit status."""
    path = ROOT / 'tools' / name
    monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
    try:
        runpy.run_path(str(path), run_name='__main__')
    except SystemExit as end:
        return end.code or 0
    return 0


def ranks(count, name, *arguments, **environment):
    """Run a tool in as many processes, each told of the others as torchrun does; of each what ``tool`` returns."""
    everyone = environment | dict(
        WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port()
    )
    each = [everyone | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    return forks.together(
        _run_tool, *((name, ('--launcher', 'pytorch', *arguments), environment) for environment in each)
    )


def _run_tool(name, arguments, environment):
    os.environ.update(environment)
    _run_script(ROOT, ROOT / 'tools' / name, arguments)


def _run_script(folder, path, arguments):
    os.chdir(folder)
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))  # which OpenMP read before the fork
    sys.argv = [str(part) for part in (path, *arguments)]
    runpy.run_path(str(path), run_name='__main__')


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


def checkpoint_of(path):
    """The content of a checkpoint of MMEngine, on the CPU, read without running code that may be in it."""
    with accepted_checkpoints():
        return torch.load(path, weights_only=True, map_location='cpu')


def metrics(work_dir):
    """What the last test run in ``work_dir`` measured."""
    path = max(Path(work_dir).glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(path.read_text())
