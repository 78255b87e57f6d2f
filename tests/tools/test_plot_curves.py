"""tools/analysis_tools/plot_curves.py."""

import json
import runpy
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from cli import ROOT, tool
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


@pytest.mark.parametrize(
    ('metric', 'values', 'top'), [('accuracy/top1', [40.0, 97.5], 100), ('coco/bbox_mAP', [0.2, 0.8], 1)]
)
def test_metrics_in_their_unit(tmp_path, monkeypatch, metric, values, top):
    for run in ('bn', 'ubn'):
        log = tmp_path / run / '1' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        records = [{'loss': 2.0, 'step': 9}, *({metric: value, 'step': i} for i, value in enumerate(values, 1))]
        log.write_text('\n'.join(map(json.dumps, records)))
    script = ROOT / 'tools' / 'analysis_tools' / 'plot_curves.py'
    monkeypatch.setattr(
        sys, 'argv', ['', str(tmp_path / 'bn'), str(tmp_path / 'ubn'), '--out', str(tmp_path / 'out.png')]
    )
    runpy.run_path(str(script), run_name='__main__')
    axis = plt.gcf().axes[1]
    plt.close()
    assert [list(line.get_ydata()) for line in axis.lines] == [values, values]
    assert axis.get_ylim() == (0, top)
    assert ('%' in axis.get_ylabel()) == (top == 100)
    name = metric.split('/')[1]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [f'bn {name}', f'ubn {name}']
