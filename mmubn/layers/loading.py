"""What a layer does with the entries of a state dict before torch reads them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mmubn.checkpoints import Target, convert_state
from mmubn.checkpoints.conversion import entries_under

__all__ = ['convert_entries', 'read_overlay']

# What a filtered load takes from the state dict of a BatchNorm.
BATCH_NORM = {'weight', 'bias', 'running_mean', 'running_var'}


def convert_entries(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """:func:`mmubn.checkpoints.convert_state` for ``layer``, a norm of this package; those of its children stay.

    Where tensors of the layer are computed from others, nothing is converted.
    """
    if _has_computed_tensors(layer):
        return
    children = tuple(f'{prefix}{name}.' for name in layer._modules)  # an activation in networks of timm, an adapter
    apart = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(children)}
    _convert_own(layer, state_dict, prefix)
    state_dict.update(apart)


def _convert_own(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    tensors: dict[str, Any] = dict(_tensors(layer))
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    name = type(layer).__name__
    target = Target(f'this {name}', own.keys(), layer.scaling, layer.kernel_size, layer.calibrate_bias)
    entries = entries_under(state_dict, prefix)
    sharded = [key for key, entry in entries.items() if hasattr(entry, 'full_tensor')]
    if not sharded or own == {key: tuple(entry.shape) for key, entry in entries.items()}:
        layer.was_converted |= convert_state(name, own, target, state_dict, prefix)
        return
    # Sharded entries (FSDP2, DTensor) of another layout: convert whole ones, and shard as the layer's tensors are.
    for key in sharded:
        state_dict[prefix + key] = entries[key].full_tensor()
    layer.was_converted |= convert_state(name, own, target, state_dict, prefix)
    for key, tensor in tensors.items():
        if hasattr(tensor, 'full_tensor') and prefix + key in state_dict:
            whole = state_dict[prefix + key]
            from torch.distributed.tensor import distribute_tensor  # torch 2.5; only a sharded model gets here

            state_dict[prefix + key] = distribute_tensor(whole, tensor.device_mesh, tensor.placements)


def read_overlay(layer: Any, state_dict: dict, prefix: str) -> None:
    """Where ``state_dict`` is the layer's own one with entries of another norm in it, keep those alone.

    So it is after ``own = model.state_dict(); own.update(...); model.load_state_dict(own)``: the entries that were not
    updated are no copies, but the tensors of the layer themselves.
    """
    if _has_computed_tensors(layer):
        return
    tensors = _tensors(layer)
    tensors.pop('num_batches_tracked', None)
    entries: dict[str, Any] = {key: state_dict.get(prefix + key) for key in tensors}
    if 'running_var' not in entries or any(not isinstance(entry, Tensor) for entry in entries.values()):
        return
    own = {key for key, entry in entries.items() if _is_same(entry, tensors[key])}
    name = type(layer).__name__
    if own and not own & BATCH_NORM and _is_fresh(layer):
        for key in own:
            del state_dict[prefix + key]
        warnings.warn(
            f"The state dict has entries of another norm beside this {name}'s own tensors, as after a filtered update "
            'of model.state_dict(): they are read alone, so that the layer computes the function of that norm. '
            'mmubn.convert_state_dict(model, state_dict) before the update says so itself.',
            stacklevel=4,
        )
    elif tensors.keys() - BATCH_NORM <= own and _looks_overwritten(layer, entries['running_var']):
        warnings.warn(
            f'The state dict is that of this {name} itself, and it has the statistics of a trained norm beside the '
            'initial values of all that a BatchNorm lacks. If a BatchNorm was copied into it tensor by tensor (FSDP2: '
            'broadcast_from_rank0=True, strict=False), its function is another one: convert the state dict first, by '
            'mmubn.convert_state_dict(model, state_dict).',
            stacklevel=4,
        )


def _looks_overwritten(layer: Any, running_var: Tensor) -> bool:
    """Whether the layer is as fresh but for what a BatchNorm has, and was not read from one by a conversion."""
    if layer.was_converted or layer.scaling is None or not _is_fresh(layer):
        return False
    # A fresh layer after a forward has other statistics too, but a weight of ones.
    return bool((_local(running_var) != 1).any()) and bool((_local(layer.weight) != 1).any())


def _is_fresh(layer: Any) -> bool:
    """Whether all that a BatchNorm lacks has its initial value. In a trained layer it is not for a load to reset it."""
    values = dict(layer.named_parameters(recurse=False))
    initial = layer.initial_rectifications()
    return all(_local(values[name].detach()).equal(_local(value)) for name, value in initial.items() if name in values)


def _has_computed_tensors(layer: nn.Module) -> bool:
    """Whether tensors of the layer are computed from others, by a parametrization or a mask of pruning."""
    return not {'weight', 'bias'} <= layer._parameters.keys()


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def _local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    one, other = _local(one.detach()), _local(other.detach())
    if one.is_meta or other.is_meta or one.layout != torch.strided:
        return False
    if one.numel() == 0 or other.numel() == 0:  # an empty shard has no memory
        return one.shape == other.shape
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()
