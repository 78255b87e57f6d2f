"""How the benchmark measures: contenders in turns, ratios within a round, medians and quartiles of all rounds."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmubn import ops
from mmubn.analysis.benchmark.contenders import CONTENDERS
from mmubn.analysis.benchmark.plan import Plan
from mmubn.analysis.benchmark.trials import LayerTrial, NetworkTrial, Setting, Trial
from mmubn.layers.unified_norm import UnifiedNorm

__all__ = ['Clock', 'Quartiles', 'Result', 'compare', 'copy_bandwidth', 'measure', 'quartiles', 'saved_bytes']

# What BatchNorm moves in a training step: forward reads x twice and writes y, backward reads x and dy twice, writes dx.
COUNTED_PASSES = 8
LARGE = 2**28  # bytes that no cache holds

Samples = dict[str, dict[str, list[float]]]  # per contender and measure, the values of all rounds; memory has one


class Clock:
    """Times steps on a device: by the host's clock on the CPU, by CUDA events on a GPU.

    Args:
        device: Where the steps run.
        cold: Overwrite the caches before every timing.
    """

    def __init__(self, device: torch.device, cold: bool = False) -> None:
        self.device = device
        self.cold = torch.empty(LARGE, dtype=torch.uint8, device=device) if cold else None

    def times(self, steps: list[Callable[[], object]]) -> list[float]:
        """Run the steps one after the other, without a wait between them; return the milliseconds of each."""
        if self.cold is not None:
            self.cold.zero_()
        if self.device.type == 'cpu':
            marks = [time.perf_counter()]
            for step in steps:
                step()
                marks.append(time.perf_counter())
            return [1e3 * (end - start) for start, end in itertools.pairwise(marks)]
        events = [_recorded_event()]
        for step in steps:
            step()
            events.append(_recorded_event())
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def copy_bandwidth(clock: Clock) -> float:
    """Measure a copy too large for any cache: GB/s, read and written."""
    # Neither zeros, which can be quicker than data, nor pages that were never written.
    source = torch.arange(LARGE // 4, dtype=torch.int32, device=clock.device)
    target = torch.ones_like(source)
    copies: list[Callable[[], object]] = [lambda: target.copy_(source)] * 8
    return 2 * source.nbytes / median(clock.times(copies)[2:]) / 1e6


def saved_bytes(model: nn.Module, forward: Callable[[], object], data: Iterable[Tensor] = ()) -> int:
    """Count the bytes that a training forward of the model keeps for the backward, besides its state and ``data``.

    Memory that tensors share counts once; parameters and buffers do not count.

    Unlike the peak of a process's memory on the CPU, this is exact and the same in every run.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *data)}
    saved = {}  # holds the memory, whose address could otherwise be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


def peak_bytes(trial: Trial) -> int:
    """Measure the most GPU memory in use during a training step, with inputs, parameters and optimizer's state."""
    steps = trial.train()
    for step in steps:
        step()  # the first step allocates the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for step in steps:
        step()
    return torch.cuda.max_memory_allocated()


def backend_name(trial: Trial) -> str:
    """Name the backend that computes the contender's layers of this package; '-' where it has none."""
    for module in trial.model.modules():
        if isinstance(module, UnifiedNorm):
            return ops.choose_backend(trial.x.to(trial.dtype), module.kernel_size).name
    return '-'


class Quartiles(NamedTuple):
    """First quartile, median and third quartile."""

    low: float
    median: float
    high: float


def quartiles(values: list[float]) -> Quartiles:
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return Quartiles(*torch.tensor(values, dtype=torch.float64).quantile(at).tolist())


class Result(NamedTuple):
    """One measure of one contender at one setting.

    Attributes:
        value: In the unit of the measure.
        ratio: To the baseline.
    """

    setting: Setting
    contender: str
    backend: str
    measure: str
    value: Quartiles
    ratio: Quartiles


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turn off Python's collector, which would pause whichever contender happens to run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(plan: Plan, clock: Clock, advance: Callable[[str], None]) -> list[Result]:
    """Measure what a plan asks for. Call ``advance`` with a label after every round."""
    results = []
    for setting in plan.settings:
        results += compare(setting, *measure_setting(setting, plan, clock, advance), plan.baseline)
    return results


def measure_setting(
    setting: Setting, plan: Plan, clock: Clock, advance: Callable[[str], None]
) -> tuple[dict[str, str], Samples]:
    """Measure all contenders at one setting, in turns.

    Returns:
        The backend of each contender, and the samples.
    """
    torch.manual_seed(0)
    inputs = plan.trial.inputs(setting, plan.device)
    backends: dict[str, str] = {}
    trials: dict[str, LayerTrial | NetworkTrial] = {}
    samples: Samples = {name: {} for name in plan.contenders}
    # Memory first, with one contender on the device at a time.
    for name in plan.contenders:
        with CONTENDERS[name].forced():
            trial = plan.trial(CONTENDERS[name], setting, *inputs)
            backends[name] = backend_name(trial)
            samples[name]['saved'] = [saved_bytes(trial.model, trial.train()[0]) / 2**20]
            if plan.device.type == 'cuda':
                samples[name]['peak'] = [peak_bytes(trial) / 2**20]
        del trial
    for name in plan.contenders:
        with CONTENDERS[name].forced():
            trials[name] = plan.trial(CONTENDERS[name], setting, *inputs)
            if plan.cuda_graphs:
                trials[name].capture()

    order = random.Random(0)
    with without_garbage_collection():
        for index in range(plan.warmup + plan.repeats):
            for name in order.sample(plan.contenders, len(plan.contenders)):
                with CONTENDERS[name].forced():
                    training = clock.times([*trials[name].train()])
                    (evaluation,) = clock.times([*trials[name].evaluate()])
                if index >= plan.warmup:
                    steps = zip(plan.trial.training, training, strict=True)
                    for measure, value in (*steps, ('training', sum(training)), ('evaluation', evaluation)):
                        samples[name].setdefault(measure, []).append(value)
            advance(str(setting))
    if plan.trial is LayerTrial:
        moved = COUNTED_PASSES * inputs[0].nbytes
        for measures in samples.values():
            measures['bandwidth'] = [moved / value / 1e6 for value in measures['training']]
    return backends, samples


def compare(setting: Setting, backends: dict[str, str], samples: Samples, baseline: str) -> list[Result]:
    """Compute the quartiles of the samples and of their ratios to the baseline's sample of the same round."""
    return [
        Result(
            setting,
            contender,
            backends[contender],
            measure,
            quartiles(values),
            quartiles([value / base for value, base in zip(values, samples[baseline][measure], strict=True)]),
        )
        for contender, measures in samples.items()
        for measure, values in measures.items()
    ]
