"""Whether an installation works: versions, where configs and tools are, what a layer computes by on each device.

    python -m mmubn

Ends with status 1 where something that MMDetection needs is missing, or a training step gives other numbers than the
reference.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import signal
import sys
import warnings
from importlib import metadata, util
from pathlib import Path

import torch

import mmubn
from mmubn.openmmlab.versions import OPTIONAL, REQUIREMENTS, installed_version


def main() -> int:
    argparse.ArgumentParser(prog='python -m mmubn', description=__doc__.split('\n\n')[0]).parse_args()
    problems = []
    print(f'mmubn {mmubn.__version__} in {Path(mmubn.__file__).parent}')
    mim = Path(mmubn.__file__).parent / '.mim'
    known = mim.is_dir()
    print(f'configs and tools in {mim}' if known else f'no configs and tools: there is no {mim}; install mmubn again')
    print(f'Python {platform.python_version()} on {platform.platform()}')
    for requirement in REQUIREMENTS:
        name = requirement.module
        if util.find_spec(name) is None:
            print(f'{name}: not installed; {requirement.needed_for} need it: {requirement.install}')
            problems += [name] * (name not in OPTIONAL)
        else:
            print(f'{name} {installed_version(requirement) or "of unknown version"}')
    print(f'triton {_version("triton")}')
    if util.find_spec('mmcv') and not util.find_spec('mmcv._ext'):
        print('mmcv has no compiled operators (mmcv-lite, or built without MMCV_WITH_OPS=1): detectors cannot run')
        problems.append("mmcv's operators")
    for device in ('cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))):
        try:
            print(f'UBN on {device}{_name_of(device)}: {_train(device)}')
        except Exception as error:
            print(f'UBN on {device}{_name_of(device)} does not work: {(str(error) or repr(error)).splitlines()[0]}')
            problems.append(f'UBN on {device}')
    print(f'does not work: {", ".join(problems)}' if problems else 'works')
    return int(bool(problems))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return 'not installed (GPUs: torch operators instead of kernels)'


def _name_of(device: str) -> str:
    return '' if device == 'cpu' else f' ({torch.cuda.get_device_name(device)})'


def _train(device: str) -> str:
    """The backend that a layer takes, after a training step that is held to the reference's."""
    results = []
    for backend in ('chosen', 'reference'):
        torch.manual_seed(0)
        layer = mmubn.UBN(8).to(device)
        x = torch.randn(4, 8, 16, 16).to(device).requires_grad_()
        with mmubn.use_backend(backend) if backend == 'reference' else contextlib.nullcontext():
            y = layer(x)
        (y * torch.linspace(-1, 1, y.numel(), device=device).view_as(y)).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), layer.running_var])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)
    return mmubn.backend_info(layer, x)


if __name__ == '__main__':
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as other commands, in a pipe that somebody closes
    warnings.simplefilter('ignore')  # what is missing is listed
    sys.exit(main())
