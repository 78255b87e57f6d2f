"""Every case of the tests of the kernels' numbers, function by function, on the device, beside their float64 oracle.

The cases, the oracle and what may differ are those of ``tests/ops/test_triton_numbers.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmubn.analysis.gpu_check.device import is_gpu, need_kernels, synchronize
from mmubn.analysis.gpu_check.environment import ROOT
from mmubn.analysis.gpu_check.outcome import Check, Skip

__all__ = ['OFFSETS', 'checks', 'numbers', 'on_device']

# Elements between the start of a block of memory and a tensor: at 16 bytes, and 2 or 4 bytes off any alignment.
OFFSETS = {'aligned': 64, 'unaligned': 33}
MAX_SAMPLES = 16  # of the similarity
# Values of x of the cases that are run in the interpreter, which knows no alignment: the tests of the kernels run all.
FEW = 15


@functools.cache
def numbers() -> ModuleType:
    """tests/ops/test_triton_numbers.py."""
    name, tests = 'test_triton_numbers', ROOT / 'tests'
    path = tests / 'ops' / f'{name}.py'
    for needed in ('triton', 'pytest'):
        if importlib.util.find_spec(needed) is None:
            raise Skip(f'{needed} is not installed')
    if not path.exists():
        raise Skip(f'needs {path}, which is in a checkout of the repository alone')
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(tests))  # for what the tests share
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(tests))
    return module


def checks(device: torch.device) -> list[Check]:
    """The checks of this stage."""
    tests = numbers()
    need_kernels(device)
    found = []
    for case in tests.layer_cases():
        (shape, *_), _, _ = case
        if is_gpu(device) or torch.Size(shape).numel() <= FEW:
            for alignment, offset in OFFSETS.items() if is_gpu(device) else [('unaligned', OFFSETS['unaligned'])]:
                run = functools.partial(one_case, case, offset, device)
                found.append(Check(f'{tests.name_of(*case)}-{alignment}', run))
    return found


def one_case(case: Any, offset: int, device: torch.device) -> None:
    """A layer by the kernels, twice: within what rounding allows of the oracle's, and the second time the same bits."""
    tests = numbers()
    of_layer, condensed, programs = case
    made = tests.make_case(*of_layer)
    threshold = -1 if condensed else 0.99
    expected = tests.oracle(*made, threshold, MAX_SAMPLES)
    # The compiler fuses multiplications and additions. Where what is pooled cancels, as with one sample, which its own
    # mean centres, it is then a rounding of its terms, which are a few deviations.
    expected['size']['d_scale_weight'] += 8 * expected['size']['d_scale_bias']
    there = on_device(made, offset, device)
    inputs_before = [tensor.clone() for tensor in tests.tensors_of(there)]
    outputs = []
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with these, torch fills new memory with NaN
    try:
        with tests.programs_aimed_at(programs):
            for _ in range(2):
                out = tests.layer(*there, threshold, MAX_SAMPLES)
                synchronize(device)
                outputs.append({name: value.cpu() for name, value in out.items()})
    finally:
        torch.use_deterministic_algorithms(was)
    first, second = outputs
    for name, value in first.items():
        if not same_bits(value, second[name]):
            raise AssertionError(f'{name} has other bits the second time')
    for tensor, before in zip(tests.tensors_of(there), inputs_before, strict=True):
        if not same_bits(tensor, before):
            raise AssertionError('a kernel wrote into its input')
    compare(first, expected, MAX_SAMPLES * len(made[0]))


def compare(found: dict[str, Tensor], expected: dict[str, Any], similarity_size: float) -> None:
    """All that the tests compare, with what they allow."""
    tests = numbers()
    for name in ('a', 'v', 'var', 'running_mean', 'running_var', 'tau'):
        tests.close(name, found[name], expected[name])
    tests.close('similarity_sums', found['similarity_sums'], expected['similarity_sums'], similarity_size)
    if bool(found['condensed']) != bool(expected['condensed']):
        raise AssertionError(f'condensed is {bool(found["condensed"])}, expected {bool(expected["condensed"])}')
    for name in ('y', 'd_x', *(f'd_{name}' for name in tests.NAMES)):
        if name in expected:
            tests.close(name, found[name], expected[name], expected['size'].get(name, 0.0))


def on_device(made: tuple, offset: int, device: torch.device) -> tuple:
    """A case on the device, each tensor ``offset`` elements into memory that is NaN before and after it."""

    def place(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dim() == 0:
            return None if tensor is None else tensor.to(device)
        memory = torch.full((tensor.numel() + 2 * offset,), math.nan, dtype=tensor.dtype, device=device)
        return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)

    x, dy, parameters, running, options = made
    placed = ({name: place(value) for name, value in group.items()} for group in (parameters, running))
    return place(x), place(dy), *placed, options


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())
