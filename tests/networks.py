"""A small network with a norm, for what other libraries do to it."""

import torch
from torch import nn

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN

TYPES = [UBN, SyncUBN, RBN, BNET, IEBN, UnitizedBN]


class Net(nn.Module):
    """A convolution with its norm, and deeper down another with a BatchNorm."""

    def __init__(self, norm=UBN):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = norm(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.block(self.bn(self.conv(x)))


def trained(model):
    """The model in evaluation mode, after one batch."""
    torch.manual_seed(0)
    model.train()
    model(torch.randn(2, 3, 6, 6))
    return model.eval()
