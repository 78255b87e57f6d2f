"""``--amp`` with and without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from mmubn.openmmlab import patches

__all__ = ['CPUAmpOptimWrapper', 'use_mixed_precision', 'widen_bfloat16']


def use_mixed_precision(cfg: Config) -> None:
    """Make ``cfg`` train in mixed precision: in float16 on a GPU, by :class:`CPUAmpOptimWrapper` without one."""
    if get_device() == 'cpu':
        cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
    else:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on the CPU, where MMEngine's AmpOptimWrapper refuses to run.

    bfloat16 has the range of float32, so there is no loss scaling.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        patches.apply(patches.ON_CPU_AMP)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield


def widen_bfloat16(original: staticmethod) -> staticmethod:
    """Let forward or backward of an autograd function take bfloat16, which parts of a network give under autocast.

    The inputs are widened to float32, and a floating output gets the dtype that came in. Calls without bfloat16 are
    left as they are.
    """
    call: Callable = original.__func__

    @wraps(call)
    def widened(ctx, *arguments):
        narrow = [isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in arguments]
        output = call(ctx, *(a.float() if n else a for a, n in zip(arguments, narrow, strict=True)))
        if any(narrow) and isinstance(output, torch.Tensor) and output.is_floating_point():
            output = output.to(torch.bfloat16)
        return output

    return staticmethod(widened)
