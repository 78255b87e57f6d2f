"""Several processes have norm statistics of their own: what is validated is what is saved."""

import json

import own_statistics
import pytest
from cli import checkpoint_of, metrics, ranks, tool


def validated(work_dir):
    """The metric of each validation in the log."""
    lines = [json.loads(line) for line in next(work_dir.glob('*/vis_data/scalars.json')).open()]
    return [line['mean'] for line in lines if 'mean' in line]


@pytest.mark.parametrize('hook', [{}, dict(momentum=0.3, update_buffers=True)], ids=['plain', 'ema'])
def test_metrics_in_the_log_are_those_of_the_checkpoint(tmp_path, hook):
    own_statistics.config('', **hook).dump(tmp_path / 'config.py')
    for result in ranks(2, 'train.py', tmp_path / 'config.py', '--work-dir', tmp_path / 'run'):
        assert result.returncode == 0, result.stdout
    first, last = validated(tmp_path / 'run')
    found = []
    for epoch in (1, 2):
        arguments = (tmp_path / 'config.py', tmp_path / 'run' / f'epoch_{epoch}.pth', '--work-dir', tmp_path / 'test')
        result = tool('test.py', *arguments)
        assert result.returncode == 0, result.stdout
        found.append(metrics(tmp_path / 'test')['mean'])
    assert found == [first, last]
    # It was saved once more after the validation, for the best checkpoint, and each process trains on with its own.
    others = checkpoint_of(tmp_path / 'run' / 'epoch_1.pth')['rank_buffers'][1]
    assert 'layers.1.running_mean' in others
