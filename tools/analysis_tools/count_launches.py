"""How many kernels torch's operators launch on a GPU for a layer and for a ResNet-50, counted without a GPU.

Two backends, `reference` and `torch`: what a layer takes where the Triton kernels do not run. A step is forward and
backward, in evaluation too, as with norm_eval; without the optimizer. Traffic is what the launches read and write,
in tensors of the size of the layer's input.

Examples:

    python tools/analysis_tools/count_launches.py
    python tools/analysis_tools/count_launches.py --shape 2,3,800,1344
"""

from __future__ import annotations

import argparse
import math

import torch

from mmubn.analysis.benchmark import MEMORY_FORMATS, resnet50, shape
from mmubn.analysis.launches import launches_of_a_step
from mmubn.layers import BNET, IEBN, RBN, UBN, UnitizedBN

BACKENDS = ('reference', 'torch')
TYPES = {'UBN': UBN, 'RBN': RBN, 'BNET': BNET, 'IEBN': IEBN, 'UnitizedBN': UnitizedBN}
LAYER = (32, 64, 56, 56)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\nExamples')[0],
        epilog=__doc__[__doc__.index('Examples') :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--shape', type=shape, default=(256, 3, 224, 224), metavar='N,C,H,W', help="the network's input (%(default)s)"
    )
    return parser.parse_args()


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print(f'| {" | ".join(header)} |')
    print(f'| {" | ".join("---" if cell in ("layer", "layout") else "---:" for cell in header)} |')
    for row in rows:
        print(f'| {" | ".join(row)} |')
    print()


def network_row(layout: str, sizes: tuple[int, int, int, int]) -> list[str]:
    row = [layout]
    for backend in BACKENDS:
        steps = launches_of_a_step(resnet50(UBN), sizes, memory_format=MEMORY_FORMATS[layout], backend=backend)
        row.append(f'{sum(each.total for each in steps):,}')
    return row


def layer_row(name: str, layout: str) -> list[str]:
    row = [name, layout]
    for training in (True, False):
        for backend in BACKENDS:
            layer = TYPES[name](LAYER[1]).train(training)
            steps = launches_of_a_step(layer, LAYER, torch.float32, MEMORY_FORMATS[layout], backend)
            traffic = sum(each.bytes_moved for each in steps) / (4 * math.prod(LAYER))
            row.append(f'{sum(each.total for each in steps)} ({traffic:.0f})')
    return row


def main() -> None:
    args = parse_args()
    print(f'Launches of a training step of a ResNet-50 with UBN, {"x".join(map(str, args.shape))}:\n')
    print_table(['layout', *BACKENDS], [network_row(layout, args.shape) for layout in MEMORY_FORMATS])
    print(f'Launches (traffic) of a step of a layer, {"x".join(map(str, LAYER))}, float32:\n')
    modes = [f'{mode}, {backend}' for mode in ('training', 'evaluation') for backend in BACKENDS]
    print_table(['layer', 'layout', *modes], [layer_row(name, layout) for name in TYPES for layout in MEMORY_FORMATS])


if __name__ == '__main__':
    main()
