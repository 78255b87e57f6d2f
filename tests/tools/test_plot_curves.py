"""tools/analysis_tools/plot_curves.py."""

import numpy as np
from cli import tool
from PIL import Image


def test_plots_a_run(trained, tmp_path):
    out = tmp_path / 'curves.png'
    result = tool('analysis_tools/plot_curves.py', trained, '--out', out)
    assert result.returncode == 0, result.stdout
    pixels = np.asarray(Image.open(out).convert('RGB'))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, 'an empty page has few colours'


def test_a_cut_off_line_is_told_and_left_out(trained, tmp_path):
    log = tmp_path / 'run' / '1' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    text = next(trained.glob('*/vis_data/scalars.json')).read_text()
    log.write_text(text[: len(text) - 20])
    result = tool('analysis_tools/plot_curves.py', tmp_path / 'run', '--out', tmp_path / 'curves.png')
    assert result.returncode == 0, result.stdout
    assert f'{log}, line {len(text.splitlines())}: cut off' in result.stdout


def test_a_folder_without_logs(tmp_path):
    result = tool('analysis_tools/plot_curves.py', tmp_path, '--out', tmp_path / 'curves.png')
    assert result.returncode == 2
    assert str(tmp_path) in result.stdout
