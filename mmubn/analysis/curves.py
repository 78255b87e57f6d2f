"""Curves of runs in panels: what has one axis is one quantity, in one unit, of runs that can be compared in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from mmubn.analysis.metrics import axis_label
from mmubn.analysis.plots import draw_mean, line_style
from mmubn.analysis.runs import (
    loss_parts,
    matching_tags,
    series,
    training_records,
    validation_records,
    validation_unit,
)

__all__ = ['Groups', 'Panel', 'draw_panel', 'learning_rate_panels', 'loss_panels', 'metric_panels', 'tags_of']

Groups = dict[str, dict[Path, list[dict]]]  # records by run, by label: what read_runs returns
Curve = tuple[list[int], list[float]]  # steps and values


@dataclass
class Panel:
    """What is drawn on one pair of axes.

    Attributes:
        ylabel: The quantity, with its unit.
        xlabel: What the steps count.
        curves: Those of the seeds of each group that has any, by the group's label.
        styles: Of the labels; a group looks the same in all panels.
    """

    ylabel: str
    xlabel: str
    curves: dict[str, list[Curve]]
    styles: dict[str, dict]


def tags_of(groups: Groups, names: Iterable[str]) -> list[str]:
    """Return the metrics that ``names`` mean in any of the runs, in the order of the names."""
    runs = [records for members in groups.values() for records in members.values()]
    return list(dict.fromkeys(tag for name in names for records in runs for tag in matching_tags(records, name)))


def loss_panels(groups: Groups) -> list[Panel]:
    """Return a panel of the training loss; several where the losses of the runs consist of other parts."""
    return _panels(groups, 'training loss', _loss_of, lambda members: (_parts(members), 'iteration'))


def metric_panels(groups: Groups, tag: str) -> list[Panel]:
    """Return a panel of a metric; two where some of the runs count epochs and others iterations."""

    def curve_of(records: list[dict]) -> Curve:
        return series(validation_records(records), tag)

    return _panels(groups, axis_label(tag), curve_of, lambda members: (validation_unit(next(iter(members.values()))),))


def learning_rate_panels(groups: Groups) -> list[Panel]:
    """Return a panel of the learning rate."""
    return _panels(groups, 'learning rate', lambda r: series(training_records(r), 'lr'), lambda members: ('iteration',))


def _loss_of(records: list[dict]) -> Curve:
    return series(training_records(records), 'loss')


def _parts(members: dict[Path, list[dict]]) -> tuple[str, ...]:
    return max(map(loss_parts, members.values()), key=len)


def _panels(
    groups: Groups,
    ylabel: str,
    curve_of: Callable[[list[dict]], Curve],
    kind_of: Callable[[dict[Path, list[dict]]], tuple],
) -> list[Panel]:
    """Return a panel for each kind of group that has a value; the last element of its kind is the unit of time."""
    styles = {label: line_style(i) for i, label in enumerate(groups)}
    panels: dict[tuple, Panel] = {}
    for label, members in groups.items():
        curves = [curve_of(records) for records in members.values()]
        if any(steps for steps, _ in curves):
            kind = kind_of(members)
            panel = panels.setdefault(kind, Panel(ylabel, kind[-1], {}, styles))
            panel.curves[label] = curves
    return list(panels.values())


def draw_panel(axis: Axes, panel: Panel, logarithmic: bool = False, legend: bool = True) -> str:
    """Draw a panel; return what the caption must say."""
    remarks = ''
    for label, curves in panel.curves.items():
        name = f'{label} {panel.ylabel.partition(" (")[0]}'
        remarks += draw_mean(axis, curves, label, panel.styles[label], name)
    axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    if logarithmic:
        axis.set_yscale('log')
        # A band that reaches down to 0 would leave nothing of the axis for the curves.
        lowest = min((y for line in axis.lines for y in line.get_ydata() if 0 < y < math.inf), default=1)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], lowest / 2))
    axis.set_xlim(left=0)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if legend and axis.lines:
        axis.legend(fontsize=8)
    return remarks
