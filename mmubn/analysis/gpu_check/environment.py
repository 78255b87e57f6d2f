"""Whether the machine has what the kernels need, and what the results depend on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

from mmubn.analysis.benchmark.report import cpu_name
from mmubn.analysis.gpu_check.device import by_backend, is_gpu, need_kernels, synchronize
from mmubn.analysis.gpu_check.outcome import Check, Finding
from mmubn.layers import UBN
from mmubn.ops import backend_info
from mmubn.version import __version__

__all__ = ['ROOT', 'checks', 'facts']

ROOT = Path(__file__).resolve().parents[3]  # of the checkout


def facts(device: torch.device) -> dict[str, str]:
    """What the results depend on, by name."""
    if is_gpu(device):
        properties = torch.cuda.get_device_properties(device)
        gpu = f'{properties.name}, compute capability {properties.major}.{properties.minor}, '
        gpu += f'{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors; '
        gpu += f'GPUs on this machine: {torch.cuda.device_count()}'
    else:
        gpu = "none; the checks ran in Triton's interpreter on the CPU"
    return {
        'GPU': gpu,
        'driver': _driver(),
        'CUDA, cuDNN': f'{torch.version.cuda}, {torch.backends.cudnn.version()}',
        'torch': torch.__version__,
        'Triton': _version('triton'),
        'torchvision': _version('torchvision'),
        'mmubn': f'{__version__}, commit {_commit()}',
        'Python': f'{platform.python_version()}, {platform.platform()}',
        'CPU': f'{cpu_name()}, {os.cpu_count()} cores',
        'settings': ', '.join(f'{k}={v}' for k, v in sorted(os.environ.items()) if _is_setting(k)) or 'none',
    }


def checks(device: torch.device) -> list[Check]:
    """The checks of this stage."""
    return [
        Check('C compiler', lambda: c_compiler(device)),
        Check('Python.h', lambda: python_headers(device)),
        Check("Triton's cache", lambda: triton_cache(device)),
        Check('first steps of a layer', lambda: first_steps(device)),
        Check('backend of a layer', lambda: layer_backend(device)),
    ]


def c_compiler(device: torch.device) -> str:
    """Triton compiles its launchers with it."""
    need_kernels(device)
    for name in (os.environ.get('CC'), 'gcc', 'clang', 'cc'):
        if name and (path := shutil.which(name)):
            return path
    raise RuntimeError('there is none, and Triton cannot launch a kernel without one: install gcc, or set CC')


def python_headers(device: torch.device) -> str:
    """Triton's launchers include them."""
    need_kernels(device)
    folder = Path(sysconfig.get_paths()['include'])
    if not (folder / 'Python.h').exists():
        raise RuntimeError(f'{folder} has no Python.h, which Triton needs: install the headers (python3-dev)')
    return str(folder)


def triton_cache(device: torch.device) -> str:
    """Triton writes there what it compiles."""
    need_kernels(device)
    folder = Path(os.environ.get('TRITON_CACHE_DIR') or Path.home() / '.triton' / 'cache')
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        return str(folder)


def layer_backend(device: torch.device) -> str:
    """Where the kernels can be used, they are: before their first use on a GPU they are tried."""
    need_kernels(device)
    layer, x = UBN(8).to(device), torch.zeros(2, 8, 8, 8, device=device)
    with by_backend(device):
        layer(x)
        info = backend_info(layer, x)
    if not info.startswith('triton'):
        raise RuntimeError(f'the Triton kernels are not used, and layers slower than they could be; {info}')
    return info


def first_steps(device: torch.device) -> Finding:
    """The first compiles, the second and third prepare what later ones do again, the fourth shows what that costs."""
    layer = UBN(8).to(device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        x = torch.randn(2, 8, 8, 8, device=device, requires_grad=True)
        with by_backend(device):
            layer(x).square().sum().backward()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        if x.grad is None or not x.grad.isfinite().all():
            raise AssertionError('the gradient of x is not finite')
    return Finding(f'{seconds[0]:.1f} s for the first, {1e3 * seconds[3]:.1f} ms for the fourth')


def _is_setting(name: str) -> bool:
    return name.startswith(('MMUBN_', 'TRITON_', 'CUDA_', 'PYTORCH_', 'NVIDIA_TF32'))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return 'not installed'


def _driver() -> str:
    return _output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').split('\n')[0] or 'unknown'


def _commit() -> str:
    commit = _output('git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD')
    if not commit:
        return 'unknown'
    return f'{commit} with changes' if _output('git', '-C', str(ROOT), 'status', '--porcelain') else commit


def _output(*command: str) -> str:
    """What a program prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''
