"""tools/check_gpu.py: it finds what is wrong, whatever becomes of its processes, and needs torch and Triton alone."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from cli import ROOT, call, run
from torch import distributed as dist
from torch import nn

from mmubn.analysis.benchmark import Setting, measurement, trials
from mmubn.analysis.gpu_check import (
    detector,
    device,
    environment,
    features,
    kernels,
    layers,
    processes,
    report,
    sanitizer,
    speed,
    stages,
    worker,
)
from mmubn.analysis.gpu_check.outcome import FAILED, OK, SKIPPED, Bar, Check, Finding, Outcome, Skip
from mmubn.layers import UBN

pytest.importorskip('triton')

TOOL = ROOT / 'tools' / 'check_gpu.py'
CPU = torch.device('cpu')
MODULES = [detector, device, environment, features, kernels, layers, processes, speed, worker]


# The tool


@pytest.fixture
def without_openmmlab(tmp_path):
    """PYTHONPATH with which no process finds anything but torch, Triton, pytest and what they need."""
    (tmp_path / 'sitecustomize.py').write_text(
        """
import importlib.util, sys
hidden = ('mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'timm', 'torchvision', 'matplotlib', 'scipy', 'tqdm')
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in hidden:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in hidden else find(name, package)
sys.meta_path.insert(0, Hide())
"""
    )
    return str(tmp_path)


def test_in_the_interpreter(without_openmmlab, tmp_path):
    out = tmp_path / 'out'
    asked_for = ('environment', 'kernels')
    result = run(
        *(sys.executable, TOOL, '--device', 'cpu', '--out', out, '--stages', *asked_for), PYTHONPATH=without_openmmlab
    )
    assert result.returncode == 0, result.stdout
    assert re.search(r'RIGHT: all \d+ checks that were made are ok, 0 were skipped', result.stdout)
    text = (out / 'report.md').read_text()
    assert 'RIGHT: all' in text
    assert f'torch: {torch.__version__}' in text
    expected = [check.name for stage in asked_for for check in stages.STAGES[stage].checks(CPU)]
    assert len(expected) > 10
    for name in expected:
        assert f'| ok | {name} |' in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_in_the_interpreter(tmp_path):
    """Everything is right that can be seen without a GPU; all else says that it needs one."""
    result = run(sys.executable, TOOL, '--device', 'cpu', '--out', tmp_path)
    assert result.returncode == 0, result.stdout
    assert 'FAIL' not in result.stdout
    skipped = [line for line in result.stdout.splitlines() if line.startswith('skipped')]
    assert skipped
    assert all(re.search(r'needs a GPU|need a GPU', line) for line in skipped), skipped
    assert 'Faster R-CNN' in (tmp_path / 'report.md').read_text()


def test_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    message = call(monkeypatch, 'check_gpu.py', '--out', tmp_path / 'out')
    assert message.startswith('check_gpu: torch sees no CUDA GPU here; --device cpu ')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--device', 'cuda:7'], "must be cpu or one of cuda, cuda:0, cuda:1, got 'cuda:7'"),
        (['--device', 'tpu'], "must be cpu or one of cuda, cuda:0, cuda:1, got 'tpu'"),
    ],
)
def test_no_such_device(monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert words in call(monkeypatch, 'check_gpu.py', *arguments)


def test_out_is_a_folder(monkeypatch, capsys, tmp_path):
    (tmp_path / 'file').touch()
    assert call(monkeypatch, 'check_gpu.py', '--out', tmp_path / 'file') == 2
    assert 'is a file; give the path of a folder' in capsys.readouterr().err


def test_skip_speed(monkeypatch, tmp_path, capsys):
    made = []
    monkeypatch.setattr(processes, 'run_stage', lambda name, *_: made.append(name))
    call(monkeypatch, 'check_gpu.py', '--device', 'cpu', '--out', tmp_path, '--skip-speed')
    assert made == ['environment', 'kernels', 'layers', 'features', 'sanitizer']
    made.clear()
    call(monkeypatch, 'check_gpu.py', '--device', 'cpu', '--out', tmp_path, '--stages', 'speed')
    assert made == ['compilation', 'speed'], 'what is timed is compiled before'
    assert 'NOT CHECKED' in capsys.readouterr().out


# Processes


WORKER = """
import json, os, sys, time
request = json.loads(sys.stdin.readline())
for name in request['names']:
    if name == 'dies':
        os.kill(os.getpid(), 9)
    if name == 'hangs':
        time.sleep(60)
    status = 'FAIL' if name in ('fails', 'loses the device') else 'ok'
    print('something else')
    outcome = dict(stage=request['stage'], name=name, status=status, note='', seconds=0, bars=[['a', 2, 1]], table='')
    print('@check ' + json.dumps(outcome), flush=True)
    if name == 'loses the device':
        os._exit(3)
sys.exit(9 if 'complains at its end' in request['names'] else 0)
"""


@pytest.fixture
def run_shard(monkeypatch, tmp_path):
    """Checks of these names by a worker that does what they say; what came of each."""
    monkeypatch.setattr(processes, 'COMMAND', ['-c', WORKER])

    def run(*names, seconds=30.0, code=None):
        if code is not None:
            monkeypatch.setattr(processes, 'COMMAND', ['-c', code])
        found = report.Report(tmp_path, {}, on_gpu=False)
        with (tmp_path / 'log').open('w') as log:
            end = time.monotonic() + seconds
            processes.Shard('stage', names, CPU, found, log, [], seconds, end).run()
        return {outcome.name: (outcome.status, outcome.note) for outcome in found.outcomes}

    return run


def test_outcomes_of_a_process(run_shard, tmp_path):
    assert run_shard('one', 'fails', 'two') == {'one': (OK, ''), 'fails': (FAILED, ''), 'two': (OK, '')}
    assert (tmp_path / 'log').read_text() == 3 * 'something else\n'
    assert '- a: 2, bar 1, not met' in (tmp_path / 'report.md').read_text()


def test_interrupted(run_shard, monkeypatch, tmp_path):
    """No process goes on, and none is started."""
    found = report.Report(tmp_path, {}, on_gpu=False)
    monkeypatch.setitem(
        stages.STAGES, 'stage', stages.Stage(lambda _: [Check(n, None) for n in ('hangs', 'two')], 50, None)
    )

    started = []
    run = processes.Shard.run
    monkeypatch.setattr(processes.Shard, 'run', lambda shard: (started.append(shard), run(shard)))

    def interrupted(future):  # no signal, which would end a process of pytest-xdist
        while not (started and started[0]._process):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, 'result', interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        processes.run_stage('stage', CPU, found, tmp_path)
    assert time.monotonic() - start < 20
    (shard,) = started
    assert shard._process.poll() is not None


@pytest.mark.parametrize('name', ['dies', 'loses the device'])
def test_another_process_goes_on(run_shard, name):
    found = run_shard('one', name, 'two')
    assert found['one'] == found['two'] == (OK, '')
    status, note = found[name]
    assert status == FAILED
    assert ('ended with status -9 in it' in note) == (name == 'dies')


def test_time_is_over(run_shard):
    start = time.monotonic()
    found = run_shard('one', 'hangs', 'two', seconds=3)
    assert time.monotonic() - start < 20
    assert found['one'] == (OK, '')
    assert found['hangs'] == (FAILED, "it was not finished when the stage's 3 s were over")
    assert found['two'] == (SKIPPED, "not reached in the stage's 3 s")


def test_a_process_that_complains_at_its_end(run_shard):
    """As under compute-sanitizer."""
    found = run_shard('complains at its end')
    assert found['complains at its end'] == (OK, '')
    assert found['end of a process'][0] == FAILED


def test_processes_that_never_answer(run_shard):
    found = run_shard('one', 'two', 'three', 'four', code='raise SystemExit(1)')
    assert [status for status, _ in found.values()] == [FAILED, FAILED, SKIPPED, SKIPPED]
    assert found['four'][1] == 'processes end without an answer'


def test_a_worker_ends_with_its_parent():
    """It reads the end of its input, in the middle of a check that takes longer."""
    code = """
import threading, time
from mmubn.analysis.gpu_check.worker import end_with_parent
threading.Thread(target=end_with_parent, daemon=True).start()
time.sleep(100)
"""
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, env=environment) as process:
        process.stdin.close()  # as the end of the parent closes it
        assert process.wait(60) == 1


def test_a_stage_that_cannot_be_listed(monkeypatch, tmp_path):
    def skip(device):
        raise Skip('no such thing here')

    def fail(device):
        raise ImportError('no such module')

    found = report.Report(tmp_path, {}, on_gpu=True)
    monkeypatch.setitem(stages.STAGES, 'skips', stages.Stage(skip, 1, None))
    monkeypatch.setitem(stages.STAGES, 'fails', stages.Stage(fail, 1, None))
    for name in ('skips', 'fails'):
        processes.run_stage(name, CPU, found, tmp_path)
    assert [(o.status, o.note) for o in found.outcomes] == [
        (SKIPPED, 'no such thing here'),
        (FAILED, 'ImportError: no such module'),
    ]


@pytest.mark.parametrize(
    ('cores', 'gib', 'memory', 'expected'),
    [(16, 79, 1, 14), (16, 79, 6, 13), (16, 7, 6, 1), (2, 79, 1, 2), (64, 79, 1, 14), (16, 1, 6, 1), (16, 79, None, 1)],
)
def test_processes(monkeypatch, cores, gib, memory, expected):
    monkeypatch.setattr(processes, 'cores', lambda: cores)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (gib * 2**30, 80 * 2**30))
    assert processes.processes(stages.Stage(None, 1, memory), torch.device('cuda', 0)) == expected


# Outcomes


def raised(error):
    def check():
        raise error

    return check


@pytest.mark.parametrize(
    ('function', 'status', 'note'),
    [
        (lambda: None, OK, ''),
        (lambda: 'well', OK, 'well'),
        (lambda: Finding('well', (Bar('a', 1, 2),)), OK, 'well'),
        (raised(Skip('needs a GPU')), SKIPPED, 'needs a GPU'),
        (raised(torch.cuda.OutOfMemoryError('out of memory')), SKIPPED, 'the GPU has too little memory: out of memory'),
        (raised(ValueError('\n\nwrong\nmore')), FAILED, 'ValueError: wrong (test_check_gpu.py, line '),
        (raised(ValueError()), FAILED, 'ValueError: no message (test_check_gpu.py, line '),
    ],
)
def test_outcome(function, status, note):
    outcome = worker.outcome_of('stage', Check('check', function), CPU)
    assert outcome.status == status
    assert outcome.note.startswith(note)
    assert Outcome.of_dict(json.loads(json.dumps(outcome.as_dict()))) == outcome


def outcome(status, *bars):
    return Outcome('speed', 'a | b', status, 'note', 1.0, list(bars), '| table |')


@pytest.mark.parametrize(
    ('outcomes', 'on_gpu', 'words', 'right'),
    [
        ([outcome(OK, Bar('a', 1, 2)), outcome(SKIPPED)], True, 'RIGHT: all 1 .* 1 were skipped. FAST: all 1', True),
        ([outcome(OK, Bar('a', 3, 2), Bar('b', 1, 2))], True, 'RIGHT.* SLOWER THAN WANTED: 1 of 2 bars', True),
        ([outcome(OK)], True, 'RIGHT: .* Speed was not measured', True),
        ([outcome(OK)], False, "RIGHT: .* This was Triton's interpreter on the CPU", True),
        ([outcome(OK), outcome(FAILED)], True, 'WRONG: 1 of 2 checks failed, 0 were skipped', False),
        ([outcome(SKIPPED)], True, 'NOT CHECKED: none of 1 checks', False),
    ],
)
def test_verdict(outcomes, on_gpu, words, right, tmp_path, capsys):
    found = report.Report(tmp_path / 'new' / 'folder', {'GPU': 'a card'}, on_gpu)
    for each in outcomes:
        found.add(each)
        assert 'The check was not finished' in found.path.read_text()
    assert found.finish() == right
    text = found.path.read_text()
    assert re.search(words, text)
    assert re.search(words, capsys.readouterr().out)
    assert '- GPU: a card' in text
    assert '| a \\| b | note | 1.0 |' in text
    assert ('## Failed' in text) != right or not right


# What the checks find


@pytest.fixture
def broken(monkeypatch):
    """The norm computes something else than it should, on every backend but the reference."""
    forward = UBN.forward

    def wrong(layer, input):
        y = forward(layer, input)
        return y if input.dtype == torch.float64 else y * (1 + 1e-3)

    monkeypatch.setattr(UBN, 'forward', wrong)


def test_a_wrong_layer_is_found(broken):
    with pytest.raises(AssertionError, match='training: y is off by'):
        layers.one_layer('UBN', (2, 3, 4, 5), 'fp32', 'nchw', 'torch', CPU)
    layers.one_layer('RBN', (2, 3, 4, 5), 'fp32', 'nchw', 'torch', CPU)


def test_compare():
    values = {'y': torch.ones(2, 3, 4, 4), 'dx': torch.ones(2, 3, 4, 4), 'd_bias': torch.ones(3)}
    expected = {name: value.double() for name, value in values.items()}
    assert layers.compare(values, expected, torch.float32) == 0
    for name in values:
        for wrong in (1.001, float('nan')):
            one_off = values | {name: values[name].clone()}
            one_off[name].view(-1)[-1] = wrong
            with pytest.raises(AssertionError, match=f'{name} is off'):
                layers.compare(one_off, expected, torch.float32)
    with pytest.raises(AssertionError, match='expected'):
        layers.compare(values, expected | {'d_weight': torch.ones(3)}, torch.float32)


def test_a_wrong_kernel_is_found(monkeypatch):
    tests = kernels.numbers()
    case = next(tests.layer_cases())
    right = tests.oracle(*tests.make_case(*case[0]), -1, 16)

    def by_oracle(*arguments, **changes):
        out = {name: value.detach().float() for name, value in right.items() if name not in ('size', 'condensed')}
        return out | {'condensed': right['condensed']} | changes

    monkeypatch.setattr(tests, 'layer', by_oracle)
    case = (case[0], True, 1)
    kernels.one_case(case, 33, CPU)
    monkeypatch.setattr(tests, 'layer', lambda *a: by_oracle(*a, v=right['v'].float() * 1.001))
    with pytest.raises(AssertionError, match=r'^v: '):
        kernels.one_case(case, 33, CPU)
    scales = itertools.count(1)
    monkeypatch.setattr(tests, 'layer', lambda *a: by_oracle(*a, a=right['a'].float() * next(scales)))
    with pytest.raises(AssertionError, match='a has other bits the second time'):
        kernels.one_case(case, 33, CPU)


def test_compilation_lists_the_norms_of_a_network():
    shapes = speed.norm_inputs((2, 3, 800, 1344))
    assert (2, 64, 400, 672) in shapes
    assert (2, 2048, 25, 42) in shapes
    assert len(shapes) == 12


def test_rows_of_kernels():
    found = [speed.KernelTime('_input_gradient_kernel', 10.0, 1), speed.KernelTime('at::native::copy|x', 2.5, 2)]
    rows = speed.rows_of('ubn', found, 1_000_000, 1000.0)
    assert rows[0] == ['ubn, all', '12.5', '3', '8', '640', '64']
    assert rows[1] == ['_input_gradient_kernel', '10.0', '1', '3', '300', '30']
    assert rows[2] == ['at::native::copy/x', '2.5', '2', '-', '-', '-']


def test_profile():
    x = torch.ones(1000)
    found = speed.profiled([lambda: x.exp(), lambda: x.exp(), lambda: x.sum()], CPU)
    launches = {each.name: each.launches for each in found}
    assert launches['aten::exp'] == 2
    assert launches['aten::sum'] == 1
    assert all(each.microseconds > 0 for each in found)


def test_no_profile(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(speed, 'profiled', lambda *_: [])
    with pytest.raises(Skip, match='profiler sees no kernels'):
        speed.kernel_table(CPU)


def test_names_of_the_kernels():
    """Those that pass over x are known by their names."""
    from mmubn.analysis.machine_code import kernel_name, launches_of_a_step

    launched = launches_of_a_step((2, 4, 8, 8), torch.float32, torch.contiguous_format, 3)
    names = {launch.kernel.fn.__name__ for launch in launched}
    assert {speed.passes_of(name) for name in names} - {None} == set(speed.PASSES.values())
    assert speed.PASSES.keys() <= {kernel_name(launch) for launch in launched}


# As on a GPU


class Anything:
    """In place of a stream or a CUDA graph, which runs nothing by itself here."""

    def __init__(self, *_):
        self.replay = lambda: None

    def __getattr__(self, name):
        return lambda *_: None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU in place of a GPU: the checks do all that they do there, at small sizes and by the C++ kernels."""
    for module in MODULES:
        if hasattr(module, 'is_gpu'):
            monkeypatch.setattr(module, 'is_gpu', lambda device: True)
    for name in ('synchronize', 'set_device', 'empty_cache', 'set_sync_debug_mode', 'reset_peak_memory_stats'):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, 'Stream', Anything)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Anything)
    monkeypatch.setattr(torch.cuda, 'current_stream', Anything)
    for name in ('stream', 'graph'):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda *_: 0)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda *_: (2**40, 2**40))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    init = dist.init_process_group
    monkeypatch.setattr(dist, 'init_process_group', lambda name, **options: init('gloo', **options))
    monkeypatch.setattr(features, 'SHAPE', (2, 4, 4, 5))
    monkeypatch.setattr(features, 'MANY', (6, 4, 5, 6))
    monkeypatch.setattr(layers, 'SHAPES', [(2, 3, 4, 5)])
    monkeypatch.setattr(layers, 'SHAPES_OF_KINDS', [(2, 4, 5, 6)])
    monkeypatch.setattr(detector, 'IMAGES', (2, 3, 64, 96))
    monkeypatch.setattr(detector, 'STEPS', 2)
    small = Setting((2, 3, 64, 64), 'bf16', 'channels_last')
    monkeypatch.setattr(speed, 'SHAPES', [(2, 4, 6, 6), (2, 8, 3, 3)])
    monkeypatch.setattr(speed, 'PROFILED', [Setting((2, 4, 6, 6), 'fp32', 'nchw')])
    monkeypatch.setattr(speed, 'DETECTION', [small, small._replace(dtype='fp32')])
    for name in ('IMAGENET', 'DETECTOR'):
        monkeypatch.setattr(speed, name, small)
    monkeypatch.setattr(speed, 'profiled', lambda *_: [speed.KernelTime('_apply_kernel', 5.0, 1)])
    monkeypatch.setattr(trials, 'resnet50', tiny_network)
    monkeypatch.setattr(measurement, 'LARGE', 2**20)
    for module in (environment, features, kernels, speed):
        monkeypatch.setattr(module, 'need_kernels', lambda device: None)
    yield
    if dist.is_initialized():  # a check that failed within its group
        dist.destroy_process_group()


def tiny_network(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))


# What is not to be had without a GPU, or takes long; the interpreter has the last two.
ELSEWHERE = {
    'torch.compile, reduce-overhead',
    'CUDA graph of a step, replayed with new data',
    'SyncUBN, CUDA graph of a step',
    'a layer beside BatchNorm, as CUDA graphs',
    'torch.compile, one graph, two sizes',
    'opcheck of the operators',
    'Faster R-CNN of torchvision, ten steps in mixed precision',
}


@pytest.mark.parametrize('stage', ['layers', 'features', 'compilation', pytest.param('speed', marks=pytest.mark.slow)])
def test_checks_as_on_a_gpu(as_on_a_gpu, stage):
    found = [
        worker.outcome_of(stage, check, CPU)
        for check in stages.STAGES[stage].checks(CPU)
        if check.name not in ELSEWHERE
    ]
    assert len(found) > 5
    for each in found:
        assert each.status == (SKIPPED if each.name == 'a second device' else OK), each
    if stage == 'speed':
        assert next(each for each in found if each.name == 'the kernels').note.startswith('together 1 times')
        bars = [bar for each in found for bar in each.bars]
        assert [bar.limit for bar in bars] == [1.5, 1.15, 1.1, 1.1, 1.1, 1.1, 150]
        assert all(bar.value > 0 for bar in bars)


def test_the_sanitizer_watches_some_cases(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, 'which', lambda name: '/somewhere/compute-sanitizer')
    names = [check.name for check in kernels.checks(CPU)]
    watched = [check.name for check in sanitizer.checks(CPU)]
    assert len(watched) == sanitizer.CASES
    assert set(watched) < set(names)
    assert sanitizer.prefix()[0] == '/somewhere/compute-sanitizer'


def test_no_sanitizer(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, 'which', lambda name: None)
    with pytest.raises(Skip, match='compute-sanitizer is not installed'):
        sanitizer.checks(CPU)


def test_a_step_is_captured(as_on_a_gpu, monkeypatch):
    """Three times on another stream, then in the graph, whose replay it is from then on."""
    events = []
    monkeypatch.setattr(device, 'on_side_stream', lambda device: recorded(events, 'side stream'))
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph: recorded(events, 'graph'))
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: SimpleNamespace(replay=lambda: events.append('replay')))
    device.captured(lambda: events.append('step'), CPU)()
    step = ['step']
    assert events == ['side stream', *3 * step, 'end', 'graph', *step, 'end', 'replay']


def test_facts(as_on_a_gpu, monkeypatch):
    properties = SimpleNamespace(name='A card', major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: properties)
    monkeypatch.setenv('MMUBN_BACKEND', 'torch')
    found = environment.facts(CPU)
    assert found['GPU'].startswith('A card, compute capability 9.0, 80 GiB, 132 multiprocessors')
    assert 'MMUBN_BACKEND=torch' in found['settings']
    monkeypatch.setattr(environment, '_output', lambda *_: '')
    assert environment.facts(CPU)['driver'] == 'unknown'
    assert environment.facts(CPU)['mmubn'].endswith('commit unknown')


def test_kernels_that_are_not_used_are_found(as_on_a_gpu):
    """Here, as on a GPU where they do not work, layers take another backend."""
    with pytest.raises(RuntimeError, match=r'the Triton kernels are not used, .*; cpp'):
        environment.layer_backend(CPU)


def test_a_machine_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(RuntimeError, match='install gcc, or set CC'):
        environment.c_compiler(CPU)
    monkeypatch.setattr(environment.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    with pytest.raises(RuntimeError, match=r'has no Python\.h'):
        environment.python_headers(CPU)


def test_a_gpu_that_the_kernels_are_not_for(monkeypatch):
    """Nothing is wrong then: layers take torch's operators, and what is about the kernels alone is skipped."""
    monkeypatch.setattr(device.runtime, 'lacking', lambda device: 'the kernels need a newer one')
    gpu = torch.device('cuda', 0)
    for check in (kernels.checks, environment.c_compiler, environment.layer_backend, speed.compilation):
        with pytest.raises(Skip, match='need a newer one'):
            check(gpu)


@contextlib.contextmanager
def recorded(events, name):
    events.append(name)
    yield
    events.append('end')


def test_waiting_is_an_error(as_on_a_gpu, monkeypatch):
    """Even where the check fails, only within it."""
    modes = []
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', modes.append)
    with contextlib.suppress(RuntimeError), device.without_waiting(CPU):
        assert modes == ['error']
        raise RuntimeError('called a synchronizing CUDA operation')
    assert modes == ['error', 'default']


@pytest.mark.parametrize('name', ['no waiting for the device, UBN', 'checkpoint, reentrant', 'SyncUBN, one'])
def test_what_must_not_wait(as_on_a_gpu, monkeypatch, name):
    """A layer that waits is found: here, one whose forward ends in an error while waiting is one."""
    mode = ['default']
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', lambda new: mode.__setitem__(0, new))
    forward = UBN.forward

    def waits(layer, input):
        if mode[0] == 'error':
            raise RuntimeError('called a synchronizing CUDA operation')
        return forward(layer, input)

    monkeypatch.setattr(UBN, 'forward', waits)
    check = next(check for check in features.checks(CPU) if check.name.startswith(name))
    assert 'called a synchronizing CUDA operation' in worker.outcome_of('features', check, CPU).note
