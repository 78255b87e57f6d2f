"""Several processes: the model that is validated is the one that the checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mmengine.dist import broadcast, get_world_size
from mmengine.hooks import Hook, SyncBuffersHook
from mmengine.runner import Runner
from torch import Tensor

__all__ = ['ValidatedStatisticsHook']


class ValidatedStatisticsHook(Hook):
    """Lets every process validate with the buffers of the first one, which checkpoints hold, and gives it back its own.

    Each process has norm statistics of its own (UBN's gate, too), and MMEngine lets each validate its share of the
    images with them, so that the metrics in the log are those of no model that was saved. The buffers of averaged
    models (EMAHook) are shared too. Training goes on as without the hook, bit for bit.

    A config that averages the statistics itself, by SyncBuffersHook of MMEngine or SyncNormHook of MMDetection, is left
    as it is; the log says whose statistics are validated.

    One process has nothing to share.
    """

    # Where the own ones come back in after_val_epoch: after EMAHook, which swaps in before_val_epoch and there, and
    # before the checkpoint hook, which may save the best checkpoint.
    priority = 'LOW'

    def __init__(self) -> None:
        self._own: list[tuple[Tensor, Tensor]] = []
        self._shares = False

    def before_train(self, runner: Runner) -> None:
        self._shares = get_world_size() > 1 and runner.val_loop is not None
        if not self._shares:
            return
        averaging = [type(hook).__name__ for hook in runner.hooks if _averages(hook)]
        if averaging:
            self._shares = False
            runner.logger.warning(
                f'mmubn: {averaging[0]} averages the norm statistics of the {get_world_size()} processes before a '
                'validation. A checkpoint that was saved before it has those of process 0, and other metrics.'
            )
        else:
            runner.logger.info(
                f'mmubn: each of the {get_world_size()} processes has norm statistics of its own; all validate with '
                'those of process 0, which the checkpoints have.'
            )

    @torch.no_grad()
    def before_val(self, runner: Runner) -> None:
        if not self._shares:
            return
        self._own = [(buffer, buffer.clone()) for buffer in _buffers(runner)]
        for buffer, _ in self._own:
            broadcast(buffer, src=0)

    @torch.no_grad()
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        for buffer, own in self._own:
            buffer.copy_(own)
        self._own = []


def _averages(hook: Hook) -> bool:
    # By its name: MMDetection need not be installed.
    return isinstance(hook, SyncBuffersHook) or type(hook).__name__ == 'SyncNormHook'


def _buffers(runner: Runner) -> Iterator[Tensor]:
    """Of the model and of averaged models, each once, in the same order in all processes."""
    seen = set()
    models = [runner.model, *(hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model'))]
    for model in models:
        for buffer in model.buffers():
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield buffer
