"""Unified Batch Normalization (arXiv 2311.15993) for MMDetection and MMPretrain.

``import mmubn`` registers the norm types, so that ``norm_cfg=dict(type='UBN')`` works in any config of any OpenMMLab
package. In a config: ``custom_imports = dict(imports=['mmubn'])``.
"""

from mmubn.environment import allow_mmengine_checkpoints, check_environment

_HAS_MMENGINE = check_environment()

from mmubn.checkpoints import report_layouts, unwrap_model_key  # noqa: E402
from mmubn.complexity import install_counters  # noqa: E402
from mmubn.deploy import FoldedUBN, fold  # noqa: E402
from mmubn.guards import install_guards  # noqa: E402
from mmubn.kernels import backend_info  # noqa: E402
from mmubn.layers import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN  # noqa: E402 - only after torch is known to be there
from mmubn.version import __version__  # noqa: E402

__all__ = ['BNET', 'IEBN', 'RBN', 'UBN', 'FoldedUBN', 'SyncUBN', 'UnitizedBN', '__version__', 'backend_info', 'fold']

if _HAS_MMENGINE:
    from mmengine.registry import MODELS

    import mmubn.hooks  # registers them
    import mmubn.pretrained  # noqa: F401 - init_cfg.strict

    # In the root registry: mmcv looks a norm up in the scope it is called from and in its parents, never in a sibling.
    for norm in (UBN, SyncUBN, RBN, BNET, IEBN, UnitizedBN):
        MODELS.register_module(name=norm.__name__, module=norm)
    allow_mmengine_checkpoints()
    report_layouts()
    unwrap_model_key()

install_guards()
install_counters()
