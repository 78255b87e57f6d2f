"""Settings of the tests of what knows OpenMMLab."""

import sys

import pytest

from mmubn.openmmlab import patches


@pytest.fixture
def install(monkeypatch):
    """``mmubn.openmmlab.install`` of these names, undone after the test where an attribute was replaced."""

    def install(*names):
        chosen = [patch for patch in patches.PATCHES if patch.name in names]
        assert len(chosen) == len(names)
        for patch in chosen:
            for symbol in patch.symbols if patch.replacement else ():
                owner, name = patches.owner_of(symbol)
                monkeypatch.setattr(owner, name, vars(owner)[name])  # to be put back
            for importer in patch.importers:
                module, _, name = importer.rpartition('.')
                if module in sys.modules:
                    monkeypatch.setattr(sys.modules[module], name, vars(sys.modules[module])[name])
        if names:  # without any it installs all
            patches.install(*names)

    monkeypatch.setattr(patches, '_applied', set(patches._applied))
    return install
