"""Evaluation of a trained model at less cost: :func:`fold` computes in advance all that evaluation holds constant."""

# No ``from __future__ import annotations``: torch.jit.script reads the types of FoldedUBN's attributes, and no strings.
import copy
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmubn import functional, ops
from mmubn.layers import UnifiedNorm, areas
from mmubn.layers.tracing import node_in_trace

__all__ = ['FoldedUBN', 'fold']


def fold(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode in which every norm is a layer of the same function with fewer steps.

    A UBN, SyncUBN, RBN, BNET or IEBN becomes as simple as its parameters allow:

    - ``w_m = w_v = 0`` and k = 1, or neighbor taps of 0: an ``nn.BatchNorm2d``, which any conv-BN fusion may take on.
    - Any other: a :class:`FoldedUBN`, without the steps that its parameters leave out.

    A UnitizedBN with ``alpha = 0`` becomes an ``nn.BatchNorm2d``, which takes 4-D inputs alone; any other stays, since
    its factor depends on all channels of a sample and nothing of it is constant. So does a layer without running
    statistics.

    A norm that has an activation, in networks of timm, becomes an ``nn.Sequential`` of the two.

    Gate, momenta and gradients of the parameters end here: the result is for evaluation and export alone, and its state
    dict has another layout. ``model`` stays as it is.

    Args:
        model: Any module, a norm itself included, in evaluation mode.

    Returns:
        The folded copy, in evaluation mode; of a model without norms of this package, a copy as it is.

    Raises:
        TypeError: For what is no ``nn.Module``.
        ValueError: For a model in training mode, and for a layer of which another library has sliced some tensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'fold expected a model, an nn.Module in evaluation mode, got {_kind(model)}.')
    if model.training or any(module.training for module in model.modules() if isinstance(module, UnifiedNorm)):
        raise ValueError('fold needs a model in evaluation mode: call model.eval() before fold(model).')
    model = copy.deepcopy(model)
    # By layer: one that a model uses at several places (a shared head) stays one layer.
    folded: dict[nn.Module, nn.Module] = {
        module: _with_drop_and_act(_fold_layer(module), module)
        for module in model.modules()
        if isinstance(module, UnifiedNorm)
    }
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in folded:
                module._modules[name] = folded[child]
    return folded.get(model, model)


class FoldedUBN(nn.Module):
    r"""A UBN, SyncUBN, RBN, BNET or IEBN in evaluation mode, with its constants computed in advance, by :func:`fold`.

    .. math::
        y = \mathrm{conv}_k(r_{nc} (x + s_{nc})) + \beta, \qquad s_{nc} = w_m a - \mu, \qquad
        r_{nc} = \mathrm{sigmoid}(w'_v (a + s_{nc}) + w'_b)

    where :math:`w'_v = w_v / \sqrt{\sigma^2 + \epsilon}` and ``w'_b = w_b``; of an IEBN, whose factor depends on a
    itself, ``w'_v = w_v`` and ``w'_b = w_b + w_v mu``. The weight of conv_k holds
    :math:`1 / \sqrt{\sigma^2 + \epsilon}`, and r too where ``w_v = 0``. With ``w_m = w_v = 0`` one addition and one
    convolution are left. The addition cannot move into the bias of this convolution, since the zeros around the map
    stand for mu. Into the convolution before the layer it can, where nothing else reads that one's output: runtimes,
    which see the whole graph, move it there. Where ``w_m`` is not 0, the map is added to anyway.

    The backends of the layers compute it: on the CPU in one call. An export, torch.compile and torch.jit get plain
    torch. With a gradient of the input, the backward computes the forward again, in plain torch.

    Within :func:`mmubn.image_areas` a batch with padding is an error.

    Args:
        constants: The attributes below by name.
        calibrate_bias: Whether r multiplies beta too.

    Attributes:
        shift: ``-mu``, (C,).
        center_weight: w_m, (C,). None for 0.
        scale_weight, scale_bias: w'_v and w'_b, each (C,). Both None where r is in the weight.
        weight: Kernel, (C, 1, k, k), or (C,) where only its centre tap is not 0.
        bias: beta, (C,).
    """

    shift: Tensor
    center_weight: Tensor | None
    scale_weight: Tensor | None
    scale_bias: Tensor | None
    weight: Tensor
    bias: Tensor

    def __init__(self, constants: dict[str, Tensor | None], calibrate_bias: bool) -> None:
        super().__init__()
        self.calibrate_bias = calibrate_bias
        for name in ('shift', 'center_weight', 'scale_weight', 'scale_bias', 'weight', 'bias'):
            # Not a buffer where it is None: torch.export miscounts those.
            if constants[name] is None:
                setattr(self, name, None)
            else:
                self.register_buffer(name, constants[name])

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # it knows nothing of what follows
            return x if x.numel() == 0 else self._forward(x)
        node = node_in_trace(self, x)
        if node is not None:
            return node
        if not torch.jit.is_tracing():  # which would make constants of the sizes
            self._check_shape(x)
        if not x.is_floating_point():
            raise ValueError(
                f'FoldedUBN expected a floating point input, got {x.dtype}; convert it with .float(), or quantize the '
                'graph by torch.ao.quantization.quantize_fx.prepare_fx, which leaves this layer in float.'
            )
        if x.numel() == 0:
            return x
        if areas.is_used():
            areas.outside_graphs(self._refuse_padding, x)
        with functional.without_autocast(x.device.type):  # as in the layers, float32 inside
            backend = ops.choose_backend(x, self.kernel_size)
            if backend.name == 'reference':
                return self._forward(x)
            if x.requires_grad and torch.is_grad_enabled():
                return _Evaluation.apply(x, self, backend)
            return backend.evaluate(x, self.constants())

    def _check_shape(self, x: Any) -> None:
        channels = self.shift.shape[0]
        expected = f'(N, {channels}, H, W)'
        if not isinstance(x, Tensor):
            raise ValueError(
                f'FoldedUBN expected a tensor of shape {expected}, got {_kind(x)}; '
                'convert an array with torch.as_tensor, and hand the maps of a list over one by one.'
            )
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(
                f'FoldedUBN expected input of shape {expected}, got {tuple(x.shape)}; '
                f'the layer before must have {channels} channels.'
            )

    def _refuse_padding(self, x: Tensor) -> None:
        images = areas.current()
        if images is not None and images.in_map(x) is not None:
            raise RuntimeError(
                'FoldedUBN takes its means over the whole map, and images of this batch are padded: evaluate padded '
                'batches with the model as it was before mmubn.fold, or without image areas (remove PaddingAwareHook).'
            )

    @property
    def kernel_size(self) -> int:
        return 1 if self.weight.dim() == 1 else self.weight.shape[-1]

    def constants(self) -> ops.Constants:
        """The attributes, as a backend takes them."""
        kernel = self.weight if self.weight.dim() > 1 else self.weight.view(-1, 1, 1, 1)
        return ops.Constants(
            self.shift, self.center_weight, self.scale_weight, self.scale_bias, kernel, self.bias, self.calibrate_bias
        )

    def _forward(self, x: Tensor) -> Tensor:
        """In plain torch: two steps on the map and the convolution, in numbers of (N, C, 1, 1) throughout."""
        y = x.to(functional.statistics_dtype(x))
        # Local names: torch.jit.script sees that one is not None.
        center_weight, scale_weight, scale_bias = self.center_weight, self.scale_weight, self.scale_bias
        shift = self.shift[:, None, None]
        a = y.mean((2, 3), keepdim=True) if center_weight is not None or scale_weight is not None else shift
        if center_weight is not None:
            shift = shift + center_weight[:, None, None] * a
        r = shift
        if scale_weight is not None and scale_bias is not None:
            r = torch.sigmoid(scale_weight[:, None, None] * (a + shift) + scale_bias[:, None, None])
        y = y + shift
        if self.weight.dim() == 1:
            scale, bias = self.weight[:, None, None], self.bias[:, None, None]
            if scale_weight is not None:  # onto the numbers rather than the map
                scale = r * scale
                bias = r * bias if self.calibrate_bias else bias
            return (y * scale + bias).to(x.dtype)
        channels, _, kernel_size, _ = self.weight.shape
        weight, bias = self.weight.to(y.dtype), self.bias.to(y.dtype)
        if scale_weight is not None and not self.calibrate_bias:
            # Before the convolution, into which runtimes draw the activation or the addition that follows.
            y = y * r
        y = F.conv2d(y, weight, bias, padding=kernel_size // 2, groups=channels)
        if scale_weight is not None and self.calibrate_bias:
            # r is one number per map, so it commutes with the convolution; here it takes the bias along.
            y = y * r
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        shapes = (f'{name}={tuple(value.shape)}' for name, value in self.named_buffers())
        return ', '.join((*shapes, f'calibrate_bias={self.calibrate_bias}'))


def _kind(value: Any) -> str:
    name = type(value).__name__
    return 'None' if value is None else f'{"an" if name[0] in "aeiou" else "a"} {name}'


class _Evaluation(torch.autograd.Function):
    """A FoldedUBN by a backend, with the gradient of its input, of any order, that plain torch has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FoldedUBN, backend: ops.Backend) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return backend.evaluate(x, layer.constants())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), functional.without_autocast(x.device.type):
            y = ctx.layer._forward(x)
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=create_graph)
        return dx, None, None


def _with_drop_and_act(folded: nn.Module, layer: UnifiedNorm) -> nn.Module:
    """``folded`` with what follows ``layer`` in the same layer, in networks of timm: an activation."""
    parts = {name: child for name, child in layer.named_children() if name in ('drop', 'act')}
    parts = {name: child for name, child in parts.items() if not isinstance(child, nn.Identity)}
    if folded is layer or not parts:
        return folded
    return nn.Sequential(OrderedDict(norm=folded, **parts)).eval()


@torch.no_grad()
def _fold_layer(layer: UnifiedNorm) -> nn.Module:
    layer._check_shapes(layer._own_parameters())
    if layer.running_mean is None:
        return layer  # the batch's own statistics normalise it
    # In float64, so that every constant is rounded once; on the CPU, since some devices have no float64.
    values = {name: value.to('cpu', torch.float64) for name, value in layer.state_dict().items()}
    device, dtype = layer.weight.device, functional.statistics_dtype(layer.weight)

    def unless_zero(name: str) -> Tensor | None:
        return values[name] if name in values and values[name].any() else None

    neighbor_weight, center_weight, scale_weight = map(
        unless_zero, ('neighbor_weight', 'center_weight', 'scale_weight')
    )
    if layer.scaling not in (None, 'rectified', 'instance') and scale_weight is not None:
        return layer
    gain, bias, scale_bias = values['weight'], values['bias'], values.get('scale_bias')
    inv_std = torch.rsqrt(values['running_var'] + float(layer.eps))
    r = None
    if scale_weight is None and scale_bias is not None:
        r, scale_bias = torch.sigmoid(scale_bias), None
        gain = gain * r
        bias = bias * r if layer.calibrate_bias else bias

    folded: nn.Module
    if neighbor_weight is None and center_weight is None and scale_weight is None:
        folded = nn.BatchNorm2d(layer.num_features, eps=float(layer.eps), dtype=torch.float64).requires_grad_(False)
        folded.load_state_dict(
            dict(weight=gain, bias=bias, running_mean=values['running_mean'], running_var=values['running_var']),
            strict=False,  # without num_batches_tracked, which evaluation does not read
        )
    else:
        weight = gain * inv_std
        if neighbor_weight is not None:
            neighbors = neighbor_weight.view(len(weight), -1) * (inv_std if r is None else r * inv_std)[:, None]
            before, after = neighbors.chunk(2, dim=1)
            kernel = torch.cat([before, weight[:, None], after], dim=1)
            weight = kernel.view(-1, 1, layer.kernel_size, layer.kernel_size)
        if scale_weight is not None:
            if layer.scaling == 'instance':
                scale_bias = scale_bias + scale_weight * values['running_mean']
            else:
                scale_weight = scale_weight * inv_std
        constants = dict(
            shift=-values['running_mean'],
            center_weight=center_weight,
            scale_weight=scale_weight,
            scale_bias=scale_bias,
            weight=weight,
            bias=bias,
        )
        folded = FoldedUBN(constants, layer.calibrate_bias and scale_weight is not None)
    return folded.to(device, dtype).eval()
