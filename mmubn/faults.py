"""Old name of mmubn.openmmlab.resumption: configs written before 0.1.0 import it."""

from mmubn.openmmlab.resumption import AtomicCheckpointHook, IterationSeedHook  # noqa: F401
