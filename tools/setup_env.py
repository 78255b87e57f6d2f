"""Make the environment that `make demo` and `make test` run in. Needs Python 3.10+ with its headers and a C++ compiler.

Installs exactly what requirements/lock.txt pins into a virtual environment, and mmubn itself in editable mode. mmcv's
compiled operators have no wheel for this torch, so they are built once, which takes minutes, and kept in a cache under
a key of the torch, Python and mmcv versions and the GPU. A second call returns at once.

    python3 tools/setup_env.py .venv
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / 'requirements' / 'lock.txt'
CUDA_LOCK = ROOT / 'requirements' / 'lock-cuda.txt'
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmubn'
BUILD_TOOLS = ('setuptools', 'wheel')
# Their build imports torch (mmcv's also compiles against it), so they come after it.
BUILT_ON_TORCH = ('onedl-mmcv', 'onedl-mmdetection', 'onedl-mmpretrain', 'onedl-mmrotate', 'onedl-mmsegmentation')


def main() -> None:
    if len(sys.argv) != 2:
        fail(f'usage: {sys.argv[0]} FOLDER_OF_THE_ENVIRONMENT')
    if not LOCK.is_file():
        fail(f'{LOCK} does not exist: make the environment in a clone of mmubn')
    venv = Path(sys.argv[1]).absolute()
    stamp = venv / '.mmubn-environment'
    key = environment_key()
    if stamp.is_file() and stamp.read_text() == key:
        return
    check_prerequisites(venv)

    start = time.monotonic()
    step(1, f'a virtual environment of Python {platform.python_version()} in {venv}')
    if not (venv / 'bin' / 'python').exists():
        run([sys.executable, '-m', 'venv', venv])
    pins = read_lock(LOCK)
    step(2, f'{len(pins)} pinned packages, torch with its CUDA libraries among them: some 3 GB to download')
    pip_install(venv, [pin for name, pin in pins.items() if name in BUILD_TOOLS])
    pip_install(venv, [pin for name, pin in pins.items() if name not in BUILT_ON_TORCH])
    step(3, "mmcv's compiled operators")
    pip_install(venv, [str(mmcv_wheel(venv, pins['onedl-mmcv']))])
    step(4, 'MMDetection, MMPretrain, MMRotate and MMSegmentation')
    pip_install(venv, ['--no-build-isolation', *(pins[name] for name in BUILT_ON_TORCH[1:])])
    step(5, 'mmubn itself, in editable mode')
    pip_install(venv, ['--no-build-isolation', '--editable', str(ROOT)])
    stamp.write_text(key)
    print(f'Environment ready after {time.monotonic() - start:.0f} s: source {venv}/bin/activate', flush=True)


def environment_key() -> str:
    """Return a text that changes with everything that decides what the environment holds."""
    files = (LOCK, CUDA_LOCK, ROOT / 'pyproject.toml', ROOT / 'setup.py', Path(__file__))
    content = b''.join(path.read_bytes() for path in files)
    return f'{platform.python_version()} {ROOT} {hashlib.sha256(content).hexdigest()}\n'


def check_prerequisites(venv: Path) -> None:
    """End with one line that names what is missing and installs it, before minutes are spent."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        fail(f'Python 3.10 to 3.13 is needed, this is {platform.python_version()}; choose one with PYTHON=python3.11')
    if not (Path(sysconfig.get_path('include')) / 'Python.h').is_file():
        fail("Python's headers are missing; on Debian or Ubuntu: apt-get install python3-dev")
    try:
        import ensurepip  # noqa: F401 - what the venv module needs and Debian packages apart
    except ImportError:
        fail("Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv")
    compiler = os.environ.get('CXX', '').split() or ['c++']
    if not any(shutil.which(name) for name in (compiler[0], 'g++', 'clang++')):
        fail('a C++ compiler is missing; on Debian or Ubuntu: apt-get install g++')
    if venv.exists() and not (venv / 'pyvenv.cfg').exists() and any(venv.iterdir()):
        fail(f'{venv} exists and is no virtual environment; give another folder with VENV=dir')


def read_lock(path: Path) -> dict[str, str]:
    """Read the pins of a lock file by package name, with their markers, which pip evaluates."""
    lines = (line.split('#')[0].strip() for line in path.read_text().splitlines())
    pins: dict[str, list[str]] = {}
    for line in filter(None, lines):
        pins.setdefault(re.match(r'[\w.-]+', line).group(), []).append(line)
    return {name: '\n'.join(lines) for name, lines in pins.items()}


def mmcv_wheel(venv: Path, pin: str) -> Path:
    """Find mmcv's wheel with its operators for the torch in ``venv`` in the cache, or build it into the cache."""
    probe = (
        'import sys, torch; cuda = torch.cuda.is_available(); '
        'print(torch.__version__, torch.version.cuda if cuda else "cpu", '
        '";".join(sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}))'
        ' if cuda else "-")'
    )
    torch_version, cuda, capabilities = subprocess.check_output(
        [venv / 'bin' / 'python', '-W', 'ignore', '-c', probe], text=True
    ).split()
    device = 'cpu' if cuda == 'cpu' else f'cuda{cuda}-sm{capabilities.replace(";", "-")}'
    python = f'{sys.implementation.cache_tag}-{sysconfig.get_platform()}'
    folder = CACHE / f'{pin.replace("==", "-")}_torch-{torch_version}_{python}_{device}'
    if wheels := sorted(folder.glob('*.whl')):
        print(f'found in the cache: {wheels[0]}', flush=True)
        return wheels[0]

    environment = dict(os.environ, MMCV_WITH_OPS='1', MAX_JOBS=os.environ.get('MAX_JOBS') or str(os.cpu_count()))
    if cuda != 'cpu':
        environment.update(FORCE_CUDA='1', TORCH_CUDA_ARCH_LIST=capabilities, CUDA_HOME=str(cuda_home(venv, cuda)))
    log = venv / 'mmcv-build.log'
    build = venv / 'mmcv-wheel'
    shutil.rmtree(build, ignore_errors=True)
    print(f'compiling for torch {torch_version} on {device}: about 10 minutes on two cores; log in {log}', flush=True)
    # No pip cache: its key has no torch version in it, and a wheel built for another torch does not import.
    command = [
        *pip(venv),
        'wheel',
        '--verbose',
        '--no-deps',
        '--no-build-isolation',
        '--no-cache-dir',
        '-w',
        build,
        pin,
    ]
    with log.open('w') as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        shown = 0
        for line in process.stdout:
            file.write(line)
            if match := re.search(r'\[(\d+)/(\d+)\] ', line):
                done, total = map(int, match.groups())
                if done * 10 // total > shown:
                    shown = done * 10 // total
                    print(f'  {done} of {total} files compiled', flush=True)
    if process.wait() != 0:
        print(''.join(log.read_text().splitlines(keepends=True)[-30:]), file=sys.stderr)
        fail(f"mmcv's operators did not compile; the whole log is {log}")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = next(build.glob('*.whl'))
    partial = folder / f'{wheel.name}.partial'
    shutil.copy(wheel, partial)
    return partial.rename(folder / wheel.name)  # in one step: a killed copy is never taken for a wheel


def cuda_home(venv: Path, version: str) -> Path:
    """Find a CUDA toolkit of torch's version on the machine, or install NVIDIA's compiler from its wheels."""
    candidates = [os.environ.get('CUDA_HOME'), shutil.which('nvcc') and Path(shutil.which('nvcc')).parent.parent]
    for home in filter(None, [*candidates, '/usr/local/cuda']):
        nvcc = Path(home) / 'bin' / 'nvcc'
        complete = nvcc.exists() and (Path(home) / 'include' / 'cuda_runtime.h').exists()
        if complete and f'release {version},' in subprocess.check_output([nvcc, '--version'], text=True):
            return Path(home)
    print(f'no CUDA toolkit {version} on this machine: installing its compiler from wheels', flush=True)
    pip_install(venv, list(read_lock(CUDA_LOCK).values()))
    purelib = subprocess.check_output(
        [venv / 'bin' / 'python', '-c', "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    wheels = Path(purelib.strip()) / 'nvidia' / f'cu{version.split(".")[0]}'
    # The wheels lack what the linker looks for: a lib64 folder and library names without a version.
    home = venv / 'cuda'
    shutil.rmtree(home, ignore_errors=True)
    (home / 'lib64').mkdir(parents=True)
    for name in ('bin', 'include', 'nvvm'):
        (home / name).symlink_to(wheels / name)
    for library in (wheels / 'lib').iterdir():
        (home / 'lib64' / library.name).symlink_to(library)
        plain = home / 'lib64' / f'{library.name.split(".so")[0]}.so'
        if '.so' in library.name and not plain.exists():
            plain.symlink_to(library)
    return home


def pip(venv: Path) -> list:
    return [venv / 'bin' / 'python', '-m', 'pip', '--disable-pip-version-check']


def pip_install(venv: Path, requirements: list[str]) -> None:
    """Install exactly these; ``--no-deps`` since the lock file names every dependency."""
    lines = [line for requirement in requirements for line in requirement.split('\n')]
    run([*pip(venv), 'install', '--no-deps', '--progress-bar', 'off', *lines])


def run(command: list) -> None:
    if subprocess.run(list(map(str, command))).returncode != 0:
        fail(f'this command failed: {" ".join(map(str, command))[:300]}')


def step(number: int, what: str) -> None:
    print(f'[{number}/5] {what}', flush=True)


def fail(message: str) -> None:
    sys.exit(f'error: {message}')


if __name__ == '__main__':
    main()
