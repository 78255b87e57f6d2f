"""All that knows OpenMMLab: registration, hooks, networks, checks of configs, and what is changed in other libraries.

- :mod:`~mmubn.openmmlab.patches`: the table of those changes; docs/patches.md is the same in words.
- :mod:`~mmubn.openmmlab.registration`: what ``import mmubn`` registers.

A config that is run by the tools of MMDetection or MMPretrain gets the optional changes by an import:
``custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.installed'])``. Python code calls :func:`install`.
"""

from mmubn.openmmlab.patches import install

__all__ = ['install']
