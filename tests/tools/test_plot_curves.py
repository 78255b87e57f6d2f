"""tools/analysis_tools/plot_curves.py."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from cli import call
from PIL import Image
from run_logs import training, validation, write_log

from mmubn.analysis import plots


@pytest.fixture
def plot(tmp_path, monkeypatch, capsys):
    """Call the tool; returns its status, its figure, the caption and what it printed."""
    saved = []

    def keep(figure, out, caption, save=plots.save):
        saved.append((figure, caption))
        return save(figure, out, caption)

    def run(*arguments):
        saved.clear()
        status = call(monkeypatch, 'analysis_tools/plot_curves.py', *arguments, '--out', tmp_path / 'curves.png')
        figure, caption = saved[0] if saved else (None, None)
        return status, figure, caption, capsys.readouterr()

    monkeypatch.setattr(plots, 'save', keep)
    return run


def write_run(run, losses, accuracies):
    """A run that logs a loss every 10 iterations, once an epoch."""
    records = []
    for epoch, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), 1):
        records += [training(10 * epoch, epoch, loss=loss), validation(epoch, accuracy)]
    return write_log(run, records)


def points(line):
    return [list(line.get_xdata()), list(line.get_ydata())]


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_a_run_of_mmdetection(trained, plot, tmp_path):
    """Two epochs of four iterations, validated at their end, as MMEngine logged them."""
    status, figure, caption, output = plot(trained)
    assert status == 0
    left, right = figure.axes
    records = [json.loads(line) for line in next(trained.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    losses = [record['loss'] for record in records if 'iter' in record]
    assert points(left.lines[0]) == [list(range(1, 9)), losses]
    assert [points(line) for line in right.lines] == [
        [[2], [records[-1]['coco/bbox_mAP']]],
        [[2], [records[-1]['coco/segm_mAP']]],
    ]
    assert right.get_ylabel().endswith('(from 0 to 1)')
    assert 'bbox_mAP, segm_mAP' in caption
    assert 'wrote' in output.out
    pixels = np.asarray(Image.open(tmp_path / 'curves.png').convert('RGB'))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, 'an empty page has few colours'
    assert (tmp_path / 'curves.svg').exists()


def test_runs_of_several_seeds_are_a_mean_and_a_band_of_one_standard_deviation(plot, tmp_path):
    """Losses 1 and 3, accuracies 50 and 60: means 2 and 55, standard deviations sqrt(2) and sqrt(50)."""
    write_run(tmp_path / 'bn' / 'seed0', [1.0, 1.0], [50.0, 50.0])
    write_run(tmp_path / 'bn' / 'seed1', [3.0, 3.0], [60.0, 60.0])
    write_run(tmp_path / 'ubn' / 'seed0', [2.0, 1.0], [40.0, 70.0])
    runs = [tmp_path / 'bn' / 'seed0', tmp_path / 'bn' / 'seed1', tmp_path / 'ubn' / 'seed0']
    status, figure, caption, _ = plot(*runs, '--metrics', 'top1')
    assert status == 0
    left, right = figure.axes
    assert [points(line) for line in left.lines] == [[[10, 20], [2.0, 2.0]], [[10, 20], [2.0, 1.0]]]
    assert [points(line) for line in right.lines] == [[[1, 2], [55.0, 55.0]], [[1, 2], [40.0, 70.0]]]
    for axis, mean, deviation in ((left, 2, 2**0.5), (right, 55, 50**0.5)):
        (band,) = axis.collections
        heights = band.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose([heights.min(), heights.max()], [mean - deviation, mean + deviation])
    assert labels(left) == ['bn loss, 2 seeds', 'ubn loss']
    assert labels(right) == ['bn top1, 2 seeds', 'ubn top1']
    assert caption.startswith('bn, ubn. Left: training loss')
    assert 'bands one standard deviation' in caption
    assert (left.get_xlabel(), right.get_xlabel()) == ('iteration', 'epoch')
    assert right.get_ylabel() == 'top1 on the validation data (%)'


def test_lines_stay_apart_in_black_and_white_and_a_run_looks_the_same_left_and_right(plot, tmp_path):
    for run in ('bn', 'gn', 'ubn'):
        write_run(tmp_path / run, [2.0, 1.0], [50.0, 60.0])
    _, figure, _, _ = plot(*(tmp_path / run for run in ('bn', 'gn', 'ubn')))
    looks = [[(line.get_linestyle(), line.get_marker()) for line in axis.lines] for axis in figure.axes]
    assert len(set(looks[0])) == 3
    assert looks[0] == looks[1]


def test_a_seed_that_was_interrupted_ends_the_mean_and_the_caption_says_so(plot, tmp_path):
    write_run(tmp_path / 'bn-seed0', [3.0, 2.0, 1.0], [50.0, 60.0, 70.0])
    write_run(tmp_path / 'bn-seed1', [5.0], [70.0])
    _, figure, caption, _ = plot(tmp_path / 'bn-seed0', tmp_path / 'bn-seed1')
    left, right = figure.axes
    assert points(left.lines[0]) == [[10], [4.0]]
    assert points(right.lines[0]) == [[1], [60.0]]
    assert 'bn loss: 1 of 3 points, those that all seeds have.' in caption
    assert 'bn top1: 1 of 3 points, those that all seeds have.' in caption


def test_a_run_that_has_not_validated_yet_is_named_in_the_caption(plot, tmp_path):
    write_run(tmp_path / 'bn', [3.0], [50.0])
    write_log(tmp_path / 'ubn', [training(10, 1)])
    status, figure, caption, _ = plot(tmp_path / 'bn', tmp_path / 'ubn')
    assert status == 0
    assert [len(axis.lines) for axis in figure.axes] == [2, 1]
    assert 'ubn top1: nothing logged.' in caption


def test_a_cut_off_line_is_reported_and_the_rest_shown(plot, tmp_path):
    log = write_run(tmp_path / 'bn', [3.0, 2.0], [50.0, 60.0])
    log.write_text(log.read_text()[:-20])
    status, figure, _, output = plot(tmp_path / 'bn')
    assert status == 0
    assert f'{log}, line 4: cut off' in output.out
    assert points(figure.axes[0].lines[0]) == [[10, 20], [3.0, 2.0]]
    assert points(figure.axes[1].lines[0]) == [[1], [50.0]]


def test_a_run_without_logs_is_reported_in_one_line_after_the_others_were_plotted(plot, tmp_path):
    write_run(tmp_path / 'bn', [3.0], [50.0])
    status, figure, _, output = plot(tmp_path / 'none', tmp_path / 'bn')
    assert status == 2
    assert labels(figure.axes[0]) == ['bn loss']
    assert (tmp_path / 'curves.png').exists()
    assert output.err.count('\n') == 1
    assert output.err.startswith('error: no log ')
    assert f' of {tmp_path}/none;' in output.err


def test_no_run_with_logs_writes_nothing(plot, tmp_path):
    status, _, _, output = plot(tmp_path / 'none')
    assert status == 2
    assert f' of {tmp_path}/none;' in output.err
    assert not any(tmp_path.iterdir())


def test_metrics_that_no_run_has_are_reported_with_those_that_are_there(plot, tmp_path):
    write_run(tmp_path / 'bn', [3.0], [50.0])
    status, figure, _, output = plot(tmp_path / 'bn', '--metrics', 'top2', 'loss')
    assert status == 2
    assert output.err == 'error: no validation metric top2 or loss is in the logs; there are: accuracy/top1.\n'
    assert [len(axis.lines) for axis in figure.axes] == [1, 0]


def test_a_band_that_reaches_down_to_almost_0_leaves_the_axis_to_the_curves(plot, tmp_path):
    """The last mean is 0.0293, its deviation 0.02927: the band ends at 0.00003."""
    write_run(tmp_path / 'bn-seed0', [2.0, 0.05], [50.0, 60.0])
    write_run(tmp_path / 'bn-seed1', [2.0, 0.0086], [50.0, 60.0])
    _, figure, _, _ = plot(tmp_path / 'bn-seed0', tmp_path / 'bn-seed1')
    assert figure.axes[0].get_ylim()[0] == pytest.approx(0.0293 / 2)


def test_a_loss_that_is_not_finite_leaves_the_rest_of_the_curve(plot, tmp_path):
    write_run(tmp_path / 'bn', [4.0, float('nan'), 2.0, 0.0, float('inf')], [50.0] * 5)
    status, figure, _, _ = plot(tmp_path / 'bn')
    assert status == 0
    assert [y for y in figure.axes[0].lines[0].get_ydata() if 0 < y < 9] == [4.0, 2.0]
    assert 1 <= figure.axes[0].get_ylim()[0] <= 2
    assert not plt.get_fignums()
