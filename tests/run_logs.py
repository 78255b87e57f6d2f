"""Logs of runs, made by hand, and a way to call a tool that reads them."""

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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


def call(monkeypatch, tool, *arguments):
    """Run a tool of tools/analysis_tools/ as __main__ in this process; its exit status."""
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / 'tools' / 'analysis_tools' / tool), run_name='__main__')
    except SystemExit as error:
        return error.code
    return 0
