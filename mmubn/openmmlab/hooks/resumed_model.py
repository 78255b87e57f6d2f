"""Resuming with another norm: the weights load, but what the optimizer remembers is of other parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from mmubn.checkpoints import CheckpointError
from mmubn.checkpoints.layouts import BATCH_COUNT, LAYOUTS, find_layout, listed
from mmubn.layers import UnifiedNorm

__all__ = ['ResumedModelHook']

OURS = {layout.title for name, layout in LAYOUTS.items() if name != 'bn'}
Tensors = Mapping[str, Tensor]


class ResumedModelHook(Hook):
    """Checks that a checkpoint that a run resumes from has the norms and the parameters of its model.

    Torch says of an optimizer of another number of parameters that it is of another number, and finds one of other
    shapes in the first step or never.

    What the optimizer remembers of ``neighbor_weight`` is (C, k*k - 1) in checkpoints of version 2 of the layers, and
    flat as the parameter is today: it is reshaped, and the run goes on exactly.

    Raises:
        CheckpointError: Before anything is taken over. Names the layer or the parameter, what it is in both, and
            ``load_from``.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        optim_wrapper = getattr(runner, 'optim_wrapper', None)
        saved = checkpoint.get('optimizer') if isinstance(checkpoint, Mapping) else None
        if not runner._resume or not isinstance(optim_wrapper, OptimWrapper) or not isinstance(saved, Mapping):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        weights = {key.removeprefix('module.'): value for key, value in checkpoint.get('state_dict', {}).items()}
        if (reason := next(_differences(model, optim_wrapper, weights, saved), None)) is not None:
            path = runner._load_from or find_latest_checkpoint(runner.work_dir)
            raise CheckpointError(
                f'--resume goes on with the run of {path}, but {reason}: to start a new run from its weights, leave '
                f'--resume out and set load_from to it (--cfg-options load_from={path}); to go on with the old one, '
                'give the config that it had.'
            )
        for optimizer, each in _optimizers(optim_wrapper, saved):
            _reshape_neighbors(model, optimizer, each)


def _differences(model: nn.Module, optim_wrapper: OptimWrapper, weights: Tensors, saved: Mapping) -> Iterator[str]:
    """Why ``saved`` is not the state of the optimizers of ``model``, the plainest reason first."""
    yield from _other_norms(model, weights)
    own, found = _optimizer_names(optim_wrapper), _saved_names(saved)
    if own != found:
        yield f'there is {found} there and {own} here'
        return
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    for optimizer, each in _optimizers(optim_wrapper, saved):
        yield from _other_counts(optimizer, each, names, weights)
        yield from _other_shapes(model, optimizer, each, names, weights)


# --- norms ------------------------------------------------------------------------------------------------------------


def _other_norms(model: nn.Module, weights: Tensors) -> Iterator[str]:
    """The layers that have another norm in ``weights`` than in ``model``, of this package in one of them."""
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in weights.items():
        place, _, name = key.rpartition('.')
        if name != BATCH_COUNT and isinstance(value, Tensor):
            entries[place][name] = value
    for place, layer in model.named_modules():
        if place not in entries:
            continue
        found = entries[place]
        own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        own.pop(BATCH_COUNT, None)
        title = _title(found, place)
        if (isinstance(layer, UnifiedNorm) or title in OURS) and _shapes(own) != _shapes(found):
            there, here = (_with_kernel_size(*each) for each in ((title, found), (type(layer).__name__, own)))
            yield f'{place} is {there} there and {here} here ({_comparison(own, found)})'


def _title(found: Tensors, place: str) -> str:
    """What norm has these entries."""
    if 'running_mean' in found:
        try:
            return find_layout(found, f'{place}.').title
        except CheckpointError:
            pass
    return f'layer with {listed(found)}'


def _with_kernel_size(title: str, tensors: Tensors) -> str:
    if not {'weight', 'neighbor_weight'} <= tensors.keys():
        return title
    taps = tensors['neighbor_weight'].numel() / tensors['weight'].numel()
    return f'{title} with kernel_size={round((taps + 1) ** 0.5)}'


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Of all; neighbor taps of (C, k*k - 1) are those of today."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(shapes.get('neighbor_weight', ())) == 2:
        shapes['neighbor_weight'] = (tensors['neighbor_weight'].numel(),)
    return shapes


def _comparison(own: Tensors, found: Tensors) -> str:
    here, there = _shapes(own), _shapes(found)
    parts = []
    if lost := here.keys() - there.keys():
        parts.append(f'not there: {listed(lost)}')
    if more := there.keys() - here.keys():
        parts.append(f'not here: {listed(more)}')
    if not parts:
        differ = [name for name in sorted(here) if here[name] != there[name]]
        parts = [f'{name} has shape {there[name]} there and {here[name]} here' for name in differ]
    return '; '.join(parts)


# --- optimizers -------------------------------------------------------------------------------------------------------


def _optimizers(optim_wrapper: OptimWrapper, saved: Mapping) -> list[tuple[Optimizer, Mapping]]:
    """Each optimizer and its part of ``saved``, of those that are of a known form."""
    if isinstance(optim_wrapper, OptimWrapperDict):
        pairs = [(wrapper.optimizer, saved.get(name)) for name, wrapper in optim_wrapper.items()]
    else:
        pairs = [(optim_wrapper.optimizer, saved)]
    return [(optimizer, each) for optimizer, each in pairs if isinstance(each, Mapping) and 'param_groups' in each]


def _optimizer_names(optim_wrapper: OptimWrapper) -> str:
    if isinstance(optim_wrapper, OptimWrapperDict):
        return f'an optimizer for each of {listed(optim_wrapper.keys())}'
    return 'one optimizer'


def _saved_names(saved: Mapping) -> str:
    if saved and all(isinstance(each, Mapping) and 'param_groups' in each for each in saved.values()):
        return f'an optimizer for each of {listed(saved)}'
    return 'one optimizer'


def _other_counts(optimizer: Optimizer, saved: Mapping, names: Mapping[int, str], weights: Tensors) -> Iterator[str]:
    own = [len(group['params']) for group in optimizer.param_groups]
    found = [len(group['params']) for group in saved['param_groups']]
    if own == found:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    missing = [name for each in parameters if (name := names.get(id(each))) is not None and name not in weights]
    which = f' (not there: {_some(missing)})' if missing else ''
    yield f'the optimizer has {_groups(found)} there and {_groups(own)} here{which}'


def _groups(sizes: list[int]) -> str:
    if len(sizes) == 1:
        return f'{sizes[0]} parameters'
    return f'{sum(sizes)} parameters in {len(sizes)} groups ({_some([str(size) for size in sizes])})'


def _other_shapes(
    model: nn.Module, optimizer: Optimizer, saved: Mapping, names: Mapping[int, str], weights: Tensors
) -> Iterator[str]:
    """Parameters of another shape that the optimizer remembers something of, in that shape."""
    neighbors = _neighbors(model)
    for parameter, state in _states(optimizer, saved):
        name = names.get(id(parameter), '')
        shape = tuple(getattr(weights.get(name), 'shape', parameter.shape))
        if shape == parameter.shape or (id(parameter) in neighbors and weights[name].numel() == parameter.numel()):
            continue
        if any(isinstance(value, Tensor) and value.shape == shape for value in state.values()):
            yield f'{name} has shape {shape} there and {tuple(parameter.shape)} here'


def _reshape_neighbors(model: nn.Module, optimizer: Optimizer, saved: Mapping) -> None:
    neighbors = _neighbors(model)
    for parameter, state in _states(optimizer, saved):
        if id(parameter) in neighbors:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.numel() == parameter.numel():
                    state[key] = value.reshape(parameter.shape)


def _states(optimizer: Optimizer, saved: Mapping) -> Iterator[tuple[nn.Parameter, dict]]:
    """Each parameter and what is remembered of it. Torch assigns them by their order."""
    numbers = [number for group in saved['param_groups'] for number in group['params']]
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    for number, parameter in zip(numbers, parameters, strict=False):
        state = saved.get('state', {}).get(number)
        if isinstance(state, dict):
            yield parameter, state


def _neighbors(model: nn.Module) -> set[int]:
    layers = (layer for layer in model.modules() if isinstance(layer, UnifiedNorm))
    return {id(layer.neighbor_weight) for layer in layers if layer.neighbor_weight is not None}


def _some(names: list[str], count: int = 3) -> str:
    more = len(names) - count
    return ', '.join(names[:count]) + (f' and {more} more' if more > 0 else '')
