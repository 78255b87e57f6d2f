"""Logs of runs, made by hand."""

import json

from mmubn.openmmlab.hooks.layer_log import LayerLog

LAYERS = ['conv1.bn', 'layer1.bn', 'layer2.bn']


def training(iteration, epoch, time=0.1, loss=1.0):
    """What MMEngine logs after a training iteration."""
    values = {'lr': 0.1, 'data_time': 0.01, 'loss': loss, 'time': time}
    return {**values, 'epoch': epoch, 'iter': iteration, 'step': iteration}


def validation(epoch, value, tag='accuracy/top1'):
    """What it logs after a validation."""
    return {tag: value, 'data_time': 0.001, 'time': 7.0, 'step': epoch}


def write_log(run, records, start='20260101_120000', window=None):
    """A start's log, and, with a window of the LogProcessor, its config."""
    log = run / start / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text(''.join(json.dumps(record) + '\n' for record in records))
    if window is not None:
        (log.parent / 'config.py').write_text(f"log_processor = dict(type='LogProcessor', window_size={window})\n")
    return log


def write_condensation(run, fixed, layers=LAYERS, threshold=0.3, start='20260101_120000', **others):
    """What FeatureCondensationHook writes: ``fixed`` and the other quantities are {step: values}."""
    path = run / start / 'feature_condensation.jsonl'
    log = LayerLog(path, layers, types=['BN'] * len(layers), threshold=threshold, num_samples=32)
    for name, values in {'fixed': fixed, **others}.items():
        for step, each in values.items():
            log.append(step, step // 10, **{name: each})
    return path
