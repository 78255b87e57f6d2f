"""Importing this module applies every optional change of docs/patches.md, as ``mmubn.openmmlab.install()`` does.

For configs that are run by other tools than those of this package:
``custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.installed'])``.
"""

from mmubn.openmmlab.patches import install

install()
