"""docs/results.md: its tables are what its raw data say, and its raw data are whole."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from mmubn.sweeps import read_sweeps

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'docs' / 'results'
NAMES = sorted(path.stem for path in FOLDER.glob('*.csv'))


@pytest.fixture(scope='module')
def compare_norms():
    path = ROOT / 'tools' / 'analysis_tools' / 'compare_norms.py'
    spec = importlib.util.spec_from_file_location('compare_norms', path)
    module = sys.modules['compare_norms'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules['compare_norms']


@pytest.fixture(scope='module')
def sweeps():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {sweep.name: sweep for sweep in read_sweeps(ROOT / 'configs' / 'sweeps' / 'digits.yml')}


def read(name):
    """{metric: {choice: {seed: {epoch: value}}}}"""
    values = {}
    for row in csv.DictReader((FOLDER / f'{name}.csv').open()):
        seeds = values.setdefault(row['metric'], {}).setdefault(row['choice'], {})
        seeds.setdefault(int(row['seed']), {})[int(row['epoch'])] = float(row['value'])
    return values


def test_every_sweep_of_the_digits_is_there(sweeps):
    assert sorted(sweeps) == NAMES


@pytest.mark.parametrize('name', NAMES)
def test_no_run_is_left_out(name, sweeps):
    expected = {(run.label, run.seed) for run in sweeps[name].runs}
    for metric in sweeps[name].metrics:
        values = read(name)[metric]
        assert {(label, seed) for label, seeds in values.items() for seed in seeds} == expected


def curves(name, compare_norms, epochs=None):
    return {
        metric: {
            label: compare_norms.Curve(
                list(seeds),
                sorted(seeds[0])[:epochs],
                np.array([list(values.values())[:epochs] for values in seeds.values()]),
            )
            for label, seeds in by_label.items()
        }
        for metric, by_label in read(name).items()
    }


@pytest.mark.parametrize('name', NAMES)
def test_the_tables_are_those_of_the_raw_data(name, sweeps, compare_norms):
    summary = compare_norms.summarize(sweeps[name], curves(name, compare_norms))
    text = (ROOT / 'docs' / 'results.md').read_text()
    for line in summary.splitlines():
        if line.startswith('|'):
            assert f'{line}\n' in text


def test_the_head_start_is_that_of_the_raw_data(compare_norms):
    """Differences from BN after 2 epochs, as the summary says them."""
    after_2_epochs = curves('norms', compare_norms, epochs=2)['top1']
    text = ' '.join((ROOT / 'docs' / 'results.md').read_text().split())
    mean, low, high = compare_norms.difference(after_2_epochs['UBN'], after_2_epochs['BN'])
    assert f'After 2 epochs it is {mean:.1f} points above BN (95% interval {low:.1f} to {high:.1f})' in text
    mean, low, high = compare_norms.difference(after_2_epochs['BNET'], after_2_epochs['BN'])
    assert f'depthwise convolution ({mean:.1f} points, {low:.1f} to {high:.1f})' in text
