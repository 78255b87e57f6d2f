"""Reading any layout into a layer, as ``load_state_dict`` calls it, and counting what was read."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from mmubn.checkpoints.conversion import (
    Norm,
    Target,
    bias_depends_on_factor,
    different_factors,
    entries_under,
    read_norm,
    write_norm,
)
from mmubn.checkpoints.layouts import BATCH_COUNT, STATISTICS, CheckpointError, find_layout, layouts_by_keys, listed

__all__ = ['convert_state', 'counted_reads', 'report_reads']


@torch.no_grad()
def convert_state(
    name: str, shapes: Mapping[str, tuple[int, ...]], target: Target, state_dict: dict, prefix: str
) -> bool:
    """Turn what ``state_dict`` holds under ``prefix``, in any layout, into the layer's own entries.

    The layer then computes the function of the layer that was saved, in training as long as the gate of a UBN is open
    (the running similarity starts at 1 where the layout has none). There is one exception, with a warning: a released
    UBN, whose factor r multiplies the bias too, in a UBN without ``calibrate_bias``.

    The layer's own entries are left as they are (neighbor taps of (C, k*k - 1) are made flat), and so is a state dict
    without any key under ``prefix``: torch then reports the missing keys as usual.

    Args:
        name: Type of the layer that will load the entries, for errors and :func:`counted_reads`.
        shapes: Of the parameters and buffers of the layer, by name: its own layout.
        target: The function that the layer can have, and its own keys.
        state_dict: Modified in place, as ``load_state_dict`` allows: it passes a copy. The tensors are not written to.
        prefix: Name of the layer in the state dict, with the trailing dot.

    Returns:
        Whether the entries were of another layout.

    Raises:
        CheckpointError: The entries are of no layout, of another number of channels, or of a function that the layer
            does not have. Names the key, what is expected and what was received.
    """
    tensors = entries_under(state_dict, prefix)
    if not tensors:
        _count(name, None)
        return False
    _flatten_neighbors(shapes, tensors, state_dict, prefix)
    found = {key: getattr(tensor, 'shape', None) for key, tensor in tensors.items()}
    # The count of batches may be missing, as in checkpoints of old versions of torch.
    if {BATCH_COUNT: (), **shapes} == {BATCH_COUNT: (), **found}:
        own = layouts_by_keys(released=False).get(frozenset(shapes) - {BATCH_COUNT})
        _count(name, own.title if own else name)
        return False

    (channels,) = shapes['weight']
    if 'running_mean' not in shapes:
        # A layer without running statistics: those of fresh ones stand in for the conversion. Where the entries have
        # some, these stay in the state dict, and torch reports them as unexpected, as for a BatchNorm.
        like = tensors.get('weight', next(iter(tensors.values())))
        tensors = {'running_mean': like.new_zeros(channels), 'running_var': like.new_ones(channels), **tensors}
    layout = find_layout(tensors, prefix)
    norm = read_norm(tensors, layout, prefix, channels, target.calibrates_bias)
    _check_complete(norm, target, tensors, prefix)
    gated = 'running_similarity' in shapes
    approximate = gated and norm.calibrated and not target.calibrates_bias and bias_depends_on_factor(norm, target)
    title = layout.title
    if layout.calibrates_bias is None and gated:
        title += ' of other arguments'
    elif layout.calibrates_bias is None and norm.factor.scaling is not None:
        title += ' taken to be without calibrate_bias'
    if approximate:
        title += ', its bias approximately'
        # The same words for every layer, so that Python shows them once.
        warnings.warn(
            f'The checkpoint is of {layout.title}, whose scaling factor multiplies the bias too; in this {name} it '
            'does not, so its function differs: bias times the factor of an average sample, sigmoid(scale_bias), was '
            'loaded. Set calibrate_bias=True in norm_cfg for exactly the same function.',
            stacklevel=4,
        )
    entries = write_norm(norm, target, prefix, approximate)
    for key in tensors:
        if key not in STATISTICS or key in shapes:
            state_dict.pop(prefix + key, None)
    state_dict.update({prefix + key: tensor for key, tensor in entries.items() if key in target.keys})
    _count(name, title)
    return True


def _flatten_neighbors(shapes: Mapping, tensors: dict, state_dict: dict, prefix: str) -> None:
    """The neighbor taps of version 2 of the layers, (C, k*k - 1), as they are now: (C * (k*k - 1),)."""
    old, shape = tensors.get('neighbor_weight'), shapes.get('neighbor_weight')
    if old is not None and shape is not None and getattr(old, 'ndim', 0) == 2 and shape == (old.numel(),):
        tensors['neighbor_weight'] = state_dict[prefix + 'neighbor_weight'] = old.reshape(-1)


def _check_complete(norm: Norm, target: Target, tensors: Mapping, prefix: str) -> None:
    """Refuse entries that may be the layer's own with a tensor lost, though they are those of another layout."""
    present = tensors.keys() - {BATCH_COUNT}
    lost = target.keys - present - {BATCH_COUNT}
    if norm.layout.is_start or not lost or not present < target.keys:
        return
    if norm.layout.calibrates_bias is None:
        remedy = 'Give norm_cfg the arguments of the UBN that was saved.'
    else:
        remedy = (
            f'If it is a whole {norm.layout.title}, tools/model_converters/convert_norm.py converts it where that is '
            f'exact; {different_factors(norm, target)}.'
        )
    missing = ', '.join(f'{prefix}{key} is missing' for key in sorted(lost))
    raise CheckpointError(f'{missing}: expected {listed(target.keys - {BATCH_COUNT})}, got {listed(present)}. {remedy}')


# --- what was read ----------------------------------------------------------------------------------------------------

Reads = Counter[tuple[str, str | None]]  # (type of the layer, title of the layout; None where there was no entry)
_counters: list[Reads] = []


@contextlib.contextmanager
def counted_reads() -> Iterator[Reads]:
    """Count which layouts the layers read within this context, by type of the layer and title of the layout."""
    counter: Reads = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.pop()  # contexts end in the reverse order of their beginning


def _count(name: str, title: str | None) -> None:
    for counter in _counters:
        counter[name, title] += 1


def report_reads(reads: Reads) -> list[str]:
    """One line for each type of layer in ``reads``: how many were read from which layout."""
    lines = []
    for name in dict.fromkeys(name for name, _ in reads):
        counts = {title: count for (layer, title), count in reads.items() if layer == name}
        missing = counts.pop(None, 0)
        line = f'mmubn: {sum(counts.values())} {name} layers read'
        if counts:
            line += ': ' + ', '.join(f'{count} from {title}' for title, count in counts.items())
        lines.append(line + (f'; {missing} not in the state dict' if missing else ''))
    return lines
