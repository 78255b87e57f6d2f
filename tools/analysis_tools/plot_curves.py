"""Plot the training loss and the validation metrics of one or several runs from MMEngine's logs.

Runs that differ in their seed alone (UBN/seed0, UBN/seed1 or UBN-seed0, UBN-seed1) become one curve, their mean, with
the standard deviation as a band.

Example:

    python tools/analysis_tools/plot_curves.py work_dirs/bn-seed*/ work_dirs/ubn-seed*/ --out curves.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from mmubn.analysis.plots import draw_mean, line_style, plt, save
from mmubn.analysis.runs import metric_names, read_runs, series, training_records, validation_records
from mmubn.cli import UsageError, add_debug_argument, run_tool


def parse_args() -> argparse.Namespace:
    summary, details, _ = __doc__.split('\n\n', 2)
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='work dirs of runs')
    metrics = ['bbox_mAP', 'segm_mAP', 'top1']
    parser.add_argument(
        '--metrics',
        nargs='+',
        default=metrics,
        metavar='NAME',
        help=f'validation metrics to plot, of those logged (default: {" ".join(metrics)})',
    )
    parser.add_argument('--out', type=Path, required=True, help='where to write: out.png and out.svg')
    add_debug_argument(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    groups, problems = read_runs(args.runs)
    validations = [validation_records(records) for members in groups.values() for records in members.values()]
    metrics = [name for name in args.metrics if any(series(records, name)[0] for records in validations)]
    if not metrics:
        logged = dict.fromkeys(tag for records in validations for tag in metric_names(records))
        there = f'there are: {", ".join(logged)}' if logged else 'there is none yet'
        problems.append(f'no validation metric {" or ".join(args.metrics)} is in the logs; {there}.')

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    remarks = ''
    for i, (label, members) in enumerate(groups.items()):
        losses = [series(training_records(records), 'loss') for records in members.values()]
        remarks += draw_mean(left, losses, f'{label} loss', line_style(i))
        for j, name in enumerate(metrics):
            values = [series(validation_records(records), name) for records in members.values()]
            remarks += draw_mean(right, values, f'{label} {name}', line_style(i + j * len(groups)))

    left.set(xlabel='iteration', ylabel='training loss', yscale='log')
    # A band that reaches down to 0 would leave nothing of the axis for the curves.
    lowest = min((y for line in left.lines for y in line.get_ydata() if 0 < y < math.inf), default=1)
    left.set_ylim(bottom=max(left.get_ylim()[0], lowest / 2))
    percent = any(line.get_ydata().max() > 1 for line in right.lines)  # MMPretrain's accuracy; MMDetection's AP is not
    name = metrics[0] if len(metrics) == 1 else 'metric'
    right.set(xlabel='epoch', ylabel=f'{name} on the validation data ({"%" if percent else "from 0 to 1"})')
    for axis in (left, right):
        axis.set_xlim(left=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend(fontsize=8)
    caption = (
        f"{', '.join(groups)}. Left: training loss, each point a mean over MMEngine's logging window. "
        f'Right: {", ".join(metrics) or "nothing yet"} on the validation data after an epoch.'
    )
    if any(len(members) > 1 for members in groups.values()):
        caption += ' Lines of several seeds are their mean, bands one standard deviation (n - 1) to each side.'
    save(figure, args.out, caption + remarks)
    if problems:
        raise UsageError(' '.join(problems))


if __name__ == '__main__':
    run_tool(parse_args, main)
