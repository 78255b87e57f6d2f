"""What the last checkpoint of a run predicts for the first validation images, drawn by the visualizer of its config."""

from __future__ import annotations

from pathlib import Path

import mmcv
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer

from mmubn.analysis.plots import plt
from mmubn.cli import UsageError, check_paths

__all__ = ['draw_predictions', 'draw_sample', 'last_checkpoint']


def last_checkpoint(run: Path) -> Path:
    """Find the checkpoint that ``last_checkpoint`` names, also in a work dir that was moved.

    Raises:
        UsageError: There is no such checkpoint.
    """
    note = run / 'last_checkpoint'
    if not note.exists():
        raise UsageError(f'{note} does not exist.')
    checkpoint = Path(note.read_text().strip())
    checkpoint = checkpoint if checkpoint.exists() else run / checkpoint.name
    if not checkpoint.exists():
        raise UsageError(f'{checkpoint}, which {note} names, does not exist.')
    return checkpoint


def draw_predictions(cfg: Config, checkpoint: Path, folder: Path, count: int) -> None:
    """Draw predictions for the first ``count`` validation images into ``folder``, in the order of their file names.

    Raises:
        UsageError: The config has no validation data, or the data are not there.
    """
    if cfg.get('val_dataloader') is None:
        raise UsageError('the config has no val_dataloader.')
    check_paths(cfg, splits=('val',), pretrained=False)
    # The visualizers draw with Matplotlib, and not in the style of our plots.
    with plt.style.context('default'), torch.no_grad():
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
        model = MODELS.build(cfg.model).to(get_device()).eval()
        load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True)
        # Of a name of its own: one that exists would be taken, with where it writes.
        visualizer = VISUALIZERS.build({**cfg.visualizer, 'vis_backends': None, 'name': f'predictions of {checkpoint}'})
        visualizer.dataset_meta = dataset.metainfo
        for i in range(min(count, len(dataset))):
            data = dataset[i]
            (sample,) = model.test_step(pseudo_collate([data]))
            draw_sample(visualizer, data, sample, folder, i)


def draw_sample(visualizer: Visualizer, data: dict, sample: BaseDataElement, folder: Path, index: int) -> None:
    """Draw one prediction; ``data`` has the image where the sample names no file."""
    if 'img_path' in sample:
        name, image = Path(sample.img_path).stem, mmcv.imread(sample.img_path, channel_order='rgb')
    else:  # data sets that are one file, such as CIFAR
        name, image = 'image', data['inputs'].permute(1, 2, 0).numpy()
    out_file = str(folder / f'{index + 1}-{name}.png')
    if hasattr(visualizer, 'visualize_cls'):  # MMPretrain
        visualizer.visualize_cls(image, sample, resize=224, out_file=out_file)
    else:
        visualizer.add_datasample(name, image, sample, out_file=out_file)
