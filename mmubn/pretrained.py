"""Old name of mmubn.openmmlab.pretrained: configs of earlier drafts import it."""

from mmubn.openmmlab.pretrained import PretrainedInit  # noqa: F401
