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
from mmubn.analysis.plots import check_plot, save_all
from mmubn.analysis.runs import distinct_runs, matching_tags, metric_names
from mmubn.cli import UsageError, add_debug_argument, run_tool

METRICS = ('bbox_mAP', 'top1')


def parse_args() -> argparse.Namespace:
    summary, details, _ = __doc__.split('\n\n', 2)
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='work dir of a run with the hook')
    parser.add_argument('--metric', help=f'validation metric (default: {" and ".join(METRICS)}, where logged)')
    parser.add_argument('--out', type=Path, required=True, help='name of the plots, which are written as PNG and SVG')
    add_debug_argument(parser)
    return parser.parse_args()


def choose_metrics(records: list[list[dict]], asked: str | None) -> list[str]:
    """Return the tags of the metric that is asked for, or of those of METRICS that a run logged, if any.

    Raises:
        UsageError: No run logged the one that is asked for.
    """
    tags = dict.fromkeys(
        tag for name in ([asked] if asked else METRICS) for each in records for tag in matching_tags(each, name)
    )
    if asked and not tags:
        logged = dict.fromkeys(tag for each in records for tag in metric_names(each))
        raise UsageError(f'no run logged --metric {asked}; logged are: {", ".join(logged) or "none"}.')
    return list(tags)


def main(args: argparse.Namespace) -> None:
    check_plot(args.out)
    logs, problems = {}, []
    for run in distinct_runs(args.runs):
        try:
            logs[run] = read_log(run)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError(' '.join(problems))
    records = {run: read_records(run) for run in logs}
    metrics = choose_metrics(list(records.values()), args.metric)
    if difference := other_layers(logs):
        print(difference)
    figure, caption = draw_means(logs, records, metrics)
    layers, layers_caption = draw_layers(logs)
    layers_out = args.out.with_name(f'{args.out.stem}-layers{args.out.suffix}')
    save_all([(figure, args.out, caption), (layers, layers_out, layers_caption)])


if __name__ == '__main__':
    run_tool(parse_args, main)
