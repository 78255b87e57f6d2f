"""Turn scikit-learn's handwritten digits into a COCO-format data set for detection and instance segmentation.

The 1,797 digits (8x8 pixels, written by 43 people; UCI "Optical Recognition of Handwritten Digits") come with
scikit-learn, so nothing is downloaded. They are split into train and val digits first; every image is then composed
of digits of its own split, so no digit is in both. Digits are enlarged, pasted without overlap at random places on a
canvas and annotated with a box and a mask (COCO RLE) of the ink. The same arguments give the same bytes.

The result is laid out like COCO, so that any COCO config takes it by its `data_root`:

    OUT_DIR/annotations/instances_{train,val}2017.json
    OUT_DIR/{train,val}2017/000000000001.png ...
    OUT_DIR/preview_{train,val}.png             a few images with their annotations drawn

Example:

    python tools/dataset_converters/digits_to_coco.py data/digits
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from sklearn.datasets import load_digits
from tqdm import tqdm

matplotlib.use('Agg')
import matplotlib.pyplot as plt

SPLITS = ('train', 'val')
INK = 0.35  # share of full ink from which a pixel belongs to the digit
PLACES = 50  # random places tried for a digit before the image is left with the digits it has


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Make a COCO-format detection set of handwritten digits.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('out_dir', type=Path, help='folder to write; must be new, or made by this command')
    parser.add_argument('--num-train', type=int, default=600, help='number of training images')
    parser.add_argument('--num-val', type=int, default=100, help='number of validation images')
    parser.add_argument('--canvas', type=int, default=128, help='width and height of an image, in pixels')
    parser.add_argument(
        '--digits', type=int, nargs=2, default=(3, 6), metavar=('MIN', 'MAX'), help='number of digits in an image'
    )
    parser.add_argument(
        '--size', type=int, nargs=2, default=(24, 48), metavar=('MIN', 'MAX'), help='side of a pasted digit, in pixels'
    )
    parser.add_argument('--val-share', type=float, default=0.25, help='share of the 1,797 digits kept for validation')
    parser.add_argument('--seed', type=int, default=0, help='seed of the split and of the composition')
    args = parser.parse_args()
    for name in ('num_train', 'num_val', 'canvas'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be positive, got {getattr(args, name)}')
    for name in ('digits', 'size'):
        low, high = getattr(args, name)
        if not 1 <= low <= high:
            parser.error(f'--{name} must be MIN MAX with 1 <= MIN <= MAX, got {low} {high}')
    if args.size[0] < 8:
        parser.error(f'--size must be at least 8, the size of the original digits, got {args.size[0]}')
    if args.size[1] > args.canvas:
        parser.error(f'--size {args.size[1]} does not fit the canvas of {args.canvas}; use a larger --canvas')
    if not 0 < args.val_share < 1:
        parser.error(f'--val-share must be between 0 and 1, got {args.val_share}')
    if args.out_dir.exists() and any(args.out_dir.iterdir()) and not (args.out_dir / 'annotations').is_dir():
        parser.error(f'{args.out_dir} holds other files; give a new folder')
    return args


def compose(digits: np.ndarray, args: argparse.Namespace, rng: np.random.Generator):
    """Compose one image: (grey canvas in [0, 255], list of (index of the digit, mask))."""
    canvas = np.zeros((args.canvas, args.canvas), dtype=np.float32)
    taken = np.zeros(canvas.shape, dtype=bool)
    placed = []
    for index in rng.choice(len(digits), size=rng.integers(*args.digits, endpoint=True), replace=False):
        side = int(rng.integers(*args.size, endpoint=True))
        ink = Image.fromarray(digits[index].astype(np.float32) / 16).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(ink).clip(0, 1)
        for _ in range(PLACES):
            top, left = rng.integers(0, args.canvas - side, size=2, endpoint=True)
            window = np.s_[top : top + side, left : left + side]
            if not taken[window].any():
                canvas[window] = ink
                taken[window] = True
                mask = np.zeros(canvas.shape, dtype=np.uint8)
                mask[window] = ink >= INK
                placed.append((int(index), mask))
                break
    # Paper is not one colour and ink not one strength.
    paper, strength = rng.uniform(0.6, 1.0), rng.uniform(0.5, 0.9)
    image = paper - strength * paper * canvas + rng.normal(0, 0.03, canvas.shape)
    return (255 * image.clip(0, 1)).round().astype(np.uint8), placed


def write_split(split: str, count: int, digits: np.ndarray, labels: np.ndarray, indices: np.ndarray, args) -> Path:
    """Compose and write ``count`` images of the digits at ``indices``; return the path of their annotations."""
    rng = np.random.default_rng([args.seed, SPLITS.index(split)])
    folder = args.out_dir / f'{split}2017'
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob('*.png'):
        old.unlink()
    images, annotations = [], []
    for image_id in tqdm(range(1, count + 1), desc=f'{split} images', file=sys.stdout):
        pixels, placed = compose(digits[indices], args, rng)
        name = f'{image_id:012d}.png'
        Image.fromarray(pixels).convert('RGB').save(folder / name, optimize=False)
        images.append({'id': image_id, 'file_name': name, 'width': args.canvas, 'height': args.canvas})
        for index, mask in placed:
            rle = coco_mask.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'category_id': int(labels[indices[index]]) + 1,
                    'bbox': [float(v) for v in coco_mask.toBbox(rle)],
                    'area': float(coco_mask.area(rle)),
                    'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode()},
                    'iscrowd': 0,
                    'digit_index': int(indices[index]),  # which of scikit-learn's digits this is
                }
            )
    path = args.out_dir / 'annotations' / f'instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    content = {
        'info': {'description': "scikit-learn's handwritten digits on canvases", 'seed': args.seed},
        'licenses': [],
        'categories': [{'id': d + 1, 'name': str(d), 'supercategory': 'digit'} for d in range(10)],
        'images': images,
        'annotations': annotations,
    }
    path.write_text(json.dumps(content))
    return path


def draw_preview(annotation_file: Path, folder: Path, out_file: Path, count: int = 8) -> None:
    """Draw the first images with the annotations that pycocotools reads for them."""
    coco = COCO(annotation_file)
    ids = sorted(coco.getImgIds())[:count]
    figure, axes = plt.subplots(2, -(-len(ids) // 2), figsize=(12, 6.5), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, image_id in zip(axes.flat, ids, strict=False):
        info = coco.loadImgs(image_id)[0]
        axis.imshow(Image.open(folder / info['file_name']))
        axis.set_title(info['file_name'], fontsize=8)
        for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
            colour = plt.get_cmap('tab10')(annotation['category_id'] - 1)
            x, y, w, h = annotation['bbox']
            axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=colour))
            name = coco.loadCats(annotation['category_id'])[0]['name']
            axis.text(
                x, y - 1, name, color='white', fontsize=9, va='bottom', bbox={'fc': colour, 'ec': 'none', 'pad': 1}
            )
            overlay = np.zeros((info['height'], info['width'], 4))
            overlay[coco.annToMask(annotation) > 0] = (*colour[:3], 0.45)
            axis.imshow(overlay)
    figure.suptitle(f'{annotation_file.name}: boxes and masks as annotated')
    figure.tight_layout()
    # Without the metadata the same data gives the same bytes under any version of Matplotlib's banner.
    figure.savefig(out_file, dpi=80, metadata={'Software': None})
    plt.close(figure)


def main() -> None:
    args = parse_args()
    bunch = load_digits()
    order = np.random.default_rng(args.seed).permutation(len(bunch.target))
    num_val_digits = max(1, round(args.val_share * len(order)))
    splits = {
        'train': (args.num_train, np.sort(order[num_val_digits:])),
        'val': (args.num_val, np.sort(order[:num_val_digits])),
    }
    for split, (count, indices) in splits.items():
        annotation_file = write_split(split, count, bunch.images, bunch.target, indices, args)
        draw_preview(annotation_file, args.out_dir / f'{split}2017', args.out_dir / f'preview_{split}.png')
        print(f'{split}: {count} images of {len(indices)} digits in {annotation_file}')


if __name__ == '__main__':
    main()
