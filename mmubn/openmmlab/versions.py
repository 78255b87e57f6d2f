"""What mmubn needs from the packages around it."""

from __future__ import annotations

import re
import warnings
from importlib import metadata, util
from typing import NamedTuple

__all__ = ['OPTIONAL', 'REQUIREMENTS', 'Requirement', 'check_environment', 'installed_version', 'release']


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
    """Name every package that is missing or has a version that does not work, and the command that fixes it.

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
        if version is not None and not release(requirement.lowest) <= release(version) < release(requirement.below):
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


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: (2, 12, 0) for ``'2.12.0+cpu'``."""
    return tuple(int(part) for part in re.findall(r'\d+', version.split('+')[0])[:3])
