"""Every process validates with the buffers of the first one and trains on with its own; tests/tools has two of them."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook, SyncBuffersHook
from torch import nn

from mmubn import UBN
from mmubn.openmmlab.hooks import validated_statistics
from mmubn.openmmlab.hooks.validated_statistics import ValidatedStatisticsHook


class SyncNormHook(Hook):
    """MMDetection's by name."""


@pytest.fixture
def second(monkeypatch):
    """What the hook of the second process sees: the first one's buffers are twos."""
    monkeypatch.setattr(validated_statistics, 'get_world_size', lambda: 2)
    monkeypatch.setattr(validated_statistics, 'broadcast', lambda buffer, src: buffer.fill_(2))


def runner(*hooks):
    model = nn.Sequential(UBN(3), nn.BatchNorm2d(3))
    averaged = SimpleNamespace(ema_model=nn.Sequential(UBN(3)))
    logger = logging.getLogger('test_validated_statistics')
    return SimpleNamespace(model=model, hooks=[averaged, *hooks], val_loop=object(), logger=logger)


def values(runner):
    return [buffer.clone() for model in (runner.model, runner.hooks[0].ema_model) for buffer in model.buffers()]


def test_shares_and_gives_back(second, caplog):
    hook, run = ValidatedStatisticsHook(), runner()
    before = values(run)
    with caplog.at_level('INFO'):
        hook.before_train(run)
    assert 'each of the 2 processes has norm statistics of its own; all validate with those of process 0' in caplog.text
    hook.before_val(run)
    assert len(before) == 11
    assert all((each == 2).all() for each in values(run))
    hook.after_val_epoch(run, {})
    assert all(map(torch.equal, values(run), before))
    run.model[0].running_mean.fill_(3)
    hook.after_val_epoch(run, {})
    assert (run.model[0].running_mean == 3).all(), 'it gives back once'


@pytest.mark.parametrize('averaging', [SyncBuffersHook, SyncNormHook])
def test_a_config_that_averages_itself(second, caplog, averaging):
    hook, run = ValidatedStatisticsHook(), runner(averaging())
    before = values(run)
    hook.before_train(run)
    hook.before_val(run)
    assert all(map(torch.equal, values(run), before))
    assert f'{averaging.__name__} averages the norm statistics of the 2 processes' in caplog.text


def test_one_process(caplog):
    hook, run = ValidatedStatisticsHook(), runner()
    before = values(run)
    hook.before_train(run)
    hook.before_val(run)
    hook.after_val_epoch(run, {})
    assert all(map(torch.equal, values(run), before))
    assert not caplog.text
