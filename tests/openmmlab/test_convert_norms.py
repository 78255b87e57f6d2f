"""ConvertNorms in a config: the module itself comes out, with other norms; checks and overrides understand it."""

import copy
import re

import pytest
import torch
from helpers import batch, randomize
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import BNET, UBN, SyncUBN, convert_norms
from mmubn.cli import UsageError
from mmubn.cli.overrides import override
from mmubn.layers import UnifiedNorm
from mmubn.openmmlab.config_checks import check_norm_arguments, check_norm_types, check_norms_used
from mmubn.openmmlab.config_types import asked_norms
from mmubn.openmmlab.convert_norms import ConvertNorms
from mmubn.openmmlab.errors import ConfigError

BNET5 = dict(type='BNET', kernel_size=5)


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmdet')


def resnet(**options):
    return dict(type='ResNet', depth=50, base_channels=8, **options)


def backbone(where='*.bn3', norm_cfg=BNET5, module=None, **options):
    return dict(type='ConvertNorms', module=module or resnet(), norm_cfg=dict(norm_cfg), where=where, **options)


def norms(model, kind=_BatchNorm):
    return [module for module in model.modules() if isinstance(module, kind)]


def with_statistics(model):
    for seed, norm in enumerate(norms(model)):
        randomize(norm, scale=0.1, seed=seed)
    model.eval()  # returns None for some
    return model


def names(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def assert_close(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.detach().abs().max()))


class TestBackbone:
    def test_is_the_module_itself(self):
        stock, ours = MODELS.build(resnet()), MODELS.build(backbone())
        assert type(ours) is type(stock)
        assert names(ours, BNET) == {name for name in names(stock, nn.BatchNorm2d) if name.endswith('bn3')}
        extra = ours.state_dict().keys() - stock.state_dict().keys()
        assert extra == {f'{name}.neighbor_weight' for name in names(ours, BNET)}
        assert stock.state_dict().keys() <= ours.state_dict().keys()
        block = ours.layer1[0]
        assert block.norm3 is block.bn3
        assert block.norm3.kernel_size == 5

    @pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain'])
    def test_in_every_scope(self, scope):
        with DefaultScope.overwrite_default_scope(scope):
            registry = {'mmdet': MMDET_MODELS, 'mmpretrain': MMPRETRAIN_MODELS}[scope]
            ours = registry.build(backbone(where=None, norm_cfg=dict(type='UBN')))
        assert type(ours).__module__.startswith(scope)
        assert {type(norm) for norm in norms(ours)} == {UBN}

    def test_by_the_scope_in_the_type(self):
        ours = MODELS.build(backbone(module=dict(type='mmpretrain.ResNet', depth=50, base_channels=8)))
        assert type(ours).__module__.startswith('mmpretrain')

    def test_by_the_function(self):
        assert norms(MODELS.build(dict(backbone(), type=ConvertNorms)), BNET)

    def test_init_weights(self):
        module = resnet(zero_init_residual=True)
        ours = MODELS.build(backbone(module=module))
        with torch.no_grad():
            ours.layer1[0].bn3.bias.add_(1)
        ours.init_weights()
        assert ours.layer1[0].bn3.weight.eq(0).all()
        assert all(norm.neighbor_weight.eq(0).all() for norm in norms(ours, BNET))

    def test_pretrained(self, tmp_path):
        """A checkpoint of BatchNorm, by init_cfg of the module, and one of our own."""
        stock, x = with_statistics(MODELS.build(resnet())), batch((2, 3, 64, 64))
        ours = convert_norms(copy.deepcopy(stock), 'BNET', '*.bn3', kernel_size=5)
        for name, model in (('bn', stock), ('bnet', ours)):
            torch.save(dict(state_dict=model.state_dict()), tmp_path / f'{name}.pth')
            init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / f'{name}.pth'))
            built = MODELS.build(backbone(module=resnet(init_cfg=init_cfg)))
            built.init_weights()
            built.eval()
            assert_close(built(x), stock(x))

    def test_frozen_stages_and_norm_eval(self):
        ours = MODELS.build(backbone(where=None, module=resnet(frozen_stages=1, norm_eval=True)))
        frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
        ours.train()
        assert frozen == {name for name, p in ours.named_parameters() if not p.requires_grad}
        assert {name.partition('.')[0] for name in frozen} == {'conv1', 'bn1', 'layer1'}
        assert 'layer1.0.bn3.neighbor_weight' in frozen
        assert not any(norm.training for norm in norms(ours))

    @pytest.mark.parametrize(('requires_grad', 'trained'), [(True, True), (False, False)])
    def test_requires_grad(self, requires_grad, trained):
        norm_cfg = dict(BNET5, requires_grad=requires_grad)
        ours = MODELS.build(backbone(norm_cfg=norm_cfg, module=resnet(frozen_stages=1)))
        assert {p.requires_grad for p in ours.layer2[0].bn3.parameters()} == {trained}
        assert {p.requires_grad for p in ours.layer1[0].bn3.parameters()} == {False}

    def test_norms_of_the_type_are_frozen_too(self):
        module = resnet(norm_cfg=dict(type='BNET', kernel_size=5))
        ours = MODELS.build(backbone(norm_cfg=dict(BNET5, requires_grad=False), module=module))
        assert not any(p.requires_grad for p in ours.layer2[0].bn3.parameters())
        assert all(p.requires_grad for p in ours.layer2[0].bn2.parameters())

    def test_conv_module(self):
        module = dict(type='mmdet.CSPDarknet', deepen_factor=0.33, widen_factor=0.125, norm_cfg=dict(type='SyncBN'))
        ours = MODELS.build(backbone(where=None, norm_cfg=dict(type='UBN'), module=module))
        parts = norms(ours, ConvModule)
        assert parts
        assert {type(part.norm) for part in parts} == {SyncUBN}
        assert all(part.norm is part.bn for part in parts)

    def test_after_revert_sync_batchnorm(self):
        """MMEngine's BatchNorm of any dimension."""
        stock = with_statistics(revert_sync_batchnorm(MODELS.build(resnet(norm_cfg=dict(type='SyncBN')))))
        assert type(stock.bn1).__name__ == '_BatchNormXd'
        ours, x = convert_norms(copy.deepcopy(stock)), batch((2, 3, 64, 64))
        assert {type(norm) for norm in norms(ours)} == {UBN}
        assert_close(ours(x), stock(x))

    def test_says_what_it_did(self, monkeypatch):
        lines = []
        monkeypatch.setattr('mmubn.openmmlab.convert_norms.print_log', lambda text, **options: lines.append(text))
        MODELS.build(backbone(where='layer1.*.bn3'))
        assert lines == ['mmubn: ConvertNorms of ResNet: 3 BatchNorm2d -> BNET: layer1.*.bn3 (3)']

    def test_regular_expression(self):
        ours = MODELS.build(backbone(where=r're:^layer[12]\..*bn[13]$'))
        assert len(names(ours, BNET)) == 2 * (3 + 4)
        assert all(re.match(r'layer[12]\.\d\.bn[13]$', name) for name in names(ours, BNET))

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (
                dict(where='*.bn4'),
                r"^ConvertNorms of ResNet: where='\*\.bn4' chooses none of the 53 BatchNorms of this ResNet; near",
            ),
            (dict(where='re:*bn3'), r"where='re:\*bn3' is no regular expression: nothing to repeat"),
            (dict(where='re:bn4$'), r"where='re:bn4\$' chooses none of the 53"),
            (dict(norm_cfg=dict(type='BNETT')), r"norm_cfg\.type='BNETT' is not a registered norm"),
            (dict(strict='False'), "ConvertNorms: strict must be True or False, got 'False'"),
            (dict(norm_cfg=dict(type='BNET', requires_grad='no')), "requires_grad must be True or False, got 'no'"),
            (dict(norm_cfg=dict(type='GN')), r'norm must be UBN, .*GroupNorm'),
            (dict(norm_cfg=dict(type='BNET', eps=1e-3)), 'eps is no option'),
            (
                dict(norm_cfg=dict(kernel_size=3)),
                r'needs module=dict\(type=\.\.\.\) and norm_cfg=dict\(type=\.\.\.\), got',
            ),
            (
                dict(module=resnet(norm_cfg=dict(type='GN', num_groups=2))),
                'this ResNet has no BatchNorm; what it has: GroupNorm',
            ),
        ],
    )
    def test_wrong(self, options, message):
        with pytest.raises(ConfigError, match=message):
            MODELS.build({**backbone(), **options})


# Backbones that make BatchNorms whatever norm_cfg says, and the channels of their outputs.
IGNORE_NORM_CFG = {
    'mobilenetv3': (
        dict(
            type='mmpretrain.TIMMBackbone',
            model_name='mobilenetv3_small_050',
            features_only=True,
            out_indices=(2, 3, 4),
        ),
        [16, 24, 288],
    ),
    'dla': (
        dict(type='mmpretrain.TIMMBackbone', model_name='dla46_c', features_only=True, out_indices=(3, 4, 5)),
        [64, 128, 256],
    ),
    'tinyvit': (
        dict(
            type='mmpretrain.TinyViT', arch='5m', img_size=(64, 64), out_indices=(1, 2, 3), gap_before_final_norm=False
        ),
        [160, 320, 320],
    ),
}


class TestDetectors:
    @pytest.mark.parametrize(('module', 'channels'), IGNORE_NORM_CFG.values(), ids=IGNORE_NORM_CFG)
    def test_backbones_that_ignore_norm_cfg(self, module, channels, monkeypatch):
        pytest.importorskip('timm')
        monkeypatch.setattr('mmpretrain.models.backbones.timm_backbone.print_timm_feature_info', lambda info: None)
        cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
        cfg.model.bbox_head.update(num_classes=3, stacked_convs=1)
        cfg.model.neck = dict(type='mmdet.FPN', in_channels=channels, out_channels=256, num_outs=5)
        cfg.model.backbone = backbone(where=None, norm_cfg=dict(type='UBN'), module=module)
        check_both(cfg)
        torch.manual_seed(0)
        ours = MODELS.build(cfg.model)
        check_norms_used(cfg, ours)
        cfg.model.backbone = module
        stock = MODELS.build(cfg.model)
        assert len(norms(ours.backbone, UBN)) == len(norms(stock.backbone)) > 0
        assert len(norms(ours.backbone, nn.BatchNorm2d)) == len(norms(ours.backbone, UBN))
        with_statistics(stock)
        ours.load_state_dict(stock.state_dict())
        x = batch((2, 3, 64, 64))
        with torch.no_grad():
            assert_close(ours.eval().extract_feat(x), stock.extract_feat(x))
        losses = []
        for model in (ours, stock):
            inputs = demo_mm_inputs(2, [[3, 64, 64]] * 2, num_classes=3)
            torch.manual_seed(0)
            found = model.train()(**model.data_preprocessor(inputs, True), mode='loss')
            losses.append([each for values in found.values() for each in values])
        assert_close(*losses, 2e-3)


class ModelOfAll(BaseModel):
    def __init__(self, channels, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.layers = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.layers(inputs)


def detector_config(**options):
    cfg = Config(dict(default_scope='mmdet', model=dict(type='RetinaNet', backbone=backbone(**options))))
    return cfg


class Detector(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.backbone = MODELS.build(cfg.model.backbone)


def check_both(cfg):
    check_norm_types(cfg)
    check_norm_arguments(cfg)


class TestChecks:
    def test_norms_used(self):
        """What ``where`` leaves out is no norm that ignores norm_cfg."""
        cfg = detector_config()
        check_both(cfg)
        check_norms_used(cfg, Detector(cfg))

    def test_a_norm_that_was_replaced_afterwards(self):
        cfg = detector_config()
        model = Detector(cfg)
        convert_norms(model, 'BN')
        with pytest.raises(ConfigError, match=r'model\.backbone\.norm_cfg asks for BNET, but ResNet has no such layer'):
            check_norms_used(cfg, model)

    def test_the_norm_of_the_module(self):
        """It is checked too, and may be replaced everywhere."""
        module = resnet(norm_cfg=dict(type='UBN'))
        for where in ('*.bn3', None):
            cfg = detector_config(module=module, where=where, norm_cfg=dict(type='SyncUBN'))
            asked = asked_norms(cfg)
            assert [(each.place, each.owner) for each in asked] == [
                ('backbone.module.norm_cfg', 'backbone'),
                ('backbone.norm_cfg', 'backbone'),
            ]
            model = Detector(cfg)
            check_norms_used(cfg, model)
            model.backbone.bn1 = nn.BatchNorm2d(8)
            with pytest.raises(
                ConfigError, match=r'model\.backbone\.module\.norm_cfg asks for UBN.* makes its layer bn1 a'
            ):
                check_norms_used(cfg, model)

    def test_the_whole_model(self):
        inner = dict(type='RetinaNet', backbone=resnet(norm_cfg=dict(type='UBN')), neck=dict(norm_cfg=dict(type='BN')))
        cfg = Config(
            dict(default_scope='mmdet', model=dict(type='ConvertNorms', module=inner, norm_cfg=dict(type='UBN')))
        )
        assert {each.place: each.owner for each in asked_norms(cfg)} == {
            'norm_cfg': '',
            'module.backbone.norm_cfg': 'backbone',
            'module.neck.norm_cfg': 'neck',
        }

    def test_other_modules_of_that_name(self):
        cfg = Config(
            dict(
                model=dict(
                    head=dict(type='Sequential', norm_cfg=dict(type='UBN'), module=dict(norm_cfg=dict(type='BN')))
                )
            )
        )
        assert [each.owner for each in asked_norms(cfg)] == ['head', 'head.module']

    @pytest.mark.parametrize(
        ('norm_cfg', 'message'),
        [
            (dict(type='BNETT'), r"model\.backbone\.norm_cfg\.type='BNETT' is not a registered norm"),
            (dict(type='BNET', kernel_sise=3), r'model\.backbone\.norm_cfg\.kernel_sise=3: BNET has no such argument'),
            (dict(type='BNET', kernel_size=4), r'model\.backbone\.norm_cfg: BNET: kernel_size must be'),
        ],
    )
    def test_wrong_before_anything_is_built(self, norm_cfg, message):
        cfg = detector_config(norm_cfg=norm_cfg)
        with pytest.raises(ConfigError, match=message):
            check_both(cfg)

    @pytest.mark.parametrize('where', [re.compile('bn3$'), lambda name, module: True, ['bn1']])
    def test_where_of_no_string(self, where):
        """MMEngine writes it into the copy of the config as what nothing reads."""
        with pytest.raises(ConfigError, match=r'model\.backbone\.where=.* must be a string, .*such as .*re:'):
            check_norm_types(detector_config(where=where))
        with pytest.raises(ConfigError, match=r'model\.where=.* must be a string'):
            check_norm_types(Config(dict(model=backbone(where=where))))

    def test_overrides(self):
        cfg = detector_config()
        options = {
            'norm_cfg.kernel_size': 7,
            'where': '*.bn2',
            'module.depth': 101,
            'strict': False,
            'norm_cfg.type': 'UBN',
        }
        override(cfg, {f'model.backbone.{key}': value for key, value in options.items()}, 'config.py')
        model = Detector(cfg)
        assert {norm.kernel_size for norm in norms(model, UBN)} == {7}
        assert len(norms(model, UBN)) == 33
        override(cfg, {'model.backbone.where': 're:^layer[12]'}, 'config.py')
        assert len(norms(Detector(cfg), UBN)) == 23
        for wrong in ('norm_cfg.kernel_sise', 'were', 'depth'):
            with pytest.raises(UsageError, match=wrong):
                override(detector_config(), {f'model.backbone.{wrong}': 3}, 'config.py')


class TestRunner:
    def test_data_preprocessor(self, tmp_path):
        """MMEngine's Runner gives that of the config to the model, of which ConvertNorms is the type."""
        MODELS.register_module(name='ModelOfAll', module=ModelOfAll, force=True)
        try:
            runner = Runner.from_cfg(
                Config(
                    dict(
                        model=dict(
                            type='ConvertNorms', module=dict(type='ModelOfAll', channels=4), norm_cfg=dict(type='UBN')
                        ),
                        data_preprocessor=dict(type='ImgDataPreprocessor', mean=[1, 2, 3], std=[1, 1, 1]),
                        work_dir=str(tmp_path),
                        log_level='ERROR',
                    )
                )
            )
        finally:
            MODELS.module_dict.pop('ModelOfAll')
        assert type(runner.model) is ModelOfAll
        assert runner.model.data_preprocessor.mean.flatten().tolist() == [1, 2, 3]
        assert [type(norm) for norm in norms(runner.model, UnifiedNorm)] == [UBN]
        saved = next(tmp_path.rglob('*.py')).read_text()
        assert re.search(r"type='ConvertNorms'", saved)
