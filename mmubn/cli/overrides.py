"""``--cfg-options``: values for the keys of a config.

An override changes a key that the config has, or adds one. What may be added depends on the dict:

- A dict of which is known what is read of it takes that alone: the top of the config, the dicts of MMEngine's Runner,
  loops and data loaders, and those whose ``type`` is registered and names its arguments.
- Of any other dict nobody can know: without a ``type``, with one that no registry has, or with one that takes any
  arguments. It takes every key but those that look like a mistake: a slip of a key, or a level of the key left out or
  added.

Any other key would change nothing, silently: it is an error, unless a ``+`` before it says that it is meant. So is a
variable of the config, whose value was used where the config was read, and a dict that would become something else.
"""

from __future__ import annotations

import argparse
import difflib
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
NO_LIST = 'an override makes no list of dicts and no dict as a whole; a config file can'
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
    'filter_cfg': {'bbox_min_size', 'filter_empty_gt', 'min_size'},
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
DEFAULT_CONSTRUCTOR = 'DefaultOptimWrapperConstructor'  # others read more of paramwise_cfg
# What is taken out of a dict before its type is given the rest, by the end of its name.
TAKEN_OUT = {
    'conv_cfg': {'fallback_on_stride'},
    'dcn': {'fallback_on_stride'},
    'loss_cls': {'bg_cls_weight'},
    'norm_cfg': {'requires_grad'},
    'optim_wrapper': WRAPPER,
    'param_scheduler': {'convert_to_iter_based', 'epoch_length'},
    'upsample_cfg': {'scale_factor'},
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
        except RecursionError as error:  # of a dict(type=UBN,threshold=0.2), in MMEngine (0.10.7)
            text = 'a dict cannot be given as a whole, but by its keys, as in KEY.type=VALUE KEY.threshold=VALUE'
            raise argparse.ArgumentError(self, text) from error


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
        self.before, self.after, self.name, self.source = cfg._cfg_dict, {}, name, source
        self.scope = cfg.get('default_scope')
        self.imported = getattr(cfg, '_imported_names', ())

    def structure(self, key: str, value: Any, meant: bool) -> None:
        """Whether the key can be set: MMEngine raises in its words, or makes a string of a dict."""
        node, place = self.before, ''
        parts = key.split('.')
        in_list = False
        for i, part in enumerate(parts):
            in_list = isinstance(node, list)
            if in_list:
                if not part.isdigit():
                    from_end = re.fullmatch(r'-\d+', part) is not None
                    rest = key.removeprefix(f'{place}.{part}' if from_end else place)
                    given = f'{place}.{max(len(node) + int(part), 0) if from_end else 0}{rest}'
                    raise self._error(key, f'{place} is a list: name one of its {len(node)} by number, as in {given}')
                if int(part) >= len(node):
                    raise self._error(key, f'{place} is a list of {len(node)}, whose last is {place}.{len(node) - 1}')
                node = node[int(part)]
            elif isinstance(node, dict):
                if part not in node:
                    self._new(key, parts[i:], place, node, meant)
                    if _has_dict(value):
                        raise self._error(key, NO_LIST)
                    return
                node = node[part]
            elif part == DELETE:
                raise self._error(key, f'{place} is {_shown(node)}: only of a dict can keys be deleted')
            else:
                whole = 'give it as a whole' if isinstance(node, tuple) else 'a config file can make it a dict'
                raise self._error(key, f'{place} is {_shown(node)}, which has no keys; {whole}')
            place = f'{place}.{part}' if place else part
        if in_list and not isinstance(value, dict):
            remedy = f'give the whole list, as in {place.rpartition(".")[0]}="[...]"'
            if isinstance(node, dict):
                remedy = f'set its keys, as in {_dict_by_keys(key, value, node)}'
            raise self._error(key, f'an override cannot replace one member of a list; {remedy}')
        if isinstance(node, list) and any(isinstance(each, dict) for each in node) and not _may_be_dicts(value):
            raise self._error(key, f'a list of dicts cannot be given; set their keys, as in {_first_key(key, node)}')
        if isinstance(value, dict) and not isinstance(node, dict) and not value.get(DELETE):
            raise self._error(key, f'{key} is {_shown(node)} and no dict, got {_shown(value)}')
        if isinstance(node, dict) and value is not None and not isinstance(value, dict) and not meant:
            raise self._error(
                key, f'{key} is a dict; set its keys, as in {_dict_by_keys(key, value, node)}', meant=value
            )
        if _has_dict(value):
            raise self._error(key, NO_LIST)

    def _new(self, key: str, parts: list[str], place: str, node: dict, meant: bool) -> None:
        """Whether an override can make the rest of its key."""
        if DELETE in parts[1:]:
            raise self._error(key, f'{key.removesuffix(f".{DELETE}")} is not in the config: there is nothing to delete')
        if meant or not any(part.isdigit() for part in parts):
            return
        if parts[0].isdigit() and place:
            raise self._error(key, f'{place} is a dict and no list; its keys are {_listed(list(node))}')
        what = key[: key.index(next(f'.{part}' for part in parts if part.isdigit()))]
        raise self._error(key, f'{what} is not in the config, and {NO_LIST}')

    def is_read(self, key: str, cfg: Config) -> None:
        """Whether it changes anything, in the config with all overrides."""
        self.after = cfg._cfg_dict
        before, after, place = self.before, self.after, ''
        for part in key.split('.'):
            if isinstance(after, list):
                before = before[int(part)] if isinstance(before, list) and int(part) < len(before) else None
                after = after[int(part)]
            elif part == DELETE or not isinstance(after, dict):
                return
            else:
                if not place and part not in TOP and part in self.before:
                    self._variable(key, part)
                if (before is None or part not in before) and not self._knows(after, place, part, key):
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
        if name == 'paramwise_cfg' and not self._is_default_constructor(owner.rpartition('.')[0]):
            return Arguments(frozenset(read), True)
        kinds = find_kinds(node['type'], self.scope) if node.get('type') is not None else []
        if not kinds:
            return Arguments(frozenset(read), False) if read else None
        each = [arguments_of(kind) for kind in kinds]
        taken_out = [names for end, names in TAKEN_OUT.items() if name.endswith(end)]
        names = read.union(*taken_out, *(arguments.names for arguments in each))
        return Arguments(frozenset(names | {'type', '_scope_'}), any(arguments.takes_any for arguments in each))

    def _is_default_constructor(self, place: str) -> bool:
        kind = (_get(self.after, place) or {}).get('constructor') or DEFAULT_CONSTRUCTOR
        return getattr(kind, '__name__', str(kind)).rpartition('.')[2] == DEFAULT_CONSTRUCTOR

    def _knows(self, node: dict, place: str, part: str, key: str) -> bool:
        if place == 'default_hooks' and isinstance(node[part], dict) and 'type' in node[part]:
            return True  # any name will do
        arguments = self._arguments(node, place)
        if arguments is not None and (part in arguments.names or not arguments.takes_any):
            return part in arguments.names
        names = {str(each) for each in node} | (arguments.names if arguments is not None else set())
        if any(_is_slip(part, name) for name in names):
            return False
        # A dict that is new itself has no mistakes of levels: what is above it is right, or there was an error already.
        return arguments is not None or _get(self.before, place) is None or not self._slips(place, part, key)

    def _slips(self, place: str, part: str, key: str) -> list[str]:
        """The keys that a new one of a dict of which nobody knows what is read may stand for."""
        rest = key[len(place) + 1 :]
        below = [each for each, _ in _places(_get(self.before, place), place)]
        below = [each for each in below if not re.search(r'\.\d', each[len(place) :])]  # one of a list is apart
        found = [each for each in below if each.endswith(f'.{rest}')]  # a level is left out
        owner = place.rpartition('.')[0]
        above = _get(self.before, owner)
        if not found and isinstance(above, dict) and part in above and self._arguments(above, owner) is None:
            found = [f'{owner}.{rest}']  # there is one too many
        found = found or [each for each in below if _is_slip(rest, each.rpartition('.')[2])]
        if not found:  # of dicts of this name elsewhere: decoder.layer_cfg.self_attn_cfg
            ending = f'.{place.rpartition(".")[2]}'
            alike = [each for name, each in self._places() if name.endswith(ending) and isinstance(each, dict)]
            names = {str(name) for each in alike for name in each}
            found = [f'{place}.{each}' for each in sorted(names) if part not in names and _is_slip(part, each)]
        return found

    def _variable(self, key: str, part: str) -> None:
        value = self.before[part]
        used = [
            f'{place}{key.removeprefix(part)}'
            for place, each in self._places()
            if place.partition('.')[0] in TOP and type(each) is type(value) and each == value
            if _is_telling(part, place, each)
        ]
        used = used or sorted(place for place, _ in self._places() if place.endswith(f'.{key}'))
        remedy = 'set the keys that were made from it, here or in a config that inherits this one'
        if used:
            remedy = f'set {_listed(used)}'
        raise self._error(key, f'{part} was used when the config was read, and changes nothing now; {remedy}', '...')

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
        for name in resembling(part, names, cutoff=0.7) or sorted(each for each in names if _is_slip(part, each)):
            right = f'{place}.{name}' if place else name
            found += [f'{right}{rest}'] if not rest or f'{right}{rest}' in places else resembling(right + rest, places)
        found = found or (self._slips(place, part, key) if place and arguments is None else [])
        for tail in (key, part + rest):
            inside = [each for each in places if each.startswith(f'{place}.') or not place or tail == key]
            ends = [each for each in inside if each.endswith(f'.{tail}')]
            found = found or sorted(ends, key=lambda each: (len(each), each))
        if not found and not rest:  # one of a dict that could be here
            inside = [(owner, name) for owner in sorted(names & READ_OF.keys()) for name in READ_OF[owner]]
            best = resembling(part, {name for _, name in inside}, cutoff=0.7)
            found = [_joined(place, owner, name) for owner, name in inside if name in best]
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


def _get(node: Any, place: str) -> Any:
    for part in place.split('.') if place else ():
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node


def _is_slip(one: str, other: str) -> bool:
    """Whether it is the other name but for a letter; stage1 and stage2 are both right."""
    one, other = one.lower(), other.lower()
    if one[:1] != other[:1] or re.findall(r'\d', one) != re.findall(r'\d', other):
        return False
    longest = max(len(one), len(other))
    same = sum(block.size for block in difflib.SequenceMatcher(None, one, other, False).get_matching_blocks())
    return one != other and longest > 2 and longest - same <= 1


def _may_be_dicts(value: Any) -> bool:
    """Whether it can take the place of a list of dicts: one from Python, or nothing, or a dict of keys to change."""
    is_list = isinstance(value, list) and all(isinstance(each, dict) for each in value)
    return not value or isinstance(value, dict) or is_list


def _has_dict(value: Any) -> bool:
    """Whether it was written as a dict, or a list with one; the parser makes strings of dicts."""
    if isinstance(value, (list, tuple)):
        return any(_has_dict(each) for each in value)
    return isinstance(value, str) and re.match(r'dict\(|\{', value) is not None


def _places(node: Any, place: str) -> Iterator[tuple[str, Any]]:
    yield place, node
    items: Iterable = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _places(value, f'{place}.{key}')


def _is_telling(name: str, place: str, value: Any) -> bool:
    """Whether a key that has the value of a variable has it from there: not every 4 is the number of classes."""
    if isinstance(value, (dict, list, tuple)) or (isinstance(value, str) and len(value) > 3):
        return True
    return place.endswith(name) or name.endswith(f'_{place.rpartition(".")[2]}')  # base_lr


def _joined(*parts: str) -> str:
    return '.'.join(filter(None, parts))


def _first_key(key: str, node: list) -> str:
    """Of the first dict in a list, with its value."""
    i = next(i for i, each in enumerate(node) if isinstance(each, dict))
    return f'{key}.{i}.{next(iter(node[i]), "KEY")}=VALUE'


def _listed(names: list[str], last: str = 'and') -> str:
    names = names[:4]
    return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} {last} {names[-1]}'


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f'{text[:60]}...'


def _dict_by_keys(key: str, value: Any, node: dict) -> str:
    """``norm_cfg=type=UBN,threshold=0.2``, ``norm_cfg=dict(type=UBN)`` and ``norm_cfg=UBN`` as they are written."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if len(values) == 1 and isinstance(values[0], str) and (inside := re.fullmatch(r'dict\((.*)\)', values[0])):
        values = [inside[1]]
    if all(isinstance(each, str) and '=' in each for each in values):
        return ' '.join(f'{key}.{each.strip("{} ")}' for each in values)
    if 'type' in node and isinstance(value, str) and value.isidentifier():
        return f'{key}.type={value}'
    return f'{key}.{next(iter(node), "KEY")}=VALUE'
