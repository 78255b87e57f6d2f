"""Old name of mmubn.openmmlab.models: configs of earlier drafts import it."""

from mmubn.openmmlab.models import InceptionV4, InceptionV4CIFAR, ResNeXtCIFAR  # noqa: F401
