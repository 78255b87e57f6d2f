"""What the last checkpoint of a run predicts for the first validation images, drawn by the visualizer of its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from matplotlib.text import Text
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.structures import BaseDataElement, InstanceData
from mmengine.visualization import Visualizer

from mmubn.analysis.plots import plt
from mmubn.cli import UsageError, check_paths

__all__ = ['draw_predictions', 'draw_sample', 'enlarge', 'last_checkpoint', 'name_halves']

SIDE = 512  # pixels; a smaller image of a detector is enlarged to about this, so that labels are small beside objects
HALVES = ('annotated', 'predicted')


def last_checkpoint(run: Path) -> Path:
    """Find the checkpoint that ``last_checkpoint`` names, the work dir's own where that was moved or copied.

    Raises:
        UsageError: There is no such checkpoint.
    """
    note = run / 'last_checkpoint'
    if not note.is_file():
        raise UsageError(f'{note} does not exist.')
    named = Path(note.read_text(errors='replace').strip())
    checkpoint = run / named.name
    if not checkpoint.is_file() and named.is_file():  # of a checkpoint hook with an out_dir
        checkpoint = named
    if not checkpoint.is_file():
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
        visualizer = _build_visualizer(cfg, f'predictions of {checkpoint}')
        visualizer.dataset_meta = dataset.metainfo
        for i in range(min(count, len(dataset))):
            data = dataset[i]
            (sample,) = model.test_step(pseudo_collate([data]))
            draw_sample(visualizer, data, sample, folder, i)


class _LabelsBeside:
    """Mixin of a visualizer of boxes: a label stands on its box, not in it, beside others and within the picture."""

    def draw_texts(self, texts: Any, positions: Any, *args: Any, **kwargs: Any) -> Visualizer:
        before = len(self.ax_save.texts)
        if isinstance(kwargs.get('font_sizes'), int):
            # MMDetection's size goes by the box alone, and is a few pixels for a small one.
            kwargs['font_sizes'] = max(kwargs['font_sizes'], max(self.width, self.height) // 36)
        super().draw_texts(texts, positions, *args, **kwargs)
        inside = getattr(self, 'line_width', 0)  # as far as MMDetection goes into the box
        others = [self._frame(text) for text in self.ax_save.texts[:before]]
        for text in self.ax_save.texts[before:]:
            left, top, width, height = self._frame(text)
            left = np.clip(left - inside, 0, max(self.width - width, 0))
            top = max(top - inside - height, 0)
            for x, y, w, h in sorted(others, key=lambda other: -other[1]):  # from below
                if left < x + w and x < left + width and top < y + h and y < top + height:
                    left, top = (left, y - height) if y >= height else (min(x + w, self.width - width), top)
            text.set_position((left + 1, top + 1))
        return self

    def _frame(self, text: Text) -> tuple[float, float, float, float]:
        """Return left, top, width and height in pixels of the image."""
        extent = text.get_window_extent(self.fig_save_canvas.get_renderer())
        frame = self.ax_save.transData.inverted().transform_bbox(extent)
        left, top = min(frame.x0, frame.x1), min(frame.y0, frame.y1)
        return left - 1, top - 1, abs(frame.width) + 2, abs(frame.height) + 2


def _build_visualizer(cfg: Config, name: str) -> Visualizer:
    # Of a name of its own: one that exists would be taken, with where it writes.
    arguments = {**cfg.visualizer, 'vis_backends': None, 'name': name}
    visualizer = VISUALIZERS.build(arguments)
    if not hasattr(visualizer, 'visualize_cls'):  # MMPretrain's, which draws no boxes
        kind = type(visualizer)
        visualizer.__class__ = type(kind.__name__, (_LabelsBeside, kind), {})
    return visualizer


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
        image, sample = enlarge(image, sample)
        visualizer.add_datasample(name, image, sample, out_file=out_file)
        drawn = mmcv.imread(out_file)
        if drawn.shape[1] == 2 * image.shape[1]:  # as MMDetection draws it
            mmcv.imwrite(name_halves(drawn), out_file)


def enlarge(image: np.ndarray, sample: BaseDataElement) -> tuple[np.ndarray, BaseDataElement]:
    """Enlarge a small image, with the boxes and masks of its sample, by a whole factor.

    Args:
        image: (H, W, 3) uint8.
        sample: Instances are enlarged in a copy of it. One with a segmentation of all pixels stays as it is, with its
            image.

    Returns:
        The image (f * H, f * W, 3) and its sample.
    """
    height, width = image.shape[:2]
    factor = round(SIDE / max(height, width))
    if factor < 2 or any('seg' in key for key in set(sample.keys())):
        return image, sample
    size = (factor * height, factor * width)
    sample = sample.cpu().clone()
    for instances in sample.values():
        if isinstance(instances, InstanceData):
            if 'bboxes' in instances:
                boxes = instances.bboxes
                instances.bboxes = getattr(boxes, 'tensor', boxes) * factor
            if 'masks' in instances:
                masks = instances.masks
                if hasattr(masks, 'resize') and not isinstance(masks, (np.ndarray, torch.Tensor)):
                    instances.masks = masks.resize(size)
                else:
                    instances.masks = np.asarray(masks).repeat(factor, 1).repeat(factor, 2)
    return mmcv.imresize(image, size[::-1], interpolation='nearest'), sample


def name_halves(image: np.ndarray) -> np.ndarray:
    """Say above a picture that MMDetection drew which half of it is annotated and which is predicted.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (H + h, W, 3) uint8, with a line between the halves.
    """
    width = image.shape[1]
    strip = np.full((max(14, width // 24), width, 3), 255, np.uint8)
    scale = strip.shape[0] / 40
    for left, text in zip((0, width // 2), HALVES, strict=True):
        (length, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        place = (left + (width // 2 - length) // 2, (strip.shape[0] + height) // 2)
        thickness = max(1, round(scale))
        cv2.putText(strip, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), thickness, cv2.LINE_AA)
    image = np.concatenate([strip, image])
    line = max(1, width // 400)
    image[:, width // 2 - line // 2 :][:, :line] = 0
    return image
