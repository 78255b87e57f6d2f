"""Run the comparisons of a sweep file, those that are not done yet, and write tables and plots of all that are.

Every run is one of tools/train.py in a folder of its own, WORK_DIR/SWEEP/CHOICE/seedN. Started again, the command skips
the runs that are done, continues those that were cut off, and tries those that failed once more. A run that fails is
reported and does not stop the others. configs/sweeps/ has sweep files; mmubn/analysis/sweeps.py says what they may
have.

Each sweep leaves in WORK_DIR/SWEEP: summary.md, a table per metric with mean and spread over the seeds and, with a
baseline, the difference from it; runs.csv, every value after every epoch; epochs.csv, their mean and standard
deviation; and a plot per metric, as PNG and SVG.

Example:

    python tools/analysis_tools/compare_norms.py configs/sweeps/paper.yml --sweeps threshold
"""

from __future__ import annotations

import argparse
import collections
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from pprint import pformat

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmubn.analysis.comparison import plot, read_curves, summarize, write_tables
from mmubn.analysis.plots import check_output
from mmubn.analysis.sweeps import RUN_DONE, SweepRun, read_sweeps
from mmubn.cli import UsageError, add_debug_argument, add_trust_argument, run_tool

TOOLS = Path(__file__).resolve().parent.parent
PROGRESS = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]|Iter\(train\)\s+\[\s*(\d+)/(\d+)\]')


def parse_args() -> argparse.Namespace:
    summary, *details, _ = __doc__.split('\n\n')
    parser = argparse.ArgumentParser(
        description=summary, epilog='\n\n'.join(details), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        'sweeps_file', type=Path, metavar='SWEEPS.yml', help='the sweep file, or mmubn::sweeps/NAME.yml'
    )
    parser.add_argument('--sweeps', nargs='+', default=[], metavar='NAME', help='only these of the file')
    parser.add_argument('--seeds', nargs='+', type=int, default=[], help="instead of the file's")
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/NAME_OF_THE_FILE')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time (default: 1)')
    add_trust_argument(parser)
    add_debug_argument(parser)
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs must be positive, got {args.jobs}')
    if args.work_dir is None:
        args.work_dir = Path('work_dirs') / args.sweeps_file.stem
    return args


def prepare(run: SweepRun, work_dir: Path) -> Path:
    """Write the run's whole config beside its folder, and return its path.

    Raises:
        UsageError: The folder has a run with another config.
    """
    folder = run.folder(work_dir)
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
    """The user ended the command."""


class Trainer:
    """Trains one run at a time in each of its slots. A slot has processes and, where there are any, GPUs of its own.

    Args:
        work_dir: Folder of all runs.
        gpus: Processes of a run at most.
        jobs: Number of slots.
        progress: Shows of every run how far it is, as a share of 1.
        options: Of tools/train.py, for every run.
    """

    def __init__(self, work_dir: Path, gpus: int, jobs: int, progress: Progress, options: list[str]) -> None:
        available = torch.cuda.device_count()
        if 0 < available < jobs * gpus:
            raise UsageError(f'{jobs} runs at a time need {jobs * gpus} GPUs, and there are {available}: lower --jobs.')
        self._work_dir = work_dir
        self._progress = progress
        self._options = options
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
        """Train ``run`` to its end; return the last line of its output where it failed."""
        slot = self._slots.get()
        try:
            return self._train(run, config, os.environ | slot)
        finally:
            self._slots.put(slot)

    def _train(self, run: SweepRun, config: Path, environment: dict[str, str]) -> str | None:
        if self._cancelled:
            raise CancelledError
        folder = run.folder(self._work_dir)
        start = [sys.executable, TOOLS / 'train.py', config]
        if run.gpus > 1:
            start = [TOOLS / 'dist_train.sh', config, run.gpus]
        command = [*map(str, start), '--work-dir', str(folder), '--resume', *self._options]
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
            (folder / RUN_DONE).touch()
            return None
        errors = [line.strip() for line in tail if line.strip()] or ['no output']
        return f'{run} ended with status {status}: {errors[-1]} (its output: {folder.with_suffix(".out")})'

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


def train_all(runs: list[SweepRun], work_dir: Path, jobs: int, console: Console, options: list[str]) -> list[str]:
    """Train the runs that are not done; return a sentence for each that failed."""
    configs = {run: prepare(run, work_dir) for run in runs}
    todo = [run for run in runs if not (run.folder(work_dir) / RUN_DONE).exists()]
    console.print(f'{len(runs)} runs, of which {len(runs) - len(todo)} are done already')
    failures = []
    columns = [TextColumn('{task.description}'), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn('left'), TimeRemainingColumn(), console=console) as progress:
        total = progress.add_task('all runs', total=len(todo))
        train = Trainer(work_dir, max((run.gpus for run in runs), default=1), jobs, progress, options)

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


def main(args: argparse.Namespace) -> None:
    console = Console()
    sweeps = read_sweeps(args.sweeps_file, args.sweeps, args.seeds)
    for sweep in sweeps:
        check_output(args.work_dir / sweep.name / 'summary.md')
    runs = [run for sweep in sweeps for run in sweep.runs]
    options = ['--trust-checkpoint'] if args.trust_checkpoint else []
    failures = train_all(runs, args.work_dir, args.jobs, console, options)
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
    run_tool(parse_args, main)
