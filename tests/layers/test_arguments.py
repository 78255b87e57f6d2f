"""What the constructors of all norm types take for an argument; what each type refuses is in test_contract.py."""

import numpy as np
import pytest
import torch
from helpers import batch

from mmubn.layers import UBN
from mmubn.layers.arguments import is_int, is_number, require


@pytest.mark.parametrize('value', [1, -3, np.int64(4)])
def test_integers(value):
    assert is_int(value)


@pytest.mark.parametrize('value', [True, 1.0, '1', None, np.float32(1), np.bool_(True), torch.tensor(1)])
def test_no_integers(value):
    assert not is_int(value)


@pytest.mark.parametrize('value', [0, 0.5, 1, np.float32(0.25), np.float64(1)])
def test_numbers(value):
    assert is_number(value, 0, 1)


@pytest.mark.parametrize('value', [-1e-9, 1.01, float('nan'), float('inf'), True, '0.5', None, 0.5j, torch.tensor(0.5)])
def test_no_numbers(value):
    assert not is_number(value, 0, 1)


def test_a_number_without_a_limit_is_finite():
    assert is_number(1e300, 0)
    assert not is_number(float('inf'), 0)


def test_the_error_is_one_sentence():
    require(True, 'UBN', 'eps', 0.1, 'a positive number')
    with pytest.raises(ValueError, match=r"^UBN: eps must be a positive number, got 'small'\.$"):
        require(False, 'UBN', 'eps', 'small', 'a positive number')


def test_numbers_of_numpy_are_taken_by_a_layer():
    """As a config has them that computes its values."""
    options = dict(eps=np.float32(1e-3), momentum=np.float64(0.2), kernel_size=np.int64(5), threshold=np.float32(0.25))
    ours = UBN(np.int64(3), **options)
    theirs = UBN(3, **{name: value.item() for name, value in options.items()})
    assert torch.equal(ours(batch()), theirs(batch()))
