"""The part of a padded batch that is image, where it is known: what a norm in evaluation then computes alone.

Images of several sizes become one batch by padding at the right and at the bottom. An instance mean over the whole map
then depends on how much padding there is. Within :func:`image_areas` a layer in evaluation normalises each image's own
part of the map by itself, and writes zeros beside it: as much padding as a convolution adds to the image alone.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from mmubn.layers.arguments import is_int

__all__ = ['ImageAreas', 'Running', 'current', 'image_areas', 'is_used', 'outside_graphs', 'pop', 'push', 'size_in_map']


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


class Running(threading.local):
    """What runs in one thread, the innermost last, each with a value that holds while it runs.

    What a KeyboardInterrupt stops never takes its value back (torch calls no hook then): the stack tells what
    holds.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[object, ImageAreas | None, FrameType | None]] = []

    def push(self, owner: object, value: ImageAreas | None, frame: FrameType | None) -> None:
        """Let ``value`` hold until :meth:`pop` of the same owner, or the end of ``frame``."""
        self.drop_stopped()
        self.entries.append((owner, value, frame))

    def pop(self, owner: object) -> None:
        """Let hold what held before ``owner`` pushed; nothing is changed where it did not."""
        places = [i for i, (each, *_) in enumerate(self.entries) if each is owner]
        if places:
            del self.entries[places[-1] :]

    def drop_stopped(self) -> None:
        while self.entries and not _is_running(self.entries[-1][2]):
            self.entries.pop()


def _is_running(wanted: FrameType | None) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return wanted is None or frame is not None


_running = Running()
_lock = threading.Lock()
_threads: dict[int, int] = {}  # entries of each thread that has some
_is_used = False  # of which torch.compile makes a guard: what it compiles for batches without padding asks nothing


def is_used() -> bool:
    """Whether any thread has image areas: what a layer asks first, and most often all."""
    return _is_used


def current() -> ImageAreas | None:
    """The image areas of this thread; None where there are none."""
    _running.drop_stopped()
    _count()
    return _running.entries[-1][1] if _running.entries else None


def outside_graphs(function: Callable[[Tensor], Tensor | None], x: Tensor) -> Tensor | None:
    """``function(x)``, for which a graph of torch.compile breaks: what it computes by the areas of this thread."""
    return _call(function, x)


def _call(function: Callable[[Tensor], Tensor | None], x: Tensor) -> Tensor | None:
    return function(x)


_is_outside_graphs = False


def _leave_graphs() -> None:
    """Keep the areas out of compiled graphs, once torch's compiler is there: its import takes a second."""
    global _call, _is_outside_graphs
    if not _is_outside_graphs and 'torch._dynamo' in sys.modules:
        _call, _is_outside_graphs = torch.compiler.disable(_call), True


def push(owner: object, areas: ImageAreas | None, frame: FrameType | None = None) -> None:
    """Set the areas of this thread until :func:`pop` of the same owner, or the end of ``frame``."""
    _leave_graphs()
    _running.push(owner, areas, frame)
    _count()


def pop(owner: object) -> None:
    """Set what was set before ``owner`` pushed; nothing where it did not."""
    _running.pop(owner)
    _count()


def _count() -> None:
    global _is_used
    number = sum(areas is not None for _, areas, _ in _running.entries)
    with _lock:
        _threads[threading.get_ident()] = number
        if number == 0:
            del _threads[threading.get_ident()]
        _is_used = len(_threads) > 0


@contextlib.contextmanager
def image_areas(sizes: Sequence[tuple[int, int]], batch: tuple[int, int]) -> Iterator[None]:
    """Let norms in evaluation compute the images of a padded batch as if there were no padding.

    A layer with pooled terms gives each image's own part of its map what it gives that part alone, bit for bit, and
    zeros beside it. Where the images fill the batch, and for layers in training and those without pooled terms (BNET),
    nothing is changed.

    Only around the part of a network whose maps are maps of the batch: in a detector, around backbone and neck.

    Args:
        sizes: Height and width of each image, which lies in the upper left corner of its place.
        batch: Height and width of the batch.

    Raises:
        ValueError: An image is larger than the batch, or a size is not a pair of positive integers. From a layer: its
            input is not one map of each image, or no stride makes it a map of the batch.

    Example:
        >>> layer = mmubn.UBN(3).eval()
        >>> with mmubn.image_areas([(8, 8), (5, 7)], batch=(8, 8)):
        ...     y = layer(torch.randn(2, 3, 8, 8))
    """
    for size in (*sizes, batch):
        if len(size) != 2 or not all(is_int(each) and each > 0 for each in size):
            raise ValueError(f'sizes and batch must be pairs (height, width) of positive integers, got {size!r}.')
    for i, (h, w) in enumerate(sizes):
        if h > batch[0] or w > batch[1]:
            raise ValueError(
                f'image {i} of {h}x{w} is larger than its batch of {batch[0]}x{batch[1]}: give the size that it has in '
                'the batch, before padding.'
            )
    areas = ImageAreas(tuple((h, w) for h, w in sizes), (batch[0], batch[1]))
    owner = object()
    push(owner, None if all(size == areas.batch for size in areas.sizes) else areas)
    try:
        yield
    finally:
        pop(owner)
