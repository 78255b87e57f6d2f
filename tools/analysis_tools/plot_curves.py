"""Plot the training loss and the validation metrics of one or several runs from MMEngine's logs.

Runs that differ in their seed alone (UBN/seed0, UBN/seed1 or UBN-seed0, UBN-seed1) become one curve, their mean, with
the standard deviation as a band. Every metric has axes of its own, with the unit in which it was logged; so has the
loss of runs whose losses have other parts, as those of a classifier and of a detector.

Example:

    python tools/analysis_tools/plot_curves.py work_dirs/bn-seed*/ work_dirs/ubn-seed*/ --out curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmubn.analysis.curves import Groups, draw_panel, loss_panels, metric_panels, tags_of
from mmubn.analysis.plots import check_plot, plt, save
from mmubn.analysis.runs import metric_names, read_runs
from mmubn.cli import UsageError, add_debug_argument, run_tool

METRICS = ['bbox_mAP', 'segm_mAP', 'top1']


def parse_args() -> argparse.Namespace:
    summary, details, _ = __doc__.split('\n\n', 2)
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='work dirs of runs')
    parser.add_argument(
        '--metrics',
        nargs='+',
        metavar='NAME',
        help=f'validation metrics to plot (default: those of {" ".join(METRICS)} that are logged)',
    )
    parser.add_argument('--out', type=Path, required=True, help='where to write: out.png and out.svg')
    add_debug_argument(parser)
    return parser.parse_args()


def choose_metrics(groups: Groups, asked: list[str] | None) -> list[str]:
    """Return the tags of the metrics that are asked for, or of those of METRICS that a run logged.

    Raises:
        UsageError: No run logged one that is asked for, or runs have metrics, but none of METRICS.
    """
    runs = [records for members in groups.values() for records in members.values()]
    logged = dict.fromkeys(tag for records in runs for tag in metric_names(records))
    there = f'there are: {", ".join(logged)}' if logged else 'there is none yet'
    if missing := [name for name in asked or [] if not tags_of(groups, [name])]:
        raise UsageError(f'no validation metric {" or ".join(missing)} is in the logs; {there}.')
    tags = tags_of(groups, asked or METRICS)
    if logged and not tags:
        raise UsageError(f'no validation metric {" or ".join(METRICS)} is in the logs; {there}; choose with --metrics.')
    return tags


def main(args: argparse.Namespace) -> None:
    check_plot(args.out)
    groups = read_runs(args.runs)
    losses = loss_panels(groups)
    metrics = [panel for tag in choose_metrics(groups, args.metrics) for panel in metric_panels(groups, tag)]

    panels = losses + metrics
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(5.5 * columns, 8), 4.5 * rows), squeeze=False)
    remarks = ''
    for axis, panel in zip(axes.flat, panels, strict=False):
        remarks += draw_panel(axis, panel, logarithmic=panel in losses)
    for axis in axes.flat[len(panels) :]:
        axis.remove()

    caption = f'{", ".join(groups)}. '
    if losses:
        caption += "Training loss: each point is a mean over MMEngine's logging window. "
    if len(losses) > 1:
        caption += 'Losses on other axes have other parts and cannot be compared. '
    names = dict.fromkeys(panel.ylabel for panel in metrics)
    caption += f'{", ".join(names)} on the validation data.' if names else 'No validation yet.'
    if any(len(members) > 1 for members in groups.values()):
        caption += ' Lines of several seeds are their mean, bands one standard deviation (n - 1) to each side.'
    for label, members in groups.items():
        if metrics and not any(metric_names(records) for records in members.values()):
            remarks += f' {label}: no validation yet.'
    save(figure, args.out, caption + remarks)


if __name__ == '__main__':
    run_tool(parse_args, main)
