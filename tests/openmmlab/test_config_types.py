"""mmubn.openmmlab.config_types: classes in configs do as their names do."""

import mmcv.cnn  # noqa: F401 - registers BN and others
import mmengine.model
import pytest
import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.hooks import CheckpointHook
from mmengine.registry import MODELS
from mmpretrain.registry import MODELS as PRETRAIN_MODELS
from torch import nn

import mmubn.openmmlab.pretrained
from mmubn import UBN, SyncUBN
from mmubn.openmmlab.config_types import asked_norms, is_pretrained, name_types
from mmubn.openmmlab.hooks.checkpoint import AtomicCheckpointHook
from mmubn.openmmlab.resumption import IterationSeedHook, make_resumable


class Registered(UBN):
    pass


class Unregistered(UBN):
    pass


@pytest.fixture
def in_pure_python(tmp_path):
    """Write a base and a config that inherits from it; read the latter."""

    def read(text, base='model = dict(backbone=dict(norm_cfg=dict(type=BatchNorm2d, eps=1e-3)))'):
        (tmp_path / 'base.py').write_text(f'from torch.nn import BatchNorm2d\n{base}\n')
        path = tmp_path / 'config.py'
        path.write_text(f'from mmengine.config import read_base\nwith read_base():\n    from .base import *\n{text}\n')
        return Config.fromfile(path)

    return read


class TestAskedNorms:
    @pytest.mark.parametrize(
        'kind',
        ['UBN', UBN, 'mmubn.UBN', LazyObject('mmubn', 'UBN')],
        ids=['name', 'class', 'dotted name', 'not yet imported'],
    )
    def test_however_it_is_named(self, kind):
        (asked,) = asked_norms(Config(dict(model=dict(neck=[dict(norm_cfg=dict(type=kind, eps=1e-3))]))))
        assert asked.norm is UBN
        assert asked.is_ours
        assert asked.name == (kind if isinstance(kind, str) else 'UBN')
        assert (asked.place, asked.owner) == ('neck.0.norm_cfg', 'neck.0')
        assert asked.norm_cfg['eps'] == 1e-3

    def test_in_a_plain_dict_of_lazy_objects(self):
        """No ConfigDict, which imports what it is asked for."""
        cfg = Config(dict(model=dict()))
        dict.__setitem__(cfg._cfg_dict, 'model', dict(norm_cfg=dict(type=LazyObject('mmubn', 'SyncUBN'))))
        assert [(asked.name, asked.norm, asked.owner) for asked in asked_norms(cfg)] == [('SyncUBN', SyncUBN, '')]

    def test_of_others(self):
        types = [nn.BatchNorm2d, 'BN', 'GN', 'no_such_package.Norm', 'Nowhere']
        asked = asked_norms(Config(dict(model=[dict(norm_cfg=dict(type=kind)) for kind in types])))
        assert [each.norm for each in asked] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.GroupNorm, None, None]
        assert not any(each.is_ours for each in asked)

    @pytest.mark.parametrize('kind', ['a_file', LazyObject('a_file')], ids=str)
    def test_a_module_is_no_norm(self, tmp_path, monkeypatch, kind):
        """MMEngine's registry finds it, under a name that nobody registered."""
        (tmp_path / 'a_file.py').write_text('')
        monkeypatch.syspath_prepend(tmp_path)
        (asked,) = asked_norms(Config(dict(model=dict(norm_cfg=dict(type=kind)))))
        assert asked.norm is None

    def test_of_a_file_in_pure_python(self, in_pure_python):
        cfg = in_pure_python(
            'from mmubn import UBN\nmodel.update(dict(backbone=dict(norm_cfg=dict(type=UBN, threshold=0.2))))'
        )
        (asked,) = asked_norms(cfg)
        assert (asked.norm, asked.name, asked.place) == (UBN, 'UBN', 'backbone.norm_cfg')
        assert asked.norm_cfg == dict(type=UBN, eps=1e-3, threshold=0.2)
        cfg.merge_from_dict({'model.backbone.norm_cfg.type': 'SyncUBN'})
        assert [asked.norm for asked in asked_norms(cfg)] == [SyncUBN]


class TestNameTypes:
    def named(self, kind, scope='mmengine'):
        cfg = Config(dict(default_scope=scope, model=dict(backbone=dict(norm_cfg=dict(type=kind)))))
        name_types(cfg)
        return cfg.model.backbone.norm_cfg['type']

    @pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmpretrain', None])
    def test_norms_of_ours(self, scope):
        assert [self.named(norm, scope) for norm in mmubn.layers.NORMS] == [
            norm.__name__ for norm in mmubn.layers.NORMS
        ]

    def test_those_with_a_name_of_their_own(self):
        MODELS.register_module(module=Registered)
        try:
            assert self.named(Registered) == 'Registered'
        finally:
            MODELS.module_dict.pop('Registered')
        assert self.named(Registered) is Registered

    def test_another_class_of_a_name_that_is_taken(self):
        assert self.named(type('UBN', (UBN,), {})) is not UBN
        assert self.named(type('UBN', (UBN,), {})) != 'UBN'

    @pytest.mark.parametrize('kind', [nn.BatchNorm2d, Unregistered, 'BN', 'UBN', 'mmubn.UBN', 'Nowhere'])
    def test_all_else_stays(self, kind):
        assert self.named(kind) is kind

    @pytest.mark.parametrize('network', ['VisionTransformer', 'XCiT'])
    def test_networks_that_take_names_alone(self, network):
        """MMPretrain has a build_norm_layer of its own."""
        cfg = Config(dict(default_scope='mmpretrain', model=dict(type=network, norm_cfg=dict(type=UBN))))
        with pytest.raises(TypeError, match='must be a str'):
            PRETRAIN_MODELS.build(cfg.model)
        name_types(cfg)
        with torch.device('meta'):
            model = PRETRAIN_MODELS.build(cfg.model)
        assert any(isinstance(module, UBN) for module in model.modules())

    @pytest.mark.parametrize(
        'kind',
        [
            'Pretrained',
            mmengine.model.PretrainedInit,
            mmubn.openmmlab.pretrained.PretrainedInit,
            'mmengine.model.weight_init.PretrainedInit',
        ],
        ids=str,
    )
    @pytest.mark.parametrize('several', [False, True])
    def test_pretrained(self, kind, several):
        init_cfg = dict(type=kind, checkpoint='a.pth', strict=True)
        other = dict(type='Kaiming', layer='Conv2d')
        cfg = Config(dict(model=dict(backbone=dict(init_cfg=[other, init_cfg] if several else init_cfg))))
        name_types(cfg)
        expected = dict(type='Pretrained', checkpoint='a.pth', strict=True)
        assert cfg.model.backbone.init_cfg == ([other, expected] if several else expected)

    def test_an_initializer_of_the_user_s_own_stays(self):
        class Mine(mmengine.model.PretrainedInit):
            pass

        cfg = Config(dict(model=dict(init_cfg=dict(type=Mine, checkpoint='a.pth'))))
        name_types(cfg)
        assert cfg.model.init_cfg['type'] is Mine
        assert is_pretrained(cfg.model.init_cfg)

    def test_a_pretrained_class_of_ours_is_run_last_too(self, tmp_path):
        """By itself MMEngine runs it first, and the children's init_weights overwrite what it loaded."""
        torch.save({'child.weight': torch.full((2, 2), 7.0)}, tmp_path / 'weights.pth')
        kind = mmubn.openmmlab.pretrained.PretrainedInit
        cfg = Config(
            dict(model=dict(type='Parent', init_cfg=dict(type=kind, checkpoint=str(tmp_path / 'weights.pth'))))
        )
        MODELS.register_module(module=Parent)
        try:
            before = MODELS.build(cfg.model)
            before.init_weights()
            name_types(cfg)
            after = MODELS.build(cfg.model)
            after.init_weights()
        finally:
            MODELS.module_dict.pop('Parent')
        assert before.child.weight.eq(1).all()
        assert after.child.weight.eq(7).all()


class Child(mmengine.model.BaseModule):
    def __init__(self):
        super().__init__(dict(type='Constant', val=1, layer='Child'))
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.bias = None


class Parent(mmengine.model.BaseModule):
    def __init__(self, init_cfg):
        super().__init__(init_cfg)
        self.child = Child()


def test_is_pretrained():
    assert is_pretrained(dict(type='Pretrained'))
    assert not any(map(is_pretrained, [dict(), dict(type=None), dict(type='Kaiming'), dict(type=UBN), dict(type='X')]))


class TestMakeResumable:
    """Hooks by their classes, and by the dotted names that a copy of a config has."""

    @pytest.mark.parametrize(
        'kind', [CheckpointHook, 'CheckpointHook', 'mmengine.CheckpointHook', 'mmengine.hooks.CheckpointHook'], ids=str
    )
    def test_the_checkpoint_hook_of_mmengine_is_replaced(self, kind):
        cfg = Config(dict(default_hooks=dict(checkpoint=dict(type=kind, interval=3))))
        make_resumable(cfg)
        assert cfg.default_hooks.checkpoint == dict(type='AtomicCheckpointHook', interval=3)

    @pytest.mark.parametrize('kind', [AtomicCheckpointHook, type('CheckpointHook', (CheckpointHook,), {})], ids=str)
    def test_any_other_stays(self, kind):
        cfg = Config(dict(default_hooks=dict(checkpoint=dict(type=kind))))
        make_resumable(cfg)
        assert cfg.default_hooks.checkpoint == dict(type=kind)

    @pytest.mark.parametrize('kind', [IterationSeedHook, f'{IterationSeedHook.__module__}.IterationSeedHook'], ids=str)
    def test_the_seed_hook_is_there_once(self, kind):
        cfg = Config(dict(custom_hooks=[dict(type=kind)]))
        make_resumable(cfg)
        assert cfg.custom_hooks == [dict(type=kind)]
