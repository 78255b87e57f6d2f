"""How condensed the features of runs are: read from the files that FeatureCondensationHook writes, and drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mmubn.analysis.metrics import axis_label
from mmubn.analysis.plots import draw_mean, line_style, plt
from mmubn.analysis.runs import (
    LayerValues,
    group_runs,
    read_layer_log,
    read_scalars,
    series,
    training_records,
    validation_records,
)
from mmubn.cli import UsageError

__all__ = [
    'COLOURS',
    'FILE',
    'Log',
    'condensed_share',
    'draw_layers',
    'draw_means',
    'heat_map',
    'heat_map_height',
    'heat_map_width',
    'mean_similarity',
    'metric_by_iteration',
    'other_layers',
    'read_log',
    'read_records',
]

FILE = 'feature_condensation.jsonl'
MAX_LABELS = 60  # of layers, beside a heat map
FONT = 8  # of these labels, in points
COLOURS = 'cividis'  # evenly rising in luminance, so that it reads in black and white

Log = dict[str, LayerValues]  # what the hook measured in a run, by quantity
Curve = tuple[list[int], list[float]]  # steps and values

plt.rcParams['hatch.linewidth'] = 0.5


# ---- reading


def read_log(run: Path) -> Log:
    """Read what the hook measured in a run.

    Raises:
        UsageError: The run has no file of the hook, or none with a measurement on the fixed batch.
    """
    log = read_layer_log(run, FILE)
    if 'fixed' not in log or not np.isfinite(log['fixed'].values).any():
        raise UsageError(f'{run}/*/{FILE} has no measurement on the fixed batch; train on with the hook.')
    for name in ('threshold', 'num_samples'):
        if not isinstance(log['fixed'].settings.get(name), (int, float)):
            raise UsageError(
                f'{run}/*/{FILE} has no number {name} in its first line, which FeatureCondensationHook writes.'
            )
    return log


def has_gate(log: Log) -> bool:
    return 'running' in log and bool(np.isfinite(log['running'].values).any())


def mean_similarity(log: Log) -> Curve:
    """Return the mean similarity on the fixed batch of the layers that have one."""
    return _over_layers(log['fixed'], np.mean)


def condensed_share(log: Log) -> Curve:
    """Return how many percent of the layers with a similarity on the fixed batch are above the hook's threshold."""
    threshold = log['fixed'].settings['threshold']
    return _over_layers(log['fixed'], lambda values: 100 * np.mean(values > threshold))


def _over_layers(layers: LayerValues, reduce: Callable[[np.ndarray], float]) -> Curve:
    rows = [(int(step), row[np.isfinite(row)]) for step, row in zip(layers.steps, layers.values, strict=True)]
    rows = [(step, row) for step, row in rows if len(row)]
    return [step for step, _ in rows], [float(reduce(row)) for _, row in rows]


def read_records(run: Path) -> list[dict]:
    """Read the scalars of a run; none where it has no log."""
    try:
        return read_scalars(run)
    except UsageError:
        return []


def metric_by_iteration(records: list[dict], metric: str) -> Curve:
    """Return a validation metric, logged by the epoch, at the iteration of the last training record before it."""
    iteration, steps, values = 0, [], []
    for record in records:
        if training_records([record]):
            iteration = record['step']
        elif value := series(validation_records([record]), metric)[1]:
            steps.append(iteration)
            values += value
    return steps, values


# ---- drawing


def draw_means(logs: dict[Path, Log], records: dict[Path, list[dict]], metrics: list[str]) -> tuple[Figure, str]:
    """Draw the means over the layers in the course of training, and metrics, runs grouped by seeds.

    Args:
        logs: Of each run.
        records: Scalars of each run; none are needed where there are no metrics.
        metrics: Their tags; each has axes of its own.

    Returns:
        The figure and its caption.
    """
    groups = group_runs(logs)
    panels = {
        'mean cosine similarity': lambda run: mean_similarity(logs[run]),
        'condensed layers (%)': lambda run: condensed_share(logs[run]),
    }
    caption = [
        'Mean pairwise cosine similarity of the inputs of the norm layers on a fixed batch of '
        f'{_either(settings(logs, "num_samples"))} samples, mean over the layers, and the share of layers with a '
        f'similarity above {_either(settings(logs, "threshold"))}.'
    ]
    for tag in metrics:
        panels[axis_label(tag)] = lambda run, tag=tag: metric_by_iteration(records[run], tag)
    if metrics:
        names = ' and '.join(tag.split('/')[-1] for tag in metrics)
        verb = 'is that' if len(metrics) == 1 else 'are those'
        caption.append(f'{names} {verb} on the validation data, at the last training iteration logged before it.')
    if len(groups) < len(logs):
        caption.append('Lines of several seeds are their mean, bands one standard deviation (n - 1) to each side.')
    remarks = [other_layers(logs)]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 0.6 + 2.2 * len(panels)), sharex=True)
    for axis, (name, curve_of) in zip(axes, panels.items(), strict=True):
        for i, (label, runs) in enumerate(groups.items()):
            curves = [curve_of(run) for run in runs]
            remark = draw_mean(axis, curves, label, line_style(i), f'{label}, {name}')
            # Of several metrics, a classifier has other ones than a detector.
            if len(metrics) < 2 or any(steps for steps, _ in curves):
                remarks.append(remark.strip())
        axis.set_ylabel(name)
    for threshold in settings(logs, 'threshold'):
        axes[0].axhline(threshold, color='grey', linestyle=(0, (1, 2)), label=f'condensed: above {threshold:g}')
    axes[1].set_ylim(-4, 104)
    axes[-1].set_xlabel('iterations')
    axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
    return figure, ' '.join(filter(None, [*caption, *dict.fromkeys(remarks)]))


def settings(logs: dict[Path, Log], name: str) -> list[float]:
    """Return the values that a setting of the hook has in these runs."""
    return sorted({log['fixed'].settings[name] for log in logs.values()})


def _either(values: list[float]) -> str:
    return ' or '.join(f'{value:g}' for value in values)


def other_layers(logs: dict[Path, Log]) -> str:
    """Name the runs whose layers are not those of the first one; empty where there are none."""
    first, *others = logs
    others = [str(run) for run in others if logs[run]['fixed'].layers != logs[first]['fixed'].layers]
    return f'Other layers than {first}: {", ".join(others)}; each mean is over the layers of its run.' if others else ''


def draw_layers(logs: dict[Path, Log]) -> tuple[Figure, str]:
    """Draw a row of heat maps layer x time for each run, all in one scale: the figure and its caption."""
    titles = {
        run: label if len(runs) == 1 else f'{label}, {run.name}'
        for label, runs in group_runs(logs).items()
        for run in runs
    }
    columns = 2 if any(map(has_gate, logs.values())) else 1
    heights = [heat_map_height(log['fixed']) for log in logs.values()]
    figure, axes = plt.subplots(
        *(len(logs), columns),
        figsize=(heat_map_width(columns, *(log['fixed'] for log in logs.values())), sum(heights) + 0.7),
        height_ratios=heights,
        sharex='row',
        sharey='row',
        squeeze=False,
    )
    shown = [log[name].values for log in logs.values() for name in ('fixed', 'running') if name in log]
    scale = Normalize(min(np.nanmin(values, initial=0) for values in shown), 1)
    for row, (run, log) in zip(axes, logs.items(), strict=True):
        mesh = heat_map(row[0], log['fixed'], scale)
        row[0].set_title(f'{titles[run]}: on the fixed batch', fontsize=9)
        if has_gate(log):
            heat_map(row[1], log['running'], scale)
            mark_closed(row[1], log['gate'])
            row[1].set_title(f'{titles[run]}: running similarity, gate', fontsize=9)
        else:
            for axis in row[1:]:
                axis.set_axis_off()
    bar = figure.colorbar(
        mesh,
        ax=axes,
        location='top',
        aspect=40,
        shrink=0.7,
        pad=0.2 / sum(heights),
        label='mean pairwise cosine similarity',
    )
    bar.ax.vlines(settings(logs, 'threshold'), 0, 1, color='white', linestyle='--')
    caption = (
        'Mean pairwise cosine similarity of the inputs of every norm layer, in the order of the network, on a fixed '
        f'batch of {_either(settings(logs, "num_samples"))} samples. A layer is condensed above '
        f'{_either(settings(logs, "threshold"))}, dashed in the scale. White: no value.'
    )
    if columns == 2:
        caption += ' Right: the running similarity of the training batches, hatched where the gate is closed.'
    return figure, caption


def heat_map_height(layers: LayerValues) -> float:
    """Return the inches in which up to MAX_LABELS names of layers can be read."""
    return 1 + 0.15 * max(8, min(MAX_LABELS, len(layers.layers)))


def heat_map_width(columns: int, *logs: LayerValues) -> float:
    """Return the inches that heat maps in so many columns take, with whole names of layers beside the first."""
    longest = max(len(name) for layers in logs for name in layers.layers)
    return 5 * columns + 0.5 + longest * 0.62 * FONT / 72


def heat_map(axis: Axes, layers: LayerValues, scale: Normalize) -> QuadMesh:
    """Draw layers from top to bottom, time from left to right; white where there is no value."""
    count = len(layers.layers)
    edges = _edges(layers.steps)
    mesh = axis.pcolormesh(edges, np.arange(count + 1), layers.values.T, norm=scale, cmap=COLOURS, rasterized=True)
    named = range(0, count, math.ceil(count / MAX_LABELS))
    axis.set_yticks([i + 0.5 for i in named], [layers.layers[i] for i in named], fontsize=FONT, parse_math=False)
    axis.set(ylim=(count, 0), xlabel='iterations')
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.grid(visible=False)
    return mesh


def mark_closed(axis: Axes, gate: LayerValues) -> None:
    """Hatch where the gate is closed; white on dark, within a black frame, so that it is seen on any colour."""
    edges = _edges(gate.steps)
    for i, values in enumerate(gate.values.T):
        changes = np.flatnonzero(np.diff(np.concatenate([[0], values == 0, [0]])))
        spans = [(edges[start], edges[stop] - edges[start]) for start, stop in changes.reshape(-1, 2)]
        axis.broken_barh(spans, (i, 1), facecolor='none', edgecolor='white', linewidth=0, hatch='///')
        axis.broken_barh(spans, (i, 1), facecolor='none', edgecolor='black', linewidth=0.4)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Return limits of cells around each step: in the middle between two, and at the first and the last."""
    if len(steps) == 1:
        return steps[0] + np.array([-0.5, 0.5])
    return np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
