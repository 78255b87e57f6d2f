"""What the choices of a sweep cost: time of a training iteration and of an evaluation, saved memory, parameters."""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mmubn.analysis.benchmark.measurement import Clock, Quartiles, quartiles, saved_bytes, without_garbage_collection
from mmubn.analysis.predictions import last_checkpoint
from mmubn.analysis.sweeps import RUN_DONE, Sweep, SweepRun
from mmubn.cli import UsageError
from mmubn.cli.runner import build_runner

__all__ = ['HEADER', 'TIMES', 'Row', 'Trial', 'measure_costs']

TIMES = ('training', 'evaluation')
UNITS = {'training': 'ms', 'evaluation': 'ms', 'saved memory': 'MiB', 'parameters': ''}

HEADER = ['sweep', 'choice', 'measure', 'unit', 'first quartile', 'median', 'third quartile']
HEADER += ['ratio, first quartile', 'ratio', 'ratio, third quartile']  # to the baseline
Row = tuple[str, str, str, str, float, float, float, float, float, float]  # what HEADER says


class Trial:
    """The trained network of a run with a batch of its training data and one of its validation data.

    Args:
        run: A run that is done: a detector's time depends on what it detects.
        folder: Its work dir.
        scratch: A folder for the runner's logs.
    """

    def __init__(self, run: SweepRun, folder: Path, scratch: Path) -> None:
        cfg = run.load()
        cfg.work_dir, cfg.load_from, cfg.log_level = str(scratch), str(last_checkpoint(folder)), 'ERROR'
        # Several runners in one process: each of its own name, and without a visualizer, of which there can be but one.
        cfg.default_hooks.pop('visualization', None)
        cfg.experiment_name = f'{folder.parent.name}-{time.time_ns()}'
        runner = build_runner(cfg)
        runner.load_or_resume()
        self.model = runner.model.train()
        self.evaluated = copy.deepcopy(runner.model).eval()
        self.optimizer = runner.build_optim_wrapper(runner.optim_wrapper)
        for group in self.optimizer.param_groups:
            group['lr'] = 0.0  # the same network in every iteration
        self.batches = {
            name: next(iter(runner.build_dataloader(cfg[name], seed=run.seed)))
            for name in ('train_dataloader', 'val_dataloader')
        }

    def training(self) -> None:
        """Run an iteration: forward, backward, and the step of the optimizer."""
        self.model.train_step(self.batches['train_dataloader'], self.optimizer)

    def evaluation(self) -> None:
        """Predict one batch."""
        with torch.no_grad():
            self.evaluated.val_step(self.batches['val_dataloader'])

    def saved(self) -> int:
        """Count the bytes that the forward of an iteration keeps for its backward."""
        data = self.model.data_preprocessor(self.batches['train_dataloader'], True)
        losses = []
        return saved_bytes(self.model, lambda: losses.append(self.model(**data, mode='loss')))

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def measure_costs(
    sweep: Sweep, work_dir: Path, repeats: int, warmup: int, advance: Callable[[], None] = lambda: None
) -> list[Row]:
    """Measure the first run of each choice of a sweep, in turns; ratios are taken within a turn.

    Args:
        sweep: A sweep with a baseline, whose first seed is done.
        work_dir: Folder of all its runs.
        repeats: Turns that count.
        warmup: Turns before them.
        advance: Called after each turn.

    Raises:
        UsageError: The sweep has no baseline, or a run is not done.
    """
    if sweep.baseline is None:
        raise UsageError(f'sweep {sweep.name!r} has no baseline to which costs could be compared.')
    first = {run.label: run for run in reversed(sweep.runs)}
    folders = {label: first[label].folder(work_dir) for label in sweep.labels}
    if missing := [str(folder) for folder in folders.values() if not (folder / RUN_DONE).exists()]:
        raise UsageError(f'these runs are not done: {", ".join(missing)}; train them with compare_norms.py.')
    with tempfile.TemporaryDirectory() as scratch:
        trials = {label: Trial(first[label], folder, Path(scratch)) for label, folder in folders.items()}
    clock = Clock(next(iter(trials.values())).model.data_preprocessor.device)
    seconds: dict[str, dict[str, list[float]]] = {label: {name: [] for name in TIMES} for label in trials}
    order = random.Random(0)
    with without_garbage_collection():
        for turn in range(warmup + repeats):
            for label in order.sample(sweep.labels, len(sweep.labels)):
                for name in TIMES:
                    (value,) = clock.times([getattr(trials[label], name)])
                    if turn >= warmup:
                        seconds[label][name].append(value)
            advance()
    rows: list[Row] = []
    for label, trial in trials.items():
        for name in TIMES:
            own, other = seconds[label][name], seconds[sweep.baseline][name]
            ratios = [a / b for a, b in zip(own, other, strict=True)]
            rows.append((sweep.name, label, name, UNITS[name], *quartiles(own), *quartiles(ratios)))
        counted = {'saved memory': trial.saved() / 2**20, 'parameters': float(trial.num_parameters)}
        base = trials[sweep.baseline]
        bases = {'saved memory': base.saved() / 2**20, 'parameters': float(base.num_parameters)}
        for name, value in counted.items():
            ratio = value / bases[name]
            rows.append((sweep.name, label, name, UNITS[name], *Quartiles(*[value] * 3), *Quartiles(*[ratio] * 3)))
    return rows
