"""What mmubn needs from the packages around it, and what it mends in them."""

from __future__ import annotations

import re
import warnings
from importlib import metadata, util
from pickle import UnpicklingError
from typing import NamedTuple

__all__ = ['allow_mmengine_checkpoints', 'check_environment']


class Requirement(NamedTuple):
    """A package, the versions that work, and the command that installs one."""

    module: str
    distributions: tuple[str, ...]  # names under which the module is distributed, the maintained one first
    lowest: str
    below: str
    install: str
    needed_for: str


REQUIREMENTS = (
    Requirement('torch', ('torch',), '2.4', '3', "pip install 'torch>=2.4,<3'", 'everything'),
    Requirement(
        'mmengine',
        ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
        '0.10',
        '1',
        "pip install 'onedl-mmengine>=0.10.12,<1'",
        "norm_cfg=dict(type='UBN')",
    ),
    Requirement(
        'mmcv',
        ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
        '2.0.0',
        '3',
        "pip install ninja psutil 'setuptools<81' && pip install --no-build-isolation 'onedl-mmcv>=2.3.6,<3'",
        "norm_cfg=dict(type='UBN')",
    ),
    Requirement(
        'mmdet',
        ('onedl-mmdetection', 'mmdet'),
        '3.3.0',
        '4',
        "pip install --no-build-isolation 'onedl-mmdetection>=3.5.1,<4'",
        'detectors',
    ),
    Requirement(
        'mmpretrain',
        ('onedl-mmpretrain', 'mmpretrain'),
        '1.2.0',
        '2',
        "pip install --no-build-isolation 'onedl-mmpretrain>=1.3.6,<2'",
        'classifiers',
    ),
)
OPTIONAL = {'mmpretrain'}


def check_environment() -> bool:
    """Name every package that is missing or has a version that does not work, and the command that mends it.

    A missing package is a warning, since the layer itself and :mod:`mmubn.functional` need torch alone.

    Returns:
        Whether MMEngine is there, so that the norms can be registered.

    Raises:
        ImportError: A package is installed in a version outside the range that works.
    """
    for requirement in REQUIREMENTS:
        if util.find_spec(requirement.module) is None:
            if requirement.module not in OPTIONAL:
                warnings.warn(
                    f'mmubn: {requirement.module} is not installed; {requirement.needed_for} needs '
                    f'{requirement.module}>={requirement.lowest},<{requirement.below}. Install it with: '
                    f'{requirement.install}',
                    stacklevel=3,
                )
            continue
        version = installed_version(requirement)
        if version is not None and not _release(requirement.lowest) <= _release(version) < _release(requirement.below):
            raise ImportError(
                f'mmubn needs {requirement.module}>={requirement.lowest},<{requirement.below}, but version {version} '
                f'is installed. Install one that works with: {requirement.install}'
            )
    return util.find_spec('mmengine') is not None


def installed_version(requirement: Requirement) -> str | None:
    """The installed version, read without importing the package; None where its metadata is not there."""
    for distribution in requirement.distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r'\d+', version.split('+')[0])[:3])


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)``, the default since torch 2.6, read what MMEngine's checkpoints hold.

    Besides tensors these hold the log history: HistoryBuffer objects made of NumPy arrays. Stock MMEngine up to 0.10.7
    does not allow for them and fails to load any checkpoint of its own. (onedl-mmengine brings a list of its own, with
    all of ``getattr`` in it.) The names allowed here build arrays and look up four methods; they run nothing else.
    """
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer

    if _release(torch.__version__) < (2, 6):
        return  # there, the default is to load anything
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    dtypes = {type(np.dtype(name)) for name in ('bool', 'int32', 'int64', 'uint8', 'float32', 'float64')}
    allowed = [HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, *dtypes]
    # A HistoryBuffer pickles its statistics methods by getattr, under the name it had in Python 2 for old protocols.
    lookups = [(_history_buffer_method, f'{module}.getattr') for module in ('builtins', '__builtin__')]
    # With their names: the plain objects are on onedl-mmengine's own list, which it takes away again after each load.
    names = [(item, f'{item.__module__}.{item.__qualname__}') for item in allowed]
    torch.serialization.add_safe_globals([*names, *lookups])


def _history_buffer_method(owner: type, name: str):
    """``getattr`` for the methods of HistoryBuffer that a checkpoint of MMEngine refers to, and for nothing else."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise UnpicklingError(f'a checkpoint of MMEngine does not refer to {name!r} of {owner!r}')
    return getattr(owner, name)
