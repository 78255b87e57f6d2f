"""Build the wheel and the sdist, check them, and use the wheel as a user would: from an empty folder, without a clone.

The wheel is installed into a new environment that sees the packages of this one, so that nothing else is installed.
There every step is a command of mim: it makes a data set of digits, trains Mask R-CNN with UBN for one iteration and
evaluates the checkpoint. `make dist` calls this. Needs build, twine and openmim. The files of dist/ are replaced where
all went well.

Example:

    python tools/check_dist.py --out dist
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {'build': 'build', 'twine': 'twine', 'mim': 'openmim'}  # modules and the packages that have them
CONFIG = 'mask-rcnn_r18_fpn_ubn_digits'
INHERITED = "_base_ = 'mmubn::digits/mask-rcnn_r18_fpn_ubn_digits.py'\ntrain_dataloader = dict(batch_size=4)\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\nExample')[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path('dist'), help='folder of the two files (default: dist)')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if not (ROOT / 'pyproject.toml').is_file():
        sys.exit(f'error: {ROOT} has no pyproject.toml: run check_dist.py in a clone of mmubn.')
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        sys.exit(f'error: {", ".join(missing)} is not installed; to do so: pip install {" ".join(missing)}')
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, 'dist')
        # The wheel is made of the sdist.
        run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', built, ROOT], quiet=True)
        run([sys.executable, '-m', 'twine', 'check', '--strict', *sorted(built.iterdir())])
        (wheel,) = built.glob('*.whl')
        check_files(wheel)
        use(wheel, Path(folder))
        args.out.mkdir(parents=True, exist_ok=True)
        for old in args.out.glob('mmubn-*'):
            old.unlink()
        for file in sorted(built.iterdir()):
            shutil.move(file, args.out)
            print(f'{args.out / file.name} is right')


def check_files(wheel: Path) -> None:
    """End where the wheel lacks a file that git has of what belongs in it, or has one that git has not."""
    tracked = ['git', '-C', ROOT, 'ls-files', '-co', '--exclude-standard', 'mmubn', 'configs', 'tools']
    parts = subprocess.check_output(list(map(str, tracked)), text=True).splitlines()
    expected = {name if name.startswith('mmubn/') else f'mmubn/.mim/{name}' for name in [*parts, 'model-index.yml']}
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if '.dist-info/' not in name}
    if found != expected:
        sys.exit(f'error: {wheel.name} lacks {sorted(expected - found)} and should not have {sorted(found - expected)}')
    print(f'{wheel.name} has {len(found)} files')


def use(wheel: Path, folder: Path) -> None:
    """Install the wheel beside what is there, and work with it in an empty folder."""
    home, work = folder / 'environment', folder / 'empty'
    work.mkdir()
    venv.create(home, with_pip=True)
    python = home / 'bin' / 'python'
    run([python, '-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', wheel])
    # Behind its own packages, those of this environment, but not this clone.
    (packages,) = home.glob('lib/python*/site-packages')
    (packages / 'beside.pth').write_text('\n'.join(path for path in sys.path if path.endswith('-packages')))

    # mim keeps a cache in the home folder.
    environment = os.environ | {'PATH': f'{python.parent}:{os.environ["PATH"]}', 'HOME': str(folder)}
    environment.pop('PYTHONPATH', None)

    def step(*command: object, quiet: bool = False) -> None:
        run([python, '-W', 'ignore', *command], quiet, cwd=work, env=environment)

    step('-c', f'import mmubn; assert mmubn.__file__.startswith({str(packages)!r}), mmubn.__file__')
    step('-m', 'mim', 'search', 'mmubn', '--model', 'ubn on handwritten digits', '--field', 'config')
    step('-m', 'mim', 'download', 'mmubn', '--config', CONFIG, '--dest', 'downloaded')
    step('-m', 'mim', 'run', 'mmubn', 'digits_to_coco', 'data/digits', '--num-train', '4', '--num-val', '4')
    alone = ('num_workers=0', 'persistent_workers=False')  # no processes for 4 images
    loaders = [f'{split}_dataloader.{option}' for split in ('train', 'val', 'test') for option in alone]
    options = ['--cfg-options', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=4', *loaders]
    step('-m', 'mim', 'train', 'mmubn', f'{CONFIG}.py', '--gpus', '0', '--work-dir', 'run', *options)
    checkpoint = ['--checkpoint', 'run/epoch_1.pth']
    step('-m', 'mim', 'test', 'mmubn', f'{CONFIG}.py', *checkpoint, '--work-dir', 'test', '--cfg-options', *loaders)
    (work / 'mine.py').write_text(INHERITED)
    step('-m', 'mim', 'run', 'mmubn', 'print_config', 'mine.py', '--save-path', 'whole.py', quiet=True)

    (scalars,) = work.glob('test/*/*.json')
    metrics = json.loads(scalars.read_text())
    print('evaluated:', {key: metrics[key] for key in ('coco/bbox_mAP', 'coco/segm_mAP')})
    for name in ('downloaded', 'run/epoch_1.pth', 'whole.py'):
        if not (work / name).exists():
            sys.exit(f'error: {name} was not written')


def run(command: list, quiet: bool = False, **options: object) -> None:
    """Print and run a command; end with its output where it fails."""
    words = list(map(str, command))
    print(f'\n$ {shlex.join(words)}', flush=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) if quiet else {}
    result = subprocess.run(words, **pipes, **options)
    if result.returncode != 0:
        sys.exit(f'{result.stdout or ""}error: the command above ended with status {result.returncode}')


if __name__ == '__main__':
    main(parse_args())
