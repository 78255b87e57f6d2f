"""mmubn.analysis.comparison: differences between runs. tests/tools/test_compare_norms.py has its tables and plots."""

import numpy as np
import pytest
from run_logs import training, validation, write_log
from scipy import stats

from mmubn.analysis.comparison import Curve, compared, difference, differences, read_curves, summarize
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
    # Only seeds that both have are compared.
    shifted = Curve([2, 3, 4, 5], [1, 2], b.values)
    d = b.values[:2, 1] - a.values[2:, 1]
    assert difference(shifted, a)[0] == pytest.approx(d.mean())
    assert difference(Curve([9], [1], b.values[:1, :1]), a) is None


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
