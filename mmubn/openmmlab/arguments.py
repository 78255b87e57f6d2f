"""Which arguments the ``type`` of a dict of a config takes, and what a name that is none of them may be a slip of."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from typing import NamedTuple

from mmengine import registry as registries
from mmengine.registry import MODELS, Registry

from mmubn.openmmlab.config_types import find_type

__all__ = ['Arguments', 'arguments_of', 'did_you_mean', 'find_kinds', 'registered_names', 'resembling']

ROOTS = [each for each in vars(registries).values() if isinstance(each, Registry)]


class Arguments(NamedTuple):
    """Of a class or function.

    Attributes:
        names: Of the arguments that it names.
        takes_any: Whether it takes arguments of other names too.
    """

    names: frozenset[str]
    takes_any: bool


def arguments_of(kind: object) -> Arguments:
    """The arguments of a class, with those that its ``**kwargs`` hand to its bases, or of a function."""
    names: set[str] = set()
    passed_over = ''  # the base whose constructor, with those before it, is left out
    for each in kind.__mro__ if isinstance(kind, type) else (kind,):
        function = each
        if isinstance(kind, type):
            if passed_over or '__init__' not in vars(each):
                passed_over = '' if each.__name__ == passed_over else passed_over
                continue
            if each is object:
                break
            function = each.__init__
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # built in
            break
        parameters = parameters[1:] if isinstance(kind, type) else parameters
        names.update(one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD))
        rest = [one.name for one in parameters if one.kind == one.VAR_KEYWORD]
        if not rest:
            return Arguments(frozenset(names), False)
        if isinstance(kind, type):
            owner = _hands_on(function, rest[0])
            if owner is None:
                break
            passed_over = owner if owner != each.__name__ else ''
    return Arguments(frozenset(names), True)


def _hands_on(function: object, rest: str) -> str | None:
    """Whether the ``**rest`` of a constructor go to its base: a wrapper of another library gives them to that.

    Returns:
        ``'OWNER'`` of ``super(OWNER, self)``, empty for ``super()``; None where they go elsewhere.
    """
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return None
    call = re.search(rf'super\((\w*)[^()]*\)\.__init__\((?:[^()]|\([^()]*\))*\*\*{rest}\b', source)
    return call[1] if call is not None else None


def find_kinds(kind: object, scope: str | None) -> list[object]:
    """What a ``type`` may stand for: itself or, of a name, what each of MMEngine's registries has under it."""
    if not isinstance(kind, str):
        return [each for each in [find_type(kind, MODELS)] if each is not None]
    with contextlib.suppress(ImportError):
        importlib.import_module(f'{scope}.registry')
    found = []
    for root in ROOTS:
        each = find_type(kind, root.children.get(scope, root))
        if each is not None and each not in found:
            found.append(each)
    return found


def registered_names(registry: Registry | None) -> list[str]:
    """Those of ``registry`` and of its parents."""
    names: list[str] = []
    while registry is not None:
        names += registry.module_dict
        registry = registry.parent
    return names


def resembling(name: str, names: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Those of ``names`` that ``name`` may be a slip of, the likeliest first."""
    folded = {each.lower(): each for each in sorted(names)}
    return [folded[each] for each in difflib.get_close_matches(name.lower(), folded, count, cutoff)]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``'; did you mean NAME?'``, or nothing."""
    return ''.join(f'; did you mean {each}?' for each in resembling(name, names))
