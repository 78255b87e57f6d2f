"""The boundary to the C++ kernels: whatever does not fit is refused before C++ gets an address."""

from __future__ import annotations

import ctypes
import math
import re
from types import SimpleNamespace

import pytest
import torch

from mmubn.ops.cpp import CppBackend, boundary, library
from mmubn.ops.types import Coefficients, Taps

FUNCTIONS = boundary.FUNCTIONS
NUMBERS = dict(n=2, c=4, pixels=6, h=2, w=3, kernel_size=3, taps=9, samples=2, threads=1, num_values=12)
NUMBERS |= dict(momentum=0.1, eps=1e-5, turned=False, channels_last=False, rectified=True, calibrate_bias=False)
EACH_ARRAY = pytest.mark.parametrize(
    ('name', 'field'),
    [(name, field) for name, function in FUNCTIONS.items() for field in function.arrays],
    ids=lambda value: value,
)


@pytest.fixture(scope='module')
def cpp():
    backend = CppBackend()
    assert backend.prepare(torch.device('cpu')) is None
    return backend


def arguments(name, dtype=torch.float32):
    """Arguments that fit, every array given."""
    function = FUNCTIONS[name]
    dtypes = {'T': dtype, 'A': boundary.DTYPES[dtype][1], 'bool': torch.bool}
    arrays = {
        field: torch.zeros(math.prod(NUMBERS[size] for size in array.shape.split()), dtype=dtypes[array.dtype])
        for field, array in function.arrays.items()
    }
    return arrays | {field: number_of(function, field) for field in function.numbers}


def number_of(function, field):
    return float(NUMBERS[field]) if function.numbers[field].ctype is ctypes.c_double else NUMBERS[field]


def refusal(name, dtype=torch.float32, **changes):
    """The message of the ValueError for such changes to arguments that fit. Calls nothing, whatever is refused."""
    called = []
    entry = boundary.Entry(FUNCTIONS[name], dtype, called.append)
    entry(arguments(name, dtype))
    assert len(called) == 1
    with pytest.raises(ValueError, match=rf'^mmubn C\+\+ kernels: {name}: \w+ must .*\.$') as caught:
        entry(arguments(name, dtype) | changes)
    assert len(called) == 1
    return str(caught.value)


@pytest.mark.parametrize('name', FUNCTIONS)
class TestFunctions:
    def test_arguments_that_fit(self, cpp, name):
        for dtype in FUNCTIONS[name].dtypes:
            boundary.call(name, dtype, **arguments(name, dtype))

    def test_every_name_is_needed_and_no_other_is_known(self, cpp, name):
        complete = arguments(name)
        for field in complete:
            with pytest.raises(TypeError, match=f'{name}: missing or unknown: {field}$'):
                boundary.call(name, torch.float32, **{key: value for key, value in complete.items() if key != field})
        with pytest.raises(TypeError, match=f'{name}: missing or unknown: further$'):
            boundary.call(name, torch.float32, **complete, further=1)

    def test_sizes(self, name):
        for field in FUNCTIONS[name].sizes:
            for size in (0, -1, None):
                assert f'{field} must be a positive integer, got {size}' in refusal(name, **{field: size})

    def test_struct(self, name):
        """Names, order and types of the fields, in C++ and here."""
        source = (library.SOURCES / 'arguments.h').read_text()
        struct = f'{name.title().replace("_", "")}Arguments'
        (body,) = re.findall(rf'\nstruct {struct} {{\n(.*?)\n}};', source, re.DOTALL)
        found = []
        for declaration in re.sub('//.*', '', body).split(';'):
            if not declaration.strip() or declaration.strip().startswith('using'):
                continue
            kind, declared = re.fullmatch(r'\s*(?:const )?(\w+)\b(.*?)\s*', declaration, re.DOTALL).groups()
            for field in declared.split(','):
                found.append((field.strip(' *\n'), f'{kind}*' if '*' in field else kind))
        function = FUNCTIONS[name]
        words = {ctypes.c_int64: 'Index', ctypes.c_double: 'double', ctypes.c_bool: 'bool'}
        expected = [
            (field, f'{function.arrays[field].dtype}*' if field in function.arrays else words[kind])
            for field, kind in function.structure._fields_
        ]
        assert found == expected


@EACH_ARRAY
class TestArrays:
    """What each tensor is refused for."""

    @pytest.fixture
    def right(self, name, field):
        return arguments(name)[field]

    def test_length(self, name, field, right):
        function = FUNCTIONS[name]
        for dtype in function.dtypes:
            right = arguments(name, dtype)[field]
            for length in (right.numel() - 1, right.numel() + 1, 0):
                message = refusal(name, dtype, **{field: right.new_zeros(length)})
                expected = f'4 or {right.numel()}' if function.arrays[field].shared else right.numel()
                assert f': {field} must have {expected} values, got {length}.' in message

    def test_dtype(self, name, field):
        for dtype in FUNCTIONS[name].dtypes:
            right = arguments(name, dtype)[field]
            for other in {torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int32} - {right.dtype}:
                names = [str(one).removeprefix('torch.') for one in (right.dtype, other)]
                message = refusal(name, dtype, **{field: right.to(other)})
                assert ': {} must be {}, got {}.'.format(field, *names) in message

    def test_device(self, name, field, right):
        message = refusal(name, **{field: right.to('meta')})
        assert f': {field} must be on the CPU, got one on meta.' in message
        # A tensor on meta has no address; this one has what one on a GPU has.
        methods = {method: getattr(right, method) for method in ('numel', 'is_contiguous', 'data_ptr', 'dtype')}
        on_gpu = SimpleNamespace(**methods, is_cpu=False, device=torch.device('cuda:0'))
        assert f': {field} must be on the CPU, got one on cuda:0.' in refusal(name, **{field: on_gpu})

    def test_storage(self, name, field, right):
        right.untyped_storage().resize_(0)
        message = refusal(name, **{field: right})
        assert f': {field} must have its values in memory, got a tensor without.' in message

    def test_none(self, name, field):
        array = FUNCTIONS[name].arrays[field]
        if not array.optional:
            assert f': {field} must be a tensor, got None.' in refusal(name, **{field: None})
        for other in array.needed_by:
            nones = dict.fromkeys(set(array.needed_by) - {other}) | {field: None}
            assert f': {field} must be a tensor where {other} is one, got None.' in refusal(name, **nones)


@pytest.mark.parametrize(
    ('name', 'field'),
    [(name, field) for name, function in FUNCTIONS.items() for field, one in function.arrays.items() if one.optional],
)
def test_what_may_be_none(cpp, name, field):
    """C++ takes a null pointer there: this would crash."""
    for dtype in FUNCTIONS[name].dtypes:
        nones = dict.fromkeys((field, *FUNCTIONS[name].arrays[field].needed_by))
        boundary.call(name, dtype, **arguments(name, dtype) | nones)


@pytest.mark.parametrize(
    ('name', 'field'),
    [(name, field) for name, function in FUNCTIONS.items() for field, array in function.arrays.items() if array.shape],
)
def test_arrays_are_contiguous(name, field):
    right = arguments(name)[field]
    order = ' in NCHW or channels-last order' if FUNCTIONS[name].arrays[field].order == 'any' else ''
    expected = f': {field} must be contiguous{order}, got shape ({right.numel()},), strides'
    assert f'{expected} (2,).' in refusal(name, **{field: right.repeat_interleave(2)[::2]})
    assert f'{expected} (0,).' in refusal(name, **{field: right[:1].expand(right.numel())})


@pytest.mark.parametrize('name', ['moments', 'convolve', 'tap_sums'])
def test_maps_are_in_the_order_that_is_said(name):
    plain = torch.zeros(2, 4, 2, 3)
    last = plain.contiguous(memory_format=torch.channels_last)
    maps = [field for field, array in FUNCTIONS[name].arrays.items() if array.order == 'map']
    assert maps
    for field in maps:
        right = dict.fromkeys(maps, last) | {'channels_last': True}
        called = []
        boundary.Entry(FUNCTIONS[name], torch.float32, called.append)(arguments(name) | right)
        assert called[0].channels_last
        assert f'{field} must be contiguous in channels-last order' in refusal(name, **right | {field: plain})
        assert f'{field} must be contiguous, got' in refusal(name, **{field: last})


def test_similarity_takes_either_order():
    called = []
    entry = boundary.Entry(FUNCTIONS['similarity'], torch.float32, called.append)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        entry(arguments('similarity') | {'x': torch.zeros(2, 4, 2, 3).contiguous(memory_format=memory_format)})
    assert len(called) == 2


def test_sizes_that_no_kernel_has():
    assert 'convolve: kernel_size must be one of 1, 3, 5, 7, got 4.' in refusal('convolve', kernel_size=4)
    assert 'tap_sums: kernel_size must be one of 1, 3, 5, 7, got 9.' in refusal('tap_sums', kernel_size=9)
    assert 'similarity: samples must be at most n, which is 2, got 3.' in refusal('similarity', samples=3)


@pytest.mark.parametrize('name', ['convolve', 'tap_sums', 'coefficients_backward'])
def test_steps_follow_from_the_tensors(name):
    called = []
    entry = boundary.Entry(FUNCTIONS[name], torch.float32, called.append)
    shared = FUNCTIONS[name].shared
    assert shared
    for field in shared:
        one = arguments(name)
        entry(one | {field: one[field][:4]})
        for other in shared:
            assert getattr(called[-1], f'{other}_step') == (0 if other == field else 4)


def test_a_bias_that_is_too_short(cpp):
    """RBN with 4 channels and a bias of 2."""
    x, rows = torch.ones(2, 4, 3, 3), torch.ones(2, 4)
    message = r'^mmubn C\+\+ kernels: convolve: bias must have 4 or 8 values, got 2\.$'
    with pytest.raises(ValueError, match=message):
        cpp.apply(x, Coefficients(rows, rows, None), Taps(torch.ones(4), None, torch.ones(4, 1, 1, 1)), torch.ones(2))


def test_a_library_with_other_structs():
    with pytest.raises(RuntimeError, match=r'moments takes 8 bytes of arguments in C\+\+ but 64 in Python; .* anew'):
        boundary.bind(SimpleNamespace(moments_size=lambda: 8))
    with pytest.raises(RuntimeError, match=r'the library has no function moments_size; .* anew'):
        boundary.bind(SimpleNamespace())


def test_before_they_are_loaded(monkeypatch):
    monkeypatch.setattr(boundary, '_entries', {})
    with pytest.raises(RuntimeError, match=r'moments of float32 is not loaded: call prepare\(\)'):
        CppBackend().instance_moments(torch.ones(2, 4, 3, 3))
