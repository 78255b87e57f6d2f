"""The boundary to the C++ kernels: arguments by name, and each tensor checked before C++ gets its address.

:data:`FUNCTIONS` declares the arguments of each function as the structs of ``kernels/arguments.h`` do, the same fields
in the same order, and says how many values of which dtype are behind each pointer. :func:`call` checks the tensors
against it: C++ knows only addresses, and with a tensor that is too short it would read or write foreign memory.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

__all__ = ['DTYPES', 'FUNCTIONS', 'KERNEL_SIZES', 'Array', 'Entry', 'Function', 'Number', 'bind', 'call']

# By the dtype in memory, T: the name in the library, and the dtype of the arithmetic, A.
DTYPES = {
    torch.float32: ('float32', torch.float32),
    torch.float64: ('float64', torch.float64),
    torch.bfloat16: ('bfloat16', torch.float32),
}
KERNEL_SIZES = (1, 3, 5, 7)
ORDERS = {torch.contiguous_format: 'NCHW', torch.channels_last: 'channels-last'}


class Array(NamedTuple):
    """A pointer: the address of a tensor, or null for None."""

    dtype: str  # 'T' in memory, 'A' of the arithmetic, or 'bool'
    shape: str  # names of the sizes whose product is the number of values
    shared: bool = False  # whether the samples may share one row of values: the field `x_step` tells C++ if they do
    optional: bool = False  # whether it may be None
    needed_by: tuple[str, ...] = ()  # the pointers with which it may not be None, for all that
    order: str = 'plain'  # or 'map': NCHW or channels-last, as `channels_last` says; or 'any' of these two


class Number(NamedTuple):
    """A number that is passed by value."""

    ctype: Any
    is_size: bool = False  # whether it is a positive integer
    choices: tuple[int, ...] = ()  # the values that it may have; empty for all
    at_most: str | None = None  # the size that it may not exceed


SIZE, REAL, FLAG = Number(ctypes.c_int64, is_size=True), Number(ctypes.c_double), Number(ctypes.c_bool)
KERNEL_SIZE = Number(ctypes.c_int64, is_size=True, choices=KERNEL_SIZES)
MAP = Array('T', 'n c h w', order='map')
SAMPLES, CHANNELS, ROWS = Array('A', 'n c'), Array('A', 'c'), Array('A', 'n c', shared=True)


def _optional(array: Array, *needed_by: str) -> Array:
    return array._replace(optional=True, needed_by=needed_by)


class Function:
    """A function of the library, as it is declared here.

    Its struct has the pointers first, then the steps of those that samples may share, then the numbers.

    Args:
        name: In the library, where that of the dtype follows it.
        dtypes: Those in memory that it exists for.
        fields: What a caller passes.
    """

    def __init__(self, name: str, dtypes: tuple[torch.dtype, ...], **fields: Array | Number) -> None:
        self.name, self.dtypes = name, dtypes
        self.arrays = {field: kind for field, kind in fields.items() if isinstance(kind, Array)}
        self.numbers = {field: kind for field, kind in fields.items() if isinstance(kind, Number)}
        self.sizes = [field for field, number in self.numbers.items() if number.is_size]
        self.shared = [field for field, array in self.arrays.items() if array.shared]
        types = dict.fromkeys(self.arrays, ctypes.c_void_p) | {f'{field}_step': ctypes.c_int64 for field in self.shared}
        types |= {field: number.ctype for field, number in self.numbers.items()}
        self.structure: Any = type(name, (ctypes.Structure,), {'_fields_': list(types.items())})
        # A layer meets the same sizes again and again.
        self.lengths = functools.lru_cache(maxsize=1024)(self._lengths)

    def _lengths(self, *sizes: int) -> tuple[tuple[int, ...], ...]:
        """Return the numbers of values that each array may have.

        Raises:
            ValueError: A size is not one.
        """
        given = dict(zip(self.sizes, sizes, strict=True))
        for field, size in given.items():
            number = self.numbers[field]
            if not isinstance(size, int) or size < 1:
                self.refuse(field, 'be a positive integer', repr(size))
            if number.choices and size not in number.choices:
                self.refuse(field, f'be one of {", ".join(map(str, number.choices))}', str(size))
            if number.at_most and size > given[number.at_most]:
                self.refuse(field, f'be at most {number.at_most}, which is {given[number.at_most]}', str(size))
        lengths = []
        for array in self.arrays.values():
            shape = [given[name] for name in array.shape.split()]
            lengths.append((math.prod(shape[1:]), math.prod(shape)) if array.shared else (math.prod(shape),))
        return tuple(lengths)

    def refuse(self, field: str, expected: str, received: str) -> NoReturn:
        """Raise a ValueError for an argument."""
        raise ValueError(f'mmubn C++ kernels: {self.name}: {field} must {expected}, got {received}.')


PASS, STEP = tuple(DTYPES), (torch.float32, torch.float64)  # the steps between the passes are in the statistics dtype
FUNCTIONS = {
    function.name: function
    for function in (
        Function(
            'moments',
            PASS,
            x=Array('T', 'n c pixels', order='map'),
            a=SAMPLES,
            v=_optional(SAMPLES),
            n=SIZE,
            c=SIZE,
            pixels=SIZE,
            threads=SIZE,
            channels_last=FLAG,
        ),
        Function(
            'similarity',
            PASS,
            x=Array('T', 'n c pixels', order='any'),
            a=SAMPLES,
            v=SAMPLES,
            total=Array('A', ''),
            n=SIZE,
            c=SIZE,
            pixels=SIZE,
            samples=Number(ctypes.c_int64, is_size=True, at_most='n'),
            threads=SIZE,
        ),
        Function(
            'convolve',
            PASS,
            input=MAP,
            other=_optional(MAP),
            output=MAP,
            kernel=Array('A', 'c kernel_size kernel_size'),
            center=_optional(ROWS),
            scale=ROWS,
            bias=_optional(ROWS),
            other_center=_optional(SAMPLES, 'other'),
            slope=_optional(ROWS, 'other'),
            n=SIZE,
            c=SIZE,
            h=SIZE,
            w=SIZE,
            kernel_size=KERNEL_SIZE,
            threads=SIZE,
            turned=FLAG,
            channels_last=FLAG,
        ),
        Function(
            'tap_sums',
            PASS,
            x=MAP,
            dy=MAP,
            center=ROWS,
            products=Array('A', 'n kernel_size kernel_size c'),
            sums=Array('A', 'n kernel_size kernel_size c'),
            n=SIZE,
            c=SIZE,
            h=SIZE,
            w=SIZE,
            kernel_size=KERNEL_SIZE,
            threads=SIZE,
            channels_last=FLAG,
        ),
        Function(
            'evaluate',
            PASS,
            x=MAP,
            output=MAP,
            kernel=Array('A', 'c kernel_size kernel_size'),
            shift=CHANNELS,
            center_weight=_optional(CHANNELS),
            scale_weight=_optional(CHANNELS),
            scale_bias=_optional(CHANNELS, 'scale_weight'),
            bias=CHANNELS,
            n=SIZE,
            c=SIZE,
            h=SIZE,
            w=SIZE,
            kernel_size=KERNEL_SIZE,
            threads=SIZE,
            calibrate_bias=FLAG,
            channels_last=FLAG,
        ),
        Function(
            'statistics',
            STEP,
            a=SAMPLES,
            v=SAMPLES,
            center_weight=_optional(CHANNELS),
            running_mean=CHANNELS,
            running_var=CHANNELS,
            condensed=Array('bool', ''),
            mean=CHANNELS,
            var=CHANNELS,
            new_mean=CHANNELS,
            new_var=CHANNELS,
            momentum=REAL,
            num_values=SIZE,
            n=SIZE,
            c=SIZE,
        ),
        Function(
            'coefficients',
            STEP,
            a=SAMPLES,
            mean=CHANNELS,
            var=CHANNELS,
            center_weight=_optional(CHANNELS),
            scale_weight=_optional(CHANNELS, 'logit'),
            scale_bias=_optional(CHANNELS, 'logit'),
            center=SAMPLES,
            inv_std=CHANNELS,
            logit=_optional(SAMPLES),
            eps=REAL,
            n=SIZE,
            c=SIZE,
            rectified=FLAG,
        ),
        Function(
            'coefficients_backward',
            STEP,
            products=Array('A', 'n taps c'),
            sums=Array('A', 'n taps c'),
            a=_optional(SAMPLES, 'r', 'center_weight', 'slope'),
            mean=CHANNELS,
            var=CHANNELS,
            condensed=_optional(Array('bool', ''), 'slope'),
            kernel=Array('A', 'c taps'),
            center=ROWS,
            scale=ROWS,
            r=_optional(SAMPLES),
            calibrated_bias=_optional(CHANNELS),
            center_weight=_optional(CHANNELS),
            scale_weight=_optional(CHANNELS, 'r'),
            slope=_optional(CHANNELS),
            offset=_optional(SAMPLES, 'slope'),
            d_taps=Array('A', 'taps c'),
            d_bias=CHANNELS,
            d_center_weight=_optional(CHANNELS, 'center_weight'),
            d_scale_weight=_optional(CHANNELS, 'r'),
            d_scale_bias=_optional(CHANNELS, 'r'),
            eps=REAL,
            num_values=REAL,
            n=SIZE,
            c=SIZE,
            taps=SIZE,
            pixels=SIZE,
            threads=SIZE,
            rectified=FLAG,
        ),
    )
}


class Entry:
    """A function of the loaded library, for one dtype: what :func:`call` calls.

    Args:
        function: Its declaration.
        dtype: That in memory.
        pointer: Takes the struct.
    """

    def __init__(self, function: Function, dtype: torch.dtype, pointer: Callable[[Any], None]) -> None:
        dtypes = {'T': dtype, 'A': DTYPES[dtype][1], 'bool': torch.bool}
        self.function, self.pointer, self.structure = function, pointer, function.structure
        self.count = len(function.arrays) + len(function.numbers)
        self.sizes: Callable[[dict[str, Any]], tuple[int, ...]] = itemgetter(*function.sizes)
        self.numbers: Callable[[dict[str, Any]], tuple[float, ...]] = itemgetter(*function.numbers)
        # For both values of channels_last. None is the usual order: is_contiguous() is quicker without an argument.
        self.arrays = [
            [(field, dtypes[array.dtype], formats[array.order]) for field, array in function.arrays.items()]
            for formats in (
                {'plain': None, 'map': None, 'any': (torch.contiguous_format, torch.channels_last)},
                {'plain': None, 'map': (torch.channels_last,), 'any': (torch.contiguous_format, torch.channels_last)},
            )
        ]

    def __call__(self, fields: dict[str, Any]) -> None:
        """Check the arguments and call the function."""
        if len(fields) != self.count:
            expected = {*self.function.arrays, *self.function.numbers}
            raise TypeError(f'{self.function.name}: missing or unknown: {", ".join(sorted(expected ^ fields.keys()))}')
        lengths = self.function.lengths(*self.sizes(fields))
        addresses: list[int | None] = []
        steps = []
        arrays = self.arrays[fields.get('channels_last', False)]
        for (field, dtype, formats), allowed in zip(arrays, lengths, strict=True):
            tensor = fields[field]
            if tensor is None:
                self._check_absence(field, fields)
                length, address = 0, None
            else:
                length = tensor.numel()
                if (
                    length not in allowed
                    or tensor.dtype is not dtype
                    or not tensor.is_cpu
                    or not (tensor.is_contiguous() if formats is None else _is_in_order(tensor, formats))
                    or not (address := tensor.data_ptr())
                ):
                    self._refuse(field, tensor, dtype, allowed, formats)
            addresses.append(address)
            if len(allowed) == 2:
                steps.append(allowed[0] if length == allowed[1] else 0)
        # `fields` holds the tensors until the function returns.
        self.pointer(self.structure(*addresses, *steps, *self.numbers(fields)))

    def _check_absence(self, field: str, fields: dict[str, Any]) -> None:
        array = self.function.arrays[field]
        if not array.optional:
            self.function.refuse(field, 'be a tensor', 'None')
        for other in array.needed_by:
            if fields[other] is not None:
                self.function.refuse(field, f'be a tensor where {other} is one', 'None')

    def _refuse(
        self,
        field: str,
        tensor: Tensor,
        dtype: torch.dtype,
        allowed: tuple[int, ...],
        formats: tuple[torch.memory_format, ...] | None,
    ) -> NoReturn:
        """Raise a ValueError that says what is wrong with a tensor."""
        refuse = functools.partial(self.function.refuse, field)
        if not tensor.is_cpu:
            refuse('be on the CPU', f'one on {tensor.device}')
        if tensor.dtype is not dtype:
            refuse(f'be {_short(dtype)}', _short(tensor.dtype))
        if tensor.numel() not in allowed:
            refuse(f'have {" or ".join(map(str, sorted({*allowed})))} values', str(tensor.numel()))
        if not (tensor.is_contiguous() if formats is None else _is_in_order(tensor, formats)):
            orders = ' or '.join(ORDERS[memory_format] for memory_format in formats or ())
            expected = f'be contiguous in {orders} order' if orders else 'be contiguous'
            refuse(expected, f'shape {tuple(tensor.shape)}, strides {tensor.stride()}')
        refuse('have its values in memory', 'a tensor without')


def _is_in_order(tensor: Tensor, formats: tuple[torch.memory_format, ...]) -> bool:
    return any(tensor.is_contiguous(memory_format=memory_format) for memory_format in formats)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


_entries: dict[tuple[str, torch.dtype], Entry] = {}


def bind(library: ctypes.CDLL) -> None:
    """Make :func:`call` call the functions of this library.

    Raises:
        RuntimeError: The library has other structs than :data:`FUNCTIONS`.
    """
    entries = {}
    for name, function in FUNCTIONS.items():
        size = _symbol(library, f'{name}_size')
        size.argtypes, size.restype = [], ctypes.c_int64
        here = ctypes.sizeof(function.structure)
        if size() != here:
            raise RuntimeError(
                f'{name} takes {size()} bytes of arguments in C++ but {here} in Python; the files of mmubn are of '
                'different versions: install it anew'
            )
        for dtype in function.dtypes:
            pointer = _symbol(library, f'{name}_{DTYPES[dtype][0]}')
            pointer.argtypes, pointer.restype = [ctypes.POINTER(function.structure)], None
            entries[name, dtype] = Entry(function, dtype, pointer)
    _entries.update(entries)


def _symbol(library: ctypes.CDLL, name: str) -> Any:
    try:
        return getattr(library, name)
    except AttributeError:
        raise RuntimeError(
            f'the library has no function {name}; the files of mmubn are of different versions: install it anew'
        ) from None


def call(name: str, dtype: torch.dtype, **fields: Any) -> None:
    """Call a function of the library.

    Args:
        name: One of :data:`FUNCTIONS`.
        dtype: That in memory.
        fields: Tensors and numbers, by their names in :data:`FUNCTIONS`; the steps follow from the tensors.

    Raises:
        ValueError: A tensor or size does not fit the others.
    """
    entry = _entries.get((name, dtype))
    if entry is None:
        raise RuntimeError(
            f'mmubn C++ kernels: {name} of {_short(dtype)} is not loaded: call prepare() of the backend.'
        )
    entry(fields)
