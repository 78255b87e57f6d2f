"""The layer against the loop oracle in ``tests/oracle.py``, against nn.BatchNorm2d, and its behaviour at the edges."""

import copy
import pickle

import oracle
import pytest
import torch
from torch import nn

from mmubn.layers import UBN

OPTIONS = {
    'default': {},
    'no gate': dict(threshold=None),
    'no centering': dict(centering=False),
    'no scaling': dict(scaling=False),
    'pointwise': dict(kernel_size=1),
    '5x5': dict(kernel_size=5),
    'bias calibrated': dict(calibrate_bias=True),
    'few samples': dict(similarity_samples=2),
    'other momenta': dict(momentum=0.3, similarity_momentum=0.5, eps=1e-3),
}
SHAPES = [(2, 3, 5, 7), (4, 1, 1, 1), (1, 2, 6, 3), (20, 2, 3, 2), (3, 4, 1, 9)]
ALL_OFF = dict(threshold=None, centering=False, scaling=False, kernel_size=1)

# Rounding of one forward and backward pass: statistics and stencil in float32, then one rounding to the dtype of x.
TOLERANCES = {
    torch.float64: dict(rtol=1e-9, atol=1e-9),
    torch.float32: dict(rtol=1e-4, atol=1e-5),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
}


def randomize(layer, seed=0):
    """Parameters away from their initial values, so that every term counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        layer.running_mean.add_(0.3 * torch.randn(layer.running_mean.shape, generator=generator))
        layer.running_var.mul_(torch.rand(layer.running_var.shape, generator=generator) + 0.5)
    return layer


def batch(shape, seed=0, shared=0.0, dtype=torch.float64):
    """Random samples; ``shared`` adds one pattern to all of them, which makes them similar."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    pattern = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    return (x + shared * pattern + 0.5).to(dtype)


def run_oracle(layer, x, grad, state=None):
    """Oracle output, gradients by name (the input's as 'x') and new state, from a layer's parameters and state."""
    parameters = {
        name: p.detach().double().clone().requires_grad_() for name, p in layer.named_parameters(recurse=False)
    }
    state = state or {
        'running_mean': layer.running_mean.double().clone(),
        'running_var': layer.running_var.double().clone(),
        'running_similarity': float(layer.running_similarity),
        'num_batches_tracked': int(layer.num_batches_tracked),
    }
    x = x.detach().double().clone().requires_grad_()
    y, new_state = oracle.ubn(
        x,
        parameters,
        state,
        training=layer.training,
        eps=float(layer.eps),
        momentum=layer.momentum,
        threshold=layer.threshold,
        similarity_momentum=layer.similarity_momentum,
        similarity_samples=layer.similarity_samples,
        calibrate_bias=layer.calibrate_bias,
    )
    grads = torch.autograd.grad(y, [x, *parameters.values()], grad.double(), allow_unused=True)
    return y, dict(zip(['x', *parameters], grads, strict=True)), new_state


def check_against_oracle(layer, x, tolerance, state=None):
    grad = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype)
    expected, expected_grads, new_state = run_oracle(layer, x, grad, state)
    x = x.detach().requires_grad_()
    y = layer(x)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    torch.testing.assert_close(y.double(), expected, **tolerance)

    layer.zero_grad()
    y.backward(grad)
    scale = max(float(g.abs().max()) for g in expected_grads.values() if g is not None) + 1
    found = {'x': x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    for name, g in expected_grads.items():
        g = torch.zeros_like(found[name], dtype=torch.float64) if g is None else g
        torch.testing.assert_close(
            found[name].double() / scale, g / scale, msg=lambda m, name=name: f'gradient of {name}: {m}', **tolerance
        )

    for name in ('running_mean', 'running_var'):
        torch.testing.assert_close(getattr(layer, name).double(), new_state[name], rtol=1e-5, atol=1e-6)
    assert float(layer.running_similarity) == pytest.approx(new_state['running_similarity'], abs=1e-5)
    assert int(layer.num_batches_tracked) == new_state['num_batches_tracked']
    return new_state


class TestAgainstOracle:
    @pytest.mark.parametrize('shape', SHAPES, ids=str)
    @pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_float64(self, shape, options, training):
        layer = randomize(UBN(shape[1], **options).double()).train(training)
        check_against_oracle(layer, batch(shape), TOLERANCES[torch.float64])

    @pytest.mark.parametrize('gate', ['open', 'closed'])
    @pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
    def test_gate(self, options, gate):
        layer = randomize(UBN(3, **options).double())
        layer.running_similarity.fill_(0.9 if gate == 'open' else -0.9)
        check_against_oracle(layer, batch((4, 3, 6, 5)), TOLERANCES[torch.float64])
        moved = layer.num_batches_tracked.item()
        assert moved == (1 if gate == 'open' or layer.threshold is None else 0)

    @pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
    @pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize('shape', [(4, 3, 6, 5), (2, 8, 1, 1), (3, 5, 11, 2)], ids=str)
    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_dtypes_and_layouts(self, shape, dtype, memory_format, training):
        layer = randomize(UBN(shape[1])).train(training)
        if dtype == torch.float64:
            layer.double()
        x = batch(shape, dtype=dtype).contiguous(memory_format=memory_format)
        # 1x1 maps with two samples put the variance near eps: gradients there are large, not less exact.
        check_against_oracle(layer, x, TOLERANCES[dtype])

    def test_forty_steps_cross_the_gate_both_ways(self):
        """State carried by layer and oracle separately, through batches that open, close and open the gate again."""
        layer = randomize(UBN(3, similarity_momentum=0.3)).double()
        state, gates = None, []
        for step in range(40):
            shared = 3.0 if step < 10 or step >= 25 else 0.0
            x = batch((4, 3, 6, 5), seed=step, shared=shared) - 0.5
            state = check_against_oracle(layer, x, TOLERANCES[torch.float64], state)
            gates.append(state['running_similarity'] > layer.threshold)
        flips = [i for i in range(1, 40) if gates[i] != gates[i - 1]]
        assert len(flips) == 2, f'the batches should close and reopen the gate once each, it flipped at steps {flips}'

    def test_gradcheck(self):
        for options in (*OPTIONS.values(), dict(kernel_size=7)):
            for similarity in (0.9, -0.9):
                layer = randomize(UBN(2, **options).double())
                layer.running_similarity.fill_(similarity)
                parameters = dict(layer.named_parameters())

                def call(x, *values, layer=layer, names=tuple(parameters)):
                    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
                    return torch.func.functional_call(layer, buffers | dict(zip(names, values, strict=True)), x)

                x = batch((2, 2, 4, 3)).requires_grad_()
                assert torch.autograd.gradcheck(call, (x, *parameters.values()))
                assert torch.autograd.gradgradcheck(call, (x, *parameters.values()))


class TestAsBatchNorm:
    @pytest.mark.parametrize('shape', [(2, 3, 5, 7), (1, 2, 6, 3), (4, 1, 1, 1), (0, 3, 4, 4)], ids=str)
    @pytest.mark.parametrize('momentum', [0.1, 1.0])
    def test_all_off_is_batch_norm(self, shape, momentum):
        channels = shape[1]
        ours = randomize(UBN(channels, momentum=momentum, **ALL_OFF).double())
        theirs = nn.BatchNorm2d(channels, momentum=momentum).double()
        shared = {k: v for k, v in ours.state_dict().items() if k != 'running_similarity'}
        theirs.load_state_dict(shared)
        for step in range(3):
            x = [batch(shape, seed=step).requires_grad_() for _ in range(2)]
            outputs = [norm(v) for norm, v in zip((ours, theirs), x, strict=True)]
            for y in outputs:
                (y * y.detach().cos()).sum().backward()
            torch.testing.assert_close(outputs[0], outputs[1])
            torch.testing.assert_close(x[0].grad, x[1].grad)
            torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
            torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
            if shape[0]:  # nn.BatchNorm2d counts an empty batch; UBN leaves the state alone
                for name in shared:
                    torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), check_dtype=False)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x[0]), theirs(x[1]))

    @pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
    def test_batch_norm_state_dict_loads_to_the_same_function(self, options):
        theirs = nn.BatchNorm2d(5)
        for seed in range(3):
            theirs(batch((4, 5, 6, 6), seed=seed, dtype=torch.float32))
        with torch.no_grad():
            theirs.weight.uniform_(-2, 2)
            theirs.bias.uniform_(-2, 2)
        state_dict = theirs.state_dict()
        before = copy.deepcopy(state_dict)
        ours = randomize(UBN(5, **{'threshold': 0.15, **options, 'eps': 1e-5, 'momentum': 0.1}))
        ours.load_state_dict(state_dict)
        for key, value in before.items():
            assert torch.equal(state_dict[key], value), f'loading wrote into {key} of the checkpoint'
        x = batch((4, 5, 6, 6), seed=9, dtype=torch.float32)
        torch.testing.assert_close(ours(x), theirs(x))  # training: a fresh gate is open
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

    def test_own_state_dict_round_trip(self):
        layer = randomize(UBN(4))
        layer(batch((4, 4, 5, 5), dtype=torch.float32))
        other = UBN(4)
        other.load_state_dict(layer.state_dict())
        for key, value in layer.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key

    def test_incomplete_own_state_dict_is_an_error(self):
        state_dict = UBN(4).state_dict()
        del state_dict['scale_bias']
        with pytest.raises((RuntimeError, ValueError), match='scale_bias'):
            UBN(4).load_state_dict(state_dict)

    def test_a_fresh_layer_is_sigmoid_one_times_batch_norm(self):
        x = batch((4, 3, 5, 5), dtype=torch.float32)
        torch.testing.assert_close(UBN(3)(x), torch.sigmoid(torch.tensor(1.0)) * nn.BatchNorm2d(3)(x))

    def test_is_a_batch_norm_to_the_ecosystem(self):
        layer = UBN(4)
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        assert not list(layer.children())
        assert layer.weight.shape == layer.bias.shape == (4,)


class TestState:
    @pytest.mark.parametrize('shape', [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3, 0, 0)], ids=str)
    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_empty_batch(self, shape, training):
        layer = UBN(3).train(training)
        before = copy.deepcopy(layer.state_dict())
        x = torch.empty(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == shape
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), f'{name} must have a zero gradient'
        assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())

    def test_evaluation_moves_nothing(self):
        layer = randomize(UBN(3)).eval()
        before = copy.deepcopy(layer.state_dict())
        layer(batch((4, 3, 5, 5), dtype=torch.float32))
        assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())

    def test_evaluation_does_not_depend_on_the_batch(self):
        layer = randomize(UBN(3)).eval()
        x = batch((4, 3, 5, 5), dtype=torch.float32)
        torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]))

    def test_the_input_is_not_written_to(self):
        x = batch((4, 3, 5, 5), dtype=torch.float32)
        before = x.clone()
        UBN(3)(x)
        assert torch.equal(x, before)

    def test_one_sample_is_no_evidence(self):
        layer = UBN(3)
        layer.running_similarity.fill_(0.4)
        layer(batch((1, 3, 5, 5), dtype=torch.float32))
        assert layer.running_similarity.item() == pytest.approx(0.4)
        assert layer.num_batches_tracked == 1

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_a_bad_batch_does_not_stay(self, value):
        layer = UBN(3)
        x = batch((4, 3, 5, 5), dtype=torch.float32)
        x[1, 2, 0, 0] = value
        layer(x)
        assert layer.running_similarity == 1
        assert layer.running_mean.isfinite().all()
        assert layer.running_var.isfinite().all()
        assert layer.running_mean[0] != 0, 'the other channels have finite statistics and must learn from them'

    @pytest.mark.parametrize('momentum', [None, 1.0])
    def test_re_estimation_takes_the_batch_whatever_the_gate_says(self, momentum):
        layer = UBN(3)
        layer.running_similarity.fill_(-0.5)
        layer.momentum = momentum
        x = batch((4, 3, 5, 5), dtype=torch.float32)
        layer(x)
        torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)))
        assert layer.running_similarity == -0.5

    def test_two_calls_before_one_backward(self):
        """A closed call, an open call on the same buffers, then the backward of both (shared heads)."""
        x = [batch((4, 3, 5, 5), seed=s, shared=5.0 * s, dtype=torch.float32) for s in (0, 1)]

        def gradients(together):
            layer = randomize(UBN(3, similarity_momentum=1.0))
            losses = []
            for value in x:
                losses.append(layer(value).square().sum())
                if not together:
                    losses.pop().backward()
            if together:
                sum(losses).backward()
            return [p.grad for p in layer.parameters()]

        for one, other in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(one, other)

    def test_reset_parameters(self):
        layer = randomize(UBN(3))
        layer(batch((4, 3, 5, 5), dtype=torch.float32))
        layer.reset_parameters()
        fresh = UBN(3).state_dict()
        assert all(torch.equal(fresh[k], v) for k, v in layer.state_dict().items())

    def test_copies_keep_the_running_similarity(self):
        layer = UBN(3)
        layer(batch((4, 3, 5, 5), dtype=torch.float32))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other.running_similarity, layer.running_similarity)
            assert other.running_similarity != 1

    def test_autocast_keeps_float32_inside(self):
        layer = randomize(UBN(3))
        x = batch((4, 3, 5, 5), dtype=torch.float32)
        expected = copy.deepcopy(layer)(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, expected, rtol=0, atol=0)

    def test_float16_near_overflow(self):
        layer = UBN(8)
        x = (30000 + 20000 * batch((4, 8, 32, 32))).clamp(-60000, 60000).half()
        y = layer(x)
        assert y.isfinite().all()
        assert 0 < layer.running_similarity < 1

    def test_no_host_synchronisation(self):
        """Meta tensors hold no values: a read of the gate on the host would raise."""
        layer = UBN(3).to('meta')
        x = torch.empty(4, 3, 5, 5, device='meta', requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape


class TestBadInput:
    @pytest.mark.parametrize(
        ('name', 'value'),
        [
            ('num_features', 0),
            ('num_features', 2.5),
            ('eps', 0),
            ('eps', 'small'),
            ('momentum', None),
            ('momentum', '0.1'),
            ('momentum', float('nan')),
            ('momentum', 1.5),
            ('threshold', 1.01),
            ('threshold', -2),
            ('threshold', '0.15'),
            ('similarity_momentum', -0.1),
            ('similarity_samples', 1),
            ('similarity_samples', 2.0),
            ('kernel_size', 2),
            ('kernel_size', 0),
            ('kernel_size', -3),
            ('kernel_size', (3, 3)),
            ('centering', 'yes'),
        ],
    )
    def test_construction_names_the_argument_and_the_value(self, name, value):
        arguments = {'num_features': 4, name: value}
        with pytest.raises(ValueError, match=name) as error:
            UBN(**arguments)
        assert repr(value) in str(error.value)

    def test_unknown_keyword(self):
        with pytest.raises(TypeError, match='apply_act'):
            UBN(4, apply_act=True)

    def test_calibrate_bias_without_scaling(self):
        with pytest.raises(ValueError, match='calibrate_bias'):
            UBN(4, scaling=False, calibrate_bias=True)

    @pytest.mark.parametrize('shape', [(2, 4), (2, 4, 5), (4, 5, 5), (2, 4, 5, 5, 5)], ids=str)
    def test_not_four_dimensional(self, shape):
        with pytest.raises(ValueError, match='UBN expected') as error:
            UBN(4)(torch.zeros(shape))
        assert '(N, 4, H, W)' in str(error.value)
        assert str(shape) in str(error.value)

    def test_other_channel_count(self):
        with pytest.raises(ValueError, match=r'\(N, 4, H, W\), got \(2, 3, 5, 5\)'):
            UBN(4)(torch.zeros(2, 3, 5, 5))

    def test_integers(self):
        with pytest.raises(ValueError, match='int64'):
            UBN(4)(torch.zeros(2, 4, 5, 5, dtype=torch.int64))

    def test_one_value_per_channel(self):
        layer = UBN(4)
        with pytest.raises(ValueError, match=r'\(1, 4, 1, 1\)'):
            layer(torch.zeros(1, 4, 1, 1))
        assert layer.eval()(torch.zeros(1, 4, 1, 1)).shape == (1, 4, 1, 1)
