"""tools/analysis_tools/benchmark_norm.py: it reports what it measured, and needs torch alone."""

import csv
import itertools
import os
import re
import subprocess
import sys
from statistics import geometric_mean

import numpy as np
import pytest
import torch
from cli import ROOT, call
from PIL import Image

from mmubn.analysis.benchmark import DEFAULT_CONTENDERS, measurement

TOOL = 'analysis_tools/benchmark_norm.py'
PATH = ROOT / 'tools' / TOOL


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the tool on the CPU; gives what it printed, the rows of its CSV file, and the folder it wrote."""
    monkeypatch.setattr(measurement, 'LARGE', 2**20)

    def run(*arguments):
        assert call(monkeypatch, TOOL, *arguments, '--device', 'cpu', '--out', tmp_path) == 0
        with (tmp_path / 'results.csv').open() as file:
            return capsys.readouterr(), list(csv.DictReader(file)), tmp_path

    return run


def is_drawn(path):
    pixels = np.asarray(Image.open(path).convert('RGB'))
    return len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # an empty page has few colours


def test_layer(run):
    printed, rows, folder = run(
        *('layer', '--shapes', '2,3,8,9', '1,4,5,5', '--contenders', 'bn', 'ubn', 'ubn-naive', '--repeats', '3'),
        *('--dtype', 'fp32', 'bf16', '--memory-format', 'channels_last', '--warmup', '1'),
    )
    by_name = {(*(row[key] for key in ('n', 'c', 'h', 'w', 'dtype', 'contender', 'measure')),): row for row in rows}
    measures = {
        'forward': 'ms',
        'backward': 'ms',
        'training': 'ms',
        'evaluation': 'ms',
        'saved': 'MiB',
        'bandwidth': 'GB/s',
    }
    contenders = ['composition', 'bn', 'ubn', 'ubn-naive']
    shapes = [('2', '3', '8', '9'), ('1', '4', '5', '5')]
    assert set(by_name) == {
        (*shape, *rest) for shape, *rest in itertools.product(shapes, ['fp32', 'bf16'], contenders, measures)
    }
    for row in rows:
        assert row['unit'] == measures[row['measure']]
        assert 0 < float(row['q1']) <= float(row['median']) <= float(row['q3'])
        assert 0 < float(row['ratio_q1']) <= float(row['ratio_median']) <= float(row['ratio_q3'])
        if row['contender'] == 'composition':
            assert float(row['ratio_q1']) == float(row['ratio_q3']) == 1
        assert (row['backend'] == '-') == (row['contender'] != 'ubn')
        assert row['memory_format'] == 'channels_last'
    bandwidth, training = (by_name[(*shapes[0], 'bf16', 'ubn', name)] for name in ('bandwidth', 'training'))
    passes = float(bandwidth['median']) * float(training['median']) * 1e6
    assert passes == pytest.approx(8 * 2 * 3 * 8 * 9 * 2), 'eight passes over an x of two bytes per value'

    text = (folder / 'results.md').read_text()
    assert text in printed.out
    assert f'torch {torch.__version__}' in text
    assert 'threads: 1' in text
    assert '`python tools/analysis_tools/benchmark_norm.py layer --shapes' in text
    assert '### 2x3x8x9 bf16 channels_last' in text
    means = cells(text, 'Geometric means over all inputs')
    expected = geometric_mean(
        float(row['ratio_median']) for row in rows if (row['contender'], row['measure']) == ('ubn', 'evaluation')
    )
    assert float(means['ubn']['evaluation / composition']) == pytest.approx(expected, rel=5e-3)
    shown = cells(text, '2x3x8x9 bf16 channels_last')
    assert list(shown) == contenders
    assert float(shown['ubn']['training (ms)'].split()[0]) == pytest.approx(float(training['median']), rel=5e-3)
    ratio = shown['ubn']['training / composition']
    assert [float(part.strip(' [],')) for part in ratio.split()] == pytest.approx(
        [float(training[key]) for key in ('ratio_median', 'ratio_q1', 'ratio_q3')], rel=5e-3
    )
    assert is_drawn(folder / 'plot.png')
    drawing = (folder / 'plot.svg').read_text()
    assert all(label in drawing for label in (*contenders, '1x4x5x5 fp32 channels_last', 'training time'))
    assert '16/16' in printed.err, 'the progress bar counts four rounds at four settings'


def cells(markdown, heading):
    """The table below a heading: per first cell, the others by their column."""
    lines = markdown.split(f'### {heading}\n')[1].split('###')[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line.startswith('|')]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_network(run):
    _, rows, folder = run('network', '--shapes', '2,3,32,32', '--contenders', 'ubn', '--repeats', '3', '--warmup', '1')
    assert {row['contender'] for row in rows} == {'bn', 'ubn'}, 'the baseline takes part'
    medians = {(row['contender'], row['measure']): float(row['median']) for row in rows}
    for name in ('bn', 'ubn'):
        assert medians[name, 'training'] > max(medians[name, step] for step in ('forward', 'backward', 'update'))
    assert medians['bn', 'saved'] < medians['ubn', 'saved']
    table = cells((folder / 'results.md').read_text(), '2x3x32x32 fp32 nchw')
    assert set(table['ubn']) >= {'training / bn', 'evaluation / bn', 'update (ms)', 'saved / bn'}
    assert is_drawn(folder / 'plot.png')


@pytest.mark.slow
def test_sweep(run):
    printed, rows, folder = run(
        *('sweep', '--base', '2,4,6,6', '--batch-sizes', '1', '2', '4', '--channels', '4', '8', '--sides', '3', '6'),
        *('--contenders', 'bn', 'ubn', '--baseline', 'bn', '--repeats', '3', '--warmup', '1'),
    )
    sizes = {tuple(int(row[key]) for key in 'nchw') for row in rows}
    assert sizes == {(1, 4, 6, 6), (2, 4, 6, 6), (4, 4, 6, 6), (2, 8, 6, 6), (2, 4, 3, 3)}
    growth = cells(printed.out, 'Growth')
    assert list(growth) == ['bn', 'ubn']
    assert list(growth['ubn']) == ['N', 'C', 'H*W']
    assert is_drawn(folder / 'plot.png')
    drawing = (folder / 'plot.svg').read_text()
    assert all(label in drawing for label in ('batch size N', 'channels C', 'map size', '(ms)', 'linear growth', 'ubn'))


def test_torch_alone_is_enough(tmp_path):
    """As on a machine that has only torch: neither a progress bar nor a plot, all else."""
    code = f"""
import importlib.util, runpy, sys
hidden = ('mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'torchvision', 'numpy', 'matplotlib', 'tqdm')
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in hidden:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in hidden else find(name, package)
sys.meta_path.insert(0, Hide())
runpy.run_path({str(PATH)!r}, run_name='__main__')
"""
    arguments = ['layer', '--device', 'cpu', '--shapes', '2,3,4,4', '--repeats', '3', '--out', str(tmp_path)]
    result = subprocess.run(
        [sys.executable, '-c', code, *arguments],
        cwd=ROOT,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'no plot: Matplotlib is not installed' in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {'results.md', 'results.csv'}
    assert set(cells(result.stdout, '2x3x4x4 fp32 nchw')) == set(DEFAULT_CONTENDERS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('graphs', [[], ['--cuda-graphs', '--cold-cache']])
def test_layer_on_a_gpu(monkeypatch, capsys, tmp_path, graphs):
    arguments = ['layer', '--device', 'cuda', '--shapes', '4,8,16,16', '--repeats', '3', '--out', tmp_path, *graphs]
    assert call(monkeypatch, TOOL, *arguments) == 0
    table = cells(capsys.readouterr().out, '4x8x16x16 fp32 nchw')
    assert ('ubn-naive' in table) == (not graphs)
    assert float(table['ubn']['peak (MiB)']) > 0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['layer', '--shapes', '2,64,100'], r"'2,64,100' is no shape: expected four positive integers N,C,H,W"),
        (['layer', '--shapes', '2,64,0,4'], r"'2,64,0,4' is no shape"),
        (['layer', '--shapes', '2,64,a,4'], r"'2,64,a,4' is no shape"),
        (['layer', '--shapes', '1,64,1,1'], r'1x64x1x1 fp32 nchw has a single value per channel'),
        (['layer', '--contenders', 'bn', 'nbn'], r"invalid choice: 'nbn' \(choose from '?bn"),
        (['layer', '--baseline', 'nbn'], r"invalid choice: 'nbn'"),
        (['layer', '--dtype', 'fp8'], r"invalid choice: 'fp8'"),
        (['layer', '--device', 'gpu'], r"'gpu' is no device to measure on: expected cpu, cuda or cuda:INDEX"),
        (['layer', '--device', 'meta'], r"'meta' is no device to measure on"),
        (['layer', '--device', 'cuda:99'], r"'cuda:99' is not there: torch sees \d+ CUDA devices"),
        (['layer', '--device', 'cpu', '--cuda-graphs'], r'--cuda-graphs needs a GPU, but --device is cpu'),
        (['layer', '--repeats', '2'], r"expected an integer of at least 3, got '2'"),
        (['network', '--shapes', '2,4,64,64'], r'3 channels, as in 2,3,320,320, got 4'),
        (['network', '--shapes', '1,3,32,32'], r'1x3x32x32 fp32 nchw has a single value per channel'),
        (['sweep', '--channels', '0'], r"expected an integer of at least 1, got '0'"),
        (['sweep', '--base', '1,4,8,8', '--sides', '1'], r'1x4x1x1 fp32 nchw has a single value per channel'),
        (['sweep', '--dtype', 'fp32', 'bf16'], r'unrecognized arguments: bf16'),
        (['layer', '--out', str(PATH)], r'benchmark_norm.py is a file; give the path of a folder'),
        (['layer', '--out', str(PATH / 'new')], r'new cannot be written: .*benchmark_norm.py is no folder'),
        ([], r'the following arguments are required: MODE'),
    ],
)
def test_bad_input_is_reported_in_one_sentence(monkeypatch, capsys, arguments, message):
    assert call(monkeypatch, TOOL, *arguments) == 2
    error = capsys.readouterr().err.split('error: ')[1]
    assert error.count('\n') == 1
    assert re.search(message, error), error
