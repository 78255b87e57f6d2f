"""torchvision's Faster R-CNN with UBN: a whole network in mixed precision, as somebody would train it."""

from __future__ import annotations

import functools
import importlib.util
import math
import time

import torch
from torch import Tensor, nn

from mmubn.analysis.gpu_check.device import by_backend, is_gpu, synchronize
from mmubn.analysis.gpu_check.outcome import Finding, Skip
from mmubn.layers import UBN

__all__ = ['IMAGES', 'train_detector']

# Two images of COCO's usual size, which torchvision pads to multiples of 32
IMAGES, SMALL_IMAGES = (2, 3, 800, 1344), (2, 3, 64, 96)
STEPS, FEW_STEPS = 10, 2


def train_detector(device: torch.device) -> Finding:
    """Ten steps on the same two images: every loss is finite."""
    if importlib.util.find_spec('torchvision') is None:
        raise Skip('torchvision is not installed')
    on_gpu = is_gpu(device)
    images, targets = batch(IMAGES if on_gpu else SMALL_IMAGES, device)
    model = faster_rcnn(images[0].shape[1:]).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    losses, seconds = [], []
    for _ in range(STEPS if on_gpu else FEW_STEPS):
        start = time.perf_counter()
        half = torch.float16 if on_gpu else torch.bfloat16
        with torch.autocast(device.type, half), by_backend(device, None if on_gpu else 'torch'):
            loss = torch.stack([*model(images, targets).values()]).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    if not all(map(math.isfinite, losses)):
        raise AssertionError(f'a loss is not finite: {losses}')
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise AssertionError('a parameter or a buffer is not finite')
    falls = 'falls' if losses[-1] < losses[0] else 'does not fall'
    return Finding(f'the loss {falls}, {losses[0]:.3f} to {losses[-1]:.3f}; last step {1e3 * seconds[-1]:.0f} ms')


def faster_rcnn(size: torch.Size) -> nn.Module:
    """With a ResNet-50 and FPN from scratch, whose every norm is UBN and learns; images keep their size."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    norm = functools.partial(UBN, threshold=-1)
    backbone = resnet_fpn_backbone(backbone_name='resnet50', weights=None, norm_layer=norm, trainable_layers=5)
    return FasterRCNN(backbone, num_classes=91, min_size=min(size), max_size=max(size))


def batch(shape: tuple[int, int, int, int], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with three objects each."""
    generator = torch.Generator().manual_seed(0)
    _, _, height, width = shape
    part = torch.tensor([width, height, width, height])
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.2, 0.9, 0.6], [0.2, 0.5, 0.7, 0.9]]) * part
    images = [image.to(device) for image in torch.rand(shape, generator=generator)]
    target = {'boxes': boxes.to(device), 'labels': torch.tensor([1, 18, 44], device=device)}
    return images, [target for _ in images]
