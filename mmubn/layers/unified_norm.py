"""What all norm types of this package share: the state, and the order of the steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import functional, ops
from mmubn.checkpoints import FACTORS, INITIAL_SCALE_BIAS
from mmubn.layers import areas
from mmubn.layers.arguments import is_int, is_number, require
from mmubn.layers.loading import convert_entries, read_overlay
from mmubn.layers.recomputation import Call, RecordedCalls, is_recomputation
from mmubn.layers.tracing import node_in_trace
from mmubn.layers.unfoldable_eps import UnfoldableEps
from mmubn.ops import Backend, Buffers, Decision, Form, Gate, Moments, Parameters, Running, Statistics
from mmubn.ops.torch_backend import memory_format

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ['UnifiedNorm']


class UnifiedNorm(nn.BatchNorm2d):
    r"""The core of UBN, SyncUBN, RBN, BNET, IEBN and UnitizedBN, each of which is a choice of its arguments.

    .. math::
        y = \mathrm{conv}_k\left( r_{nc} \, \frac{x + w_m a - \mu}{\sqrt{\sigma^2 + \epsilon}} \right) + \beta

    where a is the mean of x over H and W, conv_k a depthwise k x k convolution with zero padding, r the factor that
    ``scaling`` names (:func:`mmubn.functional.coefficients`), and mu, sigma the batch's statistics in training, where
    no gate says otherwise, and the running ones in evaluation.

    A subclass calls this constructor and may override :meth:`_gate`, :meth:`_decide` or ``input_dims``. It is a
    BatchNorm2d by its direct bases too (:meth:`__init_subclass__`).

    **As a BatchNorm2d.** A training forward moves nothing while ``track_running_stats`` is False or ``momentum`` is 0;
    a gate then decides by the running similarity as it is. Without running statistics (``track_running_stats=False``
    in the constructor, or buffers set to None) the batch's normalise, in evaluation too, and no gate acts.

    Args:
        num_features: C, the number of channels.
        eps: Added to the variance.
        momentum: Momentum m of the running mean and variance, in [0, 1]; None for their plain average over all batches,
            which no gate holds up.
        affine: True; there is no such layer without parameters.
        track_running_stats: Whether there are running statistics.
        device, dtype: Of the parameters and buffers.
        centering: Whether to rectify centering (w_m).
        scaling: The factor r: ``'rectified'``, ``'instance'``, ``'unitized'`` or None for r = 1.
        kernel_size: k of the affine step, odd. 1 is BatchNorm's affine step.
        calibrate_bias: Multiply r onto beta too.
        gated: Whether the layer has a running similarity and a gate (UBN).

    Attributes:
        weight: Centre tap of the depthwise kernel, (C,): BatchNorm's gamma. Starts at 1.
        bias: beta, (C,). Starts at 0.
        neighbor_weight: The other taps of each channel in turn, row by row without the centre, (C * (k*k - 1),), None
            for k = 1. Starts at 0. One-dimensional, so that optimizers and initialisers that go by the number of
            dimensions take it for a parameter of a norm.
        center_weight: w_m, (C,), None without centering. Starts at 0.
        scale_weight, scale_bias: w_v and w_b, each (C,), None where r has none. w_v starts at 0.
        running_mean, running_var, num_batches_tracked: As in BatchNorm.
        drop, act: What follows the norm in the same layer, in networks of timm alone (mmubn.openmmlab.timm_norms).
    """

    _version = 3  # 2: neighbor_weight was (C, k*k - 1)

    input_dims: ClassVar[dict[int, str]] = {4: '(N, {}, H, W)'}

    was_converted = False  # whether it was read from the state dict of another norm

    weight: nn.Parameter
    bias: nn.Parameter
    running_similarity: Tensor | None  # of a layer with a gate and running statistics

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name BatchNorm2d and ``_BatchNorm`` among the direct bases: MMEngine's initialisers look at no others."""
        super().__init_subclass__(**kwargs)
        bases = cls.__bases__
        last = max(i for i, base in enumerate(bases) if issubclass(base, UnifiedNorm)) + 1
        norms = tuple(base for base in (nn.BatchNorm2d, _BatchNorm) if base not in bases)
        cls.__bases__ = (*bases[:last], *norms, *bases[last:])

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        is_momentum = momentum is None or is_number(momentum, 0, 1)
        require(is_momentum, name, 'momentum', momentum, 'a number in [0, 1], or None')
        require(
            affine is True, name, 'affine', affine, 'True; use nn.BatchNorm2d where a norm is to have no parameters'
        )
        require(
            isinstance(track_running_stats, bool), name, 'track_running_stats', track_running_stats, 'True or False'
        )
        factors = ', '.join(map(repr, FACTORS))
        require(scaling is None or scaling in FACTORS, name, 'scaling', scaling, f'one of {factors}, or None')
        is_odd = is_int(kernel_size) and kernel_size > 0 and kernel_size % 2 == 1
        require(is_odd, name, 'kernel_size', kernel_size, 'a positive odd integer')
        super().__init__(num_features, eps, momentum, True, track_running_stats, device=device, dtype=dtype)
        self.centering = centering
        self.scaling = scaling
        self.kernel_size = kernel_size
        self.calibrate_bias = calibrate_bias

        def vector(present: bool, per_channel: int = 1) -> nn.Parameter | None:
            if not present:
                return None
            return nn.Parameter(torch.empty(num_features * per_channel, device=device, dtype=dtype))

        self.neighbor_weight = vector(kernel_size > 1, kernel_size**2 - 1)
        self.center_weight = vector(centering)
        self.scale_weight = vector(scaling is not None)
        self.scale_bias = vector(scaling in INITIAL_SCALE_BIAS)
        if gated:
            tau = torch.ones((), device=device, dtype=dtype or torch.float32)
            self.register_buffer('running_similarity', tau if track_running_stats else None)
        self._calls = RecordedCalls()
        self._reset_rectifications()

    @property
    def eps(self) -> float:
        """Added to the variance. Others may read and set it; adding it to a tensor folds the layer away: an error."""
        return UnfoldableEps(self._eps, self)

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = float(value)

    def reset_parameters(self) -> None:
        """Set every parameter and buffer to its initial value."""
        super().reset_parameters()
        # The base class calls this from its constructor, before the rectifications exist.
        if '_calls' in self.__dict__:
            self._reset_rectifications()

    def reset_running_stats(self) -> None:
        """Set the running statistics to their initial values. Where there is a gate, it opens."""
        super().reset_running_stats()
        if (tau := self._buffers.get('running_similarity')) is not None:
            tau.fill_(1)

    def _reset_rectifications(self) -> None:
        with torch.no_grad():
            if (tau := self._buffers.get('running_similarity')) is not None:
                tau.fill_(1)
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

    def forward(self, input: Tensor) -> Tensor:
        x = input  # the name by which a BatchNorm2d may be called
        if (node := node_in_trace(self, x)) is not None:
            return node
        self._check_input(x)
        shape = x.shape
        if x.numel() == 0:
            # Nothing to normalise, but DistributedDataParallel expects every parameter in the graph.
            x = x.reshape(0, self.num_features, 1, 1)
        elif x.dim() == 2:
            x = x[..., None, None]
        y = areas.outside_graphs(self._normalize_images, x) if areas.is_used() else None
        if y is None:
            y = self._normalize(x)
        return self.drop_and_act(y if y.shape == shape else y.reshape(shape))

    def drop_and_act(self, y: Tensor) -> Tensor:
        """What follows the norm in the same layer, in networks of timm: its children ``drop`` and ``act``."""
        for name in ('drop', 'act'):
            if (part := self._modules.get(name)) is not None:
                y = part(y)
        return y

    def _normalize(self, x: Tensor) -> Tensor:
        """The steps: moments -> similarity -> gate -> statistics, without gradients, then coefficients -> apply."""
        backend = ops.choose_backend(x, self.kernel_size)
        # A trace by torch.jit is checked against a second one without gradients: both must have the same operators.
        is_traced = torch.jit.is_tracing()
        is_differentiated = torch.is_grad_enabled() and not is_traced
        form = Form(self._eps, self.scaling, self.calibrate_bias, self.kernel_size)
        parameters = self._own_parameters()
        if not is_traced:
            self._check_shapes(parameters)
        x = backend.dense(x)
        if backend.replays and (y := self._replay(x, backend, form, parameters)) is not None:
            return y
        # Autocast would run the convolution in half precision; the mixed precision here is float32 inside.
        with functional.without_autocast(x.device.type):
            with torch.no_grad():
                # Statistics have no gradient of any kind: no_grad is for the backward alone.
                transformed = ops.is_transformed()
                data, fixed = (x.detach(), parameters.detach()) if transformed else (x, parameters)
                if self._uses_batch() and (x.numel() > 0 or self._processes() is not None):
                    statistics = self._batch_statistics(data, backend, form, fixed)
                else:
                    statistics = self._running_statistics(data, backend, form, fixed, is_differentiated)
            return ops.rectified_norm(backend, x, statistics, form, parameters)

    def _normalize_images(self, x: Tensor) -> Tensor | None:
        """In evaluation, each image of a padded batch by itself, and zeros beside it; None where there is no padding.

        Raises:
            RuntimeError: In a trace, and in a forward that may run again, when the areas are no longer known.
            ValueError: As :meth:`~mmubn.layers.areas.ImageAreas.in_map`.
        """
        images = areas.current()
        if images is None or self._uses_batch() or not self.has_pooled_terms:
            return None
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            raise RuntimeError('a graph would hold the image sizes of this batch: trace or export without image areas.')
        if x.numel() == 0 or (sizes := images.in_map(x)) is None:
            return None
        if self._calls.may_run_again():
            raise RuntimeError(
                'image areas are not known any more when activation checkpointing runs a forward again: switch it off '
                '(with_cp=False), or evaluate without gradients.'
            )
        y, layout = torch.zeros_like(x), memory_format(x)
        for n, (h, w) in enumerate(sizes):
            y[n : n + 1, :, :h, :w] = self._normalize(x[n : n + 1, :, :h, :w].contiguous(memory_format=layout))
        return y

    def _own(self, name: str) -> Any:
        """A parameter or a buffer. From its dict, since an attribute of a module takes the host ten times as long."""
        for tensors in (self._parameters, self._buffers):
            if name in tensors:
                return tensors[name]
        return getattr(self, name, None)  # a parametrized one, or none at all

    def _own_parameters(self) -> Parameters:
        return Parameters(*map(self._own, Parameters._fields))

    def _replay(self, x: Tensor, backend: Backend, form: Form, parameters: Parameters) -> Tensor | None:
        """The output by launches like those of an earlier step; None where there is more to do than to launch."""
        if torch.compiler.is_compiling() or x.numel() == 0 or self._calls.may_run_again():
            return None
        gate, moves = None, False
        if not self._uses_batch():
            running = Running(*self._running_mean_and_var(x), 0.0)
        elif self._takes_own_steps() and self._processes() is None:
            gate = self._own_gate(x)
            running, moves = self._running(x, gate), self._moves()
        else:
            return None
        count = self._own('num_batches_tracked')
        return ops.replayed_norm(backend, form, ops.Forward(x, parameters, gate, running, moves, count))

    def _takes_own_steps(self) -> bool:
        """Whether nothing replaces a step of this class: a subclass, or a method of the layer itself."""
        gate, decide = (getattr(method, '__func__', None) for method in (self._gate, self._decide))
        return gate is UnifiedNorm._gate and decide is UnifiedNorm._decide

    def _has_running_statistics(self) -> bool:
        return self._own('running_mean') is not None or self._own('running_var') is not None

    @property
    def has_pooled_terms(self) -> bool:
        """Whether the output depends on means of each map: there is centering or a factor."""
        return self.centering or self.scaling is not None

    def _uses_batch(self) -> bool:
        """Whether the batch's statistics may normalise: in training, and where there are no others, as in BatchNorm."""
        return self.training or not self._has_running_statistics()

    def _moves(self) -> bool:
        """Whether a training forward moves the buffers."""
        return self.training and self.track_running_stats and self.momentum != 0 and self._has_running_statistics()

    def _running_statistics(
        self, x: Tensor, backend: Backend, form: Form, parameters: Parameters, with_copies: bool
    ) -> Statistics:
        """The running statistics, and the moments of x that the coefficients depend on."""
        mean, var = self._running_mean_and_var(x)
        if x.numel() == 0:
            dtype = functional.statistics_dtype(x)
            return Statistics(*self._moments(x, backend), mean.to(dtype), var.to(dtype))
        return backend.running_statistics(x, form, parameters, Running(mean, var, 0.0), with_copies)

    def _running_mean_and_var(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, or, where there are none, their initial values."""
        running_mean, running_var = self._own('running_mean'), self._own('running_var')
        if running_mean is not None and running_var is not None:
            return running_mean, running_var
        mean = x.new_zeros(self.num_features, dtype=functional.statistics_dtype(x))
        return mean, torch.ones_like(mean)

    def _moments(self, x: Tensor, backend: Backend) -> Moments:
        """The instance moments; of no samples, none: backends take an input with elements."""
        if x.numel() > 0:
            return backend.instance_moments(x)
        a, v = x.new_empty((2, 0, self.num_features), dtype=functional.statistics_dtype(x)).unbind(0)
        return Moments(a, v)

    def _batch_statistics(self, x: Tensor, backend: Backend, form: Form, parameters: Parameters) -> Statistics:
        """The statistics that normalise a training batch. Moves the buffers in place and never waits for the device."""
        moments = self._moments(x, backend)
        call, coefficients = self._calls.repeated(*moments), None
        if call is None:
            decision = self._decide(x, moments, backend, form, parameters)
            if self._moves():
                self._move(decision, backend, self._moves_in_compiled_graph(moments))
            call = Call(*moments, decision.mean, decision.var, decision.condensed, decision.num_values)
            coefficients = decision.coefficients
            self._calls.record(call)
        a, v = moments
        return Statistics(a, v, call.mean, call.var, call.condensed, call.num_values, self._processes(), coefficients)

    def _decide(self, x: Tensor, moments: Moments, backend: Backend, form: Form, parameters: Parameters) -> Decision:
        """What the gate and the statistics of a training batch come to."""
        gate, running = self._gate_and_running(x, moments)
        return backend.decide(x, moments, gate, form, parameters, running, self._processes())

    def _gate_and_running(self, x: Tensor, moments: Moments) -> tuple[Gate | Tensor, Running]:
        gate = self._gate(x, moments)
        running = self._running(x, gate)
        if (moves := self._moves_in_compiled_graph(moments)) is not None:
            # A momentum of 0 where the graph runs again: see RecordedCalls.
            running = running._replace(momentum=running.momentum * moves.to(running.var.dtype))
            if isinstance(gate, Gate):
                gate = gate._replace(momentum=gate.momentum * moves.to(gate.running_similarity.dtype))
        return gate, running

    def _moves_in_compiled_graph(self, moments: Moments) -> Tensor | None:
        """Whether a compiled graph moves the buffers, 0-d bool, not so where it repeats a forward; None elsewhere."""
        if not torch.compiler.is_compiling() or ops.is_exporting() or not self._moves():
            return None
        return ~is_recomputation(moments.a)

    def _gate(self, x: Tensor, moments: Moments) -> Gate | Tensor:
        """Whether the features are condensed, so that the batch's own statistics are used.

        A 0-d bool, or the :class:`~mmubn.ops.Gate` that decides by the similarity of the batch.
        """
        return self._own_gate(x)

    def _own_gate(self, x: Tensor) -> Gate | Tensor:
        """:meth:`_gate` of the types here, none of which looks at the moments."""
        return torch.ones((), dtype=torch.bool, device=x.device)

    def _running(self, x: Tensor, gate: Gate | Tensor) -> Running:
        """The running statistics. As in BatchNorm, momentum None is the plain average over all batches tracked."""
        momentum: float | Tensor | None = self.momentum
        mean, var = self._running_mean_and_var(x)
        if momentum is None:
            assert isinstance(gate, Tensor), 'a similarity decides only where momentum is a number'
            count = self.num_batches_tracked
            momentum = 0.0 if count is None else 1 / (count + gate).to(var.dtype)
        return Running(mean, var, momentum)

    def _move(self, decision: Decision, backend: Backend, moves: Tensor | None) -> None:
        """Write the new buffers, in place: DDP, EMA and CUDA graphs hold references to them."""
        moved = Buffers(*map(self._own, ('running_mean', 'running_var', 'running_similarity', 'num_batches_tracked')))
        if moves is not None:
            decision = decision._replace(condensed=decision.condensed & moves)
        if ops.is_transformed():
            self._move_in_transform(decision, moved)
        else:
            backend.move(decision, moved)

    def _move_in_transform(self, decision: Decision, moved: Buffers) -> None:
        """One by one: torch.func has no rule for the other. What it refuses to a BatchNorm it refuses here."""
        values = decision.running_mean, decision.running_var, decision.running_similarity
        try:
            for buffer, value in zip(moved, values, strict=False):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
            if moved.num_batches is not None:
                moved.num_batches.add_(decision.condensed)
        except RuntimeError as error:
            raise RuntimeError(
                f'{type(self).__name__} in training moves its running statistics in place, which a transform of '
                'torch.func allows for buffers that it was given alone, as with nn.BatchNorm2d: call eval(), give the '
                'buffers to torch.func.functional_call, or use torch.func.replace_all_batch_norm_modules_(model), '
                'after which there are none.'
            ) from error

    def _processes(self) -> ProcessGroup | None:
        """The processes whose inputs are one batch; None where the input of this one is."""
        return None

    def _check_shapes(self, parameters: Parameters) -> None:
        """Raise a ValueError for a tensor that was replaced by one of another length; kernels would read beyond it."""
        vector = (self.num_features,)
        scale = None if self.scaling is None else vector
        running = vector if self._has_running_statistics() else None
        expected = (
            vector,
            vector,
            (self.num_features * (self.kernel_size**2 - 1),) if self.kernel_size > 1 else None,
            vector if self.centering else None,
            scale,
            scale if self.scaling in INITIAL_SCALE_BIAS else None,
            running,
            running,
        )
        tensors = (*parameters, self._own('running_mean'), self._own('running_var'))
        received = tuple([None if tensor is None else tensor.shape for tensor in tensors])
        if received == expected:
            return
        names = (*Parameters._fields, 'running_mean', 'running_var')
        name, found, shape = next(each for each in zip(names, received, expected, strict=True) if each[1] != each[2])
        raise ValueError(
            f'{type(self).__name__}: {name} must have shape {shape}, got {None if found is None else tuple(found)}; '
            f'this layer has num_features={self.num_features} and kernel_size={self.kernel_size}: choose channels with '
            'layer.select_channels(index), which takes all its tensors along.'
        )

    def _check_input(self, x: Tensor) -> None:
        name, channels = type(self).__name__, self.num_features
        if not isinstance(x, (Tensor, torch.fx.Proxy)):
            raise ValueError(
                f'{name} expected a tensor of shape {self._expected_shape()}, got a {type(x).__name__}; '
                'convert an array with torch.as_tensor, and hand the maps of a list over one by one.'
            )
        if x.dim() not in self.input_dims or x.shape[1] != channels:
            raise ValueError(
                f'{name} expected input of shape {self._expected_shape()}, got {tuple(x.shape)}; '
                'num_features must be the number of channels of the layer before.'
            )
        if not x.is_floating_point():
            advice = 'convert it with .float()'
            if x.is_quantized:
                advice = (
                    'fold first and quantize the graph, which leaves this layer in float: '
                    'torch.ao.quantization.quantize_fx.prepare_fx(mmubn.fold(model.eval()), ...)'
                )
            raise ValueError(f'{name} expected a floating point input, got {x.dtype}; {advice}.')
        if x.numel() == channels and self._uses_batch() and self._processes() is None:
            raise ValueError(
                f'{name} needs more than 1 value per channel in training, got input of shape {tuple(x.shape)}; '
                'use a larger batch or call eval() on the layer.'
            )

    def _expected_shape(self) -> str:
        return ' or '.join(shape.format(self.num_features) for shape in self.input_dims.values())

    @torch.no_grad()
    def select_channels(self, index: Tensor | Sequence[int] | Sequence[bool] | slice) -> None:
        """Keep the channels of ``index`` alone, in its order, as structured pruning asks of a norm.

        All tensors of a channel go with it: the layer is then the one that was built with so many channels and given
        their values. Parameters become new ones, with their gradients and ``requires_grad``: an optimizer must be built
        again, as after any pruning.

        Args:
            index: Channels to keep: their numbers, each once, a mask of (C,), or a slice.

        Raises:
            ValueError: No channel is left, one is not there, or another library has sliced some of the tensors before.
                Nothing is changed then.
        """
        self._check_shapes(self._own_parameters())
        channels = self.num_features
        kept = self._channel_numbers(index)

        def select(tensor: Tensor) -> Tensor:
            return tensor.view(channels, -1)[kept.to(tensor.device)].reshape(-1)

        for key, parameter in list(self.named_parameters(recurse=False)):
            selected = nn.Parameter(select(parameter), requires_grad=parameter.requires_grad)
            selected.grad = None if parameter.grad is None else select(parameter.grad)
            setattr(self, key, selected)
        for key, buffer in list(self.named_buffers(recurse=False)):
            if buffer.dim() == 1:
                setattr(self, key, select(buffer))
        self.num_features = len(kept)

    def _channel_numbers(self, index: Any) -> Tensor:
        """What the index of :meth:`select_channels` comes to, each number from 0 to C - 1."""
        name, channels = type(self).__name__, self.num_features
        try:
            chosen = index if isinstance(index, slice) else torch.as_tensor(index, device='cpu')
            if isinstance(chosen, Tensor) and chosen.dtype != torch.bool:
                numbers = chosen.long()  # of uint8 too, which torch takes for a mask
                if not torch.equal(numbers, chosen):
                    raise TypeError('not whole numbers')
                chosen = numbers
            numbers = torch.arange(channels)[chosen]
            if numbers.dim() != 1 or len(numbers.unique()) < len(numbers):
                raise IndexError('not a list of channels')
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f'{name}: index must be numbers of channels from 0 to {channels - 1}, each at most once, a mask of '
                f'({channels},) or a slice, got {index}.'
            ) from error
        if len(numbers) == 0:
            raise ValueError(f'{name}: index must leave at least one of {channels} channels, got {index}.')
        return numbers

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script calls before it compiles a module."""
        error = (
            f'{type(self).__name__} cannot be scripted: trace the model in evaluation, torch.jit.trace(model.eval(), x)'
        )
        if self.scaling != 'unitized':
            error += ', or fold its norms first, torch.jit.script(mmubn.fold(model.eval()))'
        raise RuntimeError(f'{error}.')

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        read_overlay(self, state_dict, prefix)
        convert_entries(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        arguments = inspect.signature(type(self).__init__).parameters
        others = ('self', 'num_features', 'device', 'dtype', 'process_group')
        named = (f'{name}={getattr(self, name)}' for name in arguments if name not in others)
        return ', '.join((str(self.num_features), *named))
