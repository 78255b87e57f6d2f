"""``--cfg-options``: values for the keys of a config.

The rule: an override changes a key that the config has, or adds an argument that is known to be read: one that the
``type`` of its dict takes, one of MMEngine's Runner, loops and data loaders, or one of the tools. Any other key would
change nothing, silently: it is an error, unless a ``+`` before it says that it is meant. So is a variable of the
config, whose value was used where the config was read, and a dict that would become something else.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import (
    EpochBasedTrainLoop,
    FlexibleRunner,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
)
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from mmubn.cli.errors import UsageError
from mmubn.cli.messages import in_one_line
from mmubn.openmmlab.arguments import Arguments, arguments_of, find_kinds, resembling

__all__ = ['OverrideAction', 'override']

MEANT = '+'
DELETE = '_delete_'
# Keys that MMEngine (0.10), MMDetection's and MMPretrain's tools and the tools here read beside the Runner's arguments.
READ_AT_THE_TOP = {
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'detect_anomalous_params',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'init_weights_for_test_or_val',
    'model_wrapper_cfg',
    'runner_type',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
}


def _names(*kinds: object) -> set[str]:
    return set().union(*(arguments_of(kind).names for kind in kinds))


TOP = (_names(Runner, FlexibleRunner) | READ_AT_THE_TOP) - {'cfg'}
DATALOADER = _names(DataLoader) | {'num_batch_per_epoch'}
WRAPPER = _names(OptimWrapper, AmpOptimWrapper) | {'constructor', 'paramwise_cfg', 'type'}
# Dicts that may be without a type, by their name, and what is read of them.
READ_OF = {
    'auto_scale_lr': {'base_batch_size', 'enable'},
    'clip_grad': _names(clip_grad_norm_, clip_grad_value_) - {'parameters'} | {'type'},
    'custom_imports': {'allow_failed_imports', 'imports'},
    'default_hooks': {'checkpoint', 'logger', 'param_scheduler', 'runtime_info', 'sampler_seed', 'timer'},
    'dist_cfg': {'backend', 'init_backend', 'init_method', 'timeout'},
    'env_cfg': {'cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'},
    'filter_cfg': {'filter_empty_gt', 'min_size'},
    'log_processor': _names(LogProcessor) | {'type'},
    'metainfo': {'classes', 'palette', 'stuff_classes', 'thing_classes'},
    'mp_cfg': {'mp_start_method', 'opencv_num_threads'},
    'optim_wrapper': WRAPPER,
    'paramwise_cfg': {
        'bias_decay_mult',
        'bias_lr_mult',
        'bypass_duplicate',
        'custom_keys',
        'dcn_offset_lr_mult',
        'dwconv_decay_mult',
        'flat_decay_mult',
        'norm_decay_mult',
    },
    'randomness': set(inspect.signature(Runner.set_randomness).parameters) - {'self'},
    'test_cfg': _names(TestLoop) | {'type'},
    'test_dataloader': DATALOADER,
    'train_cfg': _names(EpochBasedTrainLoop, IterBasedTrainLoop) | {'by_epoch', 'type'},
    'train_dataloader': DATALOADER,
    'val_cfg': _names(ValLoop) | {'type'},
    'val_dataloader': DATALOADER,
}
TOP_ONLY = {'test_cfg', 'train_cfg', 'val_cfg'}  # inside of a model they are its own
# What is taken out of a dict before its type is given the rest.
TAKEN_OUT = {
    'conv_cfg': {'fallback_on_stride'},
    'norm_cfg': {'requires_grad'},
    'optim_wrapper': WRAPPER,
    'param_scheduler': {'convert_to_iter_based', 'epoch_length'},
}


class OverrideAction(DictAction):
    """MMEngine's DictAction, whose errors are those of the command line; a key may have a ``+`` before it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        for each in values or ():
            key, equals, _ = each.partition('=')
            if not equals or not all(key.removeprefix(MEANT).split('.')) or key != key.strip():
                raise argparse.ArgumentError(self, f'{each!r} is not KEY=VALUE (without blanks around the =)')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:  # brackets that do not match
            raise argparse.ArgumentError(self, in_one_line(str(error))) from error


def override(cfg: Config, options: dict[str, Any], source: str, name: str = '--cfg-options') -> None:
    """Give the keys of ``cfg`` other values.

    Args:
        cfg: The config.
        options: Dotted keys and values, as in ``{'model.backbone.norm_cfg.type': 'UBN'}``; a key that starts with ``+``
            is added whether or not anything reads it.
        source: Where the config is from, for the errors.
        name: What the errors call ``options``.

    Raises:
        UsageError: Names the key, and those that it resembles.
    """
    check = _Check(cfg, name, source)
    keys = {key: key.removeprefix(MEANT) for key in options}
    for key, value in options.items():
        check.structure(keys[key], value, meant=key.startswith(MEANT))
    try:
        cfg.merge_from_dict({keys[key]: value for key, value in options.items()})
    except Exception as error:  # two overrides that exclude each other: a=1 a.b=2
        raise UsageError(f'{name} {", ".join(options)} do not fit {source}: {in_one_line(str(error))}') from error
    for key in options:
        if not key.startswith(MEANT):
            check.is_read(key, cfg)


class _Check:
    """Of the keys of one command line."""

    def __init__(self, cfg: Config, name: str, source: str) -> None:
        self.before, self.name, self.source = cfg._cfg_dict, name, source
        self.scope = cfg.get('default_scope')
        self.imported = getattr(cfg, '_imported_names', ())

    def structure(self, key: str, value: Any, meant: bool) -> None:
        """Whether the key can be set: MMEngine raises in its words, or makes a string of a dict."""
        node, place = self.before, ''
        parts = key.split('.')
        for i, part in enumerate(parts):
            if isinstance(node, list):
                if not part.isdigit():
                    given = f'{place}.0{key.removeprefix(place)}'
                    raise self._error(key, f'{place} is a list: name one of its {len(node)} by number, as in {given}')
                if int(part) >= len(node):
                    raise self._error(key, f'{place} is a list of {len(node)}, whose last is {place}.{len(node) - 1}')
                node = node[int(part)]
            elif isinstance(node, dict):
                if part not in node:
                    self._new(key, parts[i:], place, node, meant)
                    return
                node = node[part]
            elif part == DELETE:
                raise self._error(key, f'{place} is {_shown(node)}: only of a dict can keys be deleted')
            else:
                whole = 'give it as a whole' if isinstance(node, tuple) else 'a config file can make it a dict'
                raise self._error(key, f'{place} is {_shown(node)}, which has no keys; {whole}')
            place = f'{place}.{part}' if place else part
        if isinstance(value, dict) and not isinstance(node, dict) and not value.get(DELETE):
            raise self._error(key, f'{key} is {_shown(node)} and no dict, got {_shown(value)}')
        if isinstance(node, dict) and value is not None and not isinstance(value, dict) and not meant:
            raise self._error(
                key, f'{key} is a dict; set its keys, as in {_dict_by_keys(key, value, node)}', meant=value
            )

    def _new(self, key: str, parts: list[str], place: str, node: dict, meant: bool) -> None:
        """Whether an override can make the rest of its key."""
        if DELETE in parts[1:]:
            raise self._error(key, f'{key.removesuffix(f".{DELETE}")} is not in the config: there is nothing to delete')
        if meant or not any(part.isdigit() for part in parts):
            return
        if parts[0].isdigit() and place:
            raise self._error(key, f'{place} is a dict and no list; its keys are {_listed(list(node))}')
        what = key[: key.index(next(f'.{part}' for part in parts if part.isdigit()))]
        raise self._error(
            key, f'{what} is not in the config, and an override makes no list of dicts; a config file can'
        )

    def is_read(self, key: str, cfg: Config) -> None:
        """Whether it changes anything, in the config with all overrides."""
        before, after, place = self.before, cfg._cfg_dict, ''
        for part in key.split('.'):
            if isinstance(after, list):
                before = before[int(part)] if isinstance(before, list) and int(part) < len(before) else None
                after = after[int(part)]
            elif part == DELETE or not isinstance(after, dict):
                return
            else:
                if not place and part not in TOP and part in self.before:
                    self._variable(key, part)
                if (before is None or part not in before) and not self._knows(after, place, part):
                    self._unknown(key, after, place, part)
                before = before.get(part) if before is not None else None
                after = after[part]
            before = before if isinstance(before, (dict, list)) else None
            place = f'{place}.{part}' if place else part

    def _arguments(self, node: dict, place: str) -> Arguments | None:
        """What is read of a dict; None where nothing says so."""
        if not place:
            return Arguments(frozenset(TOP), False)
        owner = re.sub(r'\.\d+$', '', place)
        name = owner.rpartition('.')[2]
        read = set(READ_OF.get(name, ())) if name not in TOP_ONLY or name == owner else set()
        kinds = find_kinds(node['type'], self.scope) if node.get('type') is not None else []
        if not kinds:
            return Arguments(frozenset(read), False) if read else None
        each = [arguments_of(kind) for kind in kinds]
        names = read.union(TAKEN_OUT.get(name, ()), *(arguments.names for arguments in each))
        return Arguments(frozenset(names | {'type', '_scope_'}), any(arguments.takes_any for arguments in each))

    def _knows(self, node: dict, place: str, part: str) -> bool:
        if place == 'default_hooks' and isinstance(node[part], dict) and 'type' in node[part]:
            return True  # any name will do
        arguments = self._arguments(node, place)
        if arguments is None:
            # A dict that is new itself: what is above it is read, or there was an error already.
            return self._get(place) is None or (part == 'type' and not place)
        if arguments.takes_any and part not in arguments.names:
            return not resembling(part, (set(node) | arguments.names) - {part}, cutoff=0.8)
        return part in arguments.names

    def _get(self, place: str) -> Any:
        node: Any = self.before
        for part in place.split('.'):
            if isinstance(node, dict):
                node = node.get(part)
            elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            else:
                return None
        return node

    def _variable(self, key: str, part: str) -> None:
        value = self.before[part]
        used = [
            f'{place}{key.removeprefix(part)}'
            for place, each in self._places()
            if place.partition('.')[0] in TOP and type(each) is type(value) and each == value
            if _is_telling(part, place, each)
        ]
        used = used or sorted(place for place, _ in self._places() if place.endswith(f'.{key}'))
        remedy = f'set {_listed(used)}' if used else 'set the keys that have its value'
        raise self._error(key, f'{part} is a variable of the config, which was read already; {remedy}', meant='...')

    def _unknown(self, key: str, node: dict, place: str, part: str) -> None:
        kind = getattr(node.get('type'), '__name__', node.get('type')) if place else None
        if kind is None:
            what = f'the config has no {part}' if not place else f'{place} has no {part}'
        else:
            what = f'{place} ({kind}) has no argument {part}'
        suggestions = self._suggestions(key, node, place, part)
        question = f'; did you mean {_listed(suggestions, "or")}?' if suggestions else ''
        raise self._error(key, what + question, meant='...')

    def _suggestions(self, key: str, node: dict, place: str, part: str) -> list[str]:
        arguments = self._arguments(node, place)
        names = {str(each) for each in node if not place or each != part} | (arguments.names if arguments else set())
        names -= {part, DELETE, *(self.imported if not place else ())}
        if not place:
            names &= TOP
        rest = key[len(place) + 1 if place else 0 :].removeprefix(part)
        places = {each for each, _ in self._places() if each.partition('.')[0] in TOP}
        found = []
        for name in resembling(part, names, cutoff=0.7):
            right = f'{place}.{name}' if place else name
            found += [f'{right}{rest}'] if not rest or f'{right}{rest}' in places else resembling(right + rest, places)
        if not found:
            found = sorted((each for each in places if each.endswith(f'.{key}')), key=lambda each: (len(each), each))
        if not found:
            last = key.rpartition('.')[2]
            alike = {each for each in places if resembling(last, [each.rpartition('.')[2]], cutoff=0.7)}
            found = resembling(key, alike, count=3, cutoff=0.7)
        return list(dict.fromkeys(found))[:3]

    def _places(self) -> Iterator[tuple[str, Any]]:
        """All keys of the config, dotted, and their values."""
        for key, value in dict.items(self.before):
            if key not in self.imported:
                yield from _places(value, key)

    def _error(self, key: str, text: str, meant: Any = None) -> UsageError:
        add = f' (+{key}={meant} sets it all the same)' if meant is not None else ''
        return UsageError(f'{self.name} {key}: {text}{add}. The config is {self.source}.')


def _places(node: Any, place: str) -> Iterator[tuple[str, Any]]:
    yield place, node
    items: Iterable = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _places(value, f'{place}.{key}')


def _is_telling(name: str, place: str, value: Any) -> bool:
    """Whether a key that has the value of a variable has it from there: not every 4 is the number of classes."""
    return isinstance(value, (dict, list, tuple)) or (isinstance(value, str) and len(value) > 3) or place.endswith(name)


def _listed(names: list[str], last: str = 'and') -> str:
    names = names[:4]
    return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} {last} {names[-1]}'


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f'{text[:60]}...'


def _dict_by_keys(key: str, value: Any, node: dict) -> str:
    """``norm_cfg=type=UBN,threshold=0.2`` and ``norm_cfg=UBN`` as they are written."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if all(isinstance(each, str) and '=' in each for each in values):
        return ' '.join(f'{key}.{each.strip("{} ")}' for each in values)
    if 'type' in node and isinstance(value, str) and value.isidentifier():
        return f'{key}.type={value}'
    return f'{key}.{next(iter(node), "KEY")}=VALUE'
