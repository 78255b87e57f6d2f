"""What the choices of sweeps cost: time of a training iteration and of an evaluation, saved memory, parameters."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.runner import set_random_seed

from mmubn.analysis.benchmark.measurement import Clock, quartiles, saved_bytes, without_garbage_collection
from mmubn.analysis.sweeps import RUN_DONE, Sweep, SweepRun
from mmubn.analysis.trained import trained_runner
from mmubn.cli import UsageError

__all__ = ['HEADER', 'TIMES', 'Row', 'Trial', 'first_runs', 'measure_costs']

TIMES = ('training', 'evaluation')
UNITS = {'training': 'ms', 'evaluation': 'ms', 'saved memory': 'MiB', 'parameters': ''}

HEADER = ['sweep', 'choice', 'measure', 'unit', 'first quartile', 'median', 'third quartile']
HEADER += ['ratio, first quartile', 'ratio', 'ratio, third quartile']  # to the baseline
Row = tuple[str, str, str, str, float, float, float, float, float, float]  # what HEADER says


class Trial:
    """The trained network of a run, with a batch of its training data and one of its validation data.

    Runs of one seed and the same data settings get the same batches.

    Args:
        run: A run that is done: a detector's time depends on what it detects.
        folder: Its work dir.
        logs: A folder for the runner's logs.

    Raises:
        UsageError: The run has no checkpoint or no validation data.
        DataError: Its data do not fit its config.
    """

    def __init__(self, run: SweepRun, folder: Path, logs: Path) -> None:
        cfg = run.load()
        if cfg.get('val_dataloader') is None:
            raise UsageError(f'{run}: the config has no val_dataloader, of which a batch is evaluated.')
        cfg.log_level = 'ERROR'
        splits = ('train', 'val')
        for split in splits:
            # No other process reads ahead while the clock runs.
            cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False, prefetch_factor=None)
        with contextlib.redirect_stdout(io.StringIO()):  # what libraries print, log level or not
            runner = trained_runner(cfg, folder, logs, splits)
            runner.load_or_resume()
            loaders = [runner.build_dataloader(cfg[f'{split}_dataloader'], seed=run.seed) for split in splits]
        self.model = runner.model.train()
        # A copy: in training the running statistics become those of the one batch.
        self.evaluated = copy.deepcopy(runner.model).eval()
        self.optimizer = runner.build_optim_wrapper(runner.optim_wrapper)
        for group in self.optimizer.param_groups:
            group['lr'] = 0.0  # the same weights in every iteration
        self.batches = {}
        for split, loader in zip(splits, loaders, strict=True):
            set_random_seed(run.seed)  # what the runner drew before depends on the network
            self.batches[split] = next(iter(loader))

    def training(self) -> None:
        """Run an iteration: forward, backward, and the step of the optimizer."""
        self.model.train_step(self.batches['train'], self.optimizer)

    def evaluation(self) -> None:
        """Predict one batch."""
        with torch.no_grad():
            self.evaluated.val_step(self.batches['val'])

    def saved(self) -> int:
        """Count the bytes that the forward of an iteration keeps for its backward, besides the images."""
        set_random_seed(0)  # a detector draws boxes that it learns from
        with self.optimizer.optim_context(self.model):
            data = self.model.data_preprocessor(self.batches['train'], True)
            images = data['inputs'] if isinstance(data['inputs'], (list, tuple)) else [data['inputs']]
            return saved_bytes(self.model, lambda: self.model(**data, mode='loss'), images)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def first_runs(sweeps: list[Sweep], work_dir: Path) -> dict[str, SweepRun]:
    """Return the run of each choice of the sweeps with the first seed of its sweep, by its label.

    Raises:
        UsageError: The first sweep has no baseline, two choices have one label, or one of the runs is not done.
    """
    if sweeps[0].baseline is None:
        name = sweeps[0].name
        raise UsageError(f'sweep {name!r} has no baseline, with which costs are compared; name one in its file.')
    first: dict[str, SweepRun] = {}
    for sweep in sweeps:
        for label, run in {run.label: run for run in reversed(sweep.runs)}.items():
            if label in first:
                raise UsageError(f'sweeps {first[label].sweep!r} and {sweep.name!r} both have a choice {label!r}.')
            first[label] = run
    order = [label for sweep in sweeps for label in sweep.labels]
    missing = [str(first[label]) for label in order if not (first[label].folder(work_dir) / RUN_DONE).exists()]
    if missing:
        raise UsageError(
            f'runs with the first seed of the sweep are not done in {work_dir}: {"; ".join(missing)}. Train them with '
            'compare_norms.py, or give the --work-dir in which they are.'
        )
    return {label: first[label] for label in order}


def measure_costs(
    sweeps: list[Sweep], work_dir: Path, repeats: int, warmup: int, advance: Callable[[], object] = lambda: None
) -> list[Row]:
    """Measure the first run of each choice of the sweeps, in turns; ratios are taken within a turn.

    Args:
        sweeps: Those whose choices take turns, their first seed done; ratios are to the baseline of the first.
        work_dir: Folder of all its runs.
        repeats: Turns that count.
        warmup: Turns before them.
        advance: Called when each network is ready, and after each turn.

    Raises:
        UsageError: As :func:`first_runs`; a run has no checkpoint or no validation data.
        DataError: The data of a run do not fit its config.
    """
    runs, baseline = first_runs(sweeps, work_dir), sweeps[0].baseline
    logs = Path(tempfile.mkdtemp())  # stays where an error ends this, whose message names a log in it
    trials = {}
    for label, run in runs.items():
        trials[label] = Trial(run, run.folder(work_dir), logs)
        advance()
    clock = Clock(trials[baseline].model.data_preprocessor.device)
    samples: dict[str, dict[str, list[float]]] = {label: {name: [] for name in TIMES} for label in trials}
    order = random.Random(0)
    with without_garbage_collection():
        for turn in range(warmup + repeats):
            for label in order.sample(list(trials), len(trials)):
                for name in TIMES:
                    (milliseconds,) = clock.times([getattr(trials[label], name)])
                    if turn >= warmup:
                        samples[label][name].append(milliseconds)
            advance()
    for label, trial in trials.items():
        samples[label] |= {'saved memory': [trial.saved() / 2**20], 'parameters': [float(trial.num_parameters)]}
    rows: list[Row] = []
    for label, measures in samples.items():
        for name, values in measures.items():
            ratios = [own / base for own, base in zip(values, samples[baseline][name], strict=True)]
            rows.append((runs[label].sweep, label, name, UNITS[name], *quartiles(values), *quartiles(ratios)))
    shutil.rmtree(logs)
    return rows
