"""Settings of all tests."""

import pytest
import torch
from mmengine.registry import DefaultScope

# Small tensors gain nothing from threads, and threads that wait for a busy core cost minutes.
torch.set_num_threads(1)

# Runs of several processes: one at a time, or they are in each other's way.
PROCESSES = {'test_faults', 'test_train_and_test'}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """How pytest-xdist shares the tests between processes (--dist loadgroup): by the file."""
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group('processes' if name in PROCESSES else name))


@pytest.fixture(autouse=True)
def no_default_scope():
    """A scope that a test sets, by hand or with a Runner, is not that of the next one."""
    yield
    DefaultScope._instance_dict.clear()
