"""Evaluation in which norms leave out the padding of a batch."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmubn.openmmlab.padding import PaddingAwareness, ignore_padding

__all__ = ['PaddingAwareHook']


@HOOKS.register_module()
class PaddingAwareHook(Hook):
    """Lets the norms of backbone and neck leave out the padding of a batch where a detector is evaluated.

    In a config: ``custom_hooks = [dict(type='PaddingAwareHook')]``. It acts in the validation of a training, in a test,
    with test-time augmentation too, and leaves training as it is. Without a runner, :func:`ignore_padding` does the
    same; its docstring says what is done, and what the errors are. The end of the run switches off what this hook has
    switched on.

    Raises:
        ConfigError: Before the run, where the model is no detector.
    """

    _awareness: PaddingAwareness | None = None

    def before_run(self, runner: Runner) -> None:
        self.after_run(runner)
        self._awareness = ignore_padding(runner.model)
        count = len(self._awareness.layers)
        what = f'{count} layers of backbone and neck leave' if count else 'no layer of backbone and neck has to leave'
        runner.logger.info(f'mmubn: in evaluation {what} out the padding of a batch.')

    def after_run(self, runner: Runner) -> None:
        if self._awareness is not None:
            for handle in self._awareness.handles:
                handle.remove()
            self._awareness = None
