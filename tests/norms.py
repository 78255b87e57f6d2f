"""A norm type under test, and the comparison of a layer with the oracle."""

import copy
from typing import NamedTuple

import oracle
import torch
from helpers import TOLERANCES, batch, randomize

from mmubn.layers import UBN

SHAPES = ((2, 3, 5, 7), (4, 1, 1, 1), (1, 2, 6, 3), (7, 2, 3, 2))
# With more samples than the similarity is taken of, and a map of one row.
GATED_SHAPES = ((2, 3, 5, 7), (4, 1, 1, 1), (1, 2, 6, 3), (20, 2, 3, 2), (3, 4, 1, 9))
NEIGHBORS, CENTER, SCALE = {'neighbor_weight'}, {'center_weight'}, {'scale_weight', 'scale_bias'}
# A similarity that follows each batch: those of `training_batches` close the gate and open it again.
GATE = dict(similarity_momentum=0.9)
SIGMOID_1, SIGMOID_MINUS_1 = (float(torch.sigmoid(torch.tensor(w, dtype=torch.float64))) for w in (1.0, -1.0))


class Norm(NamedTuple):
    """A norm type under test, and what it must be, said without asking it."""

    type: type
    extra: set = frozenset()  # its parameters besides weight and bias
    scaling: str | None = None  # of the oracle
    start: float = 1.0  # a fresh layer is this constant times BatchNorm
    options: dict = {}
    shapes: tuple = SHAPES

    def __call__(self, channels, **options):
        return self.type(channels, **self.options, **options)

    @property
    def name(self):
        return self.type.__name__

    @property
    def gated(self):
        """Whether a similarity decides."""
        return issubclass(self.type, UBN) and self.options.get('threshold', 0.15) is not None


def training_batches(shape, dtype):
    """Batches of similar samples, of others twice, and of similar ones again."""
    return [batch(shape, seed=seed, shared=shared, dtype=dtype) for seed, shared in enumerate((3.0, 0.0, 0.0, 3.0))]


def buffers(layer):
    """The state of a layer, as the oracle takes it."""
    return {name: buffer.double().clone() for name, buffer in layer.named_buffers()}


def run_oracle(norm, layer, x, grad, state):
    """Output, gradients by name (the input's as 'x') and new state."""
    parameters = {name: p.detach().double().clone().requires_grad_() for name, p in layer.named_parameters()}
    x = x.detach().double().clone().requires_grad_()
    gate = ('threshold', 'similarity_momentum', 'similarity_samples') if norm.gated else ()
    y, new_state = oracle.norm(
        x,
        parameters,
        state,
        training=layer.training,
        scaling=norm.scaling,
        eps=float(layer.eps),
        momentum=layer.momentum,
        calibrate_bias=norm.options.get('calibrate_bias', False),
        **{name: getattr(layer, name) for name in gate},
    )
    # Statistics of a 1x1 map, for one, do not depend on a parameter that only shifts the input.
    grads = torch.autograd.grad(y, [x, *parameters.values()], grad.double(), materialize_grads=True)
    return y, dict(zip(['x', *parameters], grads, strict=True)), new_state


def check_against_oracle(norm, layer, x, state=None, tolerance=None):
    """One forward and backward; ``state`` is the oracle's own, by default the layer's. Returns the oracle's new one."""
    tolerance = tolerance or TOLERANCES[x.dtype]
    grad = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype)
    expected, expected_grads, state = run_oracle(norm, layer, x, grad, state or buffers(layer))
    x = x.detach().requires_grad_()
    y = layer(x)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    torch.testing.assert_close(y.double(), expected, **tolerance)

    layer.zero_grad()
    y.backward(grad)
    found = {'x': x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert found.keys() == {'x', 'weight', 'bias', *norm.extra}
    # 1x1 maps with few samples put the variance near eps: gradients there are large, not less exact.
    scale = max(float(g.abs().max()) for g in expected_grads.values()) + 1
    for name, g in expected_grads.items():
        limits = max(tolerance, TOLERANCES[found[name].dtype], key=lambda limits: limits['rtol'])
        torch.testing.assert_close(
            found[name].double() / scale, g / scale, msg=lambda m, name=name: f'gradient of {name}: {m}', **limits
        )
    for name, buffer in layer.named_buffers():
        value = torch.as_tensor(state[name], dtype=torch.float64)
        limits = TOLERANCES[buffer.dtype] if buffer.is_floating_point() else dict(rtol=0, atol=0)
        torch.testing.assert_close(buffer.double(), value, msg=lambda m, name=name: f'{name}: {m}', **limits)
    return state


def check_training_then_evaluation(norm):
    """Training steps, in which a gate closes and opens again, then evaluation; the oracle carries its own state."""
    for shape in norm.shapes:
        layer, state, moved = randomize(norm(shape[1])).double(), None, []
        for x in training_batches(shape, torch.float64):
            before = int(layer.num_batches_tracked)
            state = check_against_oracle(norm, layer, x, state)
            moved.append(int(layer.num_batches_tracked) - before)
        assert moved[0] == 1, f'{shape}: a gate is open at first'
        if norm.gated and shape[0] > 1:
            assert 0 in moved, f'{shape}: the gate must close: {moved}'
            # Samples of one value each are never alike for sure.
            assert moved[-1] == 1 or shape[1:] == (1, 1, 1), f'{shape}: the gate must open again: {moved}'
        else:
            assert moved == [1] * 4, shape
        check_against_oracle(norm, layer.eval(), batch(shape, seed=9, dtype=torch.float64), state)


def check_derivatives(norm):
    """The first and the second derivative of everything by everything, also with a closed gate."""
    for training, similarity in ((True, 0.9), (False, 0.9), *([(True, -0.9)] if norm.gated else [])):
        layer = randomize(norm(2)).double().train(training)
        if norm.gated:
            layer.similarity_momentum = 0.0
            layer.running_similarity.fill_(similarity)
        names, parameters = zip(*layer.named_parameters(), strict=True)

        def call(x, *values, layer=layer, names=names):
            return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, values, strict=True)), x)

        inputs = (batch((2, 2, 3, 2), dtype=torch.float64).requires_grad_(), *parameters)
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
