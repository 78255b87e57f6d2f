"""A training run of a fraction of a second, which draws random numbers wherever a real one does.

``train`` runs it in this process, ``run`` in a fork of this one, optionally killed on its way: a test pays once for the
imports. ``config(...).dump(path)`` makes a config for tools/train.py, with this folder on PYTHONPATH.
"""

import json
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 - before the forks
import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn

import mmubn


@DATASETS.register_module(force=True)
class ToyDataset(torch.utils.data.Dataset):
    """Each sample is another one each time, by all three generators."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return dict(inputs=index / 8 + torch.rand(3, 4, 4) + random.random() + np.random.rand())


@MODELS.register_module(force=True)
class ToyModel(BaseModel):
    """The gate of its UBN closes within an epoch: from there on training depends on the running statistics."""

    def __init__(self, norm='UBN', init_cfg=None, **arguments):
        super().__init__(init_cfg=init_cfg)
        norm = getattr(mmubn, norm)(4, **arguments)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 1))

    def forward(self, inputs, mode):
        x = self.layers(torch.stack(inputs))
        return dict(loss=x.square().mean()) if mode == 'loss' else [1]


@METRICS.register_module(force=True)
class ToyMetric(BaseMetric):
    """Draws random numbers, and finds every epoch better than the one before."""

    def process(self, data_batch, data_samples):
        self.results.append(torch.rand(()).item())

    def compute_metrics(self, results):
        ToyMetric.value = getattr(ToyMetric, 'value', 0) + 1
        return dict(acc=ToyMetric.value)


def config(work_dir, iterations=False, workers=0, persistent=False, validate=True, epochs=3):
    """Epochs of 4 iterations, or as many iterations without epochs; a checkpoint after every 4."""
    loader = dict(
        dataset=dict(type='ToyDataset'),
        batch_size=4,
        num_workers=workers,
        persistent_workers=persistent,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    sampler = dict(type='InfiniteSampler' if iterations else 'DefaultSampler', shuffle=True)
    cfg = dict(
        custom_imports=dict(imports=['toy']),
        work_dir=str(work_dir),
        randomness=dict(seed=0),
        model=dict(type='ToyModel', threshold=0.99),
        train_dataloader=dict(loader, sampler=sampler),
        train_cfg=dict(by_epoch=not iterations, val_interval=4 if iterations else 1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=12),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', by_epoch=not iterations, interval=4 if iterations else 1),
        ),
        log_processor=dict(by_epoch=not iterations, window_size=1),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
    )
    cfg['train_cfg'].update(dict(max_iters=4 * epochs) if iterations else dict(max_epochs=epochs))
    if validate:
        cfg.update(val_dataloader=loader, val_evaluator=dict(type='ToyMetric'), val_cfg=dict())
    return Config(cfg)


def losses(work_dir):
    """(step, loss) of all training iterations that the runs in ``work_dir`` logged."""
    lines = [line for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')) for line in path.open()]
    return [(each['step'], each['loss']) for each in map(json.loads, lines) if 'loss' in each]


def train(cfg, resume=None):
    torch.set_num_threads(1)
    Runner._log_env = lambda *_: None  # takes longer than all the rest
    cfg.resume, cfg.load_from = resume is not None, resume if resume != 'auto' else None
    Runner.from_cfg(cfg).train()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_event(number, midway):
    """Die at the ``number``-th change (from 0) of a checkpoint or of ``last_checkpoint``; no cleanup runs.

    The changes are opening a file to write it, renaming it and removing it. Die before the change or, if ``midway``, in
    the first write that goes beyond 20 bytes of any file.
    """
    count = -1

    def hook(event, arguments):
        nonlocal count
        if event not in ('open', 'os.rename', 'os.remove') or not isinstance(arguments[0], str):
            return
        name = Path(arguments[0]).name
        if '.pth' not in name and 'last_checkpoint' not in name:
            return
        if event == 'open' and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == number:
            if not midway:
                die()
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))

    sys.addaudithook(hook)


def run(cfg, resume=None, event=None, midway=False, seconds=None):
    """Train in a fork of this process; whether it ended well. See :func:`die_at_event`; or die after some seconds."""
    pid = os.fork()
    if pid == 0:
        try:
            log = os.open(Path(cfg.work_dir).parent / 'log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if event is not None:
                die_at_event(event, midway)
            if seconds is not None:
                threading.Thread(target=lambda: (time.sleep(seconds), die()), daemon=True).start()
            train(cfg, resume)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError((Path(cfg.work_dir).parent / 'log').read_text()[-3000:])
    return status == 0
