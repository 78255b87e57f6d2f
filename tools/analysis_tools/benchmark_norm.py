"""Time and memory of the norm layers side by side: one layer, a ResNet-50, or a layer as its input grows.

Every contender takes its turn in every round, in an order drawn anew, and a ratio is taken within a round: what slows
the machine down for a while slows all of them. Reported are medians with the first and third quartile. Needs torch
alone; shows a progress bar where tqdm is installed, and draws plots where Matplotlib is.

The contenders:

    bn             nn.BatchNorm2d
    composition    BatchNorm2d(affine=False) followed by a depthwise 3x3 Conv2d: the operators that BNET is made of
    bnet, rbn      mmubn.BNET, mmubn.RBN
    ubn            mmubn.UBN, by the backend that it chooses for the input
    ubn-torch      mmubn.UBN, by torch's operators on any device; only where asked for
    ubn-reference  mmubn.UBN, by the readable reference
    ubn-naive      UBN as one would write it with torch's operators, without this package

Examples:

    python tools/analysis_tools/benchmark_norm.py layer --out work_dirs/benchmark/layer
    python tools/analysis_tools/benchmark_norm.py layer --device cuda --dtype bf16 --memory-format nchw channels_last
    python tools/analysis_tools/benchmark_norm.py network --contenders bn composition ubn
    python tools/analysis_tools/benchmark_norm.py sweep --contenders composition ubn ubn-naive --out work_dirs/benchmark
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import itertools
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from math import ceil, log
from pathlib import Path
from statistics import geometric_mean, linear_regression, median
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmubn
from mmubn import kernels
from mmubn.layers.core import UnifiedNorm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
MEMORY_FORMATS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}
# The norms of a ResNet-50 in a detector, two images of about 400x400 pixels, and one of ImageNet training.
LAYER_SHAPES = [
    (2, 64, 100, 100),
    (2, 256, 100, 100),
    (2, 512, 50, 50),
    (2, 1024, 25, 25),
    (2, 2048, 13, 13),
    (16, 64, 56, 56),
]
# What BatchNorm moves in a training step: forward reads x twice and writes y, backward reads x and dy twice, writes dx.
COUNTED_PASSES = 8
LARGE = 2**28  # bytes that no cache holds


# ---------------------------------------------------------------------------------------------------- contenders


class NaiveUBN(nn.Module):
    """UBN in training as the paper's equations read, one operator after the other, differentiated by autograd.

    Input and output (N, C, H, W). Source: arXiv 2311.15993, Eqs. 3-5.
    """

    def __init__(self, channels: int, threshold: float = 0.15) -> None:
        super().__init__()
        self.threshold = threshold
        self.center_weight = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale_weight = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale_bias = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        nn.init.dirac_(self.conv.weight, groups=channels)
        nn.init.zeros_(self.conv.bias)
        self.register_buffer('running_mean', torch.zeros(channels))
        self.register_buffer('running_var', torch.ones(channels))
        self.register_buffer('running_similarity', torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        use_batch = self.training and self._is_condensed(x.detach())
        x = x + self.center_weight * x.mean((2, 3), keepdim=True)
        x = F.batch_norm(x, self.running_mean, self.running_var, training=use_batch)
        x = x * torch.sigmoid(self.scale_weight * x.mean((2, 3), keepdim=True) + self.scale_bias)
        return self.conv(x)

    @torch.no_grad()
    def _is_condensed(self, x: Tensor) -> bool:
        f = F.normalize(x[:16].flatten(1), dim=1)
        n = len(f)
        if n > 1:
            cosines = f @ f.T
            similarity = (cosines.sum() - cosines.trace()) / (n * (n - 1))
            self.running_similarity.mul_(0.9).add_(0.1 * similarity)
        return bool(self.running_similarity > self.threshold)


def composition(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels, affine=False), nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    )


class Contender(NamedTuple):
    make: Callable[[int], nn.Module]  # from the number of channels
    backend: str | None = None  # that it is forced to

    def forced(self) -> contextlib.AbstractContextManager:
        return kernels.use_backend(self.backend) if self.backend else contextlib.nullcontext()


def open_ubn(make: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    """A UBN with the gate computed and always open, so that no round is spared the batch's statistics."""
    return lambda channels: make(channels, threshold=-1)


CONTENDERS = {
    'bn': Contender(nn.BatchNorm2d),
    'composition': Contender(composition),
    'bnet': Contender(mmubn.BNET),
    'rbn': Contender(mmubn.RBN),
    'ubn': Contender(open_ubn(mmubn.UBN)),
    'ubn-torch': Contender(open_ubn(mmubn.UBN), 'torch'),
    'ubn-reference': Contender(open_ubn(mmubn.UBN), 'reference'),
    'ubn-naive': Contender(open_ubn(NaiveUBN)),
}
DEFAULT_CONTENDERS = [name for name in CONTENDERS if name != 'ubn-torch']


class Bottleneck(nn.Module):
    """A residual block of ResNet-50 whose three norms are ``norm``."""

    def __init__(self, inputs: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            norm(outputs),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet50(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """ResNet-50 (arXiv 1512.03385, stride in the 3x3 convolution) with ``norm`` as each of its 53 norms.

    Input (N, 3, H, W), output (N, 1000).
    """
    layers = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), norm(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1, norm))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


# ----------------------------------------------------------------------------------------------------- what is timed


class Setting(NamedTuple):
    """An input."""

    shape: tuple[int, int, int, int]
    dtype: str
    memory_format: str

    def __str__(self) -> str:
        return f'{"x".join(map(str, self.shape))} {self.dtype} {self.memory_format}'

    def random(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        x = torch.randn(self.shape, device=device, dtype=dtype)
        return x.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])


class Trial:
    """One contender at one setting. The timed steps are the attributes that ``training`` names, and ``evaluation``."""

    training: tuple[str, ...]

    def __init__(self, model: nn.Module, setting: Setting, x: Tensor, target: Tensor) -> None:
        self.model = model.to(x.device, memory_format=MEMORY_FORMATS[setting.memory_format])
        self.dtype = DTYPES[setting.dtype]
        self.x, self.target = x, target
        self.output: Tensor | None = None

    def mixed_precision(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # No cache: every weight is used once, and a CUDA graph must not read a copy that was made outside of it.
        return torch.autocast(self.x.device.type, self.dtype, cache_enabled=False)

    def evaluation(self) -> None:
        with torch.no_grad(), self.mixed_precision():
            self.model(self.x)

    def train(self) -> list[Callable[[], None]]:
        """The steps of training, one after the other, to be called in this order."""
        self.model.train()
        return [getattr(self, name) for name in self.training]

    def evaluate(self) -> list[Callable[[], None]]:
        self.model.eval()
        return [self.evaluation]

    def capture(self) -> None:
        """Let all steps be replays of CUDA graphs, which cost no time on the host."""
        for mode in (self.train, self.evaluate):
            steps = mode()
            for step, graph in zip(steps, captured(steps), strict=True):
                setattr(self, step.__name__, graph.replay)


class LayerTrial(Trial):
    training = ('forward', 'backward')

    @staticmethod
    def inputs(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
        dtype = DTYPES[setting.dtype]
        return setting.random(device, dtype).requires_grad_(), setting.random(device, dtype)

    def __init__(self, contender: Contender, setting: Setting, x: Tensor, target: Tensor) -> None:
        super().__init__(contender.make(x.shape[1]), setting, x, target)
        self.wanted = [x, *self.model.parameters()]

    def forward(self) -> None:
        with self.mixed_precision():
            self.output = self.model(self.x)

    def backward(self) -> None:
        torch.autograd.grad(self.output, self.wanted, self.target.to(self.output.dtype))
        self.output = None


class NetworkTrial(Trial):
    training = ('forward', 'backward', 'update')

    @staticmethod
    def inputs(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
        return setting.random(device, torch.float32), torch.randint(1000, setting.shape[:1], device=device)

    def __init__(self, contender: Contender, setting: Setting, x: Tensor, target: Tensor) -> None:
        super().__init__(resnet50(contender.make), setting, x, target)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def forward(self) -> None:
        with self.mixed_precision():
            self.output = F.cross_entropy(self.model(self.x), self.target)

    def backward(self) -> None:
        self.output.backward()
        self.output = None

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def captured(steps: list[Callable[[], None]]) -> list[torch.cuda.CUDAGraph]:
    """One CUDA graph per step. They share their memory, so that a step finds what the one before it has left."""
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


# --------------------------------------------------------------------------------------------------------- measuring


class Clock:
    """Times steps on a device: by the host's clock on the CPU, by CUDA events on a GPU.

    Args:
        device: Where the steps run.
        cold: Overwrite the caches before every timing.
    """

    def __init__(self, device: torch.device, cold: bool = False) -> None:
        self.device = device
        self.cold = torch.empty(LARGE, dtype=torch.uint8, device=device) if cold else None

    def times(self, steps: list[Callable[[], None]]) -> list[float]:
        """Milliseconds that each step takes, run one after the other without a wait between them."""
        if self.cold is not None:
            self.cold.zero_()
        marks = [self._mark()]
        for step in steps:
            step()
            marks.append(self._mark())
        if self.device.type == 'cpu':
            return [1e3 * (end - start) for start, end in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]

    def _mark(self) -> float | torch.cuda.Event:
        if self.device.type == 'cpu':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def copy_bandwidth(clock: Clock) -> float:
    """GB/s of a copy too large for any cache, read and written."""
    # Neither zeros, which can be quicker than data, nor pages that were never written.
    source = torch.arange(LARGE // 4, dtype=torch.int32, device=clock.device)
    target = torch.ones_like(source)
    copies = [lambda: target.copy_(source)] * 8
    return 2 * source.nbytes / median(clock.times(copies)[2:]) / 1e6


def saved_bytes(trial: Trial) -> int:
    """Bytes that a training forward keeps for the backward, besides parameters and buffers; shared memory counts once.

    Unlike the peak of a process's memory on the CPU, this is exact and the same in every run.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*trial.model.parameters(), *trial.model.buffers())}
    saved = {}  # holds the memory, whose address could otherwise be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trial.train()[0]()
    trial.output = None
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


def peak_bytes(trial: Trial) -> int:
    """Most GPU memory in use at any moment of a training step: inputs, parameters and optimizer's state included."""
    steps = trial.train()
    for step in steps:
        step()  # the first step allocates the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for step in steps:
        step()
    return torch.cuda.max_memory_allocated()


def backend_name(trial: Trial) -> str:
    """The backend that the contender's layers of this package compute by; '-' where it has none."""
    for module in trial.model.modules():
        if isinstance(module, UnifiedNorm):
            return kernels.choose_backend(trial.x.to(trial.dtype), module.kernel_size).name
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
    """One measure of one contender at one setting."""

    setting: Setting
    contender: str
    backend: str
    measure: str
    value: Quartiles  # in the unit of the measure
    ratio: Quartiles  # to the baseline


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Python's collector would pause whichever contender happens to run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_setting(
    setting: Setting, args: argparse.Namespace, clock: Clock, advance: Callable[[str], None]
) -> tuple[dict[str, str], dict[str, dict[str, list[float]]]]:
    """Measure all contenders at one setting, in turns.

    Returns:
        Their backends and, per contender and measure, the values of all rounds; a memory measure has one.
    """
    torch.manual_seed(0)
    inputs = args.make.inputs(setting, args.device)
    backends, trials, samples = {}, {}, {name: {} for name in args.contenders}
    # Memory first, with one contender on the device at a time.
    for name in args.contenders:
        with CONTENDERS[name].forced():
            trial = args.make(CONTENDERS[name], setting, *inputs)
            backends[name] = backend_name(trial)
            samples[name]['saved'] = [saved_bytes(trial) / 2**20]
            if args.device.type == 'cuda':
                samples[name]['peak'] = [peak_bytes(trial) / 2**20]
        del trial
    for name in args.contenders:
        with CONTENDERS[name].forced():
            trials[name] = args.make(CONTENDERS[name], setting, *inputs)
            if args.cuda_graphs:
                trials[name].capture()

    order = random.Random(0)
    with without_garbage_collection():
        for index in range(args.warmup + args.repeats):
            for name in order.sample(args.contenders, len(args.contenders)):
                with CONTENDERS[name].forced():
                    training = clock.times(trials[name].train())
                    evaluation = clock.times(trials[name].evaluate())
                if index >= args.warmup:
                    steps = zip(args.make.training, training, strict=True)
                    for measure, value in (*steps, ('training', sum(training)), ('evaluation', *evaluation)):
                        samples[name].setdefault(measure, []).append(value)
            advance(str(setting))
    if args.make is LayerTrial:
        moved = COUNTED_PASSES * inputs[0].nbytes
        for measures in samples.values():
            measures['bandwidth'] = [moved / value / 1e6 for value in measures['training']]
    return backends, samples


UNITS = {'saved': 'MiB', 'peak': 'MiB', 'bandwidth': 'GB/s'}  # of the others, ms


def compare(
    setting: Setting, backends: dict[str, str], samples: dict[str, dict[str, list[float]]], baseline: str
) -> list[Result]:
    """Medians and quartiles of the samples and of their ratios to the baseline's sample of the same round."""
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


@contextlib.contextmanager
def progress(rounds: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; gives what is to be called, with a label, after every round."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda label: None
        return
    with tqdm(total=rounds, unit='round') as bar:

        def advance(label: str) -> None:
            bar.set_description(label, refresh=False)
            bar.update()

        yield advance


# --------------------------------------------------------------------------------------------------------- reporting

MEASURES = ('forward', 'backward', 'update', 'training', 'evaluation', 'saved', 'peak', 'bandwidth')
WITH_RATIO = ('training', 'evaluation', 'saved', 'peak')
TITLES = {'layer': 'One layer', 'network': 'ResNet-50', 'sweep': 'One layer as its input grows'}
PLOTTED_RATIOS = ('training', 'evaluation')


def describe(args: argparse.Namespace, copy: float) -> list[str]:
    """What the numbers depend on, as lines of Markdown."""
    try:
        triton = metadata.version('triton')
    except metadata.PackageNotFoundError:
        triton = 'not installed'
    versions = (
        f'mmubn {mmubn.__version__}, torch {torch.__version__}, Triton {triton}, Python {platform.python_version()}'
    )
    if args.device.type == 'cuda':
        machine = torch.cuda.get_device_name()
        versions += f', CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
    else:
        machine = f'{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), threads: {torch.get_num_threads()}'
    command = shlex.join(['python', 'tools/analysis_tools/benchmark_norm.py', *sys.argv[1:]])
    return [
        f'- Machine: {machine}',
        f'- Versions: {versions}',
        f'- Command: `{command}`',
        f'- Rounds: {args.repeats} after {args.warmup} to warm up; medians, with [first, third quartile]',
        f'- Ratios: to {args.baseline} in the same round',
        f'- A large copy: {number(copy)} GB/s, read and written',
        '',
    ]


def cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def number(value: float) -> str:
    return f'{value:.0f}' if value >= 1000 else f'{value:.3g}'


def spread(values: Quartiles) -> str:
    low, middle, high = map(number, values)
    return middle if low == middle == high else f'{middle} [{low}, {high}]'


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose first column is text and whose others are numbers."""
    return [f'| {" | ".join(row)} |' for row in (header, ['---', *['---:'] * (len(header) - 1)], *rows)] + ['']


def measures_of(results: list[Result]) -> list[str]:
    found = {result.measure for result in results}
    return [measure for measure in MEASURES if measure in found]


def mean_table(results: list[Result], args: argparse.Namespace) -> list[str]:
    """Geometric means over all settings of the median ratios."""
    measures = [measure for measure in measures_of(results) if measure != 'bandwidth']
    rows = []
    for contender in args.contenders:
        row = [contender]
        for measure in measures:
            row.append(
                number(
                    geometric_mean(r.ratio.median for r in results if (r.contender, r.measure) == (contender, measure))
                )
            )
        rows.append(row)
    return table(['contender', *(f'{measure} / {args.baseline}' for measure in measures)], rows)


def setting_table(results: list[Result], args: argparse.Namespace, copy: float) -> list[str]:
    """All measures at one setting."""
    header, rows = ['contender'], [[contender] for contender in args.contenders]
    for measure in measures_of(results):
        column = {result.contender: result for result in results if result.measure == measure}
        header.append(f'{measure} ({UNITS.get(measure, "ms")})')
        if measure in WITH_RATIO:
            header.append(f'{measure} / {args.baseline}')
        if measure == 'bandwidth':
            header.append('of the copy (%)')
        for row, contender in zip(rows, args.contenders, strict=True):
            result = column[contender]
            row.append(spread(result.value))
            if measure in WITH_RATIO:
                row.append(spread(result.ratio))
            if measure == 'bandwidth':
                row.append(number(100 * result.value.median / copy))
    header.append('backend')
    backends = {result.contender: result.backend for result in results}
    for row, contender in zip(rows, args.contenders, strict=True):
        row.append(backends[contender])
    return table(header, rows)


def curves(results: list[Result], args: argparse.Namespace) -> dict[str, dict[str, list[tuple[int, Result]]]]:
    """Per swept axis and contender, the sizes in ascending order, each with the result of training at it."""
    training = {(r.setting, r.contender): r for r in results if r.measure == 'training'}
    return {
        axis: {
            contender: [(size, training[setting, contender]) for size, setting in sorted(points)]
            for contender in args.contenders
        }
        for axis, points in swept(args).items()
    }


def larger_half(points: list[tuple[int, Result]]) -> list[tuple[int, Result]]:
    """At the smaller sizes the fixed cost of calling the operators hides the growth."""
    return points[-max(2, (len(points) + 1) // 2) :]


def growth_table(results: list[Result], args: argparse.Namespace) -> list[str]:
    """The exponent p of time ~ size^p, fitted to the larger half of the sizes; 1 is linear."""
    lines = curves(results, args)
    rows = []
    for contender in args.contenders:
        row = [contender]
        for points in (line[contender] for line in lines.values()):
            sizes, times = zip(*((log(s), log(r.value.median)) for s, r in larger_half(points)), strict=True)
            row.append(f'{linear_regression(sizes, times).slope:.2f}' if len(points) > 1 else '-')
        rows.append(row)
    return table(['contender', *lines], rows)


def report(results: list[Result], args: argparse.Namespace, copy: float) -> str:
    """All results as Markdown."""
    lines = [f'## {TITLES[args.mode]}', '', *describe(args, copy)]
    by_setting: dict[Setting, list[Result]] = {}
    for result in results:
        by_setting.setdefault(result.setting, []).append(result)
    if args.mode == 'sweep':
        lines += ['### Growth', '', 'p of training time ~ size^p, over the larger half of the sizes; 1 is linear.', '']
        lines += growth_table(results, args)
    elif len(by_setting) > 1:
        lines += ['### Geometric means over all inputs', '', *mean_table(results, args)]
    for setting, group in by_setting.items():
        lines += [f'### {setting}', '', *setting_table(group, args, copy)]
    return '\n'.join(lines)


def write_csv(results: list[Result], mode: str, path: Path) -> None:
    header = ['mode', 'n', 'c', 'h', 'w', 'dtype', 'memory_format', 'contender', 'backend', 'measure', 'unit']
    header += ['q1', 'median', 'q3', 'ratio_q1', 'ratio_median', 'ratio_q3']
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for (shape, *form), contender, backend, measure, value, ratio in results:
            unit = UNITS.get(measure, 'ms')
            writer.writerow([mode, *shape, *form, contender, backend, measure, unit, *value, *ratio])


def plot(results: list[Result], args: argparse.Namespace) -> list[Path]:
    """Draw training time against size, or ratios at each input; the files written, none where Matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print('no plot: Matplotlib is not installed', file=sys.stderr)
        return []
    matplotlib.use('Agg')
    matplotlib.rcParams['svg.fonttype'] = 'none'  # text stays text
    import matplotlib.pyplot as plt

    panels = len(AXES) if args.mode == 'sweep' else len(PLOTTED_RATIOS)
    figure, axes = plt.subplots(1, panels, figsize=(4 * panels + 2, 4.8), sharey=True, layout='constrained')
    draw = draw_growth if args.mode == 'sweep' else draw_ratios
    draw(results, args, axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
    paths = [args.out / f'plot.{ending}' for ending in ('png', 'svg')]
    for path in paths:
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return paths


def draw_growth(results: list[Result], args: argparse.Namespace, axes: Sequence[Axes]) -> None:
    """One panel per swept size, one line per contender."""
    axes[0].set_ylabel('training: forward and backward (ms)')
    for axis, (name, lines) in zip(axes, curves(results, args).items(), strict=True):
        for index, (contender, points) in enumerate(lines.items()):
            sizes, times = zip(*((size, result.value) for size, result in points), strict=True)
            axis.errorbar(sizes, *with_bars(times), label=contender, capsize=2, markersize=5, **style(index))
        sizes, times = zip(*((s, r.value.median) for s, r in larger_half(lines[args.baseline])), strict=True)
        guide = [0.7 * times[-1] * size / sizes[-1] for size in sizes]
        axis.plot(sizes, guide, color='0.6', linewidth=4, label='linear growth')
        axis.set(xscale='log', yscale='log', xlabel=AXES[name])
        swept_sizes = [size for size, _ in lines[args.baseline]]
        axis.set_xticks(swept_sizes, map(str, swept_sizes))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3, which='both')


def draw_ratios(results: list[Result], args: argparse.Namespace, axes: Sequence[Axes]) -> None:
    """One panel for training and one for evaluation, one row per contender, one marker per setting."""
    from matplotlib.ticker import LogLocator, NullLocator

    settings = list(dict.fromkeys(result.setting for result in results))
    for axis, measure in zip(axes, PLOTTED_RATIOS, strict=True):
        for index, setting in enumerate(settings):
            found = {r.contender: r.ratio for r in results if (r.setting, r.measure) == (setting, measure)}
            rows = [row + 0.6 * (index + 0.5) / len(settings) - 0.3 for row in range(len(found))]
            ratios, bars = with_bars(found.values())
            looks = style(index) | dict(linestyle='none')
            axis.errorbar(ratios, rows, xerr=bars, label=str(setting), capsize=2, markersize=5, **looks)
        axis.axvline(1, color='0.6')
        axis.set(xscale='log', xlabel=f'{measure} time / that of {args.baseline}')
        axis.set_yticks(range(len(args.contenders)), args.contenders)
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5) if high < 10 * low else (1, 2, 5)))
        axis.xaxis.set_major_formatter('{x:g}')
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params('x', labelsize='small')
        axis.grid(alpha=0.3, axis='x')
    axes[0].invert_yaxis()


def style(index: int) -> dict[str, str]:
    """Marker, line and colour of a curve: they stay apart in black and white."""
    return dict(marker='osv^DxP*'[index % 8], linestyle=('-', '--', '-.', ':')[index // 2 % 4], color=f'C{index % 10}')


def with_bars(values: Iterable[Quartiles]) -> tuple[list[float], list[list[float]]]:
    """The medians, and how far the quartiles lie below and above them."""
    values = list(values)
    return [v.median for v in values], [[v.median - v.low for v in values], [v.high - v.median for v in values]]


# ------------------------------------------------------------------------------------------------------ command line


def shape(text: str) -> tuple[int, ...]:
    parts = text.split(',')
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no shape: expected four positive integers N,C,H,W, as 2,64,50,50'
        )
    return tuple(map(int, parts))


def at_least(lowest: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f'expected an integer of at least {lowest}, got {text!r}')
        return int(text)

    return integer


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ('cpu', 'cuda'):
        raise argparse.ArgumentTypeError(f'{text!r} is no device to measure on: expected cpu, cuda or cuda:INDEX')
    if found.type == 'cuda' and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f'{text!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices on this machine; use cpu'
        )
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\nExamples')[0],
        epilog=__doc__[__doc__.index('Examples') :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modes = parser.add_subparsers(dest='mode', required=True, metavar='MODE')
    layer = modes.add_parser('layer', help='one layer at several input shapes')
    network = modes.add_parser('network', help='training step and evaluation of a ResNet-50 with each norm')
    sweep = modes.add_parser('sweep', help='one layer as N, C or H*W grows')
    for mode in (layer, network, sweep):
        several = 1 if mode is sweep else '+'
        found = 'cuda' if torch.cuda.is_available() else 'cpu'
        mode.add_argument('--device', type=device, default=found, help='cpu, cuda or cuda:INDEX; default: a GPU if any')
        mode.add_argument(
            '--contenders',
            nargs='+',
            choices=CONTENDERS,
            default=DEFAULT_CONTENDERS,
            metavar='NAME',
            help=f'of {", ".join(CONTENDERS)}; default: all but ubn-torch',
        )
        mode.add_argument(
            '--baseline',
            choices=CONTENDERS,
            metavar='NAME',
            help='contender that the ratios are to; default: bn for a network and on a GPU, else composition',
        )
        mode.add_argument('--dtype', nargs=several, choices=DTYPES, default=['fp32'], help='by autocast where not fp32')
        mode.add_argument('--memory-format', nargs=several, choices=MEMORY_FORMATS, default=['nchw'])
        mode.add_argument('--repeats', type=at_least(3), default=20, help='rounds that count; default: 20')
        mode.add_argument('--warmup', type=at_least(1), default=3, help='rounds before them; default: 3')
        mode.add_argument('--threads', type=at_least(1), help='threads of the CPU; default: those that torch takes')
        mode.add_argument('--cold-cache', action='store_true', help='overwrite the caches before every timing')
        mode.add_argument('--out', type=Path, help='folder for results.md, results.csv, plot.png and plot.svg')
    layer.add_argument(
        '--shapes', nargs='+', type=shape, default=LAYER_SHAPES, metavar='N,C,H,W', help='default: of a ResNet-50'
    )
    network.add_argument('--shapes', nargs='+', type=shape, default=[(2, 3, 320, 320)], metavar='N,3,H,W')
    sweep.add_argument('--base', type=shape, default=(4, 64, 56, 56), metavar='N,C,H,W', help='what is not swept')
    sweep.add_argument('--batch-sizes', nargs='+', type=at_least(1), default=[1, 2, 4, 8, 16, 32], metavar='N')
    sweep.add_argument('--channels', nargs='+', type=at_least(1), default=[16, 32, 64, 128, 256, 512], metavar='C')
    sweep.add_argument(
        '--sides', nargs='+', type=at_least(1), default=[14, 20, 28, 40, 56, 80, 112], metavar='S', help='H = W = S'
    )
    network.set_defaults(cuda_graphs=False)
    for mode in (layer, sweep):
        mode.add_argument(
            '--cuda-graphs',
            action='store_true',
            help='replay each step as a CUDA graph, without what launching kernels costs; leaves ubn-naive out',
        )
    args = parser.parse_args()
    args.make = NetworkTrial if args.mode == 'network' else LayerTrial
    args.baseline = args.baseline or ('composition' if args.make is LayerTrial and args.device.type == 'cpu' else 'bn')
    args.contenders = list(dict.fromkeys([args.baseline, *args.contenders]))
    check(args, modes.choices[args.mode].error)
    return args


def check(args: argparse.Namespace, error: Callable[[str], None]) -> None:
    """What one argument alone does not tell."""
    if args.cuda_graphs:
        if args.device.type != 'cuda':
            error(f'--cuda-graphs needs a GPU, but --device is {args.device}; leave --cuda-graphs out')
        if args.baseline == 'ubn-naive':
            error(
                '--baseline ubn-naive reads its gate on the host, which a CUDA graph cannot do; take another baseline'
            )
        args.contenders = [name for name in args.contenders if name != 'ubn-naive']
    for setting in all_settings(args):
        n, c, h, w = setting.shape
        values = n * h * w
        if args.make is NetworkTrial:
            if c != 3:
                error(f'--shapes of a network have 3 channels, as in 2,3,320,320, got {c} in {setting}')
            values = n * ceil(h / 32) * ceil(w / 32)  # in the last stage
        if values == 1:
            error(f'{setting} has a single value per channel, which has no variance; take a larger batch or map')
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        error(f'--out {args.out} is a file; give the path of a folder')


AXES = {'N': 'batch size N', 'C': 'channels C', 'H*W': 'map size H·W (pixels)'}


def swept(args: argparse.Namespace) -> dict[str, list[tuple[int, Setting]]]:
    """Per swept axis, its sizes and the settings with them."""
    n, c, h, w = args.base
    axes = {
        'N': [(size, (size, c, h, w)) for size in args.batch_sizes],
        'C': [(size, (n, size, h, w)) for size in args.channels],
        'H*W': [(side**2, (n, c, side, side)) for side in args.sides],
    }
    form = args.dtype[0], args.memory_format[0]
    return {axis: [(size, Setting(place, *form)) for size, place in set(points)] for axis, points in axes.items()}


def all_settings(args: argparse.Namespace) -> list[Setting]:
    if args.mode == 'sweep':
        found = [setting for points in swept(args).values() for _, setting in sorted(points)]
    else:
        found = list(itertools.starmap(Setting, itertools.product(args.shapes, args.dtype, args.memory_format)))
    return list(dict.fromkeys(found))


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device.type == 'cuda':
        torch.cuda.set_device(args.device)
    settings = all_settings(args)
    copy = copy_bandwidth(Clock(args.device))
    clock = Clock(args.device, args.cold_cache)
    results = []
    with progress(len(settings) * (args.warmup + args.repeats)) as advance:
        for setting in settings:
            results += compare(setting, *run_setting(setting, args, clock, advance), args.baseline)
    text = report(results, args, copy)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'results.md').write_text(text)
        write_csv(results, args.mode, args.out / 'results.csv')
        paths = [args.out / 'results.md', args.out / 'results.csv', *plot(results, args)]
        print(f'wrote {", ".join(map(str, paths))}')


if __name__ == '__main__':
    main()
