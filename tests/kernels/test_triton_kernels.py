"""The Triton kernels: their numbers in Triton's interpreter, and that they compile for the GPUs they are for.

Needs no GPU. The checks of numbers are in ``triton_worker.py``.
"""

import ast
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

triton = pytest.importorskip('triton')

from triton.backends.compiler import GPUTarget  # noqa: E402

from mmubn.kernels import triton_kernels as kernels  # noqa: E402

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name('triton_worker.py')


# as Python starts a script: its folder is where it imports from first
with mock.patch.object(sys, 'path', [str(ROOT / 'tools' / 'analysis_tools'), str(WORKER.parent), *sys.path]):
    inspect_kernels = importlib.import_module('inspect_kernels')
    worker = importlib.import_module('triton_worker')


@pytest.fixture(scope='session')
def report():
    """What the worker found. A process of its own: the interpreter must be on before triton is first imported."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    environment = os.environ | {'TRITON_INTERPRET': '1', 'PYTHONPATH': path}
    result = subprocess.run([sys.executable, WORKER], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize('name', worker.CHECKS)
def test_numbers(report, name):
    assert report[name] is None, report[name]


def test_cases_of_the_numbers_reach_every_tile():
    """Among the layers computed above is one for every number of columns that a lane may have, and tails."""
    tiles = set()
    for (shape, layout, dtype, k, *_), _, _ in worker.layer_cases():
        constants = kernels._Tiling(torch.Size(shape), layout == 'channels_last', dtype.itemsize, k, 1).constants
        tiles.add((layout, k, constants['COLUMNS']))
        tiles.add((layout, k, 'a tail' if constants['TAIL'] else 'none'))
    expected = {
        'nchw': {1: (1, 2, 8), 3: (1, 2, 4, 8), 5: (1, 4), 7: (1, 2)},
        'channels_last': {1: (1, 3, 4, 5, 6), 3: (1, 3, 4, 5, 6, 7), 5: (1, 2), 7: (1, 2)},
    }
    for layout, columns_of in expected.items():
        for k, columns in columns_of.items():
            assert {(layout, k, count) for count in columns} <= tiles, (layout, k)
            assert (layout, k, 'none') in tiles
            assert k == 1 or (layout, k, 'a tail') in tiles, (layout, k)


# Compilation: what the functions launch for meta tensors, so that any size costs nothing.


@pytest.fixture
def launches(monkeypatch):
    recorded = []

    def record(kernel, programs, device, *arguments, num_warps=4, **constants):
        recorded.append(inspect_kernels.Launch(kernel, programs, arguments, constants, num_warps))

    monkeypatch.setattr(kernels, '_launch', record)
    monkeypatch.setattr(kernels, '_lacking', lambda device: None)
    return recorded


def run_layer(shape, layout, dtype, k, kind='rectified', centering=True, calibrate=False, threshold=0.15):
    n, c, h, w = shape
    format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device='meta').to(memory_format=format)
    vector = torch.empty(c, device='meta')
    taps = vector, torch.empty(c, k * k - 1, device='meta') if k > 1 else None
    tau = torch.empty((), device='meta')
    rectification = (vector if centering else None, *(vector if kind else None,) * 2, kind)

    a, v = kernels.instance_moments(x)
    kernels.similarity_sums(x, a, v, 16)
    kernels.coefficients(a, vector, vector, 1e-5, *rectification)
    statistics = (vector, vector, n * h * w, 1e-5, 0.1, *rectification)
    center, scale, mean, var, *_, condensed = kernels.gated_coefficients(x, a, v, 16, tau, 0.1, threshold, *statistics)
    kernels.statistics_coefficients(a, v, *statistics[:2], condensed, *statistics[2:])
    kernels.apply(x, center, scale, *taps, scale if calibrate else vector)
    g, s = kernels.tap_sums(x, x, center, k)
    slope, offset, *_ = kernels.coefficients_backward(
        *(g, s, a, mean, var, 1e-5, condensed, scale, *taps, *rectification[:2]),
        *(vector if calibrate else None, kind, h * w),
    )
    kernels.input_gradient(x, x, a, scale, *taps, slope, offset)


LAYERS = {
    # a large map in both layouts and all dtypes, as in the first stage of a ResNet
    **{
        f'{layout} {inspect_kernels.POINTERS[dtype]}': ((8, 64, 56, 56), layout, dtype, 3)
        for layout in ('nchw', 'channels_last')
        for dtype in kernels.DTYPES
    },
    'k1': ((8, 64, 56, 56), 'nchw', torch.bfloat16, 1, 'instance', False),
    'k1 channels_last': ((8, 64, 56, 56), 'channels_last', torch.bfloat16, 1, None, True),
    'k5': ((2, 48, 14, 14), 'channels_last', torch.bfloat16, 5, 'rectified', True, True),
    'odd sizes': ((3, 5, 7, 1), 'channels_last', torch.float16, 3),
    'k7': ((2, 48, 14, 14), 'nchw', torch.float32, 7),
}
# What does not see x compiles to the same for every dtype and layout.
_compiled = set()


# On the older architecture each dtype and each layout once, not each of both: a compilation takes a second.
COMPILATIONS = [
    *((name, 90) for name in LAYERS if name != 'k7'),
    *((name, 80) for name in ('nchw fp32', 'nchw fp16', 'channels_last bf16', 'k1')),
    *(pytest.param('k7', architecture, marks=pytest.mark.slow) for architecture in (80, 90)),
]


@pytest.mark.parametrize(('name', 'architecture'), COMPILATIONS)
def test_compiles(launches, name, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    run_layer(*LAYERS[name])
    assert launches
    for launch in launches:
        kernel, programs, arguments, constants, num_warps = launch
        assert 0 < programs < 2**31
        key = (inspect_kernels.source_of(kernel, arguments, constants).hash(), num_warps, architecture)
        if key in _compiled:
            continue
        _compiled.add(key)
        compiled = inspect_kernels.compile_launch(launch, architecture)
        assert len(compiled.asm['cubin']) > 0, kernel.arg_names
        # No shared memory that would keep a second program off a multiprocessor; determinism.
        assert compiled.metadata.shared <= 48 * 1024
        assert 'atom' not in compiled.asm['ptx']


def test_every_kernel_is_compiled(launches):
    for arguments in LAYERS.values():
        run_layer(*arguments)
    launched = {kernel.fn.__name__ for kernel, *_ in launches}
    defined = {name for name in vars(kernels) if name.endswith('_kernel')}
    assert launched == defined


def test_large_inputs_are_counted_in_64_bits(launches):
    """More than 2^31 values: offsets of planes and samples are 64 bits wide, and no argument leaves 32."""
    for layout in ('nchw', 'channels_last'):
        run_layer((96, 256, 400, 400), layout, torch.bfloat16, 3)
    for kernel, programs, arguments, _, _ in launches:
        assert programs < 2**31
        assert all(value < 2**31 for value in arguments if isinstance(value, int)), kernel.fn.__name__


# Launching: a GPU driver that compiles and launches nothing shows what would be launched.


class Driver:
    """What Triton asks of a driver; ``launched`` are the functions and arguments that a GPU would be given."""

    def __init__(self):
        self.launched, self.loaded = [], itertools.count()
        self.utils = SimpleNamespace(
            load_binary=lambda *_: ('module', next(self.loaded), 32, 0, 1024),
            get_device_properties=lambda _: {'max_shared_mem': 2**17},
        )

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launched.append((arguments[4], *arguments[:3], arguments[9:]))

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    driver, launch = Driver(), kernels._launch
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(kernels, '_lacking', lambda device: None)
    monkeypatch.setattr(kernels, '_launched', {})

    def launch_on_gpu(kernel, programs, device, *arguments, **constants):
        launch(kernel, programs, torch.device('cuda', 0), *arguments, **constants)

    monkeypatch.setattr(kernels, '_launch', launch_on_gpu)
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(driver)
    yield driver
    vars(triton.runtime.driver).update(before)


def test_a_launch_like_an_earlier_one_is_the_same(gpu):
    """What Triton compiled is launched again with the arguments that Triton itself would give it."""
    x, vector = torch.randn(2, 3, 4, 4), torch.randn(3)
    rows = vector.expand(2, 3).contiguous()

    def launches(x, bias):
        start = len(gpu.launched)
        kernels.apply(x, rows, rows, vector, None, bias)
        a, v = kernels.instance_moments(x)
        kernels.similarity_sums(x, a, v, 16)
        return gpu.launched[start:]

    first, again = launches(x, vector), launches(x, vector)
    assert len(kernels._launched) == len(first) == 4
    for (function, *grid, arguments), (same, *same_grid, same_arguments) in zip(first, again, strict=True):
        assert (function, grid) == (same, same_grid)
        # outputs are new tensors
        assert len(arguments) == len(same_arguments)
        for old, new in zip(arguments, same_arguments, strict=True):
            assert type(old) is type(new)
            assert old.shape == new.shape if isinstance(old, torch.Tensor) else old == new

    # Another alignment, dtype or number is another launch: Triton compiles for these.
    apart = torch.randn(97)[1:].view(2, 3, 4, 4)
    assert apart.data_ptr() % 16
    for other, bias in ((apart, vector), (x.half(), vector), (torch.randn(1, 3, 4, 4), vector), (x, rows)):
        known = len(kernels._launched)
        if other.shape[0] == 2:
            apply = launches(other, bias)[0]
            assert apply[0] != first[0][0]
        else:
            kernels.instance_moments(other)
        assert len(kernels._launched) > known


def test_what_was_launched_is_forgotten_in_time(gpu, monkeypatch):
    monkeypatch.setattr(kernels, 'MOST_LAUNCHED', 2)
    for pixels in range(1, 6):
        kernels.instance_moments(torch.randn(1, 1, 1, pixels))
        assert len(kernels._launched) <= 2


def test_constants_come_in_the_order_of_the_kernel(launches):
    for arguments in LAYERS.values():
        run_layer(*arguments)
    for kernel, _, arguments, constants, _ in launches:
        assert kernel.arg_names[len(arguments) :] == list(constants), kernel.fn.__name__


def test_import_without_triton():
    """The module imports, and says what is missing, where Triton is not installed."""
    program = (
        'import sys, torch; sys.modules["triton"] = None\n'
        'from mmubn.kernels import triton_kernels as kernels\n'
        'print(repr(kernels.supports(torch.ones(1, 1, 1, 1))))\n'
        'try: kernels.instance_moments(torch.ones(1, 1, 1, 1))\n'
        'except ValueError as error: print(repr(str(error)))\n'
    )
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    reason, error = map(ast.literal_eval, result.stdout.splitlines()[-2:])
    assert reason == 'Triton is not installed'
    assert reason in error


def test_refuses_the_cpu():
    """Outside the interpreter a CPU tensor is refused, by the function and by the operator."""
    x = torch.ones(1, 1, 2, 2)
    assert 'GPU' in kernels.supports(x)
    for function in (kernels.instance_moments, torch.ops.mmubn.instance_moments):
        with pytest.raises(ValueError, match='NVIDIA GPU'):
            function(x)
