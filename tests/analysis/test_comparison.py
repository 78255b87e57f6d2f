"""mmubn.analysis.comparison: differences between runs. tests/tools/test_compare_norms.py has its tables and plots."""

import numpy as np
import pytest
from run_logs import training, validation, write_log
from scipy import stats

from mmubn.analysis.comparison import (
    Curve,
    compared,
    difference,
    differences,
    read_curves,
    read_table,
    summarize,
    write_tables,
)
from mmubn.analysis.sweeps import RUN_DONE, Sweep, SweepRun
from mmubn.cli import UsageError


def test_the_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = (
        Curve([0, 1, 2, 3], [1, 2], np.stack([rng.normal(size=4), rng.normal(size=4) + shift], 1)) for shift in (0, 1)
    )
    mean, low, high = difference(b, a)
    d = b.values[:, 1] - a.values[:, 1]
    half = stats.t.ppf(0.975, 3) * d.std(ddof=1) / 2
    np.testing.assert_allclose((mean, low, high), (d.mean(), d.mean() - half, d.mean() + half))
    # And that of SciPy's.
    interval = stats.ttest_rel(b.values[:, 1], a.values[:, 1]).confidence_interval(0.95)
    np.testing.assert_allclose((low, high), interval)
    # Only seeds that both have are compared.
    shifted = Curve([2, 3, 4, 5], [1, 2], b.values)
    d = b.values[:2, 1] - a.values[2:, 1]
    assert difference(shifted, a)[0] == pytest.approx(d.mean())
    assert difference(Curve([9], [1], b.values[:1, :1]), a) is None


def test_several_intervals_hold_at_once():
    """By Bonferroni's inequality: each of m misses the truth in 5% / m."""
    a, b = (Curve([0, 1, 2], [1], np.array(values)) for values in ([[1.0], [5.0], [2.0]], [[2.0], [7.0], [8.0]]))
    for m in (1, 2, 7):
        half = stats.t.ppf(1 - 0.05 / (2 * m), 2) * 7**0.5 / 3**0.5  # 1, 2 and 6 have a variance of 7
        np.testing.assert_allclose(difference(b, a, m), (3, 3 - half, 3 + half))


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


def compared_in_table(**choices):
    """The columns of differences in the first table of a sweep, its header first; a choice is a row a seed."""
    by_label = {}
    for label, values in choices.items():
        seeds = values if isinstance(values, dict) else dict(enumerate(values))
        by_label[label] = Curve(list(seeds), [1, 2], np.array([[0.0, value] for value in seeds.values()]))
    sweep = Sweep('s', [], list(by_label), ['top1'], baseline='BN')
    header, _, *lines = summarize(sweep, {'top1': by_label}).splitlines()[2 : 4 + len(by_label)]
    return [cells(line)[6:] for line in (header, *lines)]


ALONE, ALL = 'difference from BN, 95% interval', 'interval of all {} at once'


def test_one_comparison_has_one_column():
    half = stats.t.ppf(0.975, 1) / 2  # of differences of 1 and 2
    assert compared_in_table(BN=[1.0, 2.0], UBN=[2.0, 4.0]) == [
        [ALONE],
        [''],
        [f'+1.50 [{1.5 - half:+.2f}, {1.5 + half:+.2f}]: not told apart'],
    ]


def test_the_verdict_is_by_the_interval_that_holds_for_the_whole_table():
    """Of three choices, of which one is identical to the baseline: two comparisons."""
    found = compared_in_table(BN=[1.0, 2.0, 3.0], RBN=[1.0, 2.0, 3.0], BNET=[6.0, 8.0, 7.9], UBN=[0.0, 0.0, 0.0])
    halves = [
        [stats.t.ppf(1 - 0.025 / m, 2) * np.std(d, ddof=1) / 3**0.5 for m in (1, 2)]
        for d in ([5.0, 6.0, 4.9], [1.0, 2.0, 3.0])
    ]
    mean = 15.9 / 3
    assert found == [
        [ALONE, ALL.format(2)],
        ['', ''],
        ['identical', ''],
        [
            f'+5.30 [{mean - halves[0][0]:+.2f}, {mean + halves[0][0]:+.2f}]',
            f'[{mean - halves[0][1]:+.2f}, {mean + halves[0][1]:+.2f}]: higher',
        ],
        [
            f'-2.00 [{-2 - halves[1][0]:+.2f}, {-2 + halves[1][0]:+.2f}]',
            f'[{-2 - halves[1][1]:+.2f}, {-2 + halves[1][1]:+.2f}]: not told apart',
        ],
    ]
    # Differences of 1.0, 1.1 and 1.9 are told apart from 0 alone, and no longer as one of two.
    one, other = (
        compared_in_table(BN=[0.0, 0.0, 0.0], UBN=[1.0, 1.1, 1.9], **more)[2]
        for more in ({}, {'RBN': [1.0, -1.0, 0.0]})
    )
    assert one[-1].endswith(': higher')
    assert other[0] == one[0].partition(':')[0]
    assert other[1].endswith(': not told apart')


def test_choices_without_an_interval_are_not_counted():
    # IN has one seed in common with BN, GN none: half done.
    found = compared_in_table(BN=[1.0, 2.0], UBN=[2.0, 4.0], IN={1: 5.0, 2: 5.0}, GN={7: 5.0, 8: 6.0})
    assert found[0] == [ALONE]
    assert found[3:] == [[''], ['']]
    # One seed each: no interval at all.
    assert compared_in_table(BN=[1.0], UBN=[2.0], RBN=[3.0]) == [[ALONE], [''], [''], ['']]
    # Identical as far as both are done.
    assert compared_in_table(BN=[1.0, 2.0, 3.0], UBN=[1.0, 2.0]) == [[ALONE], [''], ['identical']]


def test_runs_that_are_the_same_have_no_interval():
    values = np.array([[1.0, 5.0], [2.0, 7.0]])
    baseline = Curve([0, 1], [1, 2], values)
    assert compared(Curve([0, 1], [1, 2], values.copy()), baseline, 2) == 'identical'
    # The same at the end, but not on the way: runs of their own, that is.
    assert compared(Curve([0, 1], [1, 2], values - [1, 0]), baseline, 2) == '+0.00 [+0.00, +0.00]: not told apart'
    assert compared(Curve([2, 3], [1, 2], values), baseline, 2) == ''


def test_differences_are_of_every_epoch():
    baseline = Curve([0, 1], [1, 2], np.array([[1.0, 5.0], [2.0, 7.0]]))
    other = Curve([0, 1], [1, 2], np.array([[1.0, 6.0], [2.0, 9.0]]))
    header, _, row = differences('top1', {'BN': baseline, 'UBN': other}, 'BN')
    assert header.split('|')[2:-1] == [' 1 ', ' 2 ']
    half = stats.t.ppf(0.975, 1) * np.std([1, 2], ddof=1) / 2**0.5
    assert row == f'| UBN | identical | +1.5 [{1.5 - half:+.1f}, {1.5 + half:+.1f}] |'


def sweep_of(tmp_path, metric, *tags_and_values):
    """A sweep of one run for each, done."""
    runs = []
    for i, (tag, value) in enumerate(tags_and_values):
        runs.append(SweepRun('s', f'choice{i}', 0, 'config.py', 1, {}))
        folder = runs[-1].folder(tmp_path)
        write_log(folder, [training(10, 1), validation(1, value, tag)])
        (folder / RUN_DONE).touch()
    return Sweep('s', runs, [run.label for run in runs], [metric])


@pytest.mark.parametrize(
    ('tag', 'value', 'cells'),
    [
        (
            'accuracy/top1',
            0.75,
            '| top1, mean (%) | standard deviation | lowest to highest |\n|---|---|---|---|---|---|\n'
            '| choice0 | 1 | 1 | 0.75 |',
        ),
        (
            'coco/bbox_mAP',
            0.75,
            '| bbox_mAP, mean | standard deviation | lowest to highest |\n|---|---|---|---|---|---|\n'
            '| choice0 | 1 | 1 | 0.750 |',
        ),
    ],
)
def test_the_unit_is_that_of_the_metric(tmp_path, tag, value, cells):
    sweep = sweep_of(tmp_path, tag.split('/')[-1], (tag, value))
    assert cells in summarize(sweep, read_curves(sweep, tmp_path))


def test_metrics_of_one_name_are_not_compared(tmp_path):
    sweep = sweep_of(tmp_path, 'mAP', ('pascal_voc/mAP', 0.5), ('multi-label/mAP', 50.0))
    with pytest.raises(
        UsageError, match=r'mAP is not one and the same .*: multi-label/mAP by epoch, pascal_voc/mAP by'
    ):
        read_curves(sweep, tmp_path)


def values_of(curves):
    return {
        (metric, label): (curve.seeds, curve.epochs, curve.values.tolist(), curve.step)
        for metric, by_label in curves.items()
        for label, curve in by_label.items()
    }


def test_a_table_that_was_written_is_read_back(tmp_path):
    """To the last bit, of several metrics, choices with other seeds, and runs by epochs and by iterations."""
    rng = np.random.default_rng(0)
    labels = {'BN': [0, 1], 'UBN, kernel "3x3"': [2, 0, 5]}
    curves = {
        metric: {
            label: Curve(seeds, steps, rng.normal(size=(len(seeds), 3)) / 3, step=step)
            for label, seeds in labels.items()
        }
        for metric, steps, step in (
            ('test/accuracy/top1', [1, 2, 3], 'epoch'),
            ('bbox_mAP', [1, 2, 3], 'epoch'),
            ('mIoU', [500, 1000, 1250], 'iteration'),
        )
    }
    sweep = Sweep('s', [], list(labels), list(curves))
    for metrics, column in ((list(curves)[:2], 'metric,epoch,value'), (['mIoU'], 'metric,iteration,value')):
        some = {metric: curves[metric] for metric in metrics}
        write_tables(sweep, some, tmp_path)
        assert column in (tmp_path / 'runs.csv').read_text()
        assert values_of(read_table(tmp_path / 'runs.csv')) == values_of(some)
        # The page of results is written from what was read.
        for metric, by_label in read_table(tmp_path / 'runs.csv').items():
            assert f'|  | seeds | {by_label["BN"].step}s | {metric}' in summarize(sweep, {metric: by_label})
    write_tables(sweep, curves, tmp_path)
    assert values_of(read_table(tmp_path / 'runs.csv')) == values_of(curves)


def test_a_metric_of_its_whole_tag(tmp_path):
    """Of two that end alike, one can be named; it is in percent, as what it ends in."""
    run = SweepRun('s', 'UBN', 0, 'config.py', 1, {})
    folder = run.folder(tmp_path)
    one = validation(1, 97.5, 'test/accuracy/top1') | {'val/accuracy/top1': 96.25}
    write_log(folder, [training(10, 1), one])
    (folder / RUN_DONE).touch()
    sweep = Sweep('s', [run], ['UBN'], ['test/accuracy/top1'])
    curves = read_curves(sweep, tmp_path)
    write_tables(sweep, curves, tmp_path)
    for each in (curves, read_table(tmp_path / 'runs.csv')):
        assert list(each) == ['test/accuracy/top1']
        text = summarize(sweep, each)
        assert '| test/accuracy/top1, mean (%) |' in text
        assert '| UBN | 1 | 1 | 97.50 |' in text
    sweep = Sweep('s', [run], ['UBN'], ['top1'])
    with pytest.raises(UsageError, match=r'write the whole name of one under metrics'):
        read_curves(sweep, tmp_path)
