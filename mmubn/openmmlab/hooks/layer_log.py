"""What a hook measures at every layer, in a file of the run; :func:`mmubn.analysis.runs.read_layer_log` reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

__all__ = ['LayerLog']


class LayerLog:
    """A file that a hook writes in the course of training: one line of JSON at a time, so that a kill loses no more.

    The first line has the names of the layers and the hook's settings, every other one the training step (iterations
    done), the epoch (whole epochs done) and lists with a value per layer; null where a layer has none.

    Args:
        path: The file; its folder is made.
        layers: Names of the L layers.
        settings: What else the first line says.
    """

    def __init__(self, path: Path, layers: list[str], **settings: object) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({'layers': layers, **settings}) + '\n')

    def append(self, step: int, epoch: int, **values: list[float]) -> None:
        """Add a line. Five digits are kept; NaN is null."""
        line = {'step': step, 'epoch': epoch}
        line |= {name: [_rounded(value) for value in each] for name, each in values.items()}
        with self._path.open('a') as file:
            file.write(json.dumps(line, separators=(',', ':')) + '\n')


def _rounded(value: float) -> float | None:
    return float(f'{value:.5g}') if math.isfinite(value) else None
