"""Norm layers as checkpoints hold them: in every layout, that of the released implementations included."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN

CHANNELS = 6


# --- the norms as their papers and released implementations name and compute them -------------------------------------


class Released(nn.BatchNorm2d):
    """BatchNorm without affine step, with vectors of the released shape or a convolution."""

    vectors = ()

    def __init__(self, kernel_size=None):
        super().__init__(CHANNELS, affine=False)
        for name in self.vectors:
            setattr(self, name, nn.Parameter(torch.empty(1, CHANNELS, 1, 1)))
        if kernel_size is not None:
            self.bnconv = nn.Conv2d(CHANNELS, CHANNELS, kernel_size, padding=kernel_size // 2, groups=CHANNELS)

    def normalised(self, x):
        # Without weight and bias, which some of them have: they come after the factor.
        return F.batch_norm(x, self.running_mean, self.running_var, None, None, self.training, self.momentum, self.eps)

    def rectified(self, x):
        x = self.normalised(x + self.center_weight * x.mean((2, 3), keepdim=True))
        return x, torch.sigmoid(self.scale_weight * x.mean((2, 3), keepdim=True) + self.scale_bias)


class ReleasedRBN(Released):
    vectors = ('weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias')

    def forward(self, x):
        x, r = self.rectified(x)
        return self.weight * (r * x) + self.bias


class ReleasedBNET(Released):
    def forward(self, x):
        return self.bnconv(self.normalised(x))


class ReleasedIEBN(Released):
    vectors = ('weight', 'bias', 'weight_readjust', 'bias_readjust')

    def forward(self, x):
        r = torch.sigmoid(self.weight_readjust * x.mean((2, 3), keepdim=True) + self.bias_readjust)
        return self.normalised(x) * (self.weight * r) + self.bias


class ReleasedUBN(Released):
    """With the gate open."""

    vectors = ('center_weight', 'scale_weight', 'scale_bias')

    def forward(self, x):
        x, r = self.rectified(x)
        return r * self.bnconv(x)


SOURCES = {  # the first word is the name of the layout
    'bn': lambda: nn.BatchNorm2d(CHANNELS),
    'rbn': lambda: RBN(CHANNELS),
    'rbn-released': ReleasedRBN,
    'bnet': lambda: BNET(CHANNELS),
    'bnet 5x5': lambda: BNET(CHANNELS, kernel_size=5),
    'bnet-released': lambda: ReleasedBNET(3),
    'bnet-released 5x5': lambda: ReleasedBNET(5),
    'bnet-released 1x1': lambda: ReleasedBNET(1),
    'iebn': lambda: IEBN(CHANNELS),
    'iebn-released': ReleasedIEBN,
    'unitizedbn': lambda: UnitizedBN(CHANNELS),
    'ubn-released': lambda: ReleasedUBN(3),
    'ubn': lambda: UBN(CHANNELS),
    'ubn plain': lambda: UBN(CHANNELS, centering=False, scaling=False, kernel_size=1),
    'ubn centering': lambda: UBN(CHANNELS, scaling=False, kernel_size=5),
    'ubn calibrated': lambda: UBN(CHANNELS, calibrate_bias=True),
    'ubn calibrated scaling': lambda: UBN(CHANNELS, centering=False, calibrate_bias=True),
}
# Where these are zero, all of them are BatchNorm times a constant.
RECTIFICATIONS = ('neighbor_weight', 'center_weight', 'scale_weight', 'weight_readjust')
# What a factor depends on, in the words of errors.
RAW, NORMALISED, LENGTH = 'the mean of the raw input', 'the mean of the normalised input', 'the length of the'


def fill(module):
    """Random values in every tensor: those of the released layers have none before."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.dim():
                tensor.normal_(generator=generator)
    return module


def source(name, *zeroed):
    """In float64, with random values but for the tensors ``zeroed``; neighbor_weight stands for that of bnconv too."""
    norm = fill(SOURCES[name]().double())
    with torch.no_grad():
        for key, tensor in norm.state_dict().items():
            if key in zeroed:
                tensor.zero_()
            elif key == 'bnconv.weight' and 'neighbor_weight' in zeroed:
                is_center = torch.zeros_like(tensor)
                is_center[:, :, tensor.shape[2] // 2, tensor.shape[3] // 2] = 1
                tensor.mul_(is_center)
    return norm


def inside(norm):
    """The norm where a network has it, so that the keys have a prefix."""
    return nn.ModuleDict({'layer2': nn.Sequential(nn.ModuleDict({'bn1': norm}))})


PREFIX = 'layer2.0.bn1.'


def assert_same_function(norm, reference, tolerance=1e-12):
    """In evaluation and, with the gate open, in training, which must leave the same running statistics."""
    generator = torch.Generator().manual_seed(0)
    x = sum(torch.randn(4, CHANNELS, *size, dtype=torch.float64, generator=generator) for size in ((9, 8), (1, 1)))
    norm, reference = copy.deepcopy(norm).double(), copy.deepcopy(reference).double()
    for training in (False, True):
        y, expected = norm.train(training)(x), reference.train(training)(x)
        assert (y - expected).abs().max() / expected.abs().max() < tolerance
    for name in ('running_mean', 'running_var'):
        assert torch.allclose(getattr(norm, name), getattr(reference, name), rtol=1e-10, atol=1e-12), name


# --- what reads them --------------------------------------------------------------------------------------------------

BATCH_NORM = {'bn', 'bnet-released 1x1'}
RBNS = {'rbn', 'rbn-released'}
BNETS = {'bnet', 'bnet-released'}
LARGE = {'bnet 5x5', 'bnet-released 5x5'}
TYPES = {  # a layer, and what it reads exactly, whatever the values
    'UBN': (lambda: UBN(CHANNELS), {*BATCH_NORM, *RBNS, *BNETS, 'ubn'}),
    'SyncUBN': (lambda: SyncUBN(CHANNELS), {*BATCH_NORM, *RBNS, *BNETS, 'ubn'}),
    'UBN calibrated': (
        lambda: UBN(CHANNELS, calibrate_bias=True),
        {*BATCH_NORM, *BNETS, 'ubn-released', 'ubn calibrated'},
    ),
    'RBN': (lambda: RBN(CHANNELS), {*BATCH_NORM, 'ubn plain', *RBNS}),
    'BNET': (lambda: BNET(CHANNELS), {*BATCH_NORM, 'ubn plain', *BNETS}),
    'BNET 1x1': (lambda: BNET(CHANNELS, kernel_size=1), {*BATCH_NORM, 'ubn plain'}),
    'IEBN': (lambda: IEBN(CHANNELS), {*BATCH_NORM, 'ubn plain', 'iebn', 'iebn-released'}),
    'UnitizedBN': (lambda: UnitizedBN(CHANNELS), {*BATCH_NORM, 'ubn plain', 'unitizedbn'}),
}
# Keys that are some of the type's own: they may be its own with a tensor lost, so not even a constant is read.
LOST = {
    'UBN': {'iebn', 'unitizedbn', 'ubn plain', 'ubn centering'},
    'UBN calibrated': {'iebn', 'unitizedbn', 'ubn calibrated scaling'},
    'RBN': {'iebn', 'unitizedbn'},
    'IEBN': {'unitizedbn'},
}
LOST['SyncUBN'] = LOST['UBN']
