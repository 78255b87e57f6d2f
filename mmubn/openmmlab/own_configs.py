"""The files that come with this package, in ``mmubn/.mim``: configs, tools, model index. A config is ``mmubn::PATH``.

In a wheel they are copies, in an editable install links (setup.py). MMEngine and mim look for them there.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from pathlib import Path

from mmengine.config.utils import MODULE2PACKAGE

from mmubn.openmmlab.errors import ConfigError

__all__ = ['MIM', 'PREFIX', 'find_config', 'own_file', 'read_by_name', 'read_without_scope', 'register_configs']

MIM = Path(__file__).parents[1] / '.mim'
PREFIX = 'mmubn::'


def find_config(name: str, suffixes: tuple[str, ...] = ('.py', '.yml')) -> Path:
    """Return the file of ``mmubn::PATH``.

    Args:
        name: ``mmubn::PATH``.
        suffixes: Of what is asked for: configs are ``.py``, sweep files of compare_norms ``.yml``.

    Raises:
        ConfigError: There is none of this name, or this package was installed without its configs.
    """
    folder = MIM / 'configs'
    if not folder.is_dir():
        raise ConfigError(f'{name}: there are no configs in {MIM}; install mmubn again (in a clone: pip install -e .).')
    path = name.removeprefix(PREFIX)
    found = sorted(each for suffix in suffixes for each in folder.rglob(f'*{suffix}'))
    names = {each.relative_to(folder).as_posix(): each.name for each in found if each.name != 'metafile.yml'}
    # By the list and not by what is at the path: '../tools/train.py' and 'digits/metafile.yml' are files too.
    if path in names:
        return folder / path
    near = [each for each, base in names.items() if base == Path(path).name]
    near = near or difflib.get_close_matches(path, names, 3, 0.8)
    remedy = f'did you mean {" or ".join(PREFIX + each for each in near)}?' if near else f'they are in {folder}.'
    raise ConfigError(f'{name}: mmubn has no config of this name; {remedy}')


def own_file(name: str) -> str:
    """Return how to name, from here, a file of a clone that an installation has too, such as ``tools/train.py``."""
    installed = MIM / name
    return str(installed) if installed.exists() and not Path(name).exists() else name


def register_configs() -> None:
    """Let :func:`mmengine.hub.get_config` look for ``mmubn::PATH`` in this package."""
    MODULE2PACKAGE.setdefault('mmubn', 'mmubn')


def read_by_name(original: Callable[[str], tuple[str, str]]) -> Callable[[str], tuple[str, str]]:
    """Make ``_get_package_and_cfg_path`` of MMEngine look for ``mmubn::PATH`` among the configs first.

    :func:`mmengine.hub.get_config` then raises the error of :func:`find_config` for one that there is not.
    """

    @functools.wraps(original)
    def get_package_and_cfg_path(cfg_path: str) -> tuple[str, str]:
        if cfg_path.startswith(PREFIX):
            find_config(cfg_path, ('.py',))
        return original(cfg_path)

    return get_package_and_cfg_path


def read_without_scope(original: staticmethod) -> staticmethod:
    """Find ``_base_ = 'mmubn::PATH'`` and leave its values in the scope of the config that inherits from it.

    Args:
        original: ``Config._get_cfg_path``. It gives values of another package's config the scope of that package, to
            be looked up in its registries. This package has none: its configs are MMDetection's and MMPretrain's.

    Returns:
        A function that does so for ``mmubn::PATH`` and calls ``original`` for any other.
    """

    @functools.wraps(original.__func__)
    def find(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if cfg_path.startswith(PREFIX):
            return str(find_config(cfg_path, ('.py',))), None
        return original.__func__(cfg_path, filename)

    return staticmethod(find)
