"""``PACKAGE::PATH`` for a package whose distribution has another name, as onedl's, and for one that is missing."""

import subprocess
from importlib import metadata

import pytest
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.hub import get_config

import mmubn.openmmlab
from mmubn.openmmlab.config_packages import find_by_module


@pytest.fixture(autouse=True)
def _package(tmp_path, monkeypatch):
    """A module ``mmother`` with a config, of the package ``mmother-of-others`` for MMEngine."""
    mmubn.openmmlab.install('config-packages')
    folder = tmp_path / 'mmother' / '.mim' / 'configs' / 'net'
    folder.mkdir(parents=True)
    (tmp_path / 'mmother' / '__init__.py').touch()
    (folder / 'net.py').write_text('depth = 50')
    (folder / 'metafile.yml').write_text('Models:\n  - Name: net\n    Config: configs/net/net.py\n')
    (folder.parent.parent / 'model-index.yml').write_text('Import:\n  - configs/net/metafile.yml\n')
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('mmother', 'mmmissing'):
        monkeypatch.setitem(config_utils.MODULE2PACKAGE, name, f'{name}-of-others')
    monkeypatch.setattr(subprocess, 'check_call', lambda *_: pytest.fail('MMEngine runs pip'))


def test_a_module_that_is_there(tmp_path):
    assert get_config('mmother::net/net.py').depth == 50
    (tmp_path / 'own.py').write_text("_base_ = 'mmother::net/net.py'")
    assert Config.fromfile(tmp_path / 'own.py').depth == 50


def test_a_package_that_is_missing_is_not_installed(tmp_path):
    message = 'mmmissing is not installed, and mmmissing::net/net.py is a config of it'
    with pytest.raises(ModuleNotFoundError, match=message):
        get_config('mmmissing::net/net.py')
    (tmp_path / 'own.py').write_text("_base_ = 'mmmissing::net/net.py'")
    with pytest.raises(ModuleNotFoundError, match=message):
        Config.fromfile(tmp_path / 'own.py')


def test_a_distribution_that_mmengine_finds_stays(monkeypatch):
    monkeypatch.setattr(metadata, 'version', lambda name: '1.2.2')
    assert (
        find_by_module(lambda path: ('mmother-of-others', 'net/net.py'))('mmother::net/net.py')[0]
        == 'mmother-of-others'
    )
