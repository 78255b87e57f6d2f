"""The wheel and the sdist: what is in them, and that a user without a clone can work with what is installed."""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MIM = 'mmubn/.mim/'


def files_of(*folders):
    """Of the repository, those that git has or would have."""
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', *folders]
    return subprocess.check_output(command, cwd=ROOT, text=True).splitlines()


def build(kind, source, folder):
    """``kind`` is wheel or sdist; the path of what is built."""
    code = f'from setuptools.build_meta import build_{kind}; build_{kind}({str(folder)!r})'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=source, check=True, stdout=subprocess.DEVNULL)
    (path,) = folder.glob('*.whl' if kind == 'wheel' else '*.tar.gz')
    return path


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """With what an earlier build, an editable install and a use of the tools leave there."""
    clone = tmp_path_factory.mktemp('clone')
    for name in files_of():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():  # not one that is being removed
            (clone / name).write_bytes((ROOT / name).read_bytes())
            (clone / name).chmod((ROOT / name).stat().st_mode)
    for name in ('tools/__pycache__/train.pyc', 'build/lib/mmubn/.mim/configs/old.py', 'work_dirs/run/run.py'):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    (clone / MIM).mkdir()
    (clone / MIM / 'configs').symlink_to('../../configs')
    return clone


@pytest.fixture(scope='module')
def wheel(clone, tmp_path_factory):
    with zipfile.ZipFile(build('wheel', clone, tmp_path_factory.mktemp('wheel'))) as file:
        yield file


def test_the_wheel_has_package_configs_tools_and_index_and_nothing_else(wheel):
    found = {name for name in wheel.namelist() if '.dist-info/' not in name}
    assert found == {*files_of('mmubn'), *(MIM + name for name in files_of('configs', 'tools', 'model-index.yml'))}


def test_scripts_stay_executable(wheel):
    executable = {info.filename for info in wheel.infolist() if info.external_attr >> 16 & 0o111}
    scripts = {MIM + name for name in files_of('tools') if os.access(ROOT / name, os.X_OK)}
    assert {MIM + f'tools/dist_{name}.sh' for name in ('train', 'test')} <= scripts
    assert executable == scripts


def test_all_that_the_index_names_is_in_the_wheel(wheel, tmp_path):
    """By OpenMMLab's own reader."""
    from modelindex.load_model_index import load

    wheel.extractall(tmp_path)
    index = load(str(tmp_path / MIM / 'model-index.yml'))
    assert index.check(silent=True) == []
    assert len(index.models) > 50
    assert all((tmp_path / MIM / model.config).is_file() for model in index.models)


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(clone, wheel, tmp_path):
    with tarfile.open(build('sdist', clone, tmp_path)) as file:
        file.extractall(tmp_path, filter='data')
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not (source / 'tests').exists()
    with zipfile.ZipFile(build('wheel', source, tmp_path)) as again:
        for name in {*wheel.namelist(), *again.namelist()}:
            assert wheel.read(name) == again.read(name) or name.endswith('/RECORD'), name


@pytest.mark.slow
def test_a_user_without_a_clone(tmp_path):
    """``make dist``."""
    missing = [name for name in ('build', 'twine', 'mim') if find_spec(name) is None]
    assert not missing, 'make setup installs them'
    command = [sys.executable, ROOT / 'tools' / 'check_dist.py', '--out', tmp_path / 'dist']
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "evaluated: {'coco/bbox_mAP': " in result.stdout
    assert {path.suffix for path in (tmp_path / 'dist').iterdir()} == {'.whl', '.gz'}


@pytest.mark.parametrize('tools', ['tools', 'mmubn/.mim/tools'], ids=['of a clone', 'of an installation'])
def test_the_launcher_is_found(tmp_path, tools):
    script = 'mmubn/cli/launch.py'
    for name, text in {
        script: 'print("launched", __file__)',
        f'{tools}/launch.sh': (ROOT / 'tools/launch.sh').read_text(),
        f'{tools}/dist_train.sh': (ROOT / 'tools/dist_train.sh').read_text(),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = os.environ | {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    for name in ('PORT', 'NNODES'):
        environment.pop(name, None)
    command = ['bash', tmp_path / tools / 'dist_train.sh', 'config.py', '2']
    output = subprocess.check_output(list(map(str, command)), text=True, env=environment, cwd=tmp_path)
    assert Path(output.split()[1]).resolve() == tmp_path / script


@pytest.mark.parametrize(
    ('tool', 'arguments', 'message'),
    [
        ('check_gpu.py', ['--device', 'cpu'], 'run it in a clone of mmubn'),
        ('check_dist.py', [], 'run check_dist.py in a clone of mmubn'),
        ('setup_env.py', ['environment'], 'make the environment in a clone of mmubn'),
        ('misc/compatibility_table.py', [], 'made from the tests of a clone of mmubn'),
    ],
)
def test_a_tool_that_needs_a_clone_says_so(tmp_path, tool, arguments, message):
    path = tmp_path / MIM / 'tools' / tool
    path.parent.mkdir(parents=True)
    path.write_text((ROOT / 'tools' / tool).read_text())
    result = subprocess.run([sys.executable, str(path), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert message in result.stdout + result.stderr
    assert 'Traceback' not in result.stderr
