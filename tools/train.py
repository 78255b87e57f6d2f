"""Train a model from a config, as MMDetection's tool of this name does; UBN is registered, and CPU processes work too.

Examples:

    python tools/train.py configs/faster_rcnn/faster-rcnn_r50_fpn_ubn-backbone_1x_coco.py
    python tools/train.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --cfg-options model.backbone.norm_cfg.type=UBN
"""

import argparse

import mmubn  # noqa: F401 - registers UBN for configs that do not import it
from mmubn.cli import (
    UsageError,
    add_config_arguments,
    add_debug_argument,
    add_run_arguments,
    add_trust_argument,
    build_runner,
    check_file,
    check_paths,
    load_config,
    run_tool,
    set_run,
)
from mmubn.openmmlab.mixed_precision import use_mixed_precision
from mmubn.openmmlab.resumption import find_last_checkpoint, make_resumable


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], epilog='See README.md.', formatter_class=argparse.RawTextHelpFormatter
    )
    add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision (bfloat16 where there is no GPU)')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the total batch size (linear rule)'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint; without a value, from the last one in the work dir, if any',
    )
    add_trust_argument(parser)
    add_debug_argument(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args)
    set_run(cfg, args)
    for key in ('max_epochs', 'max_iters', 'val_interval'):
        if (cfg.get('train_cfg') or {}).get(key) == 0:  # MMEngine would train nothing, or divide by it
            raise UsageError(f'train_cfg.{key} is 0: expected at least 1.')
    if args.amp:
        use_mixed_precision(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UsageError(f'--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in {args.config}.')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        if args.resume != 'auto':
            cfg.load_from = args.resume
    seeks_last = cfg.get('resume') and (args.resume == 'auto' or not cfg.get('load_from'))
    last = find_last_checkpoint(cfg) if seeks_last else None
    if last is None and cfg.get('load_from'):
        # DeepSpeed, which needs another runner, saves folders.
        check_file(cfg.load_from, 'the checkpoint', 'give the path of an existing one', folder='runner_type' in cfg)
    check_paths(cfg, splits=('train', 'val'), pretrained=True)
    make_resumable(cfg)
    runner = build_runner(cfg, splits=('train', 'val'))
    if seeks_last:
        runner._resume, runner._load_from = last is not None, last or cfg.get('load_from')
        if last is None:
            runner.logger.info(f'mmubn: no checkpoint to resume from in {cfg.work_dir}: the run starts anew.')
    runner.train()


if __name__ == '__main__':
    run_tool(parse_args, main)
