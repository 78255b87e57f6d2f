"""Earth-Mover distances against closed forms, the bound of unitized outputs, the hook against known shifts."""

import math
import random

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from scipy.special import gamma
from scipy.stats import norm
from torch import nn

from mmubn.analysis.runs import read_layer_log, read_scalars, series
from mmubn.layers import UBN, UnitizedBN
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.hooks.covariate_shift import (
    MAX_POINTS,
    CovariateShiftHook,
    KeptPoints,
    channel_distances,
    sliced_distance,
)
from mmubn.openmmlab.hooks.feature_condensation import FeatureCondensationHook
from mmubn.openmmlab.hooks.fixed_batch import FixedBatch


def gaussian(mean, deviation, count=20000):
    """The Gaussian's quantiles on a uniform grid: a sample without sampling error, (count, 1)."""
    return norm.ppf((np.arange(count) + 0.5) / count, mean, deviation)[:, None]


def cloud(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


class TestChannelDistances:
    @pytest.mark.parametrize('shift', [0.0, 0.3, -2.0])
    def test_a_shifted_gaussian_is_at_the_distance_of_the_shift(self, shift):
        assert channel_distances(gaussian(0, 1), gaussian(shift, 1)) == pytest.approx(abs(shift), abs=1e-9)

    @pytest.mark.parametrize('scale', [0.1, 0.5, 1.0, 3.0])
    def test_a_scaled_gaussian_is_at_the_mean_absolute_value_of_the_difference(self, scale):
        """The optimal map is z -> scale z, so W = |scale - 1| E|z| = |scale - 1| sqrt(2 / pi)."""
        expected = abs(scale - 1) * math.sqrt(2 / math.pi)
        assert channel_distances(gaussian(0, 1), gaussian(0, scale)) == pytest.approx(expected, rel=1e-3)

    def test_point_masses_are_at_their_own_distance_in_each_channel(self):
        before, after = np.array([[1.0, -2.0, 5.0]]), np.array([[4.0, -2.0, -1.0]])
        assert channel_distances(before, after).tolist() == [3, 0, 6]

    def test_the_order_of_the_values_and_their_number_do_not_matter(self):
        before, after = cloud(6, 3), cloud(6, 3, seed=1)
        expected = np.abs(np.sort(before, 0) - np.sort(after, 0)).mean(0)  # the optimal coupling in one dimension
        np.testing.assert_allclose(channel_distances(before[::-1], after), expected)
        np.testing.assert_allclose(channel_distances(np.repeat(before, 5, 0), np.repeat(after, 2, 0)), expected)

    def test_half_the_mass_moved_costs_half(self):
        assert channel_distances(np.zeros((2, 1)), np.array([[0.0], [8.0], [0.0], [8.0]])) == pytest.approx(4)

    def test_float32_is_computed_in_float64(self):
        distances = channel_distances(np.full((3, 1), 1e6, np.float32), np.full((3, 1), 1e6 + 0.0625, np.float32))
        assert distances.dtype == np.float64
        assert distances.tolist() == [0.0625]


class TestSlicedDistance:
    @pytest.mark.parametrize('channels', [1, 2, 3, 16])
    def test_point_masses_are_at_their_distance_times_the_mean_of_a_coordinate_of_a_unit_vector(self, channels):
        """E|u_1| = Gamma(C/2) / (sqrt(pi) Gamma((C+1)/2)), u uniform on the sphere."""
        before, after = cloud(1, channels), cloud(1, channels, seed=1)
        mean = gamma(channels / 2) / (math.sqrt(math.pi) * gamma((channels + 1) / 2))
        expected = np.linalg.norm(after - before) * mean
        assert sliced_distance(before, after, directions=4000) == pytest.approx(expected, rel=0.03)

    def test_one_channel_is_the_plain_distance(self):
        before, after = cloud(7, 1), cloud(5, 1, seed=1)
        assert sliced_distance(before, after) == pytest.approx(channel_distances(before, after)[0])

    def test_sees_what_no_channel_sees(self):
        """Both channels stay as they are; what changes is that they go together: x = y becomes x = -y."""
        line = gaussian(0, 1, 500)
        before, after = np.hstack([line, line]), np.hstack([line, -line])
        assert channel_distances(before, after) == pytest.approx(0, abs=1e-12)
        # The projections are N(0, (u + v)^2) and N(0, (u - v)^2): ||u + v| - |u - v|| = 2 min(|u|, |v|) times E|z|,
        # and the mean of min(|cos|, |sin|) over the circle is (4 / pi) (1 - 1 / sqrt(2)).
        expected = 2 * math.sqrt(2 / math.pi) * 4 / math.pi * (1 - math.sqrt(0.5))
        assert sliced_distance(before, after, directions=2000) == pytest.approx(expected, rel=0.03)

    def test_a_rotation_of_both_does_not_matter(self):
        before, after = cloud(50, 3), 0.5 * cloud(50, 3, seed=1) + [1, 0, -2]
        rotation, _ = np.linalg.qr(cloud(3, 3, seed=2))
        rotated = sliced_distance(before @ rotation, after @ rotation, directions=4000)
        assert rotated == pytest.approx(sliced_distance(before, after, directions=4000), rel=0.02)

    def test_is_symmetric_and_zero_for_the_same_points_in_another_order(self):
        before, after = cloud(20, 4), cloud(30, 4, seed=1)
        assert sliced_distance(before, after) == pytest.approx(sliced_distance(after, before))
        assert sliced_distance(before, before[::-1]) == pytest.approx(0, abs=1e-15)
        assert sliced_distance(before, after) > 0.1

    def test_the_seed_fixes_the_directions(self):
        before, after = cloud(20, 4), cloud(20, 4, seed=1)
        assert sliced_distance(before, after) == sliced_distance(before, after)
        assert sliced_distance(before, after) != sliced_distance(before, after, seed=1)


@pytest.mark.parametrize('distance', [channel_distances, sliced_distance])
@pytest.mark.parametrize(
    ('before', 'after', 'message'),
    [
        (np.zeros(3), np.zeros((3, 1)), r'before .* shape \(n, C\), got \(3,\)'),
        (np.zeros((3, 1)), np.zeros((0, 1)), r'after .* shape \(n, C\), got \(0, 1\)'),
        (np.zeros((3, 2)), np.zeros((3, 4)), r'got \(3, 2\) and \(3, 4\)'),
        (np.zeros((2, 2)), np.array([[0, 1], [2, math.nan]]), r'after .* finite, got nan'),
        (np.array([[math.inf]]), np.zeros((2, 1)), r'before .* finite, got inf'),
    ],
    ids=['one axis', 'empty', 'other channels', 'nan', 'inf'],
)
def test_points_that_have_no_distance_are_named(distance, before, after, message):
    with pytest.raises(ValueError, match=message):
        distance(before, after)


@pytest.mark.parametrize('directions', [0, -1, 2.5])
def test_a_number_of_directions_that_is_none_is_named(directions):
    with pytest.raises(ValueError, match=f'directions must be a positive integer, got {directions}'):
        sliced_distance(np.zeros((2, 2)), np.ones((2, 2)), directions)


class TestPoints:
    """Which points of a stream of outputs are kept. Those here know where they are from: (sample, place)."""

    def stream(self, samples, places):
        grid = torch.meshgrid(torch.arange(samples), torch.arange(places), indexing='ij')
        return torch.stack(grid, dim=1).float()  # (N, C, L)

    def kept(self, *outputs):
        points = KeptPoints(2)
        for y in outputs:
            points.add(y)
        return points.values

    def test_all_of_few(self):
        points = self.kept(self.stream(4, 100), 10 + self.stream(1, 100))
        expected = {(sample, place) for sample in range(4) for place in range(100)}
        expected |= {(10, place) for place in range(10, 110)}
        assert len(points) == 500
        assert set(map(tuple, points.tolist())) == expected

    def test_of_many_as_many_as_fit_from_everywhere(self):
        points = self.kept(self.stream(32, 1024), self.stream(32, 64))
        assert points.shape == (MAX_POINTS, 2)
        assert points.dtype == np.float32
        samples, places = points.T
        assert np.bincount(samples.astype(int), minlength=32).min() > 0
        assert samples.mean() == pytest.approx(15.5, abs=3 * 9.2 / math.sqrt(512))
        # 16 of 17 in the large call, half of these to the right of its middle
        assert (places >= 512).mean() == pytest.approx(8 / 17, abs=3 * 0.5 / math.sqrt(512))

    def test_the_same_however_the_samples_are_chunked(self):
        whole = self.stream(32, 100)
        chunks = whole.split([5, 20, 7])
        assert set(map(tuple, self.kept(whole).tolist())) == set(map(tuple, self.kept(*chunks).tolist()))


# Inputs of a layer, (N, C, H, W), of which any two are taken as those before and after an update.
HOSTILE = {
    'large': 1e6 * cloud(4, 6, 3, 5),
    'tiny': 1e-6 * cloud(4, 6, 3, 5, seed=1),
    'far up': 1e6 + cloud(4, 6, 3, 5, seed=2),
    'far down': -1e6 + cloud(4, 6, 3, 5, seed=3),
    'heavy tails': np.random.default_rng(4).standard_cauchy((4, 6, 3, 5)) ** 3,
    'one channel': 1e6 * np.eye(6)[0][:, None, None] * np.ones((4, 1, 3, 5)),
    'one place': 1e6 * np.pad(np.ones((4, 6, 1, 1)), [(0, 0), (0, 0), (0, 2), (0, 4)]),
}


def outputs(layer, x):
    """Outputs of a layer in evaluation mode as points: (N*H*W, C)."""
    with torch.no_grad():
        y = layer.double().eval()(torch.from_numpy(x))
    return y.movedim(1, -1).flatten(0, -2).numpy()


class TestUnitizedOutputsAreBounded:
    """With alpha = 1, gamma = 1 and beta = 0 the output of sample n is y_n = x_s / sqrt(q_n + eps), where
    q_n = ||x_s||^2 / (HW)^2, so that ||y_n||^2 < (HW)^2 whatever x is: over the N HW points p of C values,
    mean ||p||^2 < HW. The distance between two sets of points is at most that by way of the point 0:

    - in channel c, W <= mean |p_c| + mean |p'_c| <= 2 sqrt(HW), since mean |p_c| <= sqrt(mean p_c^2);
    - in the mean over channels, W <= 2 sqrt(HW / C), since in addition mean_c |p_c| <= sqrt(||p||^2 / C);
    - along any direction u, W <= mean |u.p| + mean |u.p'| <= 2 sqrt(HW), and so in the mean over directions.

    Source: arXiv 2001.02814, which proves its bound for outputs of unit length: here HW = 1.
    """

    @pytest.fixture
    def unitized(self):
        layer = UnitizedBN(6)
        nn.init.ones_(layer.scale_weight)
        return layer

    @pytest.mark.parametrize('before', HOSTILE)
    @pytest.mark.parametrize('after', HOSTILE)
    def test_whatever_the_inputs(self, unitized, before, after):
        points = [outputs(unitized, HOSTILE[name]) for name in (before, after)]
        channel = channel_distances(*points)
        rounding = 1 + 1e-9  # some of these inputs reach the bound
        assert channel.max() <= 2 * math.sqrt(15) * rounding
        assert channel.mean() <= 2 * math.sqrt(15 / 6) * rounding
        assert sliced_distance(*points) <= 2 * math.sqrt(15) * rounding

    def test_the_bounds_are_reached(self, unitized):
        everywhere = 1e6 * np.ones((4, 6, 3, 5))
        points = outputs(unitized, everywhere), outputs(unitized, -everywhere)
        assert channel_distances(*points).mean() == pytest.approx(2 * math.sqrt(15 / 6), rel=1e-6)
        points = outputs(unitized, HOSTILE['one channel']), outputs(unitized, -HOSTILE['one channel'])
        assert channel_distances(*points).max() == pytest.approx(2 * math.sqrt(15), rel=1e-6)

    def test_vectors_have_unit_length(self, unitized):
        points = [outputs(unitized, HOSTILE[name][:, :, 0, 0]) for name in ('far up', 'heavy tails')]
        assert [np.linalg.norm(p, axis=1) for p in points] == pytest.approx(np.ones((2, 4)))
        assert channel_distances(*points).mean() <= 2 / math.sqrt(6) * (1 + 1e-9)

    @pytest.mark.parametrize('layer', [nn.BatchNorm2d(6), UnitizedBN(6)], ids=['BatchNorm2d', 'alpha = 0'])
    def test_those_of_batch_norm_are_not(self, layer):
        for scale in (1e2, 1e6):
            x = scale * np.ones((4, 6, 3, 5))
            distances = channel_distances(outputs(layer, x), outputs(layer, -x))
            assert distances == pytest.approx(2 * scale, rel=1e-4)


class Images(torch.utils.data.Dataset):
    """Noise of (3, 4, 5), another one each time with ``augment``."""

    def __init__(self, augment=False):
        self.images = torch.randn(8, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        self.augment = augment

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        scale = 1 + random.random() + np.random.rand() + torch.rand(()) if self.augment else 1
        return dict(inputs=scale * self.images[index])


class Net(BaseModel):
    """Layers in a row; the loss is a weighted mean of the channels that come out. Predictions go through a ReLU."""

    channel_weights = torch.tensor([1.0, -2.0, 4.0])

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs, mode='tensor'):
        y = self.layers(inputs)
        if mode == 'loss':
            return dict(loss=(self.channel_weights * y.mean((0, 2, 3))).sum())
        return y.relu_()  # overwrites the norm's output


class Permuted(nn.LayerNorm):
    """Has its channels second, as MMPretrain's LayerNorm2d."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Movedim(nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.movedim(*self.axes)


class Ramp(nn.Module):
    """Weights the places, without which the mean over them, beta after a BatchNorm, would have no gradient."""

    def forward(self, x):
        return x * torch.linspace(0, 1, x.shape[2])[:, None]


def only_bias(layer):
    """What training changes of ``layer`` is its bias alone."""
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == 'bias')
    return layer


def train(folder, model, hooks=(), iterations=2, batch_size=4, augment=False, validation=True, **optim_wrapper):
    """A runner that has trained; its work dir is ``folder``. SGD with learning rate 0.1 unless told otherwise."""

    def loader(dataset, shuffle):
        sampler = dict(type='DefaultSampler', shuffle=shuffle)
        collate = dict(type='default_collate')
        return dict(dataset=dataset, sampler=sampler, collate_fn=collate, batch_size=batch_size, num_workers=0)

    optim_wrapper.setdefault('optimizer', dict(type='SGD', lr=0.1))
    validation_args = dict(val_dataloader=loader(Images(), False), val_cfg={}, val_evaluator=[]) if validation else {}
    runner = Runner(
        model,
        str(folder),
        train_dataloader=loader(Images(augment), True),
        train_cfg=dict(by_epoch=True, max_epochs=iterations * batch_size // 8, val_interval=1000),
        optim_wrapper=optim_wrapper,
        custom_hooks=list(hooks),
        randomness=dict(seed=0),
        experiment_name=str(folder),
        **validation_args,
    )
    runner.train()
    return runner


def shifts(folder, quantity):
    """What the hook wrote, (T, L)."""
    return read_layer_log(folder, 'covariate_shift.jsonl')[quantity].values


class TestHook:
    @pytest.mark.parametrize(
        'layers',
        [
            [nn.BatchNorm2d(3, momentum=0)],
            [UBN(3, momentum=0)],
            [nn.GroupNorm(1, 3)],
            [Permuted(3)],
            [Movedim(1, -1), nn.LayerNorm(3), Movedim(-1, 1)],
        ],
        ids=['BatchNorm2d', 'UBN', 'GroupNorm', 'channels second', 'channels last'],
    )
    def test_a_step_of_the_bias_shifts_the_outputs_by_that_step(self, tmp_path, layers):
        """The gradient of beta is the loss's weight of its channel: (1, -2, 4). The ReLU does not come into it."""
        train(tmp_path, Net(*map(only_bias, layers)), [CovariateShiftHook(interval=1)])
        steps = 0.1 * np.array([[1, -2, 4]])
        np.testing.assert_allclose(
            shifts(tmp_path, 'channel'), np.abs(steps).mean(keepdims=True).repeat(2, 0), rtol=1e-4
        )
        joint = sliced_distance(np.zeros((1, 3)), steps)  # all points move by the same vector
        np.testing.assert_allclose(shifts(tmp_path, 'joint'), [[joint]] * 2, rtol=1e-4)

    def test_the_move_of_the_running_statistics_counts(self, tmp_path):
        """One batch with all images, and a step of length 0: y = x / s becomes (x - mean / 2) / s'."""
        layer = nn.BatchNorm2d(3, momentum=0.5)
        optimizer = dict(type='SGD', lr=0.0)
        train(tmp_path, Net(layer), [CovariateShiftHook()], iterations=1, batch_size=8, optimizer=optimizer)
        x = Images().images.movedim(1, -1).flatten(0, 2).numpy().astype(np.float64)
        before = x / np.sqrt(1 + 1e-5)
        after = (x - 0.5 * x.mean(0)) / np.sqrt(0.5 + 0.5 * x.var(0, ddof=1) + 1e-5)
        expected = np.abs(np.sort(before, 0) - np.sort(after, 0)).mean()
        np.testing.assert_allclose(shifts(tmp_path, 'channel'), [[expected]], rtol=1e-4)

    def test_without_an_optimizer_step_and_running_statistics_nothing_shifts(self, tmp_path):
        layer = only_bias(nn.GroupNorm(1, 3))
        train(tmp_path, Net(layer), [CovariateShiftHook(interval=1)], iterations=4, accumulative_counts=2)
        channel = shifts(tmp_path, 'channel')[:, 0]
        assert channel[[0, 2]].tolist() == [0, 0]
        assert channel[[1, 3]] == pytest.approx([0.1 * 7 / 3] * 2, rel=1e-4)

    def test_measures_the_first_iteration_and_each_after_the_interval(self, tmp_path):
        train(tmp_path, Net(nn.BatchNorm2d(3)), [CovariateShiftHook(interval=3)], iterations=8)
        log = read_layer_log(tmp_path, 'covariate_shift.jsonl')
        assert set(log) == {'channel', 'joint'}
        assert log['joint'].steps.tolist() == [1, 3, 6]
        assert log['joint'].epochs.tolist() == [0, 1, 3]

    def test_the_file_and_the_visualizer_have_the_same_values(self, tmp_path):
        train(tmp_path, Net(nn.BatchNorm2d(3), UnitizedBN(3)), [CovariateShiftHook(num_samples=5)])
        log = read_layer_log(tmp_path, 'covariate_shift.jsonl')
        records = read_scalars(tmp_path)
        for quantity in ('channel', 'joint'):
            assert log[quantity].layers == ['layers.0', 'layers.1']
            assert log[quantity].settings == {'types': ['BatchNorm2d', 'UnitizedBN'], 'num_samples': 5}
            for name, value in zip(log[quantity].layers, log[quantity].values[0], strict=True):
                steps, values = series(records, f'shift_{quantity}/layer.{name}')
                assert steps == [1]
                assert values == pytest.approx([value], rel=1e-4)

    def test_unitized_outputs_stay_bounded_where_those_of_batch_norm_fly_off(self, tmp_path):
        """A learning rate of 1e6 at the convolution before; statistics that stay, so that the input stays large."""
        unitized, batch_norm = UnitizedBN(3, momentum=0), nn.BatchNorm2d(3, momentum=0)
        nn.init.ones_(unitized.scale_weight)
        largest = []
        for layer in (unitized.requires_grad_(False), batch_norm.requires_grad_(False)):
            folder = tmp_path / type(layer).__name__
            model = Net(nn.Conv2d(3, 3, 1), layer, Ramp())
            train(folder, model, [CovariateShiftHook(interval=1)], optimizer=dict(type='SGD', lr=1e6))
            largest.append(shifts(folder, 'channel').max())
        bound = 2 * math.sqrt(20 / 3)
        assert largest[0] <= bound
        assert largest[1] > 100 * bound

    def test_training_is_bit_for_bit_the_same(self, tmp_path):
        found = []
        for hooks in ([], [CovariateShiftHook(interval=2, num_samples=5)]):
            torch.manual_seed(0)
            folder = tmp_path / str(len(hooks))
            model = Net(nn.Conv2d(3, 3, 3, padding=1), UBN(3), nn.Dropout(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            runner = train(folder, model, hooks, 6, augment=True, optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
            states = (random.random(), np.random.rand(), torch.rand(()))
            losses = series(read_scalars(folder), 'loss')
            found.append((model.state_dict(), runner.optim_wrapper.state_dict(), states, losses))
        torch.testing.assert_close(*found, rtol=0, atol=0)

    @pytest.mark.parametrize('order', [1, -1])
    def test_the_condensation_hook_sees_the_training_batch_alone(self, tmp_path, order):
        found = []
        for name, hooks in {'alone': [], 'both': [CovariateShiftHook(interval=1)]}.items():
            torch.manual_seed(0)
            hooks = [FeatureCondensationHook(interval=1), *hooks][::order]
            train(tmp_path / name, Net(nn.Conv2d(3, 3, 1), UBN(3)), hooks)
            log = read_layer_log(tmp_path / name, 'feature_condensation.jsonl')
            found.append([log[quantity].values.tolist() for quantity in ('fixed', 'batch', 'running')])
        assert found[0] == found[1]

    def test_only_process_0_measures(self, tmp_path, monkeypatch):
        def forward(*_):
            raise AssertionError('another process forwards the fixed batch')

        monkeypatch.setattr(FixedBatch, 'forward', forward)
        monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: 1)
        train(tmp_path, Net(nn.BatchNorm2d(3)), [CovariateShiftHook(interval=1)])
        assert not list(tmp_path.rglob('covariate_shift.jsonl'))

    def test_a_layer_without_values_has_none_and_the_others_have_theirs(self, tmp_path):
        class Odd(Net):
            def __init__(self):
                super().__init__(only_bias(nn.BatchNorm2d(3, momentum=0)))
                self.unused = nn.BatchNorm2d(3)
                self.empty = nn.GroupNorm(1, 3)
                self.infinite = nn.GroupNorm(1, 3)
                nn.init.constant_(self.infinite.bias, math.inf)

            def forward(self, inputs, mode='tensor'):
                self.empty(inputs[:0])
                self.infinite(inputs)
                return super().forward(inputs, mode)

        train(tmp_path, Odd(), [CovariateShiftHook()])
        np.testing.assert_allclose(shifts(tmp_path, 'channel'), [[0.1 * 7 / 3, *[math.nan] * 3]], rtol=1e-4)
        tags = {key for record in read_scalars(tmp_path) for key in record if 'shift' in key}
        assert tags == {'shift_channel/layer.layers.0', 'shift_joint/layer.layers.0'}


@pytest.mark.parametrize('argument', ['interval', 'num_samples'])
@pytest.mark.parametrize('value', [0, -3, 1.5, True, '2'])
def test_an_argument_that_is_no_number_of_something_is_named(argument, value):
    with pytest.raises(ValueError, match=f'CovariateShiftHook: {argument} must be a positive integer, got {value!r}'):
        CovariateShiftHook(**{argument: value})


def test_a_run_without_validation_set_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r'CovariateShiftHook .*val_dataloader'):
        train(tmp_path, Net(nn.BatchNorm2d(3)), [CovariateShiftHook()], validation=False)
