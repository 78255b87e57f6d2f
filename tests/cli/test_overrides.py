"""mmubn.cli.overrides: --cfg-options change what is read, or end in one sentence that names the key that is meant."""

import argparse

import pytest
from mmengine.config import Config

from mmubn.cli import UsageError, add_config_arguments
from mmubn.cli.config import read_config
from mmubn.cli.overrides import override
from mmubn.openmmlab.arguments import Arguments, arguments_of
from mmubn.openmmlab.config_types import find_dicts

DETECTOR = 'configs/digits/mask-rcnn_r18_fpn_ubn_digits.py'
OF_A_PACKAGE = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
DETR = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'
DEFORMABLE_DETR = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
MASK2FORMER = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
RTMDET = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'


@pytest.fixture(scope='module')
def configs(pytestconfig):
    others = {each: read_config(each) for each in (OF_A_PACKAGE, DETR, DEFORMABLE_DETR, MASK2FORMER, RTMDET)}
    return {DETECTOR: read_config(str(pytestconfig.rootpath / DETECTOR)), **others}


def parse(*options):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return parser.parse_args(['config', '--cfg-options', *options]).cfg_options


@pytest.fixture
def apply(configs):
    """Gives a copy of a config with these options."""

    def apply(*options, config=DETECTOR):
        cfg = Config(configs[config].to_dict())
        override(cfg, parse(*options), config)
        return cfg

    return apply


def get(cfg, key):
    node = cfg
    for part in key.split('.'):
        node = node[int(part)] if part.isdigit() else node[part]
    return node


WRONG = {
    # a wrong prefix, or none
    'backbone.norm_cfg.type=BN': 'did you mean model.backbone.norm_cfg.type?',
    'norm_cfg.type=BN': 'did you mean model.backbone.norm_cfg.type?',
    'model.norm_cfg.type=BN': 'did you mean model.backbone.norm_cfg.type',
    'num_classes=3': 'did you mean model.roi_head.bbox_head.num_classes or model.roi_head.mask_head.num_classes?',
    'lr=0.1': 'did you mean optim_wrapper.optimizer.lr?',
    'seed=0': 'did you mean randomness.seed?',
    'epochs=3': 'did you mean train_cfg.max_epochs?',
    'total_epochs=3': 'did you mean train_cfg.max_epochs?',
    'train_dataloader.dataset.classes=a,b': 'did you mean train_dataloader.dataset.metainfo.classes?',
    # a slip, anywhere in the key
    'model.backbne.norm_cfg.type=BN': 'did you mean model.backbone.norm_cfg.type?',
    'model.backbone.norm_cf.type=BN': 'did you mean model.backbone.norm_cfg.type?',
    'model.backbone.norm_cfg.treshold=1': '(UBN) has no argument treshold; did you mean model.backbone.norm_cfg.t',
    'train_dataloder.batch_size=3': 'did you mean train_dataloader.batch_size?',
    'train_dataloader.batchsize=3': 'did you mean train_dataloader.batch_size?',
    'train_dataloader.dataset.pipeline.1.with_msk=False': 'did you mean train_dataloader.dataset.pipeline.1.with_mask?',
    'train_dataloader.dataset.metainfo.CLASSES=a,b': 'did you mean train_dataloader.dataset.metainfo.classes?',
    'optim_wraper.optimizer.lr=3': 'did you mean optim_wrapper.optimizer.lr?',
    'train_cfg.max_epoch=3': 'did you mean train_cfg.max_epochs?',
    'default_hooks.chekpoint.interval=3': 'did you mean default_hooks.checkpoint.interval?',
    'auto_scale_lr.enabl=True': 'did you mean auto_scale_lr.enable?',
    'model.test_cfg.rcnn.scor_thr=0.3': 'did you mean model.test_cfg.rcnn.score_thr?',
    # a slip, or a level left out or added, where nobody knows what is read
    'model.test_cfg.rcn.score_thr=0.3': 'did you mean model.test_cfg.rcnn.score_thr?',
    'model.test_cfg.rcnn.nsm.iou_threshold=0.3': 'did you mean model.test_cfg.rcnn.nms.iou_threshold?',
    'model.test_cfg.rcnn.nms.iou_treshold=0.3': 'did you mean model.test_cfg.rcnn.nms.iou_threshold?',
    'model.test_cfg.score_thr=0.3': 'did you mean model.test_cfg.rcnn.score_thr?',
    'model.test_cfg.scor_thr=0.2': 'did you mean model.test_cfg.rcnn.score_thr?',
    'model.test_cfg.rcnn.nms.score_thr=0.3': 'did you mean model.test_cfg.rcnn.score_thr?',
    'optim_wrapper.paramwise_cfg.num_layers=12': 'optim_wrapper.paramwise_cfg has no num_layers',
    # nothing like it
    'my.new.key=1': 'the config has no my (+my.new.key=... sets it all the same)',
    # variables of the config
    'data_root=x': 'set train_dataloader.dataset.data_root, val_dataloader.dataset.data_root and test_dataloader.',
    'max_epochs=3': 'set train_cfg.max_epochs (+',
    'train_pipeline.0.type=x': 'was used when the config was read, and changes nothing now; set train_dataloader.',
    # of another kind
    'model.backbone.norm_cfg=UBN': 'is a dict; set its keys, as in model.backbone.norm_cfg.type=UBN',
    'model.backbone.norm_cfg=type=UBN,threshold=0.2': 'norm_cfg.type=UBN model.backbone.norm_cfg.threshold=0.2',
    'model.backbone.norm_cfg=dict(type=UBN)': 'set its keys, as in model.backbone.norm_cfg.type=UBN',
    'model.backbone.norm_cfg.type.x=3': "model.backbone.norm_cfg.type is 'UBN', which has no keys",
    'train_dataloader.dataset.pipeline.99.type=X': 'is a list of 4, whose last is train_dataloader.dataset.pipeline.3',
    'train_dataloader.dataset.pipeline.type=X': 'name one of its 4 by number, as in train_dataloader.dataset.',
    'train_dataloader.dataset.pipeline.-1.keep=X': 'as in train_dataloader.dataset.pipeline.3.keep.',
    'train_dataloader.dataset.pipeline.-1=X': 'as in train_dataloader.dataset.pipeline.3.',
    'train_dataloader.dataset.pipeline.0=None': 'set its keys, as in train_dataloader.dataset.pipeline.0.type=VALUE',
    'model.neck.in_channels.0=3': 'give the whole list, as in model.neck.in_channels="[...]"',
    'visualizer.vis_backends=[dict(type=WandbVisBackend)]': 'as in visualizer.vis_backends.0.type=VALUE',
    'visualizer.vis_backends=WandbVisBackend': 'as in visualizer.vis_backends.0.type=VALUE',
    'custom_hooks=[dict(type=EMAHook)]': 'an override makes no list of dicts and no dict as a whole',
    'model.backbone.0.type=X': 'model.backbone is a dict and no list',
    'custom_hooks.0.type=EMAHook': 'custom_hooks is not in the config, and an override makes no list of dicts',
    'model.rpn.norm_cfg._delete_=True': 'there is nothing to delete',
}


@pytest.mark.parametrize('option', WRONG)
def test_a_key_that_nothing_reads(apply, option):
    with pytest.raises(UsageError) as error:
        apply(option)
    text = str(error.value)
    assert text.startswith(f'--cfg-options {option.partition("=")[0]}: ')
    assert WRONG[option] in text
    assert DETECTOR in text


@pytest.mark.parametrize(
    'option',
    [
        'model.backbone.norm_cfg.threshold=0.2',
        'model.backbone.norm_cfg.requires_grad=False',
        'model.backbone.with_cp=True',
        'default_hooks.checkpoint.max_keep_ckpts=3',
        'default_hooks.mine.type=EMAHook',
        'train_dataloader.dataset.indices=100',
        'train_dataloader.prefetch_factor=2',
        'train_dataloader.dataset.pipeline.1.poly2mask=False',
        'model.test_cfg.rcnn.score_thr=0.1',
        'randomness.seed=0',
        'env_cfg.dist_cfg.timeout=5',
        'find_unused_parameters=True',
        'auto_scale_lr.enable=True',
        'optim_wrapper.clip_grad.max_norm=35',
        'optim_wrapper.paramwise_cfg.norm_decay_mult=0',
        'optim_wrapper.optimizer.amsgrad=True',
        'param_scheduler.0.verbose=True',
        'load_from=x.pth',
        'resume=True',
        'tta_model.type=DetTTAModel',
        'train_cfg.dynamic_intervals=None',
        'model.neck=None',
        'visualizer.vis_backends.0.type=WandbVisBackend',
        'visualizer.vis_backends=None',
        'model.roi_head.bbox_head.loss_cls.bg_cls_weight=0.1',
    ],
)
def test_what_is_read(apply, option):
    key, _, value = option.partition('=')
    assert str(get(apply(option), key)) == value


@pytest.mark.parametrize(
    ('config', 'options'),
    [
        (OF_A_PACKAGE, ['model.test_cfg.rcnn.nms.type=soft_nms', 'model.test_cfg.rcnn.nms.min_score=0.05']),
        (OF_A_PACKAGE, ['model.test_cfg.rcnn.nms.class_agnostic=True']),
        (OF_A_PACKAGE, ['model.test_cfg.rcnn.nms.split_thr=100']),
        (OF_A_PACKAGE, ['model.test_cfg.rcnn.nms.max_num=100']),
        (OF_A_PACKAGE, ['model.backbone.dcn.type=DCN', 'model.backbone.dcn.fallback_on_stride=False']),
        (DETR, ['model.positional_encoding.temperature=20']),
        (DEFORMABLE_DETR, ['model.positional_encoding.scale=2']),
        (DEFORMABLE_DETR, ['model.encoder.num_cp=1']),
        (DEFORMABLE_DETR, ['model.encoder.layer_cfg.self_attn_cfg.num_heads=4']),
        (DEFORMABLE_DETR, ['model.encoder.layer_cfg.self_attn_cfg.num_points=4']),
        (DEFORMABLE_DETR, ['model.decoder.layer_cfg.self_attn_cfg.proj_drop=0.1']),
        (DEFORMABLE_DETR, ['model.decoder.layer_cfg.cross_attn_cfg.value_proj_ratio=0.5']),
        (DEFORMABLE_DETR, ['model.decoder.layer_cfg.ffn_cfg.num_fcs=2']),
        (MASK2FORMER, ['model.panoptic_head.pixel_decoder.positional_encoding.offset=0.5']),
        (MASK2FORMER, ['model.panoptic_head.pixel_decoder.encoder.layer_cfg.self_attn_cfg.attn_drop=0.1']),
        (MASK2FORMER, ['model.panoptic_head.pixel_decoder.encoder.layer_cfg.ffn_cfg.add_identity=True']),
        (MASK2FORMER, ['model.panoptic_head.pixel_decoder.encoder.layer_cfg.norm_cfg.type=LN']),
        (
            OF_A_PACKAGE,
            [
                'optim_wrapper.constructor=LearningRateDecayOptimizerConstructor',
                'optim_wrapper.paramwise_cfg.num_layers=12',
                'optim_wrapper.paramwise_cfg.decay_rate=0.7',
                'optim_wrapper.paramwise_cfg.decay_type=layer_wise',
            ],
        ),
    ],
    ids=str,
)
def test_where_nobody_knows_what_is_read(apply, config, options):
    cfg = apply(*options, config=config)
    for option in options:
        key, _, value = option.partition('=')
        assert str(get(cfg, key)) == value


def test_each_key_of_an_open_dict(configs):
    """What a dict without a type holds is right there too when the config does not have it yet."""
    tried = 0
    for config in (DETR, DEFORMABLE_DETR, MASK2FORMER):
        for place, node in find_dicts(configs[config].model, 'model'):
            for key in [] if 'type' in node else list(node):
                cfg = Config(configs[config].to_dict())
                value = get(cfg, place).pop(key)
                if not isinstance(value, (dict, list, tuple)):
                    override(cfg, {f'{place}.{key}': value}, config)
                    tried += 1
    assert tried > 60


def test_a_slip_of_a_name_from_elsewhere(apply):
    """Only the decoder's self_attn_cfg has num_heads."""
    key = 'model.encoder.layer_cfg.self_attn_cfg.num_head'
    with pytest.raises(UsageError, match=f'did you mean {key}s'):
        apply(f'{key}=4', config=DEFORMABLE_DETR)


def test_variables_that_were_computed_with(apply):
    with pytest.raises(
        UsageError, match=r'base_lr was used when the config was read.*; set optim_wrapper\.optimizer\.lr'
    ):
        apply('base_lr=0.1', config=RTMDET)
    with pytest.raises(UsageError, match='set the keys that were made from it'):
        apply('stage2_num_epochs=3', config=RTMDET)


def test_of_a_package(apply):
    cfg = apply('model.backbone.norm_cfg.type=UBN', 'model.backbone.norm_cfg.threshold=0.2', config=OF_A_PACKAGE)
    assert cfg.model.backbone.norm_cfg == dict(type='UBN', threshold=0.2, requires_grad=True)
    assert apply('model.backbone.init_cfg.map_location=cpu', config=OF_A_PACKAGE)
    with pytest.raises(UsageError, match=r'norm_cfg \(BN\) has no argument threshold'):
        apply('model.backbone.norm_cfg.threshold=0.2', config=OF_A_PACKAGE)


def test_delete(apply):
    key = 'model.backbone.norm_cfg'
    cfg = apply(f'{key}._delete_=True', f'{key}.type=GN', f'{key}.num_groups=4')
    assert cfg.model.backbone.norm_cfg == dict(type='GN', num_groups=4)


def test_a_key_that_is_meant(apply):
    cfg = apply('+my.new.key=1', '+data_root=x', '+model.backbone.norm_cfg=UBN', '+custom.0=3')
    assert cfg.my.new.key == 1
    assert cfg.data_root == 'x'
    assert cfg.model.backbone.norm_cfg == 'UBN'


def test_a_class_that_takes_anything():
    """A new argument may be right, but for one that looks like a slip of another."""
    cfg = dict(model=dict(type='Sequential', backbone=dict(type=TakesAnything, channels=3)))
    override(Config(cfg), {'model.backbone.widen_factor': 2}, 'a.py')
    with pytest.raises(UsageError, match=r'did you mean model\.backbone\.channels\?'):
        override(Config(cfg), {'model.backbone.chanels': 2}, 'a.py')


def test_a_class_that_passes_over_a_base():
    """As VFNetHead does, which takes arguments of AnchorFreeHead."""
    names = Arguments(frozenset({'mine', 'first'}), False)
    assert arguments_of(PassesOver) == names


class First:
    def __init__(self, first=1):
        pass


class Second(First):
    def __init__(self, second=1):
        pass


class PassesOver(Second):
    def __init__(self, mine=1, **kwargs):
        super(Second, self).__init__(**kwargs)


class TakesAnything:
    def __init__(self, channels, **kwargs):
        pass


@pytest.mark.parametrize(
    'option', ['model.x', 'model.x =3', '=3', 'a..b=3', '+=3', 'a=[1,(2]', 'a=dict(b=1,c=2)', 'a=[dict(b=1,c=2)]']
)
def test_what_is_no_key_with_a_value(option, capsys):
    with pytest.raises(SystemExit) as end:
        parse(option)
    assert end.value.code == 2
    assert 'error: argument --cfg-options: ' in capsys.readouterr().err.splitlines()[-1]
