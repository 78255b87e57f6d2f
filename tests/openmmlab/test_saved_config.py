"""The config in a checkpoint is read as text, as MMEngine wrote it."""

import pytest
from mmengine.config import Config

from mmubn.openmmlab.saved_config import parse_config_text, saved_config


def test_what_mmengine_writes():
    content = dict(
        model=dict(type='UBN', eps=1e-5, sizes=[(3, 3), (5, -1)], child=[dict(type='BN'), None]),
        keys={'a-b': 1, 'if': [True]},
        lr=0.1,
        nothing=None,
    )
    read = parse_config_text(Config(content).pretty_text)
    assert read['model'] == dict(type='UBN', eps=1e-5, sizes=[[3, 3], [5, -1]], child=[dict(type='BN'), None])
    assert (read['keys'], read['lr'], read['nothing']) == ({'a-b': 1, 'if': [True]}, 0.1, None)


def test_nothing_is_run(tmp_path):
    text = (
        f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nlr = os.mkdir({str(tmp_path / 'ran')!r})\ninf = float('inf')"
    )
    assert parse_config_text(text)['inf'] == "float('inf')"
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('text', ['model = ', '\0', 'a = ' + '(' * 5000, 'a = dict(1)', 'x = {[]: 1}'])
def test_text_that_is_no_config(text):
    assert parse_config_text(text) == {}


@pytest.mark.parametrize('checkpoint', [None, [1], {}, {'meta': None}, {'meta': {'cfg': 3}}])
def test_a_checkpoint_without_one(checkpoint):
    assert saved_config(checkpoint) == {}
