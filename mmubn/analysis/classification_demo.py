"""What tools/demo_classification.py shows: the accuracy with each norm over several seeds, as a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from mmubn.analysis.runs import read_scalars, series

matplotlib.use('Agg')
import matplotlib.pyplot as plt

__all__ = ['STYLES', 'Accuracies', 'plot', 'read_accuracies', 'table']

# Of each norm; they stay apart in black and white.
STYLES = {'BN': dict(linestyle='--', marker='o'), 'UBN': dict(linestyle='-', marker='s')}
TABLE = """\
| norm | seeds | epochs | top-1 accuracy, mean (%) | lowest to highest (%) | seconds a run |
|---|---|---|---|---|---|
{rows}

ResNet-18 of half width, trained on {train} handwritten digits of 32x32 pixels. The accuracy is that after the last
epoch, on {val} other digits; one digit is {digit:.2f} points. The seconds are those of a run, start and
evaluation included, two runs at a time. A task this small and easy says nothing about ImageNet.
"""


class Accuracies(NamedTuple):
    """What S runs that differ in their seed alone logged.

    Attributes:
        epochs: The E epochs.
        values: Top-1 accuracy in percent after each, (S, E).
    """

    epochs: list[int]
    values: np.ndarray


def read_accuracies(runs: list[Path]) -> Accuracies:
    """Read the accuracies from the logs of runs."""
    curves = [series(read_scalars(run), 'top1') for run in runs]
    return Accuracies(curves[0][0], np.array([values for _, values in curves]))


def table(results: dict[str, Accuracies], seconds: dict[str, float], data: Path) -> str:
    """Write the table in Markdown.

    Args:
        results: Of each norm.
        seconds: Of a run with each norm, in the mean.
        data: The folder of the digits, whose images are counted.
    """
    train, val = (len(list((data / split).glob('*/*.png'))) for split in ('train', 'val'))
    rows = []
    for norm, (epochs, values) in results.items():
        last = values[:, -1]
        spread = f'{last.min():.2f} to {last.max():.2f}'
        rows.append(f'| {norm} | {len(last)} | {epochs[-1]} | {last.mean():.2f} | {spread} | {seconds[norm]:.0f} |')
    return TABLE.format(rows='\n'.join(rows), train=train, val=val, digit=100 / val)


def plot(results: dict[str, Accuracies], out_file: Path) -> None:
    """Plot mean and range of the accuracy over the seeds, in all epochs and, larger, in the second half of them."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout='tight')
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
    figure.savefig(out_file, dpi=100)
    plt.close(figure)
