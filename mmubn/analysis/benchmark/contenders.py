"""What the benchmark compares: norm layers, and a ResNet-50 that is built with any of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmubn import ops
from mmubn.layers import BNET, RBN, UBN

__all__ = ['CONTENDERS', 'DEFAULT_CONTENDERS', 'Contender', 'NaiveUBN', 'composition', 'resnet50']


class NaiveUBN(nn.Module):
    """UBN in training as the paper's equations read, one operator after the other, differentiated by autograd.

    Input and output (N, C, H, W). Source: arXiv 2311.15993, Eqs. 3-5.
    """

    running_mean: Tensor
    running_var: Tensor
    running_similarity: Tensor

    def __init__(self, channels: int, threshold: float = 0.15) -> None:
        super().__init__()
        self.threshold = threshold
        self.center_weight = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale_weight = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale_bias = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        nn.init.dirac_(self.conv.weight, groups=channels)
        nn.init.zeros_(self.conv.bias)
        self.register_buffer('running_mean', torch.zeros(channels))
        self.register_buffer('running_var', torch.ones(channels))
        self.register_buffer('running_similarity', torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        use_batch = self.training and self._is_condensed(x.detach())
        x = x + self.center_weight * x.mean((2, 3), keepdim=True)
        x = F.batch_norm(x, self.running_mean, self.running_var, training=use_batch)
        x = x * torch.sigmoid(self.scale_weight * x.mean((2, 3), keepdim=True) + self.scale_bias)
        return self.conv(x)

    @torch.no_grad()
    def _is_condensed(self, x: Tensor) -> bool:
        f = F.normalize(x[:16].flatten(1), dim=1)
        n = len(f)
        if n > 1:
            cosines = f @ f.T
            similarity = (cosines.sum() - cosines.trace()) / (n * (n - 1))
            self.running_similarity.mul_(0.9).add_(0.1 * similarity)
        return bool(self.running_similarity > self.threshold)


def composition(channels: int) -> nn.Module:
    """Build the operators that BNET is made of, one after the other."""
    return nn.Sequential(
        nn.BatchNorm2d(channels, affine=False), nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    )


class Contender(NamedTuple):
    """One layer of the comparison.

    Attributes:
        make: Builds the layer for a number of channels.
        backend: Computes the layer; None leaves the choice to the layer.
    """

    make: Callable[[int], nn.Module]
    backend: str | None = None

    def forced(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the backend computes the layer."""
        return ops.use_backend(self.backend) if self.backend else contextlib.nullcontext()


def open_ubn(make: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    """Make UBNs with the gate computed and always open, so that no round is spared the batch's statistics."""
    return lambda channels: make(channels, threshold=-1)


CONTENDERS = {
    'bn': Contender(nn.BatchNorm2d),
    'composition': Contender(composition),
    'bnet': Contender(BNET),
    'rbn': Contender(RBN),
    'ubn': Contender(open_ubn(UBN)),
    'ubn-torch': Contender(open_ubn(UBN), 'torch'),
    'ubn-reference': Contender(open_ubn(UBN), 'reference'),
    'ubn-naive': Contender(open_ubn(NaiveUBN)),
}
DEFAULT_CONTENDERS = [name for name in CONTENDERS if name != 'ubn-torch']


class Bottleneck(nn.Module):
    """A residual block of ResNet-50 whose three norms are ``norm``."""

    def __init__(self, inputs: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            norm(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet50(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Build ResNet-50 (arXiv 1512.03385, stride in the 3x3 convolution) with ``norm`` as each of its 53 norms.

    Input (N, 3, H, W), output (N, 1000).
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        norm(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1, norm))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
