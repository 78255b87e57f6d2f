"""What the hooks that look into the norm layers share: the layers, a batch that stays the same, and names for logs."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from mmubn.openmmlab.errors import ConfigError

__all__ = ['FixedBatch', 'layer_scalars', 'norm_layers']

# Called after every call of a layer: its name, which call of this forward it is (0, 1, ...), its input and its output.
Observer = Callable[[str, int, Tensor, Tensor], None]


class FixedBatch:
    """The same samples of the validation set whenever it is used, and what the norm layers make of them.

    They are ``num_samples`` samples of the data set of ``val_dataloader``, fewer where it has fewer, drawn without
    replacement with seed 0, loaded at the first use and then kept in the host's memory, padded to one size.

    Args:
        runner: A runner that is about to train.
        num_samples: How many samples.
        user: Name of the hook, for the errors.

    Attributes:
        model: The model without its wrapper.
        layers: The norms of the model by name (:func:`norm_layers`).
        num_samples: How many samples there are.

    Raises:
        ConfigError: The runner has no val_dataloader; the model has no norm; its wrapper cannot be taken off.
    """

    def __init__(self, runner: Runner, num_samples: int, user: str) -> None:
        self.model = _unwrapped(runner.model, user)
        self.layers = norm_layers(self.model)
        if not self.layers:
            raise ConfigError(f'{user} measures at norm layers, and {type(self.model).__name__} has none; remove it.')
        if runner.val_loop is None:
            raise ConfigError(
                f'{user} takes its fixed batch from the data set of val_dataloader, which is None; '
                'set val_dataloader, val_cfg and val_evaluator, or remove the hook.'
            )
        self._dataset = runner.val_dataloader.dataset
        self._collate = runner.val_dataloader.collate_fn
        self.num_samples = min(num_samples, len(self._dataset))
        # What fits into memory in training fits here; a batch sampler of one's own may not name its size.
        self._chunk = getattr(runner.train_dataloader.batch_sampler, 'batch_size', None) or 1

    def forward(self, observe: Observer) -> None:
        """Forward all samples, as many at a time as a training batch has, and observe what each norm gets and gives.

        ``observe(name, call, input, output)`` runs right after each call of a layer, before anything can overwrite its
        output in place. A layer that is shared by several places has several calls per forward; one that is not
        reached has none. The first dimension is that of the samples, in their order; behind a head that pools regions,
        that of the regions.

        The model is forwarded by ``mode='tensor'``, in evaluation mode, in its own precision (no autocast), by this
        process alone: no collective. Nothing of it stays: no buffer moves, each module's training flag and the states
        of all random number generators are what they were.
        """
        with _random_states_kept(), _evaluation(self.model), torch.no_grad(), contextlib.ExitStack() as stack:
            calls: Counter[str] = Counter()
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(_observer(name, calls, observe)).remove)
            for chunk in self._chunks:
                calls.clear()
                self.model._run_forward(self.model.data_preprocessor.cast_data(chunk), mode='tensor')

    @functools.cached_property
    def _chunks(self) -> list[dict | list]:
        """The samples as the model takes them. Preprocessed together, so that all have one size."""
        indices = np.random.default_rng(0).choice(len(self._dataset), self.num_samples, replace=False)
        samples = self._collate([self._dataset[int(index)] for index in indices])
        data = self.model.data_preprocessor(samples, False)
        data = apply_to(data, lambda value: hasattr(value, 'cpu'), lambda value: value.cpu())
        starts = range(0, self.num_samples, self._chunk)
        if isinstance(data, dict):
            return [{key: _rows(each, start, self._chunk) for key, each in data.items()} for start in starts]
        return [[_rows(each, start, self._chunk) for each in data] for start in starts]


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All norms of ``model`` by name: BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm and what derives from any.

    Those of this package derive from BatchNorm.
    """
    types = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return {name: module for name, module in model.named_modules() if isinstance(module, types)}


def layer_scalars(quantity: str, layers: list[str], values: list[float]) -> dict[str, float]:
    """Scalars for a visualizer, one per layer that has a value (is not NaN): ``{quantity}/layer.{name}``.

    The last part of a tag is what :func:`mmubn.analysis.runs.series` goes by: a layer called loss must not pass for the
    loss.
    """
    return {f'{quantity}/layer.{name}': value for name, value in zip(layers, values, strict=True) if value == value}


def _unwrapped(model: nn.Module, user: str) -> nn.Module:
    if not is_model_wrapper(model):
        return model
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f'{user} forwards the model in one process alone, and {type(model).__name__} shares it between processes; '
            'train with DistributedDataParallel, or remove the hook.'
        )
    return model.module


def _observer(name: str, calls: Counter[str], observe: Observer) -> Callable[[nn.Module, tuple, Tensor], None]:
    def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
        observe(name, calls[name], inputs[0], output)
        calls[name] += 1

    return hook


def _rows(values: Tensor | list | None, start: int, count: int) -> Tensor | list | None:
    return None if values is None else values[start : start + count]


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode. Each flag is set by hand: ``train()`` and ``eval()`` of a backbone do more."""
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
