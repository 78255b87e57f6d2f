"""The contract of a backend: a class with the five passes over x is enough for every norm and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from helpers import batch, randomize
from norms import (
    CENTER,
    GATE,
    GATED_SHAPES,
    NEIGHBORS,
    SCALE,
    SIGMOID_1,
    Norm,
    check_against_oracle,
    check_derivatives,
    check_training_then_evaluation,
)

from mmubn import functional, ops
from mmubn.layers import RBN, UBN, UnitizedBN
from mmubn.ops import Backend, Moments, Similarity, dispatch
from mmubn.ops.types import TapSums

NORMS = {
    'UBN': Norm(UBN, NEIGHBORS | CENTER | SCALE, 'rectified', SIGMOID_1, GATE, GATED_SHAPES),
    'UBN bias calibrated': Norm(
        UBN, NEIGHBORS | CENTER | SCALE, 'rectified', SIGMOID_1, GATE | dict(calibrate_bias=True), GATED_SHAPES
    ),
    'RBN': Norm(RBN, CENTER | SCALE, 'rectified', SIGMOID_1),
    'UnitizedBN': Norm(UnitizedBN, {'scale_weight'}, 'unitized'),  # the one that needs the variances in evaluation
}
PASSES = ('instance_moments', 'similarity_sums', 'apply', 'tap_sums', 'input_gradient')


def convolve(x, taps):
    kernel_size = taps.kernel.shape[-1]
    return F.conv2d(x, taps.kernel, padding=kernel_size // 2, groups=x.shape[1])


class PlainBackend(Backend):
    """The five passes, each as its docstring defines it; counts their calls."""

    name = 'plain'

    def __init__(self):
        self.calls = dict.fromkeys(PASSES, 0)

    def instance_moments(self, x):
        self.calls['instance_moments'] += 1
        return Moments(*functional.instance_moments(x))

    def similarity_sums(self, x, moments, max_samples):
        self.calls['similarity_sums'] += 1
        return Similarity(*functional.similarity_sums(x, max_samples))

    def apply(self, x, coefficients, taps, bias):
        self.calls['apply'] += 1
        return convolve(functional.normalize(x, coefficients.center, coefficients.scale), taps) + bias[..., None, None]

    def tap_sums(self, dy, x, center, kernel_size):
        self.calls['tap_sums'] += 1
        dy, half = dy.to(center.dtype), kernel_size // 2
        height, width = x.shape[2:]
        u = F.pad(x.to(center.dtype) - center[..., None, None], (half,) * 4)
        inside = F.pad(torch.ones_like(dy), (half,) * 4)
        shifts = [(i, j) for i in range(kernel_size) for j in range(kernel_size)]
        products = [(u[..., i : i + height, j : j + width] * dy).sum((2, 3)) for i, j in shifts]
        sums = [(inside[..., i : i + height, j : j + width] * dy).sum((2, 3)) for i, j in shifts]
        return TapSums(torch.stack(products, 2), torch.stack(sums, 2))

    def input_gradient(self, dy, x, tap_sums, a, coefficients, taps, of_input):
        self.calls['input_gradient'] += 1
        turned = taps._replace(kernel=taps.kernel.flip(2, 3))
        dx = coefficients.scale[..., None, None] * convolve(dy.to(taps.kernel.dtype), turned)
        if of_input.slope is not None:
            dx = dx + of_input.slope[..., None, None] * (x - a[..., None, None])
        return dx if of_input.offset is None else dx + of_input.offset[..., None, None]


@pytest.fixture
def plain(monkeypatch):
    """A new backend, by which all layers compute."""
    backend = PlainBackend()
    monkeypatch.setitem(dispatch.BACKENDS, backend.name, backend)
    with ops.use_backend('plain'):
        yield backend


@pytest.mark.parametrize('norm', NORMS.values(), ids=NORMS)
class TestOneSubclassIsABackend:
    def test_training_steps_then_evaluation(self, norm, plain):
        check_training_then_evaluation(norm)
        used = {name for name, count in plain.calls.items() if count}
        assert used == set(PASSES) - (set() if norm.gated else {'similarity_sums'})

    def test_gradients_of_gradients(self, norm, plain):
        check_derivatives(norm)

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
    def test_dtypes(self, norm, plain, dtype):
        for training in (True, False):
            layer = randomize(norm(5)).train(training)
            check_against_oracle(norm, layer, batch((3, 5, 4, 7), seed=1, dtype=dtype))

    def test_an_empty_batch(self, norm, plain):
        """Reaches no pass."""
        for training in (True, False):
            layer, x = randomize(norm(3)).train(training), torch.empty(0, 3, 4, 4, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert y.shape == x.grad.shape == (0, 3, 4, 4)
            assert all(parameter.grad.eq(0).all() for parameter in layer.parameters())
        assert not any(plain.calls.values())


class TestContract:
    def test_what_a_backend_must_define(self):
        own = {name for name in vars(PlainBackend) if not name.startswith('_')} - {'name'}
        assert own == set(PASSES)
        x, backend = batch((2, 3, 4, 4)), Backend()
        moments = Moments(*functional.instance_moments(x))
        with pytest.raises(NotImplementedError):
            backend.instance_moments(x)
        with pytest.raises(NotImplementedError):
            backend.similarity_sums(x, moments, 16)
        with pytest.raises(NotImplementedError):
            backend.apply(x, None, None, None)
        with pytest.raises(NotImplementedError):
            backend.tap_sums(x, x, moments.a, 3)
        with pytest.raises(NotImplementedError):
            backend.input_gradient(x, x, None, None, None, None, None)

    def test_it_is_chosen_by_name_alone(self, monkeypatch):
        monkeypatch.setitem(dispatch.BACKENDS, 'plain', PlainBackend())
        x = batch()
        assert ops.name_and_reason(x, 3)[0] != 'plain'
        with ops.use_backend('plain'):
            assert ops.choose_backend(x, 3) is dispatch.BACKENDS['plain']
            assert ops.backend_info(UBN(3), x) == "plain: use_backend('plain')"
        assert ops.name_and_reason(x, 3)[0] != 'plain'

    def test_there_is_no_such_backend(self):
        known = 'reference, torch, triton, cpp'
        with (
            pytest.raises(ValueError, match=f"there is no backend 'plain': expected one of {known}"),
            ops.use_backend('plain'),
        ):
            pass

    def test_contexts_end_where_they_began(self):
        x = batch()
        with ops.use_backend('torch'):
            with ops.use_backend('reference'):
                assert ops.name_and_reason(x, 3)[0] == 'reference'
            assert ops.name_and_reason(x, 3)[0] == 'torch'
            with pytest.raises(KeyError), ops.use_backend('reference'):
                raise KeyError
            assert ops.name_and_reason(x, 3)[0] == 'torch'
