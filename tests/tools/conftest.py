"""A data set small enough to train on in seconds, and a run on it."""

import pytest
from cli import CONFIG, data_options, tool


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """8 training and 4 validation images of 64x64 pixels."""
    folder = tmp_path_factory.mktemp('digits') / 'digits'
    arguments = ['--num-train', '8', '--num-val', '4', '--canvas', '64', '--digits', '1', '2', '--size', '16', '24']
    result = tool('dataset_converters/digits_to_coco.py', folder, *arguments)
    assert result.returncode == 0, result.stdout
    return folder


@pytest.fixture(scope='session')
def small(digits):
    """--cfg-options that shrink the digits config to two epochs of a few seconds."""
    return [
        *data_options(digits),
        'train_dataloader.batch_size=2',
        'train_cfg.max_epochs=2',
        'train_cfg.val_interval=2',
        'default_hooks.logger.interval=1',
    ]


@pytest.fixture(scope='session')
def trained(small, tmp_path_factory):
    """Work dir of a finished run of the single-process tool."""
    work_dir = tmp_path_factory.mktemp('trained')
    result = tool('train.py', CONFIG, '--work-dir', work_dir, '--cfg-options', *small)
    assert result.returncode == 0, result.stdout
    return work_dir
