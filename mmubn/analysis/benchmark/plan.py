"""What a benchmark runs: which contenders, at which settings, how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mmubn.analysis.benchmark.trials import LayerTrial, NetworkTrial, Setting

__all__ = ['Axes', 'Plan', 'sweep_axes']

Axes = dict[str, list[tuple[int, Setting]]]  # per swept axis, its sizes in ascending order with their settings


@dataclass
class Plan:
    """One benchmark.

    Attributes:
        mode: ``layer``, ``network`` or ``sweep``.
        trial: What is timed.
        settings: The inputs, each once.
        contenders: Names in :data:`~mmubn.analysis.benchmark.contenders.CONTENDERS`; the baseline is one of them.
        baseline: The contender that ratios are to.
        device: Where everything runs.
        axes: Of a sweep.
        repeats: Rounds that count.
        warmup: Rounds before them.
        cuda_graphs: Replay each step as a CUDA graph.
        cold_cache: Overwrite the caches before every timing.
    """

    mode: str
    trial: type[LayerTrial] | type[NetworkTrial]
    settings: list[Setting]
    contenders: list[str]
    baseline: str
    device: torch.device
    axes: Axes = field(default_factory=dict)
    repeats: int = 20
    warmup: int = 3
    cuda_graphs: bool = False
    cold_cache: bool = False

    @property
    def rounds(self) -> int:
        return len(self.settings) * (self.warmup + self.repeats)


def sweep_axes(
    base: tuple[int, int, int, int],
    batch_sizes: Sequence[int],
    channels: Sequence[int],
    sides: Sequence[int],
    dtype: str,
    memory_format: str,
) -> Axes:
    """Build the axes of a sweep around ``base``: batch size, channels, and the pixels of a square map."""
    n, c, h, w = base
    axes = {
        'N': [(size, (size, c, h, w)) for size in batch_sizes],
        'C': [(size, (n, size, h, w)) for size in channels],
        'H*W': [(side**2, (n, c, side, side)) for side in sides],
    }
    return {
        axis: [(size, Setting(shape, dtype, memory_format)) for size, shape in sorted(set(points))]
        for axis, points in axes.items()
    }
