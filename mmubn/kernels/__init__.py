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
    similarity_gate: Callable[..., tuple[Tensor, Tensor]]
    statistics: Callable[..., tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]
    rectified_norm: Callable[[Tensor, Statistics, Form, Parameters], Tensor]


def _reference_means(x: Tensor) -> Tensor:
    return x.to(F.statistics_dtype(x)).mean((2, 3))


def _reference_sums(x: Tensor, a: Tensor, v: Tensor, max_samples: int) -> tuple[Tensor, int]:
    return F.similarity_sums(x, max_samples)


def _gate_by(similarity_sums: Callable[..., tuple[Tensor, int]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def similarity_gate(
        x: Tensor, a: Tensor, v: Tensor, max_samples: int, tau: Tensor, momentum: float, threshold: float
    ) -> tuple[Tensor, Tensor]:
        total, pairs = similarity_sums(x, a, v, max_samples)
        tau = F.update_running_similarity(tau, total / pairs, momentum)
        return tau, F.is_condensed(tau, threshold)

    return similarity_gate


def _statistics(
    a: Tensor,
    v: Tensor,
    center_weight: Tensor | None,
    running: tuple[Tensor, Tensor],
    condensed: Tensor,
    momentum: float | Tensor,
    count: int,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return F.select_statistics(F.batch_statistics(a, v, center_weight), running, condensed, momentum, count)


BACKENDS = {
    'reference': Backend(
        'reference',
        _reference_means,
        F.instance_moments,
        _reference_sums,
        _gate_by(_reference_sums),
        _statistics,
        reference,
    ),
    'torch': Backend(
        'torch',
        torch_ops.instance_means,
        torch_ops.instance_moments,
        torch_ops.similarity_sums,
        _gate_by(torch_ops.similarity_sums),
        _statistics,
        functools.partial(rectified_norm, torch_ops),
    ),
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
