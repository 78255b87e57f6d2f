"""The plots of the benchmark; Matplotlib is imported only when one is drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmubn.analysis.benchmark.measurement import Quartiles, Result
from mmubn.analysis.benchmark.plan import Plan
from mmubn.analysis.benchmark.report import curves, larger_half

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['plot']

AXES = {'N': 'batch size N', 'C': 'channels C', 'H*W': 'map size H·W (pixels)'}
PLOTTED_RATIOS = ('training', 'evaluation')


def plot(results: list[Result], plan: Plan, folder: Path) -> list[Path]:
    """Draw training time against size, or ratios at each input; return the files, none where Matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print('no plot: Matplotlib is not installed', file=sys.stderr)
        return []
    matplotlib.use('Agg')
    matplotlib.rcParams['svg.fonttype'] = 'none'  # text stays text
    import matplotlib.pyplot as plt

    panels = len(AXES) if plan.mode == 'sweep' else len(PLOTTED_RATIOS)
    figure, axes = plt.subplots(1, panels, figsize=(4 * panels + 2, 4.8), sharey=True, layout='constrained')
    draw = draw_growth if plan.mode == 'sweep' else draw_ratios
    draw(results, plan, axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
    paths = [folder / f'plot.{ending}' for ending in ('png', 'svg')]
    for path in paths:
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return paths


def draw_growth(results: list[Result], plan: Plan, axes: Sequence[Axes]) -> None:
    """Draw one panel per swept size, one line per contender."""
    axes[0].set_ylabel('training: forward and backward (ms)')
    for axis, (name, lines) in zip(axes, curves(results, plan).items(), strict=True):
        for index, (contender, points) in enumerate(lines.items()):
            sizes, times = zip(*((size, result.value) for size, result in points), strict=True)
            axis.errorbar(sizes, *with_bars(times), label=contender, capsize=2, markersize=5, **style(index))
        sizes, times = zip(*((s, r.value.median) for s, r in larger_half(lines[plan.baseline])), strict=True)
        guide = [0.7 * times[-1] * size / sizes[-1] for size in sizes]
        axis.plot(sizes, guide, color='0.6', linewidth=4, label='linear growth')
        axis.set(xscale='log', yscale='log', xlabel=AXES[name])
        swept_sizes = [size for size, _ in lines[plan.baseline]]
        axis.set_xticks(swept_sizes, map(str, swept_sizes))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3, which='both')


def draw_ratios(results: list[Result], plan: Plan, axes: Sequence[Axes]) -> None:
    """Draw one panel for training and one for evaluation, one row per contender, one marker per setting."""
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
        axis.set(xscale='log', xlabel=f'{measure} time / that of {plan.baseline}')
        axis.set_yticks(range(len(plan.contenders)), plan.contenders)
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5) if high < 10 * low else (1, 2, 5)))
        axis.xaxis.set_major_formatter('{x:g}')
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params('x', labelsize='small')
        axis.grid(alpha=0.3, axis='x')
    axes[0].invert_yaxis()


def style(index: int) -> dict[str, Any]:
    """Return marker, line and colour of a curve: they stay apart in black and white."""
    return dict(marker='osv^DxP*'[index % 8], linestyle=('-', '--', '-.', ':')[index // 2 % 4], color=f'C{index % 10}')


def with_bars(values: Iterable[Quartiles]) -> tuple[list[float], list[list[float]]]:
    """Return the medians, and how far the quartiles lie below and above them."""
    values = list(values)
    return [v.median for v in values], [[v.median - v.low for v in values], [v.high - v.median for v in values]]
