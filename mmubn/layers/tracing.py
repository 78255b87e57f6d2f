"""Layers as nodes of a graph of torch.fx: leaves of any tracer, as the modules of torch.nn are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ['node_in_trace']


def node_in_trace(layer: nn.Module, x: Any) -> Any:
    """The output of a layer as one node of the graph that torch.fx traces, which follows the mode of the layer.

    Args:
        layer: Called in the trace.
        x: Its input.

    Returns:
        A ``torch.fx.Proxy``. None where no trace is at work, and for the traced module itself, which can be no node of
        its own graph.
    """
    if not isinstance(x, torch.fx.Proxy) or not isinstance(x.tracer, torch.fx.Tracer):
        return None
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy('call_module', path, (x,), {}) if path else None
