"""Checks of constructor arguments: one sentence with the name, what was expected and what was received."""

from __future__ import annotations

import math
from numbers import Integral, Real

__all__ = ['is_int', 'is_number', 'require']


def is_int(value: object) -> bool:
    """Whether ``value`` is an integer; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object, low: float, high: float = math.inf) -> bool:
    """Whether ``value`` is a finite number in [low, high]; a bool is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return math.isfinite(value) and low <= float(value) <= high


def require(valid: bool, owner: str, name: str, value: object, expected: str) -> None:
    """Raise a ValueError that names the argument of ``owner`` unless it is ``valid``."""
    if not valid:
        raise ValueError(f'{owner}: {name} must be {expected}, got {value!r}.')
