"""Old name of mmubn.openmmlab.pretrained: configs written before 0.1.0 import it."""

from mmubn.openmmlab.pretrained import PretrainedInit  # noqa: F401
