"""What of a checkpoint fits a model, where MMEngine writes a list of keys into the log and goes on.

:func:`find_fit` loads what fits, as MMEngine does, and returns what does not, for :class:`CheckpointFitHook
<mmubn.openmmlab.hooks.checkpoint_fit.CheckpointFitHook>` and :mod:`mmubn.openmmlab.pretrained` to say it.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from mmubn.checkpoints import CheckpointError, is_state_dict
from mmubn.checkpoints.layouts import BATCH_COUNT
from mmubn.openmmlab.saved_config import saved_config

__all__ = ['Fit', 'describe_file', 'find_fit', 'find_weights', 'some', 'unwrapped']

# torch's words for a tensor of another shape.
_OTHER_SHAPE = re.compile(
    r'size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*)\]\) from checkpoint, '
    r'the shape in current model is torch\.Size\(\[(.*)\]\)'
)


class Fit(NamedTuple):
    """What was loaded into a model, and what was not.

    Attributes:
        loaded: Number of keys of the model that the checkpoint has.
        total: Number of keys of the model.
        missing: Keys of the model that the checkpoint lacks.
        unexpected: Keys of the checkpoint that the model lacks.
        reshaped: Keys that both have, in other shapes, with the shapes.
        refused: What norm layers of this package say of entries that are not those of any norm that they read.
    """

    loaded: int
    total: int
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    refused: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether the checkpoint has all that the model has, and nothing else."""
        return not (self.missing or self.unexpected or self.reshaped or self.refused)

    def __str__(self) -> str:
        """Each kind of what does not fit, with its number and some of the keys."""
        parts = []
        if self.missing:
            parts.append(
                f'{len(self.missing)} of the {self.total} keys of the model are missing ({some(self.missing)})'
            )
        if self.reshaped:
            have = 'key has' if len(self.reshaped) == 1 else 'keys have'
            parts.append(f'{len(self.reshaped)} {have} another shape ({some(self.reshaped, 2)})')
        if self.unexpected:
            are = 'key is' if len(self.unexpected) == 1 else 'keys are'
            parts.append(f'{len(self.unexpected)} {are} not in the model ({some(self.unexpected)})')
        if self.refused:
            do = 'norm layer does' if len(self.refused) == 1 else 'norm layers do'
            parts.append(f'{len(self.refused)} {do} not read theirs ({self.refused[0].rstrip(".")})')
        return '; '.join(parts)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel and in a model of test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def find_weights(checkpoint: object, path: object) -> OrderedDict[str, Tensor]:
    """The state dict in a checkpoint as MMEngine finds it, without the prefix of DistributedDataParallel.

    Raises:
        CheckpointError: There is none. Says what the file, ``path``, holds.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path} is no checkpoint: it holds a {type(checkpoint).__name__} and no weights.')
    weights = checkpoint.get('state_dict', checkpoint)
    if not is_state_dict(weights):
        holds = some([str(key) for key in checkpoint], 5) or 'nothing'
        raise CheckpointError(
            f'{path} has no weights where MMEngine and torchvision keep them (as state_dict or model, or by '
            f'themselves): it holds {holds}.'
        )
    found = OrderedDict((key.removeprefix('module.'), value) for key, value in weights.items())
    if hasattr(weights, '_metadata'):
        found._metadata = weights._metadata  # the versions of the modules
    return found


def find_fit(model: nn.Module, weights: Mapping[str, Tensor]) -> Fit:
    """Load into ``model`` what of ``weights`` fits, module by module as MMEngine does; return what fits and what not.

    No difference are ``num_batches_tracked``, which old files lack, and buffers that the model does not save and old
    files have.
    """
    model = unwrapped(model)
    metadata = getattr(weights, '_metadata', None) or {}
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    refused: dict[str, str] = {}

    def load(module: nn.Module, entries: dict, prefix: str) -> None:
        module = unwrapped(module)
        try:
            module._load_from_state_dict(
                entries, prefix, metadata.get(prefix[:-1], {}), True, missing, unexpected, errors
            )
        except CheckpointError as error:
            refused[prefix] = str(error)
            return
        for name, child in module._modules.items():
            if child is not None:
                below = f'{prefix}{name}.'
                load(child, {key: value for key, value in entries.items() if key.startswith(below)}, below)
        for hook in module._load_state_dict_post_hooks.values():  # may take keys away
            hook(module, _IncompatibleKeys(missing, unexpected))

    load(model, dict(weights), '')
    saved = set(model.state_dict())
    unsaved = {name for name, _ in model.named_buffers()} - saved
    own = {key for key in saved if key.rpartition('.')[2] != BATCH_COUNT}
    shapes = [_OTHER_SHAPE.match(error) for error in errors]
    reshaped = {match[1]: f'{match[1]} is ({match[2]}) there and ({match[3]}) here' for match in shapes if match}
    others = [' '.join(error.split()) for error, match in zip(errors, shapes, strict=True) if not match]
    missing = [key for key in dict.fromkeys(missing) if key in own]
    lost = {*missing, *reshaped} | {key for key in own if key.startswith(tuple(refused))}
    return Fit(
        loaded=len(own - lost),
        total=len(own),
        missing=missing,
        unexpected=[key for key in dict.fromkeys(unexpected) if key not in unsaved],
        reshaped=[*reshaped.values(), *others],
        refused=list(refused.values()),
    )


def describe_file(checkpoint: Mapping, weights: Mapping[str, Tensor]) -> str:
    """A sentence on what model a checkpoint is of, as far as it says so, and on its keys."""
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    model = saved_config(checkpoint).get('model')
    kind = model.get('type') if isinstance(model, Mapping) else None
    parts = [f'from a training of {kind.rpartition(".")[2]}'] if isinstance(kind, str) else []
    if parts and isinstance(meta.get('epoch'), int):
        parts.append(f'epoch {meta["epoch"]}')
    classes = (meta.get('dataset_meta') or {}).get('classes') if isinstance(meta.get('dataset_meta'), Mapping) else None
    if isinstance(classes, (list, tuple)):
        of = 'class' if len(classes) == 1 else 'classes'
        parts.append(f'{len(classes)} {of} ({some([str(each) for each in classes])})')
    counts = Counter(key.partition('.')[0] for key in weights)
    starts = [f'{name} ({count})' if count > 1 else name for name, count in counts.items()]
    is_from = f'The file is {", ".join(parts)}; its' if parts else "The file's"
    return _printable(f'{is_from} keys start with {some(starts, 6)}')


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - count
    return _printable(', '.join(names[:count]) + (f' and {more} more' if more > 0 else ''))


def _printable(text: str) -> str:
    """A file may hold what a terminal obeys."""
    return ''.join(each if each.isprintable() else '?' for each in text)
