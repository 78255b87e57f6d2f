"""Converted models in two processes, as a DistributedDataParallel on gloo."""

import copy

import forks
import pytest
import torch
from convert_workers import Net, X, step, work

from mmubn import BNET, UBN, SyncUBN, convert_norms


@pytest.mark.parametrize('norm', ['SyncUBN', 'UBN', 'BNET'])
def test_a_step(norm, tmp_path):
    results = forks.together(work, *((rank, norm, tmp_path) for rank in range(2)))
    assert [result.returncode for result in results] == [0, 0], results[0].stdout
    found = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    parameters = [name for name, _ in convert_norms(Net(), norm).named_parameters()]
    assert any('neighbor_weight' in name for name in parameters)
    for name in parameters:
        assert torch.equal(found[0][name], found[1][name]), name
    if norm == 'SyncUBN':  # the whole batch in one process
        expected = step(convert_norms(Net(), 'UBN'), X)
        for name, value in expected.items():
            if 'running_similarity' not in name:  # that of a SyncUBN is of pairs in one process
                torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5)
    else:  # the mean of both halves, each with statistics of its own
        start = convert_norms(Net(), norm)
        halves = [step(copy.deepcopy(start), part) for part in X.split(4)]
        for name in parameters:
            torch.testing.assert_close(found[0][name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-4, atol=1e-5)
    kinds = {'SyncUBN': SyncUBN, 'UBN': UBN, 'BNET': BNET}
    assert type(convert_norms(Net(), norm)[1]) is kinds[norm]
