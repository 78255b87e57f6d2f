"""The main job, small and whole: make a data set, train Mask R-CNN with UBN, evaluate the checkpoint, show the results.

Every step is one of the project's own tools, printed as it is run. `make demo` calls this. The result of an earlier
demo is replaced at the end, and stays where this one fails or is interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from mmengine.config import Config
from PIL import Image
from rich.console import Console
from rich.table import Table

import mmubn  # noqa: F401 - registers UBN
from mmubn.analysis.demo import new_result
from mmubn.analysis.predictions import draw_predictions, last_checkpoint
from mmubn.cli import add_debug_argument, run_command, run_tool

matplotlib.use('Agg')
import matplotlib.pyplot as plt

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / 'configs' / 'digits' / 'mask-rcnn_r18_fpn_ubn_digits.py'
DATA = Path('data/digits')
WORK_DIR = Path('work_dirs/demo')
BATCH_SIZE = 8  # over all processes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_debug_argument(parser)
    return parser.parse_args()


def draw_sheet(run: Path, out_file: Path, count: int = 12, columns: int = 3) -> None:
    """Draw what the last checkpoint of a run predicts for the first validation images on one page."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            draw_predictions(Config.fromfile(run / CONFIG.name), last_checkpoint(run), Path(folder), count)
        images = [Image.open(path).convert('RGB') for path in sorted(Path(folder).iterdir(), key=_number)]
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.4 * columns, 3.6 * rows + 0.6), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image)
    figure.suptitle('Validation images: annotated (left) and predicted, with the score in % (right)', fontsize=18)
    figure.savefig(out_file, dpi=100)
    plt.close(figure)


def _number(path: Path) -> int:
    return int(path.name.partition('-')[0])


def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    # Two processes whatever the machine has, so that the demo goes through the distributed path.
    processes = min(2, torch.cuda.device_count()) or 2
    with new_result(WORK_DIR) as new:
        run_command(sys.executable, TOOLS / 'dataset_converters' / 'digits_to_coco.py', DATA)
        options = ['--cfg-options', f'train_dataloader.batch_size={BATCH_SIZE // processes}']
        run_command(TOOLS / 'dist_train.sh', CONFIG, processes, '--work-dir', new, *options)
        show = ['--work-dir', new / 'test', '--show-dir', 'predictions']
        run_command(sys.executable, TOOLS / 'test.py', CONFIG, last_checkpoint(new), *show)
        run_command(sys.executable, TOOLS / 'analysis_tools' / 'plot_curves.py', new, '--out', new / 'curves.png')
        draw_sheet(new, new / 'predictions.png')

    test_run = sorted(path for path in (WORK_DIR / 'test').iterdir() if path.is_dir())[-1]
    metrics = json.loads((test_run / f'{test_run.name}.json').read_text())
    table = Table(title=f'UBN on real digits, {time.monotonic() - start:.0f} s on {processes} processes')
    table.add_column('what')
    table.add_column('value or place', overflow='fold')
    for kind in ('bbox', 'segm'):
        ap, ap50 = (metrics[f'coco/{kind}_mAP{suffix}'] for suffix in ('', '_50'))
        table.add_row(f'COCO {kind} AP (AP50)', f'{ap:.3f} ({ap50:.3f})')
    table.add_row('loss and AP curves', str(WORK_DIR / 'curves.png'))
    sheet = WORK_DIR / 'predictions.png'
    table.add_row('predicted images', f'{sheet}; all of them: {test_run / "predictions"}')
    table.add_row('annotated images', f'{DATA / "preview_train.png"}, {DATA / "preview_val.png"}')
    table.add_row('checkpoint', str(last_checkpoint(WORK_DIR)))
    table.add_row('config', str(CONFIG))
    table.add_row('training log', str(WORK_DIR))
    Console().print(table)


if __name__ == '__main__':
    run_tool(parse_args, main)
