"""tools/analysis_tools/plot_condensation.py: what it writes and what it reports."""

import re

import numpy as np
from cli import call
from PIL import Image
from run_logs import training, validation, write_condensation, write_log

TOOL = 'analysis_tools/plot_condensation.py'


def test_files_and_what_is_reported_of_runs_that_differ_or_fail(monkeypatch, tmp_path, capsys):
    """Runs with other layers are drawn and named; one without the file is named, the rest is drawn."""
    good, other, cut, missing = (tmp_path / name for name in ('good', 'other', 'cut', 'missing'))
    write_condensation(good, {0: [1, 0.6, 0.2], 10: [0.5, 0.5, 0.3]})
    write_condensation(other, {0: [0.1, 0.2], 10: [0.2, 0.2]}, layers=['x', 'y'])
    path = write_condensation(cut, {0: [0.9, 0.6, 0.2], 10: [0.5, 0.5, 0.3]})
    path.write_text(path.read_text()[:-20])
    out = tmp_path / 'plots' / 'condensation.png'
    assert call(monkeypatch, TOOL, good, other, cut, missing, '--out', out) == 2
    output = capsys.readouterr()
    assert f'Other layers than {good}: {other};' in output.out
    assert f'{path}, line 3: cut off' in output.out
    assert output.err.count('\n') == 1
    assert str(missing) in output.err
    for name in ('condensation.png', 'condensation.svg', 'condensation-layers.png', 'condensation-layers.svg'):
        assert f'wrote {out.parent / name}' in output.out
    pixels = np.asarray(Image.open(out).convert('RGB')).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10, 'an empty page has few colours'


def test_a_metric_that_no_run_logged_is_reported_with_those_there_are(monkeypatch, tmp_path, capsys):
    write_condensation(tmp_path, {0: [1, 0.6, 0.2]})
    write_log(tmp_path, [training(10, 1), validation(1, 0.5, 'coco/bbox_mAP')])
    out = tmp_path / 'c.png'
    assert call(monkeypatch, TOOL, tmp_path, '--metric', 'top1', '--out', out) == 2
    assert re.search('no run logged --metric top1; logged are: coco/bbox_mAP', capsys.readouterr().err)
    assert out.exists()


def test_a_file_without_a_measurement_of_the_fixed_batch(monkeypatch, tmp_path, capsys):
    write_condensation(tmp_path, {}, batch={1: [1, 0.6, 0.2]})
    assert call(monkeypatch, TOOL, tmp_path, '--out', tmp_path / 'c.png') == 2
    assert f'{tmp_path}/*/feature_condensation.jsonl has no measurement on the fixed batch' in capsys.readouterr().err
