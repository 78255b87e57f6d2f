"""What the first use of the Triton kernels on a GPU computes, in Triton's interpreter.

What comes of it is tested in test_dispatch.py.
"""

import pytest
import torch

pytest.importorskip('triton')

from interpreter import interpreted_kernels

from mmubn.ops.triton import probe
from mmubn.ops.triton.backend import TritonBackend
from mmubn.ops.triton.replay import Tape

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning:(triton|numpy)')

CPU = torch.device('cpu')


@pytest.fixture(scope='module', autouse=True)
def interpreted():
    with interpreted_kernels():
        yield


def wrong(step, change, when=lambda x: True):
    """A backend one step of which returns a wrong first tensor."""

    def changed(self, *arguments):
        found = getattr(TritonBackend, step)(self, *arguments)
        if not when(arguments[0]):
            return found
        if isinstance(found, torch.Tensor):
            return found * change
        first, *others = found
        return type(found)(first * change, *others)

    return type('Wrong', (TritonBackend,), {step: changed})()


def test_right_numbers(monkeypatch):
    """By steps and by replays of forward and backward."""
    replays, replay = [], Tape.replay

    def counted(tape, inputs):
        replays.append(tape)
        return replay(tape, inputs)

    monkeypatch.setattr(Tape, 'replay', counted)
    assert probe.check(TritonBackend(), CPU) is None
    # In each case the forward's tape in the second and third iteration, and the backward's in the third.
    assert [replays.count(tape) for tape in dict.fromkeys(replays)] == [2, 1] * len(probe.CASES)


@pytest.mark.parametrize(
    ('step', 'change', 'name'),
    [
        ('instance_moments', 1.001, 'the output'),
        ('apply', 1.001, 'the output'),
        ('tap_sums', 1.001, 'the gradient of weight'),
        ('input_gradient', 1.001, 'the gradient of x'),
        ('input_gradient', float('nan'), 'the gradient of x'),
    ],
)
def test_wrong_numbers(step, change, name):
    size = (
        'nan' if change != change else '1.0e-03' if name in ('the gradient of x', 'the gradient of weight') else r'\S+'
    )
    message = rf'^{name} of a layer in float32 and NCHW is off by {size} of its largest value in iteration 1 of 3$'
    with pytest.raises(probe.WrongNumbersError, match=message):
        probe.check(wrong(step, change), CPU)


def test_each_layout_and_dtype():
    """A second case is checked as the first."""
    backend = wrong('apply', 1.1, when=lambda x: x.dtype == torch.bfloat16)
    with pytest.raises(probe.WrongNumbersError, match='in bfloat16 and channels-last is off by '):
        probe.check(backend, CPU)


@pytest.mark.parametrize(
    ('of_forward', 'name', 'iteration'), [(True, 'the output', 2), (False, 'the gradient of x', 3)]
)
def test_a_wrong_replay(of_forward, name, iteration, monkeypatch):
    replay = Tape.replay

    def wrong_replay(tape, inputs):
        outputs, workspace = replay(tape, inputs)
        is_forward = len(outputs) == 1
        if is_forward == of_forward:
            outputs[0] = outputs[0] * 1.001
        return outputs, workspace

    monkeypatch.setattr(Tape, 'replay', wrong_replay)
    with pytest.raises(probe.WrongNumbersError, match=f'^{name} of .* off by 1.0e-03 .* in iteration {iteration} of 3'):
        probe.check(TritonBackend(), CPU)
