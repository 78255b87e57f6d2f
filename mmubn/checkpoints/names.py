"""Names of layers: the authors' networks of BNET have ``bnet3`` where others have ``bn3``.

A norm reads the layouts of :data:`~mmubn.checkpoints.layouts.LAYOUTS` under its own name. Entries under the name that
BNET's authors gave the layer are found here, for whoever holds the entries of the module that the norm is in.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from mmubn.checkpoints.layouts import CheckpointError, listed

__all__ = ['find_released_names', 'has_own_name', 'released_name', 'rename_released', 'with_own_names']

# bnet3.running_mean and bnet3.bnconv.weight; in files from before, bnconv3.weight beside bn3.running_mean.
RELEASED = re.compile(r'((?:.*\.)?)bnet(\d*)\.((?:bnconv\.)?[^.]+)')
RELEASED_BEFORE = re.compile(r'((?:.*\.)?)bnconv(\d+)\.(weight|bias)')


def has_own_name(name: str) -> bool:
    """Whether a norm of this name has another one in BNET's networks: ``bn``, ``bn1``, ``bn2``, ..."""
    return re.fullmatch(r'bn\d*', name) is not None


def released_name(prefix: str) -> str:
    """``layer1.0.bnet3.`` for ``layer1.0.bn3.``; a layer that is not called ``bn`` and a number keeps its name."""
    return re.sub(r'(^|\.)bn(\d*)\.$', r'\1bnet\2.', prefix)


def find_released_names(
    keys: Iterable[str], is_norm: Callable[[str, str], bool] = lambda parent, number: True
) -> dict[str, str]:
    """The keys in ``keys`` that are under the names of BNET's networks, each with its own name.

    Args:
        keys: Of a state dict.
        is_norm: Whether, in the module ``parent`` (``'layer1.0.'``), the norm of this ``number`` (``'3'``) is to be
            found under its own name, ``bn3``. By default: each.

    Raises:
        CheckpointError: A norm has entries under both names, as in a file that was renamed in part.
    """
    keys = list(keys)
    found: dict[str, str] = {}
    for key in keys:
        match, between = RELEASED.fullmatch(key), ''
        if match is None:
            match, between = RELEASED_BEFORE.fullmatch(key), 'bnconv.'
        if match is not None and is_norm(match[1], match[2]):
            own = f'{match[1]}bn{match[2]}.'
            if not between and (twice := [other for other in keys if other.startswith(own)]):
                name = f'{match[1]}bnet{match[2]}.'
                others = [other[len(name) :] for other in keys if other.startswith(name)]
                raise CheckpointError(
                    f'one norm has entries under two names, {own[:-1]} ({listed(each[len(own) :] for each in twice)}) '
                    f'and {name[:-1]} ({listed(others)}), as in a file that was renamed in part: expected one name for '
                    'all entries of a layer, the second being that of the networks of BNET; take the original file.'
                )
            found[key] = f'{own}{between}{match[3]}'
    return found


def rename_released(
    state_dict: MutableMapping[str, Any], is_norm: Callable[[str, str], bool] = lambda parent, number: True
) -> None:
    """Give the entries of ``state_dict`` that :func:`find_released_names` finds their own names, in place."""
    for key, own in find_released_names(state_dict, is_norm).items():
        state_dict[own] = state_dict.pop(key)


def with_own_names(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict without the names of BNET's networks, in the same order; itself where it has none."""
    names = find_released_names(state_dict)
    if not names:
        return state_dict
    renamed = OrderedDict((names.get(key, key), value) for key, value in state_dict.items())
    metadata = getattr(state_dict, '_metadata', None)
    if metadata is not None:
        renamed._metadata = metadata  # type: ignore[attr-defined] # as state_dict() of a module has it
    return renamed
