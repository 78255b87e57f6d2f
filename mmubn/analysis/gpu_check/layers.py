"""Whole layers of every type, at sizes of detection and of ImageNet, beside the reference in float64 on the device."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmubn.analysis.benchmark import DTYPES, MEMORY_FORMATS
from mmubn.analysis.gpu_check.device import by_backend, is_gpu, takes_kernels
from mmubn.analysis.gpu_check.outcome import Check, Finding
from mmubn.layers import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN
from mmubn.layers.unified_norm import UnifiedNorm

__all__ = ['KINDS', 'Input', 'checks', 'compare', 'draw', 'make_layer', 'step']

KINDS: dict[str, Callable[[int], UnifiedNorm]] = {
    'UBN': UBN,
    'UBN k=1': functools.partial(UBN, kernel_size=1),
    'UBN k=5': functools.partial(UBN, kernel_size=5),
    'UBN k=7': functools.partial(UBN, kernel_size=7),
    'UBN calibrated': functools.partial(UBN, calibrate_bias=True),
    'UBN without gate': functools.partial(UBN, threshold=None),
    'UBN without centering': functools.partial(UBN, centering=False),
    'UBN without scaling': functools.partial(UBN, scaling=False),
    'SyncUBN': SyncUBN,
    'RBN': RBN,
    'BNET': BNET,
    'IEBN': IEBN,
    'UnitizedBN': UnitizedBN,
}

# Of a ResNet-50 with 2 images of 800x1344 in a detector and with 224x224 at ImageNet, and odd ones.
SHAPES = [
    (2, 64, 400, 672),
    (2, 256, 200, 336),
    (2, 512, 100, 168),
    (2, 1024, 50, 84),
    (2, 2048, 25, 42),
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (64, 2048, 7, 7),
    (1, 256, 13, 21),
    (2, 48, 37, 53),
    (2, 31, 19, 23),
    (4, 3, 128, 128),
    (8, 96, 1, 1),
    (300, 16, 5, 5),
]
SHAPES_OF_KINDS = [(2, 256, 200, 336), (32, 512, 28, 28), (2, 48, 37, 53)]
SMALL_SHAPES = [(2, 3, 4, 5), (3, 4, 1, 1)]
SMALL_SHAPES_OF_KINDS = [(2, 3, 4, 5)]
FORMS = [('fp32', 'nchw'), ('bf16', 'channels_last'), ('fp16', 'nchw'), ('fp32', 'channels_last')]
FORMS_OF_KINDS = FORMS[:2]

# What float32 may be off, as a part of the largest value of a tensor. The gradients are sums whose terms cancel, those
# of the pooled terms nearly all: theirs is a part of the largest gradient of the bias, where that is larger.
ROUNDING, ROUNDING_OF_SUMS = 1e-5, 5e-5
# What is stored in half precision is rounded once more, by half a unit in the last place of each value.
STORAGE = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Input(NamedTuple):
    """An input of a layer, and the gradient of its output."""

    x: Tensor
    dy: Tensor

    def double(self) -> Input:
        return Input(self.x.double(), self.dy.double())


def checks(device: torch.device) -> list[Check]:
    """The checks of this stage: by the kernels, where the device has them, and by torch's operators."""
    on_gpu = is_gpu(device)
    shapes, of_kinds = (SHAPES, SHAPES_OF_KINDS) if on_gpu else (SMALL_SHAPES, SMALL_SHAPES_OF_KINDS)
    forms_of_kinds = FORMS_OF_KINDS if on_gpu else FORMS_OF_KINDS[:1]
    todo = [('UBN', shape, form, None) for shape in shapes for form in FORMS]
    todo += [(kind, shape, form, None) for kind in KINDS for shape in of_kinds for form in forms_of_kinds]
    todo += [('UBN', shape, form, 'torch') for shape in shapes for form in FORMS_OF_KINDS]
    todo += [(kind, of_kinds[-1], FORMS[0], 'torch') for kind in KINDS]
    found = []
    for kind, shape, (dtype, memory_format), backend in dict.fromkeys(todo):
        words = [kind, 'x'.join(map(str, shape)), dtype, memory_format, *([f'by {backend}'] if backend else [])]
        run = functools.partial(one_layer, kind, shape, dtype, memory_format, backend, device)
        found.append(Check(' '.join(words), run))
    return found


def one_layer(
    kind: str, shape: tuple[int, ...], dtype: str, memory_format: str, backend: str | None, device: torch.device
) -> Finding:
    """Training with the gate open and shut, and evaluation: outputs, gradients and buffers."""
    data = draw(shape, DTYPES[dtype], memory_format, device)
    wide = data.double()
    worst = 0.0
    by_kernels = False
    for mode in ('training', 'gate shut', 'evaluation'):
        layer = make_layer(kind, shape[1], device).train(mode != 'evaluation')
        if mode == 'gate shut':
            if layer._buffers.get('running_similarity') is None or getattr(layer, 'threshold', None) is None:
                continue
            layer.running_similarity.fill_(-1)
        by_kernels = backend is None and takes_kernels(layer, data.x)
        reference = copy.deepcopy(layer).double()
        found = step(layer, data, backend)
        expected = step(reference, wide, 'reference')
        try:
            worst = max(worst, compare(found, expected, DTYPES[dtype]))
        except AssertionError as error:
            raise AssertionError(f'{mode}: {error}') from None
        for name in ('y', 'dx'):
            if found[name].dtype != data.x.dtype:
                raise AssertionError(f'{mode}: {name} is {found[name].dtype}, expected {data.x.dtype}')
            if by_kernels and not found[name].is_contiguous(memory_format=MEMORY_FORMATS[memory_format]):
                raise AssertionError(f'{mode}: {name} has strides {found[name].stride()}, expected {memory_format}')
    way = 'by the kernels' if by_kernels else f'by {backend}' if backend else "by torch's operators"
    return Finding(f'{way}; at most {worst:.2f} of the error allowed')


def make_layer(kind: str, channels: int, device: torch.device, seed: int = 0) -> UnifiedNorm:
    """A layer whose every parameter and running statistic counts."""
    generator = torch.Generator().manual_seed(seed)
    layer = KINDS[kind](channels)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.normal_(generator=generator)
        layer.running_var.uniform_(0.5, 2, generator=generator)
    return layer.to(device)


def draw(shape: tuple[int, ...], dtype: torch.dtype, memory_format: str, device: torch.device, seed: int = 0) -> Input:
    """Samples that are alike, so that the gate opens, with channels that are farther from 0 than they deviate."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    channels = shape[1]
    x = random(*shape) + random(1, *shape[1:]) + 3 * random(1, channels, 1, 1)
    format = MEMORY_FORMATS[memory_format]
    return Input(*(tensor.to(dtype).contiguous(memory_format=format) for tensor in (x, random(*shape))))


def step(layer: UnifiedNorm, data: Input, backend: str | None = None) -> dict[str, Tensor]:
    """Forward and backward: y, dx, the gradients of the parameters, and the buffers, by name."""
    layer.zero_grad(set_to_none=True)
    x = data.x.detach().requires_grad_()
    with by_backend(x.device, backend):
        y = layer(x)
        y.backward(data.dy)
    assert x.grad is not None
    return {'y': y.detach(), 'dx': x.grad} | state_of(layer)


def state_of(layer: UnifiedNorm) -> dict[str, Tensor]:
    """The gradients of the parameters and copies of the buffers."""
    gradients = {f'd_{name}': p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> float:
    """How far the worst value is off, as a part of what is allowed.

    Raises:
        AssertionError: It is farther off, or something is missing.
    """
    if found.keys() != expected.keys():
        raise AssertionError(f'there are {sorted(found)}, expected {sorted(expected)}')
    worst = 0.0
    one_pixel = math.prod(found['y'].shape[2:]) == 1
    bias_size = expected['d_bias'].abs().max()
    for name, value in found.items():
        if name == 'd_center_weight' and one_pixel:
            continue  # all of it cancels
        value, wanted = value.double(), expected[name].double()
        allowed = ROUNDING * wanted.abs().max()
        if name.startswith('d_'):
            allowed = ROUNDING_OF_SUMS * torch.maximum(wanted.abs().max(), bias_size)
        if name in ('y', 'dx'):
            # Triton's interpreter, on the CPU, truncates: a whole unit.
            units = 1.001 if value.is_cuda else 2.001
            allowed = allowed + units * STORAGE[dtype] * wanted.abs()
        allowed = allowed + 1e-30
        part = float(((value - wanted).abs() / allowed).nan_to_num(math.inf).max())
        if part > 1:
            raise AssertionError(f'{name} is off by {part:.3g} times what {dtype} allows')
        worst = max(worst, part)
    return worst
