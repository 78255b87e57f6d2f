"""What becomes of the running statistics, written into the buffers of a layer by one launch."""

# In Triton, names in capitals are compile-time constants, and types are found by its compiler.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

from torch import Tensor

from mmubn.ops.triton import runtime, tiling
from mmubn.ops.triton.device import jit, load_parameter, tl

__all__ = ['copy_statistics']


@jit(
    do_not_specialize_on_alignment=['mean', 'var', 'tau', 'condensed', 'mean_out', 'var_out', 'tau_out', 'count'],
)
def _copy_statistics_kernel(
    mean, var, tau, condensed, mean_out, var_out, tau_out, count, channels, BLOCK: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = channel < channels
    tl.store(mean_out + channel, load_parameter(mean, channel, channels), mask=live)
    tl.store(var_out + channel, load_parameter(var, channel, channels), mask=live)
    is_first = tl.program_id(0) == 0
    if tau is not None:
        tl.store(tau_out, tl.load(tau), mask=is_first)
    if count is not None:
        tl.store(count, tl.load(count) + (tl.load(condensed) != 0).to(tl.int64), mask=is_first)


def copy_statistics(
    mean: Tensor,
    var: Tensor,
    mean_out: Tensor,
    var_out: Tensor,
    tau: Tensor | None = None,
    tau_out: Tensor | None = None,
    condensed: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """Write mean, var and tau into their outs, and add ``condensed`` to ``count``.

    Args:
        mean, var, mean_out, var_out: (C,), float32.
        tau, tau_out: 0-d, float32, both or none.
        condensed, count: 0-d, bool and int64, both or none.
    """
    channels = len(mean)
    block = 1024
    runtime.launch(
        _copy_statistics_kernel, tiling.ceil_div(channels, block), mean.device,
        mean, var, tau, condensed, mean_out, var_out, tau_out, count, channels, BLOCK=block,
    )  # fmt: skip
