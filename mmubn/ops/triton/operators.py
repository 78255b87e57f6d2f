"""All functions that launch, and the operators of the same names in ``torch.ops.mmubn``, for ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmubn.ops.triton.apply import apply
from mmubn.ops.triton.coefficients import (
    coefficients,
    gated_coefficients,
    gathered_coefficients,
    own_part,
    statistics_coefficients,
)
from mmubn.ops.triton.coefficients_backward import (
    coefficients_backward,
    empty_gradients,
    own_coefficients_backward,
    statistics_backward,
)
from mmubn.ops.triton.input_gradient import input_gradient
from mmubn.ops.triton.inputs import dense
from mmubn.ops.triton.moments import instance_moments
from mmubn.ops.triton.similarity import similarity_sums
from mmubn.ops.triton.tap_sums import tap_sums

__all__ = [
    'apply',
    'coefficients',
    'coefficients_backward',
    'gated_coefficients',
    'gathered_coefficients',
    'input_gradient',
    'instance_moments',
    'own_coefficients_backward',
    'own_part',
    'similarity_sums',
    'statistics_backward',
    'statistics_coefficients',
    'tap_sums',
]


class _Operator(NamedTuple):
    function: Callable
    schema: str
    fake: Callable  # what stands in for the function while torch.compile traces


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _fake_instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return _float32(x, *x.shape[:2]), _float32(x, *x.shape[:2])


def _fake_similarity_sums(x: Tensor, *_: Any) -> Tensor:
    return _float32(x, 2)


def _fake_coefficients(a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _float32(a, *a.shape), _float32(a, *a.shape)


def _fake_statistics_coefficients(a: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *_fake_coefficients(a), *(_float32(a, a.shape[1]) for _ in range(4))


def _fake_gated_coefficients(x: Tensor, a: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *_fake_statistics_coefficients(a), _float32(a), a.new_empty((), dtype=torch.bool)


def _fake_own_part(x: Tensor, a: Tensor, *_: Any) -> Tensor:
    return _float32(a, 2 * a.shape[1] + 3)


def _fake_gathered_coefficients(
    gathered: Tensor, a: Tensor, running_similarity: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    gate = () if running_similarity is not None else (0,)
    return *_fake_statistics_coefficients(a), _float32(a), _float32(a, *gate), a.new_empty(gate, dtype=torch.bool)


def _fake_apply(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(dense(x))


def _fake_tap_sums(x: Tensor, dy: Tensor, center: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], kernel_size * kernel_size)
    return _float32(x, *shape), _float32(x, *shape)


def _fake_coefficients_backward(
    products: Tensor,
    sums: Tensor,
    a: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    condensed: Tensor | None,
    scale: Tensor,
    weight: Tensor,
    neighbor_weight: Tensor | None,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return _float32(a, *a.shape), *empty_gradients(
        _float32(a, *a.shape),
        _float32(weight, *weight.shape),
        None if neighbor_weight is None else _float32(neighbor_weight, *neighbor_weight.shape),
        None if center_weight is None else _float32(center_weight, *center_weight.shape),
        None if scale_weight is None else _float32(scale_weight, *scale_weight.shape),
    )


def _fake_own_coefficients_backward(
    products: Tensor, sums: Tensor, a: Tensor, mean: Tensor, var: Tensor, eps: float, *others: Any
) -> tuple[Tensor, ...]:
    _, *gradients = _fake_coefficients_backward(products, sums, a, mean, var, eps, None, *others)
    return _float32(mean, 2, *mean.shape), *gradients


def _fake_statistics_backward(
    statistic_sums: Tensor,
    a: Tensor,
    mean: Tensor,
    condensed: Tensor,
    num_values: Tensor,
    center_weight: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    channels = (0,) if center_weight is None else center_weight.shape
    return _float32(a, *a.shape), _float32(a, *a.shape), _float32(a, *channels)


def _fake_input_gradient(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(dense(x))


_OPERATORS = (
    _Operator(instance_moments, '(Tensor x) -> (Tensor, Tensor)', _fake_instance_moments),
    _Operator(similarity_sums, '(Tensor x, Tensor a, Tensor v, int max_samples) -> Tensor', _fake_similarity_sums),
    _Operator(
        statistics_coefficients,
        '(Tensor a, Tensor v, Tensor running_mean, Tensor running_var, Tensor condensed, SymInt num_values, float eps,'
        ' float momentum, Tensor? center_weight, Tensor? scale_weight, Tensor? scale_bias, str? scaling)'
        ' -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
        _fake_statistics_coefficients,
    ),
    _Operator(
        gated_coefficients,
        '(Tensor x, Tensor a, Tensor v, int max_samples, Tensor running_similarity, float similarity_momentum,'
        ' float threshold, Tensor running_mean, Tensor running_var, SymInt num_values, float eps, float momentum,'
        ' Tensor? center_weight, Tensor? scale_weight, Tensor? scale_bias, str? scaling)'
        ' -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
        _fake_gated_coefficients,
    ),
    _Operator(
        own_part,
        '(Tensor x, Tensor a, Tensor v, int? max_samples, SymInt num_values, Tensor? center_weight) -> Tensor',
        _fake_own_part,
    ),
    _Operator(
        gathered_coefficients,
        '(Tensor gathered, Tensor a, Tensor? running_similarity, float similarity_momentum, float threshold,'
        ' Tensor? condensed, Tensor running_mean, Tensor running_var, float eps, float momentum,'
        ' Tensor? center_weight, Tensor? scale_weight, Tensor? scale_bias, str? scaling)'
        ' -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
        _fake_gathered_coefficients,
    ),
    _Operator(
        coefficients,
        '(Tensor a, Tensor mean, Tensor var, float eps, Tensor? center_weight, Tensor? scale_weight,'
        ' Tensor? scale_bias, str? scaling) -> (Tensor, Tensor)',
        _fake_coefficients,
    ),
    _Operator(
        apply,
        '(Tensor x, Tensor center, Tensor scale, Tensor weight, Tensor? neighbor_weight, Tensor bias) -> Tensor',
        _fake_apply,
    ),
    _Operator(
        tap_sums,
        '(Tensor x, Tensor dy, Tensor center, int kernel_size) -> (Tensor, Tensor)',
        _fake_tap_sums,
    ),
    _Operator(
        coefficients_backward,
        '(Tensor products, Tensor sums, Tensor a, Tensor mean, Tensor var, float eps, Tensor? condensed, Tensor scale,'
        ' Tensor weight, Tensor? neighbor_weight, Tensor? center_weight, Tensor? scale_weight,'
        ' Tensor? calibrated_bias, str? scaling, SymInt pixels)'
        ' -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
        _fake_coefficients_backward,
    ),
    _Operator(
        own_coefficients_backward,
        '(Tensor products, Tensor sums, Tensor a, Tensor mean, Tensor var, float eps, Tensor scale,'
        ' Tensor weight, Tensor? neighbor_weight, Tensor? center_weight, Tensor? scale_weight,'
        ' Tensor? calibrated_bias, str? scaling, SymInt pixels)'
        ' -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
        _fake_own_coefficients_backward,
    ),
    _Operator(
        statistics_backward,
        '(Tensor statistic_sums, Tensor a, Tensor mean, Tensor condensed, Tensor num_values, Tensor? center_weight,'
        ' Tensor own_offset, Tensor own_d_center_weight, SymInt pixels) -> (Tensor, Tensor, Tensor)',
        _fake_statistics_backward,
    ),
    _Operator(
        input_gradient,
        '(Tensor dy, Tensor x, Tensor? a, Tensor scale, Tensor weight, Tensor? neighbor_weight, Tensor? slope,'
        ' Tensor? offset) -> Tensor',
        _fake_input_gradient,
    ),
)

# The layout is flexible: Inductor hands tensors over as it has them, where it would else copy x to the strides of the
# trace for each operator. Not by torch.library.custom_op, which up to torch 2.7 takes no tags, and adds 25 microseconds
# of checks to each call.
_TAGS = tuple(getattr(torch.Tag, tag) for tag in ('pt2_compliant_tag', 'flexible_layout') if hasattr(torch.Tag, tag))

if hasattr(torch.library, 'register_fake'):  # torch 2.4
    for _operator in _OPERATORS:
        _name = f'mmubn::{_operator.function.__name__}'
        torch.library.define(_name, _operator.schema, tags=_TAGS)
        torch.library.impl(_name, 'default', _operator.function)
        torch.library.register_fake(_name, _operator.fake)
