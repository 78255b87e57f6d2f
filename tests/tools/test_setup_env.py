"""tools/setup_env.py: the lock file, and what it reports before minutes are spent. `make test` tests the rest."""

import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
from cli import ROOT, run

SCRIPT = ROOT / 'tools' / 'setup_env.py'


@pytest.fixture(scope='module')
def setup_env():
    """Its functions. They must run before the package is there, and so are not in it."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.parametrize('name', ['lock', 'lock-cuda'])
def test_every_package_is_pinned_exactly(setup_env, name):
    pins = setup_env.read_lock(ROOT / 'requirements' / f'{name}.txt')
    for pin in '\n'.join(pins.values()).split('\n'):
        assert re.fullmatch(r'[\w.-]+={2,3}[\w.]+( ; .+)?', pin), pin
    asked = {
        re.match(r'[\w.-]+', line).group()
        for line in (ROOT / 'requirements' / f'{name}.in').read_text().splitlines()
        if line.strip() and not line.startswith('#')
    }
    assert asked <= pins.keys()


def test_the_environment_of_this_test_is_the_locked_one(setup_env):
    """Lines with a marker are pip's business; the others must be installed as they stand."""
    frozen = subprocess.check_output([sys.executable, '-m', 'pip', 'list', '--format=freeze'], text=True).lower()
    installed = dict(line.split('==', 1) for line in frozen.replace('_', '-').splitlines() if '==' in line)
    for name, pin in setup_env.read_lock(ROOT / 'requirements' / 'lock.txt').items():
        if ';' not in pin:
            assert installed[name].split('+')[0] == pin.split('==')[-1].strip('='), name


def test_a_ready_environment_is_left_as_it_is(setup_env, tmp_path):
    (tmp_path / '.mmubn-environment').write_text(setup_env.environment_key())
    result = run(sys.executable, SCRIPT, tmp_path)
    assert result.returncode == 0
    assert result.stdout == ''
    assert [path.name for path in tmp_path.iterdir()] == ['.mmubn-environment']


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    result = run(sys.executable, SCRIPT, tmp_path)
    assert result.returncode == 1
    assert f'{tmp_path} exists and is no virtual environment' in result.stdout


def test_a_missing_compiler_is_reported(tmp_path):
    result = run(sys.executable, SCRIPT, tmp_path / 'venv', PATH=str(tmp_path), CXX='')
    assert result.returncode == 1
    assert 'apt-get install g++' in result.stdout
    assert not (tmp_path / 'venv').exists()


class TestEditableInstall:
    """Beside the clone too, which is a folder of the package's name without a module in it."""

    def test_of_make_setup(self, tmp_path):
        (tmp_path / 'mmubn').mkdir()
        code = 'import importlib.util as u; print(u.find_spec("mmubn").origin)'
        origin = subprocess.check_output([sys.executable, '-c', code], cwd=tmp_path, text=True).strip()
        assert origin == str(ROOT / 'mmubn' / '__init__.py')

    def test_of_a_user(self, tmp_path):
        """A .pth file that names the clone, which `import` finds; no module that is asked after all folders."""
        clone = tmp_path / 'mmubn'
        shutil.copytree(ROOT / 'mmubn', clone / 'mmubn', ignore=shutil.ignore_patterns('__pycache__', '.mim'))
        for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE', 'model-index.yml'):
            shutil.copy(ROOT / name, clone)
        for name in ('configs', 'tools'):
            (clone / name).mkdir()
            (clone / name / 'here').touch()
        build = f'from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})'
        subprocess.run([sys.executable, '-c', build], cwd=clone, check=True)
        (wheel,) = tmp_path.glob('*.whl')
        with zipfile.ZipFile(wheel) as files:
            (name,) = (name for name in files.namelist() if '.dist-info/' not in name)
            assert name.endswith('.pth')
            assert files.read(name).decode().strip() == str(clone)
            (names,) = (name for name in files.namelist() if name.endswith('/top_level.txt'))
            # mim looks for the first name beside the .pth file.
            assert files.read(names).decode().splitlines() == [str(clone / 'mmubn'), 'mmubn']

        mim = clone / 'mmubn' / '.mim'
        assert all(path.is_symlink() for path in mim.iterdir())
        assert {path.resolve() for path in mim.iterdir()} == {
            clone / name for name in ('configs', 'tools', 'model-index.yml')
        }
        subprocess.run([sys.executable, '-c', build], cwd=clone, check=True)  # again, over the links
        assert (mim / 'tools' / 'here').exists()
        assert (clone / 'tools' / 'here').exists()
