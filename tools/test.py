"""Evaluate a checkpoint, as MMDetection's tool of this name does; UBN is registered, and CPU processes work too.

Example:

    python tools/test.py configs/faster_rcnn/faster-rcnn_r50_fpn_ubn-backbone_1x_coco.py work_dirs/run/epoch_12.pth
"""

import argparse
import copy
import re
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric, DumpResults
from mmengine.registry import MODELS
from mmengine.runner import Runner

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
from mmubn.openmmlab.config_types import find_dicts, find_type
from mmubn.openmmlab.hooks.checkpoint_fit import CheckpointFitHook

# The parts of a detector that give masks.
MASKS = {'mask_head', 'mask_feat_head', 'panoptic_head', 'panoptic_fusion_head'}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], epilog='See README.md.', formatter_class=argparse.RawTextHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    add_run_arguments(parser)
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to a pickle file')
    parser.add_argument('--show', action='store_true', help='show the predictions in windows')
    parser.add_argument('--show-dir', help='draw the predictions into WORK_DIR/TIMESTAMP/SHOW_DIR')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows an image')
    parser.add_argument(
        '--allow-partial',
        action='store_true',
        help='evaluate a checkpoint that does not fit the model too, with random weights for what it lacks',
    )
    parser.add_argument(
        '--tta', action='store_true', help="test with flipped images too, or as the config's tta_model says"
    )
    add_trust_argument(parser)
    add_debug_argument(parser)
    return parser.parse_args()


def is_of(cfg: Config, package: str) -> bool:
    """Whether the model is one of this package, such as mmdet or mmpretrain, or made from one of its classes."""
    with MODELS.switch_scope_and_registry(cfg.get('default_scope') or 'mmengine') as registry:
        kind = find_type(cfg.model.get('type'), registry)
    return isinstance(kind, type) and any(base.__module__.partition('.')[0] == package for base in kind.__mro__)


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the visualization hook that every MMDetection and MMPretrain config has among its default hooks."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError(f'--show and --show-dir need a visualization hook in default_hooks of {args.config}.')
    # The two packages name the same switches differently.
    classifies = is_of(cfg, 'mmpretrain')
    hook['enable' if classifies else 'draw'] = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    if classifies:
        hook.interval = 1  # every image, as MMDetection's hook does
    elif args.show_dir and is_of(cfg, 'mmseg'):
        # MMSegmentation's hook has no folder of its own: the backends that write files have one, beside their own.
        backends = [
            each for _, each in find_dicts(cfg.get('visualizer') or {}) if 'LocalVisBackend' in str(each.get('type'))
        ]
        if not backends:
            raise UsageError(f'--show-dir needs a LocalVisBackend among the vis_backends of {args.config}.')
        for backend in backends:
            backend.img_save_dir = str(Path('..', args.show_dir))
    elif args.show_dir:
        hook.test_out_dir = args.show_dir


def place_drawings(runner: Runner, folder: str) -> None:
    """Put MMPretrain's drawings, as MMDetection's are, into the folder of the run."""
    from mmpretrain.engine.hooks import VisualizationHook  # a detector needs no MMPretrain

    for hook in runner.hooks:
        if isinstance(hook, VisualizationHook):
            hook.out_dir = str(Path(runner.work_dir, runner.timestamp, folder))


def use_test_time_augmentation(cfg: Config) -> None:
    """Wrap the model as ``tta_model`` and ``tta_pipeline`` say; by default, merge the image and its mirror image."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_model' not in cfg:
        scope = cfg.get('default_scope')
        if is_of(cfg, 'mmpretrain'):
            cfg.tta_model = dict(
                type='AverageClsScoreTTA' if scope == 'mmpretrain' else 'mmpretrain.AverageClsScoreTTA'
            )
        elif is_of(cfg, 'mmdet'):
            nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
            cfg.tta_model = dict(type='DetTTAModel' if scope == 'mmdet' else 'mmdet.DetTTAModel', tta_cfg=nms)
        else:
            raise UsageError(
                '--tta merges the predictions of classifiers of MMPretrain and of detectors of MMDetection, and '
                f'{cfg.model.get("type")} is neither: set tta_model (and tta_pipeline) in the config.'
            )
    if str(cfg.tta_model.get('type')).rpartition('.')[2] == 'DetTTAModel':
        check_boxes_alone(cfg)
    if 'tta_pipeline' not in cfg:
        pipeline = copy.deepcopy(dataset.pipeline)
        pack = copy.deepcopy(pipeline[-1])
        meta_keys = pack.get('meta_keys', ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
        pack.meta_keys = (*meta_keys, 'flip', 'flip_direction')
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [pack]])
        cfg.tta_pipeline = pipeline
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def check_boxes_alone(cfg: Config) -> None:
    """MMDetection's DetTTAModel merges boxes, and raises in the first image where there are masks."""
    places = [place for place, _ in find_dicts(cfg.model, 'model') if MASKS & set(place.split('.'))]
    places += [
        f'{place}.type={node["type"]}'
        for place, node in find_dicts(cfg.model, 'model')
        if isinstance(node.get('type'), str) and re.search(r'Ins(Sep\w*)?Head$', node['type'])
    ]
    if not places:
        return
    remedy = 'test without --tta, or set a tta_model in the config that merges masks'
    if any(place.startswith('model.roi_head.mask_head') for place in places):
        remedy = (
            'test without --tta, or its boxes alone: --allow-partial --cfg-options model.roi_head.mask_head=None '
            'model.roi_head.mask_roi_extractor=None test_evaluator.metric=bbox'
        )
    raise UsageError(
        f'--tta merges boxes, by DetTTAModel of MMDetection, and the model has masks ({places[0]}): {remedy}.'
    )


def main(args: argparse.Namespace) -> None:
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise UsageError(f'--out must end in .pkl or .pickle, got {args.out}.')
    cfg = load_config(args)
    set_run(cfg, args)
    cfg.load_from, cfg.resume = args.checkpoint, False  # the copy of the config of a resumed run says True
    remedy = 'train one with tools/train.py, or give the path of an existing one'
    # DeepSpeed, which needs another runner, saves folders.
    check_file(args.checkpoint, 'the checkpoint', remedy, folder='runner_type' in cfg)
    check_paths(cfg, splits=('test',), pretrained=False)
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    classifies, detects = is_of(cfg, 'mmpretrain'), is_of(cfg, 'mmdet')
    if args.tta and classifies and (args.show or args.show_dir):
        raise UsageError('--show and --show-dir draw one image, and --tta gives a classifier several: leave one out.')
    if args.tta:
        use_test_time_augmentation(cfg)
    remedy = 'give the config that it was trained with, or, if you mean it, add --allow-partial'
    runner = build_runner(cfg, CheckpointFitHook(whole=not args.allow_partial, remedy=remedy), splits=('test',))
    if args.show_dir and classifies:
        place_drawings(runner, args.show_dir)
    if args.out is not None:
        runner.test_evaluator.metrics.append(_dumper(detects)(out_file_path=args.out))
    metrics = runner.test()
    if not metrics and any(_measures(each) for each in runner.test_evaluator.metrics):
        raise UsageError(
            'the evaluation gave no metric: MMDetection measures none where not one object was found in all images. '
            'Has the model learned anything? Is model.test_cfg (score_thr) right?'
        )


def _measures(metric: BaseMetric) -> bool:
    return not isinstance(metric, DumpResults) and not getattr(metric, 'format_only', False)


def _dumper(detects: bool) -> type[DumpResults]:
    if not detects:
        return DumpResults
    from mmdet.evaluation import DumpDetResults  # encodes masks, which are large

    return DumpDetResults


if __name__ == '__main__':
    run_tool(parse_args, main)
