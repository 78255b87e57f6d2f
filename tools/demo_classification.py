"""BN against UBN, small and whole: make a data set, train a classifier with each norm and several seeds, compare them.

Every run is one of tools/train.py on the same config; only the type of the norm and the seed differ. What the runs
logged becomes a table and a plot of the accuracy. `make demo-classification` calls this.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from demo import run, show
from rich.console import Console
from rich.markdown import Markdown

from mmubn.runs import read_scalars, series

matplotlib.use('Agg')
import matplotlib.pyplot as plt

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / 'configs' / 'digits' / 'resnet18-ubn_digits.py'
WORK_DIR = Path('work_dirs/demo-classification')
DATA = WORK_DIR / 'digits'
STYLES = {'BN': dict(linestyle='--', marker='o'), 'UBN': dict(linestyle='-', marker='s')}  # also in black and white
TABLE = """\
| norm | seeds | epochs | top-1 accuracy, mean (%) | lowest to highest (%) | seconds a run |
|---|---|---|---|---|---|
{rows}

ResNet-18 of half width, trained on {train} handwritten digits of 32x32 pixels. The accuracy is that after the last
epoch, on {val} other digits; one digit is {digit:.2f} points. The seconds are those of a run, start and
evaluation included, two runs at a time. A task this small and easy says nothing about ImageNet.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Train a classifier with BN and with UBN on real digits and compare their accuracy.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='both norms are trained with each')
    parser.add_argument('--epochs', type=int, default=6, help='epochs of a run; the learning rate falls until the last')
    parser.add_argument('--train-per-class', type=int, help='train on at most this many digits of each class')
    args = parser.parse_args()
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f'--seeds must differ and not be negative, got {" ".join(map(str, args.seeds))}')
    if args.epochs < 1:
        parser.error(f'--epochs must be positive, got {args.epochs}')
    return args


def folder_of(norm: str, seed: int) -> Path:
    return WORK_DIR / f'{norm.lower()}-seed{seed}'


def train(norm: str, seed: int, epochs: int) -> float:
    """Train once, print the progress of it, and return the seconds it took."""
    start = time.monotonic()
    options = [
        f'model.backbone.norm_cfg.type={norm}',
        f'randomness.seed={seed}',
        f'train_cfg.max_epochs={epochs}',
        f'param_scheduler.T_max={epochs}',
        f'train_dataloader.dataset.data_root={DATA}',
        f'val_dataloader.dataset.data_root={DATA}',
    ]
    command = show(
        *(sys.executable, TOOLS / 'train.py', CONFIG, '--work-dir', folder_of(norm, seed)), '--cfg-options', *options
    )
    # Two runs share two cores. With more threads than cores, OpenMP's spin while they wait for one another.
    environment = {'OMP_NUM_THREADS': '1'} | os.environ
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    with subprocess.Popen(command, env=environment, **pipe) as process:
        for line in process.stdout:
            output.append(line)
            if 'Epoch(' in line:
                print(f'{norm}, seed {seed}: {line.partition(" - INFO - ")[2]}', end='', flush=True)
    if process.returncode != 0:
        sys.exit(f'{"".join(output[-30:])}error: {norm} with seed {seed} ended with status {process.returncode}')
    return time.monotonic() - start


def accuracies(norm: str, seeds: list[int]) -> tuple[list[int], np.ndarray]:
    """The E epochs, and the top-1 accuracy in percent after each, (S, E), that the S runs of a norm logged."""
    curves = [series(read_scalars(folder_of(norm, seed)), 'top1') for seed in seeds]
    return curves[0][0], np.array([values for _, values in curves])


def table(results: dict[str, tuple[list[int], np.ndarray]], seconds: dict[str, float]) -> str:
    """What :func:`accuracies` read and the mean seconds of a run, for each norm, in Markdown."""
    train, val = (len(list((DATA / split).glob('*/*.png'))) for split in ('train', 'val'))
    rows = []
    for norm, (epochs, values) in results.items():
        last = values[:, -1]
        spread = f'{last.min():.2f} to {last.max():.2f}'
        rows.append(f'| {norm} | {len(last)} | {epochs[-1]} | {last.mean():.2f} | {spread} | {seconds[norm]:.0f} |')
    return TABLE.format(rows='\n'.join(rows), train=train, val=val, digit=100 / val)


def plot(results: dict[str, tuple[list[int], np.ndarray]], out_file: Path) -> None:
    """Mean and range of the accuracy over the seeds, in all epochs and, larger, in the second half of them."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for i, (norm, (epochs, values)) in enumerate(results.items()):
        mean = values.mean(0)
        distance = np.stack([mean - values.min(0), values.max(0) - mean])
        steps = np.array(epochs) + 0.06 * i  # so that the bars of one norm do not hide those of the other
        label = f'{norm}, mean and range of {len(values)} seeds'
        for axis, first in zip(axes, (0, len(epochs) // 2), strict=True):
            axis.errorbar(steps[first:], mean[first:], distance[:, first:], capsize=4, label=label, **STYLES[norm])
    for axis, title in zip(axes, ('all epochs', 'second half'), strict=True):
        axis.set(title=title, xlabel='epoch', ylabel='top-1 accuracy on validation digits (%)')
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(loc='lower right')
    figure.tight_layout()
    figure.savefig(out_file, dpi=100)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    shutil.rmtree(WORK_DIR, ignore_errors=True)
    limit = [] if args.train_per_class is None else ['--train-per-class', args.train_per_class]
    run(sys.executable, TOOLS / 'dataset_converters' / 'digits_to_imagefolder.py', DATA, *limit)

    runs = [(norm, seed) for seed in args.seeds for norm in STYLES]
    with ThreadPoolExecutor(max_workers=2) as pool:
        taken = dict(zip(runs, pool.map(lambda each: train(*each, args.epochs), runs), strict=True))
    results = {norm: accuracies(norm, args.seeds) for norm in STYLES}
    text = table(results, {norm: np.mean([taken[norm, seed] for seed in args.seeds]) for norm in STYLES})
    (WORK_DIR / 'table.md').write_text(text)
    plot(results, WORK_DIR / 'accuracy.png')

    Console().print(Markdown(text))
    print(f'table: {WORK_DIR / "table.md"}, plot: {WORK_DIR / "accuracy.png"}')
    print(f'{time.monotonic() - start:.0f} s in all')


if __name__ == '__main__':
    main()
