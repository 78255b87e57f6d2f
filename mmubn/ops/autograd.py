"""The layer's map with its gradient written by hand: saves x and O(N C) numbers, nothing else of the size of x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmubn import functional
from mmubn.ops.backend import Backend
from mmubn.ops.processes import SECOND_DERIVATIVE, all_reduce
from mmubn.ops.reference import ReferenceBackend, reference_norm
from mmubn.ops.types import Coefficients, Form, Gradients, Parameters, Statistics, Taps

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    'RectifiedNorm',
    'Saved',
    'backward',
    'differentiable_backward',
    'forward',
    'is_batched',
    'rectified_norm',
]


class Batch(NamedTuple):
    """What the statistics say besides the tensors that autograd must see."""

    num_values: int | Tensor
    processes: ProcessGroup | None
    coefficients: Coefficients | None = None


class Saved(NamedTuple):
    """What the backward reads."""

    x: Tensor
    parameters: Parameters
    statistics: Statistics
    coefficients: Coefficients
    kernel: Tensor | None  # of the taps; None where the parameters are read in its place


def rectified_norm(backend: Backend, x: Tensor, statistics: Statistics, form: Form, parameters: Parameters) -> Tensor:
    """The output of a layer from the statistics that normalise x: coefficients -> apply, by ``backend``.

    Args:
        backend: Which computes.
        x: Input, (N, C, H, W).
        statistics: What normalises x.
        form: Of the layer.
        parameters: Of the layer.

    Returns:
        (N, C, H, W), in the dtype of x, with gradients of x and of the parameters.
    """
    if isinstance(backend, ReferenceBackend):
        return reference_norm(x, statistics, form, parameters)
    if not torch.is_grad_enabled():
        return forward(backend, x, statistics, form, parameters)[0]
    s = statistics
    batch = Batch(s.num_values, s.processes, s.coefficients)
    return RectifiedNorm.apply(backend, form, batch, x, *parameters, s.a, s.v, s.mean, s.var, s.condensed)


class RectifiedNorm(torch.autograd.Function):
    """What :func:`rectified_norm` applies. A second derivative is that of the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        form: Form,
        batch: Batch,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        neighbor_weight: Tensor | None,
        center_weight: Tensor | None,
        scale_weight: Tensor | None,
        scale_bias: Tensor | None,
        a: Tensor | None,
        v: Tensor | None,
        mean: Tensor,
        var: Tensor,
        condensed: Tensor | None,
    ) -> Tensor:
        parameters = Parameters(weight, bias, neighbor_weight, center_weight, scale_weight, scale_bias)
        statistics = Statistics(a, v, mean, var, condensed, batch.num_values, batch.processes, batch.coefficients)
        y, coefficients, kernel = forward(backend, x, statistics, form, parameters)
        ctx.backend, ctx.form = backend, form
        ctx.num_values, ctx.processes = batch.num_values, batch.processes
        ctx.save_for_backward(*pack(Saved(x, parameters, statistics, coefficients, kernel)))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = unpack(ctx.saved_tensors, ctx.num_values, ctx.processes)
        with functional.without_autocast(dy.device.type):
            # By plain operators, too, where gradients are batched.
            if torch.is_grad_enabled() or is_batched(dy):
                dx, gradients = differentiable_backward(dy, saved, ctx.form)
            else:
                _, _, _, wants_dx, *_ = ctx.needs_input_grad
                dx, gradients = backward(ctx.backend, dy, saved, ctx.form, wants_dx)
        # In the order of forward's arguments; none for what is no tensor, and for the statistics.
        return None, None, None, dx, *gradients, None, None, None, None, None


def pack(saved: Saved) -> tuple[Tensor | None, ...]:
    """``saved`` as the flat tuple that ``save_for_backward`` takes."""
    s = saved.statistics
    return (saved.x, *saved.parameters, s.a, s.v, s.mean, s.var, s.condensed, *saved.coefficients, saved.kernel)


def unpack(tensors: tuple[Any, ...], num_values: int | Tensor, processes: ProcessGroup | None) -> Saved:
    """What :func:`pack` packed."""
    x, weight, bias, neighbor_weight, center_weight, scale_weight, scale_bias, *others = tensors
    a, v, mean, var, condensed, center, scale, factor, kernel = others
    return Saved(
        x,
        Parameters(weight, bias, neighbor_weight, center_weight, scale_weight, scale_bias),
        Statistics(a, v, mean, var, condensed, num_values, processes),
        Coefficients(center, scale, factor),
        kernel,
    )


def forward(
    backend: Backend, x: Tensor, statistics: Statistics, form: Form, parameters: Parameters
) -> tuple[Tensor, Coefficients, Tensor | None]:
    """The output, and what the backward needs of the way to it."""
    parameters = parameters.by_channel()
    if x.numel() == 0:
        empty = statistics.mean.new_empty((0, len(parameters.weight)))
        return torch.empty_like(x), Coefficients(empty, empty, empty if form.scaling else None), None
    coefficients = backend.coefficients(statistics, form, parameters, x.shape[2] * x.shape[3])
    bias = parameters.bias
    if form.calibrate_bias:
        assert coefficients.factor is not None, 'a backend returns the factor where it multiplies the bias'
        bias = coefficients.factor * bias
    taps = backend.taps(parameters, statistics.mean.dtype)
    y = backend.apply(x, coefficients, taps, bias).to(x.dtype)
    return y, coefficients, taps.kernel


def backward(backend: Backend, dy: Tensor, saved: Saved, form: Form, wants_dx: bool) -> tuple[Tensor | None, Gradients]:
    """The gradient of x, if it is wanted, and those of the parameters."""
    x, own_parameters, statistics, coefficients, kernel = saved
    if x.numel() == 0:
        if statistics.processes is not None:
            # The others wait for what this process adds to their sums: nothing.
            all_reduce(statistics.mean.new_zeros(2, len(statistics.mean)), statistics.processes)
        zeros: list[Any] = [None if tensor is None else torch.zeros_like(tensor) for tensor in own_parameters]
        return torch.zeros_like(x), Gradients(*zeros)
    parameters = own_parameters.by_channel()
    pixels = x.shape[2] * x.shape[3]
    taps = Taps(parameters.weight, parameters.neighbor_weight, kernel)
    dy = backend.dense(dy, like=x)
    tap_sums = backend.tap_sums(dy, x, coefficients.center, form.kernel_size)
    of_input, gradients = backend.coefficients_backward(
        tap_sums, statistics, form, parameters, taps, coefficients, pixels
    )
    gradients = _in_shape(gradients, own_parameters)
    if not wants_dx:
        return None, gradients
    dx = backend.input_gradient(dy, x, tap_sums, statistics.a, coefficients, taps, of_input)
    return dx.to(x.dtype), gradients


def is_batched(dy: Tensor) -> bool:
    """Whether a vmap is over the backward: that of torch.func, or the older one of ``is_grads_batched``."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(dy)


def _in_shape(gradients: Gradients, parameters: Parameters) -> Gradients:
    """Gradients in the shapes of the parameters."""
    if gradients.neighbor_weight is None or parameters.neighbor_weight is None:
        return gradients
    return gradients._replace(neighbor_weight=gradients.neighbor_weight.reshape(parameters.neighbor_weight.shape))


def differentiable_backward(dy: Tensor, saved: Saved, form: Form) -> tuple[Tensor | None, Gradients]:
    """The gradients with a graph of their own, for a second derivative: those of the reference."""
    if saved.statistics.processes is not None:
        raise NotImplementedError(SECOND_DERIVATIVE)
    inputs = [saved.x, *saved.parameters]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = reference_norm(saved.x, saved.statistics, form, saved.parameters)
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    dx, *gradients = (next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs)
    return dx, Gradients(*gradients)
