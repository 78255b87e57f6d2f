"""What ``import mmubn`` registers in MMEngine."""

from mmengine.registry import MODELS

import mmubn.openmmlab.convert_norms
import mmubn.openmmlab.hooks  # noqa: F401 - registers those that measure
from mmubn.layers import NORMS
from mmubn.openmmlab import patches
from mmubn.openmmlab.own_configs import register_configs

__all__ = ['register']


def register() -> None:
    """Register norm types and configs, and apply the changes in other libraries that no model with them can do without.

    The norms go to the root registry: mmcv looks a norm up in the scope it is called from and in its parents, never in
    a sibling. ConvertNorms and the hooks that look into norms are registered by the import of this module.
    """
    for norm in NORMS:
        if MODELS.module_dict.get(norm.__name__) is not norm:
            MODELS.register_module(name=norm.__name__, module=norm)
    register_configs()
    patches.apply(patches.ON_IMPORT)
