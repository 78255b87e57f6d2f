"""What --resume goes on with, and what it says; checkpoints that a training or an evaluation cannot take."""

import errno
import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from cli import call, checkpoint_of
from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from mmubn.checkpoints import CheckpointError
from mmubn.cli import build_runner
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.hooks.checkpoint import AtomicCheckpointHook
from mmubn.openmmlab.hooks.checkpoint_fit import CheckpointFitHook
from mmubn.openmmlab.resumption import find_last_checkpoint, make_resumable

NUMBER = itertools.count()


def config(work_dir, iterations=False, **changes):
    cfg = toy.config(work_dir, iterations=iterations, validate=False, epochs=1)
    cfg.merge_from_dict(dict(launcher='none') | {key.replace('__', '.'): value for key, value in changes.items()})
    make_resumable(cfg)
    return cfg


def train(cfg, resume=None, load_from=None, fit=None):
    """In this process; what this package says in the log, but for the layouts that it read."""
    cfg.experiment_name = f'run {next(NUMBER)}'  # one logger and one log for each
    cfg.resume, cfg.load_from = resume is not None, str(resume or load_from) if resume or load_from else None
    runner = build_runner(cfg, fit)
    runner.train()
    (log,) = Path(runner.log_dir).glob('*.log')
    lines = [line.partition('mmubn: ')[2] for line in log.read_text().splitlines() if 'mmubn: ' in line]
    return [line for line in lines if 'layers read' not in line]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    train(config(folder))
    return folder


class TestLastCheckpoint:
    """``last_checkpoint`` has an absolute path, for MMEngine's own tools."""

    def test_of_a_renamed_and_of_a_copied_run(self, trained, tmp_path):
        assert find_latest_checkpoint(str(trained)) == str(trained / 'epoch_1.pth')
        assert find_last_checkpoint(config(trained)) == str(trained / 'epoch_1.pth')
        copy = tmp_path / 'copy'
        shutil.copytree(trained, copy)
        assert find_latest_checkpoint(str(copy)) == str(trained / 'epoch_1.pth')
        assert find_last_checkpoint(config(copy)) == str(copy / 'epoch_1.pth')
        copy.rename(tmp_path / 'renamed')
        assert find_last_checkpoint(config(tmp_path / 'renamed')) == str(tmp_path / 'renamed' / 'epoch_1.pth')

    def test_checkpoints_in_another_folder(self, trained, tmp_path):
        cfg = config(tmp_path / 'run', default_hooks__checkpoint__out_dir=str(tmp_path / 'out'))
        train(cfg)
        assert find_last_checkpoint(cfg) == str(tmp_path / 'out' / 'run' / 'epoch_1.pth')

    def test_none(self, tmp_path):
        assert find_last_checkpoint(config(tmp_path)) is None

    def test_never_that_of_another_run(self, trained, tmp_path):
        shutil.copy(trained / 'last_checkpoint', tmp_path)
        with pytest.raises(CheckpointError, match=r'names .*epoch_1\.pth, which is not in .*; give --resume'):
            find_last_checkpoint(config(tmp_path))

    @pytest.mark.parametrize('content', [None, ''])
    def test_checkpoints_alone(self, tmp_path, content):
        for name in ('epoch_9.pth', 'epoch_10.pth', 'best_acc_epoch_11.pth'):
            (tmp_path / name).touch()
        if content is not None:
            (tmp_path / 'last_checkpoint').write_text(content)
        with pytest.raises(CheckpointError, match=r'give --resume .* such as .*epoch_10\.pth'):
            find_last_checkpoint(config(tmp_path))


def test_the_best_checkpoint_of_the_original_stays(tmp_path, monkeypatch):
    """A checkpoint has its absolute path, and MMEngine removes it when a better one is found."""
    monkeypatch.setattr(toy.ToyMetric, 'value', 0, raising=False)

    def cfg(name, epochs):
        cfg = toy.config(tmp_path / name, epochs=epochs)
        cfg.launcher = 'none'
        cfg.default_hooks.checkpoint.update(save_best='acc')
        make_resumable(cfg)
        return cfg

    train(cfg('original', 1))
    shutil.copytree(tmp_path / 'original', tmp_path / 'copy')
    train(cfg('copy', 2), resume=tmp_path / 'copy' / 'epoch_1.pth')
    best = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob('*/best*')}
    assert best == {'original/best_acc_epoch_1.pth', 'copy/best_acc_epoch_2.pth'}


class TestWhatIsSaid:
    @pytest.mark.parametrize(('iterations', 'what', 'total'), [(False, 'epochs', 1), (True, 'iterations', 4)])
    def test_nothing_left(self, tmp_path, iterations, what, total):
        train(config(tmp_path, iterations))
        (last,) = tmp_path.glob('*.pth')
        *_, line = train(config(tmp_path, iterations), resume=last)
        assert line.startswith(
            f'nothing is left to train: {last} has trained {total} {what}, as many as train_cfg.max_'
        )
        fewer = dict(train_cfg__max_iters=2) if iterations else dict(train_cfg__max_epochs=0)
        *_, line = train(config(tmp_path, iterations, **fewer), resume=last)
        assert 'more than train_cfg.max_' in line

    def test_the_same_run(self, trained, tmp_path):
        lines = train(config(tmp_path, train_cfg__max_epochs=2), resume=trained / 'epoch_1.pth')
        assert lines == []

    def test_another_run(self, trained, tmp_path):
        checkpoint = checkpoint_of(trained / 'epoch_1.pth')
        checkpoint['meta'].update(world_size=2, dataset_size=100)
        cfg = checkpoint['meta']['cfg']
        checkpoint['meta']['cfg'] = cfg.replace("type='ToyDataset'", "type='ToyDataset', ann_file='a.json'")
        torch.save(checkpoint, tmp_path / 'epoch_1.pth')
        lines = train(
            config(
                tmp_path / 'run',
                train_dataloader__batch_size=8,
                optim_wrapper__optimizer__lr=0.3,
                param_scheduler__end=20,
            ),
            resume=tmp_path / 'epoch_1.pth',
        )
        for start in (
            f'the config of {tmp_path}/epoch_1.pth has another train_dataloader.batch_size: 4, and 8 here.',
            f"the config of {tmp_path}/epoch_1.pth has another train_dataloader.dataset.ann_file: 'a.json', and",
            f'the config of {tmp_path}/epoch_1.pth has another optim_wrapper.optimizer.lr: 0.1, and 0.3 here; the opt',
            f'the config of {tmp_path}/epoch_1.pth has another param_scheduler; the schedule goes on as the checkpoint',
            f'{tmp_path}/epoch_1.pth was trained with 2 processes, and there is 1 here: the total batch is another',
            f'{tmp_path}/epoch_1.pth was trained with 100 training samples, and there are 16 here.',
        ):
            assert sum(line.startswith(start) for line in lines) == 1, (start, lines)


class TestRefused:
    @pytest.mark.parametrize(
        ('without', 'message'),
        [
            (
                ('meta', 'message_hub', 'optimizer'),
                'how far the training was .*, the log history .*, the state of the opt',
            ),
            (('optimizer',), r'has weights, but not the state of the optimizer, so no run .* load_from'),
        ],
    )
    def test_weights_are_no_run(self, trained, tmp_path, without, message):
        checkpoint = checkpoint_of(trained / 'epoch_1.pth')
        torch.save({key: value for key, value in checkpoint.items() if key not in without}, tmp_path / 'weights.pth')
        with pytest.raises(CheckpointError, match=message):
            train(config(tmp_path / 'run'), resume=tmp_path / 'weights.pth')
        assert train(config(tmp_path / 'new'), load_from=tmp_path / 'weights.pth') == []

    def test_a_run_that_saves_no_optimizer(self, tmp_path):
        lines = []
        for epochs, resume in ((1, None), (2, tmp_path / 'epoch_1.pth')):
            cfg = config(tmp_path, train_cfg__max_epochs=epochs, default_hooks__checkpoint__save_optimizer=False)
            lines = train(cfg, resume=resume)
        assert any('no state of the optimizer (save_optimizer=False)' in line for line in lines)

    def test_another_optimizer(self, trained, tmp_path):
        cfg = config(tmp_path)
        cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=0.1)
        with pytest.raises(
            CheckpointError, match=r'the state of SGD, and optim_wrapper\.optimizer\.type is AdamW here'
        ):
            train(cfg, resume=trained / 'epoch_1.pth')

    def test_a_model_without_its_weights(self, trained, tmp_path):
        checkpoint = checkpoint_of(trained / 'epoch_1.pth')
        del checkpoint['state_dict']['layers.4.bias']
        torch.save(checkpoint, tmp_path / 'partial.pth')
        with pytest.raises(
            CheckpointError, match=r'cannot be resumed from it: 1 of the .* missing \(layers\.4\.bias\)'
        ):
            train(config(tmp_path / 'run'), resume=tmp_path / 'partial.pth')
        with pytest.raises(
            CheckpointError, match=r'missing \(layers\.4\.bias\)\. The file is from a training of ToyModel'
        ):
            train(config(tmp_path / 'run'), load_from=tmp_path / 'partial.pth', fit=CheckpointFitHook(whole=True))
        lines = train(config(tmp_path / 'run'), load_from=tmp_path / 'partial.pth')
        (line,) = [line for line in lines if 'loaded' in line]
        assert 'keys of the model loaded; 1 of the 13 keys of the model are missing (layers.4.bias).' in line

    @pytest.mark.parametrize('content', [{'conv.weight': torch.ones(1)}, [torch.ones(1)], {'epoch': 3}])
    def test_nothing_fits(self, tmp_path, content):
        torch.save(content, tmp_path / 'other.pth')
        message = 'nothing of .*/other.pth fits this ToyModel: .* keys start with conv|holds a list|it holds epoch'
        with pytest.raises(CheckpointError, match=message):
            train(config(tmp_path / 'run'), load_from=tmp_path / 'other.pth')

    def test_an_averaged_model_from_plain_weights(self, trained, tmp_path):
        """EMAHook looks for the weights in state_dict alone."""
        torch.save(checkpoint_of(trained / 'epoch_1.pth')['state_dict'], tmp_path / 'weights.pth')
        cfg = config(tmp_path / 'run')
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='EMAHook')]
        assert train(cfg, load_from=tmp_path / 'weights.pth') == []


@pytest.mark.parametrize('number', [0, 4], ids=['first', 'second'])
def test_a_full_disk(tmp_path, monkeypatch, number):
    """A checkpoint and last_checkpoint call fsync twice each, for the file and for its folder."""
    count, fsync = iter(range(100)), os.fsync

    def full(file):
        if next(count) >= number:
            raise OSError(errno.ENOSPC, 'No space left on device')
        fsync(file)

    monkeypatch.setattr(os, 'fsync', full)
    run = tmp_path / 'run'
    last = f'the last whole one is {run}/epoch_1.pth' if number else 'there is none yet'
    with pytest.raises(CheckpointError, match=f'could not be saved in {run}: No space left on device; {last}'):
        train(config(run, train_cfg__max_epochs=2))
    assert {path.name for path in run.glob('*.pth')} == ({'epoch_1.pth'} if number else set())
    assert not list(run.glob('.*'))


def test_a_tool_starts_anew_or_says_that_it_is_done(tmp_path, monkeypatch, capsys, trained):
    cfg = toy.config('', validate=False, epochs=1)
    cfg.load_from = str(trained / 'epoch_1.pth')
    cfg.dump(tmp_path / 'config.py')
    said = []
    for _ in range(2):
        assert call(monkeypatch, 'train.py', tmp_path / 'config.py', '--work-dir', tmp_path / 'run', '--resume') == 0
        said.append(''.join(capsys.readouterr()))
    first, second = said
    assert f'no checkpoint to resume from in {tmp_path}/run: the run starts anew' in first
    assert f'Load checkpoint from {trained}/epoch_1.pth' in first, 'as without --resume'
    assert f'nothing is left to train: {tmp_path}/run/epoch_1.pth has trained 1 epochs' in second
    assert not [line for line in second.splitlines() if line.startswith(f'Load checkpoint from {trained}')]
    assert Config.fromfile(tmp_path / 'run' / 'config.py').load_from == cfg.load_from


class TestBestCheckpoint:
    def test_a_metric_that_there_is_not(self):
        hook = AtomicCheckpointHook(save_best='bbox_mAP')
        with pytest.raises(
            ConfigError, match=r"save_best is 'bbox_mAP', .* coco/bbox_mAP, coco/bbox_mAP_50; did you mean"
        ):
            hook._save_best_checkpoint(None, {'coco/bbox_mAP': 0.1, 'coco/bbox_mAP_50': 0.2})

    def test_nothing_measured(self):
        told = []
        hook = AtomicCheckpointHook(save_best='auto')
        hook._save_best_checkpoint(SimpleNamespace(logger=SimpleNamespace(warning=told.append)), {})
        assert told == ['mmubn: the validation has no metrics, so no checkpoint is the best one.']


def test_averaged_weights_without_an_average(tmp_path):
    cfg = config(tmp_path / 'run')
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='EMAHook')]
    train(cfg)
    again = config(tmp_path / 'run', train_cfg__max_epochs=2)
    lines = train(again, resume=tmp_path / 'run' / 'epoch_1.pth')
    assert any('has averaged weights (EMAHook), and this config does not average' in line for line in lines)
    again = config(tmp_path / 'averaging', train_cfg__max_epochs=2)
    again.custom_hooks = [*again.custom_hooks, dict(type='EMAHook')]
    lines = train(again, resume=tmp_path / 'run' / 'epoch_1.pth')
    assert not any('averaged' in line for line in lines)
