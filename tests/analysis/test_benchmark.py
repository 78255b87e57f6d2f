"""mmubn.analysis.benchmark: it compares what it says it compares, and measures what it says it measures."""

import contextlib
import itertools
import random

import pytest
import torch
import torchvision
from torch import nn

import mmubn
from mmubn import functional
from mmubn.analysis import benchmark
from mmubn.analysis.benchmark import deployed_markdown, deployment, measurement

CPU = torch.device('cpu')


# ---- what is compared


def copy_parameters(ubn, naive):
    with torch.no_grad():
        for name in ('center_weight', 'scale_weight', 'scale_bias'):
            getattr(naive, name).copy_(getattr(ubn, name)[None, :, None, None])
        naive.conv.weight.copy_(functional.depthwise_kernel(ubn.weight, ubn.neighbor_weight.view(3, -1)))
        naive.conv.bias.copy_(ubn.bias)


@pytest.mark.parametrize('samples', [1, 5, 18])
def test_the_naive_ubn_is_ubn_on_both_sides_of_the_gate(samples):
    torch.manual_seed(0)
    threshold = 0.6
    ubn, naive = mmubn.UBN(3, threshold=threshold).double(), benchmark.NaiveUBN(3, threshold=threshold).double()
    with torch.no_grad():
        for parameter in ubn.parameters():
            parameter.add_(torch.randn_like(parameter))
    copy_parameters(ubn, naive)
    decisions = set()
    for _ in range(8):
        x = torch.randn(samples, 3, 6, 5, dtype=torch.float64, requires_grad=True)
        x_naive = x.detach().clone().requires_grad_()
        before = ubn.running_mean.clone()
        y, y_naive = ubn(x), naive(x_naive)
        decisions.add(torch.equal(ubn.running_mean, before))
        dy = torch.randn_like(y)
        y.backward(dy)
        y_naive.backward(dy)
        torch.testing.assert_close(y_naive, y)
        torch.testing.assert_close(x_naive.grad, x.grad)
        for name in ('running_mean', 'running_var', 'running_similarity'):
            torch.testing.assert_close(getattr(naive, name), getattr(ubn, name))
    assert decisions == ({False} if samples == 1 else {False, True}), 'a single sample never closes the gate'
    for name in ('center_weight', 'scale_weight', 'scale_bias'):
        torch.testing.assert_close(getattr(naive, name).grad.flatten(), getattr(ubn, name).grad)
    taps = naive.conv.weight.grad.flatten(1)
    torch.testing.assert_close(taps[:, 4], ubn.weight.grad)
    torch.testing.assert_close(torch.cat([taps[:, :4], taps[:, 5:]], 1).flatten(), ubn.neighbor_weight.grad)
    torch.testing.assert_close(naive.conv.bias.grad, ubn.bias.grad)
    torch.testing.assert_close(naive.eval()(x), ubn.eval()(x))


def test_a_fresh_naive_ubn_is_a_fresh_ubn():
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(benchmark.NaiveUBN(4)(x), mmubn.UBN(4)(x), rtol=1e-5, atol=1e-5)


def test_the_contenders_agree_that_are_the_same_norm():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 7, 5)
    outputs = {}
    for name in benchmark.CONTENDERS:
        contender = benchmark.CONTENDERS[name]
        with contender.forced():
            outputs[name] = contender.make(6)(x)
    for name in ('ubn-torch', 'ubn-reference', 'ubn-naive'):
        torch.testing.assert_close(outputs[name], outputs['ubn'], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs['bnet'], outputs['bn'], rtol=1e-5, atol=1e-5)
    assert set(benchmark.DEFAULT_CONTENDERS) == set(outputs) - {'ubn-torch'}


def test_the_gate_of_the_contenders_never_closes():
    for name in ('ubn', 'ubn-torch', 'ubn-reference', 'ubn-naive'):
        with benchmark.CONTENDERS[name].forced():
            norm = benchmark.CONTENDERS[name].make(2)
            for _ in range(40):
                x = torch.randn(1, 2, 4, 4)
                before = norm.running_mean.clone()
                norm(torch.cat([x, -x + 0.01]))  # as dissimilar as two samples can be
                assert not torch.equal(norm.running_mean, before), name
            assert norm.running_similarity < -0.9


def test_the_composition_is_bnet():
    torch.manual_seed(0)
    composition, bnet = benchmark.composition(4), mmubn.BNET(4)
    with torch.no_grad():
        bnet.neighbor_weight.normal_()
        composition[1].weight.copy_(functional.depthwise_kernel(bnet.weight, bnet.neighbor_weight.view(4, -1)))
        composition[1].bias.copy_(bnet.bias)
    x = torch.randn(3, 4, 6, 7)
    torch.testing.assert_close(composition(x), bnet(x), rtol=1e-5, atol=1e-5)
    assert len(list(composition.parameters())) == 2, 'no affine step besides the convolution'


def test_the_network_is_resnet50():
    torch.manual_seed(0)
    ours, theirs = benchmark.resnet50(nn.BatchNorm2d).eval(), torchvision.models.resnet50().eval()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 25_557_032
    state = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict(dict(state))
    x = torch.randn(1, 3, 64, 48)
    torch.testing.assert_close(ours(x), theirs(x))


def test_every_norm_of_the_network_is_the_contenders():
    norms = [
        module
        for module in benchmark.resnet50(mmubn.UBN).modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert len(norms) == 53
    assert {type(norm) for norm in norms} == {mmubn.UBN}


# ---- measuring


def test_the_clock_gives_the_time_of_each_step(monkeypatch):
    moments = iter([10.0, 10.25, 12.0])
    monkeypatch.setattr(measurement.time, 'perf_counter', lambda: next(moments))
    calls = []
    assert benchmark.Clock(CPU).times([lambda: calls.append(1), lambda: calls.append(2)]) == [250.0, 1750.0]
    assert calls == [1, 2]


def test_the_copy_counts_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(measurement, 'LARGE', 5_000_000)
    monkeypatch.setattr(benchmark.Clock, 'times', lambda self, steps: [4.0 for step in steps])
    assert benchmark.copy_bandwidth(benchmark.Clock(CPU)) == 2 * 5e6 / 4e-3 / 1e9


def test_a_cold_clock_overwrites_the_caches_first(monkeypatch):
    monkeypatch.setattr(measurement, 'LARGE', 2**20)
    clock = benchmark.Clock(CPU, cold=True)
    clock.cold.fill_(1)
    seen = []
    clock.times([lambda: seen.append(bool(clock.cold.any()))])
    assert seen == [False]


def setting(*shape):
    return benchmark.Setting(shape, 'fp32', 'nchw')


def test_saved_memory_counts_what_the_backward_needs():
    """BatchNorm keeps x and two numbers per channel; UBN x and some per sample and channel; the naive UBN four maps."""
    place = setting(3, 5, 32, 32)
    inputs = benchmark.LayerTrial.inputs(place, CPU)
    x, numbers = inputs[0].nbytes, 3 * 5 * 4
    saved = {}
    for name, contender in benchmark.CONTENDERS.items():
        with contender.forced():
            trial = benchmark.LayerTrial(contender, place, *inputs)
            saved[name] = benchmark.saved_bytes(trial.model, trial.train()[0])
    assert saved['bn'] == x + 2 * 5 * 4
    assert x < saved['ubn'] < x + 12 * numbers
    assert 2 * x < saved['composition'] < 2 * x + 12 * numbers
    assert 3 * x < saved['ubn-naive'] < 3 * x + 12 * numbers


def test_ratios_are_taken_within_a_round():
    """Where every round is slower than the last, the medians of the ratios still show no spread."""
    slow = {'bn': {'training': [1.0, 10.0, 100.0]}, 'ubn': {'training': [2.0, 20.0, 200.0]}}
    bn, ubn = benchmark.compare(setting(2, 3, 4, 4), dict(bn='-', ubn='torch'), slow, 'bn')
    assert ubn.value == (11.0, 20.0, 110.0)
    assert ubn.ratio == (2.0, 2.0, 2.0)
    assert bn.ratio == (1.0, 1.0, 1.0)


def test_every_contender_has_its_turn_in_every_round(monkeypatch):
    """In orders that differ."""
    place = setting(2, 3, 4, 4)
    plan = benchmark.Plan(
        'layer', benchmark.LayerTrial, [place], ['bn', 'ubn', 'rbn'], baseline='bn', device=CPU, repeats=6, warmup=2
    )
    turns = []

    def forced(self):
        turns.append(next(name for name, contender in benchmark.CONTENDERS.items() if contender is self))
        return contextlib.nullcontext()

    monkeypatch.setattr(benchmark.Contender, 'forced', forced)
    labels = []
    _, samples = measurement.measure_setting(place, plan, benchmark.Clock(CPU), labels.append)
    assert labels == [str(place)] * plan.rounds
    rounds = [tuple(turns[i : i + 3]) for i in range(6, len(turns), 3)]  # after two builds of each
    assert len(rounds) == 8
    assert all(sorted(turn) == ['bn', 'rbn', 'ubn'] for turn in rounds)
    assert len(set(rounds)) > 2
    assert {len(values) for name in samples for key, values in samples[name].items() if key != 'saved'} == {6}


# ---- reports


def test_growth_is_the_exponent():
    axes = benchmark.sweep_axes((2, 3, 5, 5), [8, 1, 2, 4, 2], [3], [5, 10, 20], 'fp32', 'nchw')
    assert [size for size, _ in axes['N']] == [1, 2, 4, 8]
    settings = list(dict.fromkeys(setting for points in axes.values() for _, setting in points))
    plan = benchmark.Plan('sweep', benchmark.LayerTrial, settings, ['bn', 'ubn'], 'bn', CPU, axes)
    results = []
    for place in settings:
        n, c, h, w = place.shape
        linear = benchmark.quartiles([n * c * h * w * 1e-3])
        mixed = benchmark.quartiles([n**0.5 * h**4])
        for name, value in (('bn', linear), ('ubn', mixed)):
            results.append(benchmark.Result(place, name, '-', 'training', value, value))
    random.Random(0).shuffle(results)
    assert [line.split('|')[1:-1] for line in benchmark.growth_table(results, plan)[2:-1]] == [
        [' bn ', ' 1.00 ', ' - ', ' 1.00 '],
        [' ubn ', ' 0.50 ', ' - ', ' 2.00 '],
    ]


@pytest.fixture
def small_resnet50(monkeypatch):
    """A small network in the place of the ResNet-50."""

    def small(norm):
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4))

    monkeypatch.setattr(deployment, 'resnet50', small)


@pytest.mark.usefixtures('small_resnet50')
def test_deployed_networks_are_those_they_stand_for():
    nets = deployment.deployed(['ubn'])
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(nets['bn, fused'](x), deployment.trained_resnet50('bn')(x))
    assert not [module for module in nets['bn, fused'].modules() if isinstance(module, nn.BatchNorm2d)]
    torch.testing.assert_close(nets['ubn, folded'](x), nets['ubn, as trained'](x))
    norm = nets['ubn, as trained'][1]
    assert all(parameter.all() for parameter in norm.parameters()), 'none of its steps is left out'


@pytest.mark.slow
@pytest.mark.usefixtures('small_resnet50')
def test_deployed_networks_are_compared_in_turns():
    labels = []
    results = deployment.measure_deployed(['ubn'], [(1, 3, 9, 8)], 3, 1, labels.append)
    assert labels == ['1x3x9x8'] * 4
    networks = ('bn, fused', 'ubn, as trained', 'ubn, folded')
    assert {(r.runtime, r.network) for r in results} == set(itertools.product(('torch', 'onnxruntime'), networks))
    for result in results:
        assert 0 < result.milliseconds.low <= result.milliseconds.high
        assert (result.map_nodes is None) == (result.runtime == 'torch')
        if result.network == 'bn, fused':
            assert result.ratio == (1, 1, 1)
    nodes = {r.network: r.map_nodes for r in results if r.runtime == 'onnxruntime'}
    assert nodes['bn, fused'] == 3
    assert nodes['ubn, folded'] == 3 + 2 * 4 < nodes['ubn, as trained']
    text = deployed_markdown(results, 3, 1, 'a command')
    assert '### 1x3x9x8' in text
    assert f'{nodes["ubn, folded"]} |' in text
