"""A checkpoint hook that can be killed at any moment: files appear whole, and the old ones are removed last.

Written for onedl-mmengine 0.10.12; mmengine 0.10.7 has the same methods. Each part says what MMEngine does without it.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.fileio import BaseStorageBackend, LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmubn.checkpoints import CheckpointError
from mmubn.openmmlab import patches
from mmubn.openmmlab.errors import ConfigError

__all__ = ['AtomicCheckpointHook', 'AtomicLocalBackend', 'register_atomic_backend', 'write_atomically']

PARTIAL = '.partial'


def write_atomically(content: bytes, path: str | Path) -> None:
    """Write a file so that, whenever the process or the machine dies, ``path`` has its old content or the new one.

    What is left of an interrupted write is a hidden file whose name ends in ``.partial``.
    """
    path = Path(os.path.realpath(path))  # a link stays, and what it points at is replaced
    partial = path.with_name(f'.{path.name}.{uuid.uuid4().hex}{PARTIAL}')
    try:
        with partial.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if hasattr(os, 'O_DIRECTORY'):  # the new name itself reaches the disk with its folder
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local files, written by :func:`write_atomically`; MMEngine truncates the file first."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        if path.exists() and not path.is_file():  # /dev/null, a pipe: nothing to replace
            super().put(obj, filepath)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(obj, path)


def register_atomic_backend() -> None:
    """Let all local files of this process be written by :class:`AtomicLocalBackend`."""
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')


class _RemovesLater:
    """A file backend that notes what is to be removed."""

    def __init__(self, backend: BaseStorageBackend) -> None:
        self.backend, self.paths = backend, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.paths.append(path)

    rmtree = remove


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """A CheckpointHook that can be killed at any moment, and whose checkpoints hold the buffers of every process.

    From the first save on, ``last_checkpoint`` names a whole checkpoint, even with ``max_keep_ckpts=1``, and no
    checkpoint is ever truncated: files appear whole (:class:`AtomicLocalBackend` takes the place of the backend
    ``local`` in a process that trains with this hook), the one that a new one outdates is removed last, and
    ``last_checkpoint`` changes in between. MMEngine removes the old one first and writes all of them in place. What a
    kill leaves behind, a ``.partial`` file or an outdated checkpoint, is removed on resumption; only a best checkpoint
    that was outdated at the very moment of the kill may stay. This holds on local and shared file systems; other
    backends (``s3://``, ``file_client_args``) keep their own guarantees.

    Norms of several processes have different buffers, and UBN trains with them: MMEngine saves those of the first
    process alone. Here the others' are saved too, where they differ, under ``rank_buffers``, and each process resumes
    with its own if there are as many processes as before. All else that reads a checkpoint sees the first's.
    """

    def before_train(self, runner: Runner) -> None:
        patches.apply(patches.ON_ATOMIC_CHECKPOINTS)
        super().before_train(runner)
        self._own_best(runner)
        if is_main_process():
            for folder in {str(self.out_dir), runner.work_dir}:
                for left_over in Path(folder).glob(f'.*{PARTIAL}'):
                    left_over.unlink(missing_ok=True)

    def _own_best(self, runner: Runner) -> None:
        """Take the best checkpoint of before from this run's folder alone, for one that is better outdates it.

        A checkpoint names it by its absolute path, which in a copied run is a file of the original.
        """

        def own(path: str | None) -> str | None:
            here = self.file_backend.join_path(self.out_dir, Path(path).name) if path else None
            return here if here and self.file_backend.exists(here) else None

        if getattr(self, 'best_ckpt_path', None) is not None:
            self.best_ckpt_path = own(self.best_ckpt_path)
            runner.message_hub.update_info('best_ckpt', self.best_ckpt_path)
        for key, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            self.best_ckpt_path_dict[key] = own(path)
            runner.message_hub.update_info(f'best_ckpt_{key}', own(path))

    def _save_checkpoint(self, runner: Runner) -> None:
        with self._said_where(runner):
            super()._save_checkpoint(runner)

    @contextlib.contextmanager
    def _said_where(self, runner: Runner) -> Iterator[None]:
        """Turn an error of the file system, in the first process, into one of a sentence."""
        try:
            yield
        except OSError as error:
            named = Path(runner.work_dir, 'last_checkpoint')
            last = f'the last whole one is {named.read_text()}' if named.is_file() else 'there is none yet'
            raise CheckpointError(
                f'the checkpoint could not be saved in {self.out_dir}: {error.strerror or error}; {last}: make room or '
                'set --work-dir to another folder, then go on with --resume.'
            ) from error

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        keep = list(self.keep_ckpt_ids) if self.max_keep_ckpts > 0 else []
        if self.max_keep_ckpts > 0:
            if keep[-1:] != [step]:  # saving the best checkpoint saves this one once more
                keep.append(step)
            # With the outdated one: whoever resumes from this checkpoint removes it, if it is still there.
            runner.message_hub.update_info('keep_ckpt_ids', keep)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._rank_buffers = _gather_buffers(runner)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._rank_buffers = None
        if is_main_process():
            write_atomically(self.last_ckpt.encode(), Path(runner.work_dir, 'last_checkpoint'))
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(keep[-self.max_keep_ckpts :], self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            if is_main_process():
                for outdated in keep[: -self.max_keep_ckpts]:
                    self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated)))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not metrics and self.save_best:
            # MMDetection measures nothing where no object is found; MMEngine would end in a KeyError.
            runner.logger.warning('mmubn: the validation has no metrics, so no checkpoint is the best one.')
            return
        for key in getattr(self, 'key_indicators', None) or ():
            if key != 'auto' and key not in metrics:
                near = [each for each in metrics if each.rpartition('/')[2] == key.rpartition('/')[2]]
                question = f'; did you mean {near[0]}?' if near else '.'
                raise ConfigError(
                    f'default_hooks.checkpoint.save_best is {key!r}, and the metrics of the validation are '
                    f'{", ".join(metrics)}{question}'
                )
        backend = self.file_backend
        self.file_backend = later = _RemovesLater(backend)
        try:
            with self._said_where(runner):
                super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        in_use = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}
        in_use.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        for path in later.paths:
            if path not in in_use:
                self._remove(path)

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # DeepSpeed's checkpoints
            self.file_backend.rmtree(path)

    _rank_buffers: list[dict] | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self._rank_buffers is not None:
            checkpoint['rank_buffers'] = self._rank_buffers

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        rank_buffers = checkpoint.get('rank_buffers')
        if rank_buffers is not None and runner._resume and len(rank_buffers) == get_world_size():
            checkpoint['state_dict'].update(rank_buffers[get_rank()])


def _gather_buffers(runner: Runner) -> list[dict] | None:
    """For each process the entries of its state dict that are buffers and differ from the first process's, or None."""
    if get_world_size() == 1:
        return None
    model = getattr(runner.model, 'module', runner.model)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    own = {name: value.cpu() for name, value in model.state_dict().items() if name in buffers}
    first, *others = all_gather_object(own)
    if not is_main_process():
        return None
    return [{}, *({k: v for k, v in each.items() if not torch.equal(v, first[k])} for each in others)]
