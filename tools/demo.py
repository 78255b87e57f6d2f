"""The main job, small and whole: make a data set, train Mask R-CNN with UBN, evaluate the checkpoint, show the results.

Every step is one of the project's own tools, printed as it is run. `make demo` calls this.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

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


def draw_sheet(folder: Path, out_file: Path, count: int = 12, columns: int = 3) -> None:
    """Draw the first images of a folder on one page."""
    images = sorted(folder.glob('*.png'))[:count]
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, path in zip(axes.flat, images, strict=False):
        image = Image.open(path)
        axis.imshow(image)
        axis.axvline(image.width / 2, color='black', linewidth=1)
    figure.suptitle('Validation images: annotated (left) and predicted (right)')
    figure.tight_layout()
    figure.savefig(out_file, dpi=100)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    # Two processes whatever the machine has, so that the demo goes through the distributed path.
    processes = min(2, torch.cuda.device_count()) or 2
    shutil.rmtree(WORK_DIR, ignore_errors=True)

    run_command(sys.executable, TOOLS / 'dataset_converters' / 'digits_to_coco.py', DATA)
    options = ['--cfg-options', f'train_dataloader.batch_size={BATCH_SIZE // processes}']
    run_command(TOOLS / 'dist_train.sh', CONFIG, processes, '--work-dir', WORK_DIR, *options)
    checkpoint = Path((WORK_DIR / 'last_checkpoint').read_text())
    run_command(
        sys.executable,
        TOOLS / 'test.py',
        CONFIG,
        checkpoint,
        '--work-dir',
        WORK_DIR / 'test',
        '--show-dir',
        'predictions',
    )
    run_command(sys.executable, TOOLS / 'analysis_tools' / 'plot_curves.py', WORK_DIR, '--out', WORK_DIR / 'curves.png')

    test_run = sorted(path for path in (WORK_DIR / 'test').iterdir() if path.is_dir())[-1]
    sheet = WORK_DIR / 'predictions.png'
    draw_sheet(test_run / 'predictions', sheet)
    metrics = json.loads((test_run / f'{test_run.name}.json').read_text())

    table = Table(title=f'UBN on real digits, {time.monotonic() - start:.0f} s on {processes} processes')
    table.add_column('what')
    table.add_column('value or place', overflow='fold')
    for kind in ('bbox', 'segm'):
        ap, ap50 = (metrics[f'coco/{kind}_mAP{suffix}'] for suffix in ('', '_50'))
        table.add_row(f'COCO {kind} AP (AP50)', f'{ap:.3f} ({ap50:.3f})')
    table.add_row('loss and AP curves', str(WORK_DIR / 'curves.png'))
    table.add_row('predicted images', f'{sheet}; all of them: {test_run / "predictions"}')
    table.add_row('annotated images', f'{DATA / "preview_train.png"}, {DATA / "preview_val.png"}')
    table.add_row('checkpoint', str(checkpoint))
    table.add_row('config', str(CONFIG))
    table.add_row('training log', str(WORK_DIR))
    Console().print(table)


if __name__ == '__main__':
    run_tool(parse_args, main)
