"""What the benchmark times: the steps of training and the evaluation of one contender at one setting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmubn.analysis.benchmark.contenders import Contender, resnet50

__all__ = ['DTYPES', 'MEMORY_FORMATS', 'LayerTrial', 'NetworkTrial', 'Setting', 'Trial']

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
MEMORY_FORMATS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}


class Setting(NamedTuple):
    """The shape, dtype and memory format of an input."""

    shape: tuple[int, int, int, int]
    dtype: str
    memory_format: str

    def __str__(self) -> str:
        return f'{"x".join(map(str, self.shape))} {self.dtype} {self.memory_format}'

    def random(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        x = torch.randn(self.shape, device=device, dtype=dtype)
        return x.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])


class Trial:
    """One contender at one setting. The timed steps are the methods that ``training`` names, and ``evaluation``."""

    training: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module, setting: Setting, x: Tensor, target: Tensor) -> None:
        self.model = model.to(device=x.device, memory_format=MEMORY_FORMATS[setting.memory_format])
        self.dtype = DTYPES[setting.dtype]
        self.x, self.target = x, target
        self.output: Tensor | None = None

    def mixed_precision(self) -> contextlib.AbstractContextManager[None]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # No cache: every weight is used once, and a CUDA graph must not read a copy that was made outside of it.
        return torch.autocast(self.x.device.type, self.dtype, cache_enabled=False)

    def evaluation(self) -> None:
        with torch.no_grad(), self.mixed_precision():
            self.model(self.x)

    def train(self) -> list[Callable[[], None]]:
        """Set the mode; return the steps of training, to be called one after the other in this order."""
        self.model.train()
        return [getattr(self, name) for name in self.training]

    def evaluate(self) -> list[Callable[[], None]]:
        """Set the mode; return the single step of evaluation."""
        self.model.eval()
        return [self.evaluation]

    def capture(self) -> None:
        """Replace all steps by replays of CUDA graphs, which cost no time on the host."""
        for mode in (self.train, self.evaluate):
            steps = mode()
            for step, graph in zip(steps, captured(steps), strict=True):
                setattr(self, step.__name__, graph.replay)


class LayerTrial(Trial):
    """One layer."""

    training = ('forward', 'backward')

    @staticmethod
    def inputs(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw an input, and a gradient of the output."""
        dtype = DTYPES[setting.dtype]
        return setting.random(device, dtype).requires_grad_(), setting.random(device, dtype)

    def __init__(self, contender: Contender, setting: Setting, x: Tensor, target: Tensor) -> None:
        super().__init__(contender.make(x.shape[1]), setting, x, target)
        self.wanted = [x, *self.model.parameters()]

    def forward(self) -> None:
        with self.mixed_precision():
            self.output = self.model(self.x)

    def backward(self) -> None:
        assert self.output is not None, 'backward follows forward'
        torch.autograd.grad(self.output, self.wanted, self.target.to(self.output.dtype))
        self.output = None


class NetworkTrial(Trial):
    """A ResNet-50 with the contender as each of its norms."""

    training = ('forward', 'backward', 'update')

    @staticmethod
    def inputs(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw images and labels."""
        return setting.random(device, torch.float32), torch.randint(1000, setting.shape[:1], device=device)

    def __init__(self, contender: Contender, setting: Setting, x: Tensor, target: Tensor) -> None:
        super().__init__(resnet50(contender.make), setting, x, target)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def forward(self) -> None:
        with self.mixed_precision():
            self.output = F.cross_entropy(self.model(self.x), self.target)

    def backward(self) -> None:
        assert self.output is not None, 'backward follows forward'
        self.output.backward()
        self.output = None

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def captured(steps: list[Callable[[], None]]) -> list[torch.cuda.CUDAGraph]:
    """Capture one CUDA graph per step. They share their memory: a step finds what the one before it has left."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what runs once only, such as the choice of an algorithm, must not be captured
        for _ in range(3):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    graphs = []
    for step in steps:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool):
            step()
    return graphs
