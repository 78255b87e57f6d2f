"""The backend ``torch``: right in pieces (on a CPU) and in one pass (elsewhere), and there with few launches."""

import weakref

import pytest
import torch
from helpers import LAYOUTS, TOLERANCES, batch, randomize
from norms import (
    CENTER,
    GATE,
    GATED_SHAPES,
    NEIGHBORS,
    SCALE,
    SIGMOID_1,
    SIGMOID_MINUS_1,
    Norm,
    buffers,
    check_against_oracle,
    check_training_then_evaluation,
    run_oracle,
)
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmubn import functional, ops
from mmubn.analysis.launches import Launches, launches_of_a_step
from mmubn.layers import BNET, IEBN, RBN, UBN, UnitizedBN
from mmubn.ops import torch_backend
from mmubn.ops.torch_backend import InOnePass, InPieces
from mmubn.ops.types import Moments

NORMS = {
    'UBN': Norm(UBN, NEIGHBORS | CENTER | SCALE, 'rectified', SIGMOID_1, GATE, GATED_SHAPES),
    'UBN bias calibrated': Norm(
        UBN, NEIGHBORS | CENTER | SCALE, 'rectified', SIGMOID_1, GATE | dict(calibrate_bias=True), GATED_SHAPES
    ),
    'RBN': Norm(RBN, CENTER | SCALE, 'rectified', SIGMOID_1),
    'BNET': Norm(BNET, NEIGHBORS),
    'IEBN': Norm(IEBN, SCALE, 'instance', SIGMOID_MINUS_1),
    'UnitizedBN': Norm(UnitizedBN, {'scale_weight'}, 'unitized'),
}
BACKENDS = ('torch', 'reference')
WAYS = {'in pieces': InPieces(), 'in one pass': InOnePass()}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """One of the two ways, by which all layers compute, whatever the device."""
    found = WAYS[request.param]
    monkeypatch.setattr(torch_backend, '_way', lambda x: found)
    with ops.use_backend('torch'):
        yield found


@pytest.fixture
def one_pass(monkeypatch):
    """All layers compute as on a GPU."""
    monkeypatch.setattr(torch_backend, '_way', lambda x: WAYS['in one pass'])
    with ops.use_backend('torch'):
        yield


def test_which_way():
    assert isinstance(torch_backend._way(torch.empty(1)), InPieces)
    assert isinstance(torch_backend._way(torch.empty(1, device='meta')), InOnePass)


@pytest.mark.parametrize('norm', NORMS.values(), ids=NORMS)
class TestNumbers:
    """In one pass; tests/layers/test_contract.py has the other way, which a CPU takes."""

    def test_training_steps_then_evaluation(self, norm, one_pass):
        check_training_then_evaluation(norm)

    @pytest.mark.parametrize('memory_format', LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.parametrize('dtype', TOLERANCES, ids=lambda dtype: str(dtype).removeprefix('torch.'))
    def test_dtypes_and_layouts(self, norm, one_pass, dtype, memory_format):
        for layer_dtype in {torch.float32, dtype}:
            # Seeds of samples that differ: the variance of two values, where they are near, is near eps.
            for shape, seed in (((3, 5, 4, 7), 1), ((1, 1, 6, 5), 2), ((2, 8, 1, 1), 45)):
                layer = randomize(norm(shape[1])).to(layer_dtype)
                for training in (True, False):
                    x = batch(shape, seed, dtype=dtype).contiguous(memory_format=memory_format)
                    check_against_oracle(norm, layer.train(training), x)

    def test_any_strides(self, norm, one_pass):
        """Of the input and of the gradient: slices and expanded dimensions."""
        wide = batch((4, 3, 12, 10), dtype=torch.float64)
        grad = torch.linspace(-1, 2, 5, dtype=torch.float64).expand(4, 3, 6, 5)
        for x in (wide[:, :, ::2, 1::2], batch((4, 3, 1, 1), dtype=torch.float64).expand(4, 3, 6, 5)):
            layer = randomize(norm(3)).double()
            x = x.detach().requires_grad_()
            _, expected, _ = run_oracle(norm, layer, x, grad, buffers(layer))
            layer(x).backward(grad)
            for name, g in expected.items():
                found = x.grad if name == 'x' else layer.get_parameter(name).grad
                torch.testing.assert_close(found, g, msg=lambda m, name=name: f'gradient of {name}: {m}')

    def test_a_mean_that_is_large_beside_the_deviation(self, norm, one_pass):
        layer = randomize(norm(3))
        if norm.scaling == 'instance':
            layer.scale_weight.data /= 30  # or its sigmoid would be 0 or 1
        check_against_oracle(norm, layer, batch() + 30)

    @pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
    def test_a_bad_batch_does_not_stay(self, norm, one_pass, value):
        layer, x = randomize(norm(3)), batch()
        x[1, 2, 0, 0] = value
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        layer(x)
        assert layer.running_mean.ne(before['running_mean']).tolist() == [True, True, False]
        assert all(buffer.isfinite().all() for buffer in layer.buffers())
        assert not norm.gated or torch.equal(layer.running_similarity, before['running_similarity'])
        check_against_oracle(norm, layer, batch(seed=1))

    def test_the_layout_and_the_dtype_are_those_of_the_input(self, norm, one_pass):
        for layout in LAYOUTS.values():
            for dtype in (torch.float32, torch.bfloat16):
                x = batch((2, 3, 5, 4), dtype=dtype).contiguous(memory_format=layout).requires_grad_()
                y = norm(3)(x)
                y.backward(torch.ones_like(y))
                for tensor in (y, x.grad):
                    assert tensor.dtype == dtype
                    assert tensor.is_contiguous(memory_format=layout)


class TestPasses:
    @pytest.mark.parametrize('kernel_size', [1, 3, 5, 7, 9, 31])
    @pytest.mark.parametrize('shape', [(2, 3, 8, 11), (1, 2, 1, 1), (2, 2, 3, 20), (1, 1, 4, 4)], ids=str)
    def test_kernel_sizes(self, way, kernel_size, shape):
        """Also of kernels that are larger than the map."""
        norm = Norm(BNET, NEIGHBORS if kernel_size > 1 else set(), options=dict(kernel_size=kernel_size))
        for layout in LAYOUTS.values():
            layer = randomize(norm(shape[1]), scale=0.1).double().eval()
            check_against_oracle(norm, layer, batch(shape, dtype=torch.float64).contiguous(memory_format=layout))

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize('mixed', [(), ('cpu',)], ids=['', 'mixed reductions'])
    def test_moments_of_large_means(self, way, dtype, mixed, monkeypatch):
        """No variance is a difference of large numbers, and none is rounded to half precision."""
        monkeypatch.setattr(torch_backend, 'MIXED_REDUCTIONS', mixed)
        x = (batch((2, 3, 40, 30)) + torch.tensor([0.0, 300.0, -2000.0])[:, None, None]).to(dtype)
        for layout in LAYOUTS.values():
            a, v = way.instance_moments(x.contiguous(memory_format=layout))
            assert a.dtype == v.dtype == torch.float32
            exact = x.double()
            torch.testing.assert_close(a.double(), exact.mean((2, 3)), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(v.double(), exact.var((2, 3), correction=0), rtol=1e-5, atol=0)

    def test_similarity(self, way):
        cases = {
            'alike': batch((20, 3, 6, 5), shared=3.0),
            'not alike': batch((20, 3, 6, 5)),
            'opposite': torch.cat([x := batch((1, 3, 6, 5)), -x]),
            'small': 1e-12 * batch(),
            'one sample': batch((1, 3, 6, 5)),
            'a sample of zeros': torch.cat([torch.zeros(1, 3, 6, 5), batch()]),
            'zeros': torch.zeros(3, 3, 6, 5),
            'not finite': torch.cat([torch.full((1, 3, 6, 5), float('inf')), batch()]),
            'an infinite norm': torch.cat([torch.full((1, 3, 6, 5), 3e38), batch()]),
            'NaN': torch.cat([torch.full((1, 3, 6, 5), float('nan')), batch()]),
        }
        for name, x in cases.items():
            for layout in LAYOUTS.values():
                expected, pairs = functional.similarity_sums(x.double(), 16)
                if name == 'an infinite norm':  # in float32 alone
                    expected = torch.tensor(float('nan'))
                x = x.contiguous(memory_format=layout)
                found = way.similarity_sums(x, Moments(*functional.instance_moments(x)), 16)
                assert found.pairs == pairs
                torch.testing.assert_close(
                    found.total.double() / (pairs or 1),
                    expected.double() / (pairs or 1),
                    rtol=1e-6,
                    atol=1e-6,
                    equal_nan=True,
                    msg=lambda m, name=name: f'{name}: {m}',
                )

    @pytest.mark.parametrize('norm', ['UBN', 'BNET'])
    def test_more_values_than_the_depthwise_kernels_take(self, one_pass, norm, monkeypatch):
        layer, state = randomize(NORMS[norm](5)), None
        for most in (4 * 7, 100, 4 * 7 * 15 - 1):
            monkeypatch.setattr(torch_backend, 'MOST_VALUES', most)
            state = check_against_oracle(NORMS[norm], layer, batch((3, 5, 4, 7)), state)

    @pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
    def test_several_pieces(self, layout, monkeypatch):
        monkeypatch.setattr(torch_backend, 'PIECE', 50)
        monkeypatch.setattr(torch_backend, 'COLUMNS', 50)
        x = batch((3, 5, 4, 7)).contiguous(memory_format=layout)
        with ops.use_backend('torch'):
            check_against_oracle(NORMS['UBN'], randomize(NORMS['UBN'](5)), x)


def launches(norm, shape, layout, training, dtype=torch.float32, backend='torch'):
    """Of a forward and of its backward; the layer is in float32, for a float64 input in float64."""
    layer = norm(shape[1]).train(training).to(functional.statistics_dtype(torch.empty(0, dtype=dtype)))
    return launches_of_a_step(layer, shape, dtype, layout, backend)


def changes_of_layout(norm, layout):
    """How often a backward in evaluation changes a layout, of dy and of dx. In the reference that is up to cuDNN."""
    return 2 if layout == torch.channels_last and 'neighbor_weight' in norm.extra else 0


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize('norm', NORMS.values(), ids=NORMS)
class TestLaunches:
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_fewer_than_the_reference(self, norm, layout, training, dtype):
        case = (norm, (32, 64, 56, 56), layout, training, dtype)
        forward, backward = launches(*case)
        reference_forward, reference_backward = launches(*case, 'reference')
        most = reference_forward.total + reference_backward.total
        if not training:
            most += changes_of_layout(norm, layout)
        assert forward.total <= reference_forward.total
        assert forward.total + backward.total <= most

    def test_less_traffic_than_the_reference(self, norm, layout, training):
        case = (norm, (32, 64, 56, 56), layout, training)
        moved, by_reference = (sum(each.bytes_moved for each in launches(*case, backend=b)) for b in BACKENDS)
        bytes_of_x = 4 * 32 * 64 * 56 * 56
        assert moved < (
            by_reference / 2 if training else by_reference + 2 * bytes_of_x * changes_of_layout(norm, layout)
        )

    def test_as_many_for_any_batch_and_map(self, norm, layout, training):
        sizes = [(2, 64, 8, 8), (2, 256, 200, 336), (256, 64, 112, 112), (512, 2048, 7, 7)]
        found = {tuple(each.total for each in launches(norm, size, layout, training)) for size in sizes}
        assert len(found) == 1

    def test_nothing_waits_or_may_be_in_tf32_or_refused(self, norm, layout, training):
        """No value is read on the host; products of matrices may be in TF32, and use_deterministic_algorithms may
        refuse them."""
        used = set()
        for shape in ((4, 8, 6, 6), (2, 8, 1, 1)):
            for each in launches(norm, shape, layout, training):
                used |= set(each.by_operator)
        refused = {'mm', 'bmm', 'addmm', 'baddbmm', 'mv', 'addmv', 'dot', 'cumsum', 'cumsum_', 'avg_pool2d'}
        assert not used & (refused | {'_local_scalar_dense', 'nonzero', 'masked_select', 'item', 'equal'})


class TestDepthwise:
    """The convolutions that a GPU gets: its own depthwise kernels take them, which cuDNN in TF32 would not be."""

    @pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize('shape', [(3, 4, 6, 5), (1, 1, 6, 5), (2, 1, 6, 5), (2, 3, 1, 1), (2, 3, 1, 4)], ids=str)
    @pytest.mark.parametrize('norm', ['UBN', 'BNET'])
    def test_more_than_one_group_in_nchw_and_no_half_precision(self, norm, shape, dtype, layout, monkeypatch):
        monkeypatch.setattr(torch_backend, '_way', lambda x: WAYS['in one pass'])
        seen = []

        class Convolutions(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func._schema.name
                if name == 'aten::convolution':
                    seen.append((args[:2], args[8]))
                elif name == 'aten::convolution_backward':
                    seen.append((args[:3], args[9]))
                return func(*args, **(kwargs or {}))

        for training in (True, False):
            layer = NORMS[norm](shape[1]).train(training)
            x = batch(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
            with ops.use_backend('torch'), Launches(), Convolutions():
                y = layer(x)
                y.backward(torch.ones_like(y))
        assert len(seen) >= 4
        for tensors, groups in seen:
            assert groups == tensors[-1].shape[0] > 1
            for tensor in tensors:
                assert tensor.dtype == torch.float32
                assert suggest_memory_format(tensor) == torch.contiguous_format


class Memory(TorchDispatchMode):
    """The most bytes that are alive at once of all tensors that are made in this context, those given left out."""

    def __init__(self, *given):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize('norm', NORMS.values(), ids=NORMS)
def test_memory_at_the_peak(norm, layout, dtype, monkeypatch):
    """Of a training step, in float32 tensors of the size of x besides x: y, dy and what docs/performance.md says."""
    monkeypatch.setattr(torch_backend, '_way', lambda x: WAYS['in one pass'])
    peaks = []
    for backend in BACKENDS:
        layer, x = norm(16), batch((8, 16, 28, 28), dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        with ops.use_backend(backend), Launches(), Memory(x) as memory:
            y = layer(x)
            dy = torch.empty_like(y)
            y.backward(dy)
        peaks.append(memory.peak / (4 * x.numel()))
    ours, reference = peaks
    size, converts = dtype.itemsize / 4, dtype != torch.float32 or layout == torch.channels_last
    if 'neighbor_weight' not in norm.extra:
        most = 2 + (size if dtype != torch.float32 else 0)
    else:
        most = 3 + size if converts else 2
    assert ours < 2 * size + most + 0.1
    assert ours < reference
