"""Fast and exact ways to compute a norm layer, and the one rule that chooses between them.

Needs torch alone. A :class:`Backend` offers the passes over x:

- ``reference``: :mod:`mmubn.functional`, plain torch, differentiated by autograd. What the others are tested against.
- ``torch``: :mod:`mmubn.kernels.torch_ops`, with a hand-written backward that saves x and O(N C) numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mmubn import functional as F
from mmubn.kernels import torch_ops
from mmubn.kernels.autograd import Form, Parameters, Statistics, rectified_norm, reference

__all__ = ['Backend', 'Form', 'Parameters', 'Statistics', 'choose_backend', 'use_backend']


class Backend(NamedTuple):
    """One way to compute a norm; every way gives the same numbers to rounding."""

    name: str
    instance_means: Callable[[Tensor], Tensor]
    instance_moments: Callable[[Tensor], tuple[Tensor, Tensor]]
    similarity_sums: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, int]]
    rectified_norm: Callable[[Tensor, Statistics, Form, Parameters], Tensor]


def _analytic(name: str, ops: ModuleType) -> Backend:
    moments = ops.instance_means, ops.instance_moments, ops.similarity_sums
    return Backend(name, *moments, functools.partial(rectified_norm, ops))


BACKENDS = {
    'reference': Backend(
        'reference',
        lambda x: x.to(F.statistics_dtype(x)).mean((2, 3)),
        F.instance_moments,
        lambda x, a, v, max_samples: F.similarity_sums(x, max_samples),
        reference,
    ),
    'torch': _analytic('torch', torch_ops),
}
_forced: ContextVar[str | None] = ContextVar('_forced', default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every layer computes by the backend ``name``, for comparisons and benchmarks."""
    if name not in BACKENDS:
        raise ValueError(f'there is no backend {name!r}: expected one of {", ".join(BACKENDS)}.')
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose_backend(x: Tensor, kernel_size: int) -> Backend:
    """The backend for an input: see :func:`backend_and_reason`."""
    return BACKENDS[backend_and_reason(x, kernel_size)[0]]


def backend_and_reason(x: Tensor, kernel_size: int) -> tuple[str, str]:
    """The rule. First that applies: forced, then the reference under a tracer, then Triton, then torch."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 'reference', 'a compiler or exporter traces the layer: it fuses plain operators itself'
    if (name := _forced.get()) is not None:
        return name, f'use_backend({name!r})'
    return 'torch', f'the input is on {x.device.type}'
