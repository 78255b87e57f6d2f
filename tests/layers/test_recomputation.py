"""Activation checkpointing gives the outputs, gradients and buffers of the plain run, whatever ran before."""

import copy
import functools
import gc

import pytest
import torch
from helpers import batch, randomize
from mmdet.models.backbones import ResNet
from networks import TYPES
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmubn.layers import UBN

MODES = {'reentrant': True, 'not reentrant': False}
REENTRANT = pytest.mark.parametrize('reentrant', MODES.values(), ids=MODES)


def layer_at(similarity):
    """A layer whose gate is about to flip: with this momentum one batch decides."""
    layer = randomize(UBN(3, similarity_momentum=0.5).double())
    layer.running_similarity.fill_(similarity)
    return layer


def batches(count, shared=0.0):
    return [batch(seed=seed, shared=shared, dtype=torch.float64) for seed in range(count)]


def train(layer, inputs, call, **options):
    """All inputs go through the layer, then one backward, as in a shared head."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = [call(layer, x) for x in inputs]
    loss = sum((i + 1) * (y * y.detach().cos()).sum() for i, y in enumerate(outputs))
    if options:
        loss.backward(**options)
    loss.backward()
    return {
        'outputs': outputs,
        'inputs': [x.grad for x in inputs],
        'parameters': {name: parameter.grad for name, parameter in layer.named_parameters()},
        'buffers': dict(layer.named_buffers()),
    }


def assert_same(found, expected):
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], msg=lambda m, key=key: f'{key}: {m}')


@REENTRANT
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
    assert_same(train(layer, inputs, lambda norm, x: checkpoint(norm, x, use_reentrant=reentrant)), expected)


def test_the_inputs_above_flip_the_gate_between_the_runs():
    """Without the fix the second run of such a step decides otherwise than the first."""
    layer = layer_at(0.31)
    gates = []
    for x in batches(1) * 2:
        layer(x)
        gates.append(bool(layer.running_similarity > layer.threshold))
    assert gates == [True, False]


@REENTRANT
@pytest.mark.parametrize('retain_graph', [False, True], ids=['one backward', 'two backwards'])
def test_equal_batches_of_one_step(reentrant, retain_graph):
    """Their decisions differ: the gate closes between them. A backward starts at the last."""
    layer = layer_at(0.31)
    inputs = batches(1) * 3
    options = dict(retain_graph=True) if retain_graph else {}
    expected = train(copy.deepcopy(layer), inputs, lambda norm, x: norm(x), **options)
    assert expected['buffers']['num_batches_tracked'] == 1, 'open for the first alone'
    found = train(layer, inputs, lambda norm, x: checkpoint(norm, x, use_reentrant=reentrant), **options)
    assert_same(found, expected)


@REENTRANT
def test_an_equal_batch_of_an_earlier_step(reentrant):
    """The same images again, after the optimizer has moved the parameters that the statistics depend on."""
    results = []
    for call in (lambda norm, x: norm(x), lambda norm, x: checkpoint(norm, x, use_reentrant=reentrant)):
        layer, gradients = layer_at(0.9), []
        for step in range(4):
            with torch.no_grad():
                layer.center_weight.fill_(0.3 * step)
            gradients += train(layer, batches(1, shared=3.0), call)['inputs']
        results.append(gradients)
    torch.testing.assert_close(*results)


@REENTRANT
@pytest.mark.parametrize('norm', TYPES)
@pytest.mark.parametrize('under_checkpoint', [False, True], ids=['before', 'checkpointed'])
def test_a_bad_batch_poisons_no_later_gradient(norm, reentrant, under_checkpoint, backend):
    """An overflow of AMP: its step is skipped, and so is its backward."""
    layer = randomize(norm(4))
    call = functools.partial(checkpoint, use_reentrant=reentrant) if under_checkpoint else lambda norm, x: norm(x)
    bad = batch((2, 4, 5, 5))
    bad[0, 0, 0, 0] = float('nan')
    call(layer, bad.requires_grad_())
    expected = copy.deepcopy(layer)
    for seed in range(18):
        gradients = []
        for each, run in (
            (expected, lambda norm, x: norm(x)),
            (layer, functools.partial(checkpoint, use_reentrant=reentrant)),
        ):
            x = batch((2, 4, 5, 5), seed=seed).requires_grad_()
            run(each, x).square().sum().backward()
            gradients.append(x.grad)
        assert gradients[0].isfinite().all()
        torch.testing.assert_close(*gradients)


@REENTRANT
def test_a_bad_batch_is_recognised(reentrant):
    """Among others, by its bits: a NaN equals itself."""
    layer = layer_at(0.31)
    inputs = batches(3)
    inputs[1][0, 0, 0, 0] = float('nan')
    inputs[2][0, 1, 0, 0] = float('inf')
    runs = [lambda norm, x: norm(x), lambda norm, x: checkpoint(norm, x, use_reentrant=reentrant)]
    expected, found = (train(copy.deepcopy(layer), inputs, run) for run in runs)
    for key in ('inputs', 'buffers'):
        torch.testing.assert_close(found[key], expected[key], equal_nan=True)


@REENTRANT
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


@pytest.mark.parametrize('inner', MODES.values(), ids=MODES)
@pytest.mark.parametrize('outer', MODES.values(), ids=MODES)
def test_nested(inner, outer):
    """The layer inside runs a third time, as a repetition of a repetition."""

    def call(model, x):
        return checkpoint(
            lambda x: checkpoint(model[1], checkpoint(model[0], x, use_reentrant=inner), use_reentrant=inner).exp(),
            x,
            use_reentrant=outer,
        )

    def model():
        return nn.Sequential(layer_at(0.31), layer_at(0.31))

    expected = train(model(), batches(2), lambda m, x: m(x).exp())
    assert_same(train(model(), batches(2), call), expected)


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


COMPILED = {
    'checkpoint of a compiled block': lambda model, reentrant, backend: functools.partial(
        checkpoint, torch.compile(model, backend=backend), use_reentrant=reentrant
    ),
    'compiled checkpoint of a block': lambda model, reentrant, backend: torch.compile(
        functools.partial(checkpoint, model, use_reentrant=reentrant), backend=backend
    ),
    'compiled block': lambda model, reentrant, backend: torch.compile(model, backend=backend),
}


@pytest.mark.parametrize(
    ('how', 'reentrant', 'backend'),
    [
        # All of inductor but for the code that it writes, which takes minutes to compile.
        *[(how, True, 'aot_eager_decomp_partition') for how in COMPILED if how != 'compiled checkpoint of a block'],
        ('checkpoint of a compiled block', False, 'aot_eager_decomp_partition'),
        *[pytest.param(how, each, 'inductor', marks=pytest.mark.slow) for how in COMPILED for each in MODES.values()],
    ],
)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_compiled(how, reentrant, backend):
    """Moves the statistics once, and repeats the decision of the first run, also where the gate closes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    norms = [UBN(4, similarity_momentum=0.5) for _ in range(2)]
    block = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norms[0], nn.Tanh(), nn.Conv2d(4, 4, 1, bias=False), norms[1])
    block = randomize(block.double())
    for norm in norms:
        norm.running_similarity.fill_(0.9)
        nn.init.zeros_(norm.bias)  # it makes all samples similar
    expected = copy.deepcopy(block)
    call = COMPILED[how](block, reentrant, backend)
    for step in range(4):
        gradients = []
        for model, run in ((expected, expected), (block, call)):
            x = batch((6, 3, 5, 5), seed=step, dtype=torch.float64).requires_grad_()
            model.zero_grad()
            y = run(x)
            (y * y.detach().cos()).sum().backward()
            gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(block.state_dict(), expected.state_dict())
    assert 0 < int(norms[1].num_batches_tracked) < 4, 'the gate must have closed on the way'


def UNPACK(x):  # noqa: N802
    return x


class TestOrder:
    """Whose decision is repeated is known by the checkpoint, not by contents or by the order of the backward."""

    @REENTRANT
    @pytest.mark.parametrize('norm', TYPES)
    @pytest.mark.parametrize('together', [True, False], ids=['one checkpoint', 'two'])
    @pytest.mark.parametrize('equal', [True, False], ids=['equal', 'equal means'])
    def test_of_calls_with_equal_means(self, norm, reentrant, together, equal, backend):
        noise = batch((4, 3, 5, 5), dtype=torch.float64)
        x = ((noise * 16).round() / 16).detach()
        x = x if equal else x - x.flip(-1, -2)  # of mean zero, to the last bit
        results = []
        for is_checkpointed in (False, True):
            layer = randomize(norm(3)).double()
            if isinstance(layer, UBN):
                layer.similarity_momentum = 0.5
                layer.running_similarity.fill_(0.31 if equal else 0.6)
            z = x.clone().requires_grad_()
            run = functools.partial(checkpoint, use_reentrant=reentrant) if is_checkpointed else lambda f, x: f(x)

            if together:
                run(lambda z, layer=layer: layer(z).sin() + layer((1 if equal else 3) * z).cos(), z).sum().backward()
            else:
                first, second = run(layer, z), run(layer, (1 if equal else 3) * z)
                first.sin().sum().backward()
                second.cos().sum().backward()
            results.append([z.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        torch.testing.assert_close(*results)

    @REENTRANT
    @pytest.mark.parametrize('nested', [False, True], ids=['plain', 'nested'])
    def test_of_batches_in_flight(self, reentrant, nested, backend):
        """A pipeline: the forward of the next batch comes before the backward of this one, for a hundred steps."""

        def run(layer, x):
            once = functools.partial(checkpoint, layer, use_reentrant=reentrant)
            return checkpoint(lambda x: once(x).sin(), x, use_reentrant=reentrant) if nested else once(x).sin()

        results = []
        for call in (lambda layer, x: layer(x).sin(), run):
            layer, gradients = layer_at(0.9), []
            previous = None
            for seed in range(100):
                x = batch((2, 3, 4, 4), seed=seed, dtype=torch.float64).requires_grad_()
                current = call(layer, x), x
                if previous is not None:
                    previous[0].sum().backward()
                    gradients.append(previous[1].grad)
                previous = current
            results.append(gradients)
        torch.testing.assert_close(*results)

    @REENTRANT
    def test_after_calls_that_nothing_repeats(self, reentrant, backend):
        """A forward without gradients, one that failed, and an output that nobody used, on the same batch."""

        class FailureError(Exception):
            pass

        def fail(y):
            raise FailureError

        run = functools.partial(checkpoint, use_reentrant=reentrant)
        results = []
        for is_checkpointed in (False, True):
            layer = layer_at(0.9)
            x = batches(1)[0].requires_grad_()
            call = run if is_checkpointed else lambda f, x: f(x)
            with torch.no_grad():
                call(layer, x)
            with pytest.raises(FailureError):
                call(lambda x, layer=layer: fail(layer(x)), x)
            unused = call(layer, x)
            y = call(lambda x, layer=layer: layer(x).sin(), x)
            del unused
            y.sum().backward()
            results.append([x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        torch.testing.assert_close(*results)

    @REENTRANT
    @pytest.mark.parametrize('norm', TYPES)
    def test_under_other_hooks_within(self, norm, reentrant):
        results = []
        for is_checkpointed in (False, True):
            layer = randomize(norm(3)).double()

            def block(z, layer=layer):
                with torch.autograd.graph.save_on_cpu():
                    y = layer(z)
                return y.sin() * z

            gradients = []
            for x in batches(3, shared=3.0):
                x.requires_grad_()
                y = checkpoint(block, x, use_reentrant=reentrant) if is_checkpointed else block(x)
                y.sum().backward()
                gradients.append(x.grad)
            results.append([*gradients, *layer.buffers()])
        torch.testing.assert_close(*results)
        assert layer.num_batches_tracked == 3

    @REENTRANT
    def test_a_new_forward_during_a_backward_is_none(self, reentrant):
        """In a hook of a tensor: it moves the statistics, as any other forward in training."""
        layer = randomize(UBN(3, threshold=None)).double()
        x, other = (each.requires_grad_() for each in batches(2))
        y = checkpoint(lambda z: layer(z).sin() * z, x, use_reentrant=reentrant)
        y.register_hook(lambda gradient: (layer(other), None)[1])
        y.sum().backward()
        assert layer.num_batches_tracked == 2


class TestRecords:
    def test_none_where_nothing_can_run_again(self):
        """Not in training, in evaluation, nor where statistics are re-estimated."""
        layer = layer_at(0.5)
        for x in batches(3):
            layer(x)
            with torch.no_grad():
                layer(x)
            with torch.inference_mode():
                layer(x)
        layer.eval()(batches(1)[0])
        assert len(layer._calls) == 0

    def test_none_in_evaluation(self):
        """Which decides nothing that a repetition must not decide again."""
        layer = layer_at(0.5).eval()
        for reentrant in MODES.values():
            checkpoint(layer, batches(1)[0].requires_grad_(), use_reentrant=reentrant)
        assert len(layer._calls) == 0

    def test_they_go_with_the_graph(self):
        """After the backward, and where there is none."""
        layer = layer_at(0.5)
        x = batches(1)[0].requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False)
        assert len(layer._calls) == 1
        y.sum().backward()
        assert len(layer._calls) == 0
        y = checkpoint(layer, x, use_reentrant=False)
        del y
        gc.collect()
        assert len(layer._calls) == 0

    def test_of_a_reentrant_checkpoint_they_go_with_the_graph(self):
        layer = layer_at(0.5)
        x = batches(1)[0].requires_grad_()
        y = checkpoint(layer, x, use_reentrant=True)
        assert len(layer._calls) == 1
        y.sum().backward()
        del y
        assert len(layer._calls) == 0
        checkpoint(layer, x, use_reentrant=True)
        assert len(layer._calls) == 0

    def test_of_hooks_that_live_for_ever_they_do_not_gather(self):
        layer = layer_at(0.5)
        for x in batches(3) * 30:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, UNPACK):
                layer(x.requires_grad_()).sum().backward()
        assert len(layer._calls) == 64

    def test_they_are_no_state(self):
        layer = layer_at(0.5)
        y = checkpoint(layer, batches(1)[0].requires_grad_(), use_reentrant=False)
        assert len(layer._calls) == 1
        assert len(copy.deepcopy(layer)._calls) == 0
        y.sum().backward()

    @REENTRANT
    def test_to_find_one_never_waits_for_the_device(self, reentrant):
        """Meta tensors hold no values: a choice on the host would raise."""
        layer = UBN(3).to('meta')
        x = torch.empty(4, 3, 5, 5, device='meta', requires_grad=True)
        sum(checkpoint(layer, x, use_reentrant=reentrant).sum() for _ in range(3)).backward()
        assert x.grad.shape == x.shape
