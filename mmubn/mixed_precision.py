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

__all__ = ['CPUAmpOptimWrapper', 'use_mixed_precision']


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
        run_mmcv_operators_in_float32()

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield


def run_mmcv_operators_in_float32() -> None:
    """Let mmcv's CPU operators take bfloat16, which the parts of a network before them give under autocast.

    mmcv's NMS and RoIAlign have CPU kernels for float32 and float64 alone and raise on anything else (seen with
    onedl-mmcv 2.3.6). Their inputs are widened here and a floating output gets the dtype that came in; calls in float32
    are left as they are.
    """
    from mmcv.ops.nms import NMSop, SoftNMSop
    from mmcv.ops.roi_align import RoIAlignFunction

    for function in (NMSop, SoftNMSop, RoIAlignFunction):
        if not getattr(function, '_mmubn_widens', False):
            function.forward = staticmethod(_widening(function.forward))
            function.backward = staticmethod(_widening(function.backward))
            function._mmubn_widens = True


def _widening(call: Callable) -> Callable:
    @wraps(call)
    def widened(ctx, *arguments):
        narrow = [isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in arguments]
        output = call(ctx, *(a.float() if n else a for a, n in zip(arguments, narrow, strict=True)))
        if any(narrow) and isinstance(output, torch.Tensor) and output.is_floating_point():
            output = output.to(torch.bfloat16)
        return output

    return widened
