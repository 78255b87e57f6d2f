"""Normalization layers: state and validation on top of :mod:`mmubn.functional`."""

from mmubn.layers.sync_ubn import SyncUBN
from mmubn.layers.ubn import UBN

__all__ = ['UBN', 'SyncUBN']
