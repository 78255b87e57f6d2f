"""The Triton kernels compile for the GPUs they are for, and what is launched. Needs no GPU.

Their numbers are tested in test_triton_numbers.py.
"""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip('triton')


from mmubn.analysis.host_time import StandInDriver, stand_in  # noqa: E402
from mmubn.analysis.machine_code import (  # noqa: E402
    POINTERS,
    compile_launch,
    kernel_name,
    launches_of_a_step,
    source_of,
    variant_of,
)
from mmubn.layers import UBN  # noqa: E402
from mmubn.ops import use_backend  # noqa: E402
from mmubn.ops.triton import inputs, operators, runtime  # noqa: E402
from mmubn.ops.triton.running import copy_statistics  # noqa: E402
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
        operators.input_gradient(x, x, None, scale, *taps, None, offset)
        count = torch.empty((), dtype=torch.int64, device='meta')
        copy_statistics(mean, var, vector, vector, tau, tau, condensed, count)

        # the same where the batch is that of several processes
        for max_samples, gate in ((16, (tau, 0.1, threshold, None)), (None, (None, 0.0, 0.0, condensed))):
            part = operators.own_part(x, a, v, max_samples, n * h * w, center_weight)
            *_, num_values, _, _ = operators.gathered_coefficients(
                part.expand(4, -1), a, *gate, vector, vector, 1e-5, 0.1, *rectification
            )
        statistic_sums, offset, *_, d_center_weight, _, _ = operators.own_coefficients_backward(
            products, sums, a, mean, var, 1e-5, scale, *taps, center_weight, scale_weight,
            vector if calibrate else None, scaling, h * w,
        )  # fmt: skip
        operators.statistics_backward(
            statistic_sums, a, mean, condensed, num_values, center_weight, offset, d_center_weight, h * w
        )
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


# A compilation takes a second: here each dtype and each layout on some architecture, the rest with the slow tests.
SLOW = {
    'k7': (80, 90),
    'nchw fp16': (80, 90),
    'channels_last fp16': (90,),
    'nchw fp32': (80,),
    'channels_last fp32': (90,),
    'nchw bf16': (90,),
    'channels_last bf16': (80,),
    'k5': (90,),
    'odd sizes': (90,),
}
COMPILATIONS = [
    pytest.param(name, architecture, marks=[pytest.mark.slow] * (architecture in SLOW.get(name, ())))
    for architecture in (90, 80)
    for name in (LAYERS if architecture == 90 else ('nchw fp32', 'nchw fp16', 'channels_last bf16', 'k1', 'k7'))
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


# How many kernels a network compiles


def maps_of_detection():
    """The shapes of x in the backbone (ResNet-50) and the FPN of a detector that sees 200 batches of two images, of all
    sizes that its training has: the short side 480 to 800, the long side at most 1333, padded to 32."""
    generator = torch.Generator().manual_seed(0)
    maps = set()
    for _ in range(200):
        short, aspect, upright = torch.rand(3, generator=generator).tolist()
        height = 800 if upright < 0.5 else 480 + 320 * short
        width = height * (1 + aspect)
        shrink = min(1.0, 1333 / width)
        size = [-(-int(side * shrink) // 32) * 32 for side in (height, width)]
        size = size[::-1] if upright < 0.25 else size
        for stride, channels in STAGES:
            maps |= {(2, c, *(-(-side // stride) for side in size)) for c in channels}
    return sorted(maps)


# The norms of each stride, by their channels
STAGES = [
    (2, (64,)),
    (4, (64, 128, 256)),
    (8, (128, 256, 512)),
    (16, (256, 512, 1024)),
    (32, (256, 512, 2048)),
    (64, (256,)),
]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', ['nchw', 'channels_last'])
def test_detection_compiles_few_kernels(layout, dtype):
    """Forward and backward of all its layers: at most 40, whatever the sizes of its images."""
    format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
    maps = maps_of_detection()
    assert len(maps) > 500
    variants = {variant_of(launch) for x in maps for launch in launches_of_a_step(x, dtype, format, 3)}
    assert 8 < len(variants) <= 40, sorted(variant[0] for variant in variants)


@pytest.mark.parametrize('layout', ['nchw', 'channels_last'])
def test_alignment_of_parameters_compiles_nothing_new(layout):
    """Parameters that are parts of one flat tensor, as in FSDP and ZeRO, start anywhere."""
    format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
    x = torch.empty(2, 64, 16, 24, device='meta').to(memory_format=format)
    variants = set()
    for first in (0, 1):
        flat = torch.empty(64 * 14 + 1, device='meta')[first:]
        bias, weight, center, scale = flat[:64], flat[64:128], flat[128:256].view(2, 64), flat[256:384].view(2, 64)
        neighbors = flat[384:896].view(64, 8)
        assert bias.data_ptr() % 16 == 4 * first
        with runtime.recorded() as launches:
            operators.apply(x, center, scale, weight, neighbors, bias)
            operators.tap_sums(x, x, center, 3)
            operators.input_gradient(x, x, center, scale, weight, neighbors, scale, center)
            operators.similarity_sums(x, center, scale, 16)
        variants.add(frozenset(map(variant_of, launches)))
    assert len(variants) == 1


def test_only_maps_count_by_their_alignment():
    """What is not of the size of x may be anywhere: a replay relies on that."""
    numbers = {'channels', 'pixels', 'values', 'num_values', 'correction', 'threshold'}
    numbers |= {'eps', 'momentum', 'similarity_momentum'}
    kernels = {name: value for module in MODULES for name, value in vars(module).items() if name.endswith('_kernel')}
    assert len(kernels) > 10
    for name, kernel in kernels.items():
        free = [each for each in kernel.params if each.is_constexpr or each.do_not_specialize]
        aligned = {each.name for each in kernel.params if each not in free and not each.do_not_specialize_on_alignment}
        assert aligned - numbers <= {'x', 'dy', 'y', 'dx'}, name


# What is read and copied


@pytest.mark.parametrize('mode', ['training', 'evaluation'])
def test_strided_tensors_are_copied_once(mode):
    """All kernels read the same copy of x, and of dy, where they cannot read them as they are."""
    layer = UBN(8).train(mode == 'training')
    wide = torch.randn(4, 16, 6, 10, requires_grad=True)
    for x in (wide[:, ::2], wide[:, :8].contiguous()):
        for dy in (torch.randn(4, 8, 6, 10), torch.randn(4, 8, 1, 1).expand(4, 8, 6, 10)):
            with runtime.recorded() as launches, use_backend('triton'):
                layer(x).backward(dy)
            read = {'x': [], 'dy': []}
            for launch in launches:
                arguments = zip(launch.kernel.arg_names, launch.arguments, strict=False)
                for name, tensor in arguments:
                    if name in read:
                        assert tensor.is_contiguous()
                        read[name].append(tensor.data_ptr())
            assert len(read['x']) == (5 if mode == 'training' else 4)
            assert len(read['dy']) == 2
            for name, given in (('x', x), ('dy', dy)):
                assert len(set(read[name])) == 1
                assert (read[name][0] == given.data_ptr()) == given.is_contiguous()


def test_the_gradient_in_evaluation_reads_no_input():
    """Of statistics that do not depend on x it is that of an affine map."""
    layer = UBN(8).to('meta')
    x = torch.empty(4, 8, 6, 10, device='meta', requires_grad=True)
    for training in (True, False):
        layer.train(training)
        with runtime.recorded() as launches, use_backend('triton'):
            layer(x).sum().backward()
        (launch,) = (launch for launch in launches if kernel_name(launch) == 'input_gradient')
        slope = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))['slope']
        assert (slope is not None) == training


# Launching: a GPU driver that compiles and launches nothing shows what would be launched.


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """``launched`` are the functions, grids and arguments that a GPU would be given."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    launched = []
    with stand_in(StandInDriver(lambda function, grid, arguments: launched.append((function, *grid, arguments)))):
        yield SimpleNamespace(launched=launched)


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
