"""Compile the GPU kernels of a config's norms before it trains, several at a time, into Triton's cache.

Triton compiles a kernel at its first launch, which takes seconds each time; in distributed training all processes wait
for the one that compiles. After this tool a run finds them compiled. It needs no data, no weights and no GPU: a login
node can do it for a cluster, if both see the same cache, TRITON_CACHE_DIR (docs/performance.md).

Images are as large as the pipelines of the config make them and the padding of batches leaves them.

Examples:

    python tools/misc/compile_kernels.py configs/faster_rcnn/faster-rcnn_r50_fpn_ubn-backbone_1x_coco.py
    python tools/misc/compile_kernels.py configs/imagenet/resnet50-ubn_8xb32_in1k.py --architecture 80 90 --jobs 8
"""

from __future__ import annotations

import argparse
import os
import time
from importlib.util import find_spec

import torch
from mmengine.utils import ProgressBar

import mmubn  # noqa: F401 - registers UBN for configs that do not import it
from mmubn.analysis.benchmark import DTYPES, MEMORY_FORMATS, at_least
from mmubn.cli import UsageError, add_config_arguments, add_debug_argument, load_config, run_tool
from mmubn.openmmlab.config_checks import check_norm_types
from mmubn.ops.triton import architecture


def size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split(','))
    if min(height, width) < 1:
        raise ValueError(text)
    return height, width


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\nExamples')[0],
        epilog=__doc__[__doc__.index('Examples') :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument('--dtype', choices=DTYPES, nargs='+', help="of the data; default: that of the config's AMP")
    parser.add_argument('--memory-format', choices=MEMORY_FORMATS, nargs='+', default=['nchw'])
    parser.add_argument(
        '--sizes', type=size, nargs='+', default=[], metavar='H,W', help='of batches; default: by the pipelines'
    )
    parser.add_argument(
        '--architecture',
        type=int,
        nargs='+',
        metavar='SM',
        help='80: A100, 89: RTX 40, 90: H100; default: the GPUs of this machine',
    )
    parser.add_argument('--jobs', type=at_least(1), default=len(os.sched_getaffinity(0)), help='default: all cores')
    add_debug_argument(parser)
    return parser.parse_args()


def architectures(asked: list[int] | None) -> list[int]:
    """10 times the compute capabilities that are asked for, or of the GPUs of this machine."""
    devices = range(torch.cuda.device_count())
    found = asked or sorted({10 * major + minor for major, minor in map(torch.cuda.get_device_capability, devices)})
    if not found:
        raise UsageError('there is no GPU here: say which GPUs will train, --architecture 90 (H100), 80 (A100) ...')
    for number in found:
        if number < 80:
            raise UsageError(f'--architecture must be 80 or more, the kernels need newer GPUs than {number}.')
        if (reason := architecture.trouble(divmod(number, 10))) is not None:
            raise UsageError(f'--architecture {number}: {reason}.')
    return found


def main(args: argparse.Namespace) -> None:
    if find_spec('triton') is None:
        raise UsageError('Triton is not installed; it comes with torch for Linux.')
    from mmubn.analysis.config_launches import calls_of, launches_of, launches_of_probe, splits_of
    from mmubn.analysis.kernel_cache import cache_folder, compile_variants, variants_of

    found = architectures(args.architecture)
    cfg = load_config(args)
    check_norm_types(cfg)
    dtypes = [DTYPES[name] for name in args.dtype or ()]
    calls, others = calls_of(cfg, splits_of(cfg, dtypes, args.sizes))
    if others:
        print(f'{len(others)} norms get their input where this tool does not look, {others[0]} for one: not compiled')
    variants = dict.fromkeys(variants_of(launches_of_probe())) | dict.fromkeys(
        variant
        for split, of_split in calls.items()
        for call in of_split
        for name in args.memory_format
        for variant in variants_of(launches_of(call, split.dtype, MEMORY_FORMATS[name]))
    )
    start = time.perf_counter()
    bar = ProgressBar(len(variants) * len(found))
    for _ in compile_variants(variants, found, args.jobs):
        bar.update()
    names = ', '.join(f'sm_{number}' for number in found)
    print(f'\n{len(variants)} variants for {names} in {time.perf_counter() - start:.0f} s, in {cache_folder()}')


if __name__ == '__main__':
    run_tool(parse_args, main)
