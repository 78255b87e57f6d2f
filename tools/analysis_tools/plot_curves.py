"""Plot the training loss and the validation metrics of one or several runs from MMEngine's logs.

Example:

    python tools/analysis_tools/plot_curves.py work_dirs/demo --out curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

from mmubn.engine import UsageError, run_tool

matplotlib.use('Agg')
import matplotlib.pyplot as plt

MARKERS = 'osv^Dx'  # curves stay apart in black and white


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('runs', nargs='+', type=Path, help='work dirs of runs')
    metrics = ['bbox_mAP', 'segm_mAP', 'top1']
    parser.add_argument('--metrics', nargs='+', default=metrics, help='validation metrics to plot, of those logged')
    parser.add_argument('--out', type=Path, required=True, help='file to write; its ending chooses the format')
    return parser.parse_args()


def read_scalars(run: Path) -> list[dict]:
    """All records of a run in the order of its starts; a resumed run has one log per start."""
    logs = sorted(run.glob('*/vis_data/scalars.json'))
    if not logs:
        raise UsageError(f'no log matches {run}/*/vis_data/scalars.json; give the work dir of a run of tools/train.py.')
    records = []
    for log in logs:
        for number, line in enumerate(log.read_text().splitlines(), 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a killed run
                print(f'{log}, line {number}: cut off, left out')
    return records


def series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one scalar; what a resumed run repeats replaces what the killed one had logged."""
    values = {}
    for record in records:
        for key, value in record.items():
            if key.split('/')[-1] == name:
                values[record['step']] = value
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def main() -> None:
    args = parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for run in args.runs:
        records = read_scalars(run)
        left.plot(*series(records, 'loss'), label=run.name)
        for metric, marker in zip(args.metrics, MARKERS, strict=False):
            steps, values = series(records, metric)
            if steps:
                right.plot(steps, values, marker=marker, label=f'{run.name} {metric}')
    left.set(xlabel='iteration', ylabel='training loss', yscale='log')
    percent = any(max(line.get_ydata()) > 1 for line in right.lines)  # MMPretrain's accuracy; MMDetection's AP is not
    right.set(xlabel='epoch', ylabel='validation metric (%)' if percent else 'validation metric')
    right.set_ylim(0, 100 if percent else 1)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=100)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run_tool(main)
