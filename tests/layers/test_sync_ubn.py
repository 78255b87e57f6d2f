"""SyncUBN on 2 and 4 gloo processes against the oracle on the whole batch in one process."""

import copy

import forks
import oracle
import pytest
import sync_workers
import torch
from helpers import batch, randomize

from mmubn.layers import UBN, SyncUBN, sync_ubn
from mmubn.ops import Backend, use_backend

OPTIONS = {
    'default': {},
    'no gate': dict(threshold=None),
    'no centering': dict(centering=False),
    'pointwise': dict(kernel_size=1),
    'bias calibrated': dict(calibrate_bias=True),
    'few samples': dict(similarity_samples=2),
}
# Samples of each process: even, uneven with a single sample, uneven with an empty process.
SIZES = {2: [(2, 2), (3, 1), (0, 3)], 4: [(2, 2, 2, 2), (1, 3, 0, 2)]}
HEIGHT, WIDTH, CHANNELS, STEPS = 5, 4, 3, 14


def ubn(options):
    return randomize(UBN(CHANNELS, similarity_momentum=0.4, **options).double())


def batches(sizes):
    """Batches that are condensed, then not, then condensed again: the gate closes and opens."""
    for step in range(STEPS):
        shared = 3.0 if step < 3 or step >= 11 else 0.0
        yield batch((sum(sizes), CHANNELS, HEIGHT, WIDTH), step, shared, torch.float64).split(sizes)


def scenario(sizes, options, **extra):
    layer = ubn(options)
    parts = list(batches(sizes))
    options = dict(options, similarity_momentum=0.4)
    return {'options': options, 'state_dict': layer.state_dict(), 'batches': parts, 'sizes': sizes, **extra}


@pytest.fixture(scope='module', params=[2, 4])
def run(request, tmp_path_factory):
    """World size, all scenarios, and what each process saw of each."""
    world = request.param
    scenarios = {
        f'{name} {sizes}': scenario(sizes, options) for name, options in OPTIONS.items() for sizes in SIZES[world]
    }
    plain = f'default {SIZES[world][0]}'
    for reentrant in (True, False):
        scenarios[f'checkpoint reentrant={reentrant}'] = scenarios[plain] | {'reentrant': reentrant}
    scenarios['evaluation'] = scenarios[plain] | {'training': False}
    other_sizes = [
        [batch((2, CHANNELS, 3 + rank, 5 - rank), seed, dtype=torch.float64) for rank in range(world)]
        for seed in range(2)
    ]
    scenarios['other map sizes'] = scenarios[plain] | {'batches': other_sizes}
    not_finite = copy.deepcopy(scenarios[plain])
    not_finite['batches'][0][1][0, 0, 0, 0] = float('nan')
    scenarios['not finite'] = not_finite

    folder = tmp_path_factory.mktemp('sync')
    torch.save(scenarios, folder / 'scenarios.pt')
    for result in forks.together(sync_workers.run, *((rank, world, folder) for rank in range(world))):
        assert result.returncode == 0, result.stdout
    return world, plain, scenarios, [torch.load(folder / f'{rank}.pt') for rank in range(world)]


@pytest.mark.parametrize('name', OPTIONS)
def test_equals_one_process_on_the_whole_batch(run, name):
    world, _, scenarios, seen = run
    for sizes in SIZES[world]:
        setting = scenarios[f'{name} {sizes}']
        options = {'eps': 1e-5, **setting['options']}
        kernel_size = options.pop('kernel_size', 3)
        options.pop('centering', None)
        layer = ubn(OPTIONS[name])
        parameters = {key: p.detach().clone().requires_grad_() for key, p in layer.named_parameters()}
        assert ('neighbor_weight' in parameters) is (kernel_size > 1)
        state = {
            'running_mean': layer.running_mean.clone(),
            'running_var': layer.running_var.clone(),
            'running_similarity': 1.0,
            'num_batches_tracked': 0,
        }
        gates = []
        for step, parts in enumerate(setting['batches']):
            x = torch.cat(parts).requires_grad_()
            y, state = oracle.ubn(x, parameters, state, groups=list(sizes), **options)
            grads = torch.autograd.grad((y * sync_workers.weights(y)).sum(), [x, *parameters.values()])
            gates.append(state['running_similarity'] > layer.threshold if layer.threshold is not None else True)

            steps = [results[f'{name} {sizes}'][step] for results in seen]
            torch.testing.assert_close(torch.cat([s['y'] for s in steps]), y.detach())
            torch.testing.assert_close(torch.cat([s['x.grad'] for s in steps]), grads[0])
            for key, grad in zip(parameters, grads[1:], strict=True):
                torch.testing.assert_close(
                    sum(s['grads'][key] for s in steps), grad, msg=lambda m, key=key: f'{key}: {m}'
                )
            for s in steps:
                for key in ('running_mean', 'running_var'):
                    torch.testing.assert_close(s['buffers'][key], state[key])
                tau = float(s['buffers']['running_similarity'])
                assert tau == pytest.approx(state['running_similarity'], abs=1e-6)
                assert s['buffers']['num_batches_tracked'] == state['num_batches_tracked']
        if layer.threshold is not None:
            assert gates[0], 'the gate must be open at first'
            assert not all(gates), 'the batches must close the gate'


def test_one_collective_in_each_direction_whatever_the_gate_and_the_batch(run):
    _, _, scenarios, seen = run
    for name in scenarios:
        expected = {'all_gather': 0, 'all_reduce': 0} if name == 'evaluation' else {'all_gather': 1, 'all_reduce': 1}
        for results in seen:
            assert all(step['collectives'] == expected for step in results[name]), name


def test_all_processes_agree_to_the_bit(run):
    _, _, scenarios, seen = run
    for name in scenarios:
        for steps in zip(*(results[name] for results in seen), strict=True):
            for key, value in steps[0]['buffers'].items():
                assert all(torch.equal(value, step['buffers'][key]) for step in steps[1:]), f'{name}: {key}'


@pytest.mark.parametrize('reentrant', [True, False])
def test_activation_checkpointing(run, reentrant):
    _, plain, _, seen = run
    for results in seen:
        for step, expected in zip(results[f'checkpoint reentrant={reentrant}'], results[plain], strict=True):
            torch.testing.assert_close(step['y'], expected['y'])
            torch.testing.assert_close(step['x.grad'], expected['x.grad'])
            torch.testing.assert_close(step['grads'], expected['grads'])
            torch.testing.assert_close(step['buffers'], expected['buffers'])


def test_maps_of_other_sizes_weigh_by_their_values(run):
    world, _, scenarios, seen = run
    setting = scenarios['other map sizes']
    layer = ubn({})
    w = layer.center_weight.detach()[:, None, None]
    parts = setting['batches'][0]
    centred = [x + w * x.mean((2, 3), keepdim=True) for x in parts]
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in centred], dim=1)
    for results in seen:
        buffers = results['other map sizes'][0]['buffers']
        torch.testing.assert_close(buffers['running_mean'], 0.9 * layer.running_mean + 0.1 * values.mean(1))
        torch.testing.assert_close(buffers['running_var'], 0.9 * layer.running_var + 0.1 * values.var(1))
    assert len({part.shape for part in parts}) == world


def test_a_bad_batch_on_one_process_stays_on_none(run):
    _, _, _, seen = run
    for results in seen:
        first, last = results['not finite'][0]['buffers'], results['not finite'][-1]['buffers']
        assert first['running_similarity'] == 1, 'no evidence'
        for buffers in (first, last):
            assert all(buffer.isfinite().all() for buffer in buffers.values())


def test_outside_distributed_training_it_is_ubn():
    torch.manual_seed(0)
    ubn, sync = UBN(3), SyncUBN(3)
    assert ubn.state_dict().keys() == sync.state_dict().keys()
    x = batch((4, 3, 5, 5))
    for training in (True, False):
        ubn.train(training), sync.train(training)
        assert torch.equal(ubn(x), sync(x))
    torch.testing.assert_close(ubn.state_dict(), sync.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match='more than 1 value'):
        sync.train()(torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize('backend', ['reference', 'torch'])
@pytest.mark.parametrize('similarity', [0.9, -0.9], ids=['open', 'closed'])
def test_it_decides_by_the_same_function_as_ubn(monkeypatch, backend, similarity):
    """With the sums of all processes, here of one, in the place of those of its own batch."""
    calls = []
    decide_by = Backend.decide_by

    def recorded(self, *arguments):
        calls.append((self.name, *arguments))
        return decide_by(self, *arguments)

    monkeypatch.setattr(Backend, 'decide_by', recorded)
    monkeypatch.setattr(SyncUBN, '_synchronizes', lambda self: self.training)
    monkeypatch.setattr(sync_ubn, '_all_gather', lambda vector: vector[None])
    layers = [randomize(norm(CHANNELS)).double() for norm in (UBN, SyncUBN)]
    outputs = []
    with use_backend(backend), torch.no_grad():
        for layer in layers:
            layer.running_similarity.fill_(similarity)
            outputs.append(layer(batch((4, CHANNELS, HEIGHT, WIDTH), dtype=torch.float64)))
    of_ubn, of_sync_ubn = calls
    assert of_ubn[0] == of_sync_ubn[0] == backend
    for given, expected in zip(of_sync_ubn[1:3], of_ubn[1:3], strict=True):  # the similarity, and the statistics
        assert given._fields == expected._fields
        for one, other in zip(given, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(one).double(), torch.as_tensor(other).double())
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())
    assert layers[1].num_batches_tracked == (similarity > 0)
