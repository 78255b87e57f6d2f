"""What evaluation costs after training: a ResNet-50 as trained, folded, and exported to ONNX Runtime.

ONNX Runtime needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmubn.analysis.benchmark.contenders import CONTENDERS, resnet50
from mmubn.analysis.benchmark.measurement import Quartiles, quartiles, without_garbage_collection
from mmubn.deploy import fold

__all__ = ['Deployed', 'count_map_nodes', 'deployed', 'fuse', 'measure_deployed', 'trained_resnet50']

BASELINE = 'bn, fused'


class Deployed(NamedTuple):
    """One network in one runtime at one shape.

    Attributes:
        ratio: To BatchNorm fused into its convolutions, in the same runtime and round.
        map_nodes: Operators of the ONNX graph that read or write a map; None of a network that is not exported.
    """

    shape: tuple[int, int, int, int]
    runtime: str
    network: str
    milliseconds: Quartiles
    ratio: Quartiles
    map_nodes: int | None


@torch.no_grad()
def trained_resnet50(norm: str) -> nn.Sequential:
    """A ResNet-50 in evaluation mode whose norms have random parameters, none 0, and statistics of random images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = resnet50(CONTENDERS[norm].make)
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        for layer in norms:
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            layer.momentum = None  # the plain mean of what comes
        net(torch.randn(4, 3, 64, 64))
    return net.eval().requires_grad_(False)


def fuse(net: nn.Module) -> nn.Module:
    """A copy of a ResNet-50 of :mod:`~mmubn.analysis.benchmark.contenders` whose BatchNorms are in its convolutions."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.Sequential):
            for index in range(1, len(module)):
                if type(module[index]) is nn.BatchNorm2d:  # follows its convolution in every Sequential
                    module[index - 1] = fuse_conv_bn_eval(module[index - 1], module[index])
                    module[index] = nn.Identity()
    return net


def deployed(norms: list[str]) -> dict[str, nn.Module]:
    """The networks that are compared: BatchNorm fused, and each of ``norms`` as trained and folded."""
    nets = {BASELINE: fuse(trained_resnet50('bn'))}
    for norm in norms:
        net = trained_resnet50(norm)
        nets |= {f'{norm}, as trained': net, f'{norm}, folded': fold(net)}
    return nets


def to_onnx(net: nn.Module, path: Path) -> Path:
    """Export a network whose batch, height and width may change."""
    sizes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        net,
        (torch.randn(2, 3, 64, 64),),
        path,
        input_names=['image'],
        dynamic_shapes=sizes,
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    return path


def count_map_nodes(path: Path) -> int:
    """Count the operators of an ONNX graph that read or write a map: a tensor (N, C, H, W) with more than one pixel."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    maps = set()
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4 and any(dim.dim_value != 1 for dim in dims[2:]):
            maps.add(value.name)
    maps -= {tensor.name for tensor in graph.initializer}
    return sum(1 for node in graph.node if maps & {*node.input, *node.output})


def session_of(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


@torch.no_grad()
def measure_deployed(
    norms: list[str],
    shapes: list[tuple[int, int, int, int]],
    repeats: int,
    warmup: int,
    advance: Callable[[str], None],
) -> list[Deployed]:
    """Time all networks in both runtimes, in turns, with as many threads as torch has.

    With one thread the clock is that of the process, which other work on the machine disturbs less.

    Args:
        norms: Names in :data:`~mmubn.analysis.benchmark.contenders.CONTENDERS`.
        shapes: Of the images, (N, 3, H, W).
        repeats: Rounds that count.
        warmup: Rounds before them.
        advance: Called with a label after every round.
    """
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    nets = deployed(norms)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: to_onnx(net, Path(folder) / f'{index}.onnx') for index, (name, net) in enumerate(nets.items())}
        nodes = {name: count_map_nodes(path) for name, path in paths.items()}
        sessions = {name: session_of(path, threads) for name, path in paths.items()}
    results = []
    for shape in shapes:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        runs = {('torch', name): _of_torch(net, images) for name, net in nets.items()}
        runs |= {('onnxruntime', name): _of_session(session, images) for name, session in sessions.items()}
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        order = random.Random(0)
        with without_garbage_collection():
            for index in range(warmup + repeats):
                for key in order.sample(list(runs), len(runs)):
                    start = clock()
                    runs[key]()
                    if index >= warmup:
                        times[key].append(1e3 * (clock() - start))
                advance('x'.join(map(str, shape)))
        for (runtime, name), values in times.items():
            base = times[runtime, BASELINE]
            ratio = quartiles([value / other for value, other in zip(values, base, strict=True)])
            count = nodes[name] if runtime == 'onnxruntime' else None
            results.append(Deployed(shape, runtime, name, quartiles(values), ratio, count))
    return results


def _of_torch(net: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: net(images)


def _of_session(session: Any, images: Tensor) -> Callable[[], object]:
    return lambda: session.run(None, {'image': images.numpy()})
