"""The launches of a step, kept at its first run and repeated from then on, so that the host does little but launch.

Between its kernels a step does on the host what the traits of its input alone decide: checks, tilings, look-ups, and a
small tensor for each intermediate result. A :class:`Tape` is what comes of that: the compiled kernels, their numbers,
and where in memory each argument is. A replay makes one tensor for all intermediate results and launches. The steps are
written down once, where they are read, and a replay gives the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmubn.ops.triton import runtime

__all__ = ['Place', 'Tape', 'record']

LINE = 128  # bytes; each intermediate result begins with a line of the cache
_NEW_TENSOR = {'aten::empty', 'aten::empty_like', 'aten::empty_strided', 'aten::new_empty', 'aten::new_empty_strided'}


class Place(NamedTuple):
    """Where a tensor of a step is in each replay: within the tensor of a number, counted as in :class:`Tape`."""

    number: int
    offset: int  # bytes
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, tensor: Tensor) -> Tensor:
        """What is there."""
        same = self.offset == 0 and (tensor.shape, tensor.stride(), tensor.dtype) == self[2:]
        if same:
            return tensor
        values = tensor.flatten().view(torch.uint8)[self.offset :]
        whole = len(values) // self.dtype.itemsize * self.dtype.itemsize
        values = values[:whole].view(self.dtype)
        return values.as_strided(self.shape, self.stride)


class Tape:
    """What :func:`record` keeps of a function.

    The tensors of a replay have numbers: first the inputs, then the outputs, then the workspace, which has the
    intermediate results that are kept, and the scratch, which has the others.

    Attributes:
        kept: Where those intermediate results are that the function returned; None for None.
    """

    def __init__(
        self,
        launches: Sequence[runtime.Launched],
        new: Sequence[Tensor],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor | None],
        kept: Sequence[Tensor | None],
    ) -> None:
        returned = [output for output in outputs if output is not None]
        self._device = inputs[0].device
        self._returned = [_Traits.of(each, inputs) for each in returned]
        self._is_returned = [each is not None for each in outputs]
        memory = _Memory(new, inputs, returned, [each for each in kept if each is not None])
        self._places: list[Place] = []
        self._constants: list[Any] = []
        picks = [[self._index(memory, each) for each in (*one.arguments, *one.constants)] for one in launches]
        self._launches = [
            (one.run, itemgetter(*(i if is_place else len(self._places) + i for is_place, i in pick)))
            for one, pick in zip(launches, picks, strict=True)
        ]
        self._offsets = [(place.number, place.offset) for place in self._places]
        if runtime.takes_addresses(self._device):
            self._places = []  # which only the interpreter looks at
        self.kept = [None if each is None else memory.place(each) for each in kept]
        self._sizes = memory.sizes

    def _index(self, memory: _Memory, value: Any) -> tuple[bool, int]:
        """Whether an argument is at a place, and which of the places, or of the constants, it is."""
        if isinstance(value, Tensor) and value.numel() > 0:
            place = memory.place(value)
            if place not in self._places:
                self._places.append(place)
            return True, self._places.index(place)
        self._constants.append(value)  # a tensor without elements too: nothing reads it
        return False, len(self._constants) - 1

    def replay(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor | None], Tensor]:
        """Launch what the function launched.

        Args:
            inputs: Of the traits that they had when it was recorded.

        Returns:
            Its outputs, and the workspace.
        """
        device = self._device
        on_gpu = runtime.takes_addresses(device)
        if on_gpu and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.replay(inputs)
        returned = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            if like is None
            else torch.empty_like(inputs[like])
            for like, shape, stride, dtype in self._returned
        ]
        memory = [torch.empty(size, dtype=torch.float32, device=device) for size in self._sizes]
        tensors = [*inputs, *returned, *memory]
        values: list[Any] = self._addresses(tensors) if on_gpu else self._views(tensors)
        values += self._constants
        for run, pick in self._launches:
            run(*pick(values))
        each = iter(returned)
        return [next(each) if is_returned else None for is_returned in self._is_returned], memory[0]

    def _addresses(self, tensors: Sequence[Tensor]) -> list[int]:
        """The arguments of a GPU: a launch takes a number for an address, and that in less time than a tensor."""
        starts = [*map(Tensor.data_ptr, tensors)]
        return [starts[number] + offset for number, offset in self._offsets]

    def _views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same for Triton's interpreter."""
        return [place.view(tensors[place.number]) for place in self._places]


def record(
    function: Callable[[], tuple[Sequence[Tensor | None], Sequence[Tensor | None]]], inputs: Sequence[Tensor]
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], Tape | None]:
    """Run ``function`` and keep its launches.

    Args:
        function: Returns its outputs, and those of its intermediate results that something else will need.
        inputs: All tensors that it reads or writes, dense.

    Returns:
        What it returned, and the tape. No tape of a function that does more than to launch kernels and to make new
        tensors, or whose inputs share memory.
    """
    with runtime.observed() as launches, _Watch() as watch:
        outputs, kept = function()
    starts = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in inputs)
    are_apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(starts))
    is_plain = are_apart and launches and not watch.others
    return outputs, kept, Tape(launches, watch.new, inputs, outputs, kept) if is_plain else None


class _Traits(NamedTuple):
    """How to make an output: as a like input, which is faster, or else from its numbers."""

    like: int | None
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, output: Tensor, inputs: Sequence[Tensor]) -> _Traits:
        traits = output.shape, output.stride(), output.dtype
        same = (i for i, each in enumerate(inputs) if (each.shape, each.stride(), each.dtype) == traits)
        return cls(next(same, None), *traits)


class _Watch(TorchDispatchMode):
    """Keeps the new tensors of a time, and the names of operators that do more than to make one or to look at one."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[Tensor] = []  # alive, so that no two have the same address
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.name in _NEW_TENSOR:
            self.new.append(result)
        elif not all(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns):
            self.others.append(schema.name)
        return result


class _Memory:
    """Where the tensors of a recording are."""

    def __init__(
        self, new: Sequence[Tensor], inputs: Sequence[Tensor], returned: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> None:
        known = [*inputs, *returned]
        self._blocks = [(each.data_ptr(), each.nbytes, i, 0) for i, each in enumerate(known)]
        of_returned, of_kept = ({each.untyped_storage().data_ptr() for each in those} for those in (returned, kept))
        ends = [0, 0]
        for storage in (each.untyped_storage() for each in new):
            if storage.nbytes() > 0 and storage.data_ptr() not in of_returned:
                is_scratch = bool(kept) and storage.data_ptr() not in of_kept
                self._blocks.append((storage.data_ptr(), storage.nbytes(), len(known) + is_scratch, ends[is_scratch]))
                ends[is_scratch] += -(-storage.nbytes() // LINE) * LINE
        self.sizes = [end // 4 for end in ends if end > 0] or [0]  # of the workspace and the scratch, in float32

    def place(self, tensor: Tensor) -> Place:
        address = tensor.data_ptr()
        for start, size, number, offset in self._blocks:
            if start <= address < start + size:
                return Place(number, offset + address - start, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        raise AssertionError('a launch of a step has an argument that is neither an input nor made in it')
