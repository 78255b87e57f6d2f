"""Activation checkpointing gives the outputs, gradients and buffers of the plain run, also where the gate flips."""

import copy

import pytest
import torch
from helpers import batch, randomize
from mmdet.models.backbones import ResNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmubn.layers import UBN

MODES = {'reentrant': True, 'not reentrant': False}


def layer_at(similarity):
    """A layer whose gate is about to flip: with this momentum one batch decides."""
    layer = randomize(UBN(3, similarity_momentum=0.5).double())
    layer.running_similarity.fill_(similarity)
    return layer


def batches(count, shared=0.0):
    return [batch(seed=seed, shared=shared, dtype=torch.float64) for seed in range(count)]


def train(layer, inputs, call):
    """All inputs go through the layer, then one backward, as in a shared head."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = [call(layer, x) for x in inputs]
    sum((y * y.detach().cos()).sum() for y in outputs).backward()
    return {
        'outputs': outputs,
        'inputs': [x.grad for x in inputs],
        'parameters': {name: parameter.grad for name, parameter in layer.named_parameters()},
        'buffers': dict(layer.named_buffers()),
    }


@pytest.mark.parametrize('reentrant', MODES.values(), ids=MODES)
@pytest.mark.parametrize('calls', [1, 3])
@pytest.mark.parametrize(
    ('similarity', 'shared'),
    [(0.9, 3.0), (-0.9, 0.0), (0.31, 0.0), (-0.5, 3.0)],
    ids=['open', 'closed', 'closes', 'opens'],
)
def test_layer(reentrant, calls, similarity, shared):
    layer = layer_at(similarity)
    inputs = batches(calls, shared)
    expected = train(copy.deepcopy(layer), inputs, lambda norm, x: norm(x))
    found = train(layer, inputs, lambda norm, x: checkpoint(norm, x, use_reentrant=reentrant))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], msg=lambda m, key=key: f'{key}: {m}')


def test_the_inputs_above_flip_the_gate_between_the_runs():
    """Without the fix the second run of such a step decides otherwise than the first."""
    layer = layer_at(0.31)
    gates = []
    for x in batches(1) * 2:
        layer(x)
        gates.append(bool(layer.running_similarity > layer.threshold))
    assert gates == [True, False]


@pytest.mark.parametrize('reentrant', MODES.values(), ids=MODES)
def test_several_steps(reentrant):
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), UBN(3, similarity_momentum=0.7), nn.ReLU()).double()
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for step in range(15):
        x = batch(seed=step, shared=3.0 if step < 4 else 0.0, dtype=torch.float64).requires_grad_()
        for model, call in zip(
            models, (lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=reentrant)), strict=True
        ):
            model.zero_grad()
            call(model, x).square().sum().backward()
        torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    closed = 15 - int(models[0][1].num_batches_tracked)
    assert 0 < closed < 15, 'the gate must have closed on the way'


def test_with_cp_of_a_backbone():
    torch.manual_seed(0)
    settings = dict(depth=18, base_channels=8, stem_channels=8, norm_eval=False)
    settings['norm_cfg'] = dict(type='UBN', similarity_momentum=0.5)
    plain, cheap = (ResNet(**settings, with_cp=with_cp).double() for with_cp in (False, True))
    cheap.load_state_dict(plain.state_dict())
    for step in range(3):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step)).double()
        for model in (plain, cheap):
            model.train()
            model.zero_grad()
            sum(y.square().mean() for y in model(x)).backward()
        torch.testing.assert_close(cheap.state_dict(), plain.state_dict())
        for one, other in zip(plain.parameters(), cheap.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_calls_are_no_state():
    layer = layer_at(0.5)
    layer(batches(1)[0])
    assert len(layer._calls._calls) == 1
    assert len(copy.deepcopy(layer)._calls._calls) == 0
    layer.eval()(batches(1)[0])
    assert len(layer._calls._calls) == 1, 'evaluation decides nothing that a repetition must not decide again'


def test_calls_of_long_ago_are_forgotten():
    """Each holds tensors on the device: a layer that is trained for days must not gather them."""
    layer = layer_at(0.5)
    for x in batches(20):
        layer(x)
    assert len(layer._calls._calls) == 16
