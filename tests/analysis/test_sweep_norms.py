"""The norms of the sweeps against plain loops: what a gate compares, when it is decided, what moves while closed."""

from pathlib import Path

import pytest
import torch
from mmpretrain.registry import MODELS as MMPRETRAIN
from torch import nn

from mmubn import UBN
from mmubn.analysis.sweep_norms import (
    CenteredGateUBN,
    InputGateUBN,
    OppositeGateUBN,
    OutputGateUBN,
    PooledGateUBN,
    RelativeGateUBN,
)
from mmubn.analysis.sweeps import read_sweeps
from mmubn.layers import UnifiedNorm

ROOT = Path(__file__).resolve().parents[2]
EPS = 1e-5
GATES = [InputGateUBN, CenteredGateUBN, PooledGateUBN, OutputGateUBN, RelativeGateUBN]


def batches(count, seed=0, dtype=torch.float64):
    """Batches that are less and less alike: the mean that their samples share shrinks to nothing."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        noise = torch.randn(6, 3, 4, 5, generator=generator, dtype=dtype)
        yield noise + max(0, 4 - i) * torch.tensor([1.0, -2.0, 0.5], dtype=dtype)[:, None, None]


def similarity(features, count):
    """The mean cosine over all pairs of the first samples, pair by pair."""
    rows = [row.flatten() for row in features[:count]]
    pairs = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    return sum(float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / len(pairs)


def centred(x):
    means = [sum(float(image[c].mean()) for image in x) / len(x) for c in range(x.shape[1])]
    return x - torch.tensor(means, dtype=x.dtype)[:, None, None]


FEATURES = {
    InputGateUBN: lambda x, y: x,
    CenteredGateUBN: lambda x, y: centred(x),
    PooledGateUBN: lambda x, y: x.mean((2, 3)),
    OutputGateUBN: lambda x, y: y,
}


def state(norm):
    return {name: tensor.clone() for name, tensor in norm.state_dict().items()}


def changes(before, norm):
    return {name for name, tensor in norm.state_dict().items() if not torch.equal(tensor, before[name])}


def closed(norm):
    return int(norm.num_batches - norm.num_batches_tracked)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_by_default_it_is_ubn_bit_for_bit(dtype):
    ubn, norm = UBN(3, threshold=0.8), InputGateUBN(3, threshold=0.8)
    for x in batches(12, dtype=torch.float32):
        inputs = [x.to(dtype).requires_grad_() for _ in range(2)]
        outputs = [layer(each) for layer, each in zip((ubn, norm), inputs, strict=True)]
        for y in outputs:
            (y.float() ** 3).sum().backward()
        assert torch.equal(*outputs)
        assert torch.equal(*(each.grad for each in inputs))
        for name, buffer in ubn.named_buffers():
            assert torch.equal(buffer, norm.get_buffer(name)), name
        assert bool(norm.condensed) == bool(ubn.running_similarity > 0.8)
    assert 0 < closed(norm) < 12
    assert norm.num_batches == 12


@pytest.mark.parametrize('samples', [2, 4, 16])
@pytest.mark.parametrize('gate', FEATURES)
def test_what_is_compared(gate, samples):
    """tau <- 0.9 tau + 0.1 s, of the batch, or of the output that the batch before had."""
    norm = gate(3, similarity_samples=samples).double()
    nn.init.normal_(norm.neighbor_weight)
    expected, y = 1.0, None
    for i, x in enumerate(batches(6)):
        before = y
        y = norm(x).detach()
        if gate is OutputGateUBN:
            s = 1.0 if i == 0 else similarity(before, samples)
        else:
            s = similarity(FEATURES[gate](x, y), samples)
        expected = 0.9 * expected + 0.1 * s
        assert float(norm.running_similarity) == pytest.approx(expected, rel=1e-9)
    assert expected < 0.99


def test_the_readings_differ():
    taus = set()
    for gate in FEATURES:
        norm = gate(3).double()
        for x in batches(6):
            norm(x)
        taus.add(round(float(norm.running_similarity), 6))
    assert len(taus) == len(FEATURES)


@pytest.mark.parametrize('gate', GATES)
def test_evaluation_moves_nothing(gate):
    norm = gate(3, learns_while_closed=True)
    for x in batches(8, dtype=torch.float32):
        norm(x)
    before = state(norm)
    norm.eval()
    for x in batches(2, seed=1, dtype=torch.float32):
        norm(x)
    assert not changes(before, norm)


@pytest.mark.parametrize('gate', GATES)
def test_the_state_is_whole(gate):
    """A training that is interrupted goes on as if it were not."""
    one, other = gate(3, interval=3, threshold=0.8), gate(3, interval=3, threshold=0.8)
    data = list(batches(12, dtype=torch.float32))
    for x in data[:7]:
        one(x)
    other.load_state_dict(one.state_dict())
    for x in data[7:]:
        assert torch.equal(one(x), other(x))
    assert not changes(state(one), other)


def test_closed_batches_are_counted_and_normalised_by_what_was_learned():
    norm = InputGateUBN(3, threshold=0.8).double()
    expected = 0
    for x in batches(12):
        before = state(norm)
        y = norm(x)
        if norm.running_similarity > 0.8:
            assert {'running_mean', 'running_var', 'num_batches_tracked'} <= changes(before, norm)
            continue
        expected += 1
        assert changes(before, norm) <= {'running_similarity', 'num_batches', 'condensed'}
        mean, var = (before[name][:, None, None] for name in ('running_mean', 'running_var'))
        torch.testing.assert_close(y, torch.sigmoid(torch.tensor(1.0)) * (x - mean) / (var + EPS).sqrt())
    assert closed(norm) == expected > 0


def test_the_gate_is_decided_once_in_an_interval():
    """The batch in which it is decided is the first of which it holds."""
    norm, decided = InputGateUBN(3, threshold=0.8, interval=4).double(), True
    seen = []
    for i, x in enumerate(batches(17), start=1):
        tracked = int(norm.num_batches_tracked)
        norm(x)
        if i % 4 == 0:
            decided = bool(norm.running_similarity > 0.8)
        assert bool(norm.condensed) == decided
        assert norm.num_batches_tracked - tracked == decided
        seen.append(bool(norm.running_similarity > 0.8) == decided)
    assert not all(seen), 'the interval makes no difference'
    assert closed(norm) > 0


def test_it_learns_while_closed():
    """First the running statistics move, then they normalise."""
    norm = InputGateUBN(3, momentum=0.3, threshold=0.8, learns_while_closed=True).double()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for x in batches(12):
        tracked = int(norm.num_batches_tracked)
        y = norm(x)
        mean = 0.7 * mean + 0.3 * x.mean((0, 2, 3))
        var = 0.7 * var + 0.3 * x.transpose(0, 1).flatten(1).var(1, unbiased=True)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        is_open = bool(norm.running_similarity > 0.8)
        assert norm.num_batches_tracked - tracked == is_open
        if not is_open:
            expected = (x - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
            torch.testing.assert_close(y, torch.sigmoid(torch.tensor(1.0)) * expected)
    assert 0 < closed(norm) < 12


def test_in_the_other_direction_condensed_features_take_the_running_statistics():
    """While one of the two is open the other is closed; by Eq. 3 the features are condensed at first."""
    one, other = InputGateUBN(3, threshold=0.8).double(), OppositeGateUBN(3, threshold=0.8).double()
    decisions = []
    for x in batches(20):
        one(x)
        other(x)
        assert torch.equal(one.running_similarity, other.running_similarity)
        assert bool(one.condensed) is not bool(other.condensed)
        decisions.append(bool(other.condensed))
    assert decisions[0] is False
    assert decisions[-1] is True
    assert other.num_batches_tracked == sum(decisions)


def test_a_batch_that_is_more_alike_than_of_late_opens_the_gate():
    """s > tau, and open until ten batches were learned from."""
    norm = RelativeGateUBN(3).double()
    tau, tracked, decisions = 1.0, 0, []
    for x in [*batches(14), *batches(6, seed=1)]:
        s = similarity(x, 16)
        is_open = s > tau or tracked < 10
        decisions.append(is_open)
        tau, tracked = 0.9 * tau + 0.1 * s, tracked + is_open
        norm(x)
        assert norm.num_batches_tracked == tracked
        assert bool(norm.condensed) == is_open
    assert all(decisions[:10])
    assert {True, False} == set(decisions[10:])


@pytest.mark.parametrize('gate', [InputGateUBN, CenteredGateUBN, PooledGateUBN, OutputGateUBN])
def test_one_sample_is_no_evidence(gate):
    norm = gate(3)
    x = torch.randn(1, 3, 4, 5)
    norm(x)
    tau = norm.running_similarity.clone()
    norm(x)
    assert tau.isfinite()
    assert torch.equal(norm.running_similarity, tau)


def test_two_forwards_before_a_backward():
    """The levels of a detector's head share norms: the gate of the first is what it was for the first's gradient."""
    gradients = []
    for norm in (UBN(3, threshold=0.8), InputGateUBN(3, threshold=0.8)):
        *first, x, other = batches(9, dtype=torch.float32)
        for each in first[:5]:
            norm(each)
        was_open = bool(norm.running_similarity > 0.8)
        x.requires_grad_()
        y = norm(x)
        norm(other)
        (y**3).sum().backward()
        gradients.append(x.grad)
        assert was_open
    assert torch.equal(*gradients)


@pytest.mark.parametrize('interval', [0, -1, 1.5, True, '31'])
def test_an_interval_is_a_number_of_batches(interval):
    with pytest.raises(ValueError, match=r'^CenteredGateUBN: interval must be an integer of at least 1, got '):
        CenteredGateUBN(3, interval=interval)


@torch.no_grad()
@pytest.mark.parametrize('norm', ['BNET', 'UBN'])
def test_a_random_kernel_starts_as_a_convolution_in_every_norm(norm):
    """As nn.Conv2d does, whose bound is 1 / sqrt(inputs of an output); in the network of the sweep fresh-kernel."""
    sweep = read_sweeps(ROOT / 'configs' / 'sweeps' / 'digits.yml', ['fresh-kernel'], [0])[0]
    cfg = next(run for run in sweep.runs if run.label == f'{norm}, random').load().model
    model = MMPRETRAIN.build(cfg)
    model.init_weights()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, UnifiedNorm)}
    assert {type(layer).__name__ for layer in layers.values()} == {norm}
    assert len(layers) == 20
    last = {name for name in layers if name.endswith('bn2')}
    assert len(last) == 8
    for name, layer in layers.items():
        for part in ('weight', 'neighbor_weight', 'bias'):
            values = getattr(layer, part)
            if name in last and part != 'neighbor_weight':
                assert not values.any(), 'zero_init_residual'
                continue
            assert values.abs().max() <= 1 / 3
            assert values.abs().max() > 0.25
            assert float(values.std()) == pytest.approx(1 / 27**0.5, rel=0.4)
    if norm == 'UBN':
        assert all((layer.scale_bias == 1).all() for layer in layers.values())
    convolution = nn.Conv2d(512, 512, 3, groups=512)
    assert float(convolution.weight.abs().max()) == pytest.approx(1 / 3, rel=0.01)
