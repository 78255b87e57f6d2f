"""The stages of the check, in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mmubn.analysis.gpu_check import environment, features, kernels, layers, sanitizer, speed
from mmubn.analysis.gpu_check.outcome import Check

__all__ = ['PLANNED_FOR', 'STAGES', 'Stage']

PLANNED_FOR = 14  # processes at once; a machine with fewer cores has as much more time for a stage


class Stage(NamedTuple):
    """A part of the check.

    Attributes:
        checks: Lists the checks for a device; may raise :class:`~mmubn.analysis.gpu_check.outcome.Skip`.
        seconds: Its time with 14 processes, or with its one.
        memory: GiB of GPU memory for a process; None for one process alone.
        sanitized: Whether its processes run under compute-sanitizer.
    """

    checks: Callable[[torch.device], list[Check]]
    seconds: float
    memory: float | None
    sanitized: bool = False


STAGES = {
    'environment': Stage(environment.checks, 60, None),
    'kernels': Stage(kernels.checks, 170, 1),
    'layers': Stage(layers.checks, 150, 6),
    'features': Stage(features.checks, 100, 6),
    'sanitizer': Stage(sanitizer.checks, 80, 2, sanitized=True),
    'compilation': Stage(speed.compilation, 120, 4),
    'speed': Stage(speed.checks, 330, None),
}
