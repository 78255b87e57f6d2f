"""The backend ``cpp``: its numbers where the layers' tests do not look, and which inputs it takes.

The layers of tests/layers run by it wherever a test does not say otherwise. Its boundary and how it is compiled have
files of their own, test_cpp_boundary.py and test_cpp_library.py.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import mmubn
from mmubn import functional, ops
from mmubn.ops.backend import Backend
from mmubn.ops.cpp import CppBackend, boundary
from mmubn.ops.types import (
    Coefficients,
    Form,
    Gate,
    InputCoefficients,
    Moments,
    Parameters,
    Running,
    Statistics,
    Taps,
    TapSums,
)

LAYOUTS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}
# Beside whole vectors and beyond the pieces in which the kernels work: 16 lanes, 32 rows, 128 channels, 3072 and 4096
# values, 4096 pixels; and maps smaller than the kernel.
SHAPES = ((2, 17, 1, 1), (1, 3, 1, 40), (2, 130, 33, 2), (3, 16, 2, 16), (1, 2, 70, 65), (1, 2, 3, 1100), (17, 5, 4, 3))


@pytest.fixture(scope='module')
def cpp():
    backend = CppBackend()
    assert backend.prepare(torch.device('cpu')) is None
    return backend


def values(*shape, seed=0, dtype=torch.float64, layout='nchw'):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else x


def taps_of(kernel):
    return Taps(kernel, None, kernel)


def reference_conv(x, center, scale, kernel, bias):
    u = (x - center[..., None, None]) * scale[..., None, None]
    return F.conv2d(u, kernel, padding=kernel.shape[-1] // 2, groups=kernel.shape[0]) + bias[..., None, None]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
class TestNumbers:
    """In float64, where a rounding that is not one stands out."""

    def test_moments(self, cpp, shape, layout):
        x = values(*shape, layout=layout) + 3
        for found, expected in zip(cpp.instance_moments(x), functional.instance_moments(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(cpp.instance_means(x), functional.instance_means(x), rtol=1e-12, atol=1e-12)

    def test_similarity(self, cpp, shape, layout):
        x = values(*shape, layout=layout) + 0.5
        for samples in (16, 2):
            total, pairs = cpp.similarity_sums(x, Moments(*functional.instance_moments(x)), samples)
            expected, expected_pairs = functional.similarity_sums(x, samples)
            torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
            assert pairs == expected_pairs

    @pytest.mark.parametrize('kernel_size', boundary.KERNEL_SIZES)
    def test_passes(self, cpp, shape, layout, kernel_size):
        n, c = shape[:2]
        x, dy = values(*shape, seed=1, layout=layout), values(*shape, seed=2, layout=layout)
        center, scale, slope, offset, a = (values(n, c, seed=seed) for seed in range(3, 8))
        kernel, bias = values(c, 1, kernel_size, kernel_size, seed=8), values(c, seed=9)
        coefficients, taps = Coefficients(center, scale, None), taps_of(kernel)
        close = dict(rtol=1e-11, atol=1e-11)

        leaf, weight = x.clone().requires_grad_(), kernel.clone().requires_grad_()
        expected = reference_conv(leaf, center, scale, weight, bias)
        found = cpp.apply(x, coefficients, taps, bias)
        torch.testing.assert_close(found, expected.detach(), **close)
        assert found.is_contiguous(memory_format=LAYOUTS[layout])

        d_x, d_kernel = torch.autograd.grad(expected, (leaf, weight), dy)
        tap_sums = cpp.tap_sums(dy, x, center, kernel_size)
        d_taps = (scale[..., None] * tap_sums.products).sum(0)
        torch.testing.assert_close(d_taps.view_as(kernel), d_kernel, **close)
        window = F.conv2d(torch.ones_like(x).requires_grad_(), weight, padding=kernel_size // 2, groups=c)
        for sample in range(n):  # the sums of a sample are the gradient of the kernel for an input of ones
            (expected_sums,) = torch.autograd.grad(window[sample], weight, dy[sample], retain_graph=True)
            torch.testing.assert_close(tap_sums.sums[sample].reshape(kernel.shape), expected_sums, **close)

        found = cpp.input_gradient(dy, x, tap_sums, a, coefficients, taps, InputCoefficients(slope, offset))
        extra = slope[..., None, None] * (x - a[..., None, None]) + offset[..., None, None]
        torch.testing.assert_close(found, d_x + extra, **close)
        found = cpp.input_gradient(dy, x, tap_sums, None, coefficients, taps, InputCoefficients(None, None))
        torch.testing.assert_close(found, d_x, **close)


@pytest.mark.parametrize('centering', [True, False], ids=['centering', 'no centering'])
@pytest.mark.parametrize(
    ('scaling', 'calibrate_bias'),
    [(None, False), *itertools.product(('rectified', 'instance', 'unitized'), (True, False))],
)
class TestSteps:
    """The (N, C) steps against those that they replace, in float64."""

    SHAPE = (3, 70, 4, 5)  # 64 channels at a time

    @pytest.fixture
    def given(self, centering, scaling, calibrate_bias):
        c = self.SHAPE[1]

        def vector(seed, present=True):
            return 0.3 * values(c, seed=seed) if present else None

        parameters = Parameters(
            vector(1),
            vector(2),
            0.3 * values(c, 8, seed=3),
            vector(4, centering),
            vector(5, scaling is not None),
            vector(6, scaling in ('rectified', 'instance')),
        )
        x = values(*self.SHAPE) + 1
        return SimpleNamespace(
            x=x,
            moments=Moments(*functional.instance_moments(x)),
            form=Form(1e-5, scaling, calibrate_bias, 3),
            parameters=parameters,
            running=Running(vector(7), vector(8).abs(), 0.7),
        )

    @pytest.mark.parametrize('threshold', [-1.0, 1.0], ids=['open', 'closed'])
    def test_decide(self, cpp, given, threshold):
        tau = torch.tensor(0.5, dtype=torch.float64)
        gate = Gate(tau, 0.1, threshold, 16)
        arguments = given.form, given.parameters
        for chosen in (gate, torch.tensor(threshold < 0)):
            for running in (
                given.running,
                given.running._replace(momentum=0.2),
                given.running._replace(momentum=torch.tensor(0.25, dtype=torch.float64)),
                Running(given.running.mean.bfloat16(), given.running.var.bfloat16(), 0.7),
            ):
                found = cpp.decide(given.x, given.moments, chosen, *arguments, running)
                expected = Backend.decide(cpp, given.x, given.moments, chosen, *arguments, running)
                torch.testing.assert_close(found[:-1], expected[:-1], rtol=1e-12, atol=1e-12)
                assert found.condensed == (threshold < 0)
                assert (found.running_similarity is None) == (chosen is not gate)

    @pytest.mark.parametrize('condensed', [True, False, None])
    def test_coefficients_and_their_backward(self, cpp, given, condensed):
        c, pixels = self.SHAPE[1], self.SHAPE[2] * self.SHAPE[3]
        mean, var = functional.batch_statistics(*given.moments, given.parameters.center_weight)
        statistics = Statistics(
            *given.moments,
            mean,
            var,
            None if condensed is None else torch.tensor(condensed),
            self.SHAPE[0] * pixels,
        )
        found = cpp.coefficients(statistics, given.form, given.parameters, pixels)
        expected = Backend.coefficients(cpp, statistics, given.form, given.parameters, pixels)
        for value, other in zip(found, expected, strict=True):
            assert (value is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(value, other.expand_as(value), rtol=1e-12, atol=1e-12)

        taps = cpp.taps(given.parameters, torch.float64)
        tap_sums = TapSums(values(3, c, 9, seed=9), values(3, c, 9, seed=10))
        arguments = tap_sums, statistics, given.form, given.parameters, taps, expected, pixels
        of_input, gradients = cpp.coefficients_backward(*arguments)
        expected_of_input, expected_gradients = Backend.coefficients_backward(cpp, *arguments)
        for value, other in zip((*of_input, *gradients), (*expected_of_input, *expected_gradients), strict=True):
            assert (value is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(value.expand_as(other), other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
class TestLayer:
    def run(self, x, dy):
        torch.manual_seed(0)
        layer = mmubn.UBN(x.shape[1])
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        leaf = x.detach().requires_grad_()
        with ops.use_backend('cpp'):
            y = layer(leaf)
        y.backward(dy)
        return [y, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]

    def test_threads_change_no_bit(self, layout, dtype):
        x, dy = (values(5, 150, 40, 30, seed=seed, dtype=dtype, layout=layout) for seed in (0, 1))
        threads, results = torch.get_num_threads(), []
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                results.append(self.run(x, dy))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))

    def test_memory_that_is_not_aligned(self, layout, dtype):
        x, dy = (values(2, 20, 6, 5, seed=seed, dtype=dtype, layout=layout) for seed in (0, 1))
        shifted = torch.zeros(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
        assert shifted.data_ptr() % 64 == x.element_size()
        assert ops.name_and_reason(shifted, 3)[0] == 'cpp'
        assert all(map(torch.equal, self.run(shifted, dy), self.run(x, dy)))

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_a_value_that_is_not_finite_stays_in_its_map(self, cpp, layout, dtype, value):
        """The kernels read whole vectors, beyond the end of a row or a map."""
        x, dy = (values(3, 20, 5, 6, seed=seed, dtype=dtype, layout=layout) for seed in (0, 1))
        center, scale, bias = torch.zeros(3, 20), torch.ones(3, 20), torch.zeros(20)
        taps = taps_of(values(20, 1, 3, 3, seed=2).float())

        def results():
            tap_sums = cpp.tap_sums(dy, x, center, 3)
            y = cpp.apply(x, Coefficients(center, scale, None), taps, bias)
            return [cpp.instance_moments(x).v, tap_sums.products, tap_sums.sums, y]

        clean = results()
        x[1, 7, 4, 5] = dy[1, 7, 0, 0] = value
        for before, after in zip(clean, results(), strict=True):
            assert not after[1, 7].isfinite().all()
            after[1, 7] = before[1, 7]
            assert torch.equal(before, after)


def test_bfloat16_is_rounded_as_by_torch(cpp):
    """Every finite float32 with a pattern of its own in the upper 16 bits, and both neighbours of each tie."""
    bits = (torch.arange(2**16)[:, None] * 2**16 + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    x = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    x = x[x.isfinite()]
    c = len(x)
    nothing = Coefficients(torch.zeros(1, c), torch.zeros(1, c), None)
    for layout in LAYOUTS.values():
        # 0 * 0 + bias, with the value to be rounded as the bias
        zeros = torch.zeros(1, c, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=layout)
        y = cpp.apply(zeros, nothing, taps_of(torch.zeros(c, 1, 1, 1)), x[None])
        assert torch.equal(y, x.bfloat16()[None, :, None, None].expand_as(y))


# Which inputs they take


def test_what_they_take():
    x = torch.zeros(2, 4, 3, 3)
    assert ops.name_and_reason(x, 3) == ('cpp', 'the C++ kernels handle this input')
    assert mmubn.backend_info(mmubn.UBN(4), x) == 'cpp: the C++ kernels handle this input'
    refused = {
        'got float16': (x.half(), 3),
        'kernel sizes 1, 3, 5, 7, got 9': (x, 9),
        'got one on meta': (x.to('meta'), 3),
        'plain tensors': (torch._neg_view(x), 3),
    }
    for reason, (tensor, kernel_size) in refused.items():
        name, found = ops.name_and_reason(tensor, kernel_size)
        assert name == 'torch'
        assert reason in found
        with ops.use_backend('cpp'), pytest.raises(ValueError, match='leaves no other'):
            ops.name_and_reason(tensor, kernel_size)
    # Whatever is asked for, plain operators where something must see them.
    watched = [ops.name_and_reason(FakeTensorMode().from_tensor(x), 3)]
    with ops.use_backend('cpp'):
        torch.vmap(lambda value: watched.append(ops.name_and_reason(value, 3)) or value)(x[None])
    assert [name for name, _ in watched] == ['reference', 'reference']
    assert 'a FakeTensor' in watched[0][1]
    assert 'a transform of torch.func' in watched[1][1]


def test_a_gradient_that_torch_negates_lazily():
    layer, x = mmubn.UBN(4), values(2, 4, 3, 3, dtype=torch.float32).requires_grad_()
    y = layer(x)
    found = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in (-y.detach(), torch._neg_view(y.detach()))]
    assert torch.equal(*found)


def test_vmap_over_samples():
    layer = mmubn.UBN(4).eval()
    x = values(3, 4, 5, 5, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x[:, None])[:, 0], layer(x))
