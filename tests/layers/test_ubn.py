"""What UBN alone has: its gate, its arguments, and BatchNorm where all of it is off.

What every norm type guarantees, UBN too, is in test_contract.py.
"""

import pytest
import torch
from helpers import batch, randomize
from norms import (
    CENTER,
    GATE,
    GATED_SHAPES,
    NEIGHBORS,
    SCALE,
    SIGMOID_1,
    Norm,
    check_derivatives,
    check_training_then_evaluation,
)
from torch import nn

from mmubn.layers import UBN, SyncUBN

DEFAULT = Norm(UBN, NEIGHBORS | CENTER | SCALE, 'rectified', SIGMOID_1, GATE, GATED_SHAPES)


def with_options(extra=DEFAULT.extra, **options):
    return DEFAULT._replace(extra=extra, options=GATE | options)


OPTIONS = {
    'no gate': with_options(threshold=None),
    'another threshold': with_options(threshold=0.5),
    'no centering': with_options(NEIGHBORS | SCALE, centering=False),
    'no scaling': with_options(NEIGHBORS | CENTER, scaling=False),
    'pointwise': with_options(CENTER | SCALE, kernel_size=1),
    '5x5': with_options(kernel_size=5),
    'bias calibrated': with_options(calibrate_bias=True),
    'few samples': with_options(similarity_samples=2),
    'other momenta': with_options(momentum=0.3, similarity_momentum=0.85, eps=1e-3),
}
ALL_OFF = dict(threshold=None, centering=False, scaling=False, kernel_size=1)


class TestOptions:
    @pytest.mark.parametrize('norm', OPTIONS.values(), ids=OPTIONS)
    def test_training_steps_then_evaluation(self, norm, backend):
        check_training_then_evaluation(norm)

    @pytest.mark.parametrize('norm', OPTIONS.values(), ids=OPTIONS)
    def test_gradients_of_gradients(self, norm):
        check_derivatives(norm)


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
            x = [(batch(shape, seed=step, dtype=torch.float64) + 0.5).requires_grad_() for _ in range(2)]
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


class TestGate:
    def test_defaults_are_those_of_the_paper(self):
        layer = UBN(3)
        assert (layer.threshold, layer.similarity_momentum, layer.similarity_samples) == (0.15, 0.1, 16)
        assert layer.running_similarity == 1

    def test_one_sample_is_no_evidence(self, backend):
        layer = UBN(3)
        layer.running_similarity.fill_(0.4)
        layer(batch((1, 3, 5, 5)))
        assert layer.running_similarity == torch.tensor(0.4)
        assert layer.num_batches_tracked == 1

    def test_closed_and_without_evidence_it_stays_closed(self, backend):
        layer = randomize(UBN(3))
        layer.running_similarity.fill_(0.1)
        before = layer.running_mean.clone()
        layer(batch((1, 3, 5, 5)))
        assert torch.equal(layer.running_mean, before)
        assert layer.num_batches_tracked == 0


class TestBadArguments:
    @pytest.mark.parametrize(
        ('name', 'value'),
        [
            ('threshold', 1.01),
            ('threshold', -2),
            ('threshold', '0.15'),
            ('threshold', float('nan')),
            ('similarity_momentum', -0.1),
            ('similarity_momentum', None),
            ('similarity_samples', 1),
            ('similarity_samples', 2.0),
            ('centering', 'yes'),
            ('scaling', 1),
            ('calibrate_bias', None),
        ],
    )
    def test_an_error_names_the_argument_and_the_value(self, name, value):
        with pytest.raises(ValueError, match=f'^UBN: {name} must be ') as error:
            UBN(4, **{name: value})
        assert repr(value) in str(error.value)

    def test_calibrate_bias_without_scaling(self):
        with pytest.raises(ValueError, match=r'^UBN: calibrate_bias must be False where scaling is False'):
            UBN(4, scaling=False, calibrate_bias=True)


@pytest.mark.parametrize('norm', [UBN, SyncUBN])
def test_a_running_similarity_of_another_shape(norm):
    for shape in ((1,), (2,), (0,)):
        layer = norm(3)
        layer.running_similarity = torch.ones(shape)
        with pytest.raises(ValueError, match=rf'^{norm.__name__}: running_similarity must have shape \(\), got \('):
            layer(batch())
