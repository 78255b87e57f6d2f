"""A layout is recognised by its keys, and nothing else is."""

import pytest
import torch
from saved_norms import PREFIX, SOURCES, source

from mmubn.checkpoints import LAYOUTS, CheckpointError, find_layout, is_state_dict


@pytest.mark.parametrize('name', SOURCES)
def test_layouts_are_told_apart(name):
    assert find_layout(source(name).state_dict(), PREFIX) is LAYOUTS[name.split()[0]]


def test_the_number_of_batches_is_optional():
    for name in SOURCES:
        tensors = source(name).state_dict()
        del tensors['num_batches_tracked']
        assert find_layout(tensors, PREFIX) is LAYOUTS[name.split()[0]]


def test_an_error_names_the_nearest_layout():
    tensors = source('rbn').state_dict()
    keys = ', '.join(sorted(tensors.keys() - {'num_batches_tracked'}))
    tensors['gamma'] = tensors.pop('weight')
    with pytest.raises(CheckpointError) as error:
        find_layout(tensors, PREFIX)
    assert str(error.value).startswith(
        f'the norm layer {PREFIX[:-1]!r} has the keys of no layout that mmubn reads; the nearest, RBN, has {keys}, but '
        f'{PREFIX}weight is missing, {PREFIX}gamma is none of its keys: got '
    )


STATE_DICTS = [{'weight': torch.zeros(1)}, {'weight': torch.zeros(1), 'epoch': 3}]
OTHERS = [
    {},
    {'epoch': 3},
    {'state_dict': {'weight': torch.zeros(1)}},
    {0: torch.zeros(1)},
    [torch.zeros(1)],
    'net',
    None,
]


def test_a_state_dict_has_names_and_tensors():
    assert all(is_state_dict(value) for value in STATE_DICTS)
    for value in OTHERS:
        assert not is_state_dict(value), value
