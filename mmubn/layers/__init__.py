"""Normalization layers: state and validation on top of :mod:`mmubn.functional` and :mod:`mmubn.ops`."""

from mmubn.layers.areas import image_areas
from mmubn.layers.conversion import convert_state_dict
from mmubn.layers.sync_ubn import SyncUBN
from mmubn.layers.ubn import UBN
from mmubn.layers.unified_norm import UnifiedNorm
from mmubn.layers.variants import BNET, IEBN, RBN, UnitizedBN

__all__ = [
    'BNET',
    'IEBN',
    'NORMS',
    'RBN',
    'UBN',
    'SyncUBN',
    'UnifiedNorm',
    'UnitizedBN',
    'convert_state_dict',
    'image_areas',
]

# The types that norm_cfg may name.
NORMS = (UBN, SyncUBN, RBN, BNET, IEBN, UnitizedBN)
