"""Lets files hold the eps of a norm as a plain number. Part of the table in :mod:`mmubn.openmmlab.patches`."""

from __future__ import annotations

from importlib import util

import torch

from mmubn.layers.unfoldable_eps import UnfoldableEps

__all__ = ['write_as_float']


def write_as_float() -> None:
    """Tell torch's safe reader of ``float``, by which an eps is pickled, and PyYAML, which writes exact types alone."""
    if hasattr(torch.serialization, 'add_safe_globals'):  # torch 2.4
        torch.serialization.add_safe_globals([float])
    if util.find_spec('yaml') is None:
        return
    import yaml

    representers = (yaml.representer.SafeRepresenter, yaml.SafeDumper, yaml.Dumper, getattr(yaml, 'CSafeDumper', None))
    for representer in filter(None, representers):  # a dumper that has a table of its own does not look into the first
        representer.add_representer(UnfoldableEps, representer.represent_float)
