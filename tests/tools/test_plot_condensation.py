"""tools/analysis_tools/plot_condensation.py: what it writes and what it reports."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from cli import call
from PIL import Image
from run_logs import training, validation, write_condensation, write_log

from mmubn.analysis import plots

TOOL = 'analysis_tools/plot_condensation.py'


def test_files_and_what_is_reported_of_runs_that_differ(monkeypatch, tmp_path, capsys):
    """Runs with other layers are drawn and named; a line that is cut off is left out."""
    good, other, cut = (tmp_path / name for name in ('good', 'other', 'cut'))
    write_condensation(good, {0: [1, 0.6, 0.2], 10: [0.5, 0.5, 0.3]})
    write_condensation(other, {0: [0.1, 0.2], 10: [0.2, 0.2]}, layers=['x', 'y'])
    path = write_condensation(cut, {0: [0.9, 0.6, 0.2], 10: [0.5, 0.5, 0.3]})
    path.write_text(path.read_text()[:-20])
    out = tmp_path / 'plots' / 'condensation.png'
    assert call(monkeypatch, TOOL, good, other, cut, '--out', out) == 0
    output = capsys.readouterr()
    assert f'Other layers than {good}: {other};' in output.out
    assert f'{path}, line 3: cut off' in output.out
    for name in ('condensation.png', 'condensation.svg', 'condensation-layers.png', 'condensation-layers.svg'):
        assert f'wrote {out.parent / name}' in output.out
    pixels = np.asarray(Image.open(out).convert('RGB')).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10, 'an empty page has few colours'


@pytest.mark.parametrize('wrong', ['gone', 'file', 'empty', 'broken', 'other'])
def test_a_run_that_cannot_be_read_is_named_before_anything_is_written(monkeypatch, tmp_path, capsys, wrong):
    write_condensation(tmp_path / 'good', {0: [1, 0.6, 0.2]})
    (tmp_path / 'file').touch()
    (tmp_path / 'empty').mkdir()
    write_condensation(tmp_path / 'broken', {0: [1, 0.6, 0.2]}).write_text('{"layers": [')
    write_condensation(tmp_path / 'other', {0: [1, 0.6, 0.2]}, threshold=None)
    before = sorted(tmp_path.iterdir())
    assert call(monkeypatch, TOOL, tmp_path / 'good', tmp_path / wrong, '--out', tmp_path / 'c.png') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ')
    assert str(tmp_path / wrong) in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_plot_that_cannot_be_written_stops_the_other(monkeypatch, tmp_path, capsys):
    write_condensation(tmp_path / 'run', {0: [1, 0.6, 0.2]})
    (tmp_path / 'c-layers.svg').mkdir()
    assert call(monkeypatch, TOOL, tmp_path / 'run', '--out', tmp_path / 'c.png') == 2
    assert f'{tmp_path}/c-layers.svg is a folder' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['c-layers.svg', 'run']


def test_a_metric_that_no_run_logged_is_reported_with_those_there_are(monkeypatch, tmp_path, capsys):
    write_condensation(tmp_path, {0: [1, 0.6, 0.2]})
    write_log(tmp_path, [training(10, 1), validation(1, 0.5, 'coco/bbox_mAP')])
    out = tmp_path / 'c.png'
    assert call(monkeypatch, TOOL, tmp_path, '--metric', 'top1', '--out', out) == 2
    assert re.search('no run logged --metric top1; logged are: coco/bbox_mAP', capsys.readouterr().err)
    assert not out.exists()


def test_a_classifier_and_a_detector_have_a_metric_each(monkeypatch, tmp_path):
    for name, value, tag in (('a', 41.0, 'accuracy/top1'), ('b', 0.85, 'coco/bbox_mAP')):
        write_condensation(tmp_path / name, {0: [1, 0.6, 0.2]})
        write_log(tmp_path / name, [training(10, 1), validation(1, value, tag)], start='20260102_120000')
    figures = []
    monkeypatch.setattr(plots, 'save_all', lambda each: figures.extend(each))
    assert call(monkeypatch, TOOL, tmp_path / 'a', tmp_path / 'b', '--out', tmp_path / 'c.png') == 0
    axes = {axis.get_ylabel(): [list(line.get_ydata()) for line in axis.lines] for axis in figures[0][0].axes[2:]}
    plt.close('all')
    assert axes == {'bbox_mAP (from 0 to 1)': [[0.85]], 'top1 (%)': [[41.0]]}


def test_a_file_without_a_measurement_of_the_fixed_batch(monkeypatch, tmp_path, capsys):
    write_condensation(tmp_path, {}, batch={1: [1, 0.6, 0.2]})
    assert call(monkeypatch, TOOL, tmp_path, '--out', tmp_path / 'c.png') == 2
    assert f'{tmp_path}/*/feature_condensation.jsonl has no measurement on the fixed batch' in capsys.readouterr().err
