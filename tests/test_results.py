"""docs/results.md: its tables are what its raw data say, and its raw data are whole."""

import csv
from pathlib import Path

import numpy as np
import pytest

from mmubn.analysis import comparison
from mmubn.analysis.sweeps import read_sweeps

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'docs' / 'results'
NAMES = sorted(path.stem for path in FOLDER.glob('*.csv'))


@pytest.fixture(scope='module')
def sweeps():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {sweep.name: sweep for sweep in read_sweeps(ROOT / 'configs' / 'sweeps' / 'digits.yml')}


def read(name, folder=FOLDER):
    """{metric: {choice: {seed: {epoch: value}}}}"""
    values = {}
    for row in csv.DictReader((folder / f'{name}.csv').open()):
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


def curves(name, epochs=None, folder=FOLDER):
    return {
        metric: {
            label: comparison.Curve(
                list(seeds),
                sorted(seeds[0])[:epochs],
                np.array([list(values.values())[:epochs] for values in seeds.values()]),
            )
            for label, seeds in by_label.items()
        }
        for metric, by_label in read(name, folder).items()
    }


@pytest.mark.parametrize('name', NAMES)
def test_the_tables_are_those_of_the_raw_data(name, sweeps):
    summary = comparison.summarize(sweeps[name], curves(name))
    text = (ROOT / 'docs' / 'results.md').read_text()
    for line in summary.splitlines():
        if line.startswith('|'):
            assert f'{line}\n' in text


def test_the_head_start_is_that_of_the_raw_data():
    """Differences from BN after 2 epochs, as the summary says them."""
    after_2_epochs = curves('norms', epochs=2)['top1']
    text = ' '.join((ROOT / 'docs' / 'results.md').read_text().split())
    mean, low, high = comparison.difference(after_2_epochs['UBN'], after_2_epochs['BN'])
    assert f'After 2 epochs it is {mean:.1f} points above BN (95% interval {low:.1f} to {high:.1f})' in text
    mean, low, high = comparison.difference(after_2_epochs['BNET'], after_2_epochs['BN'])
    assert f'depthwise convolution ({mean:.1f} points, {low:.1f} to {high:.1f})' in text


SERIES = {'norms': ('top1', 2), 'detection-from-scratch': ('bbox_mAP', 3), 'detection-handed-over': ('bbox_mAP', 3)}


def test_both_series_are_those_of_the_raw_data():
    """The same runs by torch's operators and by the C++ kernels: what they conclude, and how far apart they are."""
    text = (ROOT / 'docs' / 'results.md').read_text()
    apart = {}
    for name, (metric, digits) in SERIES.items():
        both = [curves(name, folder=folder)[metric] for folder in (FOLDER / 'torch-operators', FOLDER)]
        for label in both[0].keys() - {'BN', 'IN', 'GN'}:
            cells = [comparison.compared(series[label], series['BN'], digits) for series in both]
            assert f'| `{name}`, {label} | {cells[0]} | {cells[1]} |\n' in text
            apart.setdefault(metric, []).extend(np.abs(both[0][label].values[:, -1] - both[1][label].values[:, -1]))
        for label in both[0].keys() & {'BN', 'IN', 'GN'}:
            assert np.array_equal(both[0][label].values, both[1][label].values)
    accuracy, ap = (np.mean(apart[metric]) for metric in ('top1', 'bbox_mAP'))
    assert f'by {accuracy:.2f} points of accuracy and {ap:.3f} of AP on average' in ' '.join(text.split())
