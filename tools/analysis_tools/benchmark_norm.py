"""Time and memory of the norm layers side by side: one layer, a ResNet-50, a layer as its input grows, deployment.

Every contender takes its turn in every round, in an order drawn anew, and a ratio is taken within a round: what slows
the machine down for a while slows all of them. Reported are medians with the first and third quartile. Needs torch
alone; shows a progress bar where tqdm is installed, and draws plots where Matplotlib is.

The contenders:

    bn             nn.BatchNorm2d
    composition    BatchNorm2d(affine=False) followed by a depthwise 3x3 Conv2d: the operators that BNET is made of
    bnet, rbn      mmubn.BNET, mmubn.RBN
    ubn            mmubn.UBN, by the backend that it chooses for the input
    ubn-torch      mmubn.UBN, by torch's operators on any device; only where asked for
    ubn-reference  mmubn.UBN, by the readable reference
    ubn-naive      UBN as one would write it with torch's operators, without this package

`deployed` is evaluation alone, on the CPU: a ResNet-50 as trained and folded, in torch and in ONNX Runtime,
beside one whose BatchNorms are fused into its convolutions. It needs onnx, onnxscript and onnxruntime.

Examples:

    python tools/analysis_tools/benchmark_norm.py layer --out work_dirs/benchmark/layer
    python tools/analysis_tools/benchmark_norm.py layer --device cuda --dtype bf16 --memory-format nchw channels_last
    python tools/analysis_tools/benchmark_norm.py network --contenders bn composition ubn
    python tools/analysis_tools/benchmark_norm.py sweep --contenders composition ubn ubn-naive --out work_dirs/benchmark
    python tools/analysis_tools/benchmark_norm.py deployed --threads 1 --out work_dirs/benchmark/deployed
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path

import torch

from mmubn.analysis.benchmark import (
    CONTENDERS,
    DEFAULT_CONTENDERS,
    DTYPES,
    MEMORY_FORMATS,
    Clock,
    LayerTrial,
    NetworkTrial,
    Plan,
    Setting,
    at_least,
    copy_bandwidth,
    deployed_markdown,
    device,
    markdown,
    measure,
    measure_deployed,
    plot,
    shape,
    sweep_axes,
    write_csv,
    write_deployed_csv,
)
from mmubn.analysis.outputs import unwritable

# The norms of a ResNet-50 in a detector, two images of about 400x400 pixels, and one of ImageNet training.
LAYER_SHAPES = [
    (2, 64, 100, 100),
    (2, 256, 100, 100),
    (2, 512, 50, 50),
    (2, 1024, 25, 25),
    (2, 2048, 13, 13),
    (16, 64, 56, 56),
]


DEPLOYED = ('bnet', 'rbn', 'ubn')


def parse_args() -> argparse.Namespace:
    """Parse the command line; ``plan`` of the result is the Plan that it asks for, None of ``deployed``."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\nExamples')[0],
        epilog=__doc__[__doc__.index('Examples') :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modes = parser.add_subparsers(dest='mode', required=True, metavar='MODE')
    layer = modes.add_parser('layer', help='one layer at several input shapes')
    network = modes.add_parser('network', help='training step and evaluation of a ResNet-50 with each norm')
    sweep = modes.add_parser('sweep', help='one layer as N, C or H*W grows')
    for mode in (layer, network, sweep):
        several = 1 if mode is sweep else '+'
        found = 'cuda' if torch.cuda.is_available() else 'cpu'
        mode.add_argument('--device', type=device, default=found, help='cpu, cuda or cuda:INDEX; default: a GPU if any')
        mode.add_argument(
            '--contenders',
            nargs='+',
            choices=CONTENDERS,
            default=DEFAULT_CONTENDERS,
            metavar='NAME',
            help=f'of {", ".join(CONTENDERS)}; default: all but ubn-torch',
        )
        mode.add_argument(
            '--baseline',
            choices=CONTENDERS,
            metavar='NAME',
            help='contender that the ratios are to; default: bn for a network and on a GPU, else composition',
        )
        mode.add_argument('--dtype', nargs=several, choices=DTYPES, default=['fp32'], help='by autocast where not fp32')
        mode.add_argument('--memory-format', nargs=several, choices=MEMORY_FORMATS, default=['nchw'])
        mode.add_argument('--cold-cache', action='store_true', help='overwrite the caches before every timing')
    layer.add_argument(
        '--shapes', nargs='+', type=shape, default=LAYER_SHAPES, metavar='N,C,H,W', help='default: of a ResNet-50'
    )
    network.add_argument('--shapes', nargs='+', type=shape, default=[(2, 3, 320, 320)], metavar='N,3,H,W')
    sweep.add_argument('--base', type=shape, default=(4, 64, 56, 56), metavar='N,C,H,W', help='what is not swept')
    sweep.add_argument('--batch-sizes', nargs='+', type=at_least(1), default=[1, 2, 4, 8, 16, 32], metavar='N')
    sweep.add_argument('--channels', nargs='+', type=at_least(1), default=[16, 32, 64, 128, 256, 512], metavar='C')
    sweep.add_argument(
        '--sides', nargs='+', type=at_least(1), default=[14, 20, 28, 40, 56, 80, 112], metavar='S', help='H = W = S'
    )
    network.set_defaults(cuda_graphs=False)
    for mode in (layer, sweep):
        mode.add_argument(
            '--cuda-graphs',
            action='store_true',
            help='replay each step as a CUDA graph, without what launching kernels costs; leaves ubn-naive out',
        )
    deployed = modes.add_parser('deployed', help='evaluation of a ResNet-50 as trained, folded, and in ONNX Runtime')
    deployed.add_argument(
        '--norms',
        nargs='+',
        choices=DEPLOYED,
        default=['bnet', 'ubn'],
        metavar='NAME',
        help=f'of {", ".join(DEPLOYED)}',
    )
    deployed.add_argument('--shapes', nargs='+', type=shape, default=[(1, 3, 320, 320)], metavar='N,3,H,W')
    for mode in (layer, network, sweep, deployed):
        mode.add_argument('--repeats', type=at_least(3), default=20, help='rounds that count; default: 20')
        mode.add_argument('--warmup', type=at_least(1), default=3, help='rounds before them; default: 3')
        mode.add_argument('--threads', type=at_least(1), help='threads of the CPU; default: those that torch takes')
        files = 'results.md and results.csv' if mode is deployed else 'results.md, results.csv, plot.png and plot.svg'
        mode.add_argument('--out', type=Path, help=f'folder for {files}')
    args = parser.parse_args()
    args.plan = None if args.mode == 'deployed' else make_plan(args)
    check(args, modes.choices[args.mode].error)
    return args


def make_plan(args: argparse.Namespace) -> Plan:
    trial = NetworkTrial if args.mode == 'network' else LayerTrial
    baseline = args.baseline or ('composition' if trial is LayerTrial and args.device.type == 'cpu' else 'bn')
    contenders = list(dict.fromkeys([baseline, *args.contenders]))
    axes = {}
    if args.mode == 'sweep':
        form = args.dtype[0], args.memory_format[0]
        axes = sweep_axes(args.base, args.batch_sizes, args.channels, args.sides, *form)
        settings = [setting for points in axes.values() for _, setting in points]
    else:
        settings = itertools.starmap(Setting, itertools.product(args.shapes, args.dtype, args.memory_format))
    return Plan(
        mode=args.mode,
        trial=trial,
        settings=list(dict.fromkeys(settings)),
        contenders=[name for name in contenders if name != 'ubn-naive'] if args.cuda_graphs else contenders,
        baseline=baseline,
        device=args.device,
        axes=axes,
        repeats=args.repeats,
        warmup=args.warmup,
        cuda_graphs=args.cuda_graphs,
        cold_cache=args.cold_cache,
    )


def check(args: argparse.Namespace, error: Callable[[str], None]) -> None:
    """Call ``error`` for arguments that do not fit each other."""
    plan = args.plan
    if plan is None:
        check_deployed(args, error)
    elif plan.cuda_graphs:
        if plan.device.type != 'cuda':
            error(f'--cuda-graphs needs a GPU, but --device is {plan.device}; leave --cuda-graphs out')
        if plan.baseline == 'ubn-naive':
            error(
                '--baseline ubn-naive reads its gate on the host, which a CUDA graph cannot do; take another baseline'
            )
    for setting in plan.settings if plan is not None else ():
        n, c, h, w = setting.shape
        values = n * h * w
        if plan.trial is NetworkTrial:
            if c != 3:
                error(f'--shapes of a network have 3 channels, as in 2,3,320,320, got {c} in {setting}')
            values = n * ceil(h / 32) * ceil(w / 32)  # in the last stage
        if values == 1:
            error(f'{setting} has a single value per channel, which has no variance; take a larger batch or map')
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        error(f'--out {args.out} is a file; give the path of a folder')
    if args.out is not None and (problem := unwritable(args.out / 'results.md')):
        error(f'--out {args.out} cannot be written: {problem}')


def check_deployed(args: argparse.Namespace, error: Callable[[str], None]) -> None:
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        error(f'deployed needs {", ".join(missing)}: pip install {" ".join(missing)}')
    for images in args.shapes:
        if images[1] != 3:
            error(f'--shapes of images have 3 channels, as in 1,3,320,320, got {",".join(map(str, images))}')


@contextlib.contextmanager
def progress(rounds: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar; give the function to call, with a label, after every round."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda label: None
        return
    with tqdm(total=rounds, unit='round') as bar:

        def advance(label: str) -> None:
            bar.set_description(label, refresh=False)
            bar.update()

        yield advance


def main() -> None:
    args = parse_args()
    plan = args.plan
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    command = shlex.join(['python', 'tools/analysis_tools/benchmark_norm.py', *sys.argv[1:]])
    if plan is None:
        measure_deployment(args, command)
        return
    if plan.device.type == 'cuda':
        torch.cuda.set_device(plan.device)
    copy = copy_bandwidth(Clock(plan.device))
    with progress(plan.rounds) as advance:
        results = measure(plan, Clock(plan.device, plan.cold_cache), advance)
    text = markdown(results, plan, copy, command)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'results.md').write_text(text)
        write_csv(results, plan.mode, args.out / 'results.csv')
        paths = [args.out / 'results.md', args.out / 'results.csv', *plot(results, plan, args.out)]
        print(f'wrote {", ".join(map(str, paths))}')


def measure_deployment(args: argparse.Namespace, command: str) -> None:
    """What ``deployed`` does."""
    with progress(len(args.shapes) * (args.warmup + args.repeats)) as advance:
        results = measure_deployed(args.norms, args.shapes, args.repeats, args.warmup, advance)
    text = deployed_markdown(results, args.repeats, args.warmup, command)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'results.md').write_text(text)
        write_deployed_csv(results, args.out / 'results.csv')
        print(f'wrote {args.out / "results.md"}, {args.out / "results.csv"}')


if __name__ == '__main__':
    main()
