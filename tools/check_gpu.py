"""Whether the norm layers are right and fast on this machine's GPU. Needs torch, Triton and pytest; nothing else.

Stages, in this order:

    environment   versions, compiler, headers, Triton's cache; which backend a layer takes
    kernels       every case of the kernels' tests, aligned and not, with NaN around the memory, twice for the same bits
    layers        whole layers of every type at sizes of detection and ImageNet, beside the reference in float64
    features      CUDA graphs, torch.compile, streams, threads, checkpoints, mixed precision, SyncUBN, more than 2^31
                  values, no waiting for the device
    sanitizer     a few cases under NVIDIA's compute-sanitizer, where it is installed
    speed         a layer, each kernel, a ResNet-50 and its memory beside cuDNN's BatchNorm; a Faster R-CNN trains

About ten minutes on an H100 with 16 cores, most of it compilation in many processes; a machine with fewer cores has
more time. Prints a line for each check and a verdict. The exit status is 0 if nothing failed; a figure that misses its
bar is no failure. The report, a Markdown file, is written after every check: a run that is ended leaves what it found.

Examples:

    python tools/check_gpu.py
    python tools/check_gpu.py --skip-speed --out work_dirs/check_gpu/right     # and, with the GPU to itself:
    python tools/check_gpu.py --stages speed --out work_dirs/check_gpu/fast
    python tools/check_gpu.py --device cpu      # tries the check itself in Triton's interpreter, in a minute or two
"""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / 'tests' / 'ops').is_dir():
    sys.exit(f'check_gpu: it runs the tests of the kernels, and there are none in {ROOT}: run it in a clone of mmubn.')
sys.path.insert(0, str(ROOT))
# That there is no MMEngine: none is needed here.
warnings.filterwarnings('ignore', message='mmubn: .* is not installed')

if find_spec('torch') is None:
    sys.exit(f'check_gpu: {sys.executable} has no torch; take a Python that has: make check-gpu PYTHON=...')

import torch  # noqa: E402

from mmubn.analysis.gpu_check import environment  # noqa: E402
from mmubn.analysis.gpu_check.processes import run_stage  # noqa: E402
from mmubn.analysis.gpu_check.report import Report  # noqa: E402
from mmubn.analysis.gpu_check.stages import STAGES  # noqa: E402

ASKED_FOR = [name for name in STAGES if name != 'compilation']  # which comes before speed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\nExamples')[0],
        epilog=__doc__[__doc__.index('Examples') :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--stages', nargs='+', choices=ASKED_FOR, default=ASKED_FOR, metavar='STAGE')
    parser.add_argument('--skip-speed', action='store_true', help='leave the stage speed out')
    parser.add_argument('--device', default='cuda', help='cuda, cuda:INDEX or cpu; default: cuda')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/check_gpu'), help='folder of report.md and logs')
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'--out {args.out} is a file; give the path of a folder')
    return args


def device_of(name: str) -> torch.device:
    """The device of this name, or the end of the program, in one sentence."""
    if name == 'cpu':
        return torch.device('cpu')
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        sys.exit('check_gpu: torch sees no CUDA GPU here; --device cpu tries what it can in the interpreter of Triton.')
    names = ['cuda', *(f'cuda:{index}' for index in range(found))]
    if name not in names:
        sys.exit(f'check_gpu: --device must be cpu or one of {", ".join(names)}, got {name!r}.')
    return torch.device('cuda', torch.device(name).index or 0)


def main() -> None:
    args = parse_args()
    device = device_of(args.device)
    asked_for = [name for name in args.stages if not (args.skip_speed and name == 'speed')]
    stages = [name for name in STAGES if name in asked_for or (name == 'compilation' and 'speed' in asked_for)]
    facts = environment.facts(device)
    for name, value in facts.items():
        print(f'{name}: {value}', flush=True)
    report = Report(args.out, facts, on_gpu=device.type == 'cuda')
    for name in stages:
        run_stage(name, device, report, args.out)
    sys.exit(0 if report.finish() else 1)


if __name__ == '__main__':
    main()
