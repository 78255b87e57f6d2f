"""What ``import mmubn`` says about the packages around it."""

import subprocess
import sys
import textwrap
import warnings
from importlib import metadata

import pytest

import mmubn
from mmubn.openmmlab import versions


def python(code, *arguments):
    """Run code in a new interpreter."""
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code), *arguments], capture_output=True, text=True)


HIDE = """
    import sys
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.split('.')[0] in hidden:
                raise ModuleNotFoundError(f'No module named {name!r}', name=name)
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name in hidden else find(name, package)
    sys.meta_path.insert(0, Hide())
"""


def test_functional_and_layers_need_torch_alone():
    result = python(
        "hidden = ('mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'numpy', 'pycocotools', 'packaging')\n"
        + textwrap.dedent(HIDE)
        + 'import torch, mmubn.functional\n'
        + 'print(mmubn.UBN(3)(torch.randn(2, 3, 4, 4)).shape)\n'
    )
    assert result.returncode == 0, result.stderr
    assert 'torch.Size([2, 3, 4, 4])' in result.stdout


@pytest.mark.parametrize('missing', ['mmengine', 'mmcv', 'mmdet'])
def test_a_missing_package_is_named_with_range_and_command(missing):
    result = python(f"hidden = ('{missing}',)\n" + textwrap.dedent(HIDE) + 'import mmubn\n')
    assert result.returncode == 0, result.stderr
    assert f'{missing} is not installed' in result.stderr
    requirement = next(r for r in versions.REQUIREMENTS if r.module == missing)
    assert f'>={requirement.lowest},<{requirement.below}' in result.stderr
    assert requirement.install in result.stderr


def test_a_missing_torch_is_an_error_that_names_it():
    result = python("hidden = ('torch',)\n" + textwrap.dedent(HIDE) + 'import mmubn\n')
    assert result.returncode != 0
    assert 'torch is not installed' in result.stderr


@pytest.mark.parametrize(
    ('module', 'version', 'works'),
    [
        ('torch', '2.3.1+cu121', False),
        ('torch', '2.12.0+cpu', True),
        ('mmengine', '0.9.1', False),
        ('mmengine', '0.10.7', True),
        ('mmcv', '1.7.2', False),
        ('mmcv', '2.1.0', True),
        ('mmdet', '2.28.0', False),
        ('mmdet', '3.3.0', True),
        ('mmpretrain', '1.0.0rc8', False),
    ],
)
def test_versions(monkeypatch, module, version, works):
    requirement = next(r for r in versions.REQUIREMENTS if r.module == module)
    installed = metadata.version
    monkeypatch.setattr(
        metadata, 'version', lambda name: version if name in requirement.distributions else installed(name)
    )
    if works:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            versions.check_environment()
    else:
        with pytest.raises(ImportError) as error:
            versions.check_environment()
        for part in (module, version, requirement.lowest, requirement.install):
            assert part in str(error.value)


def test_version_is_that_of_the_installed_package():
    assert metadata.version('mmubn') == mmubn.__version__
