"""Old name of mmubn.openmmlab.models: configs written before 0.1.0 import it."""

from mmubn.openmmlab.models import InceptionV4, InceptionV4CIFAR, ResNeXtCIFAR  # noqa: F401
