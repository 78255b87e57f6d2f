"""The fast and exact ways to compute a norm layer. Needs torch alone.

- :mod:`~mmubn.ops.types`: the values that are handed on.
- :mod:`~mmubn.ops.backend`: :class:`Backend`, the contract, with the (N, C) algebra that all backends share.
- :mod:`~mmubn.ops.reference`: ``reference``, :mod:`mmubn.functional` differentiated by autograd.
- :mod:`~mmubn.ops.torch_backend`: ``torch``, torch's operators.
- :mod:`~mmubn.ops.triton`: ``triton``, kernels for NVIDIA GPUs.
- :mod:`~mmubn.ops.cpp`: ``cpp``, kernels for the CPU, compiled at their first use.
- :mod:`~mmubn.ops.autograd`: the gradient by hand, for all but the reference.
- :mod:`~mmubn.ops.replayed`: the steps of ``triton``, recorded and repeated, so that they cost the host little.
- :mod:`~mmubn.ops.plain`, :mod:`~mmubn.ops.first_use`: what has no memory of its own; what is done once on a device.
- :mod:`~mmubn.ops.dispatch`: which backend an input gets, and the switch.
"""

from mmubn.ops.autograd import rectified_norm
from mmubn.ops.backend import Backend
from mmubn.ops.dispatch import backend_info, choose_backend, is_exporting, is_transformed, name_and_reason, use_backend
from mmubn.ops.replayed import Forward, replayed_norm
from mmubn.ops.types import (
    BatchStatistics,
    Buffers,
    Constants,
    Decision,
    Form,
    Gate,
    Moments,
    Parameters,
    Running,
    Similarity,
    Statistics,
)

__all__ = [
    'Backend',
    'BatchStatistics',
    'Buffers',
    'Constants',
    'Decision',
    'Form',
    'Forward',
    'Gate',
    'Moments',
    'Parameters',
    'Running',
    'Similarity',
    'Statistics',
    'backend_info',
    'choose_backend',
    'is_exporting',
    'is_transformed',
    'name_and_reason',
    'rectified_norm',
    'replayed_norm',
    'use_backend',
]
