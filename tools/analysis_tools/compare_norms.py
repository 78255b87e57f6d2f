"""Run the comparisons of a sweep file, those that are not done yet, and write tables and plots of all that are.

Every run is one of tools/train.py in a folder of its own, WORK_DIR/SWEEP/CHOICE/seedN. Started again, the command skips
the runs that are done, continues those that were cut off, and tries those that failed once more. A run that fails is
reported and does not stop the others. configs/sweeps/ has sweep files; mmubn/sweeps.py says what may be in one.

Each sweep leaves in WORK_DIR/SWEEP: summary.md, a table per metric with mean and spread over the seeds and, with a
baseline, the difference from it; runs.csv, every value after every epoch; epochs.csv, their mean and standard
deviation; and a plot per metric, as PNG and SVG.

Example:

    python tools/analysis_tools/compare_norms.py configs/sweeps/paper.yml --sweeps threshold
"""

from __future__ import annotations

import argparse
import collections
import csv
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scipy import stats

from mmubn.engine import UsageError, run_tool
from mmubn.plots import line_style, plt, save
from mmubn.runs import over_seeds, read_scalars, series, validation_records
from mmubn.sweeps import Sweep, SweepRun, read_sweeps

TOOLS = Path(__file__).resolve().parent.parent
DONE = 'sweep_run_done'  # in the folder of a run that came to its end
PROGRESS = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]|Iter\(train\)\s+\[\s*(\d+)/(\d+)\]')


def parse_args() -> argparse.Namespace:
    summary, *details, _ = __doc__.split('\n\n')
    parser = argparse.ArgumentParser(
        description=summary, epilog='\n\n'.join(details), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('sweeps_file', type=Path, metavar='SWEEPS.yml', help='the sweep file')
    parser.add_argument('--sweeps', nargs='+', default=[], metavar='NAME', help='only these of the file')
    parser.add_argument('--seeds', nargs='+', type=int, default=[], help="instead of the file's")
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/NAME_OF_THE_FILE')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time (default: 1)')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs must be positive, got {args.jobs}')
    if args.work_dir is None:
        args.work_dir = Path('work_dirs') / args.sweeps_file.stem
    return args


# ---- running


def folder_of(run: SweepRun, work_dir: Path) -> Path:
    return work_dir / run.sweep / re.sub(r'[^\w.=+-]+', '_', run.label) / f'seed{run.seed}'


def prepare(run: SweepRun, work_dir: Path) -> Path:
    """Write the run's whole config beside its folder, and return its path.

    Raises:
        UsageError: The folder has a run with another config.
    """
    folder = folder_of(run, work_dir)
    cfg = run.load()
    cfg.work_dir = str(folder)
    path = folder.with_suffix('.py')
    # What Config.dump would write, but that takes seconds.
    text = ''.join(f'{key} = {pformat(value, sort_dicts=False)}\n' for key, value in cfg.to_dict().items())
    if path.exists() and path.read_text() != text and any(folder.glob('*/vis_data/scalars.json')):
        raise UsageError(
            f'{folder} has a run of another config than {run} asks for ({path}); remove the folder to run it anew, or '
            'choose another --work-dir.'
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class CancelledError(Exception):
    """The command was told to end."""


class Trainer:
    """Trains one run at a time in each of its slots, a slot having processes and, where there are any, GPUs of its own.

    Args:
        work_dir: Folder of all runs.
        gpus: Processes of a run at most.
        jobs: Number of slots.
        progress: Told of every run how far it is, as a share of 1.
    """

    def __init__(self, work_dir: Path, gpus: int, jobs: int, progress: Progress) -> None:
        available = torch.cuda.device_count()
        if 0 < available < jobs * gpus:
            raise UsageError(f'{jobs} runs at a time need {jobs * gpus} GPUs, and there are {available}: lower --jobs.')
        self._work_dir = work_dir
        self._progress = progress
        self._slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        self._processes: set[subprocess.Popen] = set()
        self._cancelled = False
        for slot in range(jobs):
            environment = {'PORT': free_port()}
            if available:
                environment['CUDA_VISIBLE_DEVICES'] = ','.join(str(slot * gpus + i) for i in range(gpus))
            if 'OMP_NUM_THREADS' not in os.environ:
                # With more threads than cores, OpenMP's spin while they wait for one another.
                environment['OMP_NUM_THREADS'] = str(max(1, (os.cpu_count() or 1) // (jobs * gpus)))
            self._slots.put(environment)

    def __call__(self, run: SweepRun, config: Path) -> str | None:
        """Train ``run`` to its end; return what it said last where it failed."""
        slot = self._slots.get()
        try:
            return self._train(run, config, os.environ | slot)
        finally:
            self._slots.put(slot)

    def _train(self, run: SweepRun, config: Path, environment: dict[str, str]) -> str | None:
        if self._cancelled:
            raise CancelledError
        folder = folder_of(run, self._work_dir)
        start = [sys.executable, TOOLS / 'train.py', config]
        if run.gpus > 1:
            start = [TOOLS / 'dist_train.sh', config, run.gpus]
        command = [*map(str, start), '--work-dir', str(folder), '--resume']
        epochs = run.load().train_cfg.get('max_epochs')
        task = self._progress.add_task(str(run), total=1)
        tail = collections.deque(maxlen=30)
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
        with folder.with_suffix('.out').open('w', buffering=1) as log:
            process = subprocess.Popen(command, env=environment, start_new_session=True, **pipe)
            self._processes.add(process)
            for line in process.stdout:
                log.write(line)
                tail.append(line)
                if match := PROGRESS.search(line):
                    epoch, i, n, iteration, iterations = (int(part or 0) for part in match.groups())
                    share = iteration / iterations if iterations else (epoch - 1 + i / n) / (epochs or epoch)
                    self._progress.update(task, completed=share)
        status = process.wait()
        self._processes.discard(process)
        self._progress.remove_task(task)
        if self._cancelled:
            raise CancelledError
        if status == 0:
            (folder / DONE).touch()
            return None
        errors = [line.strip() for line in tail if line.strip()] or ['it said nothing']
        return f'{run} ended with status {status}: {errors[-1]} (all it said: {folder.with_suffix(".out")})'

    def cancel(self) -> None:
        """End the runs that go on, and start no other."""
        self._cancelled = True
        for process in list(self._processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def train_all(runs: list[SweepRun], work_dir: Path, jobs: int, console: Console) -> list[str]:
    """Train the runs that are not done; return a sentence for each that failed."""
    configs = {run: prepare(run, work_dir) for run in runs}
    todo = [run for run in runs if not (folder_of(run, work_dir) / DONE).exists()]
    console.print(f'{len(runs)} runs, of which {len(runs) - len(todo)} are done already')
    failures = []
    columns = [TextColumn('{task.description}'), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn('left'), TimeRemainingColumn(), console=console) as progress:
        total = progress.add_task('all runs', total=len(todo))
        train = Trainer(work_dir, max((run.gpus for run in runs), default=1), jobs, progress)

        def timed(run: SweepRun) -> tuple[str | None, float]:
            start = time.monotonic()
            return train(run, configs[run]), time.monotonic() - start

        # A SIGTERM ends the runs too, as Ctrl-C does.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        pool = ThreadPoolExecutor(jobs)
        try:
            futures = {pool.submit(timed, run): run for run in todo}
            for done, future in enumerate(as_completed(futures), 1):
                failure, seconds = future.result()
                progress.advance(total)
                if failure is not None:
                    failures.append(failure)
                    console.print(f'failed: {failure}', markup=False)
                else:
                    console.print(f'{done} of {len(todo)}: {futures[future]} done in {seconds:.0f} s', markup=False)
        except KeyboardInterrupt:
            train.cancel()
            raise UsageError('ended before all runs were done; the same command continues.') from None
        finally:
            pool.shutdown(cancel_futures=True)
            signal.signal(signal.SIGTERM, before)
    return failures


# ---- comparing


@dataclass
class Curve:
    """One metric of one choice: the epochs, and the values of S seeds after each, (S, E)."""

    seeds: list[int]
    epochs: list[int]
    values: np.ndarray

    @property
    def last(self) -> dict[int, float]:
        return dict(zip(self.seeds, self.values[:, -1], strict=True))


def read_curves(sweep: Sweep, work_dir: Path) -> dict[str, dict[str, Curve]]:
    """The curves of the runs that are done, by metric and label."""
    found: dict[str, dict[str, dict[int, tuple]]] = {}
    for run in sweep.runs:
        folder = folder_of(run, work_dir)
        if not (folder / DONE).exists():
            continue
        records = validation_records(read_scalars(folder))
        for metric in sweep.metrics:
            steps, values = series(records, metric)
            if steps:
                found.setdefault(metric, {}).setdefault(run.label, {})[run.seed] = (steps, values)
    curves = {}
    for metric, labels in found.items():
        for label, by_seed in labels.items():
            epochs, values = over_seeds(list(by_seed.values()))
            curves.setdefault(metric, {})[label] = Curve(list(by_seed), epochs.tolist(), values)
    return curves


def difference(curve: Curve, baseline: Curve) -> tuple[float, float, float] | None:
    """Mean difference of the last values, seed by seed, and its 95% confidence interval by Student's t (paired).

    None with fewer than two seeds in common.
    """
    seeds = [seed for seed in curve.seeds if seed in baseline.seeds]
    if len(seeds) < 2:
        return None
    own, other = ([each.last[seed] for seed in seeds] for each in (curve, baseline))
    if np.ptp(np.subtract(own, other)) == 0:
        return (own[0] - other[0],) * 3
    interval = stats.ttest_rel(own, other).confidence_interval(0.95)
    return float(np.mean(np.subtract(own, other))), float(interval.low), float(interval.high)


def reached(curve: Curve, target: float) -> str:
    """The epochs after which the seeds reach ``target`` for the first time: mean, and how many of them do."""
    first = [curve.epochs[int(np.argmax(values >= target))] for values in curve.values if (values >= target).any()]
    mean = f'{np.mean(first):.1f}' if first else 'never'
    return f'{mean} ({len(first)} of {len(curve.seeds)})'


def summarize(sweep: Sweep, curves: dict[str, dict[str, Curve]]) -> str:
    """A table for each metric of the sweep, in Markdown."""
    lines = [f'## {sweep.name}', '']
    if sweep.paper:
        lines += [f'In the paper: {sweep.paper}.', '']
    missing = [label for label in sweep.labels if not any(label in each for each in curves.values())]
    for i, (metric, by_label) in enumerate(curves.items()):
        unit, digits = unit_of(by_label)
        header = ['', 'seeds', 'epochs', f'{metric}, mean{unit}', 'standard deviation', 'lowest to highest']
        target = sweep.target if i == 0 else None
        baseline = by_label.get(sweep.baseline)
        header += [f'epochs to {target:g} (seeds that reach it)'] if target is not None else []
        header += [f'difference from {sweep.baseline}, 95% interval'] if baseline else []
        lines += [f'| {" | ".join(header)} |', f'|{"---|" * len(header)}']
        for label, curve in by_label.items():
            last = curve.values[:, -1]
            cells = [label, str(len(last)), str(curve.epochs[-1]), f'{last.mean():.{digits}f}']
            cells.append(f'{last.std(ddof=1):.{digits}f}' if len(last) > 1 else '')
            cells.append(f'{last.min():.{digits}f} to {last.max():.{digits}f}')
            cells += [reached(curve, target)] if target is not None else []
            cells += [compared(curve, baseline, digits) if label != sweep.baseline else ''] if baseline else []
            lines.append(f'| {" | ".join(cells)} |')
        lines += ['', *course(metric, by_label), '']
    if missing:
        lines += [f'Nothing yet of: {", ".join(missing)}.', '']
    return '\n'.join(lines)


def course(metric: str, by_label: dict[str, Curve]) -> list[str]:
    """Mean and standard deviation after at most ten epochs, from the first to the last, as a table in Markdown."""
    unit, digits = unit_of(by_label)
    epochs = sorted(set.intersection(*(set(curve.epochs) for curve in by_label.values())))
    shown = [epochs[i] for i in np.linspace(0, len(epochs) - 1, min(10, len(epochs))).round().astype(int)]
    header = [f'{metric}{unit} after epoch', *map(str, shown)]
    lines = [f'| {" | ".join(header)} |', f'|{"---|" * len(header)}']
    for label, curve in by_label.items():
        values = curve.values[:, [curve.epochs.index(epoch) for epoch in shown]]
        cells = [f'{mean:.{digits - 1}f}' for mean in values.mean(0)]
        if len(values) > 1:
            cells = [f'{cell} ± {std:.{digits - 1}f}' for cell, std in zip(cells, values.std(0, ddof=1), strict=True)]
        lines.append(f'| {" | ".join([label, *cells])} |')
    return lines


def unit_of(by_label: dict[str, Curve]) -> tuple[str, int]:
    """Accuracies of MMPretrain are percent, APs of MMDetection shares of 1; and the digits that say something."""
    percent = any(curve.values.max() > 1 for curve in by_label.values())
    return (' (%)', 2) if percent else ('', 3)


def compared(curve: Curve, baseline: Curve, digits: int) -> str:
    if (interval := difference(curve, baseline)) is None:
        return ''
    mean, low, high = interval
    verdict = 'higher' if low > 0 else 'lower' if high < 0 else 'not told apart'
    return f'{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]: {verdict}'


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with path.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)


def write_tables(sweep: Sweep, curves: dict[str, dict[str, Curve]], folder: Path) -> None:
    """runs.csv has every value that was measured, epochs.csv mean and standard deviation after every epoch."""
    runs, epochs = [], []
    for metric, by_label in curves.items():
        for label, curve in by_label.items():
            for seed, values in zip(curve.seeds, curve.values, strict=True):
                runs += [[label, seed, metric, epoch, value] for epoch, value in zip(curve.epochs, values, strict=True)]
            for epoch, values in zip(curve.epochs, curve.values.T, strict=True):
                spread = values.std(ddof=1) if len(values) > 1 else ''
                epochs.append([label, metric, epoch, len(values), values.mean(), spread])
    write_csv(folder / 'runs.csv', ['choice', 'seed', 'metric', 'epoch', 'value'], runs)
    write_csv(folder / 'epochs.csv', ['choice', 'metric', 'epoch', 'seeds', 'mean', 'standard deviation'], epochs)


def plot(sweep: Sweep, metric: str, by_label: dict[str, Curve], out: Path) -> None:
    """Left the mean over the seeds in the course of training, right the last values, one dot a seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, max(4.5, 0.42 * len(by_label) + 1.5)))
    unit, _ = unit_of(by_label)
    for i, (label, curve) in enumerate(by_label.items()):
        style = line_style(i)
        left.plot(curve.epochs, curve.values.mean(0), label=label, **style)
        last = curve.values[:, -1]
        right.plot(last, np.full(len(last), i), linestyle='', marker=style['marker'], color=style['color'], alpha=0.6)
        right.plot([last.mean()] * 2, [i - 0.3, i + 0.3], color='black')
    left.set(xlabel='epoch', ylabel=f'{metric}{unit}, mean over the seeds')
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)
    right.set(xlabel=f'{metric}{unit} after the last epoch', yticks=range(len(by_label)), yticklabels=list(by_label))
    right.invert_yaxis()
    counts = sorted({len(curve.seeds) for curve in by_label.values()})
    save(
        figure,
        out,
        f'{sweep.name}: {metric} on the validation data. Left: mean over {" or ".join(map(str, counts))} seeds after '
        'each epoch. Right: after the last epoch, a mark for each seed and a line at their mean.',
    )


def main() -> None:
    args = parse_args()
    console = Console()
    sweeps = read_sweeps(args.sweeps_file, args.sweeps, args.seeds)
    failures = train_all([run for sweep in sweeps for run in sweep.runs], args.work_dir, args.jobs, console)
    for sweep in sweeps:
        curves = read_curves(sweep, args.work_dir)
        folder = args.work_dir / sweep.name
        text = summarize(sweep, curves)
        (folder / 'summary.md').write_text(text)
        write_tables(sweep, curves, folder)
        for metric, by_label in curves.items():
            plot(sweep, metric, by_label, folder / metric.replace('/', '_'))
        console.print(Markdown(text))
        console.print(f'tables and plots: {folder}', markup=False)
    if failures:
        raise UsageError(f'{len(failures)} runs failed; the same command tries them again:\n' + '\n'.join(failures))


if __name__ == '__main__':
    run_tool(main)
