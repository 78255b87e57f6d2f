"""Killed runs: their checkpoints are whole, they resume exactly, and no process of theirs hangs or stays.

What trains in forks of a toy runs in a process of its own: ``alone(function, ...)`` calls a function of this file.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import forks
import psutil
import pytest
import toy
from cli import CONFIG, ROOT, checkpoint_of, free_port, ranks, run, tool
from mmengine.config import Config
from mmengine.fileio import LocalBackend

from mmubn.openmmlab.hooks.checkpoint import AtomicLocalBackend, write_atomically
from mmubn.openmmlab.resumption import make_resumable

HERE = Path(__file__).parent
ENVIRONMENT = {'PYTHONPATH': str(HERE)}


def alone(function, *arguments):
    code = f'import test_faults; test_faults.{function.__name__}(*{tuple(map(str, arguments))!r})'
    (result,) = forks.together(exec, (code,))
    assert result.returncode == 0, result.stdout


def resumable(*arguments, **options):
    cfg = toy.config(*arguments, **options)
    make_resumable(cfg)
    return cfg


# --- checkpoints ------------------------------------------------------------------------------------------------------


def check_whole(work_dir, after):
    """All checkpoints are whole; the one that ``last_checkpoint`` names exists."""
    for path in work_dir.glob('*.pth'):
        try:
            checkpoint_of(path)
        except Exception as error:
            raise AssertionError(f'{after}: {path.name} is truncated') from error
    last = work_dir / 'last_checkpoint'
    if last.exists():
        assert Path(last.read_text()).is_file(), f'{after}: no checkpoint {last.read_text()!r}'


def kill_at_changes(folder, save_best):
    """In a run of two epochs that keeps one checkpoint, and optionally the best one."""
    folder = Path(folder)
    if save_best:
        # The second epoch, from 10: opens, renames the checkpoint; opens, renames last_checkpoint; removes the first
        # checkpoint; opens, renames the best; opens, renames both once more; removes the first best.
        before, midway, end = [14, 15, 16, 17, 20, 21], [15, 17], 22
    else:
        # Opens, renames the checkpoint; opens, renames last_checkpoint; from the second on removes the one before.
        before, midway, end = [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 2, 4, 6], 9

    def configure(name):
        cfg = resumable(folder / name, validate=bool(save_best), epochs=2)
        cfg.default_hooks.checkpoint.update(max_keep_ckpts=1, save_best=save_best or None)
        return cfg

    assert toy.run(configure('whole'), event=end), 'there are more changes than this test knows'
    curve = toy.losses(folder / 'whole')
    assert len(curve) == 8
    for event, is_midway in [(event, False) for event in before] + [(event, True) for event in midway]:
        after = f'killed {"midway after" if is_midway else "before"} change {event}'
        cfg = configure(f'{event}-{is_midway}')
        work_dir = Path(cfg.work_dir)
        assert not toy.run(cfg, event=event, midway=is_midway), 'there are fewer changes than this test knows'
        check_whole(work_dir, after)
        assert toy.run(cfg, resume='auto'), after
        assert set(toy.losses(work_dir)) == set(curve), f'{after}: another loss curve'
        left = {path.name for path in work_dir.glob('*') if path.suffix in ('.pth', '.partial')}
        left -= {'best_acc_epoch_1.pth', 'best_acc_epoch_2.pth'}
        assert left == {'epoch_2.pth'}, f'{after}: {left} are left'


class TestCheckpoints:
    @pytest.mark.parametrize('save_best', ['', pytest.param('acc', marks=pytest.mark.slow)])
    def test_a_kill_at_a_change_of_a_file(self, tmp_path, save_best):
        alone(kill_at_changes, tmp_path, save_best)

    def test_an_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / 'file'
        write_atomically(b'old', path)

        def fail(*_):
            raise OSError('no space left')

        monkeypatch.setattr(os, 'fsync', fail)
        with pytest.raises(OSError, match='no space left'):
            write_atomically(b'new', path)
        assert path.read_bytes() == b'old'
        assert list(tmp_path.iterdir()) == [path]

    def test_a_link_stays(self, tmp_path):
        (tmp_path / 'link').symlink_to(tmp_path / 'file')
        AtomicLocalBackend().put(b'new', tmp_path / 'link')
        assert (tmp_path / 'link').is_symlink()
        assert (tmp_path / 'file').read_bytes() == b'new'

    def test_folders_are_made_and_devices_stay(self, tmp_path):
        AtomicLocalBackend().put(b'new', tmp_path / 'a' / 'b')
        assert (tmp_path / 'a' / 'b').read_bytes() == b'new'
        AtomicLocalBackend().put(b'new', '/dev/null')
        assert Path('/dev/null').is_char_device()

    def test_permissions_are_those_of_any_new_file(self, tmp_path):
        LocalBackend().put(b'', tmp_path / 'usual')
        AtomicLocalBackend().put(b'', tmp_path / 'atomic')
        assert (tmp_path / 'atomic').stat().st_mode == (tmp_path / 'usual').stat().st_mode


class TestMakeResumable:
    def test_changes_the_hooks_once(self):
        cfg = Config(dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=3)), custom_hooks=None))
        for _ in range(2):
            make_resumable(cfg)
        assert cfg.default_hooks == dict(checkpoint=dict(type='AtomicCheckpointHook', interval=3))
        assert cfg.custom_hooks == [dict(type='IterationSeedHook')]
        assert cfg.custom_imports.imports == ['mmubn.openmmlab.resumption']

    def test_without_hooks(self):
        cfg = Config(dict(custom_imports=dict(imports='mine')))
        make_resumable(cfg)
        assert cfg.default_hooks.checkpoint == dict(type='AtomicCheckpointHook', interval=1)
        assert cfg.custom_imports.imports == ['mine', 'mmubn.openmmlab.resumption']

    @pytest.mark.parametrize('checkpoint', [None, dict(type='MyCheckpointHook')])
    def test_leaves_what_is_not_mmengine_s(self, checkpoint):
        cfg = Config(dict(default_hooks=dict(checkpoint=checkpoint), custom_hooks=[dict(type='Mine')]))
        make_resumable(cfg)
        assert cfg.default_hooks.checkpoint == checkpoint
        assert cfg.custom_hooks == [dict(type='Mine'), dict(type='IterationSeedHook')]


# --- resumption -------------------------------------------------------------------------------------------------------


def resume_every_kind_of_run(folder):
    for name, options, first in [
        ('epochs', dict(), 'epoch_1.pth'),
        ('epochs-workers', dict(workers=2), 'epoch_1.pth'),
        ('epochs-persistent', dict(workers=2, persistent=True), 'epoch_1.pth'),
        ('iterations', dict(iterations=True), 'iter_4.pth'),
        ('iterations-workers', dict(iterations=True, workers=2, persistent=True), 'iter_4.pth'),
    ]:
        whole, resumed = Path(folder, name), Path(folder, f'{name}-resumed')
        assert toy.run(resumable(whole, epochs=2, **options))
        assert toy.run(resumable(resumed, epochs=2, **options), resume=str(whole / first))
        assert len(toy.losses(whole)) == 8, name
        assert toy.losses(resumed) == toy.losses(whole)[4:], name
    # That the toy can tell: without the hook another curve follows.
    for name, resume in (('stock', None), ('stock-resumed', str(Path(folder, 'stock', 'epoch_1.pth')))):
        assert toy.run(toy.config(Path(folder, name), epochs=2), resume=resume)
    assert toy.losses(Path(folder, 'stock-resumed')) != toy.losses(Path(folder, 'stock'))[4:]
    # Neither the number of workers nor validation changes what is drawn.
    assert toy.losses(Path(folder, 'epochs')) == toy.losses(Path(folder, 'epochs-workers'))
    assert toy.run(resumable(Path(folder, 'unvalidated'), epochs=2, validate=False))
    assert toy.losses(Path(folder, 'epochs')) == toy.losses(Path(folder, 'unvalidated'))


@pytest.fixture
def flipped(tmp_path):
    """The digits config with an augmentation, without validation, and with the raw losses in its log."""
    path = tmp_path / 'flipped.py'
    path.write_text(f"""_base_ = {str(CONFIG)!r}
train_pipeline = _base_.train_pipeline[:-1] + [dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
log_processor = dict(window_size=1)
val_dataloader = val_evaluator = val_cfg = None
""")
    return path


@pytest.fixture
def options(small):
    return ['--cfg-options', *(option for option in small if not option.startswith(('val_', 'test_')))]


class TestResumption:
    def test_every_kind_of_run(self, tmp_path):
        alone(resume_every_kind_of_run, tmp_path)

    @pytest.mark.slow
    def test_a_detector(self, flipped, options, tmp_path):
        options = [*options, 'train_dataloader.num_workers=1', 'train_dataloader.persistent_workers=True']
        whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
        for work_dir, resume in ((whole, []), (resumed, ['--resume', whole / 'epoch_1.pth'])):
            result = tool('train.py', flipped, '--work-dir', work_dir, *resume, *options, OMP_NUM_THREADS='2')
            assert result.returncode == 0, result.stdout
        assert len(toy.losses(whole)) == 8
        assert toy.losses(resumed) == toy.losses(whole)[4:]

    def test_two_processes(self, tmp_path):
        """Each has its own running statistics, and its gate depends on them."""
        toy.config('', validate=False, workers=1, persistent=True).dump(tmp_path / 'config.py')
        self.resume_two_processes(tmp_path / 'config.py', tmp_path, ['--cfg-options'], 6)
        checkpoint = checkpoint_of(tmp_path / 'whole' / 'epoch_1.pth')
        first, second = checkpoint['rank_buffers']
        assert first == {}
        assert 'layers.1.running_mean' in second

    @pytest.mark.slow
    def test_a_detector_on_two_processes(self, flipped, options, tmp_path):
        self.resume_two_processes(flipped, tmp_path, options, 4)

    def resume_two_processes(self, config, folder, options, iterations):
        whole, resumed = folder / 'whole', folder / 'resumed'
        for work_dir, resume in ((whole, []), (resumed, ['--resume', whole / 'epoch_1.pth'])):
            keep_all = 'default_hooks.checkpoint.max_keep_ckpts=-1'
            for result in ranks(2, 'train.py', config, '--work-dir', work_dir, *resume, *options, keep_all):
                assert result.returncode == 0, result.stdout
        assert len(toy.losses(whole)) == iterations
        assert toy.losses(resumed) == toy.losses(whole)[2:], 'an epoch has 2 iterations'

    @pytest.mark.slow
    def test_kills_at_random_times(self, flipped, options, tmp_path):
        command = [sys.executable, ROOT / 'tools' / 'train.py', flipped, '--resume']
        options = [*options, 'train_cfg.max_epochs=3', 'default_hooks.checkpoint.max_keep_ckpts=1']
        result = run(*command, '--work-dir', tmp_path / 'whole', *options)
        assert result.returncode == 0, result.stdout
        curve = toy.losses(tmp_path / 'whole')
        generator, kills, work_dir = random.Random(0), 0, tmp_path / 'killed'
        with (tmp_path / 'log').open('w') as log:
            while True:
                process = subprocess.Popen(
                    list(map(str, [*command, '--work-dir', work_dir, *options])), cwd=ROOT, stdout=log, stderr=log
                )
                before = len(toy.losses(work_dir))
                while process.poll() is None and len(toy.losses(work_dir)) < before + 4:
                    time.sleep(0.02)
                try:
                    process.wait(generator.uniform(0, 2))  # in a save or the epoch after it
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                check_whole(work_dir, f'killed {kills} times')
        assert process.returncode == 0, (tmp_path / 'log').read_text()
        assert kills > 0
        assert set(toy.losses(work_dir)) == set(curve)


# --- deaths -----------------------------------------------------------------------------------------------------------


def kill(processes):
    """All of them; some may be gone by then, as they end when their parent does."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def is_alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two questions
        return False


class Nodes:
    """tools/dist_train.sh on the toy, endlessly, on one 'machine' or several; with a data-loader worker per process."""

    def __init__(self, folder, processes, nodes=1, options=()):
        work_dir, config, port = folder / 'run', folder / 'config.py', free_port()
        toy.config(work_dir, validate=False, workers=1, epochs=100_000).dump(config)
        options = ['--cfg-options', 'default_hooks.checkpoint.interval=100000', *options]
        self.launchers, logs = [], []
        for rank in range(nodes):
            logs.append(folder / f'log-{rank}')
            environment = dict(NNODES=str(nodes), NODE_RANK=str(rank), PORT=port, MASTER_ADDR='127.0.0.1')
            with logs[-1].open('w') as log:
                process = subprocess.Popen(
                    [ROOT / 'tools' / 'dist_train.sh', config, str(processes), *options],
                    cwd=ROOT,
                    env=os.environ | ENVIRONMENT | environment,
                    stdout=log,
                    stderr=log,
                )
            self.launchers.append(process)
        deadline = time.monotonic() + 120
        while len(toy.losses(work_dir)) < 8:
            time.sleep(0.1)
            alive = time.monotonic() < deadline and all(each.poll() is None for each in self.launchers)
            assert alive, '\n'.join(log.read_text() for log in logs)
        # Per node the launcher and all below it, and the processes that train.
        self.trees = [
            [psutil.Process(each.pid), *psutil.Process(each.pid).children(recursive=True)] for each in self.launchers
        ]
        self.ranks = [psutil.Process(each.pid).children() for each in self.launchers]
        assert [len(each) for each in self.ranks] == [processes] * nodes

    def all_end(self, seconds):
        """Whether no process is left, after at most so many seconds."""
        everything = [process for tree in self.trees for process in tree]
        deadline = time.monotonic() + seconds
        while left := [each for each in everything if is_alive(each)]:
            if time.monotonic() > deadline:
                return False
            for launcher in self.launchers:
                launcher.poll()
            time.sleep(0.1)
        return not left

    def clean_up(self):
        for tree in getattr(self, 'trees', []):
            kill(tree)
        for launcher in self.launchers:
            launcher.kill()
            launcher.wait()


@pytest.fixture
def nodes(tmp_path):
    started = []

    def start(*arguments, **options):
        started.append(Nodes.__new__(Nodes))
        started[-1].launchers = []
        started[-1].__init__(tmp_path, *arguments, **options)
        return started[-1]

    yield start
    for each in started:
        each.clean_up()


class TestDeaths:
    """A process that dies closes its connections: its peers see that at once. A data-loader worker looks every 5 s."""

    @pytest.mark.parametrize('processes', [2, pytest.param(4, marks=pytest.mark.slow)])
    def test_of_a_process(self, nodes, processes):
        run = nodes(processes)
        run.ranks[0][-1].kill()
        assert run.launchers[0].wait(30) != 0
        assert run.all_end(15)

    @pytest.mark.slow
    @pytest.mark.parametrize('killed', [0, 1])
    def test_of_a_node(self, nodes, killed):
        run = nodes(1, nodes=2)
        kill(run.trees[killed])
        assert run.launchers[1 - killed].wait(60) != 0
        assert run.all_end(15)

    def test_of_the_launcher(self, nodes):
        run = nodes(2)
        run.launchers[0].kill()
        assert run.all_end(15)

    @pytest.mark.slow
    def test_a_node_that_falls_silent(self, nodes):
        """As when a machine or the network fails: connections stay open, and the time-out ends the wait."""
        run = nodes(1, nodes=2, options=['env_cfg.dist_cfg.timeout=5'])
        for process in run.trees[1]:
            process.suspend()
        assert run.launchers[0].wait(60) != 0
