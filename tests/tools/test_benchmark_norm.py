"""tools/analysis_tools/benchmark_norm.py: it compares what it says it compares, and reports what it measured."""

import csv
import importlib.util
import itertools
import os
import random
import re
import subprocess
import sys
from statistics import geometric_mean

import numpy as np
import pytest
import torch
import torchvision
from cli import ROOT
from PIL import Image
from torch import nn

import mmubn
from mmubn import functional as F

PATH = ROOT / 'tools' / 'analysis_tools' / 'benchmark_norm.py'
spec = importlib.util.spec_from_file_location('benchmark_norm', PATH)
tool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

CPU = torch.device('cpu')


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the tool on the CPU; gives what it printed, the rows of its CSV file, and the folder it wrote."""

    monkeypatch.setattr(tool, 'LARGE', 2**20)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', [str(PATH), *map(str, arguments), '--device', 'cpu', '--out', str(tmp_path)])
        tool.main()
        with (tmp_path / 'results.csv').open() as file:
            return capsys.readouterr(), list(csv.DictReader(file)), tmp_path

    return run


def is_drawn(path):
    pixels = np.asarray(Image.open(path).convert('RGB'))
    return len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # an empty page has few colours


# What is compared


def copy_parameters(ubn, naive):
    with torch.no_grad():
        for name in ('center_weight', 'scale_weight', 'scale_bias'):
            getattr(naive, name).copy_(getattr(ubn, name)[None, :, None, None])
        naive.conv.weight.copy_(F.depthwise_kernel(ubn.weight, ubn.neighbor_weight))
        naive.conv.bias.copy_(ubn.bias)


@pytest.mark.parametrize('samples', [1, 5, 18])
def test_the_naive_ubn_is_ubn_on_both_sides_of_the_gate(samples):
    torch.manual_seed(0)
    threshold = 0.6
    ubn, naive = mmubn.UBN(3, threshold=threshold).double(), tool.NaiveUBN(3, threshold=threshold).double()
    with torch.no_grad():
        for parameter in ubn.parameters():
            parameter.add_(torch.randn_like(parameter))
    copy_parameters(ubn, naive)
    decisions = set()
    for _ in range(8):
        x = torch.randn(samples, 3, 6, 5, dtype=torch.float64, requires_grad=True)
        x_naive = x.detach().clone().requires_grad_()
        before = ubn.running_mean.clone()
        y, y_naive = ubn(x), naive(x_naive)
        decisions.add(torch.equal(ubn.running_mean, before))
        dy = torch.randn_like(y)
        y.backward(dy)
        y_naive.backward(dy)
        torch.testing.assert_close(y_naive, y)
        torch.testing.assert_close(x_naive.grad, x.grad)
        for name in ('running_mean', 'running_var', 'running_similarity'):
            torch.testing.assert_close(getattr(naive, name), getattr(ubn, name))
    assert decisions == ({False} if samples == 1 else {False, True}), 'a single sample never closes the gate'
    for name in ('center_weight', 'scale_weight', 'scale_bias'):
        torch.testing.assert_close(getattr(naive, name).grad.flatten(), getattr(ubn, name).grad)
    taps = naive.conv.weight.grad.flatten(1)
    torch.testing.assert_close(taps[:, 4], ubn.weight.grad)
    torch.testing.assert_close(torch.cat([taps[:, :4], taps[:, 5:]], 1), ubn.neighbor_weight.grad)
    torch.testing.assert_close(naive.conv.bias.grad, ubn.bias.grad)
    torch.testing.assert_close(naive.eval()(x), ubn.eval()(x))


def test_a_fresh_naive_ubn_is_a_fresh_ubn():
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(tool.NaiveUBN(4)(x), mmubn.UBN(4)(x), rtol=1e-5, atol=1e-5)


def test_the_contenders_agree_that_are_the_same_norm():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 7, 5)
    outputs = {}
    for name in tool.CONTENDERS:
        contender = tool.CONTENDERS[name]
        with contender.forced():
            outputs[name] = contender.make(6)(x)
    for name in ('ubn-torch', 'ubn-reference', 'ubn-naive'):
        torch.testing.assert_close(outputs[name], outputs['ubn'], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs['bnet'], outputs['bn'], rtol=1e-5, atol=1e-5)
    assert set(tool.DEFAULT_CONTENDERS) == set(outputs) - {'ubn-torch'}


def test_the_gate_of_the_contenders_never_closes():
    for name in ('ubn', 'ubn-torch', 'ubn-reference', 'ubn-naive'):
        with tool.CONTENDERS[name].forced():
            norm = tool.CONTENDERS[name].make(2)
            for _ in range(40):
                x = torch.randn(1, 2, 4, 4)
                before = norm.running_mean.clone()
                norm(torch.cat([x, -x + 0.01]))  # as dissimilar as two samples can be
                assert not torch.equal(norm.running_mean, before), name
            assert norm.running_similarity < -0.9


def test_the_composition_is_bnet():
    torch.manual_seed(0)
    composition, bnet = tool.composition(4), mmubn.BNET(4)
    with torch.no_grad():
        bnet.neighbor_weight.normal_()
        composition[1].weight.copy_(F.depthwise_kernel(bnet.weight, bnet.neighbor_weight))
        composition[1].bias.copy_(bnet.bias)
    x = torch.randn(3, 4, 6, 7)
    torch.testing.assert_close(composition(x), bnet(x), rtol=1e-5, atol=1e-5)
    assert len(list(composition.parameters())) == 2, 'no affine step besides the convolution'


def test_the_network_is_resnet50():
    torch.manual_seed(0)
    ours, theirs = tool.resnet50(nn.BatchNorm2d).eval(), torchvision.models.resnet50().eval()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 25_557_032
    state = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict(dict(state))
    x = torch.randn(1, 3, 64, 48)
    torch.testing.assert_close(ours(x), theirs(x))


def test_every_norm_of_the_network_is_the_contenders():
    norms = [
        module for module in tool.resnet50(mmubn.UBN).modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert len(norms) == 53
    assert {type(norm) for norm in norms} == {mmubn.UBN}


# Measuring


def test_the_clock_gives_the_time_of_each_step(monkeypatch):
    moments = iter([10.0, 10.25, 12.0])
    monkeypatch.setattr(tool.time, 'perf_counter', lambda: next(moments))
    calls = []
    assert tool.Clock(CPU).times([lambda: calls.append(1), lambda: calls.append(2)]) == [250.0, 1750.0]
    assert calls == [1, 2]


def test_the_copy_counts_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(tool, 'LARGE', 5_000_000)
    monkeypatch.setattr(tool.Clock, 'times', lambda self, steps: [4.0 for step in steps])
    assert tool.copy_bandwidth(tool.Clock(CPU)) == 2 * 5e6 / 4e-3 / 1e9


def test_a_cold_clock_overwrites_the_caches_first(monkeypatch):
    monkeypatch.setattr(tool, 'LARGE', 2**20)
    clock = tool.Clock(CPU, cold=True)
    clock.cold.fill_(1)
    seen = []
    clock.times([lambda: seen.append(bool(clock.cold.any()))])
    assert seen == [False]


def setting(*shape):
    return tool.Setting(shape, 'fp32', 'nchw')


def test_saved_memory_counts_what_the_backward_needs():
    """BatchNorm keeps x and two numbers per channel; UBN x and some per sample and channel; the naive UBN four maps."""
    place = setting(3, 5, 32, 32)
    inputs = tool.LayerTrial.inputs(place, CPU)
    x, numbers = inputs[0].nbytes, 3 * 5 * 4
    saved = {}
    for name, contender in tool.CONTENDERS.items():
        with contender.forced():
            saved[name] = tool.saved_bytes(tool.LayerTrial(contender, place, *inputs))
    assert saved['bn'] == x + 2 * 5 * 4
    assert x < saved['ubn'] < x + 12 * numbers
    assert 2 * x < saved['composition'] < 2 * x + 12 * numbers
    assert 3 * x < saved['ubn-naive'] < 3 * x + 12 * numbers


def test_ratios_are_taken_within_a_round():
    """Where every round is slower than the last, the medians of the ratios still show no spread."""
    slow = {'bn': {'training': [1.0, 10.0, 100.0]}, 'ubn': {'training': [2.0, 20.0, 200.0]}}
    bn, ubn = tool.compare(setting(2, 3, 4, 4), dict(bn='-', ubn='torch'), slow, 'bn')
    assert ubn.value == (11.0, 20.0, 110.0)
    assert ubn.ratio == (2.0, 2.0, 2.0)
    assert bn.ratio == (1.0, 1.0, 1.0)


def test_every_contender_has_its_turn_in_every_round(monkeypatch):
    """In orders that differ."""
    args = tool.argparse.Namespace(
        contenders=['bn', 'ubn', 'rbn'], make=tool.LayerTrial, device=CPU, warmup=2, repeats=6, cuda_graphs=False
    )
    turns = []

    def forced(self):
        turns.append(next(name for name, contender in tool.CONTENDERS.items() if contender is self))
        return tool.contextlib.nullcontext()

    monkeypatch.setattr(tool.Contender, 'forced', forced)
    _, samples = tool.run_setting(setting(2, 3, 4, 4), args, tool.Clock(CPU), lambda label: None)
    rounds = [tuple(turns[i : i + 3]) for i in range(6, len(turns), 3)]  # after two builds of each
    assert len(rounds) == 8
    assert all(sorted(turn) == ['bn', 'rbn', 'ubn'] for turn in rounds)
    assert len(set(rounds)) > 2
    assert {len(values) for name in samples for key, values in samples[name].items() if key != 'saved'} == {6}


# Reports


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


def test_growth_is_the_exponent(monkeypatch):
    sizes = ['--base', '2,3,5,5', '--batch-sizes', '1', '2', '4', '8', '--channels', '3', '--sides', '5', '10', '20']
    names = ['--contenders', 'bn', 'ubn', '--baseline', 'bn']
    monkeypatch.setattr(sys, 'argv', [str(PATH), 'sweep', *sizes, *names])
    args = tool.parse_args()
    results = []
    for place in tool.all_settings(args):
        n, c, h, w = place.shape
        linear = tool.quartiles([n * c * h * w * 1e-3])
        mixed = tool.quartiles([n**0.5 * h**4])
        for name, value in (('bn', linear), ('ubn', mixed)):
            results.append(tool.Result(place, name, '-', 'training', value, value))
    random.Random(0).shuffle(results)
    assert [line.split('|')[1:-1] for line in tool.growth_table(results, args)[2:-1]] == [
        [' bn ', ' 1.00 ', ' - ', ' 1.00 '],
        [' ubn ', ' 0.50 ', ' - ', ' 2.00 '],
    ]


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
    assert set(cells(result.stdout, '2x3x4x4 fp32 nchw')) == set(tool.DEFAULT_CONTENDERS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('graphs', [[], ['--cuda-graphs', '--cold-cache']])
def test_layer_on_a_gpu(monkeypatch, capsys, tmp_path, graphs):
    arguments = [
        'layer',
        '--device',
        'cuda',
        '--shapes',
        '4,8,16,16',
        '--repeats',
        '3',
        '--out',
        str(tmp_path),
        *graphs,
    ]
    monkeypatch.setattr(sys, 'argv', [str(PATH), *arguments])
    tool.main()
    table = cells(capsys.readouterr().out, '4x8x16x16 fp32 nchw')
    assert ('ubn-naive' in table) == (not graphs)
    assert float(table['ubn']['peak (MiB)']) > 0


# Errors


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
        ([], r'the following arguments are required: MODE'),
    ],
)
def test_bad_input_is_told_in_one_sentence(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, 'argv', [str(PATH), *arguments])
    with pytest.raises(SystemExit) as status:
        tool.main()
    assert status.value.code == 2
    error = capsys.readouterr().err.split('error: ')[1]
    assert error.count('\n') == 1
    assert re.search(message, error), error
