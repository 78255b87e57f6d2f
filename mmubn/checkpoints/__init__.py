"""State-dict layouts of norm layers, in and out. Needs torch alone.

- :mod:`~mmubn.checkpoints.layouts`: the table of layouts.
- :mod:`~mmubn.checkpoints.names`: layers that BNET's networks name otherwise.
- :mod:`~mmubn.checkpoints.conversion`: one general form of a norm, from and to any layout.
- :mod:`~mmubn.checkpoints.loading`: what ``load_state_dict`` of a layer does with entries of another layout.
"""

from mmubn.checkpoints.conversion import Target, convert_state_dict
from mmubn.checkpoints.layouts import (
    FACTORS,
    INITIAL_SCALE_BIAS,
    LAYOUTS,
    CheckpointError,
    Layout,
    find_layout,
    is_state_dict,
)
from mmubn.checkpoints.loading import convert_state, counted_reads, report_reads

__all__ = [
    'FACTORS',
    'INITIAL_SCALE_BIAS',
    'LAYOUTS',
    'CheckpointError',
    'Layout',
    'Target',
    'convert_state',
    'convert_state_dict',
    'counted_reads',
    'find_layout',
    'is_state_dict',
    'report_reads',
]
