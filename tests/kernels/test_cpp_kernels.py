"""The C++ kernels: their numbers where the layers' tests do not look, and how they are compiled.

The layers of tests/layers run by them wherever a test does not say otherwise.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mmubn
from mmubn import functional as F
from mmubn import kernels
from mmubn.kernels import cpp_library, cpp_ops

ROOT = Path(__file__).parents[2]
LAYOUTS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}
# Beside whole vectors and beyond the pieces in which the kernels work: 16 lanes, 32 rows, 128 channels, 3072 and 4096
# values, 4096 pixels; and maps smaller than the kernel.
SHAPES = ((2, 17, 1, 1), (1, 3, 1, 40), (2, 130, 33, 2), (3, 16, 2, 16), (1, 2, 70, 65), (1, 2, 3, 1100), (17, 5, 4, 3))
SIZES = (1, 3, 5, 7)


def values(*shape, seed=0, dtype=torch.float64, layout='nchw'):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else x


def reference_conv(x, center, scale, kernel, bias):
    u = (x - center[..., None, None]) * scale[..., None, None]
    y = torch.nn.functional.conv2d(u, kernel, padding=kernel.shape[-1] // 2, groups=kernel.shape[0])
    return y + bias[..., None, None]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
class TestNumbers:
    """In float64, where a rounding that is not one stands out."""

    def test_moments(self, shape, layout):
        x = values(*shape, layout=layout) + 3
        for found, expected in zip(cpp_ops.instance_moments(x), F.instance_moments(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(cpp_ops.instance_means(x), F.instance_means(x), rtol=1e-12, atol=1e-12)

    def test_similarity(self, shape, layout):
        x = values(*shape, layout=layout) + 0.5
        for samples in (16, 2):
            total, pairs = cpp_ops.similarity_sums(x, *F.instance_moments(x), samples)
            expected, expected_pairs = F.similarity_sums(x, samples)
            torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
            assert pairs == expected_pairs

    @pytest.mark.parametrize('size', SIZES)
    def test_passes(self, shape, layout, size):
        n, c = shape[:2]
        x, dy = values(*shape, seed=1, layout=layout), values(*shape, seed=2, layout=layout)
        center, scale, slope, offset, a = (values(n, c, seed=seed) for seed in range(3, 8))
        kernel, bias = values(c, 1, size, size, seed=8), values(c, seed=9)
        close = dict(rtol=1e-11, atol=1e-11)

        leaf, taps, bias_map = x.clone().requires_grad_(), kernel.clone().requires_grad_(), bias.requires_grad_()
        expected = reference_conv(leaf, center, scale, taps, bias_map)
        found = cpp_ops.apply(x, center, scale, kernel, bias)
        torch.testing.assert_close(found, expected, **close)
        assert found.is_contiguous(memory_format=LAYOUTS[layout])

        d_x, d_taps = torch.autograd.grad(expected, (leaf, taps), dy)
        g, s, _ = cpp_ops.tap_sums(dy, x, center, size)
        torch.testing.assert_close((scale[..., None] * g).sum(0).view_as(kernel), d_taps, **close)
        ones = torch.ones_like(x).requires_grad_()
        window = torch.nn.functional.conv2d(ones, taps, padding=size // 2, groups=c)
        for sample in range(n):  # S of a sample is the gradient of the kernel for an input of ones
            (expected_s,) = torch.autograd.grad(window[sample], taps, dy[sample], retain_graph=True)
            torch.testing.assert_close(s[sample].reshape(kernel.shape), expected_s, **close)

        found = cpp_ops.input_gradient(dy, x, None, a, center, scale, kernel, slope, offset)
        extra = slope[..., None, None] * (x - a[..., None, None]) + offset[..., None, None]
        torch.testing.assert_close(found, d_x + extra, **close)
        found = cpp_ops.input_gradient(dy, x, None, None, center, scale, kernel, None, None)
        torch.testing.assert_close(found, d_x, **close)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
class TestLayer:
    def run(self, x, dy, backend=None, dtype=torch.float32, size=3):
        torch.manual_seed(0)
        layer = mmubn.UBN(x.shape[1], kernel_size=size).to(dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        leaf = x.detach().requires_grad_()
        if backend:
            with kernels.use_backend(backend):
                y = layer(leaf)
        else:
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
        assert kernels.name_and_reason(shifted, 3)[0] == 'cpp'
        assert all(map(torch.equal, self.run(shifted, dy), self.run(x, dy)))

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_a_value_that_is_not_finite_stays_in_its_map(self, layout, dtype, value):
        """The kernels read whole vectors, beyond the end of a row or a map."""
        x, dy = (values(3, 20, 5, 6, seed=seed, dtype=dtype, layout=layout) for seed in (0, 1))
        center, scale = torch.zeros(3, 20), torch.ones(3, 20)
        kernel = values(20, 1, 3, 3, seed=2).float()
        clean = [cpp_ops.instance_moments(x)[1], *cpp_ops.tap_sums(dy, x, center, 3)[:2]]
        clean.append(cpp_ops.apply(x, center, scale, kernel, torch.zeros(20)))
        x[1, 7, 4, 5] = dy[1, 7, 0, 0] = value
        found = [cpp_ops.instance_moments(x)[1], *cpp_ops.tap_sums(dy, x, center, 3)[:2]]
        found.append(cpp_ops.apply(x, center, scale, kernel, torch.zeros(20)))
        for before, after in zip(clean, found, strict=True):
            assert not after[1, 7].isfinite().all()
            after[1, 7] = before[1, 7]
            assert torch.equal(before, after)


def test_bfloat16_is_rounded_as_by_torch():
    """Every finite float32 with a pattern of its own in the upper 16 bits, and both neighbours of each tie."""
    bits = (torch.arange(2**16)[:, None] * 2**16 + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    x = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    x = x[x.isfinite()]
    c = len(x)
    for layout in LAYOUTS.values():
        # 0 * 0 + bias, with the value to be rounded as the bias
        zeros = torch.zeros(1, c, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=layout)
        y = cpp_ops.apply(zeros, torch.zeros(1, c), torch.zeros(1, c), torch.zeros(c, 1, 1, 1), x[None])
        assert torch.equal(y, x.bfloat16()[None, :, None, None].expand_as(y))


def test_what_they_take():
    x = torch.zeros(2, 4, 3, 3)
    assert kernels.name_and_reason(x, 3) == ('cpp', 'the C++ kernels handle this input')
    assert mmubn.backend_info(mmubn.UBN(4), x) == 'cpp: the C++ kernels handle this input'
    refused = {
        'got float16': (x.half(), 3),
        'kernel sizes 1, 3, 5, 7, got 9': (x, 9),
        'got one on meta': (x.to('meta'), 3),
        'got FakeTensor': (FakeTensorMode().from_tensor(x), 3),
        'plain tensors': (torch._neg_view(x), 3),
    }
    for reason, (tensor, size) in refused.items():
        name, found = kernels.name_and_reason(tensor, size)
        assert name == 'torch'
        assert reason in found
        with kernels.use_backend('cpp'), pytest.raises(ValueError, match='leaves no other'):
            kernels.name_and_reason(tensor, size)
    reasons = []
    torch.vmap(lambda value: reasons.append(kernels.name_and_reason(value, 3)) or value)(x[None])
    assert reasons == [('torch', 'the C++ kernels take plain tensors, got one within a transform of torch.func')]


def test_a_gradient_that_is_a_negation_to_come():
    layer, x = mmubn.UBN(4), values(2, 4, 3, 3, dtype=torch.float32).requires_grad_()
    y = layer(x)
    found = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in (-y.detach(), torch._neg_view(y.detach()))]
    assert torch.equal(*found)


def test_vmap_over_samples():
    layer = mmubn.UBN(4).eval()
    x = values(3, 4, 5, 5, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x[:, None])[:, 0], layer(x))


# Compilation


def test_compiled_once(tmp_path, monkeypatch):
    """A second load finds the file; a change of the source or of the flags does not."""
    source = tmp_path / 'source.cpp'
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(cpp_library, 'SOURCE', source)
    monkeypatch.setattr(cpp_library, 'ARGUMENTS', {})
    folder = tmp_path / 'cache'
    assert cpp_library.load(folder).answer() == 42
    (built,) = folder.iterdir()
    before = built.stat().st_mtime_ns
    cpp_library.load(folder)
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [before]
    source.write_text('extern "C" int answer() { return 43; }\n')
    assert cpp_library.load(folder).answer() == 43
    assert len(list(folder.iterdir())) == 2


def test_a_source_that_does_not_compile(tmp_path, monkeypatch):
    source = tmp_path / 'source.cpp'
    source.write_text('no C++\n')
    monkeypatch.setattr(cpp_library, 'SOURCE', source)
    with pytest.raises(RuntimeError, match=r'cannot compile them: .*error'):
        cpp_library.load(tmp_path / 'cache')
    assert list((tmp_path / 'cache').iterdir()) == []


@pytest.mark.parametrize(
    ('environment', 'reason'),
    [
        (dict(CXX='no-such-compiler'), 'there is no C++ compiler no-such-compiler'),
        (dict(XDG_CACHE_HOME='/dev/null'), 'Not a directory'),
    ],
    ids=['no compiler', 'no folder'],
)
def test_without_them_torch_computes(environment, reason):
    """A layer says why, and works."""
    program = (
        'import torch\n'
        'from mmubn import kernels\n'
        'from mmubn.layers import UBN\n'
        'x = torch.ones(2, 4, 3, 3)\n'
        'print(UBN(4)(x).shape, kernels.name_and_reason(x, 3))\n'
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    result = subprocess.run(
        [sys.executable, '-c', program],
        env=os.environ | environment | {'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'torch.Size([2, 4, 3, 3])' in result.stdout
    assert f"('torch', 'the C++ kernels are not there: {reason}" in result.stdout.replace('[Errno 20] ', '').replace(
        '"', "'"
    )
