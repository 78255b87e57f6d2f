"""What all norm types of this package share: the state, and the order of the steps."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import functional, ops
from mmubn.checkpoints import FACTORS, INITIAL_SCALE_BIAS, Target, convert_state
from mmubn.layers.arguments import is_int, is_number, require
from mmubn.layers.recomputation import Call, RecentCalls
from mmubn.layers.unfoldable_eps import UnfoldableEps
from mmubn.ops import Backend, Decision, Form, Gate, Moments, Parameters, Running, Statistics

__all__ = ['UnifiedNorm']


class UnifiedNorm(_BatchNorm):
    r"""The core of UBN, SyncUBN, RBN, BNET, IEBN and UnitizedBN, each of which is a choice of its arguments.

    .. math::
        y = \mathrm{conv}_k\left( r_{nc} \, \frac{x + w_m a - \mu}{\sqrt{\sigma^2 + \epsilon}} \right) + \beta

    where a is the mean of x over H and W, conv_k a depthwise k x k convolution with zero padding, r the factor that
    ``scaling`` names (:func:`mmubn.functional.coefficients`), and mu, sigma the batch's statistics in training, where
    no gate says otherwise, and the running ones in evaluation.

    A subclass calls this constructor and may override :meth:`_gate`, :meth:`_decide` or ``input_dims``. It names
    ``_BatchNorm`` among its bases once more: MMEngine's initialisers recognise a norm by its direct bases alone.

    Args:
        num_features: C, the number of channels.
        eps: Added to the variance.
        momentum: Momentum m of the running mean and variance, in [0, 1].
        centering: Whether to rectify centering (w_m).
        scaling: The factor r: ``'rectified'``, ``'instance'``, ``'unitized'`` or None for r = 1.
        kernel_size: k of the affine step, odd. 1 is BatchNorm's affine step.
        calibrate_bias: Multiply r onto beta too.
        gated: Whether the layer has a running similarity and a gate (UBN).

    Attributes:
        weight: Centre tap of the depthwise kernel, (C,): BatchNorm's gamma. Starts at 1.
        bias: beta, (C,). Starts at 0.
        neighbor_weight: The other taps, row by row without the centre, (C, k*k - 1), None for k = 1. Starts at 0.
        center_weight: w_m, (C,), None without centering. Starts at 0.
        scale_weight, scale_bias: w_v and w_b, each (C,), None where r has none. w_v starts at 0.
        running_mean, running_var, num_batches_tracked: As in BatchNorm.
    """

    input_dims: ClassVar[dict[int, str]] = {4: '(N, {}, H, W)'}

    # Never None here, as they are in a BatchNorm without running statistics or affine step.
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    running_similarity: Tensor  # of a layer with a gate

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        centering: bool = False,
        scaling: str | None = None,
        kernel_size: int = 1,
        calibrate_bias: bool = False,
        gated: bool = False,
    ) -> None:
        name = type(self).__name__
        require(is_int(num_features) and num_features > 0, name, 'num_features', num_features, 'a positive integer')
        require(is_number(eps, 0) and eps > 0, name, 'eps', eps, 'a positive number')
        require(is_number(momentum, 0, 1), name, 'momentum', momentum, 'a number in [0, 1]')
        factors = ', '.join(map(repr, FACTORS))
        require(scaling is None or scaling in FACTORS, name, 'scaling', scaling, f'one of {factors}, or None')
        is_odd = is_int(kernel_size) and kernel_size > 0 and kernel_size % 2 == 1
        require(is_odd, name, 'kernel_size', kernel_size, 'a positive odd integer')
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.centering = centering
        self.scaling = scaling
        self.kernel_size = kernel_size
        self.calibrate_bias = calibrate_bias

        def vector(present: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(num_features, *shape)) if present else None

        self.neighbor_weight = vector(kernel_size > 1, kernel_size**2 - 1)
        self.center_weight = vector(centering)
        self.scale_weight = vector(scaling is not None)
        self.scale_bias = vector(scaling in INITIAL_SCALE_BIAS)
        if gated:
            self.register_buffer('running_similarity', torch.ones((), dtype=torch.float32))
        self._calls = RecentCalls()
        self._reset_rectifications()

    @property
    def eps(self) -> float:
        """Added to the variance. Others may read and set it; adding it to a tensor folds the layer away: an error."""
        return UnfoldableEps(self._eps, type(self).__name__)

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = float(value)

    def reset_parameters(self) -> None:
        """Set every parameter and buffer to its initial value."""
        super().reset_parameters()
        # The base class calls this from its constructor, before the rectifications exist.
        if '_calls' in self.__dict__:
            self._reset_rectifications()

    def _reset_rectifications(self) -> None:
        with torch.no_grad():
            if 'running_similarity' in self._buffers:
                self.running_similarity.fill_(1)
            for name, value in self.initial_rectifications().items():
                getattr(self, name).copy_(value)

    def initial_rectifications(self) -> dict[str, Tensor]:
        """Initial values of the parameters that BatchNorm lacks: the layer is then a constant times BatchNorm."""
        initial = {'neighbor_weight': 0.0, 'center_weight': 0.0, 'scale_weight': 0.0}
        if self.scaling in INITIAL_SCALE_BIAS:
            initial['scale_bias'] = INITIAL_SCALE_BIAS[self.scaling]
        return {
            name: torch.full_like(parameter, initial[name], requires_grad=False)
            for name, parameter in self.named_parameters(recurse=False)
            if name in initial
        }

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy) and (path := _path_in_trace(self, x)):
            # One node of a traced graph, as the norms of torch.nn are: it follows the mode of the layer, which a trace
            # through this method would freeze.
            return x.tracer.create_proxy('call_module', path, (x,), {})
        self._check_input(x)
        shape = x.shape
        if x.numel() == 0:
            # Nothing to normalise, but DistributedDataParallel expects every parameter in the graph.
            x = x.reshape(0, self.num_features, 1, 1)
        elif x.dim() == 2:
            x = x[..., None, None]
        # Autocast would run the convolution in half precision; the mixed precision here is float32 inside.
        with functional.without_autocast(x.device.type):
            y = self._normalize(x)
        return y if y.shape == shape else y.reshape(shape)

    def _normalize(self, x: Tensor) -> Tensor:
        """The steps: moments -> similarity -> gate -> statistics, without gradients, then coefficients -> apply."""
        backend = ops.choose_backend(x, self.kernel_size)
        # A trace by torch.jit is checked against a second one without gradients: both must have the same operators.
        is_traced = torch.jit.is_tracing()
        is_differentiated = torch.is_grad_enabled() and not is_traced
        form = Form(self._eps, self.scaling, self.calibrate_bias, self.kernel_size)
        parameters = Parameters(
            self.weight, self.bias, self.neighbor_weight, self.center_weight, self.scale_weight, self.scale_bias
        )
        if not is_traced:
            self._check_shapes(parameters)
        with torch.no_grad():
            if self.training and (x.numel() > 0 or self._synchronizes()):
                statistics = self._training_statistics(x, backend, form, parameters)
            else:
                statistics = self._running_statistics(x, backend, with_copies=is_differentiated)
        return ops.rectified_norm(backend, x, statistics, form, parameters)

    def _running_statistics(self, x: Tensor, backend: Backend, with_copies: bool) -> Statistics:
        """The running statistics, and the moments of x that the coefficients depend on."""
        a = v = None
        dtype = functional.statistics_dtype(x)
        if self.scaling == 'unitized' or x.numel() == 0:
            a, v = self._moments(x, backend)
        elif self.centering or self.scaling is not None:
            a = backend.instance_means(x)
        # Copies: an update of the buffers by a later call must not change what this call's backward reads.
        mean, var = (buffer.to(dtype, copy=with_copies) for buffer in (self.running_mean, self.running_var))
        return Statistics(a, v, mean, var)

    def _moments(self, x: Tensor, backend: Backend) -> Moments:
        """The instance moments; of no samples, none: backends take an input with elements."""
        if x.numel() > 0:
            return backend.instance_moments(x)
        a, v = x.new_empty((2, 0, self.num_features), dtype=functional.statistics_dtype(x)).unbind(0)
        return Moments(a, v)

    def _training_statistics(self, x: Tensor, backend: Backend, form: Form, parameters: Parameters) -> Statistics:
        """The statistics that normalise a training batch. Moves the buffers in place and never waits for the device."""
        moments = self._moments(x, backend)
        call, coefficients = self._calls.recomputed(moments.a), None
        if call is None:
            decision = self._decide(x, moments, backend, form, parameters)
            self._move(decision)
            call = Call(moments.a, decision.mean, decision.var, decision.condensed, decision.num_values)
            coefficients = decision.coefficients
            self._calls.record(call)
        a, v = moments
        return Statistics(
            a, v, call.mean, call.var, call.condensed, call.num_values, self._synchronizes(), coefficients
        )

    def _decide(self, x: Tensor, moments: Moments, backend: Backend, form: Form, parameters: Parameters) -> Decision:
        """What the gate and the statistics of a training batch come to."""
        gate = self._gate(x, moments)
        return backend.decide(x, moments, gate, form, parameters, self._running(gate))

    def _gate(self, x: Tensor, moments: Moments) -> Gate | Tensor:
        """Whether the features are condensed, so that the batch's own statistics are used.

        A 0-d bool, or the :class:`~mmubn.ops.Gate` that decides by the similarity of the batch.
        """
        return torch.ones((), dtype=torch.bool, device=x.device)

    def _running(self, gate: Gate | Tensor) -> Running:
        """The running statistics. As in BatchNorm, momentum None is the plain average over all batches tracked."""
        momentum: float | Tensor | None = self.momentum
        if momentum is None:
            assert isinstance(gate, Tensor), 'a similarity decides only where momentum is a number'
            momentum = 1 / (self.num_batches_tracked + gate).to(self.running_var.dtype)
        return Running(self.running_mean, self.running_var, momentum)

    def _move(self, decision: Decision) -> None:
        """Write the new buffers, in place: DDP, EMA and CUDA graphs hold references to them."""
        self.num_batches_tracked.add_(decision.condensed)
        buffers = [self.running_mean, self.running_var]
        values = [decision.running_mean, decision.running_var]
        if decision.running_similarity is not None:
            # By a view of shape (1,): torch.compile (2.12) loses an in-place update of a 0-d float64 buffer.
            buffers.append(self.running_similarity.view(1))
            values.append(decision.running_similarity.view(1))
        torch._foreach_copy_(buffers, values)

    def _synchronizes(self) -> bool:
        """Whether the batch is that of several processes."""
        return False

    def _check_shapes(self, parameters: Parameters) -> None:
        """Raise a ValueError for a tensor that was replaced by one of another length; kernels would read beyond it."""
        vector = (self.num_features,)
        taps = (self.num_features, self.kernel_size**2 - 1) if self.kernel_size > 1 else None
        center = vector if self.centering else None
        scale = vector if self.scaling is not None else None
        scale_bias = vector if self.scaling in INITIAL_SCALE_BIAS else None
        mean, var = self._buffers.get('running_mean'), self._buffers.get('running_var')
        # One expression, since a loop over names takes the host longer than some kernels take the device.
        if (
            _has_shape(parameters.weight, vector)
            and _has_shape(parameters.bias, vector)
            and _has_shape(parameters.neighbor_weight, taps)
            and _has_shape(parameters.center_weight, center)
            and _has_shape(parameters.scale_weight, scale)
            and _has_shape(parameters.scale_bias, scale_bias)
            and _has_shape(mean, vector)
            and _has_shape(var, vector)
        ):
            return
        expected = {
            'weight': vector,
            'bias': vector,
            'neighbor_weight': taps,
            'center_weight': center,
            'scale_weight': scale,
            'scale_bias': scale_bias,
            'running_mean': vector,
            'running_var': vector,
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if not _has_shape(tensor, shape):
                received = None if tensor is None else tuple(tensor.shape)
                raise ValueError(
                    f'{type(self).__name__}: {name} must have shape {shape}, got {received}; '
                    f'this layer has num_features={self.num_features} and kernel_size={self.kernel_size}.'
                )

    def _check_input(self, x: Tensor) -> None:
        name, channels = type(self).__name__, self.num_features
        if x.dim() not in self.input_dims or x.shape[1] != channels:
            expected = ' or '.join(shape.format(channels) for shape in self.input_dims.values())
            raise ValueError(
                f'{name} expected input of shape {expected}, got {tuple(x.shape)}; '
                'num_features must be the number of channels of the layer before.'
            )
        if not x.is_floating_point():
            raise ValueError(f'{name} expected a floating point input, got {x.dtype}; convert it with .float().')
        if self.training and x.numel() == channels and not self._synchronizes():
            raise ValueError(
                f'{name} needs more than 1 value per channel in training, got input of shape {tuple(x.shape)}; '
                'use a larger batch or call eval() on the layer.'
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        tensors = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        name = type(self).__name__
        target = Target(f'this {name}', own.keys(), self.scaling, self.kernel_size, self.calibrate_bias)
        convert_state(name, own, target, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        arguments = inspect.signature(type(self).__init__).parameters
        named = (f'{name}={getattr(self, name)}' for name in arguments if name not in ('self', 'num_features'))
        return ', '.join((str(self.num_features), *named))


def _path_in_trace(layer: nn.Module, x: torch.fx.Proxy) -> str:
    """Name of a layer in the module that torch.fx traces; empty for the traced module itself, which can be no node."""
    return x.tracer.path_of_module(layer) if isinstance(x.tracer, torch.fx.Tracer) else ''


def _has_shape(tensor: Tensor | None, shape: tuple[int, ...] | None) -> bool:
    """Whether the tensor has this shape; of None, whether there is no tensor."""
    return tensor is None if shape is None else tensor is not None and tensor.shape == shape
