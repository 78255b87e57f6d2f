"""BN against UBN, small and whole: make a data set, train a classifier with each norm and several seeds, compare them.

Every run is one of tools/train.py on the same config; only the type of the norm and the seed differ. What the runs
logged becomes a table and a plot of the accuracy. `make demo-classification` calls this. The result of an earlier demo
is replaced at the end, and stays where this one fails or is interrupted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from mmubn.analysis.classification_demo import STYLES, plot, read_accuracies, table
from mmubn.analysis.demo import new_result
from mmubn.cli import add_debug_argument, print_command, run_command, run_tool

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / 'configs' / 'digits' / 'resnet18-ubn_digits.py'
WORK_DIR = Path('work_dirs/demo-classification')
NORMS = tuple(STYLES)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Train a classifier with BN and with UBN on real digits and compare their accuracy.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='both norms are trained with each')
    parser.add_argument('--epochs', type=int, default=6, help='epochs of a run; the learning rate falls until the last')
    parser.add_argument('--train-per-class', type=int, help='train on at most this many digits of each class')
    add_debug_argument(parser)
    args = parser.parse_args()
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f'--seeds must differ and not be negative, got {" ".join(map(str, args.seeds))}')
    if args.epochs < 1:
        parser.error(f'--epochs must be positive, got {args.epochs}')
    return args


def folder_of(work_dir: Path, norm: str, seed: int) -> Path:
    return work_dir / f'{norm.lower()}-seed{seed}'


def train(work_dir: Path, norm: str, seed: int, epochs: int, running: list[subprocess.Popen]) -> float:
    """Train once, print the progress of it, and return the seconds it took. The process is added to ``running``."""
    start = time.monotonic()
    data = work_dir / 'digits'
    options = [
        f'model.backbone.norm_cfg.type={norm}',
        f'randomness.seed={seed}',
        f'train_cfg.max_epochs={epochs}',
        f'param_scheduler.T_max={epochs}',
        f'train_dataloader.dataset.data_root={data}',
        f'val_dataloader.dataset.data_root={data}',
    ]
    command = print_command(
        *(sys.executable, TOOLS / 'train.py', CONFIG, '--work-dir', folder_of(work_dir, norm, seed)),
        '--cfg-options',
        *options,
    )
    # Two runs share two cores. With more threads than cores, OpenMP's spin while they wait for one another.
    environment = {'OMP_NUM_THREADS': '1'} | os.environ
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    with subprocess.Popen(command, env=environment, **pipe) as process:
        running.append(process)
        for line in process.stdout:
            output.append(line)
            if 'Epoch(' in line:
                print(f'{norm}, seed {seed}: {line.partition(" - INFO - ")[2]}', end='', flush=True)
    if process.returncode != 0:
        sys.exit(f'{"".join(output[-30:])}error: {norm} with seed {seed} ended with status {process.returncode}')
    return time.monotonic() - start


def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    with new_result(WORK_DIR) as new:
        text = compare(new, args)
    Console().print(Markdown(text))
    print(f'table: {WORK_DIR / "table.md"}, plot: {WORK_DIR / "accuracy.png"}')
    print(f'{time.monotonic() - start:.0f} s in all')


def compare(work_dir: Path, args: argparse.Namespace) -> str:
    """Train all runs, write the table and the plot of their accuracies, and return the table."""
    data = work_dir / 'digits'
    limit = [] if args.train_per_class is None else ['--train-per-class', args.train_per_class]
    run_command(sys.executable, TOOLS / 'dataset_converters' / 'digits_to_imagefolder.py', data, *limit)

    runs = [(norm, seed) for seed in args.seeds for norm in NORMS]
    running: list[subprocess.Popen] = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        seconds = pool.map(lambda each: train(work_dir, *each, args.epochs, running), runs)
        try:
            taken = dict(zip(runs, seconds, strict=True))
        except BaseException:
            for process in running:
                process.terminate()
            raise
    results = {norm: read_accuracies([folder_of(work_dir, norm, seed) for seed in args.seeds]) for norm in NORMS}
    text = table(results, {norm: np.mean([taken[norm, seed] for seed in args.seeds]) for norm in NORMS}, data)
    (work_dir / 'table.md').write_text(text)
    plot(results, work_dir / 'accuracy.png')
    return text


if __name__ == '__main__':
    run_tool(parse_args, main)
