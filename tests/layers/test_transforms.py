"""Forward-mode differentiation, torch.func and modes that watch operators: as with nn.BatchNorm2d in the same place."""

import copy

import pytest
import torch
from helpers import batch, randomize
from networks import TYPES
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

from mmubn import backend_info

EACH_TYPE = pytest.mark.parametrize('norm', TYPES)
REFUSED = 'in training moves its running statistics in place'


def layer_of(norm, training=False):
    return randomize(norm(3)).double().train(training)


def images(seed=0):
    return batch((4, 3, 5, 6), seed=seed, dtype=torch.float64)


def directional_derivative(layer, x, direction, step=1e-6):
    """By differences; a copy of the layer computes, so that no buffer moves."""
    y = [copy.deepcopy(layer)(x + sign * step * direction) for sign in (1, -1)]
    return (y[0] - y[1]).detach() / (2 * step)


def loss(layer, parameters, buffers, x):
    return functional_call(layer, (parameters, buffers), (x,)).square().mean()


@EACH_TYPE
class TestForwardMode:
    @pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
    @pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad])
    def test_tangent(self, norm, mode, training, backend):
        """A tangent goes through no_grad, as through any operator of torch; the buffers get none."""
        layer, x, direction = layer_of(norm, training), images(), images(1)
        expected = directional_derivative(layer, x, direction)
        with mode(), forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x, direction))
            found = forward_ad.unpack_dual(y).tangent
            assert all(forward_ad.unpack_dual(buffer).tangent is None for buffer in layer.buffers())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)

    def test_tangent_of_a_parameter(self, norm, backend):
        layer, x = layer_of(norm), images()
        direction = torch.ones(3, dtype=torch.float64)
        weight = layer.weight.detach()
        with torch.no_grad(), forward_ad.dual_level():
            y = functional_call(layer, {'weight': forward_ad.make_dual(weight, direction)}, (x,))
            found = forward_ad.unpack_dual(y).tangent
        ys = [functional_call(layer, {'weight': weight + sign * 1e-6 * direction}, (x,)).detach() for sign in (1, -1)]
        torch.testing.assert_close(found, (ys[0] - ys[1]) / 2e-6, rtol=1e-6, atol=1e-7)


@EACH_TYPE
class TestFunc:
    def test_evaluation(self, norm, backend):
        layer, x, direction = layer_of(norm), images(), images(1)
        expected = directional_derivative(layer, x, direction)
        torch.testing.assert_close(jvp(layer, (x,), (direction,))[1], expected, rtol=1e-6, atol=1e-7)
        leaf = x.clone().requires_grad_()
        (by_autograd,) = torch.autograd.grad(layer(leaf).square().sum(), leaf)
        torch.testing.assert_close(grad(lambda x: layer(x).square().sum())(x), by_autograd)
        two = torch.stack([x, images(2)])
        torch.testing.assert_close(vmap(layer)(two)[1], layer(images(2)))

        def small(x):
            return layer(x).sum((0, 2, 3))

        torch.testing.assert_close(jacrev(small)(x), jacfwd(small)(x))
        hvp = jvp(grad(lambda x: layer(x).square().sum()), (x,), (direction,))[1]
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), leaf)
        torch.testing.assert_close(hvp, second)

    @pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
    def test_batched_gradients(self, norm, training, backend):
        """``is_grads_batched``, a vmap over the backward alone."""
        layer, x = layer_of(norm, training), images()

        def small(x):
            return copy.deepcopy(layer)(x).sum((0, 2, 3))

        one_by_one = torch.autograd.functional.jacobian(small, x)
        torch.testing.assert_close(torch.autograd.functional.jacobian(small, x, vectorize=True), one_by_one)

    def test_per_sample_gradients(self, norm, backend):
        layer, x = layer_of(norm), images()
        parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
        found = vmap(grad(lambda p, sample: loss(layer, p, buffers, sample[None])), (None, 0))(parameters, x)
        for i in range(len(x)):
            layer.zero_grad()
            layer(x[i : i + 1]).square().mean().backward()
            for name, parameter in layer.named_parameters():
                torch.testing.assert_close(found[name][i], parameter.grad)

    def test_training_refuses_what_a_batch_norm_refuses(self, norm, backend):
        """What would write into a captured buffer; nothing has moved then."""
        x = images()
        for call in (
            lambda layer: grad(lambda x: layer(x).sum())(x),
            lambda layer: jvp(layer, (x,), (x,)),
            lambda layer: vmap(layer)(torch.stack([x, x + 1])),
            lambda layer: jacrev(lambda x: layer(x).sum(0))(x),
        ):
            with pytest.raises(RuntimeError):
                call(nn.BatchNorm2d(3).double())
            layer = layer_of(norm, training=True)
            before = copy.deepcopy(layer.state_dict())
            with pytest.raises(RuntimeError, match=f'^{norm.__name__} {REFUSED}'):
                call(layer)
            assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())

    def test_training_does_what_a_batch_norm_does(self, norm, backend):
        """An ensemble, whose buffers vmap is given; and no running statistics at all."""
        layers = [randomize(norm(3), seed=seed).double() for seed in range(2)]
        expected = copy.deepcopy(layers)
        parameters, buffers = stack_module_state(layers)
        skeleton = copy.deepcopy(layers[0]).to('meta')
        x = batch((4, 3, 5, 6), shared=3.0, dtype=torch.float64)
        y = vmap(lambda p, b, x: functional_call(skeleton, (p, b), (x,)), (0, 0, None))(parameters, buffers, x)
        for i, layer in enumerate(expected):
            torch.testing.assert_close(y[i], layer(x))
            for name, buffer in layer.named_buffers():
                torch.testing.assert_close(buffers[name][i], buffer)

        layer = layer_of(norm, training=True)
        plain = copy.deepcopy(layer)
        torch.func.replace_all_batch_norm_modules_(layer)
        parameters = dict(layer.named_parameters())
        found = grad(lambda p: loss(layer, p, {}, x))(parameters)
        plain(x).square().mean().backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad)


@EACH_TYPE
def test_a_mode_that_watches_operators_sees_them(norm):
    """FlopCounterMode, memory trackers, selective checkpoints: kernels would go past them."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    layer = randomize(norm(3))
    expected = copy.deepcopy(layer)
    with Watch():
        y = layer(batch())
        assert backend_info(layer, batch()).startswith('reference: a mode that watches')
    assert any('mean' in name or 'conv' in name for name in seen)
    torch.testing.assert_close(y, expected(batch()))


@EACH_TYPE
def test_a_subclass_of_tensor_sees_them(norm):
    class Mine(torch.Tensor):
        pass

    layer = randomize(norm(3)).eval()
    x = batch()
    assert backend_info(layer, x.as_subclass(Mine)).startswith('reference: a Mine')
    torch.testing.assert_close(layer(x.as_subclass(Mine)).as_subclass(torch.Tensor), layer(x))
