"""What a step of a layer costs the host on the way to a GPU, without a GPU.

Layers are trained on a tiny map through the Triton kernels' way: checks, look-ups, memory, autograd and launches, which
go to a driver that launches nothing. A GPU's own driver adds some microseconds to each launch, of BatchNorm too. The
time is that of the thread, not of the clock, so that other programs count less. Needs torch and Triton alone.

Example:

    python tools/analysis_tools/host_time.py
"""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib.util import find_spec

import torch
from torch import nn

from mmubn import BNET, RBN, UBN
from mmubn.analysis.benchmark import at_least, shape
from mmubn.analysis.benchmark.measurement import quartiles
from mmubn.analysis.benchmark.report import cpu_name, spread, table

if find_spec('triton') is None:
    sys.exit('host_time: Triton is not installed; it comes with torch for Linux.')

from mmubn.analysis.host_time import host_times


def parse_args() -> argparse.Namespace:
    description, example = __doc__.split('\nExample')
    parser = argparse.ArgumentParser(
        description=description, epilog='Example' + example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--shape', type=shape, default=(4, 64, 4, 4), metavar='N,C,H,W')
    parser.add_argument('--rounds', type=at_least(1), default=200)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    channels = args.shape[1]
    layers = {
        'bn': nn.BatchNorm2d(channels),
        'ubn': UBN(channels),
        'ubn, evaluation': UBN(channels).eval(),
        'rbn': RBN(channels),
        'bnet': BNET(channels),
    }
    found = host_times(layers, args.shape, args.rounds)
    rows = []
    for name, measures in found.items():
        row = [name]
        for measure, values in measures.items():
            ratios = [value / other for value, other in zip(values, found['bn'][measure], strict=True)]
            row += [spread(quartiles(values)), spread(quartiles(ratios))]
        rows.append(row)
    print(f'- Machine: {cpu_name()}')
    print(f'- Versions: torch {torch.__version__}')
    print(f'- Command: `{shlex.join(["python", *sys.argv])}`', '\n')
    print('\n'.join(table(['layer', 'forward (us)', 'forward / bn', 'step (us)', 'step / bn'], rows)))


if __name__ == '__main__':
    main()
