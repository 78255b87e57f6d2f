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
import itertools
import sys
from importlib.util import find_spec

from mmubn.analysis.benchmark import DTYPES, MEMORY_FORMATS, shape
from mmubn.ops.triton.inputs import KERNEL_SIZES

if find_spec('triton') is None:
    sys.exit('inspect_kernels: Triton is not installed; it comes with torch for Linux.')

from mmubn.analysis.machine_code import Pass, kernel_name, passes

# The stages of a ResNet-50 at ImageNet's size
SHAPES = [(64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\nExamples')[0],
        epilog=__doc__[__doc__.index('Examples') :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    parser.add_argument('--shapes', type=shape, nargs='+', default=SHAPES, metavar='N,C,H,W')
    parser.add_argument('--dtype', choices=DTYPES, nargs='+', default=['bf16'])
    parser.add_argument('--memory-format', choices=MEMORY_FORMATS, nargs='+', default=['nchw', 'channels_last'])
    parser.add_argument('--kernel-size', type=int, choices=KERNEL_SIZES, default=3)
    parser.add_argument('--architecture', type=int, choices=(80, 90), default=90, help='80: A100, 90: H100, H200')
    return parser.parse_args()


def row_of(found: Pass, words: str) -> dict[str, str]:
    """What the table says of a kernel for the input that ``words`` describe."""
    tile = [str(found.launch.constants[name]) for name in ('ROWS', 'COLUMNS') if name in found.launch.constants]
    return {
        'kernel': kernel_name(found.launch),
        'input': words,
        'tile': 'x'.join(tile) or '-',
        'programs': str(found.launch.programs),
        'registers': str(found.code.registers),
        'spills': str(found.code.spills),
        'instructions / value': f'{found.instructions:.1f}',
        'bytes / value': str(found.bytes_moved),
        'instructions / byte': f'{found.instructions / found.bytes_moved:.1f}',
    }


def main() -> None:
    args = parse_args()
    has_header = False
    for memory_format, dtype, sizes in itertools.product(args.memory_format, args.dtype, args.shapes):
        words = f'{"x".join(map(str, sizes))} {dtype} {memory_format}'
        for found in passes(sizes, DTYPES[dtype], MEMORY_FORMATS[memory_format], args.kernel_size, args.architecture):
            row = row_of(found, words)
            if not has_header:
                has_header = True
                print(f'| {" | ".join(row)} |')
                print(f'| {" | ".join(["---"] * 3 + ["---:"] * (len(row) - 3))} |')
            print(f'| {" | ".join(row.values())} |', flush=True)


if __name__ == '__main__':
    main()
