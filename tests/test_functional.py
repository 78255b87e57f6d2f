"""The pure functions, each against its definition."""

import functools

import oracle
import pytest
import torch
from helpers import batch

from mmubn import functional

double_batch = functools.partial(batch, dtype=torch.float64)


class TestSimilarity:
    @pytest.mark.parametrize('samples', [2, 3, 16, 20])
    @pytest.mark.parametrize('max_samples', [2, 16])
    @pytest.mark.parametrize('offset', [0.0, 1.0])
    def test_equals_the_mean_over_all_pairs(self, samples, max_samples, offset):
        x = double_batch((samples, 3, 4, 5)) + offset
        expected = oracle.pairwise_similarity(x, max_samples)
        assert functional.mean_cosine_similarity(x, max_samples).item() == pytest.approx(expected, abs=1e-12)
        assert functional.mean_cosine_similarity(x.float(), max_samples).item() == pytest.approx(expected, abs=1e-5)

    def test_known_values(self):
        same = double_batch((1, 2, 3, 3)).expand(4, -1, -1, -1)
        assert functional.mean_cosine_similarity(same).item() == pytest.approx(1)
        assert functional.mean_cosine_similarity(torch.cat([same[:1], -same[:1]])).item() == pytest.approx(-1)
        assert functional.mean_cosine_similarity(torch.eye(5).view(5, 5, 1, 1)).item() == pytest.approx(0, abs=1e-7)

    def test_scale_of_a_sample_does_not_matter(self):
        x = double_batch((4, 3, 4, 5))
        scales = torch.tensor([1e-6, 1.0, 1e3, 7.0], dtype=torch.float64).view(-1, 1, 1, 1)
        torch.testing.assert_close(functional.mean_cosine_similarity(scales * x), functional.mean_cosine_similarity(x))

    def test_a_sample_of_zeros_is_similar_to_none(self):
        x = double_batch((3, 2, 4, 4)) + 1
        x[1] = 0
        assert functional.mean_cosine_similarity(x).item() == pytest.approx(oracle.pairwise_similarity(x))

    def test_float16_at_the_edge_of_its_range(self):
        x = torch.full((2, 64, 32, 32), 65504.0, dtype=torch.float16)
        assert functional.mean_cosine_similarity(x).item() == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e30], ids=str)
    def test_no_evidence_from_samples_without_a_finite_norm(self, value):
        x = batch((3, 2, 4, 4))
        x[2] = value
        assert functional.mean_cosine_similarity(x).isnan()

    def test_no_evidence_from_one_sample(self):
        assert functional.mean_cosine_similarity(double_batch((1, 2, 3, 3))).isnan()
        assert functional.mean_cosine_similarity(double_batch((0, 2, 3, 3))).isnan()

    def test_no_gradient(self):
        assert not functional.mean_cosine_similarity(double_batch((3, 2, 4, 4)).requires_grad_()).requires_grad


class TestGate:
    def test_running_similarity(self):
        tau = torch.tensor(0.5)
        assert functional.update_running_similarity(tau, torch.tensor(0.1), 0.25).item() == pytest.approx(0.4)
        assert functional.update_running_similarity(tau, torch.tensor(float('nan')), 0.25) is not tau
        assert functional.update_running_similarity(tau, torch.tensor(float('nan')), 0.25).item() == 0.5

    def test_condensed_is_strictly_above_the_threshold(self):
        assert functional.is_condensed(torch.tensor(0.1501), 0.15)
        assert not functional.is_condensed(torch.tensor(0.25), 0.25)
        assert functional.is_condensed(torch.tensor(-1.0), None)


class TestStatistics:
    @pytest.mark.parametrize('center_weight', [None, torch.tensor([0.5, -0.3, -1.0], dtype=torch.float64)])
    def test_batch_statistics_are_those_of_the_centred_input(self, center_weight):
        x = double_batch((4, 3, 5, 6)) + 3
        a, v = functional.instance_moments(x)
        w = torch.zeros(3, dtype=torch.float64) if center_weight is None else center_weight
        centred = x + w[:, None, None] * x.mean((2, 3), keepdim=True)
        mean, var = functional.batch_statistics(a, v, center_weight)
        torch.testing.assert_close(mean, centred.mean((0, 2, 3)))
        torch.testing.assert_close(var, centred.var((0, 2, 3), correction=0))

    def test_no_cancellation_where_the_mean_is_large(self):
        x = batch((4, 3, 16, 16)) + 3e4
        _, var = functional.batch_statistics(*functional.instance_moments(x), None)
        torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-3, atol=0)

    def test_half_precision_statistics_are_float32(self):
        for dtype in (torch.float16, torch.bfloat16):
            assert functional.instance_moments(batch((2, 3, 4, 4), dtype=dtype))[0].dtype == torch.float32


class TestAffine:
    @pytest.mark.parametrize('size', [3, 5, 7])
    def test_taps_are_in_row_major_order_around_the_centre(self, size):
        kernel = double_batch((2, size * size))
        centre = size * size // 2
        neighbors = torch.cat([kernel[:, :centre], kernel[:, centre + 1 :]], dim=1)
        impulse = torch.zeros(1, 2, 2 * size, 2 * size, dtype=torch.float64)
        impulse[:, :, size, size] = 1
        y = functional.affine(impulse, kernel[:, centre], torch.zeros(2, dtype=torch.float64), neighbors)
        half = size // 2
        found = y[0, :, size - half : size + half + 1, size - half : size + half + 1]
        # A convolution layer correlates: the response to an impulse is the kernel turned by half a turn.
        torch.testing.assert_close(found.flip(1, 2), kernel.view(2, size, size))

    def test_pointwise(self):
        x, weight, bias = double_batch((2, 3, 4, 4)), double_batch((3,), seed=1), double_batch((3,), seed=2)
        torch.testing.assert_close(
            functional.affine(x, weight, bias, None), x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        )
