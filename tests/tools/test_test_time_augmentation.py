"""tools/test.py --tta: which model merges, and what it cannot."""

import runpy
from pathlib import Path

import pytest
import torch
from cli import ROOT, call
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample

from mmubn.cli import UsageError

TOOL = runpy.run_path(str(ROOT / 'tools' / 'test.py'), run_name='tool')
CONFIGS = Path(ROOT, 'configs')


def augmented(cfg):
    TOOL['use_test_time_augmentation'](cfg)
    return cfg


def digits(name='resnet18-ubn_digits.py'):
    return Config.fromfile(CONFIGS / 'digits' / name)


def test_a_classifier_averages_both_images():
    cfg = augmented(digits())
    assert cfg.model.type == 'AverageClsScoreTTA'
    assert cfg.test_dataloader.dataset.pipeline[-1].type == 'TestTimeAug'
    with MODELS.switch_scope_and_registry('mmpretrain') as registry:
        model = registry.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor)).eval()
        images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        views = [images[0], images[0].flip(-1)]
        data = dict(inputs=[[view] for view in views], data_samples=[[DataSample().set_gt_label(3)] for _ in views])
        (merged,) = model.test_step(data)
        each = [model.module.test_step(dict(inputs=[v], data_samples=[DataSample()]))[0].pred_score for v in views]
    torch.testing.assert_close(merged.pred_score, sum(each) / 2)
    assert not torch.equal(*each)
    assert merged.gt_label.item() == 3


@pytest.mark.parametrize('scope', [None, 'mmpretrain', 'mmdet'])
def test_of_what_package_a_model_is(scope):
    cfg = Config(dict(default_scope=scope, model=dict(type='mmpretrain.ImageClassifier')))
    if scope == 'mmpretrain':  # MMEngine knows no name with the scope that it is in
        cfg.model.type = 'ImageClassifier'
    assert TOOL['is_of'](cfg, 'mmpretrain')
    assert not TOOL['is_of'](cfg, 'mmdet')
    pipeline = [dict(type='PackInputs')]
    cfg.test_dataloader = dict(dataset=dict(type='RepeatDataset', dataset=dict(pipeline=pipeline)))
    kind = augmented(cfg).model.type
    assert kind.rpartition('.')[2] == 'AverageClsScoreTTA'
    assert ('.' in kind) == (scope != 'mmpretrain')
    assert cfg.test_dataloader.dataset.dataset.pipeline == cfg.tta_pipeline


@pytest.mark.parametrize(
    'name',
    [
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        'rtmdet/rtmdet_s_8xb32-300e_coco.py',
    ],
)
def test_boxes_are_merged(name):
    assert augmented(get_config(f'mmdet::{name}')).model.type == 'DetTTAModel'


@pytest.mark.parametrize(
    'name',
    [
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        'htc/htc_r50_fpn_1x_coco.py',
        'queryinst/queryinst_r50_fpn_1x_coco.py',
        'solo/solo_r50_fpn_1x_coco.py',
        'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        'rtmdet/rtmdet-ins_s_8xb32-300e_coco.py',
    ],
)
def test_masks_are_not(name):
    cfg = get_config(f'mmdet::{name}')
    cfg.pop('tta_model', None)
    with pytest.raises(UsageError, match='--tta merges boxes, by DetTTAModel of MMDetection, and the model has masks'):
        augmented(cfg)


def test_the_config_has_the_word():
    cfg = digits('mask-rcnn_r18_fpn_ubn_digits.py')
    cfg.tta_model = dict(type='MergesMasks')
    assert augmented(cfg).model.type == 'MergesMasks'


def test_a_model_of_another_kind():
    cfg = Config(dict(model=dict(type='SomethingElse'), test_dataloader=dict(dataset=dict(pipeline=[]))))
    with pytest.raises(UsageError, match=r'SomethingElse is neither: set tta_model \(and tta_pipeline\)'):
        augmented(cfg)


def test_a_classifier_is_not_drawn(monkeypatch, capsys, tmp_path):
    (tmp_path / 'epoch_1.pth').touch()
    for name in ('train', 'val'):
        (tmp_path / name).mkdir()
    arguments = (
        CONFIGS / 'digits' / 'resnet18-ubn_digits.py',
        tmp_path / 'epoch_1.pth',
        '--tta',
        '--show-dir',
        'drawings',
    )
    options = ('--work-dir', tmp_path / 'run', '--cfg-options', f'test_dataloader.dataset.data_root={tmp_path}')
    assert call(monkeypatch, 'test.py', *arguments, *options) == 2
    assert '--show and --show-dir draw one image, and --tta gives a classifier several' in capsys.readouterr().err
