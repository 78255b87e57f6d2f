"""What all plots share: lines that differ in black and white, a caption below, PNG and SVG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

from mmubn.analysis.outputs import unwritable, write_files
from mmubn.analysis.runs import over_seeds
from mmubn.cli import UsageError

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ['check_output', 'check_plot', 'draw_mean', 'line_style', 'plt', 'save', 'save_all', 'write']

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


def draw_mean(
    axis: Axes, curves: list[tuple[list[int], list[float]]], label: str, style: dict[str, Any], name: str | None = None
) -> str:
    """Draw the mean of the seeds' curves and a band of one standard deviation; return what the caption must say.

    The legend has the ``label``; the caption calls the line ``name``, which is the label where there is none.
    """
    steps, values = over_seeds(curves)
    name, count = name or label, len(curves)
    if len(steps):
        mean = values.mean(0)
        markers = max(1, len(steps) // 10)
        axis.plot(steps, mean, label=f'{label}, {count} seeds' if count > 1 else label, markevery=markers, **style)
        if count > 1:
            spread = values.std(0, ddof=1)
            axis.fill_between(steps, mean - spread, mean + spread, color=style['color'], alpha=0.2, linewidth=0)
    logged = len(set().union(*(steps for steps, _ in curves)))
    if not logged:
        return f' {name}: nothing logged.'
    return f' {name}: {len(steps)} of {logged} points, those that all seeds have.' if len(steps) < logged else ''


def check_output(path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Ask, before any work is done, whether a file can be written there.

    Args:
        path: The file.
        suffixes: Those that its name may end in; any where there are none.

    Raises:
        UsageError: Names the path and why not.
    """
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f'{path} must end in {" or ".join(filter(None, suffixes))}.')
    if problem := unwritable(path):
        raise UsageError(f'{path} cannot be written: {problem}; give the name of a file.')


def check_plot(out: Path) -> None:
    """Ask whether ``out``.png and ``out``.svg can be written.

    Raises:
        UsageError: They cannot, or ``out`` ends in something else.
    """
    if out.suffix not in ('', '.png', '.svg'):
        raise UsageError(f'plots are written as PNG and SVG, got {out}; give a name that ends in .png or .svg.')
    if out.is_dir():
        raise UsageError(f'{out} is a folder; give the name of a plot in it, as {out / "plot.png"}.')
    for path in _paths(out):
        check_output(path)


def _paths(out: Path) -> list[Path]:
    return [out.with_suffix(suffix) for suffix in ('.png', '.svg')]


def save(figure: Figure, out: Path, caption: str) -> list[Path]:
    """Write the figure with its caption as ``out``.png and ``out``.svg, whatever of the two ``out`` ends in.

    Raises:
        UsageError: ``out`` ends in something else, or cannot be written.
    """
    return save_all([(figure, out, caption)])


def save_all(plots: Iterable[tuple[Figure, Path, str]]) -> list[Path]:
    """:func:`save` several plots, all or none."""
    contents = {}
    for figure, out, caption in plots:
        check_plot(out)
        width = figure.get_figwidth()
        figure.text(0.01, -0.02, textwrap.fill(caption, int(width * 13)), va='top', fontsize=9)
        for path in _paths(out):
            # No date: the same data give the same file.
            metadata = {'Date': None} if path.suffix == '.svg' else {'Software': None}
            file = io.BytesIO()
            style = dict(dpi=110, bbox_inches='tight', pad_inches=0.1)
            figure.savefig(file, format=path.suffix[1:], metadata=metadata, **style)
            contents[path] = file.getvalue()
        plt.close(figure)
    write(contents)
    return list(contents)


def write(contents: dict[Path, bytes]) -> None:
    """Write files, all or none, and say so.

    Raises:
        UsageError: One cannot be written.
    """
    try:
        write_files(contents)
    except OSError as error:
        names = ', '.join(map(str, contents))
        raise UsageError(f'{names} cannot be written: {error.strerror or error}.') from error
    for path in contents:
        print(f'wrote {path}')
