"""ResNeXt for images of 32x32 pixels."""

from mmpretrain.models.backbones import ResNet_CIFAR, ResNeXt
from mmpretrain.registry import MODELS

__all__ = ['ResNeXtCIFAR']


@MODELS.register_module(name='ResNeXt_CIFAR')
class ResNeXtCIFAR(ResNet_CIFAR, ResNeXt):
    """MMPretrain's ResNeXt (arXiv 1611.05431) with the stem of its ResNet_CIFAR: a 3x3 convolution, no max-pooling.

    The stages are those of ResNeXt, so ``depth=50`` is ResNeXt-50 (32x4d).

    Args:
        depth: 50, 101 or 152.
        groups: Groups of the 3x3 convolutions (32).
        width_per_group: Their channels per group in the first stage (4).
        **kwargs: Of MMPretrain's ResNet, but ``deep_stem``.

    Shape:
        Input (N, 3, H, W); output a tuple of (N, 256 * 2**i, H / 2**i, W / 2**i), one for each i of ``out_indices``,
        which counts from 0 and by default is (3,).

    Raises:
        KeyError: ``depth`` is none of those.
    """
