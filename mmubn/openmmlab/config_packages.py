"""Lets ``PACKAGE::PATH`` name a config of an OpenMMLab package under whatever name that is distributed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata, util

__all__ = ['find_by_module']


def find_by_module(original: Callable[[str], tuple[str, str]]) -> Callable[[str], tuple[str, str]]:
    """Make ``_get_package_and_cfg_path`` of MMEngine name a package by its module where its distribution is another.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """

    @functools.wraps(original)
    def get_package_and_cfg_path(cfg_path: str) -> tuple[str, str]:
        package, path = original(cfg_path)
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            package = cfg_path.partition('::')[0]
            if util.find_spec(package) is None:
                raise ModuleNotFoundError(
                    f'{package} is not installed, and {cfg_path} is a config of it: install the version of it that '
                    'fits your mmcv.'
                ) from None
        return package, path

    return get_package_and_cfg_path
