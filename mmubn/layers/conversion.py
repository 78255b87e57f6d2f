"""A state dict in the layouts that the norms of a model have, for code that copies tensors itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import nn

from mmubn.checkpoints import CheckpointError
from mmubn.layers.loading import convert_entries
from mmubn.layers.released_names import read_released_names
from mmubn.layers.unified_norm import UnifiedNorm

__all__ = ['convert_state_dict']


def convert_state_dict(model: nn.Module, state_dict: Mapping) -> OrderedDict:
    """A state dict in which every norm of this package in ``model`` has its own layout and, to rounding, its function.

    ``load_state_dict`` does the same by itself. What needs this function first is code that compares keys and shapes or
    copies tensors one by one: filtered loads (``if k in own and v.shape == own[k].shape``),
    ``set_model_state_dict(full_state_dict=True)`` of FSDP2, averages of checkpoints.

    Args:
        model: The model that will load the result, not wrapped or wrapped as the keys say.
        state_dict: Of a model with norms of any layout that docs/checkpoints.md lists. Not modified; tensors that do
            not change are shared with it.

    Returns:
        The new state dict.

    Raises:
        CheckpointError: A layer has no exact equal, or no norm of ``model`` has an entry in ``state_dict``.
        TypeError: The arguments are something else, such as in the other order.

    Example:
        >>> state_dict = mmubn.convert_state_dict(model, torchvision.models.resnet50().state_dict())
    """
    if not isinstance(model, nn.Module) or not isinstance(state_dict, Mapping):
        raise TypeError(
            'convert_state_dict: expected a model and a state dict, in this order, got '
            f'{type(model).__name__} and {type(state_dict).__name__}.'
        )
    layers = {
        f'{name}.' if name else '': module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, UnifiedNorm)
    }
    converted = OrderedDict(state_dict)
    for name, module in model.named_modules(remove_duplicate=False):
        if any(isinstance(child, UnifiedNorm) for child in module._modules.values()):
            read_released_names(module, converted, f'{name}.' if name else '')
    if layers and not any(key.startswith(tuple(layers)) for key in converted):
        raise CheckpointError(
            f'no norm of this {type(model).__name__} has an entry in the state dict: its keys start with '
            f'{next(iter(state_dict), "nothing")!r}, those of the norms with {next(iter(layers))!r}; give the '
            'model that the keys are of, or change the prefix of the keys.'
        )
    for prefix, layer in layers.items():
        convert_entries(layer, converted, prefix)
    if hasattr(state_dict, '_metadata'):
        converted._metadata = state_dict._metadata  # type: ignore[attr-defined] # as state_dict() of a module has it
    return converted
