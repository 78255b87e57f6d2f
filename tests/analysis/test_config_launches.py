"""mmubn.analysis.config_launches: what the norms of a config are given, without data, weights or a GPU."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

pytest.importorskip('triton')

from mmubn.analysis.config_launches import (
    Scales,
    calls_of,
    launches_of,
    launches_of_probe,
    scales_of,
    sizes_of,
    splits_of,
)
from mmubn.analysis.kernel_cache import variants_of
from mmubn.openmmlab.errors import ConfigError
from mmubn.ops.triton import probe, runtime
from mmubn.ops.triton.backend import TritonBackend

ROOT = Path(__file__).parents[2]

PIPELINES = {
    'keeps the shape': ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], Scales(800, 1333)),
    'one number': ([dict(type='Resize', scale=256)], (256, 256)),
    'width, height': ([dict(type='mmdet.Resize', scale=(640, 480), keep_ratio=False)], (480, 640)),
    'several scales': (
        [dict(type='RandomChoiceResize', scales=[(1333, 640), (1333, 800)], keep_ratio=True)],
        Scales(640, 1333),
    ),
    'a range of scales': ([dict(type='RandomResize', scale=[(1333, 640), (1333, 800)])], Scales(640, 1333)),
    'a range of ratios': ([dict(type='RandomResize', scale=(1000, 500), ratio_range=(0.5, 2))], Scales(250, 2000)),
    'cropped at the end': (
        [dict(type='ResizeEdge', scale=256, edge='short'), dict(type='CenterCrop', crop_size=224)],
        (224, 224),
    ),
    'crop of height, width': ([dict(type='RandomCrop', crop_size=(96, 128))], (96, 128)),
    'relative crop': (
        [dict(type='Resize', scale=64), dict(type='RandomCrop', crop_size=(0.3, 0.3), crop_type='relative_range')],
        (64, 64),
    ),
    'padded at the end': (
        [dict(type='RandomResize', scale=(1280, 1280), ratio_range=(0.1, 2)), dict(type='Pad', size=(640, 320))],
        (320, 640),
    ),
}


@pytest.mark.parametrize('name', PIPELINES)
def test_scales(name):
    pipeline, expected = PIPELINES[name]
    flip = dict(type='RandomFlip', prob=0.5)
    assert scales_of([dict(type='LoadImageFromFile'), *pipeline, flip]) == expected


def test_a_pipeline_that_says_nothing():
    """Then images are as in the other split."""
    assert scales_of([dict(type='LoadImageFromFile')]) is None
    cfg = config('digits/resnet18-ubn_digits.py')
    assert [split.sizes for split in splits_of(cfg)] == [((32, 32),)] * 2
    cfg.train_dataloader.dataset.pipeline = cfg.val_dataloader.dataset.pipeline
    with pytest.raises(ConfigError, match='--sizes'):
        splits_of(cfg)


def test_several_sizes():
    with pytest.raises(ConfigError, match='RandomChoiceResize'):
        scales_of([dict(type='RandomChoiceResize', scales=[(64, 64), (32, 32)])])


def test_sizes():
    assert list(sizes_of((33, 64), 32)) == [(64, 64)]
    found = list(sizes_of(Scales(800, 1333), 32))
    assert len(found) == len(set(found))
    for usual in ((800, 800), (800, 1344), (1344, 800), (1344, 1344), (832, 1216), (416, 1344)):
        assert usual in found
    assert (768, 1312) not in found  # the long side could be longer
    with pytest.raises(ConfigError, match='multiples of 1'):
        list(sizes_of(Scales(800, 1333), 1))


def config(path, **overrides):
    cfg = Config.fromfile(ROOT / 'configs' / path)
    cfg.merge_from_dict(overrides)
    return cfg


def test_splits():
    cfg = config('faster_rcnn/faster-rcnn_r50_fpn_ubn-backbone_1x_coco.py')
    train, val = splits_of(cfg)
    assert (train.training, train.dtype, train.batch_size) == (True, torch.float32, 2)
    assert (val.training, val.dtype, val.batch_size) == (False, torch.float32, 1)
    assert (800, 1344) in train.sizes
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    assert [split.dtype for split in splits_of(cfg)] == [torch.float16, torch.float32]
    cfg.optim_wrapper.dtype = 'bfloat16'
    assert [split.dtype for split in splits_of(cfg)] == [torch.bfloat16, torch.float32]
    asked = splits_of(cfg, [torch.float32, torch.float16], [(64, 96)])
    assert [(split.training, split.dtype) for split in asked] == [
        (training, dtype) for training in (True, False) for dtype in (torch.float32, torch.float16)
    ]
    assert {split.sizes for split in asked} == {((64, 96),)}


def test_the_inputs_of_a_detector_s_norms():
    """Frozen stages are given no gradient; ``norm_eval`` evaluates; norms that are alike count once."""
    cfg = config('digits/mask-rcnn_r18_fpn_ubn_digits.py', **{'model.backbone.frozen_stages': 1})
    splits = splits_of(cfg, sizes=[(64, 96)])
    found, others = calls_of(cfg, splits)
    assert others == []
    training, evaluation = (found[split] for split in splits)
    n = splits[0].batch_size
    assert {call.shape for call in training} == {
        (n, 32, 32, 48), (n, 32, 16, 24), (n, 64, 8, 12), (n, 128, 4, 6), (n, 256, 2, 3)
    }  # fmt: skip
    assert all(call.wants_gradient == (call.shape[1] > 32) for call in training)
    assert not any(call.training or call.wants_gradient for call in evaluation)

    def names(call):
        launches = launches_of(call, torch.bfloat16, torch.channels_last)
        assert {a.dtype for launch in launches for a in launch.arguments[:1]} >= {torch.bfloat16}
        return {launch.kernel.fn.__name__ for launch in launches}

    assert '_input_gradient_kernel' in names(training[-1])
    assert '_input_gradient_kernel' not in names(training[0])
    assert '_apply_kernel' in names(evaluation[0])


def test_a_model_without_our_norms():
    cfg = config('digits/mask-rcnn_r18_fpn_ubn_digits.py', **{'model.backbone.norm_cfg.type': 'BN'})
    with pytest.raises(ConfigError, match='no norm of mmubn'):
        calls_of(cfg, splits_of(cfg, sizes=[(64, 64)]))


def test_the_launches_of_the_probe():
    found = set()
    for case in probe.CASES:
        x = torch.randn(case.shape).to(case.dtype, memory_format=case.memory_format)
        with runtime.recorded() as launches:
            list(probe._training(TritonBackend(), probe._Layer.of(case.shape[1]), x, x))
        found |= set(variants_of(launches))
    assert set(variants_of(launches_of_probe())) == found
