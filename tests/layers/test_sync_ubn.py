"""SyncUBN on 2 and 4 gloo processes against the oracle on the whole batch in one process."""

import copy
import functools
import inspect
import pickle

import forks
import oracle
import pytest
import sync_workers
import torch
from helpers import batch, randomize
from torch import distributed as dist
from torch import nn

from mmubn.layers import UBN, SyncUBN
from mmubn.ops import Backend, use_backend
from mmubn.ops import backend as ops_backend

OPTIONS = {
    'default': {},
    'no gate': dict(threshold=None),
    'no centering': dict(centering=False),
    'pointwise': dict(kernel_size=1),
    'bias calibrated': dict(calibrate_bias=True),
    'few samples': dict(similarity_samples=2),
    'momentum None': dict(momentum=None),
}
# Samples of each process: even, uneven with a single sample, uneven with an empty process.
SIZES = {2: [(2, 2), (3, 1), (0, 3)], 4: [(2, 2, 2, 2), (1, 3, 0, 2)]}
HEIGHT, WIDTH, CHANNELS, STEPS = 5, 4, 3, 14


def ubn(options, dtype=torch.float64):
    return randomize(UBN(CHANNELS, **{'similarity_momentum': 0.4, **options})).to(dtype)


def batches(sizes, dtype=torch.float64, steps=STEPS):
    """Batches that are condensed, then not, then condensed again: the gate closes and opens."""
    for step in range(steps):
        shared = 3.0 if step < steps // 4 or step >= steps - steps // 4 else 0.0
        yield batch((sum(sizes), CHANNELS, HEIGHT, WIDTH), step, shared, dtype).split(sizes)


def scenario(sizes, options, dtype=torch.float64, steps=STEPS, **extra):
    parts = list(batches(sizes, dtype, steps))
    state_dict = ubn(options, dtype).state_dict()
    options = {'similarity_momentum': 0.4, **options}
    return {'options': options, 'state_dict': state_dict, 'batches': parts, 'sizes': sizes, **extra}


def scenarios_of(world):
    """All that the processes run; those of ``equal`` are to be what one process computes of the joined batch."""
    even, *uneven = SIZES[world]
    equal = {f'{name} {sizes}': scenario(sizes, options) for name, options in OPTIONS.items() for sizes in SIZES[world]}
    equal |= {f'backend {name}': scenario(uneven[-1], {}, backend=name) for name in ('reference', 'torch')}
    # In float32, and in Triton's interpreter, which is slow
    similar = {'similarity_momentum': 0.9}
    equal['kernels'] = scenario(uneven[-1], similar, torch.float32, 4, backend='triton')
    halves = tuple(range(world // 2)), tuple(range(world // 2, world))
    equal['groups'] = scenario(even, {}, groups=halves)
    if world == 4:
        equal['groups, uneven'] = scenario(uneven[-1], {}, groups=halves)
        equal['groups, kernels'] = scenario(uneven[-1], similar, torch.float32, 4, groups=halves, backend='triton')
    else:
        for name in ('no gate', 'bias calibrated'):
            options = {**OPTIONS[name], **similar}
            equal[f'kernels, {name}'] = scenario(uneven[0], options, torch.float32, 4, backend='triton')
        # a compiler takes each process seconds
        equal['compiled'] = scenario(even, {}, compiled=True)
        equal['compiled kernels'] = scenario(even, similar, torch.float32, 4, backend='triton', compiled=True)
        equal['compiled group'] = scenario(uneven[0], dict(calibrate_bias=True), compiled=True, groups=((0, 1),))

    plain = equal[f'default {even}']
    others = {f'checkpoint reentrant={reentrant}': plain | {'reentrant': reentrant} for reentrant in (True, False)}
    others['evaluation'] = plain | {'training': False}
    other_sizes = [
        [batch((2, CHANNELS, 3 + rank, 5 - rank), seed, dtype=torch.float64) for rank in range(world)]
        for seed in range(2)
    ]
    others['other map sizes'] = plain | {'batches': other_sizes}
    not_finite = copy.deepcopy(plain)
    not_finite['batches'][0][1][0, 0, 0, 0] = float('nan')
    others['not finite'] = not_finite
    return equal, others


def run_of(world, folder):
    """World size, name of the plain scenario, all scenarios, and what each process saw of each."""
    equal, others = scenarios_of(world)
    torch.save(equal | others, folder / 'scenarios.pt')
    for result in forks.together(sync_workers.run, *((rank, world, folder) for rank in range(world))):
        assert result.returncode == 0, result.stdout
    return (
        world,
        f'default {SIZES[world][0]}',
        equal | others,
        [torch.load(folder / f'{rank}.pt') for rank in range(world)],
    )


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Of each number of processes one, when it is asked for."""
    return functools.cache(lambda world: run_of(world, tmp_path_factory.mktemp('sync')))


@pytest.fixture(params=[2, 4])
def run(request, runs):
    return runs(request.param)


def groups_of(setting, world):
    """The ranks of the processes that have one batch."""
    return setting.get('groups', (tuple(range(world)),))


@pytest.mark.parametrize(
    ('run', 'name'), [(world, name) for world in SIZES for name in scenarios_of(world)[0]], indirect=['run']
)
def test_equals_one_process_on_the_whole_batch(run, name):
    world, _, scenarios, seen = run
    for ranks in groups_of(scenarios[name], world):
        check_equal(scenarios[name], [seen[rank][name] for rank in ranks], ranks)


def check_equal(setting, seen, ranks):
    """What the processes of these ranks saw is what the oracle computes of their inputs as one batch, in float64."""
    dtype = setting['batches'][0][0].dtype
    close = {} if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4, check_dtype=False)
    options = {'eps': 1e-5, 'momentum': 0.1, **setting['options']}
    for name in ('kernel_size', 'centering'):
        options.pop(name, None)
    layer = ubn(setting['options'], dtype).double()
    parameters = {key: p.detach().clone().requires_grad_() for key, p in layer.named_parameters()}
    assert ('neighbor_weight' in parameters) is (layer.kernel_size > 1)
    state = {
        'running_mean': layer.running_mean.clone(),
        'running_var': layer.running_var.clone(),
        'running_similarity': 1.0,
        'num_batches_tracked': 0,
    }
    has_gate = layer.threshold is not None and layer.momentum is not None
    gates = []
    for step, parts in enumerate(setting['batches']):
        if layer.momentum is None:  # the average over all batches, none of which a gate holds up
            options |= {'momentum': 1 / (step + 1), 'threshold': None}
        x = torch.cat([parts[rank] for rank in ranks]).double().requires_grad_()
        sizes = [len(parts[rank]) for rank in ranks]
        y, state = oracle.ubn(x, parameters, state, groups=sizes, **options)
        grads = torch.autograd.grad((y * sync_workers.weights(y)).sum(), [x, *parameters.values()])
        gates.append(state['running_similarity'] > layer.threshold if has_gate else True)

        steps = [results[step] for results in seen]
        torch.testing.assert_close(torch.cat([s['y'] for s in steps]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([s['x.grad'] for s in steps]), grads[0], **close)
        for key, grad in zip(parameters, grads[1:], strict=True):
            found = sum(s['grads'][key] for s in steps)
            torch.testing.assert_close(found, grad, **close, msg=lambda m, key=key: f'{key}: {m}')
        for s in steps:
            for key in ('running_mean', 'running_var'):
                torch.testing.assert_close(s['buffers'][key], state[key], **close)
            tau = float(s['buffers']['running_similarity'])
            assert tau == pytest.approx(state['running_similarity'], abs=1e-6)
            assert s['buffers']['num_batches_tracked'] == state['num_batches_tracked']
    if has_gate:
        assert gates[0], 'the gate must be open at first'
        assert not all(gates), 'the batches must close the gate'


def test_one_collective_in_each_direction_whatever_the_gate_and_the_batch(run):
    world, _, scenarios, seen = run
    for name, setting in scenarios.items():
        is_alone = name == 'evaluation' or len(groups_of(setting, world)[0]) == 1
        number = 0 if is_alone else 1
        if setting.get('compiled'):
            continue  # the calls are in the graph
        for results in seen:
            for step in results[name]:
                assert step['collectives'] == {'all_gather_into_tensor': number, 'all_reduce': number}, name


def test_all_processes_agree_to_the_bit(run):
    world, _, scenarios, seen = run
    for name, setting in scenarios.items():
        for ranks in groups_of(setting, world):
            for steps in zip(*(seen[rank][name] for rank in ranks), strict=True):
                for key, value in steps[0]['buffers'].items():
                    assert all(torch.equal(value, step['buffers'][key]) for step in steps[1:]), f'{name}: {key}'


def test_groups_have_statistics_of_their_own(run):
    *_, seen = run
    first, last = (results['groups'][-1]['buffers']['running_mean'] for results in (seen[0], seen[-1]))
    assert not torch.equal(first, last)


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
    monkeypatch.setattr(SyncUBN, '_processes', lambda self: 'all')
    monkeypatch.setattr(ops_backend, 'all_gather', lambda part, processes: part[None])
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


@pytest.mark.parametrize('backend', ['reference', 'torch'])
def test_no_second_derivative_across_processes(monkeypatch, backend):
    monkeypatch.setattr(SyncUBN, '_processes', lambda self: 'all')
    monkeypatch.setattr(ops_backend, 'all_gather', lambda part, processes: part[None])
    x = batch((4, CHANNELS, HEIGHT, WIDTH)).requires_grad_()
    with use_backend(backend):
        y = SyncUBN(CHANNELS)(x)
        with pytest.raises(NotImplementedError, match='use UBN where create_graph=True is needed'):
            torch.autograd.grad(y.sum(), x, create_graph=True)


# Process groups


@pytest.fixture(scope='module')
def group(tmp_path_factory):
    """A group of this process alone."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path_factory.mktemp("group")}/r', rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def test_its_arguments_are_those_of_ubn_and_a_process_group():
    arguments = dict(inspect.signature(SyncUBN).parameters)
    assert arguments.pop('process_group').default is None
    assert list(arguments.values()) == list(inspect.signature(UBN).parameters.values())
    assert repr(SyncUBN(3, threshold=0.5)) == repr(UBN(3, threshold=0.5)).replace('UBN', 'SyncUBN', 1)


def test_a_process_group_is_no_state(group):
    """As in nn.SyncBatchNorm, but that a copy of the layer, as an average of the model is, is possible."""
    layer, other = SyncUBN(3, process_group=group), nn.SyncBatchNorm(3, process_group=group)
    assert layer.process_group is other.process_group is group
    assert layer.state_dict().keys() == UBN(3).state_dict().keys()
    assert repr(layer) == repr(SyncUBN(3))
    model = nn.Sequential(layer, nn.Identity(), layer)
    copied = copy.deepcopy(model)
    assert copied[0] is copied[2] is not layer
    assert copied[0].process_group is copy.copy(layer).process_group is group
    assert copied[0].weight is not layer.weight
    torch.testing.assert_close(copied.state_dict(), model.state_dict())
    for norm in (layer, other):
        with pytest.raises(TypeError, match='ProcessGroup'):
            pickle.dumps(norm)
    assert pickle.loads(pickle.dumps(SyncUBN(3))).process_group is None


def test_a_group_of_one_process_is_ubn(group):
    x = batch((4, 3, 5, 5))
    torch.manual_seed(0)
    ubn, sync = UBN(3), SyncUBN(3, process_group=group)
    assert torch.equal(ubn(x), sync(x))
    with pytest.raises(ValueError, match='more than 1 value'):
        sync(torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize(
    'wrong', [dist.GroupMember.NON_GROUP_MEMBER, 'world', [0, 1]], ids=['no member', 'str', 'list']
)
def test_no_group_of_this_process(wrong):
    with pytest.raises(ValueError, match=r'SyncUBN: process_group must be None, or a group .* this process is in'):
        SyncUBN(3, process_group=wrong)


@pytest.mark.parametrize('whole', [True, False], ids=['layer', 'model'])
def test_a_conversion_gives_it_the_group(group, whole):
    layer = SyncUBN(3)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(layer if whole else nn.Sequential(layer), group)
    assert layer in model.modules()
    assert layer.process_group is group
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert layer.process_group is group, 'a conversion that names no group'
