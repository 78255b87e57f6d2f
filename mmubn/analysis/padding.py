"""What the padding of a batch does to a trained detector: the metrics and the neck's maps with it and without."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmubn.analysis.metrics import decimals
from mmubn.analysis.predictions import last_checkpoint
from mmubn.analysis.sweeps import SweepRun
from mmubn.analysis.trained import trained_runner
from mmubn.cli import UsageError

__all__ = ['EVALUATIONS', 'Row', 'difference', 'measure', 'table']

EVALUATIONS = ('unpadded', 'padded', 'padded, PaddingAwareHook')
CHANGE = 'change of the maps'  # ||padded - unpadded|| / ||unpadded|| of the neck's maps, mean over the images

Row = tuple[str, str, int, str, str, float]  # sweep, choice, seed, evaluation, metric, value


def measure(run: SweepRun, folder: Path, pad: int) -> list[Row]:
    """Evaluate the last checkpoint of a run in each of EVALUATIONS, or read what was measured before.

    Args:
        run: A run of a sweep that is done.
        folder: Its work dir; what is measured is kept there, in ``padding-{pad}.json``.
        pad: Height and width of padded batches are multiples of it.
    """
    path = folder / f'padding-{pad}.json'
    checkpoint = last_checkpoint(folder)
    if path.exists() and (kept := json.loads(path.read_text()))['checkpoint'] == checkpoint.name:
        found = kept['values']
    else:
        found, maps = {}, []
        for evaluation in EVALUATIONS:
            found[evaluation], own = _evaluate(run, folder, evaluation, pad)
            maps = maps or own
            found[evaluation][CHANGE] = difference(own, maps)
        path.write_text(json.dumps(dict(checkpoint=checkpoint.name, values=found), indent=1))
    return [
        (run.sweep, run.label, run.seed, evaluation, metric, value)
        for evaluation, values in found.items()
        for metric, value in values.items()
    ]


def _evaluate(run: SweepRun, folder: Path, evaluation: str, pad: int) -> tuple[dict[str, float], list[list[Tensor]]]:
    """The metrics, and for each image the maps of the neck."""
    cfg = run.load()
    if evaluation != EVALUATIONS[0]:
        cfg.model.data_preprocessor.pad_size_divisor = pad
    if evaluation == EVALUATIONS[2]:
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='PaddingAwareHook')]
    runner = trained_runner(cfg, folder, folder / 'padding', ('test',))
    if not isinstance(getattr(runner.model, 'neck', None), nn.Module):
        raise UsageError(f'{run}: {type(runner.model).__name__} has no neck, whose maps are compared.')
    maps: list[list[Tensor]] = []

    def keep(_: nn.Module, __: object, outputs: Iterable[Tensor]) -> None:
        maps.extend([level.cpu() for level in image] for image in zip(*outputs, strict=True))

    handle = runner.model.neck.register_forward_hook(keep)
    metrics = runner.test()
    handle.remove()
    return {name: metrics[tag] for name in ('bbox_mAP', 'segm_mAP') if (tag := f'coco/{name}') in metrics}, maps


def difference(maps: list[list[Tensor]], unpadded: list[list[Tensor]]) -> float:
    """Mean over the images of ``||m - u|| / ||u||``, over all levels, m the part of the image's maps that u covers.

    Args:
        maps: For each image its levels, (C, H, W).
        unpadded: The same images; their levels are as large, or smaller.
    """
    changes = []
    for image, own in zip(maps, unpadded, strict=True):
        squares = [
            (m[:, : u.shape[1], : u.shape[2]] - u).double().square().sum() for m, u in zip(image, own, strict=True)
        ]
        changes.append((sum(squares) / sum(u.double().square().sum() for u in own)) ** 0.5)
    return float(torch.stack([torch.as_tensor(each) for each in changes]).mean())


def table(rows: list[Row], sweep: str) -> str:
    """A Markdown table of a sweep: mean and standard deviation over the seeds, and the loss from unpadded to padded."""
    rows = [row for row in rows if row[0] == sweep]
    metrics = list(dict.fromkeys(row[4] for row in rows))
    lines = [
        '|  | evaluation | seeds | ' + ' | '.join(f'{metric} | loss' for metric in metrics[:-1]) + f' | {CHANGE} |'
    ]
    lines.append('|' + '---|' * (lines[0].count('|') - 1))
    for label in dict.fromkeys(row[1] for row in rows):
        values = {
            (evaluation, metric): {
                seed: value for _, each, seed, *key, value in rows if each == label and key == [evaluation, metric]
            }
            for evaluation in EVALUATIONS
            for metric in metrics
        }
        for evaluation in EVALUATIONS:
            cells = [label, evaluation, str(len(values[evaluation, metrics[0]]))]
            for metric in metrics[:-1]:
                own, first = values[evaluation, metric], values[EVALUATIONS[0], metric]
                digits = decimals(f'coco/{metric}')
                cells.append(_spread(list(own.values()), digits))
                losses = [first[seed] - own[seed] for seed in own]
                cells.append(_spread(losses, digits) if evaluation != EVALUATIONS[0] else '')
            cells.append(_spread(list(values[evaluation, CHANGE].values()), 3) if evaluation != EVALUATIONS[0] else '')
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def _spread(values: list[float], digits: int) -> str:
    mean = f'{np.mean(values):.{digits}f}'
    return mean if len(values) < 2 else f'{mean} ± {np.std(values, ddof=1):.{digits}f}'
