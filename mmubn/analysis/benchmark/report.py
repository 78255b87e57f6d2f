"""What the benchmark reports: Markdown tables and a CSV file."""

from __future__ import annotations

import csv
import platform
from importlib import metadata
from math import log
from pathlib import Path
from statistics import geometric_mean, linear_regression

import torch

from mmubn.analysis.benchmark.deployment import BASELINE, Deployed
from mmubn.analysis.benchmark.measurement import Quartiles, Result
from mmubn.analysis.benchmark.plan import Plan
from mmubn.analysis.benchmark.trials import Setting
from mmubn.version import __version__

__all__ = [
    'Curve',
    'curves',
    'deployed_markdown',
    'growth_table',
    'larger_half',
    'markdown',
    'write_csv',
    'write_deployed_csv',
]

UNITS = {'saved': 'MiB', 'peak': 'MiB', 'bandwidth': 'GB/s'}  # of the others, ms
MEASURES = ('forward', 'backward', 'update', 'training', 'evaluation', 'saved', 'peak', 'bandwidth')
WITH_RATIO = ('training', 'evaluation', 'saved', 'peak')
TITLES = {'layer': 'One layer', 'network': 'ResNet-50', 'sweep': 'One layer as its input grows'}

Curve = list[tuple[int, Result]]  # swept sizes in ascending order, each with the result of training at it


def markdown(results: list[Result], plan: Plan, copy: float, command: str) -> str:
    """Write all results as Markdown.

    Args:
        results: Those of the plan.
        plan: What was run.
        copy: GB/s of a large copy.
        command: What the user typed.
    """
    lines = [f'## {TITLES[plan.mode]}', '', *describe(plan, copy, command)]
    by_setting: dict[Setting, list[Result]] = {}
    for result in results:
        by_setting.setdefault(result.setting, []).append(result)
    if plan.mode == 'sweep':
        lines += ['### Growth', '', 'p of training time ~ size^p, over the larger half of the sizes; 1 is linear.', '']
        lines += growth_table(results, plan)
    elif len(by_setting) > 1:
        lines += ['### Geometric means over all inputs', '', *mean_table(results, plan)]
    for setting, group in by_setting.items():
        lines += [f'### {setting}', '', *setting_table(group, plan, copy)]
    return '\n'.join(lines)


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'


def cpu() -> str:
    return f'{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), threads: {torch.get_num_threads()}'


def describe(plan: Plan, copy: float, command: str) -> list[str]:
    """Write what the numbers depend on, as lines of Markdown."""
    triton, python = version_of('triton'), platform.python_version()
    versions = f'mmubn {__version__}, torch {torch.__version__}, Triton {triton}, Python {python}'
    if plan.device.type == 'cuda':
        machine = torch.cuda.get_device_name()
        versions += f', CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
    else:
        machine = cpu()
    return [
        f'- Machine: {machine}',
        f'- Versions: {versions}',
        f'- Command: `{command}`',
        f'- Rounds: {plan.repeats} after {plan.warmup} to warm up; medians, with [first, third quartile]',
        f'- Ratios: to {plan.baseline} in the same round',
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
    """Write the lines of a Markdown table whose first column is text and whose others are numbers."""
    return [f'| {" | ".join(row)} |' for row in (header, ['---', *['---:'] * (len(header) - 1)], *rows)] + ['']


def measures_of(results: list[Result]) -> list[str]:
    found = {result.measure for result in results}
    return [measure for measure in MEASURES if measure in found]


def mean_table(results: list[Result], plan: Plan) -> list[str]:
    """Write the geometric means over all settings of the median ratios."""
    measures = [measure for measure in measures_of(results) if measure != 'bandwidth']
    rows = []
    for contender in plan.contenders:
        row = [contender]
        for measure in measures:
            row.append(
                number(
                    geometric_mean(r.ratio.median for r in results if (r.contender, r.measure) == (contender, measure))
                )
            )
        rows.append(row)
    return table(['contender', *(f'{measure} / {plan.baseline}' for measure in measures)], rows)


def setting_table(results: list[Result], plan: Plan, copy: float) -> list[str]:
    """Write all measures at one setting."""
    header, rows = ['contender'], [[contender] for contender in plan.contenders]
    for measure in measures_of(results):
        column = {result.contender: result for result in results if result.measure == measure}
        header.append(f'{measure} ({UNITS.get(measure, "ms")})')
        if measure in WITH_RATIO:
            header.append(f'{measure} / {plan.baseline}')
        if measure == 'bandwidth':
            header.append('of the copy (%)')
        for row, contender in zip(rows, plan.contenders, strict=True):
            result = column[contender]
            row.append(spread(result.value))
            if measure in WITH_RATIO:
                row.append(spread(result.ratio))
            if measure == 'bandwidth':
                row.append(number(100 * result.value.median / copy))
    header.append('backend')
    backends = {result.contender: result.backend for result in results}
    for row, contender in zip(rows, plan.contenders, strict=True):
        row.append(backends[contender])
    return table(header, rows)


def curves(results: list[Result], plan: Plan) -> dict[str, dict[str, Curve]]:
    """Return the curve of training for each swept axis and contender."""
    training = {(r.setting, r.contender): r for r in results if r.measure == 'training'}
    return {
        axis: {
            contender: [(size, training[setting, contender]) for size, setting in points]
            for contender in plan.contenders
        }
        for axis, points in plan.axes.items()
    }


def larger_half(points: Curve) -> Curve:
    """Return the larger sizes: at the smaller ones the fixed cost of calling the operators hides the growth."""
    return points[-max(2, (len(points) + 1) // 2) :]


def growth_table(results: list[Result], plan: Plan) -> list[str]:
    """Write the exponent p of time ~ size^p, fitted to the larger half of the sizes; 1 is linear."""
    lines = curves(results, plan)
    rows = []
    for contender in plan.contenders:
        row = [contender]
        for points in (line[contender] for line in lines.values()):
            sizes, times = zip(*((log(s), log(r.value.median)) for s, r in larger_half(points)), strict=True)
            row.append(f'{linear_regression(sizes, times).slope:.2f}' if len(points) > 1 else '-')
        rows.append(row)
    return table(['contender', *lines], rows)


def write_csv(results: list[Result], mode: str, path: Path) -> None:
    """Write a row for each result."""
    header = ['mode', 'n', 'c', 'h', 'w', 'dtype', 'memory_format', 'contender', 'backend', 'measure', 'unit']
    header += ['q1', 'median', 'q3', 'ratio_q1', 'ratio_median', 'ratio_q3']
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for (shape, *form), contender, backend, measure, value, ratio in results:
            unit = UNITS.get(measure, 'ms')
            writer.writerow([mode, *shape, *form, contender, backend, measure, unit, *value, *ratio])


def deployed_markdown(results: list[Deployed], repeats: int, warmup: int, command: str) -> str:
    """Write the results of :func:`~mmubn.analysis.benchmark.deployment.measure_deployed` as Markdown."""
    runtime, python = version_of('onnxruntime'), platform.python_version()
    clock = 'CPU time of the process' if torch.get_num_threads() == 1 else 'wall time'
    lines = [
        '## ResNet-50, deployed',
        '',
        f'- Machine: {cpu()}',
        f'- Versions: mmubn {__version__}, torch {torch.__version__}, onnxruntime {runtime}, Python {python}',
        f'- Command: `{command}`',
        f'- Rounds: {repeats} after {warmup} to warm up; {clock}; medians, with [first, third quartile]',
        f'- Ratios: to {BASELINE}, in the same runtime and round',
        '- Map nodes: operators of the ONNX graph that read or write a map',
        '',
    ]
    for shape in dict.fromkeys(result.shape for result in results):
        rows = []
        for network in dict.fromkeys(result.network for result in results):
            eager, onnx = (r for r in results if (r.shape, r.network) == (shape, network))
            cells = [spread(value) for result in (eager, onnx) for value in (result.milliseconds, result.ratio)]
            rows.append([network, *cells, str(onnx.map_nodes)])
        header = ['network', 'torch (ms)', f'torch / {BASELINE}', 'ONNX (ms)', f'ONNX / {BASELINE}', 'map nodes']
        lines += [f'### {"x".join(map(str, shape))}', '', *table(header, rows)]
    return '\n'.join(lines)


def write_deployed_csv(results: list[Deployed], path: Path) -> None:
    """Write a row for each result."""
    header = ['n', 'c', 'h', 'w', 'runtime', 'network', 'q1', 'median', 'q3', 'ratio_q1', 'ratio_median', 'ratio_q3']
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow([*header, 'map_nodes'])
        for shape, runtime, network, milliseconds, ratio, map_nodes in results:
            writer.writerow([*shape, runtime, network, *milliseconds, *ratio, map_nodes])
