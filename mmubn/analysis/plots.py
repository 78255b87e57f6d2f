"""What all plots share: lines that differ in black and white, a caption below, PNG and SVG."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

from mmubn.analysis.runs import over_seeds
from mmubn.cli import UsageError

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ['draw_mean', 'line_style', 'plt', 'save']

# Okabe and Ito's colours: apart for the colour-blind too. In black and white, dashes and markers tell the lines apart.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#000000', '#E69F00', '#56B4E9')
DASHES = ('-', '--', '-.', ':')
MARKERS = 'os^DvPX*<>'

plt.rcParams.update(
    {'svg.hashsalt': 'mmubn', 'axes.grid': True, 'grid.alpha': 0.3, 'figure.constrained_layout.use': True}
)


def line_style(index: int) -> dict[str, Any]:
    """Return arguments of ``plot`` for the line of this number; no two of the first 70 look the same."""
    return dict(
        color=COLOURS[index % len(COLOURS)],
        linestyle=DASHES[index % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
    )


def draw_mean(axis: Axes, curves: list[tuple[list[int], list[float]]], label: str, style: dict[str, Any]) -> str:
    """Draw the mean of the seeds' curves and a band of one standard deviation; return what the caption must say."""
    steps, values = over_seeds(curves)
    count = len(curves)
    if len(steps):
        mean = values.mean(0)
        markers = max(1, len(steps) // 10)
        axis.plot(steps, mean, label=f'{label}, {count} seeds' if count > 1 else label, markevery=markers, **style)
        if count > 1:
            spread = values.std(0, ddof=1)
            axis.fill_between(steps, mean - spread, mean + spread, color=style['color'], alpha=0.2, linewidth=0)
    logged = len(set().union(*(steps for steps, _ in curves)))
    if not logged:
        return f' {label}: nothing logged.'
    return f' {label}: {len(steps)} of {logged} points, those that all seeds have.' if len(steps) < logged else ''


def save(figure: Figure, out: Path, caption: str) -> list[Path]:
    """Write the figure with its caption as ``out``.png and ``out``.svg, whatever of the two ``out`` ends in.

    Raises:
        UsageError: ``out`` ends in something else.
    """
    if out.suffix not in ('', '.png', '.svg'):
        raise UsageError(f'plots are written as PNG and SVG, got {out}; give a name that ends in .png or .svg.')
    out.parent.mkdir(parents=True, exist_ok=True)
    width = figure.get_figwidth()
    figure.text(0.01, -0.02, textwrap.fill(caption, int(width * 13)), va='top', fontsize=9)
    paths = [out.with_suffix(suffix) for suffix in ('.png', '.svg')]
    for path in paths:
        # No date: the same data give the same file.
        metadata = {'Date': None} if path.suffix == '.svg' else {'Software': None}
        figure.savefig(path, dpi=110, bbox_inches='tight', pad_inches=0.1, metadata=metadata)
        print(f'wrote {path}')
    plt.close(figure)
    return paths
