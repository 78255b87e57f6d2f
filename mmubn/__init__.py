"""Unified Batch Normalization (arXiv 2311.15993) for MMDetection and MMPretrain.

``import mmubn`` registers the norm types, so that ``norm_cfg=dict(type='UBN')`` works in any config of any OpenMMLab
package, and the hooks that look into them. In a config: ``custom_imports = dict(imports=['mmubn'])``. What an import
changes in other libraries, and why, is the table in docs/patches.md.
"""

from mmubn.openmmlab.versions import check_environment

_HAS_MMENGINE = check_environment()

from mmubn.convert import convert_norms  # noqa: E402 - only after torch is known to be there
from mmubn.deploy import FoldedUBN, fold  # noqa: E402
from mmubn.layers import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN, convert_state_dict, image_areas  # noqa: E402
from mmubn.openmmlab import patches  # noqa: E402
from mmubn.ops import backend_info, use_backend  # noqa: E402
from mmubn.version import __version__  # noqa: E402

__all__ = [
    'BNET',
    'IEBN',
    'RBN',
    'UBN',
    'FoldedUBN',
    'SyncUBN',
    'UnitizedBN',
    '__version__',
    'backend_info',
    'convert_norms',
    'convert_state_dict',
    'fold',
    'image_areas',
    'use_backend',
]

if _HAS_MMENGINE:
    from mmubn.openmmlab.registration import register

    register()
else:
    patches.apply(patches.ON_IMPORT)
