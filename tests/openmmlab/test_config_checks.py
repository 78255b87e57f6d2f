"""What is wrong with a config is said before the first iteration."""

import pytest
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.model import BaseModule, MMDistributedDataParallel
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmubn
from mmubn import UBN
from mmubn.openmmlab.config_checks import (
    ConfigError,
    check_efficient_conv_bn_eval,
    check_norm_arguments,
    check_norm_types,
    check_norms_used,
)
from mmubn.openmmlab.config_types import name_types


class TestNormTypes:
    @pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain', 'mmengine'])
    def test_unknown(self, scope):
        model = dict(roi_head=dict(bbox_head=[dict(norm_cfg=dict(type='BN')), dict(norm_cfg=dict(type='UBNN'))]))
        with pytest.raises(
            ConfigError, match=r"model\.roi_head\.bbox_head\.1\.norm_cfg\.type='UBNN' .* custom_imports"
        ):
            check_norm_types(Config(dict(default_scope=scope, model=model)))

    @pytest.mark.parametrize('norm', ['UBN', 'UnitizedBN', 'BN', 'GN', 'IN', 'LN2d'])
    def test_known_to_mmpretrain(self, norm):
        check_norm_types(Config(dict(default_scope='mmpretrain', model=dict(backbone=dict(norm_cfg=dict(type=norm))))))

    def test_by_its_full_name(self):
        """MMDetection has no LN2d of its own, but finds that of MMPretrain."""

        def cfg(name):
            return Config(dict(default_scope='mmdet', model=dict(neck=dict(norm_cfg=dict(type=name)))))

        check_norm_types(cfg('mmpretrain.LN2d'))
        with pytest.raises(ConfigError, match=r"'mmpretrain\.LN3d'"):
            check_norm_types(cfg('mmpretrain.LN3d'))

    def test_without_names(self):
        model = dict(backbone=dict(norm_cfg=None), neck=None, head=dict(norm_cfg=dict(type=nn.BatchNorm2d)))
        check_norm_types(Config(dict(model=model)))

    @pytest.mark.parametrize('scope', ['mmdet', 'mmengine', None])
    def test_a_module_in_the_place_of_a_class(self, scope):
        """In a config in pure Python: ``from mmubn import layers``."""
        model = dict(backbone=dict(norm_cfg=dict(type=LazyObject('mmubn', 'layers'))))
        with pytest.raises(
            ConfigError, match=r"model\.backbone\.norm_cfg\.type='mmubn\.layers' is not a registered norm"
        ):
            check_norm_types(Config(dict(default_scope=scope, model=model)))

    @pytest.mark.parametrize('given', ['BN', ['type=UBN', 'threshold=0.2'], 3])
    def test_what_is_no_dict(self, given):
        cfg = Config(dict(model=dict(head=[dict(norm_cfg=given)])))
        with pytest.raises(
            ConfigError, match=r'^model\.head\.0\.norm_cfg must be a dict, such as dict\(type='
        ) as error:
            check_norm_types(cfg)
        assert repr(given) in str(error.value)

    def test_without_a_type(self):
        with pytest.raises(ConfigError, match=r"^model\.norm_cfg=\{'num_groups': 4\} has no type: add one"):
            check_norm_types(Config(dict(model=dict(norm_cfg=dict(num_groups=4)))))

    @pytest.mark.parametrize(('given', 'meant'), [('UBNN', 'UBN'), ('ubn', 'UBN'), ('SynBN', 'SyncBN')])
    def test_what_it_resembles(self, given, meant):
        with pytest.raises(ConfigError, match=rf'did you mean {meant}\?'):
            check_norm_types(Config(dict(model=dict(norm_cfg=dict(type=given)))))

    def test_without_a_model(self):
        with pytest.raises(ConfigError, match='the config has no model'):
            check_norm_types(Config(dict(train_cfg=dict())))


class TestNormArguments:
    @pytest.mark.parametrize(
        ('norm_cfg', 'message'),
        [
            (dict(type='UBN', treshold=0.2), r'treshold=0\.2: UBN has no such argument; did you mean threshold\?'),
            (dict(type=UBN, treshold=0.2), r'treshold=0\.2: UBN has no such argument; did you mean threshold\?'),
            (dict(type='BN', threshold=0.2), r'threshold=0\.2: BN has no such argument; it has affine, '),
            (dict(type='UBN', _delete=True), r'_delete=True: UBN has no such argument; did you mean _delete_\?'),
            (dict(type='GN'), ' of type GN needs num_groups'),
        ],
    )
    def test_unknown_or_missing(self, norm_cfg, message):
        with pytest.raises(ConfigError, match=rf'^model\.backbone\.norm_cfg\.?{message}'):
            check_norm_arguments(Config(dict(model=dict(backbone=dict(norm_cfg=norm_cfg)))))

    def test_a_value(self):
        cfg = Config(dict(model=dict(backbone=dict(norm_cfg=dict(type='UBN', kernel_size=4)))))
        with pytest.raises(ConfigError, match=r'^model\.backbone\.norm_cfg: UBN: kernel_size must be .* got 4'):
            check_norm_arguments(cfg)

    @pytest.mark.parametrize(
        'norm_cfg',
        [
            dict(type='UBN', requires_grad=False, eps=1e-3, threshold=None),
            dict(type='BN', momentum=0.03, eps=0.001, requires_grad=True),
            dict(type='SyncBN', process_group=None),
            dict(type='GN', num_groups=32),
            dict(type='LN', eps=1e-6),
        ],
        ids=lambda norm_cfg: norm_cfg['type'],
    )
    def test_right(self, norm_cfg):
        check_norm_arguments(Config(dict(model=dict(backbone=dict(norm_cfg=norm_cfg)))))


class Net(BaseModule):
    """A backbone, of blocks that are each given its norm."""

    def __init__(self, norms):
        super().__init__()
        self.backbone = nn.Sequential(*(norm(4) for norm in norms))


# A type by its name; in configs in pure Python the class, before and after MMEngine imported it.
UBNS = ['UBN', UBN, LazyObject('mmubn', 'UBN'), LazyAttr('UBN', LazyObject('mmubn'))]


def asks_for(kind):
    return Config(dict(model=dict(backbone=dict(norm_cfg=dict(type=kind)))))


ASKS_FOR_UBN = asks_for('UBN')


class TestNormsUsed:
    @pytest.mark.parametrize('kind', UBNS, ids=lambda kind: type(kind).__name__)
    @pytest.mark.parametrize('norm', [nn.Identity, nn.InstanceNorm2d])
    def test_ignored(self, norm, kind):
        with pytest.raises(
            ConfigError, match=r'model\.backbone\.norm_cfg asks for UBN, but Sequential has no such layer'
        ):
            check_norms_used(asks_for(kind), Net([norm]))

    @pytest.mark.parametrize('kind', UBNS, ids=lambda kind: type(kind).__name__)
    @pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm])
    def test_ignored_in_places(self, norm, kind):
        with pytest.raises(ConfigError, match=f'asks for UBN, but Sequential makes its layer 1 a {norm.__name__}'):
            check_norms_used(asks_for(kind), Net([UBN, norm]))

    @pytest.mark.parametrize('kind', UBNS, ids=lambda kind: type(kind).__name__)
    def test_heeded(self, kind):
        check_norms_used(asks_for(kind), Net([UBN, nn.Identity]))

    def test_a_class_of_the_user_s_own(self):
        class Mine(UBN):
            pass

        check_norms_used(asks_for(Mine), Net([Mine]))
        with pytest.raises(ConfigError, match='asks for Mine, but Sequential has no such layer'):
            check_norms_used(asks_for(Mine), Net([UBN]))

    def test_wrapped(self):
        wrapped = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
        nn.Module.__init__(wrapped)
        wrapped.module = Net([nn.BatchNorm2d])
        with pytest.raises(ConfigError, match='makes its layer 0 a BatchNorm2d'):
            check_norms_used(ASKS_FOR_UBN, wrapped)

    @pytest.mark.parametrize('norm', ['BN', 'SyncBN', nn.BatchNorm2d, nn.SyncBatchNorm])
    def test_of_others(self, norm):
        """A norm of mmcv may be frozen, synchronised or unused: this package does not judge."""
        check_norms_used(Config(dict(model=dict(backbone=dict(norm_cfg=dict(type=norm))))), Net([nn.Identity]))

    @pytest.mark.parametrize('norm', ['UBN', UBN])
    def test_norm_layer_of_timm(self, norm):
        """The key of MMPretrain's TIMMBackbone; other types may have an argument of this name for something else."""
        pytest.importorskip('timm')
        backbone = dict(type='TIMMBackbone', model_name='resnet18', norm_layer=norm)
        cfg = Config(dict(default_scope='mmpretrain', model=dict(backbone=backbone, neck=dict(norm_layer='UBN'))))
        name_types(cfg)
        assert cfg.model.backbone.norm_layer == 'UBN'
        check_norm_types(cfg)
        check_norm_arguments(cfg)
        check_norms_used(cfg, Net([UBN]))
        error = (
            r'model\.backbone\.norm_layer asks for UBN, but Sequential makes its layer 0 a BatchNorm2d: use a network '
        )
        with pytest.raises(
            ConfigError, match=error + 'that builds all its norms from norm_layer, ConvertNorms, or leave'
        ):
            check_norms_used(cfg, Net([nn.BatchNorm2d]))
        with pytest.raises(ConfigError, match=r'model\.backbone\.norm_layer asks for UBN, but .* has no such layer'):
            check_norms_used(cfg, Net([nn.LayerNorm]))

    def test_norm_layer_that_is_not_registered(self):
        """MMPretrain would call None."""
        pytest.importorskip('timm')
        backbone = dict(type='mmpretrain.TIMMBackbone', model_name='resnet18', norm_layer='UNB')
        cfg = Config(dict(default_scope='mmdet', model=dict(backbone=backbone)))
        with pytest.raises(ConfigError, match=r"model\.backbone\.norm_layer='UNB' is not a registered norm.*mean UBN"):
            check_norm_types(cfg)

    def test_parts_that_the_model_has_not(self):
        check_norms_used(Config(dict(model=dict(neck=dict(norm_cfg=dict(type='UBN'))))), Net([nn.Identity]))

    def test_of_a_detector(self):
        cfg = Config.fromstring(
            "_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'\n"
            "model = dict(backbone=dict(depth=18, norm_cfg=dict(type='UBN'), init_cfg=None),"
            " neck=dict(in_channels=[64, 128, 256, 512], norm_cfg=dict(type='RBN')))",
            '.py',
        )
        init_default_scope('mmdet')
        model = MODELS.build(dict(cfg.model, _scope_='mmdet'))
        check_norms_used(cfg, model)
        model.backbone.layer2[0].downsample[1] = nn.BatchNorm2d(128)
        with pytest.raises(ConfigError, match=r'ResNet makes its layer layer2\.0\.downsample\.1 a BatchNorm2d'):
            check_norms_used(cfg, model)

    def test_refused_by_the_network_itself(self):
        with pytest.raises(TypeError, match=r'InceptionV3.* unexpected keyword argument .norm_cfg'):
            MODELS.build(dict(type='InceptionV3', norm_cfg=dict(type='UBN'), _scope_='mmpretrain'))


class TestEfficientConvBNEval:
    """It would fold norms as if they were BatchNorm: MMEngine finds out in the first validation."""

    def cfg(self, named, **model):
        return Config(dict(efficient_conv_bn_eval=named, default_scope='mmdet', model=model))

    @pytest.mark.parametrize('norm', ['UBN', 'SyncUBN', 'RBN', 'BNET', 'IEBN', 'UnitizedBN'])
    @pytest.mark.parametrize('named', ['backbone', ['neck', 'backbone'], ['backbone.layer1'], 'backbone.stem.conv'])
    @pytest.mark.parametrize('by_class', [False, True])
    def test_of_a_part_with_a_norm_of_ours(self, norm, named, by_class):
        kind = getattr(mmubn, norm) if by_class else norm
        cfg = self.cfg(named, backbone=dict(norm_cfg=dict(type=kind)), neck=dict(norm_cfg=dict(type='BN')))
        error = rf'fold the norms of model\.backbone, of type {norm}, .*leave efficient_conv_bn_eval out, or name only '
        with pytest.raises(ConfigError, match=error + f'modules without {norm}'):
            check_efficient_conv_bn_eval(cfg)

    def test_of_a_part_of_a_part(self):
        cfg = self.cfg(['roi_head'], roi_head=dict(bbox_head=[dict(norm_cfg=dict(type='UBN'))]))
        with pytest.raises(ConfigError, match=r'model\.roi_head\.bbox_head\.0, of type UBN'):
            check_efficient_conv_bn_eval(cfg)

    @pytest.mark.parametrize('named', ['neck', ['neck'], ['back'], None, []])
    def test_of_other_parts(self, named):
        backbone, neck = dict(norm_cfg=dict(type='UBN')), dict(norm_cfg=dict(type='BN'))
        check_efficient_conv_bn_eval(self.cfg(named, backbone=backbone, neck=neck))

    def test_without_the_key(self):
        check_efficient_conv_bn_eval(Config(dict(model=dict(backbone=dict(norm_cfg=dict(type='UBN'))))))
