"""A run that is resumed as another one than it was, from what is no run, or with nothing left to train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from mmubn.checkpoints import CheckpointError
from mmubn.openmmlab.checkpoint_fit import find_weights
from mmubn.openmmlab.config_types import find_dicts
from mmubn.openmmlab.saved_config import parse_config_text, saved_config

__all__ = ['ResumedRunHook']

NOTHING = 'nothing there'
# What says which data a data set has.
DATA_KEYS = ('ann_file', 'data_root', 'data_prefix')


class ResumedRunHook(Hook):
    """Says what is another in a run that is resumed: processes, batch size, data, optimizer, schedule; one line each.

    MMEngine compares seeds and class names. Nothing of a checkpoint is run: its config is read as text.

    Raises:
        CheckpointError: Before anything is taken over: the checkpoint is of no training run, or its optimizer is of
            another type.
    """

    def __init__(self) -> None:
        self._nothing_left = ''

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint.setdefault('meta', {}).update(_facts(runner))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not isinstance(runner, Runner) or not runner._resume:
            return
        path = runner._load_from or f'the last checkpoint in {runner.work_dir}'
        find_weights(checkpoint, path)
        _check_is_of_a_run(runner, checkpoint, path)
        there, here = saved_config(checkpoint), _config(runner.cfg)
        if there:
            _check_optimizer(there, here, path)
            for line in _differences(there, here):
                runner.logger.warning(f'mmubn: the config of {path} has another {line}')
        if 'ema_state_dict' in checkpoint and not any(isinstance(hook, EMAHook) for hook in runner.hooks):
            runner.logger.warning(
                f'mmubn: {path} has averaged weights (EMAHook), and this config does not average: the training goes on '
                'from the averaged weights, with the state of an optimizer that trained others.'
            )
        for line in _other_facts(checkpoint['meta'], _facts(runner)):
            runner.logger.warning(f'mmubn: {path} was trained with {line}')

    def before_train(self, runner: Runner) -> None:
        if not isinstance(runner, Runner) or not runner._resume:
            return
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            done, total, what, key = loop.iter, loop.max_iters, 'iterations', 'max_iters'
        else:
            done, total, what, key = loop.epoch, loop.max_epochs, 'epochs', 'max_epochs'
        if done >= total:
            than = 'more than' if done > total else 'as many as'
            self._nothing_left = (
                f'mmubn: nothing is left to train: {runner._load_from or runner.work_dir} has trained {done} {what}, '
                f'{than} train_cfg.{key}={total}; to go on, set train_cfg.{key} to more.'
            )
            loop.fast_forward_on_resume = True  # MMEngine would go through all the data first

    def after_train(self, runner: Runner) -> None:
        if self._nothing_left:
            runner.logger.warning(self._nothing_left)


def _facts(runner: Runner) -> dict[str, int]:
    """What no config says."""
    facts = {'world_size': get_world_size()}
    data = getattr(runner.train_dataloader, 'dataset', None)
    if hasattr(data, '__len__'):
        facts['dataset_size'] = len(data)
    return facts


def _config(cfg: Config) -> dict:
    """In the form of :func:`~mmubn.openmmlab.saved_config.saved_config`."""
    return parse_config_text(cfg.pretty_text)


def _check_is_of_a_run(runner: Runner, checkpoint: Mapping, path: object) -> None:
    meta = checkpoint.get('meta')
    lacks = []
    if not isinstance(meta, Mapping) or not all(isinstance(meta.get(key), int) for key in ('epoch', 'iter')):
        lacks.append('how far the training was (meta.epoch, meta.iter)')
    if not isinstance(checkpoint.get('message_hub'), Mapping):
        lacks.append('the log history (message_hub)')
    saves = all(hook.save_optimizer for hook in runner.hooks if isinstance(hook, CheckpointHook))
    if 'optimizer' not in checkpoint and saves:
        lacks.append('the state of the optimizer')
    if lacks:
        raise CheckpointError(
            f'{path} has weights, but not {", ".join(lacks)}, so no run can be resumed from it: give --resume a '
            'checkpoint of the course of the training (epoch_*.pth, iter_*.pth), or start a new run from its weights: '
            f'leave --resume out and set load_from to it (--cfg-options load_from={path}).'
        )
    if 'optimizer' not in checkpoint:
        runner.logger.warning(
            f'mmubn: {path} has no state of the optimizer (save_optimizer=False): its momenta start anew.'
        )


# --- what is another --------------------------------------------------------------------------------------------------


def _check_optimizer(there: dict, here: dict, path: object) -> None:
    old, new = (_at(each, 'optim_wrapper', 'optimizer', 'type') for each in (there, here))
    if isinstance(old, str) and isinstance(new, str) and _last(old) != _last(new):
        raise CheckpointError(
            f'{path} has the state of {old}, and optim_wrapper.optimizer.type is {new} here: to go on with the old '
            'run, give the config that it had; to start a new one from its weights, leave --resume out and set '
            f'load_from to it (--cfg-options load_from={path}).'
        )


def _differences(there: dict, here: dict) -> Iterator[str]:
    old, new = (_at(each, 'train_dataloader', 'batch_size') for each in (there, here))
    if old != new:
        yield f'train_dataloader.batch_size: {old}, and {new} here.'
    old, new = (_data(_at(each, 'train_dataloader', 'dataset')) for each in (there, here))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield f'{key}: {old.get(key, NOTHING)!r}, and {new.get(key, NOTHING)!r} here.'
    old, new = (_at(each, 'optim_wrapper', 'optimizer') for each in (there, here))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key) and key != 'type':
                yield (
                    f'optim_wrapper.optimizer.{key}: {old.get(key, NOTHING)!r}, and {new.get(key, NOTHING)!r} here; '
                    'the optimizer goes on as the checkpoint has it.'
                )
    if there.get('param_scheduler') != here.get('param_scheduler'):
        yield 'param_scheduler; the schedule goes on as the checkpoint has it.'


def _data(dataset: object) -> dict[str, Any]:
    """Path of each key of a data set that says what is in it, and its value."""
    return {
        f'{place}.{key}': node[key]
        for place, node in find_dicts(dataset, 'train_dataloader.dataset')
        if '.pipeline' not in place
        for key in DATA_KEYS
        if key in node
    }


def _other_facts(there: Mapping, here: Mapping) -> Iterator[str]:
    old, new = there.get('world_size'), here['world_size']
    if isinstance(old, int) and old != new:
        yield (
            f'{old} {"process" if old == 1 else "processes"}, and there {"is" if new == 1 else "are"} {new} here: the '
            'total batch is another and the learning rate stays; each process goes on with the norm statistics of the '
            'first.'
        )
    old, new = there.get('dataset_size'), here.get('dataset_size')
    if isinstance(old, int) and new is not None and old != new:
        yield f'{old} training samples, and there are {new} here.'


def _at(node: object, *keys: str) -> object:
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _last(name: str) -> str:
    """A class of a config in pure Python is a dotted name."""
    return name.rpartition('.')[2]
