"""A strict form of MMEngine's ``init_cfg=dict(type='Pretrained')``: a checkpoint that does not fit is an error.

MMEngine only warns about keys that are missing or unexpected and about shapes that differ, and trains on from random
weights. ``strict=True`` makes each of these a CheckpointError, before the first iteration. Strict or not, a checkpoint
of which nothing fits is one, a checkpoint that has its weights as ``model`` is read too, and the log says which layouts
the norms of this package were read from.

In a config: ``custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.pretrained'])``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mmengine.logging import print_log
from mmengine.model import PretrainedInit as _PretrainedInit
from mmengine.model.weight_init import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn

from mmubn.checkpoints import CheckpointError, is_state_dict
from mmubn.openmmlab import patches
from mmubn.openmmlab.checkpoint_fit import describe_file, find_fit, find_weights
from mmubn.openmmlab.errors import UnreadCheckpointError
from mmubn.openmmlab.loading import accepted_checkpoints, log_reads, with_state_dict

__all__ = ['PretrainedInit', 'register']

REMEDY = (
    'give a checkpoint of the same network and norm, or the prefix that its keys have '
    "('backbone.' in one of MMPretrain, None in one of torchvision)"
)


class PretrainedInit(_PretrainedInit):
    """Initialise a module from a checkpoint; as MMEngine does, or strictly.

    In a config: ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.', strict=True)``.

    Args:
        checkpoint: Path or URL of a checkpoint: a state dict, or a dict that has one as ``state_dict`` (MMEngine) or as
            ``model`` (torchvision's training scripts).
        prefix: Where the module is in the checkpoint: ``'backbone.'`` in one of MMPretrain, None in one of torchvision.
        map_location: Device that the checkpoint is read to.
        strict: Whether every key of the module must be in the checkpoint, in its shape, and every key under ``prefix``
            in the module. Without a prefix the checkpoint may have ``fc.*``, torchvision's classifier, besides. A norm
            layer of this package may read another layout (docs/checkpoints.md).

    Raises:
        CheckpointError: On a call, in every process: strict, the checkpoint does not fit; or nothing of it does; or no
            key starts with ``prefix``; or, in a tool, the file is not read. Names the keys, or what the file holds, and
            what to do.
    """

    def __init__(
        self, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu', strict: bool = False
    ) -> None:
        super().__init__(checkpoint, prefix, map_location)
        self.strict = strict

    def __call__(self, module: nn.Module) -> None:
        what = 'model' if self.prefix is None else f'{self.prefix} in model'
        print_log(f'load {what} from: {self.checkpoint}', logger='current')
        if self.strict:
            with log_reads('current'):
                self._load_strictly(module)
        else:
            self._load(module)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())

    def _load(self, module: nn.Module) -> None:
        checkpoint = self._read()
        weights = find_weights(checkpoint, self.checkpoint)
        if self.prefix is not None:
            weights = self._under_prefix(checkpoint.get('state_dict', checkpoint))
        fit = find_fit(module, weights)
        if fit.loaded == 0 < fit.total:
            raise CheckpointError(
                f'nothing of {self.checkpoint}, read with init_cfg.prefix={self.prefix!r}, fits this '
                f'{type(module).__name__}: {fit}. {describe_file(checkpoint, weights)}; {REMEDY}, or leave '
                'init_cfg out to start without it.'
            )
        if fit.refused:  # MMEngine would raise it without the name of the file
            raise CheckpointError(
                f'{self.checkpoint}, read with init_cfg.prefix={self.prefix!r}, does not fit this '
                f'{type(module).__name__}: {fit}.'
            )
        with log_reads('current'):
            mmengine_checkpoint.load_state_dict(module, weights, strict=False, logger='current')
        if fit.missing or fit.reshaped or fit.refused:  # what the module lacks, as a classifier's head, is nothing new
            loaded = f'{fit.loaded} of {fit.total} keys of this {type(module).__name__} loaded'
            print_log(f'mmubn: {self.checkpoint}: {loaded}; {fit}.', logger='current', level=logging.WARNING)

    def _load_strictly(self, module: nn.Module) -> None:
        try:
            checkpoint = self._read()
            state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else checkpoint
            if not is_state_dict(state_dict):
                raise CheckpointError('expected a state dict, by itself or as state_dict or model, and found none')
            # torch's way: that of MMEngine raises an error in the first process alone, and the others wait for it.
            missing, unexpected = module.load_state_dict(self._under_prefix(state_dict), strict=False)
            if self.prefix is None:
                unexpected = [key for key in unexpected if not key.startswith('fc.')]
            found = ((missing, 'missing'), (unexpected, 'unexpected'))
            if wrong := [f'{_some(keys)} {what}' for keys, what in found if keys]:
                raise CheckpointError('; '.join(wrong))
        except UnreadCheckpointError:
            raise
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f'{self.checkpoint}, read with init_cfg.prefix={self.prefix!r}, does not fit this '
                f'{type(module).__name__}: {" ".join(str(error).split()).rstrip(".")}; {REMEDY}, or '
                'init_cfg.strict=False to load what fits.'
            ) from error

    def _read(self) -> object:
        with accepted_checkpoints():
            checkpoint = CheckpointLoader.load_checkpoint(self.checkpoint, map_location=self.map_location)
        return with_state_dict(checkpoint)

    def _under_prefix(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.prefix is None:
            # DistributedDataParallel's prefix, which MMEngine drops too.
            return {key.removeprefix('module.'): value for key, value in state_dict.items()}
        prefix = self.prefix.rstrip('.') + '.'
        under_prefix = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if not under_prefix:
            found = ', '.join(dict.fromkeys(key.split('.')[0] for key in state_dict))
            raise CheckpointError(
                f'{self.checkpoint} has no key that starts with {prefix}, its keys start with {found}'
            )
        return under_prefix


def _some(keys: list[str], count: int = 3) -> str:
    more = len(keys) - count
    return ', '.join(keys[:count]) + (f' and {more} more' if more > 0 else '') + (' are' if len(keys) > 1 else ' is')


def register() -> None:
    """Register the class under MMEngine's own name, in its place.

    BaseModule.init_weights runs an initializer of any other name first, not last, and the init_weights of the module's
    children then overwrites what was loaded.
    """
    WEIGHT_INITIALIZERS.register_module(name='Pretrained', module=PretrainedInit, force=True)


patches.apply(patches.ON_PRETRAINED)
