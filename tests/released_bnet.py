"""ResNets as BNET's authors released them: in torch alone, with their names of layers, and files in their formats.

The third norm of each bottleneck, ``bnet3``, is a BatchNorm without weight and bias and a depthwise convolution.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {14: (1, 1, 1, 1), 50: (3, 4, 6, 3)}


class BNET(nn.BatchNorm2d):
    def __init__(self, channels, kernel_size):
        super().__init__(channels, affine=False)
        self.bnconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, None, None, self.training, self.momentum, self.eps)
        return self.bnconv(x)


class Bottleneck(nn.Module):
    """With ``bnet3``, or, without a kernel size, with a BatchNorm ``bn3`` as elsewhere."""

    def __init__(self, inputs, width, stride, kernel_size):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        if kernel_size is None:
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.bnet3 = BNET(outputs, kernel_size)
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = (self.bnet3 if hasattr(self, 'bnet3') else self.bn3)(self.conv3(y))
        return F.relu(y + (self.downsample(x) if hasattr(self, 'downsample') else x))


class ResNet(nn.Module):
    """The maps of the four stages; ``fc`` is there for its entries in a file."""

    def __init__(self, depth=50, width=8, kernel_size=5, classes=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        inputs = width
        for stage, count in enumerate(BLOCKS[depth]):
            blocks = nn.Sequential()
            for number in range(count):
                blocks.append(Bottleneck(inputs, width * 2**stage, 2 if stage and not number else 1, kernel_size))
                inputs = 4 * width * 2**stage
            self.add_module(f'layer{stage + 1}', blocks)
        if classes is not None:
            self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return tuple(maps)


def resnet(**options):
    """A network in evaluation mode, with random values in all that norms have, and weights that keep the scale."""
    network = ResNet(**options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            layer = key.split('.')[-3:-1]
            if key.endswith('running_var'):
                tensor.uniform_(0.5, 2, generator=generator)
            elif 'bnconv' in layer or key.endswith('running_mean') or (tensor.dim() == 1 and key.endswith('bias')):
                tensor.normal_(0, 0.2, generator=generator)
            elif tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.dim() == 4:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    return network


def prefixed(state_dict, prefix):
    return {prefix + key: value for key, value in state_dict.items()}


def detector_file(state_dict):
    """What MMCV 1 saved of a detector of MMDetection 2."""
    meta = dict(
        mmdet_version='2.3.0',
        mmcv_version='1.0.5',
        config="model = dict(type='FasterRCNN')",
        CLASSES=('one', 'two'),
        epoch=12,
        iter=np.int64(87960),
        time='Fri Nov 27 02:17:29 2020',
    )
    state = {0: dict(momentum_buffer=torch.zeros(2))}
    optimizer = dict(state=state, param_groups=[dict(lr=np.float64(2e-4), momentum=0.9, params=[0])])
    return dict(meta=meta, state_dict=state_dict, optimizer=optimizer)


def imagenet_file(state_dict):
    """What their training script for ImageNet saves: a name under ``model``, numbers as tensors or of NumPy."""
    return dict(
        epoch=100,
        model='resnet50BNET',
        state_dict=state_dict,
        best_prec1=np.float64(77.1),
        optimizer=dict(state={}, param_groups=[]),
    )


def named_as_before(state_dict):
    """The names that the authors' own converter reads: bnconv3 beside bn3."""
    return {key.replace('bnet3.bnconv', 'bnconv3').replace('bnet3', 'bn3'): value for key, value in state_dict.items()}
