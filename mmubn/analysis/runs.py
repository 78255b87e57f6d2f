"""Read what a run left in its work dir, as far as it can be read.

A work dir has one folder per start, named by the time, in the order of the starts; a resumed run has several:

    WORK_DIR/20260101_120000/vis_data/scalars.json      MMEngine's: a JSON object per line
    WORK_DIR/20260101_120000/feature_condensation.jsonl a :class:`~mmubn.openmmlab.hooks.layer_log.LayerLog`
    WORK_DIR/CONFIG.py                                  the config, whole
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config

from mmubn.analysis.metrics import FRACTION, unit_of
from mmubn.cli import UsageError

__all__ = [
    'LayerValues',
    'check_run',
    'distinct_runs',
    'group_runs',
    'loss_parts',
    'matching_tags',
    'metric_names',
    'over_seeds',
    'read_layer_log',
    'read_runs',
    'read_scalars',
    'series',
    'training_records',
    'training_seconds',
    'validation_records',
    'validation_unit',
]

GIVE_A_RUN = 'give the work dir of a run of tools/train.py'


def read_scalars(run: Path) -> list[dict]:
    """Read the scalars of a run, a dict per line of its logs, in the order of its starts. Report what is cut off.

    A start that resumes at an iteration, or begins anew, replaces all that an earlier one had logged from there on.

    Raises:
        UsageError: The run is no folder, or has no log, or none with a line that can be read.
    """
    pattern = f'{run}/*/vis_data/scalars.json'
    check_run(run)
    logs = sorted(run.glob('*/vis_data/scalars.json'))
    if not logs:
        if (run / 'vis_data' / 'scalars.json').exists():
            raise UsageError(f'{run} is one start of a run; give the work dir, {run.resolve().parent}.')
        depths = ('*/*', '*/*/*')
        if inner := sorted({str(log.parents[2]) for d in depths for log in run.glob(f'{d}/vis_data/scalars.json')}):
            more = f' and {len(inner) - 3} more' if len(inner) > 3 else ''
            raise UsageError(f'{run} is a folder of runs; give the runs themselves: {", ".join(inner[:3])}{more}.')
        raise UsageError(f'no log matches {pattern}; {GIVE_A_RUN}.')
    records: list[dict] = []
    for log in logs:
        lines = _read_lines(log)
        first = min((record['iter'] for record in training_records(lines)), default=math.inf)
        repeated = (i for i, record in enumerate(records) if record.get('iter', 0) >= first)
        records = records[: next(repeated, len(records))] + lines
    if not records:
        raise UsageError(f'no line of {pattern} can be read; the run has logged nothing yet.')
    return records


def check_run(run: Path) -> None:
    """Raise a UsageError unless ``run`` is a folder."""
    if not run.is_dir():
        problem = 'is a file, not a folder' if run.exists() else 'does not exist'
        raise UsageError(f'{run} {problem}; {GIVE_A_RUN}.')


def training_records(records: list[dict]) -> list[dict]:
    """Return the records of MMEngine's LoggerHook in training, whose ``step`` is the number of iterations done."""
    return [record for record in records if 'iter' in record]


def validation_records(records: list[dict]) -> list[dict]:
    """Return those after a validation, whose ``step`` is in :func:`validation_unit`; none of what other hooks log.

    An AP of -1, by which COCO says that there are no objects of a size, is no value and left out.
    """
    validations = [r for r in records if 'iter' not in r and any(_is(key, 'data_time') for key in r)]
    return [
        {key: value for key, value in record.items() if not (value == -1 and unit_of(key) == FRACTION)}
        for record in validations
    ]


def validation_unit(records: list[dict]) -> str:
    """Return what the steps of validations count: ``epoch`` or, in a run without epochs, ``iteration``."""
    training = training_records(records)
    if not training or any('epoch' in record for record in training):
        return 'epoch'
    done = 0
    for record in records:
        if 'iter' in record:
            done = record['iter']
        elif validation_records([record]) and record['step'] < done:
            return 'epoch'  # of LoggerHook.log_metric_by_epoch, which is MMEngine's default
    return 'iteration'


def metric_names(records: list[dict]) -> list[str]:
    """Return the tags of what was measured in validations."""
    tags = dict.fromkeys(k for record in validation_records(records) for k, v in record.items() if _is_number(v))
    return [tag for tag in tags if not any(_is(tag, other) for other in ('step', 'time', 'data_time'))]


def matching_tags(records: list[dict], name: str) -> list[str]:
    """Return the metrics that ``name`` means: one of that very tag, or all that end in it."""
    tags = metric_names(records)
    return [name] if name in tags else [tag for tag in tags if _is(tag, name)]


def loss_parts(records: list[dict]) -> tuple[str, ...]:
    """Return the names of what a run's loss consists of, by which one can tell whether two losses can be compared."""
    return tuple(sorted({key for record in training_records(records) for key in record if 'loss' in key}))


def series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one scalar: an exact tag (``accuracy/top1``) or its last part (``top1``).

    Where a step is there twice, its last value counts.
    """
    values = {}
    for record in records:
        for key, value in record.items():
            if _is(key, name) and _is_number(value):
                values[record['step']] = value
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _is(tag: str, name: str) -> bool:
    return name in (tag, tag.split('/')[-1])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def training_seconds(run: Path, records: list[dict], epochs: Sequence[int]) -> np.ndarray:
    r"""Compute the seconds of training until the end of each of ``epochs`` from the ``time`` that MMEngine logs.

    ``epochs`` are iterations where those are the :func:`validation_unit` of the run.

    That is the mean over the last w = ``log_processor.window_size`` iterations, loading of data included, validation
    and checkpoints not. So the seconds T until the iterations k at which it was logged are

    .. math::
        T(0) = 0, \quad T(k) = T(k - n) + n \, \mathrm{time}(k), \quad n = \max(\min(w, k), k - k')

    where k' is the one before k. This is exact where k - n was logged itself. Iterations between two windows are taken
    to be as fast as the later window's, those after the last as its own; between logged iterations T is linear. An
    epoch has as many iterations as the first logged ones of the epochs are apart; with one epoch alone, as many as were
    logged.

    Returns:
        (E,) float64; NaN, with a line that says why, where the run's logs have no times or no epochs.
    """
    training = training_records(records)
    steps, times = series(training, 'time')
    starts = {record['epoch']: record['iter'] for record in reversed(training) if 'epoch' in record}
    by_epoch = validation_unit(records) == 'epoch'
    if not steps or (by_epoch and not starts):
        print(f'{run}: its logs have no time of an iteration, or no epochs, so its seconds are not known')
        return np.full(len(epochs), np.nan)
    length = 1.0
    if by_epoch:
        first, last = min(starts), max(starts)
        length = (starts[last] - starts[first]) / (last - first) if last > first else steps[-1] / last
    window = _log_window(run)
    done, seconds = [0], [0.0]
    for step, time in zip(steps, times, strict=True):
        span = max(min(window, step), step - done[-1])
        recent = slice(-window - 1, None)  # reaches back at least to step - window
        seconds.append(np.interp(step - span, done[recent], seconds[recent]) + span * time)
        done.append(step)
    ends = np.asarray(epochs) * length
    return np.interp(ends, done, seconds) + np.maximum(ends - done[-1], 0) * times[-1]


def _log_window(run: Path) -> int:
    """Return over how many iterations MMEngine averages what it logs."""
    configs = sorted(run.glob('*/vis_data/config.py'))
    if not configs:
        print(f"{run}: no config beside its logs; times are taken to be means of 10 iterations, MMEngine's default")
        return 10
    return Config.fromfile(configs[-1], import_custom_modules=False).get('log_processor', {}).get('window_size', 10)


def group_runs(runs: Iterable[Path]) -> dict[str, list[Path]]:
    """Group runs that differ in their seed alone: ``UBN/seed0`` and ``UBN/seed1`` are of ``UBN``.

    A part ``seed3``, ``-seed3`` or ``_seed_3`` of the last two folders' names is the seed; the label is what is left of
    the last folder that has a name of its own. Where two groups would have one label, theirs is the whole path.
    """
    groups: dict[Path, list[Path]] = {}
    for run in runs:
        parts = [*run.parts[:-2], *(re.sub(r'(^|[-_.])seed[-_=]?\d+(?=[-_.]|$)', '', part) for part in run.parts[-2:])]
        groups.setdefault(Path(*filter(None, parts)), []).append(run)
    names = [path.name or path.absolute().name for path in groups]
    return {
        name if names.count(name) == 1 else str(path): each
        for name, (path, each) in zip(names, groups.items(), strict=True)
    }


def distinct_runs(runs: Iterable[Path]) -> list[Path]:
    """Return each run once, however often and by whatever path it is given; say which is there twice."""
    found: dict[Path, Path] = {}
    for run in runs:
        first = found.setdefault(run.resolve(), run)
        if first is not run:
            print(f'{run} is given twice' + (f', also as {first}' if first != run else '') + '; it counts once.')
    return list(found.values())


def read_runs(runs: Iterable[Path]) -> dict[str, dict[Path, list[dict]]]:
    """Read the scalars of each run, in groups of :func:`group_runs`.

    Raises:
        UsageError: A run cannot be read, or has logged no loss and no metric, or two that would be one group have no
            metric in common. Names all such runs.
    """
    records, problems = {}, []
    for run in distinct_runs(runs):
        try:
            records[run] = read_scalars(run)
        except UsageError as error:
            problems.append(str(error))
        else:
            if not metric_names(records[run]) and not series(training_records(records[run]), 'loss')[0]:
                problems.append(f'{run} has logged no loss and no metric yet.')
    groups = {label: {run: records[run] for run in each} for label, each in group_runs(records).items()}
    for label, members in groups.items():
        first, *others = members
        for run in others:
            own, other = metric_names(members[first]), metric_names(members[run])
            if own and other and not set(own) & set(other):
                problems.append(
                    f'{first} ({", ".join(own[:3])}) and {run} ({", ".join(other[:3])}) differ in more than the seed, '
                    f'though they are named like two seeds of {label}; rename one.'
                )
    if problems:
        raise UsageError(' '.join(problems))
    return groups


def over_seeds(curves: list[tuple[list[int], list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the T steps that the :func:`series` of all S runs have, (T,), and the values there, (S, T)."""
    tables = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    values = [[table[step] for step in steps] for table in tables]
    return np.array(steps, dtype=int), np.array(values, dtype=float)


@dataclass
class LayerValues:
    """One quantity at L layers and T steps.

    Attributes:
        layers: Names of the layers.
        settings: Those of the hook.
        steps: Iterations done, (T,).
        epochs: Whole epochs done, (T,).
        values: (T, L), NaN where a layer has no value.
    """

    layers: list[str]
    settings: dict
    steps: np.ndarray
    epochs: np.ndarray
    values: np.ndarray


def read_layer_log(run: Path, file_name: str) -> dict[str, LayerValues]:
    """Read what a hook wrote in all starts of a run, by quantity. Report and leave out lines that cannot be read.

    What a later start repeats replaces what the killed one had logged. A start with other layers than the last one, or
    a file without a readable first line, is reported and left out.

    Raises:
        UsageError: The run has no such file, or none that can be read.
    """
    check_run(run)
    paths = sorted(run.glob(f'*/{file_name}'))
    logs = []
    for path in paths:
        header, *lines = _read_lines(path) or [{}]
        if isinstance(header.get('layers'), list) and header['layers']:
            logs.append((path, header, lines))
        else:
            print(f'{path}, line 1: names no layers, so the file is left out')
    if not logs:
        problem = 'none of these files can be read:' if paths else 'no file matches'
        raise UsageError(
            f'{problem} {run}/*/{file_name}; give the work dir of a run with the hook that writes it '
            '(docs/using-ubn.md says how to add it).'
        )
    layers = logs[-1][1]['layers']
    records: dict[int, dict] = {}
    for path, header, lines in logs:
        if header['layers'] != layers:
            print(f'{path}: has other layers than {logs[-1][0]}, so it is left out; give each model its own work dir')
            continue
        lines = [line for line in lines if _is_record(line, len(layers), path)]
        first = min((line['step'] for line in lines), default=math.inf)
        records = {step: line for step, line in records.items() if step < first}
        for line in lines:
            records.setdefault(line['step'], {}).update(line)
    settings = {key: value for key, value in logs[-1][1].items() if key != 'layers'}
    quantities = dict.fromkeys(key for line in records.values() for key in line if key not in ('step', 'epoch'))
    return {name: _stack(name, layers, settings, records) for name in quantities}


def _is_record(line: dict, count: int, path: Path) -> bool:
    lists = [value for key, value in line.items() if key not in ('step', 'epoch')]
    fits = 'step' in line and 'epoch' in line and all(isinstance(v, list) and len(v) == count for v in lists)
    fits = fits and all(v is None or _is_number(v) for values in lists for v in values)
    if not fits:
        print(f'{path}: a line without step, epoch and {count} values each is left out: {str(line)[:80]}')
    return fits


def _stack(name: str, layers: list[str], settings: dict, records: dict[int, dict]) -> LayerValues:
    lines = [records[step] for step in sorted(records) if name in records[step]]
    steps, epochs = (np.array([line[key] for line in lines]) for key in ('step', 'epoch'))
    return LayerValues(layers, settings, steps, epochs, np.array([line[name] for line in lines], dtype=float))


def _read_lines(path: Path) -> list[dict]:
    """Read the JSON objects of a file, one per line, that have a step or are the first of a layer log.

    Raises:
        UsageError: The file cannot be read.
    """
    try:
        text = path.read_text(errors='replace')
    except OSError as error:
        raise UsageError(f'{path} cannot be read: {error.strerror}.') from error
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):  # the last line of a run that was killed, or is writing it
            record = None
        if isinstance(record, dict) and not record.keys().isdisjoint(('step', 'layers')) and _counts(record):
            records.append(record)
        else:
            print(f'{path}, line {number}: cut off, or without a step; left out')
    return records


def _counts(record: dict) -> bool:
    """Tell whether what counts in a record is whole numbers."""
    return all(isinstance(record.get(key, 0), int) for key in ('step', 'iter', 'epoch'))
