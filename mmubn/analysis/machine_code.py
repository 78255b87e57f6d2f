"""What the GPU kernels of a layer are in machine code, without a GPU. Needs Triton, which brings the disassembler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmubn import ops
from mmubn.layers import UBN
from mmubn.ops.triton import runtime, tiling
from mmubn.ops.triton.runtime import Launch

__all__ = [
    'Code',
    'Pass',
    'compile_launch',
    'instructions_per_value',
    'kernel_name',
    'launches_of_a_step',
    'passes',
    'read_code',
    'source_of',
    'variant_of',
]

POINTERS = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.bool: 'i1', torch.int64: 'i64'}
# Tensors of the size of x that a kernel reads and writes
PASSES = {'moments': 1, 'apply': 2, 'tap_sums': 2, 'input_gradient': 3}


class Code(NamedTuple):
    """The machine code of a kernel: its instructions, and where its loops are in them, the largest first."""

    registers: int
    shared: int  # bytes
    spills: int  # instructions that move a register to or from memory
    instructions: int
    loops: list[int]  # lengths


class Pass(NamedTuple):
    """A kernel that passes over data of the size of x."""

    launch: Launch
    code: Code
    instructions: float  # of all lanes, for each value of x
    bytes_moved: int  # for each value of x


def passes(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, kernel_size: int, architecture: int
) -> list[Pass]:
    """The kernels of one training step of a UBN that pass over the data, in their order.

    Args:
        shape: Of the input, (N, C, H, W).
        dtype: Of the input.
        memory_format: Of the input.
        kernel_size: k of the layer.
        architecture: 10 times the compute capability of the GPU.
    """
    found = []
    values = torch.Size(shape).numel()
    for launch in launches_of_a_step(shape, dtype, memory_format, kernel_size):
        tensors = PASSES.get(kernel_name(launch))
        if tensors is not None:
            code = read_code(compile_launch(launch, architecture).asm['cubin'])
            count = instructions_per_value(launch, code, values)
            found.append(Pass(launch, code, count, tensors * dtype.itemsize))
    return found


def launches_of_a_step(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, kernel_size: int
) -> list[Launch]:
    """What forward and backward of a UBN launch for an input of this kind; nothing is computed."""
    layer = UBN(shape[1], kernel_size=kernel_size).to('meta')
    x = torch.empty(shape, dtype=dtype, device='meta').to(memory_format=memory_format).requires_grad_()
    with runtime.recorded() as launches, ops.use_backend('triton'):
        y = layer(x)
        y.backward(torch.empty_like(y))
    return launches


def kernel_name(launch: Launch) -> str:
    """``_moments_kernel`` is ``moments``."""
    return launch.kernel.fn.__name__.strip('_').removesuffix('_kernel')


def source_of(launch: Launch) -> ASTSource:
    """The kernel specialised as a launch specialises it: to None, to 1, and to what 16 divides."""
    signature, fixed, attributes = _specialisation(launch)
    return ASTSource(launch.kernel, signature, fixed, attributes)


def variant_of(launch: Launch) -> tuple:
    """What a launch is compiled for: launches that are equal in this share their machine code."""
    signature, fixed, attributes = _specialisation(launch)
    return kernel_name(launch), *signature.items(), *fixed.items(), *attributes, launch.num_warps


def _specialisation(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list]]:
    """The types of the parameters, the values of those that are fixed, and the attributes of the others."""
    kernel = launch.kernel
    types: dict[str, str] = {}
    fixed: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list] = {}
    for i, (parameter, value) in enumerate(zip(kernel.params, launch.arguments, strict=False)):
        name = parameter.name
        if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            fixed[name] = value
            continue
        if isinstance(value, Tensor):
            types[name] = f'*{POINTERS[value.dtype]}'
        else:
            types[name] = 'fp32' if isinstance(value, float) else 'i32' if value < 2**31 else 'i64'
        number = value.data_ptr() if isinstance(value, Tensor) else value
        unspecialised = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if isinstance(number, int) and number % 16 == 0 and not unspecialised:
            attributes[(i,)] = [['tt.divisibility', 16]]
    types |= dict.fromkeys(fixed, 'constexpr')
    return {name: types[name] for name in kernel.arg_names}, fixed, attributes


def compile_launch(launch: Launch, architecture: int) -> Any:
    """Triton's compiled kernel for a GPU of compute capability ``architecture`` / 10."""
    target = GPUTarget('cuda', architecture, 32)
    return triton.compile(source_of(launch), target=target, options={'num_warps': launch.num_warps})


def read_code(cubin: bytes) -> Code:
    """The machine code in a cubin, by cuobjdump."""
    program = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ('--dump-sass', '--dump-resource-usage')
        )
    pattern = r'^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);'
    code = [(int(address, 16), name, rest) for address, name, rest in re.findall(pattern, text, re.MULTILINE)]
    # After the end comes a branch to itself and padding.
    code = [(address, name, rest) for address, name, rest in code if name != 'NOP']
    loops = []
    for address, name, rest in code:
        target = re.search(r'0x([0-9a-f]+)', rest) if name.startswith('BRA') else None
        if target and int(target[1], 16) < address:
            loops.append(sum(int(target[1], 16) <= other <= address for other, _, _ in code))
    spills = sum(name.startswith(('LDL', 'STL')) for _, name, _ in code)
    return Code(_usage('REG', usage), _usage('SHARED', usage), spills, len(code), sorted(loops, reverse=True))


def _usage(name: str, text: str) -> int:
    """The number that cuobjdump gives for a resource."""
    found = re.search(rf'{name}:(\d+)', text)
    assert found is not None, f'cuobjdump says nothing of {name}: {text}'
    return int(found[1])


def instructions_per_value(launch: Launch, code: Code, values: int) -> float:
    """Instructions of all lanes for each of ``values`` values of x.

    An instruction counts for every lane, whether it has a value to work on or not. What a program does before and after
    its loop over tiles counts too; a branch around a part of that is taken to go through it.
    """
    repeated = code.loops[0] * (_rounds(launch) - launch.programs) if code.loops else 0
    return (code.instructions * launch.programs + repeated) * launch.num_warps * 32 / values


def _rounds(launch: Launch) -> int:
    """How often all programs together run through their loop over the data; the parts of planes share it."""
    argument = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    constants = launch.constants
    if kernel_name(launch) == 'moments':
        pixels = argument['pixel_groups'] * constants['VECTOR']
        rounds = tiling.ceil_div(pixels, constants['UNROLL'] * constants['BLOCK_X'])
    else:
        rows, columns = (
            tiling.ceil_div(argument[size], constants[of_tile])
            for size, of_tile in (('height', 'ROWS'), ('width', 'COLUMNS'))
        )
        rounds = tiling.ceil_div(rows * columns, constants['BLOCK_Q'])
    return launch.programs // argument['parts'] * rounds
