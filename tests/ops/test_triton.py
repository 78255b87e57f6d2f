"""The Triton kernels compile for the GPUs they are for, and what is launched. Needs no GPU.

Their numbers are tested in test_triton_numbers.py.
"""

import ast
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip('triton')

from triton.backends.compiler import GPUTarget  # noqa: E402

from mmubn.analysis.machine_code import POINTERS, compile_launch, source_of  # noqa: E402
from mmubn.ops import use_backend  # noqa: E402
from mmubn.ops.triton import inputs, operators, runtime  # noqa: E402
from mmubn.ops.triton.tiling import MapArguments  # noqa: E402

ROOT = Path(__file__).parents[2]
MODULES = [module for name, module in sys.modules.items() if name.startswith('mmubn.ops.triton.')]


# Compilation: what the functions launch for meta tensors, so that any size costs nothing.


def launches_of(shape, layout, dtype, k, scaling='rectified', centering=True, calibrate=False, threshold=0.15):
    """What every function launches for a layer of this form."""
    n, c, h, w = shape
    format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device='meta').to(memory_format=format)
    vector = torch.empty(c, device='meta')
    taps = vector, torch.empty(c, k * k - 1, device='meta') if k > 1 else None
    tau = torch.empty((), device='meta')
    center_weight, scale_weight = vector if centering else None, vector if scaling else None
    rectification = (center_weight, scale_weight, scale_weight, scaling)

    with runtime.recorded() as launches:
        a, v = operators.instance_moments(x)
        operators.similarity_sums(x, a, v, 16)
        operators.coefficients(a, vector, vector, 1e-5, *rectification)
        numbers = (n * h * w, 1e-5, 0.1)
        center, scale, mean, var, *_, condensed = operators.gated_coefficients(
            x, a, v, 16, tau, 0.1, threshold, vector, vector, *numbers, *rectification
        )
        operators.statistics_coefficients(a, v, vector, vector, condensed, *numbers, *rectification)
        operators.apply(x, center, scale, *taps, scale if calibrate else vector)
        products, sums = operators.tap_sums(x, x, center, k)
        slope, offset, *_ = operators.coefficients_backward(
            products, sums, a, mean, var, 1e-5, condensed, scale, *taps, center_weight, scale_weight,
            vector if calibrate else None, scaling, h * w,
        )  # fmt: skip
        operators.input_gradient(x, x, a, scale, *taps, slope, offset)
    return launches


LAYERS = {
    # a large map in both layouts and all dtypes, as in the first stage of a ResNet
    **{
        f'{layout} {POINTERS[dtype]}': ((8, 64, 56, 56), layout, dtype, 3)
        for layout in ('nchw', 'channels_last')
        for dtype in inputs.DTYPES
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
def test_compiles(name, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    launches = launches_of(*LAYERS[name])
    assert launches
    for launch in launches:
        assert 0 < launch.programs < 2**31
        key = (source_of(launch).hash(), launch.num_warps, architecture)
        if key in _compiled:
            continue
        _compiled.add(key)
        compiled = compile_launch(launch, architecture)
        assert len(compiled.asm['cubin']) > 0, launch.kernel.arg_names
        # No shared memory that would keep a second program off a multiprocessor; determinism.
        assert compiled.metadata.shared <= 48 * 1024
        assert 'atom' not in compiled.asm['ptx']


def test_every_kernel_is_compiled():
    launched = {launch.kernel.fn.__name__ for arguments in LAYERS.values() for launch in launches_of(*arguments)}
    defined = {name for module in MODULES for name in vars(module) if name.endswith('_kernel')}
    assert launched == defined


def test_large_inputs_are_counted_in_64_bits():
    """More than 2^31 values: offsets of planes and samples are 64 bits wide, and no argument leaves 32."""
    for layout in ('nchw', 'channels_last'):
        for launch in launches_of((96, 256, 400, 400), layout, torch.bfloat16, 3):
            assert launch.programs < 2**31
            integers = [value for value in launch.arguments if isinstance(value, int)]
            assert all(value < 2**31 for value in integers), launch.kernel.fn.__name__


def test_arguments_come_in_the_order_of_the_kernel():
    for arguments in LAYERS.values():
        for launch in launches_of(*arguments):
            name, parameters = launch.kernel.fn.__name__, launch.kernel.arg_names
            assert parameters[len(launch.arguments) :] == list(launch.constants), name
            if 'ROWS' in launch.constants:
                fields = list(MapArguments._fields)
                assert parameters[len(launch.arguments) - len(fields) : len(launch.arguments)] == fields, name


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
    driver, launch = Driver(), runtime.launch
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(runtime, 'lacking', lambda device: None)
    monkeypatch.setattr(runtime, '_launched', {})

    def launch_on_gpu(kernel, programs, device, *arguments, **constants):
        launch(kernel, programs, torch.device('cuda', 0), *arguments, **constants)

    monkeypatch.setattr(runtime, 'launch', launch_on_gpu)
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(driver)
    yield driver
    vars(triton.runtime.driver).update(before)


def test_a_launch_like_an_earlier_one_is_the_same(gpu):
    """What Triton compiled is launched again with the arguments that Triton itself would give it."""
    x, vector = torch.randn(2, 3, 4, 4), torch.randn(3)
    matrix = vector.expand(2, 3).contiguous()

    def launches(x, bias):
        start = len(gpu.launched)
        operators.apply(x, matrix, matrix, vector, None, bias)
        a, v = operators.instance_moments(x)
        operators.similarity_sums(x, a, v, 16)
        return gpu.launched[start:]

    first, again = launches(x, vector), launches(x, vector)
    assert len(runtime._launched) == len(first) == 4
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
    for other, bias in ((apart, vector), (x.half(), vector), (torch.randn(1, 3, 4, 4), vector), (x, matrix)):
        known = len(runtime._launched)
        if other.shape[0] == 2:
            apply = launches(other, bias)[0]
            assert apply[0] != first[0][0]
        else:
            operators.instance_moments(other)
        assert len(runtime._launched) > known


def test_what_was_launched_is_forgotten_in_time(gpu, monkeypatch):
    monkeypatch.setattr(runtime, 'MOST_LAUNCHED', 2)
    for pixels in range(1, 6):
        operators.instance_moments(torch.randn(1, 1, 1, pixels))
        assert len(runtime._launched) <= 2


def test_nothing_is_launched_while_launches_are_recorded(gpu):
    x = torch.randn(1, 1, 1, 1)
    with runtime.recorded() as outer:
        operators.instance_moments(x)
        with runtime.recorded() as inner:
            operators.instance_moments(x)
        operators.instance_moments(x)
    assert (len(outer), len(inner), len(runtime._launched)) == (2, 1, 0)
    operators.instance_moments(x)
    assert (len(outer), len(inner), len(runtime._launched)) == (2, 1, 1)


def test_import_without_triton():
    """The package imports, and says what is missing, where Triton is not installed."""
    program = (
        'import sys, torch; sys.modules["triton"] = None\n'
        'from mmubn.ops.triton import inputs, operators\n'
        'print(repr(inputs.problem(torch.ones(1, 1, 1, 1))))\n'
        'try: operators.instance_moments(torch.ones(1, 1, 1, 1))\n'
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
    assert 'GPU' in inputs.problem(x)
    for function in (operators.instance_moments, torch.ops.mmubn.instance_moments):
        with pytest.raises(ValueError, match='NVIDIA GPU'):
            function(x)


def test_no_backend_by_a_name_that_there_is_not():
    with pytest.raises(ValueError, match='reference, torch, triton, cpp'), use_backend('cuda'):
        pass
