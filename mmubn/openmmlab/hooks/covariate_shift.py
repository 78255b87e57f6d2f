"""Internal covariate shift: how far an update of the network moves the distribution of what its norm layers give.

Source: Bounding the internal covariate shift with the Earth-Mover distance, arXiv 2001.02814 (CVPR 2020).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmubn.layers.arguments import is_int, require
from mmubn.openmmlab.hooks.fixed_batch import FixedBatch, layer_scalars
from mmubn.openmmlab.hooks.layer_log import LayerLog

__all__ = ['CovariateShiftHook', 'channel_distances', 'sliced_distance']

# Points per layer: with as many SciPy takes 0.1 ms per channel, of which the norms of ResNet-50 have 26,560.
MAX_POINTS = 512


@HOOKS.register_module()
class CovariateShiftHook(Hook):
    """Measures how far a training iteration moves the distribution of each norm layer's outputs on a fixed batch.

    In a config: ``custom_hooks = [dict(type='CovariateShiftHook')]``. In the first iteration and in every
    ``interval``-th, right before and right after it, the network predicts on the fixed batch
    (:class:`~mmubn.openmmlab.hooks.fixed_batch.FixedBatch`). The C outputs of a norm layer at one place of one sample
    are a point. Per layer, two distances between the points before and after are logged:

    - ``channel``: the mean over channels of :func:`channel_distances`;
    - ``joint``: :func:`sliced_distance` of the points.

    They go to all visualizers, as ``shift_channel/layer.{name}`` and ``shift_joint/layer.{name}``, and to
    ``covariate_shift.jsonl`` in the log folder of the run (:func:`mmubn.analysis.runs.read_layer_log`), under the
    number of the iteration, from 1. Training goes on bit for bit as without the hook.

    **What counts as shift.** Everything that the iteration changes in the prediction: the parameters, and the running
    statistics, which move in the same iteration. With gradient accumulation, an iteration without optimizer step shows
    the move of the running statistics alone. In distributed training process 0 measures its own copy of the model,
    whose running statistics are its own, and calls no collective; the others wait for it in their next one.

    **Which points.** Of each layer at most 512, drawn evenly from all places of all its calls with a fixed seed: the
    same places before and after, so that a layer whose outputs stay is at distance 0. Behind a head that pools regions
    an iteration also changes which regions there are. Where it changes how many, the distance is between samples of
    different places, and stays above 0 whatever the layer does. A layer that is not reached, or whose outputs are empty
    or not finite, has no value (NaN).

    **Cost.** Two forward passes of the fixed batch, which cost as much as 18 iterations with 2 images per GPU and fewer
    with more: under 2% of training at the default interval. And 0.1 ms on the CPU for each channel of each layer: 3 s
    with ResNet-50, 3 ms per iteration.

    Args:
        interval: Iterations from one measurement to the next.
        num_samples: Samples of the fixed batch.

    Raises:
        ValueError: An argument is not a positive integer.
        ConfigError: As :class:`~mmubn.openmmlab.hooks.fixed_batch.FixedBatch`, when training starts.

    Source: arXiv 2001.02814, which defines internal covariate shift as this distance.
    """

    def __init__(self, interval: int = 1000, num_samples: int = 32) -> None:
        for name, value in (('interval', interval), ('num_samples', num_samples)):
            require(is_int(value) and value > 0, type(self).__name__, name, value, 'a positive integer')
        self.interval = interval
        self.num_samples = num_samples

    def before_train(self, runner: Runner) -> None:
        self._batch = FixedBatch(runner, self.num_samples, type(self).__name__)
        self._layers = self._batch.layers
        self._before: dict[str, np.ndarray] | None = None
        if is_main_process():
            self._log = LayerLog(
                Path(runner.log_dir) / 'covariate_shift.jsonl',
                list(self._layers),
                types=[type(layer).__name__ for layer in self._layers.values()],
                num_samples=self._batch.num_samples,
            )

    @master_only
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        step = runner.iter + 1
        if step == 1 or step % self.interval == 0:
            self._before = self._points()

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        if self._before is None:
            return
        before, after = self._before, self._points()
        self._before = None
        layers = list(self._layers)
        channel, joint = zip(*(_distances(before.get(name), after.get(name)) for name in layers), strict=True)
        step = runner.iter + 1
        self._log.append(step, step // len(runner.train_dataloader), channel=channel, joint=joint)
        scalars = layer_scalars('shift_channel', layers, channel) | layer_scalars('shift_joint', layers, joint)
        runner.visualizer.add_scalars(scalars, step=step)

    def _points(self) -> dict[str, np.ndarray]:
        """The points of each layer that is reached, (n, C)."""
        kept: dict[str, KeptPoints] = {}

        def observe(name: str, call: int, x: Tensor, y: Tensor) -> None:
            if y.numel() > 0:
                y = _channels_second(self._layers[name], y)
                if name not in kept:
                    kept[name] = KeptPoints(y.shape[1])
                kept[name].add(y)

        self._batch.forward(observe)
        return {name: points.values for name, points in kept.items()}


def _channels_second(layer: nn.Module, y: Tensor) -> Tensor:
    """(N, C, ...) or (N, ..., C) as (N, C, L)."""
    # Of LayerNorm and RMSNorm; those of MMPretrain's LayerNorm2d have the channels first or last.
    shape = getattr(layer, 'normalized_shape', None)
    if shape is not None and y.shape[-1] == shape[-1]:
        y = y.movedim(-1, 1)
    return y.reshape(*y.shape[:2], -1)


class KeptPoints:
    """Points drawn without replacement out of a stream of unknown length: those of the smallest random keys.

    Args:
        channels: C.

    Attributes:
        values: The points, (n, C), float32, n at most MAX_POINTS.
    """

    def __init__(self, channels: int) -> None:
        self._random = np.random.default_rng(0)
        self._keys = np.empty(0, np.float32)
        self.values = np.empty((0, channels), np.float32)

    def add(self, y: Tensor) -> None:
        """Offer all places of all samples of ``y``, (N, C, L)."""
        places = (y.shape[0], y.shape[2])
        keys = self._random.random(math.prod(places), dtype=np.float32)
        drawn = _smallest(keys)
        # This indexing copies: an activation may overwrite y in place.
        sample, place = map(torch.from_numpy, np.unravel_index(drawn, places))
        values = np.concatenate([self.values, y[sample, :, place].float().cpu().numpy()])
        keys = np.concatenate([self._keys, keys[drawn]])
        kept = _smallest(keys)
        self._keys, self.values = keys[kept], values[kept]


def _smallest(keys: np.ndarray) -> np.ndarray:
    """Indices of the MAX_POINTS smallest, of all if there are fewer."""
    return np.argpartition(keys, min(MAX_POINTS, len(keys)) - 1)[:MAX_POINTS]


def _distances(before: np.ndarray | None, after: np.ndarray | None) -> tuple[float, float]:
    """``channel`` and ``joint`` of a layer, NaN where there is nothing to measure."""
    if before is None or after is None or not (np.isfinite(before).all() and np.isfinite(after).all()):
        return math.nan, math.nan
    return float(channel_distances(before, after).mean()), sliced_distance(before, after)


def channel_distances(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Earth-Mover (Wasserstein-1) distance between the values before and after, channel by channel.

    ``W(P, Q) = inf E|p - q| = integral |F_P(t) - F_Q(t)| dt``, the infimum over all joint distributions of p and q with
    marginals P and Q. P and Q are the empirical distributions, F_P and F_Q their distribution functions.

    Args:
        before: Values of C channels, (n, C).
        after: The same, (m, C); m may differ from n.

    Returns:
        (C,), float64, in the unit of the values.

    Raises:
        ValueError: For another shape, no values, or values that are not finite.

    Source: arXiv 2001.02814; computed by ``scipy.stats.wasserstein_distance``.
    """
    # Here: it takes half a second, a fifth of `import mmubn`, and MMPretrain alone does not bring SciPy.
    from scipy.stats import wasserstein_distance

    before, after = _points(before, after)
    return np.array([wasserstein_distance(p, q) for p, q in zip(before.T, after.T, strict=True)])


def sliced_distance(before: np.ndarray, after: np.ndarray, directions: int = 64, seed: int = 0) -> float:
    """Sliced Earth-Mover distance between the points before and after: what changes jointly in all channels too.

    ``SW(P, Q) = mean_k W(u_k . P, u_k . Q)``, W as in :func:`channel_distances` of the points' projections on random
    unit vectors u_k, uniform on the sphere in R^C. ``SW <= W``, the distance in R^C itself.

    Args:
        before: n points of C channels, (n, C).
        after: The same, (m, C); m may differ from n.
        directions: Number of unit vectors.
        seed: Fixes the unit vectors.

    Returns:
        The distance, in the unit of the values.

    Raises:
        ValueError: As :func:`channel_distances`, and for a number of directions below 1.
    """
    if not is_int(directions) or directions < 1:
        raise ValueError(f'directions must be a positive integer, got {directions!r}.')
    before, after = _points(before, after)
    vectors = np.random.default_rng(seed).standard_normal((before.shape[1], directions))
    vectors /= np.linalg.norm(vectors, axis=0)
    return float(channel_distances(before @ vectors, after @ vectors).mean())


def _points(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, checked."""
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    for name, points in (('before', before), ('after', after)):
        if points.ndim != 2 or points.size == 0:
            raise ValueError(f'{name} must be values of shape (n, C), got {points.shape}.')
        if not np.isfinite(points).all():
            raise ValueError(f'{name} must be finite, got {points[~np.isfinite(points)][0]}.')
    if before.shape[1] != after.shape[1]:
        raise ValueError(f'before and after must have as many channels, got {before.shape} and {after.shape}.')
    return before, after
