"""What the layers cost beside cuDNN's BatchNorm, in time and memory. Every figure that has a bar is printed beside it.

Medians of rounds in which all contenders take their turn, by :mod:`mmubn.analysis.benchmark`.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmubn.analysis.benchmark import (
    CONTENDERS,
    DTYPES,
    Clock,
    LayerTrial,
    NetworkTrial,
    Plan,
    Result,
    Setting,
    copy_bandwidth,
    measure,
    resnet50,
)
from mmubn.analysis.benchmark.report import mean_table, number, setting_table, table
from mmubn.analysis.gpu_check.detector import IMAGES, train_detector
from mmubn.analysis.gpu_check.device import is_gpu, need_gpu, need_kernels, synchronize
from mmubn.analysis.gpu_check.layers import Input, step
from mmubn.analysis.gpu_check.outcome import Bar, Check, Finding, Skip
from mmubn.layers import UBN

__all__ = ['checks', 'compilation']

# Times those of BatchNorm; microseconds for the host.
LAYER_BAR, IMAGENET_BAR, DETECTION_BAR, MEMORY_BAR, HOST_BAR = 1.5, 1.15, 1.10, 1.03, 150

# The norms of a ResNet-50: of its stem, and the last one of each stage.
SHAPES = [(64, 64, 112, 112), (64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)]
SMALL_SHAPES = [(2, 4, 6, 6), (2, 8, 3, 3)]
LAYOUTS = ('nchw', 'channels_last')
IMAGENET = Setting((64, 3, 224, 224), 'bf16', 'channels_last')
DETECTION = [Setting((2, 3, 800, 1344), dtype, 'nchw') for dtype in ('fp32', 'bf16')]
DETECTOR = Setting(IMAGES, 'fp16', 'nchw')
PROFILED = [
    *(Setting(shape, 'bf16', layout) for shape in SHAPES[1:] for layout in LAYOUTS),
    *(Setting((2, 256, 200, 336), dtype, 'nchw') for dtype in ('fp32', 'bf16')),
]
TINY = (2, 64, 4, 4)  # nothing to compute
# Passes over data of the size of x: of each kernel, and of BatchNorm's forward and backward together.
PASSES, PASSES_OF_BATCH_NORM = {'moments': 1, 'apply': 2, 'tap_sums': 2, 'input_gradient': 3}, 8


class NormEvalTrial(NetworkTrial):
    """A training step whose norms are in evaluation mode, as norm_eval=True of a detector's backbone."""

    def train(self) -> list[Callable[[], None]]:
        steps = super().train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return steps


def checks(device: torch.device) -> list[Check]:
    """The checks of this stage, the most important first."""
    on_gpu = is_gpu(device)
    small = Setting((2, 3, 32, 32), 'fp32', 'nchw')
    functions: dict[str, Callable] = {
        'a layer beside BatchNorm': functools.partial(layers_beside_batch_norm, False),
        'a ResNet-50 at ImageNet': functools.partial(
            network, IMAGENET if on_gpu else small, NetworkTrial, IMAGENET_BAR
        ),
    }
    for setting in DETECTION if on_gpu else [small]:
        for words, trial in (('training', NetworkTrial), ('norm_eval', NormEvalTrial)):
            name = f'a ResNet-50 in a detector, {setting.dtype}, {words}'
            functions[name] = functools.partial(network, setting, trial, DETECTION_BAR)
    functions |= {
        'host time of a step': host_time,
        'the kernels': kernel_table,
        'a layer beside BatchNorm, as CUDA graphs': functools.partial(layers_beside_batch_norm, True),
        'Faster R-CNN of torchvision, ten steps in mixed precision': train_detector,
    }
    return [Check(name, functools.partial(function, device)) for name, function in functions.items()]


def on_gpus(device: torch.device, *bars: Bar) -> tuple[Bar, ...]:
    """The bars where they are meant for the device."""
    return bars if is_gpu(device) else ()


# --- compilation ------------------------------------------------------------------------------------------------------


def compilation(device: torch.device) -> list[Check]:
    """Triton compiles, in many processes, what is timed afterwards in one, which then finds it in Triton's cache."""
    need_gpu(device, 'compilation')
    need_kernels(device)
    settings = [Setting(*form) for form in itertools.product(SHAPES, ('fp32', 'bf16'), LAYOUTS)]
    for whole in (IMAGENET, *DETECTION, DETECTOR):
        settings += [Setting(shape, whole.dtype, whole.memory_format) for shape in norm_inputs(whole.shape)]
    settings += [*PROFILED, Setting(TINY, 'fp32', 'nchw')]
    return [
        Check(str(setting), functools.partial(compile_layer, setting, device)) for setting in dict.fromkeys(settings)
    ]


def compile_layer(setting: Setting, device: torch.device) -> None:
    """A step in training and one in evaluation mode."""
    data = Input(*(setting.random(device, DTYPES[setting.dtype]) for _ in range(2)))
    layer = UBN(setting.shape[1], threshold=-1).to(device)
    for training in (True, False):
        step(layer.train(training), data)


def norm_inputs(images: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """The shapes of the inputs of the norms of a ResNet-50."""
    found = {}

    def record(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        found[tuple(inputs[0].shape)] = None

    with torch.device('meta'):
        net = resnet50(nn.BatchNorm2d)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(record)
        net(torch.empty(images))
    return [*found]


# --- beside BatchNorm -------------------------------------------------------------------------------------------------


def layers_beside_batch_norm(cuda_graphs: bool, device: torch.device) -> Finding:
    """Training of one layer, over the shapes of a ResNet-50, in float32 and bfloat16 and both layouts."""
    on_gpu = is_gpu(device)
    if cuda_graphs:
        need_gpu(device, 'a CUDA graph')
    forms = itertools.product(SHAPES if on_gpu else SMALL_SHAPES, ('fp32', 'bf16'), LAYOUTS)
    results, plan = timed(LayerTrial, [Setting(*form) for form in forms], device, cuda_graphs)
    ratios = [result.ratio.median for result in results if (result.contender, result.measure) == ('ubn', 'training')]
    mean = geometric_mean(ratios)
    way = 'replayed as CUDA graphs' if cuda_graphs else 'called'
    return Finding(
        note=f'{mean:.3g} times BatchNorm, {min(ratios):.3g} to {max(ratios):.3g}',
        bars=on_gpus(device, Bar(f'training of a layer, {way} (times BatchNorm)', mean, LAYER_BAR)),
        table=tables(f'One layer, {way}', results, plan, device),
    )


def network(setting: Setting, trial: type[NetworkTrial], bar: float, device: torch.device) -> Finding:
    """A training step of a ResNet-50, and the most memory that it takes."""
    results, plan = timed(trial, [setting], device)
    what = f'a ResNet-50, {setting}{", norm_eval" if trial is NormEvalTrial else ""}'
    of_ubn = {result.measure: result for result in results if result.contender == 'ubn'}
    step_time = of_ubn['training']
    bars = [Bar(f'step of {what} (times BatchNorm)', step_time.ratio.median, bar)]
    if 'peak' in of_ubn:
        bars.append(Bar(f'peak memory of {what} (times BatchNorm)', of_ubn['peak'].ratio.median, MEMORY_BAR))
    return Finding(
        note=f'{step_time.value.median:.3g} ms, {step_time.ratio.median:.3g} times BatchNorm',
        bars=on_gpus(device, *bars),
        table=tables(f'R{what[3:]}', results, plan, device),
    )


def timed(
    trial: type[LayerTrial] | type[NetworkTrial],
    settings: list[Setting],
    device: torch.device,
    cuda_graphs: bool = False,
) -> tuple[list[Result], Plan]:
    """Measure BatchNorm and UBN by the benchmark."""
    on_gpu = is_gpu(device)
    plan = Plan(
        mode='layer' if trial is LayerTrial else 'network',
        trial=trial,
        settings=settings,
        contenders=['bn', 'ubn'],
        baseline='bn',
        device=device,
        repeats=15 if on_gpu else 3,
        warmup=3 if on_gpu else 1,
        cuda_graphs=cuda_graphs,
    )
    return measure(plan, Clock(device), lambda label: None), plan


def tables(title: str, results: list[Result], plan: Plan, device: torch.device) -> str:
    """All measures, as Markdown."""
    lines = [f'### {title}', '', f'{plan.repeats} rounds: medians, [first, third quartile].', '']
    if len(plan.settings) > 1:
        lines += ['Geometric means:', '', *mean_table(results, plan)]
    copy = copy_bandwidth(Clock(device))
    for setting in plan.settings:
        lines += [f'{setting}:', '', *setting_table([r for r in results if r.setting == setting], plan, copy)]
    return '\n'.join(lines)


# --- the host ---------------------------------------------------------------------------------------------------------


def host_time(device: torch.device) -> Finding:
    """What forward and backward of a layer cost the host, by its own clock, on a map with nothing to compute."""
    rounds, steps = (20, 50) if is_gpu(device) else (3, 3)
    layers = {'bn': nn.BatchNorm2d(TINY[1]), 'ubn': UBN(TINY[1]), 'ubn, evaluation': UBN(TINY[1]).eval()}
    x = torch.randn(TINY, device=device, requires_grad=True)
    dy = torch.randn(TINY, device=device)
    microseconds: dict[str, list[float]] = {name: [] for name in layers}
    for index in range(rounds + 1):
        for name, layer in layers.items():
            layer.to(device)
            synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                layer(x).backward(dy)
            if index:  # the first round is to warm up
                microseconds[name].append(1e6 * (time.perf_counter() - start) / steps)
    found = {name: median(values) for name, values in microseconds.items()}
    rows = [[name, number(value), f'{value / found["bn"]:.3g}'] for name, value in found.items()]
    title = f'### Host time of a step, {"x".join(map(str, TINY))}, us'
    return Finding(
        note=', '.join(f'{name} {value:.0f} us' for name, value in found.items()),
        bars=on_gpus(device, Bar('host time of a training step of a layer (us)', found['ubn'], HOST_BAR)),
        table='\n'.join([title, '', *table(['contender', 'step (us)', 'step / bn'], rows)]),
    )


# --- the kernels ------------------------------------------------------------------------------------------------------


class KernelTime(NamedTuple):
    """A kernel, in one step."""

    name: str
    microseconds: float
    launches: float


def kernel_table(device: torch.device) -> Finding:
    """Time and bandwidth of each kernel of a training step beside those of cuDNN's BatchNorm and of a copy."""
    on_gpu = is_gpu(device)
    copy = copy_bandwidth(Clock(device))
    lines = [f'### Kernels of a training step; a large copy: {number(copy)} GB/s, read and written', '']
    totals = []
    for setting in PROFILED if on_gpu else [Setting(SMALL_SHAPES[0], 'fp32', 'nchw')]:
        rows = []
        total = {}
        for name in ('bn', 'ubn'):
            x, dy = LayerTrial.inputs(setting, device)
            steps = LayerTrial(CONTENDERS[name], setting, x, dy).train()
            kernels = profiled(steps, device)
            total[name] = sum(kernel.microseconds for kernel in kernels)
            if total[name] == 0:
                raise Skip("torch's profiler sees no kernels here")
            rows += rows_of(name, kernels, x.nbytes, copy)
        totals.append(total['ubn'] / total['bn'])
        header = ['kernel', 'us', 'launches', 'passes', 'GB/s', 'of the copy (%)']
        lines += [f'{setting}:', '', *table(header, rows)]
    mean = geometric_mean(totals)
    note = f"together {mean:.3g} times BatchNorm's, {min(totals):.3g} to {max(totals):.3g}"
    return Finding(note, table='\n'.join(lines))


def profiled(steps: list[Callable[[], None]], device: torch.device, repeats: int = 10) -> list[KernelTime]:
    """The kernels of the steps by torch's profiler, the longest first; on the CPU, the operators."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = is_gpu(device)

    def run(times: int) -> None:
        for _ in range(times):
            for part in steps:
                part()
        synchronize(device)

    run(3)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run(repeats)
    found = [
        KernelTime(event.key, own_time(event, on_gpu) / repeats, event.count / repeats)
        for event in profiler.key_averages()
    ]
    return sorted((kernel for kernel in found if kernel.microseconds > 0), key=lambda kernel: -kernel.microseconds)


def own_time(event: Any, on_gpu: bool) -> float:
    """Microseconds on the device alone."""
    return event.self_device_time_total if on_gpu else event.self_cpu_time_total


def rows_of(contender: str, kernels: list[KernelTime], bytes_of_x: int, copy: float) -> list[list[str]]:
    """A row for all kernels of a contender together, and one for each of the longest."""
    together = KernelTime(f'{contender}, all', *(sum(each[i] for each in kernels) for i in (1, 2)))
    rows = []
    for kernel in (together, *kernels[:9]):
        passes = PASSES_OF_BATCH_NORM if kernel is together else passes_of(kernel.name)
        cells = ['-', '-', '-']
        if passes is not None:
            bandwidth = passes * bytes_of_x / kernel.microseconds / 1e3
            cells = [str(passes), number(bandwidth), number(100 * bandwidth / copy)]
        name = ' '.join(kernel.name.replace('|', '/').split())[:70]
        rows.append([name, f'{kernel.microseconds:.1f}', f'{kernel.launches:g}', *cells])
    return rows


def passes_of(name: str) -> int | None:
    """How many tensors of the size of x a kernel of ours reads and writes: ``_moments_kernel`` has one pass."""
    return PASSES.get(name.strip('_').removesuffix('_kernel'))
