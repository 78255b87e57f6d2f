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

from mmubn.analysis.metrics import shown
from mmubn.analysis.plots import check_output, write
from mmubn.analysis.runs import (
    matching_tags,
    metric_names,
    over_seeds,
    read_runs,
    series,
    training_seconds,
    validation_records,
    validation_unit,
)
from mmubn.cli import UsageError, add_debug_argument, run_tool

NOTE = """\
The epoch, or iteration, is the first after which the mean over the seeds is as high; in brackets, the last one. Time
is the mean over the seeds of training with its loading of data, without start-up, validation and checkpoints; MMEngine
logs the mean time of the last iterations of each interval, and the others are taken to be as fast.
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
        epochs: The T epochs that all seeds have validated, (T,); iterations, in runs without epochs.
        unit: What they are: epoch or iteration.
        mean: Mean of the metric over the seeds, (T,).
        seconds: Mean over the seeds of the seconds of training until then, (T,).
    """

    label: str
    seeds: list[tuple[list[int], list[float]]]
    epochs: np.ndarray
    unit: str
    mean: np.ndarray
    seconds: np.ndarray


def read_groups(runs: list[Path], metric: str) -> tuple[list[Group], set[str]]:
    """Read the metric of runs, in groups; and which tags its name means in them.

    Raises:
        UsageError: A run cannot be read, or a group has not the metric or has several of its name.
    """
    groups, tags_found, problems = [], set(), []
    for label, members in read_runs(runs).items():
        tags = {tag for records in members.values() for tag in matching_tags(records, metric)}
        if len(tags) > 1:
            problems.append(f'{label} has several metrics {metric}: {", ".join(sorted(tags))}; give one of these.')
            continue
        seeds = [series(validation_records(records), metric) for records in members.values()]
        epochs, values = over_seeds(seeds)
        mean = values.mean(0)
        if np.isnan(mean).all():
            logged = dict.fromkeys(tag for records in members.values() for tag in metric_names(records))
            there = f'logged are: {", ".join(logged)}; choose one by --metric' if logged else 'no metric is logged yet'
            problems.append(f'{label} has no validation with {metric} in all its logs; {there}.')
            continue
        seconds = np.mean([training_seconds(run, records, epochs) for run, records in members.items()], axis=0)
        unit = validation_unit(next(iter(members.values())))
        groups.append(Group(label, seeds, epochs, unit, mean, seconds))
        tags_found |= tags
    if problems:
        raise UsageError(' '.join(problems))
    return groups, tags_found


def first_reached(values: list[float] | np.ndarray, target: float) -> int | None:
    """Return the index of the first value that is as high as ``target``."""
    # Means of other numbers may differ in the last bits where they are equal.
    return next((i for i, value in enumerate(values) if value >= target - 1e-9), None)


def number(value: float, digits: int) -> str:
    return 'unknown' if np.isnan(value) else f'{value:.{digits}f}'


def compare(reference: Group, runs: list[Group], tag: str) -> str:
    """Write when the runs reach the best of the reference, in Markdown."""
    best = int(np.nanargmax(reference.mean))
    target, until_best, in_all = reference.mean[best], reference.seconds[best], reference.seconds[-1]
    name, unit = reference.label, reference.unit
    lines = [
        f'## The best of {name}: {tag.split("/")[-1]} {shown(tag, target)}',
        '',
        f'Reached after {unit} {reference.epochs[best]} of {reference.epochs[-1]} and {number(until_best, 1)} s of '
        f'{number(in_all, 1)} s of training. Seeds: {len(reference.seeds)}.',
        '',
        f"| run | {unit} | time (s) | time / {name}'s until its best | time / {name}'s in all "
        f'| seeds that reach it: their {unit}s, mean (range) |',
        '|---|---|---|---|---|---|',
    ]
    for run in runs:
        i = first_reached(run.mean, target)
        if i is None:
            highest = int(np.nanargmax(run.mean))
            cells = [
                f'never; {shown(tag, run.mean[highest])} after {run.epochs[highest]} ({run.epochs[-1]})',
                '',
                '',
                '',
            ]
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
    if args.out is not None:
        check_output(args.out)
    references, tags = read_groups(args.reference, args.metric)
    runs, others = read_groups(args.runs, args.metric)
    if len(tags | others) > 1:
        names = ', '.join(sorted(tags | others))
        raise UsageError(f'{args.metric} is not one and the same metric in these runs: {names}.')
    if len({group.unit for group in references + runs}) > 1:
        names = ', '.join(f'{group.label} {group.unit}s' for group in references + runs)
        raise UsageError(f'runs that count epochs and iterations cannot be compared: {names}.')
    (tag,) = tags
    parts = [compare(reference, runs, tag) for reference in references]
    for group in references + runs:
        validated = len(set().union(*(epochs for epochs, _ in group.seeds)))
        if len(group.epochs) < validated:
            parts.append(
                f'{group.label}: {len(group.epochs)} of {validated} validated {group.unit}s, those that all seeds have.'
            )
    text = '\n\n'.join([*dict.fromkeys(parts), NOTE])
    Console().print(Markdown(text))
    if args.out is not None:
        write({args.out: text.encode()})


if __name__ == '__main__':
    run_tool(parse_args, main)
