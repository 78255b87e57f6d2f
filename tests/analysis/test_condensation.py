"""mmubn.analysis.condensation: the numbers behind its lines and colours, by hand."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import Normalize
from run_logs import LAYERS, training, validation, write_condensation, write_log

from mmubn.analysis import condensation
from mmubn.analysis.runs import LayerValues

NAN = float('nan')


@pytest.fixture(autouse=True)
def no_figure_left():
    yield
    plt.close('all')


def means(*runs, metrics=()):
    logs = {run: condensation.read_log(run) for run in runs}
    return condensation.draw_means(logs, {run: condensation.read_records(run) for run in runs}, list(metrics))


def points(line):
    return [list(values) for values in line.get_data()]


def test_mean_and_share_are_over_the_layers_that_have_a_value(tmp_path):
    write_condensation(tmp_path, {0: [1, 0.6, 0.2], 10: [0.5, NAN, 0.3], 20: [NAN, NAN, NAN], 30: [0.1, 0.2, 0.3]})
    log = condensation.read_log(tmp_path)
    steps, similarity = condensation.mean_similarity(log)
    assert steps == [0, 10, 30]
    np.testing.assert_allclose(similarity, [0.6, 0.4, 0.2])
    steps, share = condensation.condensed_share(log)
    assert steps == [0, 10, 30]
    np.testing.assert_allclose(share, [200 / 3, 50, 0])  # at the threshold is not above it


def test_the_threshold_is_that_of_the_file(tmp_path):
    write_condensation(tmp_path, {0: [1, 0.6, 0.2]}, threshold=0.7)
    assert condensation.condensed_share(condensation.read_log(tmp_path))[1] == pytest.approx([100 / 3])
    figure, caption = means(tmp_path)
    assert list(figure.axes[0].lines[-1].get_ydata()) == [0.7, 0.7]
    assert 'above 0.7' in caption


def test_a_metric_is_at_the_training_iteration_logged_before_it():
    records = [training(25, 1), training(50, 1), validation(1, 40.0), training(85, 2), validation(2, 60.0)]
    assert condensation.metric_by_iteration(records, 'top1') == ([50, 85], [40, 60])
    assert condensation.metric_by_iteration(records, 'bbox_mAP') == ([], [])
    assert condensation.metric_by_iteration([{'gate/layer.top1': 1.0, 'step': 25}, *records], 'top1')[0] == [50, 85]


def test_seeds_become_a_mean_with_a_band_of_a_standard_deviation(tmp_path):
    write_condensation(tmp_path / 'BN' / 'seed0', {0: [0.9, 0.9, 0.9], 10: [0.5, 0.5, 0.5]})
    write_condensation(tmp_path / 'BN' / 'seed1', {0: [0.7, 0.7, 0.7], 10: [0.1, 0.1, 0.1]})
    write_condensation(tmp_path / 'UBN', {0: [0.8, 0.8, 0.8], 10: [0.2, 0.2, 0.2]})
    figure, caption = means(*(tmp_path / run for run in ('BN/seed0', 'BN/seed1', 'UBN')))
    similarity, share = figure.axes
    bn, ubn, _ = similarity.lines
    np.testing.assert_allclose(points(bn), [[0, 10], [0.8, 0.3]])
    np.testing.assert_allclose(points(ubn), [[0, 10], [0.8, 0.2]])
    np.testing.assert_allclose(points(share.lines[0]), [[0, 10], [100, 50]])
    (band,) = similarity.collections
    low, high = band.get_paths()[0].vertices.min(0)[1], band.get_paths()[0].vertices.max(0)[1]
    spread = [0.2 / 2**0.5, 0.4 / 2**0.5]  # of 0.9, 0.7 and of 0.5, 0.1, n - 1
    np.testing.assert_allclose([low, high], [0.3 - spread[1], 0.8 + spread[0]])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ['BN, 2 seeds', 'UBN', 'condensed: above 0.3']
    assert bn.get_linestyle() != ubn.get_linestyle()
    assert bn.get_marker() != ubn.get_marker()
    assert 'standard deviation' in caption


@pytest.mark.parametrize(
    ('tag', 'values', 'label'),
    [('accuracy/top1', [0.4, 0.9], 'top1 (%)'), ('coco/bbox_mAP', [0.2, 0.8], 'bbox_mAP (from 0 to 1)')],
)
def test_axes_have_units_and_time_is_in_iterations(tmp_path, tag, values, label):
    write_condensation(tmp_path, {0: [1, 0.6, 0.2], 20: [1, 0.6, 0.2]})
    first, second = values
    write_log(tmp_path, [training(10, 1), validation(1, first, tag), training(20, 2), validation(2, second, tag)])
    figure, caption = means(tmp_path, metrics=[tag])
    assert [axis.get_ylabel() for axis in figure.axes] == ['mean cosine similarity', 'condensed layers (%)', label]
    assert figure.axes[-1].get_xlabel() == 'iterations'
    assert points(figure.axes[-1].lines[0]) == [[10, 20], values]
    assert label.split()[0] in caption


def test_heat_maps_have_the_layers_from_top_to_bottom_in_one_scale(tmp_path):
    write_condensation(tmp_path / 'a', {0: [1, 0.6, -0.2], 10: [0.5, NAN, 0.3]})
    write_condensation(tmp_path / 'b', {0: [0.1, 0.2]}, layers=['x', 'y'])
    figure, _ = condensation.draw_layers({run: condensation.read_log(run) for run in (tmp_path / 'a', tmp_path / 'b')})
    first, second, bar = figure.axes
    mesh = first.collections[0]
    np.testing.assert_allclose(mesh.get_array().filled(NAN), [[1, 0.5], [0.6, NAN], [-0.2, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [0, 5, 10])
    assert [text.get_text() for text in first.get_yticklabels()] == LAYERS
    assert list(first.get_yticks()) == [0.5, 1.5, 2.5]
    assert first.yaxis_inverted()
    assert [text.get_text() for text in second.get_yticklabels()] == ['x', 'y']
    for axis in (first, second):
        scale = axis.collections[0].norm
        assert (scale.vmin, scale.vmax) == pytest.approx((-0.2, 1))
    assert 'similarity' in bar.get_xlabel()


def test_many_layers_are_labelled_in_part():
    names = [f'layer{i}' for i in range(100)]
    layers = LayerValues(names, {}, np.array([0, 10]), np.array([0, 1]), np.zeros((2, 100)))
    _, axis = plt.subplots()
    condensation.heat_map(axis, layers, Normalize(0, 1))
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert labels == names[::2]
    np.testing.assert_array_equal(axis.get_yticks(), np.arange(0, 100, 2) + 0.5)


@pytest.mark.parametrize('count', [3, 54, 200])
def test_names_of_layers_are_whole_and_apart(tmp_path, count):
    layers = [f'backbone.layer{i}.0.a_block_with_a_long_name.$x$.bn{i}' for i in range(count)]
    write_condensation(tmp_path, {0: [0.5] * count, 10: [0.1] * count}, layers=layers)
    figure, _ = condensation.draw_layers({tmp_path: condensation.read_log(tmp_path)})
    figure.draw_without_rendering()
    axis = figure.axes[0]
    boxes = [text.get_window_extent() for text in axis.get_yticklabels()]
    page = figure.bbox
    assert all(page.x0 <= box.x0 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    assert boxes[0].height > 6
    assert axis.get_window_extent().width > 0.3 * page.width


def test_closed_gates_are_hatched_where_and_when_they_are_closed(tmp_path):
    write_condensation(
        tmp_path,
        {0: [1, 0.6, 0.2]},
        running={10: [0.9, NAN, 0.9], 20: [0.1, NAN, 0.9], 30: [0.1, NAN, 0.9], 40: [0.9, NAN, 0.1]},
        gate={10: [1, NAN, 1], 20: [0, NAN, 1], 30: [0, NAN, 1], 40: [1, NAN, 0]},
    )
    figure, caption = condensation.draw_layers({tmp_path: condensation.read_log(tmp_path)})
    _, running, _ = figure.axes
    hatched = [each for each in running.collections if each.get_hatch()]
    boxes = [path.get_extents().extents.tolist() for each in hatched for path in each.get_paths()]
    assert boxes == [[15, 0, 35, 1], [35, 2, 40, 3]]  # from the middle between two steps on
    assert 'hatched where the gate is closed' in caption


def test_a_norm_without_gate_has_no_second_heat_map(tmp_path):
    empty = {10: [NAN, NAN, NAN]}
    write_condensation(tmp_path, {0: [1, 0.6, 0.2]}, running=empty, gate=empty)
    figure, caption = condensation.draw_layers({tmp_path: condensation.read_log(tmp_path)})
    assert len(figure.axes) == 2  # the map and the scale
    assert 'hatched' not in caption


def test_colours_rise_evenly_in_luminance():
    """So the maps read in black and white. L* of CIELAB, in which equal distances look equal."""
    rgb = plt.get_cmap(condensation.COLOURS)(np.linspace(0, 1, 21))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    steps = np.diff(lightness)
    assert steps.min() > 0.7 * steps.mean() > 0
    assert steps.max() < 1.3 * steps.mean()
