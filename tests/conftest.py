"""Settings of all tests."""

import contextlib
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import checkpoint

# Small tensors gain nothing from threads, and threads that wait for a busy core cost minutes: here and in the processes
# that tests start.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'

# Runs of several processes: one at a time, or they are in each other's way.
PROCESSES = {'test_faults', 'test_train_and_test'}
# Many short tests that share nothing: each runs where there is room.
SINGLE = {'test_contract', 'test_backbones', 'test_classification_configs', 'test_configs', 'test_detectors'}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The longest work first."""
    items.sort(key=lambda item: (item.path.stem in SINGLE) - (item.path.stem in PROCESSES))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """How pytest-xdist shares the tests between processes. Its loadgroup does nothing with pytest 9.2 (xdist 3.8)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split('::')[0]
            name = Path(path).stem
            return nodeid if name in SINGLE else 'processes' if name in PROCESSES else path

    config.option.loadscopereorder = False  # or the files of many tests would come first
    return Scheduling(config, log)


def pytest_collection_finish():
    gc.freeze()  # what the test files import: no search for garbage need go through it


@pytest.fixture(autouse=True)
def no_default_scope():
    """A scope that a test sets, by hand or with a Runner, is not that of the next one."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True)
def no_reader_of_a_tool():
    """A tool that a test runs in this process leaves its reader of checkpoints there; the next test has torch's."""
    torch_load, load_url = torch.load, checkpoint.load_url
    yield
    torch.load = torch.serialization.load = torch_load
    checkpoint.load_url = load_url
    if patches := sys.modules.get('mmubn.openmmlab.patches'):
        patches._applied -= {'safe-reader', 'url-errors'}
    if reader := sys.modules.get('mmubn.openmmlab.safe_reader'):
        reader._trusted = False


@pytest.fixture(autouse=True, scope='module')
def no_process_group():
    """A tool, which ends the process of a group of its own, would take a group that is left for that."""
    yield
    assert not torch.distributed.is_initialized(), 'a test of this file left its process group'


@pytest.fixture(params=['reference', 'torch', 'chosen'])
def backend(request):
    """A backend that all layers compute by; ``chosen`` leaves it to them: the C++ kernels for what they take."""
    from mmubn.ops import use_backend

    with contextlib.nullcontext() if request.param == 'chosen' else use_backend(request.param):
        yield request.param
