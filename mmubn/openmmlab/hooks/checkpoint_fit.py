"""A checkpoint that does not fit the model: MMEngine warns, and goes on with random weights."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmubn.checkpoints import CheckpointError
from mmubn.openmmlab.checkpoint_fit import describe_file, find_fit, find_weights, unwrapped

__all__ = ['CheckpointFitHook']


class CheckpointFitHook(Hook):
    """Checks that the checkpoint that a runner loads fits its model.

    To resume a run, and where the hook is told so, all keys must fit. Else, as for fine-tuning, some must, and the log
    says in one line what was not loaded.

    Args:
        whole: Whether all keys must fit, resumed or not.
        remedy: What to do where they do not, for the error.

    Raises:
        CheckpointError: Before MMEngine loads it. Says what is missing, unexpected or of another shape, and what the
            file is; or that the file has no weights.
    """

    def __init__(self, whole: bool = False, remedy: str = 'give the config that it was trained with') -> None:
        self.whole, self.remedy = whole, remedy

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # Where each process has a part of the model (FSDP, another runner's strategies), shapes are those of the parts.
        if not isinstance(runner, Runner) or any(_is_part(each) for each in runner.model.parameters()):
            return
        path = runner._load_from or f'the last checkpoint in {runner.work_dir}'
        weights = find_weights(checkpoint, path)
        fit = find_fit(runner.model, weights)
        if 'state_dict' not in checkpoint:
            checkpoint['state_dict'] = weights  # EMAHook looks for it
        if fit.is_whole:
            return
        kind = type(unwrapped(runner.model)).__name__
        what = describe_file(checkpoint, weights)
        if fit.loaded == 0 < fit.total:
            raise CheckpointError(
                f'nothing of {path} fits this {kind}: {fit}. {what}; give one of the same network, or name '
                "a part's weights by the init_cfg of that part (type='Pretrained', checkpoint=..., prefix=...)."
            )
        if runner._resume:
            raise CheckpointError(
                f'{path} does not fit this {kind}, so the run cannot be resumed from it: {fit}. {what}. '
                'Give the config that it was trained with, or start a new run from what fits: leave --resume out and '
                f'set load_from to it (--cfg-options load_from={path}).'
            )
        if self.whole:
            lacks = fit.missing or fit.reshaped or fit.refused
            why = 'What it lacks would stay random' if lacks else 'The model would not be the one that was trained'
            raise CheckpointError(f'{path} does not fit this {kind}: {fit}. {what}. {why}: {self.remedy}.')
        if fit.refused:
            raise CheckpointError(f'{path} does not fit this {kind}: {fit}.')
        runner.logger.warning(f'mmubn: {path}: {fit.loaded} of {fit.total} keys of the model loaded; {fit}.')


def _is_part(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, 'full_tensor') or type(parameter).__name__ == 'FlatParameter'
