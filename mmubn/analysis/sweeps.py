"""Sweep files: which runs a comparison consists of, read from YAML and checked before the first of them starts.

    sweeps:
      NAME:
        configs: [mmubn::...py]       what is run, once for each choice of options; or the path of a config
        grid: {KEY: [VALUE, ...]}     every combination of values of --cfg-options is a choice,
        variants: {LABEL: {KEY: VALUE}}   or, instead of grid, every named set of them
        options: {KEY: VALUE}         --cfg-options of all runs
        seeds: [0, 1, 2]              every choice is run once with each; [0] where there is none
        gpus: 1                       processes of a run, on GPUs where there are any
        metrics: [top1]               what is compared: tags of the validation's scalars, or their last parts
        baseline: LABEL               which choice the others are compared with
        target: 95.0                  value of the first metric; in which epoch is it reached?
        paper: Table 7                where the paper shows it

A value may contain ``{seed}``. Only ``configs`` and one of ``grid`` and ``variants`` must be there.
"""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from mmengine.config import Config

from mmubn.cli import UsageError
from mmubn.cli.config import own_config
from mmubn.cli.overrides import override
from mmubn.openmmlab.config_checks import check_norm_arguments, check_norm_types
from mmubn.openmmlab.errors import ConfigError

__all__ = ['RUN_DONE', 'Sweep', 'SweepRun', 'read_sweeps']

RUN_DONE = 'sweep_run_done'  # a file in the folder of a run that came to its end

LIST, MAPPING = (list, 'a list that is not empty'), (dict, 'a mapping that is not empty')
KINDS = {
    'configs': LIST,
    'grid': MAPPING,
    'variants': MAPPING,
    'options': MAPPING,
    'seeds': LIST,
    'gpus': (int, 'an integer'),
    'metrics': LIST,
    'baseline': (str, 'the name of a choice'),
    'target': ((int, float), 'a number'),
    'paper': (str, 'a text'),
}


@dataclass(frozen=True)
class SweepRun:
    """One training: a config, values for its keys, and a seed."""

    sweep: str
    label: str
    seed: int
    config: str
    gpus: int
    options: dict = field(hash=False)

    def __str__(self) -> str:
        return f'{self.sweep}: {self.label}, seed {self.seed}'

    def folder(self, work_dir: Path) -> Path:
        """Return the folder of this run's logs and checkpoints."""
        return work_dir / self.sweep / re.sub(r'[^\w.=+-]+', '_', self.label) / f'seed{self.seed}'

    def load(self) -> Config:
        """Read the config of this run, whole.

        Raises:
            UsageError: The config does not exist, an option is not one of its keys, or a norm cannot be built.
        """
        file = own_config(self.config)
        if not Path(file).exists():
            raise UsageError(f'{self}: the config {self.config} does not exist.')
        cfg = copy.deepcopy(_read_config(file))
        options = {key: _with_seed(value, self.seed) for key, value in self.options.items()}
        override(cfg, options | {'randomness.seed': self.seed}, self.config, f'{self}:')
        _check_norms(cfg, self)
        return cfg


@functools.cache
def _read_config(path: str) -> Config:
    return Config.fromfile(path)


@dataclass(frozen=True)
class Sweep:
    """One comparison: its runs, and how they are compared."""

    name: str
    runs: list[SweepRun]
    labels: list[str]
    metrics: list[str]
    baseline: str | None = None
    target: float | None = None
    paper: str = ''
    grid: dict[str, list] = field(default_factory=dict)


def read_sweeps(path: Path, names: Iterable[str] = (), seeds: Iterable[int] = ()) -> list[Sweep]:
    """Read the sweeps of a file, or those of these names; with these seeds instead of the file's.

    Raises:
        UsageError: Names the file, and the line, sweep or key that is wrong. Every problem is in it.
    """
    try:
        content = yaml.safe_load(Path(own_config(str(path))).read_text())
    except OSError as error:
        raise UsageError(f'the sweep file {path} cannot be read: {error.strerror}.') from error
    except yaml.YAMLError as error:
        line = f', line {error.problem_mark.line + 1}' if getattr(error, 'problem_mark', None) else ''
        raise UsageError(f'{path}{line}: not YAML: {getattr(error, "problem", error)}.') from error
    if not isinstance(content, dict) or not isinstance(content.get('sweeps'), dict):
        raise UsageError(f'{path} must have the key "sweeps" with a name for each sweep below it.')
    for key in content:
        if key != 'sweeps' and not str(key).startswith('_'):  # _: for anchors
            raise UsageError(f'{path} has an unknown key {key!r} beside "sweeps".')
    entries = content['sweeps']
    names = list(names) or list(entries)
    sweeps, problems = [], []
    for name in names:
        try:
            sweeps.append(_read_sweep(name, entries, list(seeds)))
        except UsageError as error:
            problems.append(str(error))
    if problems:
        right = ', '.join(sweep.name for sweep in sweeps)
        hint = f'\nThese sweeps of it can be run as they are, with --sweeps: {right}.' if right else ''
        raise UsageError(f'{path}: ' + f'\n{path}: '.join(problems) + hint)
    return sweeps


def _read_sweep(name: str, entries: dict, seeds: list[int]) -> Sweep:
    if name not in entries:
        raise UsageError(f'there is no sweep {name!r}{_similar(name, entries)}.')
    entry = entries[name]
    if not isinstance(entry, dict):
        raise UsageError(f'sweep {name!r} must have keys such as configs and grid, got {entry!r}.')
    for key, value in entry.items():
        if key not in KINDS:
            raise UsageError(f'sweep {name!r} has an unknown key {key!r}{_similar(key, KINDS)}.')
        kind, expected = KINDS[key]
        if not isinstance(value, kind) or value in ([], {}):
            raise UsageError(f'sweep {name!r}: {key} must be {expected}, got {value!r}.')
    if 'configs' not in entry or ('grid' in entry) == ('variants' in entry):
        raise UsageError(f'sweep {name!r} must have configs, and either grid or variants.')
    choices = _choices(name, entry)
    runs = []
    for (label, config, options), seed in itertools.product(choices, seeds or entry.get('seeds', [0])):
        if not isinstance(seed, int) or seed < 0:
            raise UsageError(f'sweep {name!r}: seeds must be integers from 0, got {seed!r}.')
        runs.append(SweepRun(name, label, seed, config, entry.get('gpus', 1), entry.get('options', {}) | options))
    for run in {run.label: run for run in runs}.values():
        run.load()
    labels = [label for label, _, _ in choices]
    baseline = entry.get('baseline')
    if baseline is not None and baseline not in labels:
        raise UsageError(f'sweep {name!r}: baseline {baseline!r} is none of its choices: {", ".join(labels)}.')
    metrics = entry.get('metrics', ['top1', 'bbox_mAP', 'segm_mAP'])
    return Sweep(
        name, runs, labels, metrics, baseline, entry.get('target'), entry.get('paper', ''), entry.get('grid', {})
    )


def _choices(name: str, entry: dict) -> list[tuple[str, str, dict]]:
    """Return (label, config, options) of every choice. With several configs, the label names the config."""
    if 'variants' in entry:
        sets = {label: options or {} for label, options in entry['variants'].items()}
    else:
        for key, values in entry['grid'].items():
            if not isinstance(values, list):
                raise UsageError(f'sweep {name!r}: grid.{key} must be a list of values, got {values!r}.')
        combinations = [
            dict(zip(entry['grid'], values, strict=True)) for values in itertools.product(*entry['grid'].values())
        ]
        sets = {
            ', '.join(f'{key.split(".")[-1]}={value}' for key, value in options.items()): options
            for options in combinations
        }
    choices = []
    for config in entry['configs']:
        prefix = f'{Path(config).stem}, ' if len(entry['configs']) > 1 else ''
        choices += [(f'{prefix}{label}', config, options) for label, options in sets.items()]
    return choices


def _check_norms(cfg: Config, run: SweepRun) -> None:
    """Check type and arguments of every norm, before all its runs fail."""
    try:
        check_norm_types(cfg)
        check_norm_arguments(cfg)
    except ConfigError as error:
        raise UsageError(f'{run}: {error}') from error


def _similar(name: object, known: Iterable) -> str:
    close = difflib.get_close_matches(str(name), [str(each) for each in known], n=1)
    return f'; did you mean {close[0]!r}?' if close else f'; there are: {", ".join(map(str, known))}' if known else ''


def _with_seed(value: object, seed: int) -> object:
    if isinstance(value, dict):
        return {key: _with_seed(each, seed) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_seed(each, seed) for each in value]
    return value.replace('{seed}', str(seed)) if isinstance(value, str) else value
