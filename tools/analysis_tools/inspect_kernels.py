"""What the GPU kernels of a layer are in machine code, without a GPU: registers, spills, instructions for each value.

Compiles what one training step of ``mmubn.UBN`` launches and reads the result with the disassembler that comes with
Triton. A kernel that passes over the data is bound by the memory as long as it has fewer instructions for each byte
than the GPU can issue while it moves that byte: about 7 on an H200 (132 multiprocessors of 4 x 32 lanes, 1.98 GHz,
4.8 TB/s).

An instruction counts for every lane, whether it has a value to work on or not. What a program does before and after its
loop over tiles counts too; a branch around a part of that is taken to go through it.

Examples:

    python tools/analysis_tools/inspect_kernels.py --dtype bf16 --memory-format nchw channels_last
    python tools/analysis_tools/inspect_kernels.py --shapes 2,256,100,100 --kernel-size 5 --architecture 80
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from benchmark_norm import DTYPES, MEMORY_FORMATS, shape

import mmubn
from mmubn import kernels
from mmubn.kernels import triton_kernels

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    sys.exit('inspect_kernels: Triton is not installed; it comes with torch for Linux.')

# The stages of a ResNet-50 at ImageNet's size
SHAPES = [(64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)]
POINTERS = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.bool: 'i1'}
# Tensors of x's size that a kernel reads and writes
PASSES = {'moments': 1, 'apply': 2, 'tap_sums': 2, 'input_gradient': 3}


class Launch(NamedTuple):
    """One launch of a kernel, recorded."""

    kernel: object
    programs: int
    arguments: tuple
    constants: dict[str, int | bool]
    num_warps: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip('_').removesuffix('_kernel')


class Code(NamedTuple):
    """The machine code of a kernel: its instructions, and where its loops are in them, the largest first."""

    registers: int
    shared: int  # bytes
    spills: int  # instructions that move a register to or from memory
    instructions: int
    loops: list[int]  # lengths


def launches_of_a_step(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, kernel_size: int
) -> list[Launch]:
    """What forward and backward of a UBN launch for an input of this kind; nothing is computed."""
    recorded = []

    def record(kernel, programs, device, *arguments, num_warps=4, **constants):
        recorded.append(Launch(kernel, programs, arguments, constants, num_warps))

    layer = mmubn.UBN(shape[1], kernel_size=kernel_size).to('meta')
    x = torch.empty(shape, dtype=dtype, device='meta').to(memory_format=memory_format).requires_grad_()
    with (
        mock.patch.object(triton_kernels, '_launch', record),
        mock.patch.object(triton_kernels, '_lacking', return_value=None),
        kernels.use_backend('triton'),
    ):
        y = layer(x)
        y.backward(torch.empty_like(y))
    return recorded


def source_of(kernel: object, arguments: tuple, constants: dict[str, int | bool]) -> ASTSource:
    """A kernel specialised as a launch specialises it: to None, to 1, and to what 16 divides."""
    signature, fixed, attributes = {}, dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        specialised = name not in (kernel.do_not_specialize or ())
        if value is None or (isinstance(value, int) and value == 1 and specialised):
            fixed[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = f'*{POINTERS[value.dtype]}'
        else:
            signature[name] = 'fp32' if isinstance(value, float) else 'i32' if value < 2**31 else 'i64'
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and specialised):
            attributes[(i,)] = [['tt.divisibility', 16]]
    signature |= dict.fromkeys(fixed, 'constexpr')
    return ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, fixed, attributes)


def compile_launch(launch: Launch, architecture: int) -> object:
    """Triton's compiled kernel for a GPU of compute capability ``architecture`` / 10."""
    source = source_of(launch.kernel, launch.arguments, launch.constants)
    return triton.compile(source, target=GPUTarget('cuda', architecture, 32), options={'num_warps': launch.num_warps})


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
    registers, shared = (int(re.search(rf'{name}:(\d+)', usage)[1]) for name in ('REG', 'SHARED'))
    spills = sum(name.startswith(('LDL', 'STL')) for _, name, _ in code)
    return Code(registers, shared, spills, len(code), sorted(loops, reverse=True))


def rounds_of(launch: Launch) -> int:
    """How often a program runs through its loop over the data."""
    argument = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    if launch.name == 'moments':
        return argument['rounds_per_part']
    return triton_kernels._ceil(argument['tiles_per_part'], launch.constants['BLOCK_Q'])


def instructions_per_value(launch: Launch, code: Code, values: int) -> float:
    """Instructions of all lanes for each value of x."""
    repeated = code.loops[0] * (rounds_of(launch) - 1) if code.loops else 0
    return (code.instructions + repeated) * launch.programs * launch.num_warps * 32 / values


def report(
    shape: tuple[int, ...], dtype: str, memory_format: str, kernel_size: int, architecture: int
) -> list[dict[str, str]]:
    """One row for each kernel that passes over the data."""
    rows = []
    values = torch.Size(shape).numel()
    for launch in launches_of_a_step(shape, DTYPES[dtype], MEMORY_FORMATS[memory_format], kernel_size):
        if launch.name not in PASSES:
            continue
        code = read_code(compile_launch(launch, architecture).asm['cubin'])
        moved = PASSES[launch.name] * DTYPES[dtype].itemsize
        count = instructions_per_value(launch, code, values)
        tile = [launch.constants[name] for name in ('ROWS', 'COLUMNS') if name in launch.constants]
        rows.append(
            {
                'kernel': launch.name,
                'input': f'{"x".join(map(str, shape))} {dtype} {memory_format}',
                'tile': 'x'.join(map(str, tile)) or '-',
                'programs': str(launch.programs),
                'registers': str(code.registers),
                'spills': str(code.spills),
                'instructions / value': f'{count:.1f}',
                'bytes / value': str(moved),
                'instructions / byte': f'{count / moved:.1f}',
            }
        )
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\nExamples')[0],
        epilog=__doc__[__doc__.index('Examples') :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    parser.add_argument('--shapes', type=shape, nargs='+', default=SHAPES, metavar='N,C,H,W')
    parser.add_argument('--dtype', choices=DTYPES, nargs='+', default=['bf16'])
    parser.add_argument('--memory-format', choices=MEMORY_FORMATS, nargs='+', default=['nchw', 'channels_last'])
    parser.add_argument('--kernel-size', type=int, choices=triton_kernels.KERNEL_SIZES, default=3)
    parser.add_argument('--architecture', type=int, choices=(80, 90), default=90, help='80: A100, 90: H100, H200')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    header = None
    for memory_format in args.memory_format:
        for dtype in args.dtype:
            for sizes in args.shapes:
                for row in report(sizes, dtype, memory_format, args.kernel_size, args.architecture):
                    if header is None:
                        header = list(row)
                        print(f'| {" | ".join(header)} |')
                        print(f'| {" | ".join(["---"] * 3 + ["---:"] * (len(header) - 3))} |')
                    print(f'| {" | ".join(row.values())} |', flush=True)


if __name__ == '__main__':
    main()
