"""State-dict layouts of norm layers, and how to recognise one by its keys. docs/checkpoints.md shows the table."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ['FACTORS', 'INITIAL_SCALE_BIAS', 'LAYOUTS', 'CheckpointError', 'Layout', 'find_layout', 'is_state_dict']


class CheckpointError(ValueError):
    """Entries of a checkpoint that no norm layer has, or that this one cannot take over exactly."""


class Layout(NamedTuple):
    """How an implementation names and shapes the tensors of a norm layer."""

    title: str
    keys: tuple[str, ...]  # besides running_mean, running_var and, optionally, num_batches_tracked
    options: tuple[tuple[str, ...], ...] = ()  # groups of keys that depend on the layer's arguments
    names: Mapping[str, str] = MappingProxyType({})  # our name of a key, where it is another
    scaling: str | None = None  # what its factor r depends on, where it has a scale_weight: a key of FACTORS
    calibrates_bias: bool | None = False  # whether r multiplies the bias too; None: the argument calibrate_bias says
    released: bool = False  # that of the authors' code, with vectors of (1, C, 1, 1); (C,) is read too
    # Whether a layer with more tensors may start from this layout. If not, it refuses these keys: they may be its own
    # with a tensor lost.
    is_start: bool = True


AFFINE = ('weight', 'bias')
SCALE = ('scale_weight', 'scale_bias')
RECTIFICATIONS = ('center_weight', *SCALE)
CONVOLUTION = {'bnconv.weight': 'kernel', 'bnconv.bias': 'bias'}
READJUST = {'weight_readjust': 'scale_weight', 'bias_readjust': 'scale_bias'}
# The name is that of the converter's --to.
LAYOUTS = {
    'bn': Layout('BatchNorm', AFFINE),
    'rbn': Layout('RBN', (*AFFINE, *RECTIFICATIONS), scaling='rectified'),
    'bnet': Layout('BNET', (*AFFINE, 'neighbor_weight')),
    'iebn': Layout('IEBN', (*AFFINE, *SCALE), scaling='instance', is_start=False),
    'unitizedbn': Layout('UnitizedBN', (*AFFINE, 'scale_weight'), scaling='unitized', is_start=False),
    'ubn': Layout(
        'UBN',
        (*AFFINE, 'running_similarity'),
        options=(('neighbor_weight',), ('center_weight',), SCALE),
        scaling='rectified',
        calibrates_bias=None,
        is_start=False,
    ),
    'rbn-released': Layout('released RBN', (*AFFINE, *RECTIFICATIONS), scaling='rectified', released=True),
    'bnet-released': Layout('released BNET', tuple(CONVOLUTION), names=CONVOLUTION, released=True),
    'iebn-released': Layout('released IEBN', (*AFFINE, *READJUST), names=READJUST, scaling='instance', released=True),
    'ubn-released': Layout(
        'released UBN',
        (*RECTIFICATIONS, *CONVOLUTION),
        names=CONVOLUTION,
        scaling='rectified',
        calibrates_bias=True,
        released=True,
    ),
}
VECTORS = (*AFFINE, *RECTIFICATIONS, *READJUST)
STATISTICS = ('running_mean', 'running_var')
BATCH_COUNT = 'num_batches_tracked'
SCALARS = ('running_similarity', BATCH_COUNT)

# What the factor r of each kind of scaling depends on; with a scale_weight of zeros it is a constant.
FACTORS = {
    'rectified': 'the mean of the normalised input',
    'instance': 'the mean of the raw input',
    'unitized': 'the length of the normalised input',
}
# w_b of a fresh layer, where its kind of scaling has one: r is then the sigmoid of this, and 1 where it has none.
INITIAL_SCALE_BIAS = {'rectified': 1.0, 'instance': -1.0}


@functools.cache
def layouts_by_keys(released: bool) -> dict[frozenset[str], Layout]:
    """The layouts by their keys: all, or the released ones alone. RBN has the same keys in both forms."""
    layouts: dict[frozenset[str], Layout] = {}
    for layout in LAYOUTS.values():
        if layout.released or not released:
            for chosen in itertools.product((False, True), repeat=len(layout.options)):
                options = itertools.chain(*itertools.compress(layout.options, chosen))
                layouts.setdefault(frozenset({*layout.keys, *options, *STATISTICS}), layout)
    return layouts


def find_layout(tensors: Mapping[str, Any], prefix: str) -> Layout:
    """The layout that has exactly these keys."""
    present = frozenset(tensors) - {BATCH_COUNT}
    # RBN's entries without center_weight have IEBN's keys, but not, as released, its shapes.
    released = any(getattr(tensors[key], 'ndim', 0) == 4 for key in present.intersection(VECTORS))
    layouts = layouts_by_keys(released)
    if present in layouts:
        return layouts[present]
    # Of several as near, the one that lacks keys rather than the one that has too many.
    nearest = min(layouts, key=lambda keys: (len(keys ^ present), len(present - keys)))
    wrong = [f'{prefix}{key} is missing' for key in sorted(nearest - present)]
    wrong += [f'{prefix}{key} is none of its keys' for key in sorted(present - nearest)]
    shapes = ' with vectors of shape (1, C, 1, 1)' if released else ''
    raise CheckpointError(
        f'the norm layer {prefix[:-1]!r} has the keys of no layout{shapes} that mmubn reads; the nearest, '
        f'{layouts[nearest].title}, has {listed(nearest)}, but {", ".join(wrong)}: got {listed(present)}.'
    )


def listed(keys: Iterable[str]) -> str:
    """Keys in alphabetical order, for errors."""
    return ', '.join(sorted(keys))


def is_state_dict(value: object) -> bool:
    """Whether this can be a state dict: names, and tensors among what they name."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, Tensor) for item in value.values())
    )
