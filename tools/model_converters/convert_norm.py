"""Convert the norm layers of a checkpoint to another state-dict layout of exactly the same function.

Every layer with running statistics is converted, from the layout that its keys say it has; the rest of the file stays
as it is. So do the plain BatchNorms of a file that has other norms too: the network has those in some places alone, and
keeps them there. Where a layer has no exact equal in the new layout, the tool says which and why, and writes nothing.
To load a checkpoint of BatchNorm, or of the authors' code, into a norm type of mmubn, nothing has to be converted: the
layers read these. See docs/checkpoints.md.

A layout is named as the norm type of mmubn that has it, or, with -released, as that of the authors' code. With
bnet-released the layers get their names in BNET's networks too: bnet3 for bn3, which any other layout has.

Examples:

    python tools/model_converters/convert_norm.py released_ubn.pth ubn.pth --to ubn --calibrate-bias
    python tools/model_converters/convert_norm.py epoch_12.pth released.pth --to ubn-released --calibrate-bias
    python tools/model_converters/convert_norm.py resnet50.pth resnet50_iebn.pth --to iebn-released
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch

from mmubn.checkpoints import LAYOUTS, CheckpointError, convert_state_dict, is_state_dict
from mmubn.cli import UsageError, add_debug_argument, add_trust_argument, check_file, run_tool
from mmubn.openmmlab.checkpoint_fit import some
from mmubn.openmmlab.hooks.checkpoint import AtomicLocalBackend

# Where MMEngine and torchvision keep state dicts in a checkpoint, those of averaged models included.
STATE_DICT_KEYS = ('state_dict', 'ema_state_dict', 'model', 'model_ema')


def parse_args() -> argparse.Namespace:
    description, examples = __doc__.split('\n\nExamples:')
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f'Examples:{examples}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('src', type=Path, help='checkpoint file to read')
    parser.add_argument('dst', type=Path, help='checkpoint file to write')
    parser.add_argument('--to', required=True, choices=LAYOUTS, help='layout to write')
    parser.add_argument(
        '--calibrate-bias',
        action='store_true',
        help='the UBN layers that were saved, or that will load the result, have calibrate_bias=True',
    )
    add_trust_argument(parser)
    add_debug_argument(parser)
    return parser.parse_args()


def read(path: Path) -> dict:
    check_file(str(path), 'the checkpoint', 'give the path of a file', folder=False)
    checkpoint = torch.load(path, map_location='cpu')
    if not isinstance(checkpoint, dict):
        raise UsageError(
            f'{path} holds a {type(checkpoint).__name__}, not a checkpoint; give a state dict or a checkpoint.'
        )
    return checkpoint


def convert(checkpoint: dict, to: str, calibrate_bias: bool) -> dict:
    """Convert each state dict of a checkpoint; print how many layers that are, and how many stay."""
    parts = {key: checkpoint[key] for key in STATE_DICT_KEYS if is_state_dict(checkpoint.get(key))}
    if not parts and is_state_dict(checkpoint):
        return convert({'state_dict': checkpoint}, to, calibrate_bias)['state_dict']
    if not parts:
        found = some([str(key) for key in checkpoint], 5) or 'nothing'
        raise UsageError(
            f'nothing was written: the file has no state dict, itself or as {", ".join(STATE_DICT_KEYS)}; it holds '
            f'{found}.'
        )
    converted = {}
    for key, state_dict in parts.items():
        try:
            converted[key], counts, kept = convert_state_dict(state_dict, to, calibrate_bias)
        except CheckpointError as error:
            raise UsageError(f'nothing was written: {error}') from error
        if not counts:
            raise UsageError(f'nothing was written: {key} has no norm layer with running statistics.')
        sources = ', '.join(f'{count} from {title}' for title, count in counts.items())
        stay = f'; BatchNorms left as they are: {kept}' if kept else ''
        print(f'{key}: {counts.total()} layers to {LAYOUTS[to].title}: {sources}{stay}')
    return {**checkpoint, **converted}


def check_destination(src: Path, dst: Path) -> None:
    if dst.is_dir():
        raise UsageError(f'{dst} is a folder; give the path of the file to write.')
    if not dst.absolute().parent.is_dir():
        raise UsageError(f'the folder of {dst} does not exist; make it first.')
    if dst.exists() and src.exists() and dst.samefile(src):
        raise UsageError(f'{dst} is the file to read, too; write to another one.')


def write(checkpoint: dict, path: Path) -> None:
    """Write the file whole, or leave what was there."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    try:
        AtomicLocalBackend().put(content.getvalue(), path)
    except OSError as error:
        raise UsageError(
            f'{path} could not be written: {error.strerror or error}; make room there, or give another path.'
        ) from error


def main(args: argparse.Namespace) -> None:
    check_destination(args.src, args.dst)
    checkpoint = read(args.src)
    write(convert(checkpoint, args.to, args.calibrate_bias), args.dst)
    print(f'wrote {args.dst}')
    if 'optimizer' in checkpoint:
        print("The optimizer's state is that of the old layers: load the file, but do not resume from it.")


if __name__ == '__main__':
    run_tool(parse_args, main)
