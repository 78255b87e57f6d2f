"""Networks of the paper that MMPretrain lacks, registered in its scope.

In a config: ``custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.models'])``. ``import mmubn`` alone does not
import them, since they need MMPretrain.
"""

from mmubn.openmmlab.models.inception_v4 import InceptionV4, InceptionV4CIFAR
from mmubn.openmmlab.models.resnext_cifar import ResNeXtCIFAR

__all__ = ['InceptionV4', 'InceptionV4CIFAR', 'ResNeXtCIFAR']
