"""Plot how condensed the features of one or several runs are, from the files that FeatureCondensationHook writes.

OUT shows the mean similarity of the layers in the course of training (the paper's Figure 2), the share of condensed
layers and the validation metric; OUT-layers a heat map layer x time of every run.

Example:

    python tools/analysis_tools/plot_condensation.py work_dirs/bn work_dirs/ubn --out condensation.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmubn.analysis.condensation import draw_layers, draw_means, other_layers, read_log, read_records
from mmubn.analysis.plots import save
from mmubn.analysis.runs import metric_names
from mmubn.cli import UsageError, add_debug_argument, run_tool

METRICS = ('bbox_mAP', 'top1')


def parse_args() -> argparse.Namespace:
    summary, details, _ = __doc__.split('\n\n', 2)
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='work dir of a run with the hook')
    parser.add_argument('--metric', help=f'validation metric (default: {" or ".join(METRICS)}, where logged)')
    parser.add_argument('--out', type=Path, required=True, help='name of the plots, which are written as PNG and SVG')
    add_debug_argument(parser)
    return parser.parse_args()


def choose_metric(records: list[list[dict]], asked: str | None) -> str | None:
    """Return the metric that is asked for, or the first of METRICS that a run logged, if any.

    Raises:
        UsageError: No run logged the one that is asked for.
    """
    tags = list(dict.fromkeys(tag for each in records for tag in metric_names(each)))
    names = {name for tag in tags for name in (tag, tag.split('/')[-1])}
    if asked and asked not in names:
        raise UsageError(f'no run logged --metric {asked}; logged are: {", ".join(tags) or "none"}.')
    return asked or next((name for name in METRICS if name in names), None)


def main(args: argparse.Namespace) -> None:
    logs, errors, metric = {}, [], None
    for run in args.runs:
        try:
            logs[run] = read_log(run)
        except UsageError as error:
            errors.append(str(error))
    if logs:
        records = {run: read_records(run) for run in logs}
        try:
            metric = choose_metric(list(records.values()), args.metric)
        except UsageError as error:
            errors.append(str(error))
        if difference := other_layers(logs):
            print(difference)
        figure, caption = draw_means(logs, records, metric)
        save(figure, args.out, caption)
        figure, caption = draw_layers(logs)
        save(figure, args.out.with_name(f'{args.out.stem}-layers{args.out.suffix}'), caption)
    if errors:
        raise UsageError(' '.join(errors))


if __name__ == '__main__':
    run_tool(parse_args, main)
