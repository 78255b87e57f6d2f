"""Built models with norms of this package: the same function, what is kept, what is refused, and the way back."""

import copy
import functools
import logging
import re
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import batch, randomize
from networks import TYPES, Net
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune
from torchvision.models import detection, segmentation

import mmubn
from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, convert_norms
from mmubn.layers import UnifiedNorm

EACH_TYPE = pytest.mark.parametrize('norm', TYPES, ids=lambda norm: norm.__name__)


def norms(model, kind=_BatchNorm):
    return [module for module in model.modules() if isinstance(module, kind)]


def with_statistics(model):
    """The model with norms as after some training."""
    for seed, norm in enumerate(norms(model)):
        parts = {name: norm._modules.pop(name) for name in ('drop', 'act') if name in norm._modules}
        randomize(norm, scale=0.1, seed=seed)
        norm._modules.update(parts)
    return model


def leaves(value):
    """The tensors in an output."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [leaf for each in values for leaf in leaves(each)]


def assert_close(found, expected, tolerance):
    """Within ``tolerance`` of the largest value of each tensor."""
    found, expected = leaves(found), leaves(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        limit = tolerance * float(other.detach().abs().max()) if other.numel() else 0
        torch.testing.assert_close(one, other, rtol=0, atol=limit)


def statistics(model):
    return [buffer for norm in norms(model) for buffer in (norm.running_mean, norm.running_var)]


def training_step(model, *inputs):
    torch.manual_seed(1)
    return model.train()(*copy.deepcopy(inputs))


def assert_same_function(theirs, *inputs, norm='UBN', part=None, **options):
    """In evaluation, and in a training step: the output, the statistics and the gradient of the first parameter.

    The training step once more in float64, with the gradient: that of a random network with small maps may lose all
    its digits in float32, with any norm. ``part`` computes what is compared in evaluation, by default the output.
    """
    part = part or (lambda model, x: model(x))
    exact = copy.deepcopy(theirs).double(), converted(copy.deepcopy(theirs).double(), norm, **options)
    theirs, ours = copy.deepcopy(theirs), converted(theirs, norm, **options)
    with torch.no_grad():
        assert_close(part(ours.eval(), inputs[0]), part(theirs.eval(), inputs[0]), 1e-5)
    assert_close(training_step(ours, *inputs), training_step(theirs, *inputs), 2e-3)
    assert_close(statistics(ours), statistics(theirs), 2e-3)

    gradients = []
    for model in exact:
        y = training_step(model, *in_double(inputs))
        sum(leaf.square().mean() for leaf in leaves(y)).backward()
        gradients.append(next(model.parameters()).grad)
    assert_close(*gradients, 1e-6)
    assert_close(*map(statistics, exact), 1e-6)


def in_double(value):
    if isinstance(value, dict):
        return {key: in_double(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_double(each) for each in value]
    return value.double() if value.is_floating_point() else value


def converted(model, norm='UBN', where=None, **options):
    """A converted copy of the model, and all its norms are of the package where none is left out."""
    ours = convert_norms(copy.deepcopy(model), norm, where, **options)
    if where is None:
        assert {isinstance(each, UnifiedNorm) for each in norms(ours)} == {True}
        assert len(norms(ours)) == len(norms(model))
    return ours


CLASSIFIERS = ('resnet18', 'mobilenet_v3_small', 'shufflenet_v2_x0_5', 'mnasnet0_5')
MORE_CLASSIFIERS = (
    'resnext50_32x4d',
    'densenet121',
    'efficientnet_b0',
    'regnet_y_400mf',
    'mobilenet_v2',
    'googlenet',
    'inception_v3',
)
TINY_INPUT = dict(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
FEW_BOXES = dict(TINY_INPUT, rpn_post_nms_top_n_train=40, box_batch_size_per_image=8)
DETECTORS = {
    'maskrcnn_resnet50_fpn': FEW_BOXES,
    'retinanet_resnet50_fpn': TINY_INPUT,
    'ssdlite320_mobilenet_v3_large': dict(weights=None, weights_backbone=None, num_classes=3),
}
MORE_DETECTORS = {
    'fasterrcnn_resnet50_fpn': FEW_BOXES,
    'fcos_resnet50_fpn': TINY_INPUT,
    'fasterrcnn_mobilenet_v3_large_320_fpn': TINY_INPUT,
    'fasterrcnn_resnet50_fpn_v2': FEW_BOXES,
    'maskrcnn_resnet50_fpn_v2': FEW_BOXES,
    'retinanet_resnet50_fpn_v2': TINY_INPUT,
}


def classifier(name):
    torch.manual_seed(0)
    options = dict(init_weights=False, aux_logits=False) if name in ('googlenet', 'inception_v3') else {}
    return with_statistics(torchvision.models.get_model(name, num_classes=5, **options))


def raw_outputs(detector, images):
    """Features and what the dense head makes of them; boxes of equal scores have no order."""
    features = detector.backbone(torch.stack(images))
    head = detector.head if hasattr(detector, 'head') else detector.rpn.head
    return features, head(list(features.values()))


def check_detector(name, options):
    torch.manual_seed(0)
    model = with_statistics(getattr(detection, name)(**options))
    images = [batch((3, 64, 64), seed=seed).sigmoid() for seed in range(2)]
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 10:40, 8:50] = 1
    target = dict(boxes=torch.tensor([[8.0, 10.0, 50.0, 40.0]]), labels=torch.tensor([1]), masks=masks)
    assert_same_function(model, images, [target, target], part=raw_outputs)


class TestTorchvision:
    @pytest.mark.parametrize('name', CLASSIFIERS)
    def test_classifiers(self, name):
        model = classifier(name)
        assert_same_function(model, batch((4, 3, 64, 64)))

    @pytest.mark.slow
    @pytest.mark.parametrize('name', MORE_CLASSIFIERS)
    def test_more_classifiers(self, name):
        model = classifier(name)
        assert_same_function(model, batch((4, 3, 128, 128)))

    @pytest.mark.parametrize('name', ['squeezenet1_1', 'convnext_tiny'])
    def test_without_batch_norm(self, name):
        with torch.device('meta'):
            model = torchvision.models.get_model(name)
        with pytest.raises(ValueError, match=rf'^convert_norms: this {type(model).__name__} has no BatchNorm'):
            convert_norms(model)

    @pytest.mark.parametrize('name', DETECTORS)
    def test_detectors(self, name):
        check_detector(name, DETECTORS[name])

    @pytest.mark.slow
    @pytest.mark.parametrize('name', MORE_DETECTORS)
    def test_more_detectors(self, name):
        check_detector(name, MORE_DETECTORS[name])

    @pytest.mark.parametrize(
        'name',
        [
            pytest.param('lraspp_mobilenet_v3_large', marks=pytest.mark.slow),
            'deeplabv3_mobilenet_v3_large',
            pytest.param('deeplabv3_resnet50', marks=pytest.mark.slow),
        ],
    )
    def test_segmentation(self, name):
        torch.manual_seed(0)
        model = with_statistics(getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3))
        assert_same_function(model, batch((2, 3, 64, 64)))

    def test_frozen_norms(self):
        """Those of a detector that starts from ImageNet."""
        frozen = functools.partial(torchvision.models.resnet18, norm_layer=torchvision.ops.FrozenBatchNorm2d)
        model = nn.Sequential(frozen(), nn.Unflatten(1, (1000, 1, 1)), nn.BatchNorm2d(1000))
        with pytest.raises(ValueError, match=r'^convert_norms: 0\.bn1, of type FrozenBatchNorm2d, .*UBN: it is frozen'):
            convert_norms(model)
        assert not norms(model, UnifiedNorm)
        convert_norms(model, strict=False)
        assert [type(each) for each in norms(model)] == [UBN]
        assert type(model[0].bn1) is torchvision.ops.FrozenBatchNorm2d
        convert_norms(model, strict=False)  # there is nothing more to do
        with pytest.raises(ValueError, match='19 more of 20 chosen norms cannot either'):
            convert_norms(frozen(), strict=False)


FAMILIES = (
    'resnet10t',
    'resnest14d',
    'efficientnet_b0',
    'regnety_002',
    'resnetv2_18',
    'cs3darknet_s',
    'ese_vovnet19b_slim_dw',
    'mobilenetv3_small_050',
)
# The second half gives its norms no norm_layer, or heeds it in places.
MORE_FAMILIES = (
    'res2net50_26w_4s',
    'densenet121',
    'gernet_s',
    'xception41',
    'inception_v4',
    'repvgg_a0',
    'dla34',
    'rexnetr_200',
    'ghostnet_050',
    'hrnet_w18_small',
    'skresnet18',
    'dpn48b',
    'fastvit_t8',
    'mobilenetv4_conv_small',
    'lcnet_050',
    'efficientvit_b0',
    'tf_efficientnet_b0',
)


class TestTimm:
    timm = pytest.importorskip('timm')

    def create(self, name, **options):
        torch.manual_seed(0)
        return with_statistics(self.timm.create_model(name, num_classes=3, **options))

    @pytest.mark.parametrize('name', FAMILIES)
    def test_families(self, name):
        model = self.create(name)
        acts = [[type(getattr(each, 'act', None)) for each in norms(one)] for one in (converted(model), model)]
        assert acts[0] == acts[1]
        assert_same_function(model, batch((2, 3, 64, 64)))

    @pytest.mark.slow
    @pytest.mark.parametrize('name', MORE_FAMILIES)
    def test_more_families(self, name):
        model = self.create(name)
        size = 256 if name == 'fastvit_t8' else 128
        assert_same_function(model, batch((4, 3, size, size)))

    def test_one_dimensional_norms_in_the_head(self):
        with torch.device('meta'):
            model = self.timm.create_model('repvit_m0_9')
        count = len(norms(model))
        with pytest.raises(
            ValueError, match=r'head\.head\.bn, of type BatchNorm1d, .* \(1 more of 108 chosen norms cannot'
        ):
            convert_norms(model)
        convert_norms(model, strict=False)
        assert len(norms(model, UBN)) == count - 2

    def test_features(self):
        model = self.create('resnet10t', features_only=True)
        assert_same_function(model, batch((2, 3, 64, 64)))

    @EACH_TYPE
    def test_there_and_back(self, norm):
        """Norms with an activation become timm's again, with the same keys, and synchronised ones too."""
        model, x = self.create('tinynet_e').eval(), batch((2, 3, 64, 64))
        expected, kinds = model(x), [type(each) for each in norms(model)]
        activations = [getattr(each, 'act', None) for each in norms(model)]
        keys = model.state_dict().keys()
        convert_norms(model, norm)
        assert_close(model(x), expected, 1e-5)
        convert_norms(model, 'BN')
        assert_close(model(x), expected, 1e-5)
        assert model.state_dict().keys() == keys
        assert all(
            one is other
            for one, other in zip(activations, [getattr(n, 'act', None) for n in norms(model)], strict=True)
        )
        if norm is SyncUBN:
            assert {type(each).__name__ for each in norms(model)} == {'SyncBatchNormAct'}
        else:
            assert [type(each) for each in norms(model)] == kinds

    def test_synchronised(self):
        from timm.layers import convert_sync_batchnorm

        model, x = convert_sync_batchnorm(self.create('tinynet_e')).eval(), batch((2, 3, 64, 64))
        expected = model(x)
        assert {type(each) for each in norms(converted(model))} == {SyncUBN}
        assert_close(converted(model)(x), expected, 1e-5)

    def test_without_timm(self, monkeypatch):
        norm = convert_norms(self.create('tinynet_e').bn1)
        monkeypatch.delitem(__import__('sys').modules, 'timm.layers.norm_act')
        with pytest.raises(ValueError, match="it has an activation, as timm's BatchNormAct2d does; import timm first"):
            convert_norms(norm, 'BN')

    def test_frozen_and_split(self):
        from timm.layers import convert_splitbn_model
        from timm.utils.model import freeze_batch_norm_2d

        for model, reason in (
            (freeze_batch_norm_2d(self.create('tinynet_e')), 'it is frozen'),
            (convert_splitbn_model(self.create('resnet10t')), 'it has a forward of its own'),
        ):
            with pytest.raises(ValueError, match=reason):
                convert_norms(model)


@EACH_TYPE
class TestEachType:
    def test_from_batch_norm_and_back(self, norm):
        model, x = with_statistics(Net(nn.BatchNorm2d)), batch((3, 3, 8, 7))
        ours = converted(model, norm)
        assert {type(each) for each in norms(ours)} == {norm}
        assert not set(map(id, ours.parameters())) & set(map(id, model.parameters()))
        assert_same_function(model, x, norm=norm)
        back = convert_norms(ours, 'BN' if norm is not SyncUBN else 'SyncBN')
        assert_close(back.eval()(x), model.eval()(x), 1e-5)
        assert back.state_dict().keys() == model.state_dict().keys()

    def test_by_class(self, norm):
        assert type(convert_norms(nn.BatchNorm2d(4), norm)) is norm

    def test_stays(self, norm):
        model = Net(norm)
        layer = model.bn
        convert_norms(model, norm)
        assert model.bn is layer
        assert type(model.block[1]) is norm

    def test_back_where_it_is_not_exact(self, norm):
        model = randomize(Net(norm))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(
            ValueError, match=r'^convert_norms: bn, of type .* has no exact equal as BatchNorm: \w+_weight'
        ):
            convert_norms(model, 'BN')
        assert type(model.bn) is norm
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        convert_norms(model, 'BN', 'block.*')  # there is none of ours
        assert type(model.bn) is norm


class TestBetweenTypes:
    @pytest.mark.parametrize(
        'source', [RBN, functools.partial(BNET, kernel_size=5), BNET], ids=['RBN', 'BNET5', 'BNET']
    )
    def test_to_ubn(self, source):
        model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), source(4)), scale=0.3)
        ours = converted(model)
        assert type(ours[1]) is UBN
        assert ours[1].kernel_size == max(3, model[1].kernel_size)
        assert_same_function(model, batch((3, 3, 8, 7)))

    def test_keeps_its_arguments(self):
        norm = randomize(UBN(4, threshold=0.3, centering=False, kernel_size=5, similarity_samples=7))
        norm.running_similarity.fill_(0.4)
        for new in (convert_norms(norm, 'SyncUBN'), convert_norms(norm, kernel_size=7)):
            assert (new.threshold, new.centering, new.similarity_samples) == (0.3, False, 7)
            assert float(new.running_similarity) == pytest.approx(0.4)
            x = batch((2, 4, 9, 9))
            assert_close(new.eval()(x), norm.eval()(x), 1e-5)
        assert convert_norms(norm, threshold=0.3, kernel_size=5) is norm
        assert convert_norms(norm, threshold=0.2).threshold == 0.2

    def test_other_factors(self):
        with pytest.raises(
            ValueError, match='scale_weight of IEBN: expected zeros, because the scaling factor of IEBN'
        ):
            convert_norms(randomize(IEBN(4)), 'UBN')
        norm = randomize(UBN(4))
        with pytest.raises(ValueError, match='bias of UBN has no exact equal in UBN: the scaling factor multiplies'):
            convert_norms(norm, calibrate_bias=True)
        with pytest.raises(ValueError, match='neighbor_weight of UBN: expected zeros, because UBN has a 1 x 1 kernel'):
            convert_norms(norm, kernel_size=1)

    def test_types_of_ones_own(self):
        class Mine(UBN):
            pass

        norm = randomize(nn.BatchNorm2d(4))
        ours = convert_norms(norm, Mine, kernel_size=5)
        assert (type(ours), ours.kernel_size) == (Mine, 5)
        assert convert_norms(ours, Mine) is ours
        with pytest.raises(ValueError, match='a type of your own may do more'):
            convert_norms(ours, 'UBN')

    def test_synchronised(self):
        model = nn.Sequential(randomize(nn.SyncBatchNorm(4)), nn.BatchNorm2d(4)).eval()
        x = batch((2, 4, 6, 6))
        expected = model(x)
        ours = converted(model)
        assert [type(each) for each in ours] == [SyncUBN, UBN]
        assert_close(ours(x), expected, 1e-5)
        assert [type(each) for each in convert_norms(ours, 'BN')] == [nn.SyncBatchNorm, nn.BatchNorm2d]
        assert [type(each) for each in convert_norms(ours, 'SyncUBN')] == [SyncUBN, SyncUBN]
        assert [type(each) for each in convert_norms(ours, 'SyncBN')] == [nn.SyncBatchNorm, nn.SyncBatchNorm]
        with pytest.raises(ValueError, match='there is no synchronised RBN'):
            convert_norms(ours, 'RBN')


class TestKept:
    def test_mode_and_gradients(self):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
        model[0].requires_grad_(False)
        model[2].bias.requires_grad_(False)
        model[3].weight.requires_grad_(False)
        convert_norms(model)
        assert [each.training for each in model] == [True, False, True, True]
        trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in model]
        extra = {'neighbor_weight', 'center_weight', 'scale_weight', 'scale_bias'}
        assert trained == [set(), {'weight', 'bias', *extra}, {'weight', *extra}, {'bias'}]

    @pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
    def test_dtype(self, dtype):
        norm = randomize(nn.BatchNorm2d(4)).to(dtype).eval()
        ours, x = convert_norms(norm), batch((2, 4, 5, 5), dtype=dtype)
        assert {tensor.dtype for tensor in ours.state_dict().values() if tensor.is_floating_point()} == {dtype}
        y, expected = ours(x), norm(x)
        assert y.dtype == dtype
        assert_close(y, expected, 1e-12 if dtype == torch.float64 else 2e-2)

    def test_mixed_dtypes(self):
        norm = nn.BatchNorm2d(4)
        norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
        ours = convert_norms(norm)
        assert ours.neighbor_weight.dtype == torch.bfloat16
        assert ours.running_var.dtype == ours.running_similarity.dtype == torch.float32

    def test_meta(self):
        with torch.device('meta'):
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        real = nn.Sequential(nn.Conv2d(3, 4, 3), randomize(nn.BatchNorm2d(4)))
        convert_norms(model)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {'meta'}
        model.to_empty(device='cpu').load_state_dict(real.state_dict())
        assert_close(model.eval()(batch((3, 3, 8, 7))), real.eval()(batch((3, 3, 8, 7))), 1e-5)
        with pytest.raises(ValueError, match='on the meta device its values are not known'):
            convert_norms(UBN(4, device='meta'), 'BN')

    def test_memory_format(self):
        model = with_statistics(Net(nn.BatchNorm2d)).to(memory_format=torch.channels_last)
        ours = converted(model)
        assert ours.conv.weight.is_contiguous(memory_format=torch.channels_last)
        x = batch((2, 3, 8, 7)).to(memory_format=torch.channels_last)
        assert ours(x).is_contiguous(memory_format=torch.channels_last)
        assert_same_function(model, x)

    def test_arguments_and_counts(self):
        for options in (dict(eps=1e-3, momentum=0.03), dict(momentum=None)):
            norm = nn.BatchNorm2d(4, **options)
            norm(batch((2, 4, 5, 5)))
            ours = convert_norms(norm)
            assert (ours.eps, ours.momentum, int(ours.num_batches_tracked)) == (norm.eps, norm.momentum, 1)
            for layer in (norm, ours):
                layer(batch((2, 4, 5, 5), seed=1))
            assert_close(ours.running_var, norm.running_var, 1e-5)

    def test_track_running_stats(self):
        norm = nn.BatchNorm2d(4)
        norm.track_running_stats = False  # as in VAT, for a while
        ours = convert_norms(norm)
        assert ours.track_running_stats is False
        before = ours.running_var.clone()
        ours(batch((2, 4, 5, 5)))
        assert torch.equal(ours.running_var, before)

    def test_shared_layers(self):
        norm = randomize(nn.BatchNorm2d(4), scale=0.1)
        model = nn.ModuleDict(dict(a=nn.Sequential(norm, nn.ReLU()), b=nn.Sequential(nn.ReLU(), norm), c=norm))
        convert_norms(model, where='b.*')  # any of its names
        assert model['a'][0] is model['b'][1] is model['c']
        assert type(model['c']) is UBN

    def test_hooks(self):
        model, calls = with_statistics(Net(nn.BatchNorm2d)), []
        handles = [
            model.bn.register_forward_hook(lambda module, x, y: calls.append(('forward', type(module)))),
            model.bn.register_forward_pre_hook(lambda module, x, kwargs: calls.append('pre'), with_kwargs=True),
            model.bn.register_full_backward_hook(lambda module, dx, dy: calls.append('backward')),
            model.bn.register_state_dict_pre_hook(lambda module, prefix, keep: calls.append('state')),
        ]
        convert_norms(model)
        model(batch((2, 3, 8, 7))).sum().backward()
        model.state_dict()
        assert calls == ['pre', ('forward', UBN), 'backward', 'state']
        for handle in handles:
            handle.remove()
        model(batch((2, 3, 8, 7))).sum().backward()
        model.state_dict()
        assert len(calls) == 4

    def test_a_model_that_is_a_norm(self):
        norm = randomize(nn.BatchNorm2d(4)).eval()
        ours = convert_norms(norm)
        assert type(ours) is UBN
        assert type(norm) is nn.BatchNorm2d
        x = batch((2, 4, 5, 5))
        assert_close(ours(x), norm(x), 1e-5)

    def test_random_state_and_model(self):
        model = Net(nn.BatchNorm2d)
        state = torch.get_rng_state()
        assert convert_norms(model) is model
        assert torch.equal(torch.get_rng_state(), state)

    def test_what_comes_after(self):
        """Copies, pickles, folding, compiled and data-parallel forms are those of any model with these norms."""
        model, x = with_statistics(Net(nn.BatchNorm2d)).eval(), batch((2, 3, 8, 7))
        expected = model(x)
        ours = converted(model).eval()
        for other in (
            copy.deepcopy(ours),
            mmubn.fold(ours),
            torch.compile(ours, backend='eager'),
            nn.DataParallel(ours),
        ):
            assert_close(other(x), expected, 1e-5)
        ours.load_state_dict(model.state_dict())
        assert_close(ours(x), expected, 1e-5)


class TestWhere:
    @pytest.mark.parametrize(
        ('where', 'count'),
        [
            ('*.bn2', 8),
            ('layer[34].*.bn?', 8),
            ('bn1', 1),
            ('layer1.*', 4),
            ('*', 20),
            (re.compile(r'downsample\.1$'), 3),
            (re.compile(r'^layer1.*bn2'), 2),
            (lambda name, module: module.num_features >= 256, 10),
        ],
    )
    def test_chooses(self, where, count):
        with torch.device('meta'):
            model = torchvision.models.resnet18()
        convert_norms(model, 'BNET', where, kernel_size=5)
        assert len(norms(model, BNET)) == count
        assert len(norms(model)) == 20
        assert {each.kernel_size for each in norms(model, BNET)} == {5}

    @pytest.mark.parametrize(
        ('where', 'message'),
        [
            (
                '*.bn4',
                r"where='\*\.bn4' chooses none of the 20 BatchNorms of this ResNet; near it are .*'layer1\.0\.bn",
            ),
            ('backbone.*.bn2', r"near it are .*'layer1\.0\.bn2'"),
            ('layer2', r"inside it are 'layer2\.0\.bn1', .* and 2 more: write 'layer2\.\*'"),
            (re.compile('norm3'), r"where=re\.compile\('norm3'\) chooses none"),
            (lambda name, module: False, r"where=<lambda> chooses none .*; their names are 'bn1', 'layer1\.0\.bn1'"),
        ],
    )
    def test_chooses_none(self, where, message):
        with torch.device('meta'):
            model = torchvision.models.resnet18()
        with pytest.raises(ValueError, match=message):
            convert_norms(model, 'UBN', where)

    @pytest.mark.parametrize('where', [re.compile(b'1'), lambda name: True, lambda: True, b'*.bn1', [1]])
    def test_of_a_wrong_kind(self, where):
        with pytest.raises(TypeError, match=r"where must be a glob, 're:' and a regular expression, .* got"):
            convert_norms(nn.BatchNorm2d(3), where=where)

    def test_an_expression_of_a_config(self):
        with torch.device('meta'):
            model = convert_norms(torchvision.models.resnet18(), where='re:^layer[12].*bn2$')
        assert len(norms(model, UBN)) == 4
        with pytest.raises(ValueError, match=r"where='re:\(' is no regular expression: "):
            convert_norms(model, where='re:(')

    def test_of_another_type(self):
        with pytest.raises(TypeError, match=r'where must be a glob, .* got 3'):
            convert_norms(nn.BatchNorm2d(3), where=3)


def parametrized(norm):
    parametrize.register_parametrization(norm, 'weight', nn.Softplus())
    return norm


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def with_part(norm):
    norm.adapter = nn.Conv2d(4, 4, 1)
    return norm


def with_buffer(norm):
    norm.register_buffer('scale', torch.ones(4))
    return norm


def with_hooked_parameter(norm):
    norm.weight.register_hook(lambda gradient: gradient * 2)
    return norm


def replaced_forward(norm):
    norm.forward = lambda x: x
    return norm


OBSTACLES = {
    '1-D': (lambda: nn.BatchNorm1d(4), r'its inputs are not \(N, C, H, W\)'),
    '3-D': (lambda: nn.BatchNorm3d(4), r'its inputs are not \(N, C, H, W\)'),
    'lazy': (nn.LazyBatchNorm2d, 'it is lazy and has no channels yet'),
    'lazy 1-D': (nn.LazyBatchNorm1d, 'it is lazy and has no channels yet'),
    'frozen': (lambda: torchvision.ops.FrozenBatchNorm2d(4), 'it is frozen'),
    'no running statistics': (lambda: nn.BatchNorm2d(4, track_running_stats=False), 'it has no running statistics'),
    'ours without': (lambda: BNET(4, track_running_stats=False), 'it has no running statistics'),
    'no parameters': (lambda: nn.BatchNorm2d(4, affine=False), r'no weight or bias \(affine=False'),
    'parametrized': (lambda: parametrized(nn.BatchNorm2d(4)), 'is computed from other tensors'),
    'ours parametrized': (lambda: parametrized(RBN(4)), 'is computed from other tensors'),
    'pruned': (lambda: prune.l1_unstructured(nn.BatchNorm2d(4), 'weight', 1), 'is computed from other tensors'),
    'own forward': (lambda: OwnForward(4), 'it has a forward of its own'),
    'replaced forward': (lambda: replaced_forward(nn.BatchNorm2d(4)), 'it has a forward of its own'),
    'a part': (lambda: with_part(nn.BatchNorm2d(4)), 'it has a forward of its own|it has parts of its own: adapter'),
    'a buffer': (lambda: with_buffer(nn.BatchNorm2d(4)), 'it has parts of its own: scale'),
    'a hooked parameter': (lambda: with_hooked_parameter(nn.BatchNorm2d(4)), 'its parameters have hooks of their own'),
    'an eps of 0': (lambda: nn.BatchNorm2d(4, eps=0), 'UBN: eps must be a positive number, got 0'),
    'a momentum of 2': (
        lambda: nn.BatchNorm2d(4, momentum=2),
        r'momentum must be a number in \[0, 1\], or None, got 2',
    ),
}


class TestObstacles:
    @pytest.mark.parametrize(('make', 'reason'), OBSTACLES.values(), ids=OBSTACLES)
    def test_is_an_error_or_left(self, make, reason):
        model = nn.ModuleDict(dict(fine=nn.BatchNorm2d(4), odd=make(), more=nn.BatchNorm2d(4)))
        before = list(model.values())
        with pytest.raises(
            ValueError, match=rf'^convert_norms: odd, of type \w+, has no exact equal as UBN: .*({reason})'
        ) as error:
            convert_norms(model)
        assert str(error.value).endswith('Nothing was changed.')
        assert all(one is other for one, other in zip(model.values(), before, strict=True)), 'nothing half done'
        convert_norms(model, strict=False)
        assert [type(model[name]) for name in ('fine', 'more')] == [UBN, UBN]
        assert model['odd'] is before[1]
        assert convert_norms(nn.ModuleDict(dict(fine=nn.BatchNorm2d(4), odd=before[1])), where='fine')

    def test_alone(self):
        for strict in (True, False):
            with pytest.raises(ValueError, match='this BatchNorm2d has no exact equal as UBN: it has no running'):
                convert_norms(nn.BatchNorm2d(3, track_running_stats=False), strict=strict)

    def test_instance_norm_is_none(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.GroupNorm(1, 3))
        convert_norms(model)
        assert [type(each) for each in model] == [UBN, nn.InstanceNorm2d, nn.GroupNorm]

    def test_a_shared_parameter(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
        model[1].weight = model[0].weight
        with pytest.raises(ValueError, match='it shares a parameter or a buffer with another module'):
            convert_norms(model)

    def test_held_in_a_list(self):
        model = Net(nn.BatchNorm2d)
        model.norms = [model.bn]
        with pytest.raises(
            ValueError, match=r'bn, of type BatchNorm2d, .*: norms holds it too, outside of the modules'
        ):
            convert_norms(model)
        convert_norms(model, strict=False)
        assert (type(model.bn), type(model.block[1])) == (nn.BatchNorm2d, UBN)

    @pytest.mark.parametrize(
        'hold',
        [
            lambda norm: [[norm]],
            lambda norm: {'a': [norm]},
            lambda norm: {norm},
            lambda norm: (0, functools.partial(norm)),
            lambda norm: functools.partial(max, key=norm),
            lambda norm: norm.forward,
            lambda norm: [nn.Sequential(norm)],
        ],
    )
    def test_held_in_anything(self, hold):
        model = Net(nn.BatchNorm2d)
        object.__setattr__(model, 'held', hold(model.bn))
        with pytest.raises(ValueError, match=r'bn, of type BatchNorm2d, .*: held holds it too, outside of the modules'):
            convert_norms(model)

    def test_held_in_a_ring(self):
        model = Net(nn.BatchNorm2d)
        model.ring = [model]
        model.ring.append(model.ring)
        assert type(convert_norms(model).bn) is UBN

    @pytest.mark.parametrize('method', ['forward', '__call__', 'train', 'eval'])
    def test_a_method_of_its_own(self, method):
        own = type('Own', (nn.BatchNorm2d,), {method: lambda self, *args: None})
        with pytest.raises(ValueError, match=f'it has a {method} of its own'):
            convert_norms(own(3))

    def test_a_shared_buffer(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
        model[1].running_mean = model[0].running_mean
        with pytest.raises(ValueError, match='it shares a parameter or a buffer with another module'):
            convert_norms(model)

    def test_strict_is_no_way_out_where_nothing_is_left(self):
        with pytest.raises(
            ValueError, match='strict=False leaves some as they are, but here nothing would be converted'
        ):
            convert_norms(nn.Sequential(nn.BatchNorm1d(3)), strict=False)

    def test_a_lazy_one_after_a_batch(self):
        model = nn.Sequential(nn.LazyBatchNorm2d())
        model(batch((2, 4, 5, 5)))
        assert convert_norms(model)[0].num_features == 4


def test_attributes_of_the_user_are_kept():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].tag = 'mine'
    model[0].weight.no_decay = True
    for norm in ('UBN', 'BNET', 'BN'):
        convert_norms(model, norm)
        assert (model[0].tag, model[0].weight.no_decay) == ('mine', True)
        assert not hasattr(model[0].bias, 'no_decay')
    assert vars(model[0]).keys() == vars(nn.BatchNorm2d(3)).keys() | {'tag'}


class TestArguments:
    @pytest.mark.parametrize(
        ('arguments', 'options', 'error', 'message'),
        [
            (('UBNN',), {}, ValueError, r"norm must be UBN, .*, BN or SyncBN, .* got 'UBNN'; did you mean UBN\?"),
            ((nn.GroupNorm,), {}, ValueError, 'norm must be UBN, .*GroupNorm'),
            ((nn.BatchNorm1d,), {}, ValueError, 'norm must be UBN, .*BatchNorm1d'),
            ((), dict(kernel_sise=5), TypeError, r'UBN has no option kernel_sise; did you mean kernel_size\?'),
            (('RBN',), dict(kernel_size=5), TypeError, 'RBN has no option kernel_size; it has none'),
            (('BN',), dict(kernel_size=5), TypeError, 'BatchNorm has no option kernel_size; it has none'),
            ((), dict(kernel_size=4), ValueError, 'UBN: kernel_size must be a positive odd integer, got 4'),
            ((), dict(eps=1e-3), TypeError, 'eps is no option: each norm keeps that of the layer it replaces'),
            ((), dict(device='cpu'), TypeError, 'device is no option'),
        ],
    )
    def test_wrong(self, arguments, options, error, message):
        model = Net(nn.BatchNorm2d)
        with pytest.raises(error, match=message):
            convert_norms(model, *arguments, **options)
        assert not norms(model, UnifiedNorm)

    def test_model(self):
        with pytest.raises(TypeError, match=r'model must be a torch\.nn\.Module, got a OrderedDict'):
            convert_norms(Net(nn.BatchNorm2d).state_dict())

    def test_torchscript(self):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.trace(nn.BatchNorm2d(3), batch((2, 3, 4, 4))))
        with pytest.raises(ValueError, match='1 is compiled by TorchScript: convert the model that it was made from'):
            convert_norms(model)

    def test_no_norms(self):
        with pytest.raises(ValueError, match='this Sequential has no BatchNorm; what it has: GroupNorm, LayerNorm'):
            convert_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.LayerNorm(4)))


class TestOptimizer:
    def test_of_before(self):
        model, x = Net(nn.BatchNorm2d), batch((2, 3, 8, 7))
        before = torch.optim.SGD(model.parameters(), 0.1)
        others = torch.optim.Adam(model.conv.parameters(), 0.1)
        before.step()
        convert_norms(model, where='block.*')
        model(x).sum().backward()
        with pytest.raises(
            RuntimeError, match=r'^SGD was built before convert_norms replaced block\.1\.weight, .*: build the'
        ):
            before.step()
        for optimizer in (others, torch.optim.SGD(model.parameters(), 0.1)):
            for _ in range(2):
                optimizer.step()

    def test_of_a_copy(self):
        model = Net(nn.BatchNorm2d)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        convert_norms(copy.deepcopy(model))
        optimizer.step()

    def test_of_a_norm_that_is_the_model(self):
        norm = nn.BatchNorm2d(3)
        convert_norms(norm)
        torch.optim.SGD(norm.parameters(), 0.1).step()

    def test_wrapped(self, tmp_path):
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(Net(nn.BatchNorm2d))
            with pytest.raises(
                ValueError, match=r'the model is wrapped by DistributedDataParallel, .*: convert the model'
            ):
                convert_norms(model)
        finally:
            torch.distributed.destroy_process_group()


class TestLog:
    def test_says_what_was_replaced(self, caplog):
        with torch.device('meta'):
            model = torchvision.models.resnet18()
        model.head = nn.BatchNorm1d(5)
        with caplog.at_level(logging.INFO, 'mmubn'):
            convert_norms(model, 'BNET', '*.bn2')
            convert_norms(model, 'BNET', lambda name, module: 'layer' not in name or 'bn2' in name, strict=False)
        assert [record.getMessage() for record in caplog.records] == [
            'mmubn: 8 BatchNorm2d -> BNET: layer1.*.bn2 (2), layer2.*.bn2 (2), layer3.*.bn2 (2), layer4.*.bn2 (2)',
            'mmubn: 1 BatchNorm2d -> BNET: bn1; 8 stay as they are; 1 left: head (its inputs are not (N, C, H, W))',
        ]


@pytest.mark.filterwarnings('ignore')
def test_the_page():
    """The blocks of docs/convert.md, in order, and its config."""
    page = (Path(__file__).parents[1] / 'docs' / 'convert.md').read_text()
    names = {}
    for block in re.findall(r'```python\n(.*?)```', page, re.DOTALL):
        exec(block, names)

    from mmdet.registry import MODELS
    from mmengine.config import Config

    cfg = Config.fromstring(names['config'], '.py')
    with MODELS.switch_scope_and_registry('mmdet') as registry:
        backbone = registry.build(cfg.model.backbone)
    assert {type(norm) for name, norm in backbone.named_modules() if name.endswith('.bn3')} == {BNET}
    assert len(norms(backbone, BNET)) == 16


def test_the_block_of_the_readme():
    page = (Path(__file__).parents[1] / 'README.md').read_text()
    (block,) = re.findall(r'test_the_block_of_the_readme -->\n```python\n(.*?)```', page, re.DOTALL)
    names = {}
    exec(block, names)
    assert len(norms(names['model'], UBN)) == 53
