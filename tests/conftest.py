"""Settings of all tests."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope

# Small tensors gain nothing from threads, and threads that wait for a busy core cost minutes.
torch.set_num_threads(1)

TOOLS = Path(__file__).parent / 'tools'


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """How pytest-xdist shares the tests between processes (--dist loadgroup): a file, or all of tests/tools, in one.

    The files of tests/tools share a run of the tools; two tests of several processes at a time would be in each other's
    way.
    """
    for item in items:
        name = 'tools' if item.path.is_relative_to(TOOLS) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(autouse=True)
def no_default_scope():
    """A scope that a test sets, by hand or with a Runner, is not that of the next one."""
    yield
    DefaultScope._instance_dict.clear()
