"""Old name of mmubn.openmmlab.resumption: configs of earlier drafts import it."""

from mmubn.openmmlab.resumption import AtomicCheckpointHook, IterationSeedHook  # noqa: F401
