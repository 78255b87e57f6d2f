"""What ``import mmubn`` says about the packages around it, and the mend for loading checkpoints."""

import subprocess
import sys
import textwrap
import warnings
from importlib import metadata

import pytest
import torch

import mmubn
from mmubn import environment


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
    requirement = next(r for r in environment.REQUIREMENTS if r.module == missing)
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
    requirement = next(r for r in environment.REQUIREMENTS if r.module == module)
    installed = metadata.version
    monkeypatch.setattr(
        metadata, 'version', lambda name: version if name in requirement.distributions else installed(name)
    )
    if works:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            environment.check_environment()
    else:
        with pytest.raises(ImportError) as error:
            environment.check_environment()
        for part in (module, version, requirement.lowest, requirement.install):
            assert part in str(error.value)


def test_version_is_that_of_the_installed_package():
    assert metadata.version('mmubn') == mmubn.__version__


LOAD = "import sys, torch; torch.load(sys.argv[1], weights_only=True)['message_hub']"


def test_mmengine_checkpoints_load_through_the_allow_list(tmp_path):
    """What stock MMEngine does on torch >= 2.6, which refuses its own log history."""
    import numpy as np
    from mmengine.logging import MessageHub

    hub = MessageHub.get_instance('test_allow_list')
    hub.update_scalar('train/loss', 1.5)
    hub.update_scalar('train/accuracy', np.float32(0.5))
    hub.update_info('epoch', 3)
    path = tmp_path / 'epoch_1.pth'
    torch.save({'message_hub': hub.state_dict(), 'state_dict': {}, 'meta': {'time': np.int64(3)}}, path)

    refused = python(LOAD, str(path))
    assert refused.returncode != 0, 'torch would load it anyway: this test does not test the allow-list'
    assert 'HistoryBuffer' in refused.stderr
    # Also after a load by MMEngine, whose own list is taken away again.
    by_mmengine = 'from mmengine.runner.checkpoint import _load_checkpoint; _load_checkpoint(sys.argv[1])'
    loaded = python(f'import mmubn; {LOAD}; {by_mmengine}; {LOAD}', str(path))
    assert loaded.returncode == 0, loaded.stderr


def test_the_allow_list_does_not_let_code_run(tmp_path):
    class Prints:
        def __reduce__(self):
            return (print, ('code ran',))

    class LooksUp:  # getattr(dict, 'clear'): a harmless stand-in for any other look-up
        def __reduce__(self):
            return (getattr, (dict, 'clear'))

    paths = [str(tmp_path / name) for name in ('prints.pth', 'looks_up.pth')]
    for path, bad in zip(paths, (Prints(), LooksUp()), strict=True):
        torch.save({'message_hub': bad}, path)
    result = python(
        """
        import sys, torch, mmubn
        for path in sys.argv[1:]:
            try:
                torch.load(path, weights_only=True)
            except Exception as error:
                print(f'{path}: {type(error).__name__}')
        """,
        *paths,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [f'{path}: UnpicklingError' for path in paths]
    assert 'code ran' not in result.stdout
