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


def words(values, digits=1):
    return [f'{value:.{digits}f}' for value in values]


def test_what_is_seen_is_in_the_raw_data():
    """Each sentence of the first section that has a number or a verdict."""
    text = ' '.join((ROOT / 'docs' / 'results.md').read_text().split())

    def compare(name, metric, label, epoch=None, baseline='BN', of=None):
        one, other = curves(name)[metric][label], (of or curves(name)[metric])[baseline]
        return comparison.difference(*(each.until(epoch or each.epochs[-1]) for each in (one, other)))

    equal, unknown = ('UBN', 'RBN', 'IEBN'), ('BNET', 'UnitizedBN')
    for label in (*equal, *unknown):
        _, low, high = compare('norms', 'top1', label)
        assert (low > -1 and high < 1) is (label in equal)
        assert low < 0 < high
        interval = f'{low:+.2f} to {high:+.2f}'
        assert (f'{label} {interval}' if label in equal else f'{label} ({interval})') in text
    assert all(compare('norms', 'top1', label)[2] < 0 for label in ('GN', 'IN'))

    early = [compare('norms', 'top1', 'UBN', epoch) for epoch in range(1, 11)]
    assert [low > 0 for _, low, _ in early] == [True] * 3 + [False] * 7
    assert all(high > 0 for _, _, high in early)
    means = words(mean for mean, _, _ in early[:3])
    assert f'after epochs 1 to 3, by {means[0]}, {means[1]} and {means[2]} points' in text
    early = [compare('norms', 'top1', 'BNET', epoch)[1] > 0 for epoch in range(1, 11)]
    assert early == [True] * 2 + [False] * 8

    mean, low, high = words(compare('components', 'top1', 'BN + affine rectification'))
    assert f'BN with the affine rectification is {mean} points higher than BN ({low} to {high})' in text
    normalization = [compare('components', 'top1', 'BN + normalization rectification', epoch) for epoch in range(1, 5)]
    assert [high < 0 for _, _, high in normalization] == [False, True, True, False]
    thresholds = [compare('threshold', 'top1', 'threshold=0.5', e, 'threshold=None') for e in range(1, 5)]
    assert [high < 0 for _, _, high in thresholds] == [False, False, True, False]

    for name, above in (('detection-from-scratch', 'above'), ('detection-handed-over', 'below')):
        mean, low, high = (100 * value for value in compare(name, 'bbox_mAP', 'UBN, gate'))
        interval = f'from {low:+.1f} to {high:+.1f}'
        assert f"{abs(mean):.1f} points {above} BN's, in an interval {interval}" in text or (
            f'it is {abs(mean):.1f} {above}, {interval}' in text
        )
        metrics = curves(name)
        last = [compare(name, metric, label) for metric in metrics for label in metrics[metric] if label != 'BN']
        assert all(low < 0 < high for _, low, high in last)
    mean, low, high = (100 * value for value in compare('detection-handed-over', 'bbox_mAP', 'UBN, gate', 2))
    assert f'UBN is {-mean:.1f} points *below* BN ({low:.1f} to {high:.1f})' in text
    scratch = curves('detection-from-scratch')['bbox_mAP']
    worth = {
        label: [100 * v for v in compare('detection-handed-over', 'bbox_mAP', label, baseline=label, of=scratch)]
        for label in ('BN', 'BNET', 'UBN, gate')
    }
    mean, low, high = words(worth['BN'])
    assert f'handed over is worth {mean} points of box AP ({low} to {high})' in text
    assert f'for BNET ({worth["BNET"][0]:.1f}) and UBN ({worth["UBN, gate"][0]:.1f}) the interval includes 0' in text
    assert worth['BNET'][1] < 0 > worth['UBN, gate'][1]


SERIES = {'norms': ('top1', 2), 'detection-from-scratch': ('bbox_mAP', 3), 'detection-handed-over': ('bbox_mAP', 3)}


def test_both_series_are_those_of_the_raw_data():
    """The same runs by torch's operators and by the C++ kernels: what they conclude, and how far apart they are."""
    text = (ROOT / 'docs' / 'results.md').read_text()
    for name, (metric, digits) in SERIES.items():
        both = [curves(name, folder=folder)[metric] for folder in (FOLDER / 'torch-operators', FOLDER)]
        for label in both[0].keys() - {'BN', 'IN', 'GN'}:
            cells = [comparison.compared(series[label], series['BN'], digits) for series in both]
            assert f'| `{name}`, {label} | {cells[0]} | {cells[1]} |\n' in text
        for label in both[0].keys() & {'BN', 'IN', 'GN'}:
            assert np.array_equal(both[0][label].values, both[1][label].values)


def moved_by_rounding():
    """A row for each sweep: how far its runs moved, those that moved at all."""
    for name in NAMES:
        for metric, series in curves(name, folder=FOLDER / 'torch-operators').items():
            apart = [np.abs(curve.values - curves(name)[metric][label].values) for label, curve in series.items()]
            apart = (1 if metric == 'top1' else 100) * np.concatenate([each for each in apart if each.any()])
            moved = apart.any(axis=1).sum()
            yield f'| `{name}`, {metric} | {moved} | {apart[:, -1].mean():.2f} | {apart.max():.1f} |'


def test_how_far_rounding_moves_each_sweep():
    text = (ROOT / 'docs' / 'results.md').read_text()
    for row in moved_by_rounding():
        assert f'{row}\n' in text
