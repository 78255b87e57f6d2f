"""The part of a padded batch that is image, where it is known: what a norm in evaluation then computes alone.

Images of several sizes become one batch by padding at the right and at the bottom. An instance mean over the whole map
then depends on how much padding there is. Within :func:`image_areas` a layer in evaluation normalises each image's own
part of the map by itself, and writes zeros beside it: as much padding as a convolution adds to the image alone.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmubn.layers.arguments import is_int

__all__ = [
    'ImageAreas',
    'current',
    'enter',
    'image_areas',
    'innermost',
    'is_used',
    'leave',
    'outside_graphs',
    'size_in_map',
]


class ImageAreas(NamedTuple):
    """The images of a padded batch, each in the upper left corner of its place."""

    sizes: tuple[tuple[int, int], ...]  # height and width of each image
    batch: tuple[int, int]  # height and width of the batch

    def in_map(self, x: Tensor) -> list[tuple[int, int]] | None:
        """Height and width of each image in a map of a network; None where every image fills it.

        Args:
            x: A map of the batch, (N, C, H, W), of any stride.

        Raises:
            ValueError: It has another number of samples, or its size is not that of the batch at any stride.
        """
        if x.shape[0] != len(self.sizes):
            raise ValueError(
                f'the input {tuple(x.shape)} is not one map of each of the {len(self.sizes)} images of the batch, so '
                'its padding is unknown; evaluate this network without image areas (remove PaddingAwareHook).'
            )
        height, width = x.shape[2:]
        sizes = []
        for h, w in self.sizes:
            in_height, in_width = size_in_map(h, self.batch[0], height), size_in_map(w, self.batch[1], width)
            if in_height is None or in_width is None:
                raise ValueError(
                    f'the map of {height}x{width} is no batch of {self.batch[0]}x{self.batch[1]} at any stride, so its '
                    'padding is unknown; evaluate this network without image areas (remove PaddingAwareHook).'
                )
            sizes.append((in_height, in_width))
        return None if all(size == (height, width) for size in sizes) else sizes


def size_in_map(image: int, batch: int, length: int) -> int | None:
    """How many rows (or columns) of a map belong to an image: as many as the map of the image alone has.

    A map at stride s has ``ceil(batch / s)`` rows, since a convolution of stride 2 with half a kernel of padding rounds
    up, and ``ceil(ceil(n / 2) / 2) = ceil(n / 4)``; the image alone would have ``ceil(image / s)``. s is the power of 2
    that fits, else ``batch / length`` where that is an integer; of an upsampled map, 1 over an integer.

    Args:
        image: Rows of the image.
        batch: Rows of the batch.
        length: Rows of the map.

    Returns:
        The number, from 1 to ``length``; None where no stride fits.
    """
    if length % batch == 0:
        return image * (length // batch)
    strides = [2**i for i in range(1, batch.bit_length() + 1)]
    if batch % length == 0:
        strides.append(batch // length)
    return next((-(-image // stride) for stride in strides if -(-batch // stride) == length), None)


@dataclass(eq=False)
class Scope:
    """Where the images of a batch are known: from :func:`enter` to :func:`leave`.

    Attributes:
        owner: Who entered.
        images: Those of the batch; None where nothing is padded, or padding is to be seen.
        are_maps: Whether what norms get is maps of the batch. In the heads of a detector, say, it is not.
        frame: With whose end the scope ends, if it was not left before: torch calls no hook after a KeyboardInterrupt.
        outer: What held before.
    """

    owner: object
    images: ImageAreas | None
    are_maps: bool
    frame: FrameType | None
    outer: Scope | None


_scope: ContextVar[Scope | None] = ContextVar('mmubn.layers.areas', default=None)  # of a thread, of a task of asyncio
_lock = threading.RLock()  # garbage collection may end a paused generator, and its scope, at any place
_open: set[Scope] = set()  # of all threads and tasks
_is_used = False  # of which torch.compile makes a guard: what it compiles for batches without padding asks nothing


def is_used() -> bool:
    """Whether there are image areas anywhere: what a layer asks first, and most often all."""
    return _is_used


def current() -> ImageAreas | None:
    """The image areas that hold for a norm here; None where there are none."""
    scope = innermost()
    return scope.images if scope is not None and scope.are_maps else None


def innermost() -> Scope | None:
    """The scope that holds in this thread or task of asyncio; None where there is none."""
    scope = _scope.get()
    while scope is not None and not _is_open(scope):
        scope = scope.outer
    _scope.set(scope)
    return scope


def enter(owner: object, images: ImageAreas | None, are_maps: bool = True, frame: FrameType | None = None) -> Scope:
    """Let ``images`` hold in this thread or task, until :func:`leave` of the same owner, or the end of ``frame``."""
    _leave_graphs()
    scope = Scope(owner, images, are_maps, frame, innermost())
    _scope.set(scope)
    with _lock:
        _open.add(scope)
        _count()
    return scope


def leave(owner: object) -> None:
    """Let hold what held before ``owner`` entered; nothing is changed where it did not."""
    scope = innermost()
    while scope is not None and scope.owner is not owner:
        scope = scope.outer
    if scope is not None:
        _close(scope)


def _is_open(scope: Scope) -> bool:
    if scope.frame is not None:
        try:
            scope.frame.clear()
        except RuntimeError:  # it runs
            pass
        else:
            _close(scope)
    return scope in _open


def _close(scope: Scope) -> None:
    with _lock:
        _open.discard(scope)
        _count()
    if _scope.get() is scope:
        _scope.set(scope.outer)


def _count() -> None:
    global _is_used
    _is_used = any(scope.images is not None and scope.are_maps for scope in tuple(_open))


def outside_graphs(function: Callable[[Tensor], Tensor | None], x: Tensor) -> Tensor | None:
    """``function(x)``, for which a graph of torch.compile breaks: what it computes by the areas that hold."""
    return _call(function, x)


def _call(function: Callable[[Tensor], Tensor | None], x: Tensor) -> Tensor | None:
    return function(x)


_is_outside_graphs = False


def _leave_graphs() -> None:
    """Keep the areas out of compiled graphs, once torch's compiler is there: its import takes a second."""
    global _call, _is_outside_graphs
    if not _is_outside_graphs and 'torch._dynamo' in sys.modules:
        _call, _is_outside_graphs = torch.compiler.disable(_call), True


@contextlib.contextmanager
def image_areas(sizes: Sequence[tuple[int, int]], batch: tuple[int, int]) -> Iterator[None]:
    """Let norms in evaluation compute the images of a padded batch as if there were no padding.

    A layer with pooled terms gives each image's own part of its map what it gives that part alone, bit for bit, and
    zeros beside it. Where the images fill the batch, and for layers in training and those without pooled terms (BNET),
    nothing is changed.

    Only around the part of a network whose maps are maps of the batch: in a detector, around backbone and neck. It
    holds in its thread or task of asyncio, and in tasks that begin within it.

    Args:
        sizes: Height and width of each image, which lies in the upper left corner of its place.
        batch: Height and width of the batch.

    Raises:
        ValueError: An image is larger than the batch, or a size is not a pair of positive integers. From a layer: its
            input is not one map of each image, or no stride makes it a map of the batch.
        RuntimeError: From a folded layer: an image does not fill its map.

    Example:
        >>> layer = mmubn.UBN(3).eval()
        >>> with mmubn.image_areas([(8, 8), (5, 7)], batch=(8, 8)):
        ...     y = layer(torch.randn(2, 3, 8, 8))
    """
    pairs = sizes if isinstance(sizes, Iterable) else (sizes,)
    *own, whole = (_pair(size) for size in (*pairs, batch))
    for i, (h, w) in enumerate(own):
        if h > whole[0] or w > whole[1]:
            raise ValueError(
                f'image {i} of {h}x{w} is larger than its batch of {whole[0]}x{whole[1]}: give the size that it has in '
                'the batch, before padding.'
            )
    are_padded = not own or any(size != whole for size in own)
    scope = enter(None, ImageAreas(tuple(own), whole) if are_padded else None)
    try:
        yield
    finally:
        _close(scope)


def _pair(size: Any) -> tuple[int, int]:
    try:
        h, w = size
    except (TypeError, ValueError):
        h = w = None
    if not (is_int(h) and is_int(w) and h > 0 and w > 0):
        raise ValueError(f'sizes and batch must be pairs (height, width) of positive integers, got {size!r}.')
    return h, w
