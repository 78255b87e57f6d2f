"""Feature condensation while a model trains: how alike the samples of a batch are to each norm layer."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmubn import functional
from mmubn.layers import UBN
from mmubn.layers.arguments import is_int, is_number, require
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.hooks.fixed_batch import FixedBatch, layer_scalars
from mmubn.openmmlab.hooks.layer_log import LayerLog

__all__ = ['FeatureCondensationHook']

# The quantities, and what a visualizer calls them.
TAGS = {
    'fixed': 'similarity_fixed',
    'batch': 'similarity_batch',
    'running': 'running_similarity',
    'gate': 'gate',
}

Record = dict[str, list[Tensor | None]]  # by quantity, 0-d tensors: one per layer, None where it has no value


@HOOKS.register_module()
class FeatureCondensationHook(Hook):
    r"""Logs how condensed the features are that each norm layer gets, for any norm: BN, GN, LN, UBN and so on.

    .. math::
        s = \frac{\sum_{i \ne j} \cos(f_i, f_j)}{n (n - 1)}

    f_i is the layer's input for sample i, flattened; n is the number of samples, the first dimension of the input. A
    layer is condensed where s exceeds a threshold. Four quantities, each with a value per layer, NaN (null) where a
    layer has none:

    - ``fixed``: s of a fixed batch of the validation set in evaluation mode (:class:`FixedBatch`), over all pairs of
      its samples: before the first iteration, every ``fixed_interval`` iterations and at the end. From it come
      ``condensed_share``, the share of condensed layers among those that have a value, and ``similarity_fixed_mean``.
    - ``batch``: s of the training batch, its first ``num_samples`` samples: in the first iteration and every
      ``interval`` iterations.
    - ``running``: the running similarity of UBN, after that batch.
    - ``gate``: 1 where UBN used that batch's statistics, 0 where not: not condensed by the layer's own threshold, or in
      evaluation mode (``norm_eval``).

    Where a layer is called several times in a forward, as in a head that the levels of an FPN share, s is over the
    pairs within each call; behind a head that pools regions, the regions are the samples. Padding counts as features.

    They go to the visualizer of the runner, as ``similarity_fixed/layer.backbone.bn1`` and the like, and to
    ``feature_condensation.jsonl`` in the run's log folder, which :func:`mmubn.analysis.runs.read_layer_log` reads.
    Training is what it is without the hook, bit for bit. In distributed training the first process measures: its own
    part of the batch, its own gates; no collective is called. After ``--resume`` the fixed batch is the same one.

    **Cost.** A measurement of the training batch takes about a tenth of an iteration, one of the fixed batch
    ``num_samples / batch_size`` evaluation forwards, 7 to 9 iterations with 2 images per process: at the default
    intervals 1% of training, and less with more images. While it runs, when no activations are kept for a backward, it
    needs memory for the inputs of all norms for one sample, in float32.

    Args:
        interval: Iterations between two measurements of the training batch.
        fixed_interval: Iterations between two measurements of the fixed batch.
        num_samples: Samples of the fixed batch, and at most this many of a training batch; at least 2.
        threshold: s above which a layer counts as condensed, in [-1, 1].

    Raises:
        ValueError: For an argument outside its range.
        ConfigError: Before the first iteration, where ``compile`` hides the layers, and as :class:`FixedBatch`.

    Source: arXiv 2311.15993, Definition 1; Appendix A for the fixed batch of 32 samples and the threshold of 0.3.

    Example:
        >>> custom_hooks = [dict(type='FeatureCondensationHook')]
    """

    def __init__(
        self, interval: int = 50, fixed_interval: int = 1000, num_samples: int = 32, threshold: float = 0.3
    ) -> None:
        name = type(self).__name__
        for argument, value in (('interval', interval), ('fixed_interval', fixed_interval)):
            require(is_int(value) and value > 0, name, argument, value, 'a positive integer')
        require(is_int(num_samples) and num_samples >= 2, name, 'num_samples', num_samples, 'an integer of at least 2')
        require(is_number(threshold, -1, 1), name, 'threshold', threshold, 'a number in [-1, 1]')
        self.interval = interval
        self.fixed_interval = fixed_interval
        self.num_samples = num_samples
        self.threshold = threshold

    def before_train(self, runner: Runner) -> None:
        name = type(self).__name__
        if runner.cfg.get('compile'):
            raise ConfigError(
                f'{name} cannot see the layers of a compiled training step, got compile={runner.cfg.compile!r}; '
                'leave compile out, or remove the hook.'
            )
        self._fixed_batch = FixedBatch(runner, self.num_samples, name)
        self._layers = self._fixed_batch.layers
        self._handles: list[RemovableHandle] = []
        self._sums: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)
        if is_main_process():
            self._log = LayerLog(
                Path(runner.log_dir) / 'feature_condensation.jsonl',
                list(self._layers),
                types=[type(layer).__name__ for layer in self._layers.values()],
                threshold=self.threshold,
                num_samples=self._fixed_batch.num_samples,
            )
            self._write(runner, runner.iter, self._fixed_record(runner.iter))

    @master_only
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        step = runner.iter + 1
        if step == 1 or step % self.interval == 0:
            for name, layer in self._layers.items():
                self._handles.append(layer.register_forward_pre_hook(partial(self._see_batch, name)))

    def _see_batch(self, name: str, _: nn.Module, inputs: tuple) -> None:
        # Neither what activation checkpointing repeats, in the backward, nor what another hook forwards, in evaluation.
        if self._fixed_batch.model.training and torch._C._current_graph_task_id() == -1:
            self._sums[name].append(functional.similarity_sums(inputs[0], self.num_samples))

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        step = runner.iter + 1
        record: Record = {}
        if self._handles:
            record |= self._batch_record()
        if step % self.fixed_interval == 0:
            record |= self._fixed_record(step)
        if record:
            self._write(runner, step, record)

    @master_only
    def after_train(self, runner: Runner) -> None:
        if runner.iter != self._fixed_step:
            self._write(runner, runner.iter, self._fixed_record(runner.iter))

    def _batch_record(self) -> Record:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        layers = self._layers.values()
        record = {
            'batch': [_mean(self._sums[name]) for name in self._layers],
            'running': [layer.running_similarity if isinstance(layer, UBN) else None for layer in layers],
            'gate': [_gate(layer) if isinstance(layer, UBN) else None for layer in layers],
        }
        self._sums.clear()
        return record

    def _fixed_record(self, step: int) -> Record:
        self._fixed_step = step
        # Samples that are forwarded apart are pairs too, where they have one shape and are in the same call.
        vectors: dict[tuple, _UnitVectors] = defaultdict(_UnitVectors)
        self._fixed_batch.forward(lambda name, call, x, _: vectors[name, call, x.shape[1:]].add(x))
        sums = defaultdict(list)
        for (name, *_), each in vectors.items():
            sums[name].append(each.similarity_sums())
        return {'fixed': [_mean(sums[name]) for name in self._layers]}

    def _write(self, runner: Runner, step: int, record: Record) -> None:
        values = _on_host(record)
        self._log.append(step, step // len(runner.train_dataloader), **values)
        scalars = {}
        for quantity, each in values.items():
            scalars |= layer_scalars(TAGS[quantity], list(self._layers), each)
        if found := [value for value in values.get('fixed', []) if not math.isnan(value)]:
            scalars['condensed_share'] = sum(value > self.threshold for value in found) / len(found)
            scalars['similarity_fixed_mean'] = sum(found) / len(found)
        runner.visualizer.add_scalars(scalars, step=step)


class _UnitVectors:
    """Sums over samples that come in parts: :func:`mmubn.functional.similarity_sums` of all of them, unlimited."""

    def __init__(self) -> None:
        self._sum, self._squares, self._count = 0, 0, 0

    def add(self, x: Tensor) -> None:
        u = functional.unit_vectors(x)
        self._sum = self._sum + u.sum(0)
        self._squares = self._squares + u.square().sum()
        self._count += len(u)

    def similarity_sums(self) -> tuple[Tensor, int]:
        return self._sum.square().sum() - self._squares, self._count * (self._count - 1)


def _mean(sums: list[tuple[Tensor, int]]) -> Tensor | None:
    pairs = sum(number for _, number in sums)
    return sum(total for total, _ in sums) / pairs if pairs else None


def _gate(layer: UBN) -> Tensor:
    threshold = layer.threshold if layer._gate_acts() else None
    return functional.is_condensed(layer.running_similarity, threshold) & layer.training


def _on_host(record: Record) -> dict[str, list[float]]:
    """All values in one transfer, so that the device is waited for once."""
    present = [value.float() for values in record.values() for value in values if value is not None]
    numbers = iter(torch.stack(present).tolist() if present else [])
    return {
        quantity: [math.nan if value is None else next(numbers) for value in values]
        for quantity, values in record.items()
    }
