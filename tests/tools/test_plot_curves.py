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
    left, box, mask = figure.axes
    records = [json.loads(line) for line in next(trained.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    losses = [record['loss'] for record in records if 'iter' in record]
    assert points(left.lines[0]) == [list(range(1, 9)), losses]
    for axis, name in ((box, 'bbox_mAP'), (mask, 'segm_mAP')):
        assert [points(line) for line in axis.lines] == [[[2], [records[-1][f'coco/{name}']]]]
        assert axis.get_ylabel() == f'{name} (from 0 to 1)'
    assert 'bbox_mAP (from 0 to 1), segm_mAP (from 0 to 1) on the validation data' in caption
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
    assert labels(left) == labels(right) == ['bn, 2 seeds', 'ubn']
    assert caption.startswith('bn, ubn. Training loss: each point')
    assert 'bands one standard deviation' in caption
    assert (left.get_xlabel(), right.get_xlabel()) == ('iteration', 'epoch')
    assert right.get_ylabel() == 'top1 (%)'


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
    assert 'bn training loss: 1 of 3 points, those that all seeds have.' in caption
    assert 'bn top1: 1 of 3 points, those that all seeds have.' in caption


def test_a_run_that_has_not_validated_yet_is_named_in_the_caption(plot, tmp_path):
    write_run(tmp_path / 'bn', [3.0], [50.0])
    write_log(tmp_path / 'ubn', [training(10, 1)])
    status, figure, caption, _ = plot(tmp_path / 'bn', tmp_path / 'ubn')
    assert status == 0
    assert [len(axis.lines) for axis in figure.axes] == [2, 1]
    assert 'ubn: no validation yet.' in caption


def test_a_cut_off_line_is_reported_and_the_rest_shown(plot, tmp_path):
    log = write_run(tmp_path / 'bn', [3.0, 2.0], [50.0, 60.0])
    log.write_text(log.read_text()[:-20])
    status, figure, _, output = plot(tmp_path / 'bn')
    assert status == 0
    assert f'{log}, line 4: cut off' in output.out
    assert points(figure.axes[0].lines[0]) == [[10, 20], [3.0, 2.0]]
    assert points(figure.axes[1].lines[0]) == [[1], [50.0]]


def write_detector(run):
    """A run whose loss has parts, with a metric that is lower than a percent of the classifier's."""
    records = []
    for epoch, ap in enumerate((0.4, 0.85), 1):
        loss = training(10 * epoch, epoch, loss=4.0) | {'loss_cls': 1.0, 'loss_bbox': 3.0}
        records += [loss, validation(epoch, ap, 'coco/bbox_mAP') | {'coco/bbox_mAP_l': -1.0}]
    return write_log(run, records)


def test_a_classifier_and_a_detector_share_no_axis(plot, tmp_path):
    """The first epoch's accuracy is half a percent: no value tells the unit."""
    write_run(tmp_path / 'classifier', [2.0, 1.0], [0.5, 41.0])
    write_detector(tmp_path / 'detector')
    status, figure, caption, _ = plot(tmp_path / 'classifier', tmp_path / 'detector')
    assert status == 0
    shown = [(axis.get_ylabel(), labels(axis), list(axis.lines[0].get_ydata())) for axis in figure.axes]
    assert shown == [
        ('training loss', ['classifier'], [2.0, 1.0]),
        ('training loss', ['detector'], [4.0, 4.0]),
        ('bbox_mAP (from 0 to 1)', ['detector'], [0.4, 0.85]),
        ('top1 (%)', ['classifier'], [0.5, 41.0]),
    ]
    assert 'Losses on other axes have other parts and cannot be compared.' in caption


def test_an_accuracy_below_one_percent_is_percent(plot, tmp_path):
    write_run(tmp_path / 'bn', [7.0, 6.9], [0.1, 0.8])
    _, figure, _, _ = plot(tmp_path / 'bn')
    assert figure.axes[1].get_ylabel() == 'top1 (%)'


def test_epochs_and_iterations_share_no_axis(plot, tmp_path):
    write_run(tmp_path / 'epochs', [2.0, 1.0], [50.0, 60.0])
    record = {key: value for key, value in training(10, 1).items() if key != 'epoch'}
    write_log(tmp_path / 'iterations', [record, validation(10, 50.0)])
    _, figure, _, _ = plot(tmp_path / 'epochs', tmp_path / 'iterations')
    shown = [(axis.get_ylabel(), axis.get_xlabel(), labels(axis)) for axis in figure.axes[1:]]
    assert shown == [('top1 (%)', 'epoch', ['epochs']), ('top1 (%)', 'iteration', ['iterations'])]


def test_metrics_of_one_name_share_no_axis(plot, tmp_path):
    write_log(tmp_path / 'a', [training(10, 1), validation(1, 0.5, 'pascal_voc/mAP')])
    write_log(tmp_path / 'b', [training(10, 1), validation(1, 50.0, 'multi-label/mAP')])
    _, figure, _, _ = plot(tmp_path / 'a', tmp_path / 'b', '--metrics', 'mAP')
    assert [axis.get_ylabel() for axis in figure.axes[1:]] == ['mAP (from 0 to 1)', 'mAP (%)']


@pytest.mark.parametrize('wrong', ['gone', 'file', 'empty', 'broken', 'silent', '.'])
def test_a_run_that_cannot_be_read_is_named_before_anything_is_written(plot, tmp_path, wrong):
    write_run(tmp_path / 'bn', [3.0], [50.0])
    (tmp_path / 'file').touch()
    (tmp_path / 'empty').mkdir()
    write_log(tmp_path / 'broken', []).write_text('{"loss": 1.0, "st\n\x00\n')
    write_log(tmp_path / 'silent', [{'step': 1}])
    before = sorted(tmp_path.iterdir())
    status, figure, _, output = plot(tmp_path / 'bn', tmp_path / wrong)
    assert (status, figure) == (2, None)
    (line,) = output.err.splitlines()
    assert line.startswith('error: ')
    assert str(tmp_path / wrong) in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize('out', ['curves.pdf', 'file/curves.png', '.', '/proc/curves.png'])
def test_where_no_plot_can_be_written_no_log_is_read(monkeypatch, tmp_path, capsys, out):
    (tmp_path / 'file').touch()
    run = tmp_path / 'gone'
    assert call(monkeypatch, 'analysis_tools/plot_curves.py', run, '--out', tmp_path / out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ')
    assert str(tmp_path / out) in line
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_a_line_that_a_live_run_is_writing_is_left_out(plot, tmp_path):
    log = write_run(tmp_path / 'bn', [3.0, 2.0], [50.0, 60.0])
    log.write_text(log.read_text().rstrip('\n'))  # whole, but for the end of the line
    status, figure, _, output = plot(tmp_path / 'bn')
    assert status == 0
    assert points(figure.axes[1].lines[0]) == [[1, 2], [50.0, 60.0]]
    assert 'cut off' not in output.out


def test_metrics_that_no_run_has_are_reported_with_those_that_are_there(plot, tmp_path):
    write_run(tmp_path / 'bn', [3.0], [50.0])
    status, figure, _, output = plot(tmp_path / 'bn', '--metrics', 'top1', 'top2', 'loss')
    assert (status, figure) == (2, None)
    assert output.err == 'error: no validation metric top2 or loss is in the logs; there are: accuracy/top1.\n'


def test_metrics_of_ones_own_are_asked_for(plot, tmp_path):
    write_log(tmp_path / 'own', [training(10, 1), validation(1, 3.5, 'own/score')])
    status, _, _, output = plot(tmp_path / 'own')
    assert status == 2
    assert 'there are: own/score; choose with --metrics.' in output.err
    _, figure, _, _ = plot(tmp_path / 'own', '--metrics', 'score')
    assert figure.axes[1].get_ylabel() == 'score'


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
