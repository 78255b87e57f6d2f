"""The norms of a built model as norms of this package: :func:`convert_norms` replaces each by one of the same function.

All is checked and all new layers are made before the first old one is replaced, so that an error leaves the model as it
was. What a layer adds to a BatchNorm2d of torch is known by its structure: no library but torch is imported.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import logging
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from mmubn.checkpoints import Target, find_layout
from mmubn.checkpoints.conversion import read_norm, write_norm
from mmubn.layers import NORMS, UBN, SyncUBN, UnifiedNorm
from mmubn.layers.released_names import watch_parent

__all__ = ['Conversion', 'Where', 'convert_norms']

Where = str | re.Pattern | Callable[[str, nn.Module], Any] | None

BATCH_NORMS = {
    'BN': nn.BatchNorm2d,
    'BatchNorm2d': nn.BatchNorm2d,
    'SyncBN': nn.SyncBatchNorm,
    'SyncBatchNorm': nn.SyncBatchNorm,
}
# What a type becomes in the place of a synchronised layer.
SYNCHRONISED = {UBN: SyncUBN, nn.BatchNorm2d: nn.SyncBatchNorm}
# Arguments of every norm that are the layer's own.
KEPT = ('num_features', 'eps', 'momentum', 'affine', 'track_running_stats', 'device', 'dtype')
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
FOLLOW = {'drop', 'act'}  # children that the output of a norm goes through, in networks of timm
# timm's layers of a norm and its activation, by the torch type that they are.
TIMM_MODULE = 'timm.layers.norm_act'
TIMM_TYPES = {nn.BatchNorm2d: 'BatchNormAct2d', nn.SyncBatchNorm: 'SyncBatchNormAct'}
TENSORS = {'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'}  # of a BatchNorm
EXPRESSION = 're:'  # before a regular expression, which a string of a config tells from a glob
LISTED = 3  # names in an error


def convert_norms(
    model: nn.Module,
    norm: str | type[nn.Module] = 'UBN',
    where: Where = None,
    *,
    strict: bool = True,
    **options: Any,
) -> nn.Module:
    """Replace the norms of a built model by norms of another type that compute the same function, up to rounding.

    The same in evaluation and, as long as the gate of a UBN is open, in training. Converted are BatchNorm2d,
    SyncBatchNorm, timm's layers of a BatchNorm and its activation, and the norms of this package; a UBN in the place of
    a SyncBatchNorm is a SyncUBN, and a BatchNorm in the place of a SyncUBN a SyncBatchNorm. The new layer keeps the
    old one's eps and momentum, training mode, device, dtypes, ``requires_grad``, hooks, activation and attributes of
    your own, of the layer and of its parameters. A layer that is used in several places is one layer in all of them. A
    norm that is of the type already, with these options, stays.

    The logger ``mmubn`` says, at level INFO, how many norms became what, and where.

    Parameters become new ones, without gradients: build the optimizer, and wrap the model (DDP, FSDP, an average of the
    weights), after the conversion. A step of a torch optimizer that was built before is a RuntimeError.

    Args:
        model: Any module; modified in place, unless it is itself a norm.
        norm: ``'UBN'``, ``'SyncUBN'``, ``'RBN'``, ``'BNET'``, ``'IEBN'`` or ``'UnitizedBN'``, ``'BN'`` or ``'SyncBN'``
            to go back, or the class, which may be one of your own.
        where: Which norms: a glob over their names, as ``'layer?.*.bn3'`` (``*`` stands for dots too), a regular
            expression that is searched for in the name, compiled or as ``'re:^layer[12]'``, or a function that is given
            the name and the module. A layer in several places is chosen by any of its names. None: all.
        strict: Whether a chosen norm that has no exact equal is an error. If not, it stays as it is; that all of them
            would stay is an error all the same.
        **options: Arguments of ``norm``, as ``kernel_size=5``. A norm of this package keeps those of its own that are
            not given here.

    Returns:
        ``model``; where it is a norm itself, the new one.

    Raises:
        ValueError: For an unknown norm or a value that it does not take; a model without norms; a ``where`` that
            chooses none; a chosen norm without an exact equal (FrozenBatchNorm2d, no running statistics, no affine
            parameters, of 1-D or 3-D inputs, parametrized, trained beyond what the type has, ...); a wrapped model.
            Names the layer and why, and changes nothing.
        TypeError: For an option that the norm does not have, and arguments of other types.

    Example:
        >>> model = convert_norms(torchvision.models.resnet50(), 'BNET', where='layer*.bn3', kernel_size=5)
    """
    conversion = Conversion(model, norm, where, strict=strict, **options)
    logging.getLogger('mmubn').info('mmubn: %s', conversion.summary)
    return conversion.apply()


class Replacement(NamedTuple):
    """A norm that is to be replaced."""

    name: str  # the first of its names
    old: nn.Module
    new: nn.Module


class Conversion:
    """What :func:`convert_norms` does, before it is done: checked, with the new layers made. The arguments are its own.

    Attributes:
        replacements: In the order of the model.
        right: Chosen norms that are of the type already, and stay.
        left: Why a chosen norm stays though it is not of the type, by its name.
        summary: Both in words.
    """

    def __init__(
        self, model: nn.Module, norm: str | type[nn.Module], where: Where = None, *, strict: bool = True, **options: Any
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f'convert_norms: model must be a torch.nn.Module, got a {type(model).__name__}.')
        self._model, self._norm, self._options = model, _find_norm(norm), options
        _check_options(self._norm, options)
        for name, module in model.named_modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                raise ValueError(
                    f'convert_norms: {name or "the model"} is wrapped by DistributedDataParallel, which waits for the '
                    'gradients of the old parameters: convert the model first, then wrap it.'
                )
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(
                    f'convert_norms: {name or "the model"} is compiled by TorchScript: convert the model that it was '
                    'made from, and trace that.'
                )
        self._outside = _held_outside(model)
        self._owners = Counter(id(each) for module in model.modules() for each in _tensors_of(module))
        self._strict = strict
        self.replacements: list[Replacement] = []
        self.right: list[nn.Module] = []
        self.left: dict[str, str] = {}
        chosen = _choose(model, where)
        for layer, name in chosen.items():
            self._plan(layer, name)
        if self.left and (strict or len(self.left) == len(chosen)):
            self._refuse(len(chosen))
        self.summary = self._in_words()

    def _plan(self, layer: nn.Module, name: str) -> None:
        """Make the new layer, or say why there is none."""
        if self._is_right(layer):
            self.right.append(layer)
            return
        reason = self._outside.get(layer) or _obstacle(layer)
        if reason is None and any(self._owners[id(each)] > 1 for each in _tensors_of(layer)):
            reason = 'it shares a parameter or a buffer with another module'
        if reason is None:
            try:
                self.replacements.append(Replacement(name, layer, _new_layer(layer, name, self._norm, self._options)))
                return
            except ValueError as error:  # a CheckpointError too
                reason = str(error).removeprefix(f'{name}.').rstrip('.')
        self.left[name] = reason

    def _is_right(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is of the type already, with the options."""
        if issubclass(self._norm, UnifiedNorm):
            kinds = {self._norm, SYNCHRONISED.get(self._norm)}
            own = _own_options(layer) if type(layer) in kinds else {}
            return type(layer) in kinds and all(own.get(key) == value for key, value in self._options.items())
        if self._norm is nn.SyncBatchNorm:
            group = self._options.get('process_group')
            return isinstance(layer, nn.SyncBatchNorm) and group in (None, layer.process_group)
        return not isinstance(layer, UnifiedNorm)  # the way back is for norms of this package

    def _refuse(self, chosen: int) -> None:
        name, reason = next(iter(self.left.items()))
        others = len(self.left) - 1
        more = (
            f' ({others} more of {chosen} chosen norms cannot either: {_listed(list(self.left)[1:])})' if others else ''
        )
        remedy = '; choose others by where, or leave it as it is by strict=False' if self.replacements else ''
        remedy = (
            remedy if self._strict else '; strict=False leaves some as they are, but here nothing would be converted'
        )
        what = f'{name}, of type {_kind(self._model.get_submodule(name))},' if name else f'this {_kind(self._model)}'
        raise ValueError(
            f'convert_norms: {what} has no exact equal as {_title(self._norm)}: {reason}{more}{remedy}. '
            'Nothing was changed.'
        )

    def _in_words(self) -> str:
        pairs: dict[tuple[str, str], list[str]] = {}
        for name, old, new in self.replacements:
            pairs.setdefault((_kind(old), _kind(new)), []).append(name)
        parts = [f'{len(names)} {old} -> {new}: {_grouped(names)}' for (old, new), names in pairs.items()]
        if self.right:
            parts.append(f'{len(self.right)} stay as they are')
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, each in self.left.items() if each == reason]
            parts.append(f'{len(names)} left: {_grouped(names)} ({reason})')
        return '; '.join(parts)

    def apply(self) -> nn.Module:
        """Put the new layers in their places. Returns the model, or, where it is a norm itself, the new one."""
        new_of = {old: new for _, old, new in self.replacements}
        # A model that is a norm itself stays a whole model, beside the new one.
        _remember([each for each in self.replacements if each.old is not self._model])
        for module in list(self._model.modules()):
            for name, child in module._modules.items():
                if child is not None and child in new_of:
                    module._modules[name] = new_of[child]  # not by setattr: it refuses to replace a norm of ours
                    watch_parent(module, name, new_of[child])
        return new_of.get(self._model, self._model)


# --- the arguments ----------------------------------------------------------------------------------------------------


def _find_norm(norm: str | type[nn.Module]) -> type[nn.Module]:
    named: dict[str, type[nn.Module]] = {each.__name__: each for each in NORMS} | BATCH_NORMS
    found = named.get(norm) if isinstance(norm, str) else norm
    if not isinstance(found, type) or not (issubclass(found, UnifiedNorm) or found in BATCH_NORMS.values()):
        by_small_letters = {name.lower(): name for name in named}
        near = difflib.get_close_matches(norm.lower(), by_small_letters, 1) if isinstance(norm, str) else []
        raise ValueError(
            f'convert_norms: norm must be {", ".join(each.__name__ for each in NORMS)}, BN or SyncBN, or the class of '
            f'a norm of this package, got {norm!r}{f"; did you mean {by_small_letters[near[0]]}?" if near else "."}'
        )
    return found


def _option_names(norm: type[nn.Module]) -> list[str]:
    """The arguments of a norm that :func:`convert_norms` passes on."""
    if not issubclass(norm, UnifiedNorm):
        return ['process_group'] if issubclass(norm, nn.SyncBatchNorm) else []
    parameters = inspect.signature(norm).parameters.values()
    return [each.name for each in parameters if each.kind not in VARIABLE and each.name not in KEPT]


def _check_options(norm: type[nn.Module], options: dict[str, Any]) -> None:
    names = _option_names(norm)
    takes_any = any(each.kind == each.VAR_KEYWORD for each in inspect.signature(norm).parameters.values())
    for name in options:
        if name in KEPT:
            raise TypeError(f'convert_norms: {name} is no option: each norm keeps that of the layer it replaces.')
        if name not in names and not takes_any:
            near = difflib.get_close_matches(name, names, 1)
            has = f'did you mean {near[0]}?' if near else f'it has {", ".join(names) or "none"}.'
            raise TypeError(f'convert_norms: {_title(norm)} has no option {name}; {has}')
    norm(1, **options)  # raises for a value


def _choose(model: nn.Module, where: Where) -> dict[nn.Module, str]:
    """The norms that ``where`` chooses, by the first of their names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_batch_norm(module):
            names.setdefault(module, []).append(name)
    if not names:
        others = sorted({_kind(module) for module in model.modules() if 'norm' in _kind(module).lower()})
        has = f'; what it has: {", ".join(others)}' if others else ''
        raise ValueError(f'convert_norms: this {_kind(model)} has no BatchNorm{has}.')
    matches = _matcher(where)
    chosen = {module: own[0] for module, own in names.items() if any(matches(name, module) for name in own)}
    if not chosen:
        every = [name for own in names.values() for name in own]
        raise ValueError(
            f'convert_norms: where={_shown(where)} chooses none of the {len(names)} BatchNorms of this {_kind(model)}; '
            f'{_near(where, every)}.'
        )
    return chosen


def _matcher(where: Where) -> Callable[[str, nn.Module], Any]:
    if where is None:
        return lambda name, module: True
    if isinstance(where, str) and where.startswith(EXPRESSION):
        try:
            where = re.compile(where.removeprefix(EXPRESSION))
        except re.error as error:
            raise ValueError(f'convert_norms: where={where!r} is no regular expression: {error}.') from error
    if isinstance(where, str):
        return lambda name, module: fnmatch.fnmatchcase(name, where)
    if isinstance(where, re.Pattern) and isinstance(where.pattern, str):
        return lambda name, module: where.search(name)
    if callable(where) and _takes_two(where):
        return where
    raise TypeError(
        "convert_norms: where must be a glob, 're:' and a regular expression, one that is compiled, a function of a "
        f'name and a module, or None, got {where!r}.'
    )


def _takes_two(function: Callable) -> bool:
    try:
        inspect.signature(function).bind('', None)
    except TypeError:
        return False
    except ValueError:  # a builtin function, of which nothing is known
        return True
    return True


def _shown(where: Where) -> str:
    return repr(where) if isinstance(where, (str, re.Pattern)) else getattr(where, '__name__', repr(where))


def _near(where: Where, names: list[str]) -> str:
    """Names that may have been meant."""
    if isinstance(where, str) and (inside := [name for name in names if fnmatch.fnmatchcase(name, f'{where}.*')]):
        return f'inside it are {_listed(inside)}: write {where + ".*"!r}'
    text = where if isinstance(where, str) else where.pattern if isinstance(where, re.Pattern) else ''
    text = text.removeprefix(EXPRESSION)
    if not text:
        return f'their names are {_listed(names)}'
    # Of a hundred names that differ in the numbers on the way, the first is enough.
    forms = {re.sub(r'\d+(?=.*\.)', '0', name): name for name in reversed(names)}
    near = difflib.get_close_matches(re.sub(r'[*?^$\\]', '', text), forms, LISTED, cutoff=0)
    return f'near it are {_listed([forms[form] for form in near])}'


def _listed(names: list[str]) -> str:
    more = f' and {len(names) - LISTED} more' if len(names) > LISTED else ''
    return ', '.join(repr(name) for name in names[:LISTED]) + more


def _grouped(names: Iterable[str]) -> str:
    """Names with a * for their numbers, counted."""
    counts = Counter(re.sub(r'(?<![^.])\d+(?![^.])', '*', name) for name in names)
    return ', '.join(
        f'{name or "the model"} ({count})' if count > 1 else name or 'the model' for name, count in counts.items()
    )


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _title(norm: type[nn.Module]) -> str:
    return {nn.BatchNorm2d: 'BatchNorm', nn.SyncBatchNorm: 'SyncBatchNorm'}.get(norm, norm.__name__)


# --- what can be converted --------------------------------------------------------------------------------------------


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm of any kind, a frozen one too; an InstanceNorm is none."""
    if isinstance(module, _InstanceNorm):
        return False
    return isinstance(module, _BatchNorm) or {'running_mean', 'running_var'} <= module._buffers.keys()


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Its own parameters and buffers."""
    return (each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None)


def _held_outside(model: nn.Module) -> dict[nn.Module, str]:
    """Norms that a module holds beside its children, in an attribute or a list: the old one would stay in use there."""
    held: dict[nn.Module, str] = {}
    inside = set(model.modules())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ('_modules', '_parameters', '_buffers'):
                continue
            for each in _modules_in(value, set()):
                # Of a module that is no part of the model, all that it has; of one that is, what it has is looked at.
                for norm in [each] if each in inside else each.modules():
                    if _is_batch_norm(norm) and norm is not module:
                        place = f'{name}.{key}'.removeprefix('.')
                        held[norm] = (
                            f'{place} holds it too, outside of the modules of the model, and would keep the old one'
                        )
    return held


def _modules_in(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules in an attribute, its containers and methods; what a closure holds is not seen."""
    if id(value) in seen:
        return
    if isinstance(value, nn.Module):
        yield value
        return
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    elif isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        parts = (value.__self__,)
    else:
        return
    seen.add(id(value))
    for part in parts:
        yield from _modules_in(part, seen)


def _obstacle(layer: nn.Module) -> str | None:
    """Why the function of a norm cannot be taken over, whatever its values are."""
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return 'it is lazy and has no channels yet; run a batch through the model first'
    tensors = {**layer._parameters, **layer._buffers}
    if not isinstance(layer, _BatchNorm):
        if 'weight' in layer._buffers:
            return 'it is frozen: its tensors change in no training'
        return 'it is no BatchNorm2d of torch, and what it does in training is not known'
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm3d)):
        return 'its inputs are not (N, C, H, W)'
    if {'weight', 'bias'} - tensors.keys():
        return 'its weight or bias is computed from other tensors (a parametrization, pruning)'
    if isinstance(layer, UnifiedNorm):
        if type(layer) not in NORMS:
            return 'a type of your own may do more than its tensors say'
    elif (own := _own_method(layer)) is not None:
        return f'it has a {own} of its own'
    if layer._parameters.get('weight') is None or layer._parameters.get('bias') is None:
        return 'it has no weight or bias (affine=False, bias=False)'
    if tensors.get('running_mean') is None or tensors.get('running_var') is None:
        return 'it has no running statistics'
    extra = layer._modules.keys() - FOLLOW
    extra |= set() if isinstance(layer, UnifiedNorm) else tensors.keys() - TENSORS
    if extra:
        return f'it has parts of its own: {", ".join(sorted(extra))}'
    if any(hasattr(tensor, 'full_tensor') for tensor in tensors.values()):
        return 'its tensors are sharded; convert the model before you shard it'
    if any(each._backward_hooks or each._post_accumulate_grad_hooks for each in layer.parameters(recurse=False)):
        return 'its parameters have hooks of their own; register them after the conversion'
    return None


def _own_method(layer: nn.Module) -> str | None:
    """A method by which it does not compute, or switch to evaluation, as torch's norms do; ``drop`` and ``act`` of
    timm's, which follow the norm, are known."""
    for name in ('forward', '__call__', 'train', 'eval'):
        if name in vars(layer):
            return name
        owner = next(each for each in type(layer).__mro__ if name in vars(each))
        if owner.__module__.partition('.')[0] == 'timm':
            if owner.__name__ not in TIMM_TYPES.values() or layer._modules.keys() != FOLLOW:
                return name
        elif name == 'forward':
            if owner not in (_BatchNorm, nn.SyncBatchNorm) or layer._modules:
                return name
        elif owner is not nn.Module:
            return name
    return None


# --- the new layer ----------------------------------------------------------------------------------------------------


def _own_options(layer: nn.Module) -> dict[str, Any]:
    """The arguments of a norm of this package, as its constructor takes them."""
    values = {name: getattr(layer, name) for name in _option_names(type(layer)) if hasattr(layer, name)}
    if 'scaling' in values:
        values['scaling'] = layer.scaling is not None
    return values


def _target(layer: nn.Module, norm: type[nn.Module]) -> type[nn.Module]:
    """The type in the place of ``layer``."""
    if not isinstance(layer, (SyncUBN, nn.SyncBatchNorm)):
        return norm
    target = SYNCHRONISED.get(norm, norm)
    if not issubclass(target, (SyncUBN, nn.SyncBatchNorm)):
        raise ValueError(
            f'its batch is that of all processes, and there is no synchronised {norm.__name__}; where a SyncUBN can do '
            'the same, give its options'
        )
    return target


@torch.no_grad()
def _new_layer(layer: Any, name: str, norm: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    """A norm of type ``norm`` in the place of ``layer``, with its function; raises a ValueError where there is none."""
    target = _target(layer, norm)
    names = _option_names(target)
    inherited = _own_options(layer) if isinstance(layer, UnifiedNorm) else {}
    if isinstance(layer, nn.SyncBatchNorm):
        inherited['process_group'] = layer.process_group
    arguments = {key: value for key, value in inherited.items() if key in names} | options
    arguments |= dict(eps=float(layer.eps), momentum=layer.momentum)
    arguments |= dict(device=layer.weight.device, dtype=layer.weight.dtype)
    follow = {key: child for key, child in layer._modules.items() if key in FOLLOW}
    new = _construct(target, layer.num_features, arguments, follow)
    for key, tensor in _converted_tensors(layer, new, name).items():
        if key in new._buffers:
            new._buffers[key] = tensor
        elif tensor is not None:
            new.get_parameter(key).copy_(tensor)
    for key, parameter in new._parameters.items():
        if parameter is not None:
            like = layer._parameters.get(key)
            like = layer.weight if like is None else like  # what a norm adds is treated as its weight
            parameter.requires_grad_(like.requires_grad)
            vars(parameter).update(vars(like))  # marks of the user, as for groups of an optimizer
    new.track_running_stats = layer.track_running_stats  # an attribute that others switch
    new.training = layer.training
    known = vars(type(layer)(1) if isinstance(layer, UnifiedNorm) else nn.SyncBatchNorm(1))
    for key, value in vars(layer).items():
        # The dicts themselves: the handles of the hooks know them.
        if key.endswith(('_hooks', '_hooks_with_kwargs', '_hooks_always_called')) or key == '_is_full_backward_hook':
            vars(new)[key] = value
        elif not key.startswith('_') and key not in known:
            setattr(new, key, value)
    return new


def _construct(
    target: type[nn.Module], channels: int, arguments: dict[str, Any], follow: dict[str, nn.Module]
) -> nn.Module:
    """A fresh layer with its drop and its activation, in the type of timm where it is no norm of this package."""
    if follow and not issubclass(target, UnifiedNorm):
        # Who has such a layer has loaded timm, or read it from a file.
        kind = getattr(sys.modules.get(TIMM_MODULE), TIMM_TYPES[target], None)
        if kind is None:
            raise ValueError(f"it has an activation, as timm's {TIMM_TYPES[target]} does; import timm first")
        target = kind
        arguments = arguments | (dict(apply_act=False) if issubclass(kind, nn.BatchNorm2d) else {})
    new = target(channels, **arguments)
    for key, child in follow.items():
        setattr(new, key, child)
    return new


def _converted_tensors(layer: Any, new: Any, name: str) -> dict[str, Tensor | None]:
    """The parameters and buffers of ``new`` that give it the function of ``layer``; buffers keep their dtypes."""
    tensors = {key: tensor for key, tensor in {**layer._parameters, **layer._buffers}.items() if tensor is not None}
    keys = {key for key, tensor in {**new._parameters, **new._buffers}.items() if tensor is not None}
    if layer.weight.is_meta:
        if isinstance(layer, UnifiedNorm):
            raise ValueError('on the meta device its values are not known')
        return {}  # the new layer is as good: there are no values to convert
    prefix = f'{name}.' if name else ''
    is_ours = isinstance(new, UnifiedNorm)
    norm = read_norm(
        {key: tensor.detach() for key, tensor in tensors.items()},
        find_layout(tensors, prefix),
        prefix,
        layer.num_features,
        getattr(layer, 'calibrate_bias', False),
    )
    target = Target(
        type(new).__name__ if is_ours else 'BatchNorm',
        keys,
        new.scaling if is_ours else None,
        new.kernel_size if is_ours else 1,
        new.calibrate_bias if is_ours else False,
    )
    converted: dict[str, Any] = {key: tensor.clone() for key, tensor in write_norm(norm, target, prefix).items()}
    if 'running_similarity' in keys and 'running_similarity' not in tensors:
        mean = tensors['running_mean']
        converted['running_similarity'] = converted['running_similarity'].to(mean.device, mean.dtype)
    converted.setdefault('num_batches_tracked', None)
    return converted


# --- optimizers that were built before --------------------------------------------------------------------------------

_replaced: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> name of its layer
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@functools.cache
def watch_optimizers() -> None:
    """Let torch ask before each step of an optimizer whether it has parameters that were replaced."""
    register_optimizer_step_pre_hook(_check_parameters)


def _remember(replacements: list[Replacement]) -> None:
    watch_optimizers()
    _checked.clear()
    for name, old, _ in replacements:
        for key, parameter in old.named_parameters(recurse=False):
            _replaced[parameter] = f'{name}.{key}'.removeprefix('.')


def _check_parameters(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _checked:
        return
    for group in optimizer.param_groups:
        for parameter in group['params']:
            if (name := _replaced.get(parameter)) is not None:
                raise RuntimeError(
                    f'{type(optimizer).__name__} was built before convert_norms replaced {name}, so it would train a '
                    'parameter that the model has no more, and none of the new ones: build the optimizer after the '
                    'conversion.'
                )
    _checked.add(optimizer)
