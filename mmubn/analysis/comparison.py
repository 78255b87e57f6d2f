"""Compare the runs of a sweep: tables and plots of their mean and spread over the seeds."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from mmubn.analysis.metrics import PERCENT, decimals, unit_of
from mmubn.analysis.plots import line_style, plt, save
from mmubn.analysis.runs import (
    matching_tags,
    over_seeds,
    read_scalars,
    series,
    validation_records,
    validation_unit,
)
from mmubn.analysis.sweeps import RUN_DONE, Sweep
from mmubn.cli import UsageError

__all__ = [
    'Curve',
    'compared',
    'count_comparisons',
    'difference',
    'plot',
    'read_curves',
    'read_table',
    'summarize',
    'write_tables',
]


@dataclass
class Curve:
    """One metric of one choice: the epochs, and the values of S seeds after each, (S, E).

    ``step`` is what ``epochs`` count: epochs or, in runs without them, iterations.
    """

    seeds: list[int]
    epochs: list[int]
    values: np.ndarray
    tag: str = ''
    step: str = 'epoch'

    @property
    def last(self) -> dict[int, float]:
        return dict(zip(self.seeds, self.values[:, -1], strict=True))

    def until(self, epoch: int) -> Curve:
        """The same runs, as they were after an epoch."""
        number = self.epochs.index(epoch) + 1
        return replace(self, epochs=self.epochs[:number], values=self.values[:, :number])


def read_curves(sweep: Sweep, work_dir: Path) -> dict[str, dict[str, Curve]]:
    """Read the curves of the runs that are done, by metric and label.

    Raises:
        UsageError: A metric of the sweep means several that the runs logged, or the runs do not all count epochs.
    """
    found: dict[str, dict[str, dict[int, tuple]]] = {}
    kinds: dict[str, set[tuple[str, str]]] = {}
    for run in sweep.runs:
        folder = run.folder(work_dir)
        if not (folder / RUN_DONE).exists():
            continue
        records = read_scalars(folder)
        for metric in sweep.metrics:
            for tag in matching_tags(records, metric):
                kinds.setdefault(metric, set()).add((tag, validation_unit(records)))
                curve = series(validation_records(records), tag)
                found.setdefault(metric, {}).setdefault(run.label, {})[run.seed] = curve
    curves: dict[str, dict[str, Curve]] = {}
    for metric, labels in found.items():
        if len(kinds[metric]) > 1:
            kinds_found = ', '.join(f'{tag} by {step}' for tag, step in sorted(kinds[metric]))
            raise UsageError(
                f'sweep {sweep.name!r}: metric {metric} is not one and the same in its runs: {kinds_found}; write the '
                'whole name of one under metrics, and compare runs by epochs and by iterations in two sweeps.'
            )
        ((tag, step),) = kinds[metric]
        for label, by_seed in labels.items():
            epochs, values = over_seeds(list(by_seed.values()))
            if len(epochs):
                curves.setdefault(metric, {})[label] = Curve(list(by_seed), epochs.tolist(), values, tag, step)
    return curves


def difference(curve: Curve, baseline: Curve, comparisons: int = 1) -> tuple[float, float, float] | None:
    """Compute the mean difference of the last values and its confidence interval by a paired t-test over seeds.

    The interval is of 1 - 0.05 / m for m ``comparisons``: by Bonferroni's inequality all m hold at once in 95%.
    None with fewer than two seeds in common.
    """
    seeds = _common_seeds(curve, baseline)
    if len(seeds) < 2:
        return None
    differences = np.array([curve.last[seed] - baseline.last[seed] for seed in seeds])
    mean, error = differences.mean(), differences.std(ddof=1) / len(seeds) ** 0.5
    half = stats.t.ppf(1 - 0.05 / comparisons / 2, len(seeds) - 1) * error
    return float(mean), float(mean - half), float(mean + half)


def _common_seeds(curve: Curve, baseline: Curve) -> list[int]:
    return [seed for seed in curve.seeds if seed in baseline.seeds]


def reached(curve: Curve, target: float) -> str:
    """Write after which epoch or iteration the seeds first reach ``target``, in the mean, and how many of them do."""
    first = [curve.epochs[int(np.argmax(values >= target))] for values in curve.values if (values >= target).any()]
    mean = f'{np.mean(first):.1f}' if first else 'never'
    return f'{mean} ({len(first)} of {len(curve.seeds)})'


def summarize(sweep: Sweep, curves: dict[str, dict[str, Curve]]) -> str:
    """Write a table for each metric of the sweep, in Markdown."""
    lines = [f'## {sweep.name}', '']
    if sweep.paper:
        lines += [f'In the paper: {sweep.paper}.', '']
    missing = [label for label in sweep.labels if not any(label in each for each in curves.values())]
    for i, (metric, by_label) in enumerate(curves.items()):
        unit, digits = _unit_and_digits(metric, by_label)
        step = _step(by_label)
        header = ['', 'seeds', f'{step}s', f'{metric}, mean{unit}', 'standard deviation', 'lowest to highest']
        target = sweep.target if i == 0 else None
        baseline = by_label.get(sweep.baseline)
        header += [f'{step}s to {target:g} (seeds that reach it)'] if target is not None else []
        comparisons = count_comparisons(by_label, baseline) if baseline else 0
        header += [f'difference from {sweep.baseline}, 95% interval'] if baseline else []
        header += [f'interval of all {comparisons} at once'] if comparisons > 1 else []
        lines += [f'| {" | ".join(header)} |', f'|{"---|" * len(header)}']
        for label, curve in by_label.items():
            last = curve.values[:, -1]
            cells = [label, str(len(last)), str(curve.epochs[-1]), f'{last.mean():.{digits}f}']
            cells.append(f'{last.std(ddof=1):.{digits}f}' if len(last) > 1 else '')
            cells.append(f'{last.min():.{digits}f} to {last.max():.{digits}f}')
            cells += [reached(curve, target)] if target is not None else []
            if baseline:
                own = label != sweep.baseline
                empty = ['', ''] if comparisons > 1 else ['']
                cells += _compared_in_table(curve, baseline, digits, comparisons) if own else empty
            lines.append(f'| {" | ".join(cells)} |')
        lines += ['', *course(metric, by_label), '']
        if baseline:
            lines += [*differences(metric, by_label, sweep.baseline), '']
    if missing:
        lines += [f'Nothing yet of: {", ".join(missing)}.', '']
    return '\n'.join(lines)


def course(metric: str, by_label: dict[str, Curve]) -> list[str]:
    """Write mean and standard deviation after at most ten epochs, from the first to the last, as a Markdown table."""
    unit, digits = _unit_and_digits(metric, by_label, by_epoch=True)
    shown = _shown_epochs(by_label)
    header = [f'{metric}{unit} after {_step(by_label)}', *map(str, shown)]
    lines = [f'| {" | ".join(header)} |', f'|{"---|" * len(header)}']
    for label, curve in by_label.items():
        values = curve.values[:, [curve.epochs.index(epoch) for epoch in shown]]
        cells = [f'{mean:.{digits}f}' for mean in values.mean(0)]
        if len(values) > 1:
            cells = [f'{cell} ± {std:.{digits}f}' for cell, std in zip(cells, values.std(0, ddof=1), strict=True)]
        lines.append(f'| {" | ".join([label, *cells])} |')
    return lines


def differences(metric: str, by_label: dict[str, Curve], baseline: str) -> list[str]:
    """Write the differences from the baseline after the epochs of :func:`course`, the good ones and the bad ones."""
    unit, digits = _unit_and_digits(metric, by_label, by_epoch=True)
    shown = _shown_epochs(by_label)
    header = [f'{metric}{unit}, difference from {baseline} after {_step(by_label)}', *map(str, shown)]
    lines = [f'| {" | ".join(header)} |', f'|{"---|" * len(header)}']
    for label, curve in by_label.items():
        if label != baseline:
            cells = [compared(curve.until(epoch), by_label[baseline].until(epoch), digits) for epoch in shown]
            lines.append(f'| {" | ".join([label, *(cell.partition(":")[0] for cell in cells)])} |')
    return lines


def _shown_epochs(by_label: dict[str, Curve]) -> list[int]:
    """Return at most ten epochs that all curves have, from the first to the last."""
    epochs = sorted(set.intersection(*(set(curve.epochs) for curve in by_label.values())))
    return [epochs[i] for i in np.linspace(0, len(epochs) - 1, min(10, len(epochs))).round().astype(int)]


def _unit_and_digits(metric: str, by_label: dict[str, Curve], by_epoch: bool = False) -> tuple[str, int]:
    """Return the unit of a metric, as it stands behind its name, and the digits to show: of percents by epoch, one."""
    tag = next(iter(by_label.values())).tag or metric
    if unit_of(tag) != PERCENT:
        return '', decimals(tag)
    return ' (%)', 1 if by_epoch else decimals(tag)


def _step(by_label: dict[str, Curve]) -> str:
    return next(iter(by_label.values())).step


def compared(curve: Curve, baseline: Curve, digits: int, comparisons: int = 1) -> str:
    """Write the :func:`difference` and what its interval says."""
    if (interval := difference(curve, baseline, comparisons)) is None:
        return ''
    if _are_identical(curve, baseline):
        return 'identical'  # runs, to the last bit: an interval would be of nothing
    mean, low, high = interval
    verdict = 'higher' if low > 0 else 'lower' if high < 0 else 'not told apart'
    return f'{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]: {verdict}'


def _are_identical(curve: Curve, baseline: Curve) -> bool:
    """Tell whether the runs of every common seed are the same, from the first epoch to the last."""
    seeds = _common_seeds(curve, baseline)
    own, other = (each.values[[each.seeds.index(seed) for seed in seeds]] for each in (curve, baseline))
    return np.array_equal(own, other)


def count_comparisons(by_label: dict[str, Curve], baseline: Curve) -> int:
    """Count the intervals of a table: there is none where seeds are missing, or all runs are those of the baseline."""
    return sum(
        difference(curve, baseline) is not None and not _are_identical(curve, baseline) for curve in by_label.values()
    )


def _compared_in_table(curve: Curve, baseline: Curve, digits: int, comparisons: int) -> list[str]:
    """Write the difference with its interval and, of several in a table, what the interval of all at once says."""
    alone = compared(curve, baseline, digits)
    if comparisons < 2:
        return [alone]
    if _are_identical(curve, baseline):
        return [alone, '']
    return [alone.partition(':')[0], compared(curve, baseline, digits, comparisons).partition(' ')[2]]


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with path.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)


def write_tables(sweep: Sweep, curves: dict[str, dict[str, Curve]], folder: Path) -> None:
    """Write runs.csv, every value that was measured, and epochs.csv, mean and standard deviation after every epoch.

    The column ``epoch`` is called ``iteration`` where runs have no epochs; runs of both kinds have both columns.
    """
    steps = sorted({curve.step for by_label in curves.values() for curve in by_label.values()}) or ['epoch']
    runs, epochs = [], []
    for metric, by_label in curves.items():
        for label, curve in by_label.items():
            after = [[epoch if step == curve.step else '' for step in steps] for epoch in curve.epochs]
            for seed, values in zip(curve.seeds, curve.values, strict=True):
                runs += [[label, seed, metric, *epoch, value] for epoch, value in zip(after, values, strict=True)]
            for epoch, values in zip(after, curve.values.T, strict=True):
                spread = values.std(ddof=1) if len(values) > 1 else ''
                epochs.append([label, metric, *epoch, len(values), values.mean(), spread])
    write_csv(folder / 'runs.csv', ['choice', 'seed', 'metric', *steps, 'value'], runs)
    write_csv(folder / 'epochs.csv', ['choice', 'metric', *steps, 'seeds', 'mean', 'standard deviation'], epochs)


def read_table(path: Path) -> dict[str, dict[str, Curve]]:
    """Read what :func:`write_tables` wrote to runs.csv, by metric and label; the curves have no tag."""
    found: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    steps = {}
    with path.open(newline='') as file:
        for row in csv.DictReader(file):
            metric, label = row['metric'], row['choice']
            step = steps[metric] = next(step for step in ('epoch', 'iteration') if row.get(step))
            seeds = found.setdefault(metric, {}).setdefault(label, {})
            seeds.setdefault(int(row['seed']), {})[int(row[step])] = float(row['value'])
    curves: dict[str, dict[str, Curve]] = {}
    for metric, by_label in found.items():
        for label, seeds in by_label.items():
            epochs = list(next(iter(seeds.values())))
            values = np.array([list(by_epoch.values()) for by_epoch in seeds.values()])
            curves.setdefault(metric, {})[label] = Curve(list(seeds), epochs, values, step=steps[metric])
    return curves


def plot(sweep: Sweep, metric: str, by_label: dict[str, Curve], out: Path) -> None:
    """Plot, left, the mean over the seeds in the course of training, and, right, the last values, a mark a seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, max(4.5, 0.42 * len(by_label) + 1.5)))
    unit, _ = _unit_and_digits(metric, by_label)
    for i, (label, curve) in enumerate(by_label.items()):
        style = line_style(i)
        left.plot(curve.epochs, curve.values.mean(0), label=label, **style)
        last = curve.values[:, -1]
        right.plot(last, np.full(len(last), i), linestyle='', marker=style['marker'], color=style['color'], alpha=0.6)
        right.plot([last.mean()] * 2, [i - 0.3, i + 0.3], color='black')
    left.set(xlabel=_step(by_label), ylabel=f'{metric}{unit}, mean over the seeds')
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)
    right.set(
        xlabel=f'{metric}{unit} after the last {_step(by_label)}',
        yticks=range(len(by_label)),
        yticklabels=list(by_label),
    )
    right.invert_yaxis()
    right.locator_params(axis='x', nbins=6)  # room for four digits each
    counts = sorted({len(curve.seeds) for curve in by_label.values()})
    save(
        figure,
        out,
        f'{sweep.name}: {metric}. Left: mean over {" or ".join(map(str, counts))} seeds after '
        f'each validation. Right: after the last {_step(by_label)}, a mark for each seed and a line at their mean.',
    )
