"""Inception-v4 (Szegedy et al., arXiv 1602.07261, figures 3 to 9), for ImageNet and for images of 32x32 pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, ModuleList, Sequential
from mmpretrain.registry import MODELS
from torch import Tensor, nn

__all__ = ['InceptionV4', 'InceptionV4CIFAR']


class Conv(NamedTuple):
    """A convolution without bias, a norm and a ReLU. Padded by half the kernel, or not at all: V in the figures."""

    out_channels: int
    kernel: int | tuple[int, int]
    stride: int = 1
    valid: bool = False

    def build(self, in_channels: int, norm_cfg: dict) -> tuple[nn.Module, int]:
        kernel = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        padding = (0, 0) if self.valid else (kernel[0] // 2, kernel[1] // 2)
        module = ConvModule(in_channels, self.out_channels, kernel, self.stride, padding, norm_cfg=norm_cfg)
        return module, self.out_channels


class Pool(NamedTuple):
    """A 3x3 pooling: an average at each pixel, or a maximum at every second one."""

    kind: str

    def build(self, in_channels: int, norm_cfg: dict) -> tuple[nn.Module, int]:
        average = self.kind == 'average'
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False) if average else nn.MaxPool2d(3, 2), in_channels


class Fork:
    """Branches that read one input and whose outputs are concatenated, each a sequence of Conv, Pool and Fork."""

    def __init__(self, *branches: tuple[Conv | Pool | Fork, ...]) -> None:
        self.branches = branches

    def build(self, in_channels: int, norm_cfg: dict) -> tuple[nn.Module, int]:
        built = [chain(branch, in_channels, norm_cfg) for branch in self.branches]
        return Concat([module for module, _ in built]), sum(channels for _, channels in built)


class Concat(ModuleList):
    """What a Fork builds."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


def chain(layers: Iterable[Conv | Pool | Fork], in_channels: int, norm_cfg: dict) -> tuple[Sequential, int]:
    """The modules of ``layers``, one after the other, and how many channels the last puts out."""
    modules = []
    for layer in layers:
        module, in_channels = layer.build(in_channels, norm_cfg)
        modules.append(module)
    return Sequential(*modules), in_channels


AVERAGE, MAXIMUM = Pool('average'), Pool('maximum')
STEM = (
    Conv(32, 3, stride=2, valid=True),
    Conv(32, 3, valid=True),
    Conv(64, 3),
    Fork((MAXIMUM,), (Conv(96, 3, stride=2, valid=True),)),
    Fork(
        (Conv(64, 1), Conv(96, 3, valid=True)),
        (Conv(64, 1), Conv(64, (1, 7)), Conv(64, (7, 1)), Conv(96, 3, valid=True)),
    ),
    Fork((Conv(192, 3, stride=2, valid=True),), (MAXIMUM,)),
)
INCEPTION_A = Fork(
    (Conv(96, 1),),
    (Conv(64, 1), Conv(96, 3)),
    (Conv(64, 1), Conv(96, 3), Conv(96, 3)),
    (AVERAGE, Conv(96, 1)),
)
REDUCTION_A = Fork(
    (Conv(384, 3, stride=2, valid=True),),
    (Conv(192, 1), Conv(224, 3), Conv(256, 3, stride=2, valid=True)),
    (MAXIMUM,),
)
INCEPTION_B = Fork(
    (Conv(384, 1),),
    (Conv(192, 1), Conv(224, (1, 7)), Conv(256, (7, 1))),
    (Conv(192, 1), Conv(192, (7, 1)), Conv(224, (1, 7)), Conv(224, (7, 1)), Conv(256, (1, 7))),
    (AVERAGE, Conv(128, 1)),
)
REDUCTION_B = Fork(
    (Conv(192, 1), Conv(192, 3, stride=2, valid=True)),
    (Conv(256, 1), Conv(256, (1, 7)), Conv(320, (7, 1)), Conv(320, 3, stride=2, valid=True)),
    (MAXIMUM,),
)
SPLIT = Fork((Conv(256, (1, 3)),), (Conv(256, (3, 1)),))
INCEPTION_C = Fork(
    (Conv(256, 1),),
    (Conv(384, 1), SPLIT),
    (Conv(384, 1), Conv(448, (3, 1)), Conv(512, (1, 3)), SPLIT),
    (AVERAGE, Conv(256, 1)),
)


@MODELS.register_module()
class InceptionV4(BaseModule):
    """Inception-v4. Each of its 149 convolutions has a norm of ``norm_cfg``.

    Args:
        in_channels: Channels of the images.
        dropout: Share of the last feature map's channels that are dropped in training. A channel is dropped whole, so
            this is the paper's dropout after the average pooling.
        norm_cfg: The norm of every convolution; by default BatchNorm.
        init_cfg: As in MMEngine's BaseModule; by default Kaiming's initialisation, as in MMPretrain's ResNet.

    Shape:
        Input (N, in_channels, H, W), H and W at least 75 and 299 in the paper; output a tuple of one feature map,
        (N, 1536, 8, 8) for 299x299.
    """

    stem: ClassVar[tuple[Conv | Pool | Fork, ...]] = STEM

    def __init__(
        self,
        in_channels: int = 3,
        dropout: float = 0.2,
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = [
                dict(type='Kaiming', layer=['Conv2d']),
                dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
            ]
        super().__init__(init_cfg)
        blocks = (*self.stem, *[INCEPTION_A] * 4, REDUCTION_A, *[INCEPTION_B] * 7, REDUCTION_B, *[INCEPTION_C] * 3)
        self.features, _ = chain(blocks, in_channels, dict(type='BN') if norm_cfg is None else norm_cfg)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.dropout(self.features(x)),)


def at_full_resolution(layers: Iterable[Conv | Pool | Fork]) -> tuple[Conv | Fork, ...]:
    """The same ``layers`` without strides and poolings, every convolution padded: resolution stays as it is."""
    kept = []
    for layer in layers:
        if isinstance(layer, Conv):
            kept.append(layer._replace(stride=1, valid=False))
        elif isinstance(layer, Fork):
            kept.append(Fork(*(at_full_resolution(branch) for branch in layer.branches)))
    return tuple(kept)


@MODELS.register_module(name='InceptionV4_CIFAR')
class InceptionV4CIFAR(InceptionV4):
    """Inception-v4 for images of 32x32 pixels: its stem has neither strides nor max-pooling.

    All parameters have the shapes of :class:`InceptionV4`'s.

    Shape:
        Input (N, in_channels, H, W), H and W at least 7; output a tuple of one feature map, (N, 1536, 7, 7) for 32x32.
        The stem puts out (N, 384, H, W).
    """

    stem = at_full_resolution(STEM)
