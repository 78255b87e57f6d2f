"""How many kernels a layer or a network launches on a GPU, and what they move, counted without one. Needs torch alone.

Meta tensors have shapes and no values: they take the way of a GPU's tensors, and nothing can read a value of theirs on
the host. The operators that reach them are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmubn.ops import dispatch

__all__ = ['Launches', 'launches_of_a_step']

# Operators that neither return a view, which their schemas say, nor compute anything
LAUNCH_NOTHING = {
    'empty',
    'empty_like',
    'empty_strided',
    'new_empty',
    'new_empty_strided',
    '_unsafe_view',
    'squeeze_',
    'unsqueeze_',
}
# Zeros, and the part that is not
LAUNCH_TWO = {'select_backward', 'slice_backward'}


class Launches(TorchDispatchMode):
    """Counts, within its context, the kernels that the operators would launch on a GPU.

    An operator is one launch, but for:

    - views and allocations: none;
    - a convolution: one, and one for the bias of a dense convolution, which cuDNN does not add itself;
    - the backward of a convolution: one for each gradient that is asked for;
    - the backward of a slice: two.

    What cuDNN launches to bring a tensor into another layout or dtype is not seen.

    Attributes:
        by_operator: The launches of each operator.
        bytes_moved: Of the tensors that the launches read and write, each once a launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()
        self.bytes_moved = 0
        # A mode is a reason for plain operators, which would be those of another backend than without it.
        self._observer = mock.patch.object(dispatch, '_observer', return_value=None)

    @property
    def total(self) -> int:
        """All launches."""
        return self.by_operator.total()

    def __enter__(self) -> Launches:
        self._observer.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._observer.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if number := _launches(func, args):
            self.by_operator[_name(func)] += number
            read = [value for key, value in kwargs.items() if key != 'out']
            self.bytes_moved += _bytes((args, read)) + _bytes((result,))
        return _as_on_a_gpu(func, args, result)


def _name(operator: Any) -> str:
    return operator._schema.name.removeprefix('aten::')


def _as_on_a_gpu(operator: Any, arguments: tuple, result: Any) -> Any:
    """The result in channels-last where a GPU leaves it so: meta tensors come out of a convolution in NCHW."""
    name = _name(operator)
    if not name.startswith('convolution'):
        return result
    of_input, of_weight = arguments[:2] if name == 'convolution' else arguments[1:3]
    if torch.channels_last not in (suggest_memory_format(of_input), suggest_memory_format(of_weight)):
        return result
    if isinstance(result, Tensor):
        return result.contiguous(memory_format=torch.channels_last)
    d_input, *others = result
    return (None if d_input is None else d_input.contiguous(memory_format=torch.channels_last), *others)


def _launches(operator: Any, arguments: tuple) -> int:
    """How many kernels the operator launches."""
    name = _name(operator)
    returned = [each.alias_info for each in operator._schema.returns]
    if name in LAUNCH_NOTHING or any(alias is not None and not alias.is_write for alias in returned):
        return 0
    if name == 'convolution':
        _, _, bias, *_, groups = arguments
        return 1 + (bias is not None and groups == 1)
    if name == 'convolution_backward':
        return sum(arguments[-1])  # the mask of the gradients that are asked for
    return 2 if name in LAUNCH_TWO else 1


def _bytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among the values; of one that is expanded, of what it is expanded from."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.numel() > 0]
    return sum(tensor.element_size() * _distinct(tensor) for tensor in tensors)


def _distinct(tensor: Tensor) -> int:
    number = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= size if stride else 1
    return number


def launches_of_a_step(
    module: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str = 'torch',
) -> tuple[Launches, Launches]:
    """The launches of one forward and of its backward.

    Args:
        module: A layer or a network, in training or in evaluation. Its parameters and buffers become meta tensors.
        shape: Of the input, (N, C, H, W).
        dtype: Of the input.
        memory_format: Of the input and of parameters of four dimensions.
        backend: By which the norm layers compute.
    """
    module = module.to('meta', memory_format=memory_format)
    x = torch.empty(shape, dtype=dtype, device='meta', memory_format=memory_format, requires_grad=True)
    forward, backward = Launches(), Launches()
    with dispatch.use_backend(backend):
        with forward:
            y = module(x)
        gradient = torch.empty_like(y)
        with backward:
            y.backward(gradient)
    return forward, backward
