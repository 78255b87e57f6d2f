"""After how many epochs and seconds does a run reach the best of another one? The question of the paper's Table 8.

Runs that differ in their seed alone (UBN/seed0, UBN/seed1 or UBN-seed0, UBN-seed1) count as one: their mean over the
seeds is compared. The seconds are those of training, from MMEngine's logs.

Example:

    python tools/analysis_tools/time_to_accuracy.py --reference work_dirs/bn-seed*/ --runs work_dirs/ubn-seed*/
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from mmubn.analysis.runs import metric_names, over_seeds, read_runs, series, training_seconds, validation_records
from mmubn.cli import UsageError, add_debug_argument, run_tool

NOTE = """\
The epoch is the first after which the mean over the seeds is as high; in brackets, the last one. Time is the mean over
the seeds of training with its loading of data, without start-up, validation and checkpoints; MMEngine logs the mean
time of the last iterations of each interval, and the others are taken to be as fast.
"""


def parse_args() -> argparse.Namespace:
    summary, details, _ = __doc__.split('\n\n', 2)
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument(
        '--reference', nargs='+', type=Path, required=True, metavar='RUN', help='work dirs of runs to be reached'
    )
    parser.add_argument('--runs', nargs='+', type=Path, required=True, metavar='RUN', help='work dirs of other runs')
    parser.add_argument(
        '--metric', default='top1', metavar='NAME', help='of the validation, as bbox_mAP (default: top1)'
    )
    parser.add_argument('--out', type=Path, metavar='TABLE.md', help='file to write the tables to')
    add_debug_argument(parser)
    return parser.parse_args()


@dataclass
class Group:
    """A metric of S seeds of a run.

    Attributes:
        seeds: Epochs and values of each seed.
        epochs: The T epochs that all seeds have validated, (T,).
        mean: Mean of the metric over the seeds, (T,).
        seconds: Mean over the seeds of the seconds of training until then, (T,).
    """

    label: str
    seeds: list[tuple[list[int], list[float]]]
    epochs: np.ndarray
    mean: np.ndarray
    seconds: np.ndarray


def read_groups(runs: list[Path], metric: str) -> tuple[list[Group], list[str]]:
    """Read the groups that have the metric; a sentence names each run or group that is left out."""
    groups, problems = [], []
    members_of, missing = read_runs(runs)
    for label, members in members_of.items():
        seeds = [series(validation_records(records), metric) for records in members.values()]
        epochs, values = over_seeds(seeds)
        mean = values.mean(0)
        if np.isnan(mean).all():
            logged = dict.fromkeys(tag for records in members.values() for tag in metric_names(records))
            there = f'logged are: {", ".join(logged)}' if logged else 'no metric is logged yet'
            problems.append(f'{label} has no epoch with {metric} in all its logs; {there}.')
            continue
        seconds = np.mean([training_seconds(run, records, epochs) for run, records in members.items()], axis=0)
        groups.append(Group(label, seeds, epochs, mean, seconds))
    if not groups:
        raise UsageError(' '.join(missing + problems))
    return groups, missing + problems


def first_reached(values: list[float] | np.ndarray, target: float) -> int | None:
    """Return the index of the first value that is as high as ``target``."""
    # Means of other numbers may differ in the last bits where they are equal.
    return next((i for i, value in enumerate(values) if value >= target - 1e-9), None)


def number(value: float, digits: int) -> str:
    return 'unknown' if np.isnan(value) else f'{value:.{digits}f}'


def compare(reference: Group, runs: list[Group], metric: str) -> str:
    """Write when the runs reach the best of the reference, in Markdown."""
    best = int(np.nanargmax(reference.mean))
    target, until_best, in_all = reference.mean[best], reference.seconds[best], reference.seconds[-1]
    percent = target > 1  # MMPretrain's accuracy; MMDetection's AP is not

    def shown(value: float) -> str:
        return f'{value:.2f}%' if percent else f'{value:.3f}'

    name = reference.label
    lines = [
        f'## The best of {name}: {metric} {shown(target)}',
        '',
        f'Reached after epoch {reference.epochs[best]} of {reference.epochs[-1]} and {number(until_best, 1)} s of '
        f'{number(in_all, 1)} s of training. Seeds: {len(reference.seeds)}.',
        '',
        f"| run | epoch | time (s) | time / {name}'s until its best | time / {name}'s in all "
        '| seeds that reach it: their epochs, mean (range) |',
        '|---|---|---|---|---|---|',
    ]
    for run in runs:
        i = first_reached(run.mean, target)
        if i is None:
            highest = int(np.nanargmax(run.mean))
            cells = [f'never; {shown(run.mean[highest])} after {run.epochs[highest]} ({run.epochs[-1]})', '', '', '']
        else:
            seconds = run.seconds[i]
            cells = [f'{run.epochs[i]} ({run.epochs[-1]})', number(seconds, 1)]
            cells += [number(seconds / until_best, 2), number(seconds / in_all, 2)]
        alone = [(epochs, first_reached(values, target)) for epochs, values in run.seeds]
        reached = [epochs[j] for epochs, j in alone if j is not None]
        cells.append(f'{len(reached)} of {len(run.seeds)}')
        if reached:
            cells[-1] += f': {np.mean(reached):.1f} ({min(reached)} to {max(reached)})'
        lines.append(f'| {" | ".join([run.label, *cells])} |')
    return '\n'.join(lines)


def main(args: argparse.Namespace) -> None:
    references, problems = read_groups(args.reference, args.metric)
    runs, more = read_groups(args.runs, args.metric)
    parts = [compare(reference, runs, args.metric) for reference in references]
    for group in references + runs:
        validated = len(set().union(*(epochs for epochs, _ in group.seeds)))
        if len(group.epochs) < validated:
            parts.append(
                f'{group.label}: {len(group.epochs)} of {validated} validated epochs, those that all seeds have.'
            )
    text = '\n\n'.join([*dict.fromkeys(parts), NOTE])
    Console().print(Markdown(text))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
        print(f'wrote {args.out}')
    if problems + more:
        raise UsageError(' '.join(problems + more))


if __name__ == '__main__':
    run_tool(parse_args, main)
