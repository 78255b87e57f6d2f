"""Detectors whose norms leave padding out: what an image gives in a padded batch, and what cannot be known."""

import copy
import logging
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, ImgDataPreprocessor
from mmengine.registry import HOOKS, init_default_scope
from torch import nn

import mmubn
from mmubn import UBN
from mmubn.layers import areas
from mmubn.openmmlab.errors import ConfigError, DataError
from mmubn.openmmlab.hooks import PaddingAwareHook
from mmubn.openmmlab.padding import ignore_padding, layers_with_pooled_terms

DIGITS = Path(__file__).resolve().parents[3] / 'configs' / 'digits' / 'mask-rcnn_r18_fpn_ubn_digits.py'


def points(channels, norm=UBN, stride=2):
    """A place of the output sees one place of the input, and the pooled terms."""
    norms = randomize(norm(channels, **(dict(kernel_size=1) if norm is UBN else {})))
    return nn.Sequential(nn.Conv2d(3 if stride == 2 else channels, channels, 1, stride), norms, nn.ReLU())


class PointDetector(BaseDetector):
    """Its prediction is its neck's map."""

    def __init__(self, norm=UBN):
        super().__init__(data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=8))
        torch.manual_seed(0)
        self.backbone, self.neck = points(4, norm), points(4, norm, stride=4)
        self.roi_head = randomize(UBN(4))
        self.stop = None

    def extract_feat(self, batch_inputs):
        x = self.neck(self.backbone(batch_inputs))
        if self.stop is not None:
            raise self.stop
        return x

    def loss(self, batch_inputs, batch_data_samples):
        return dict(loss=self.extract_feat(batch_inputs).mean())

    def predict(self, batch_inputs, batch_data_samples):
        x = self.extract_feat(batch_inputs)
        self.roi_head(x[:1, :, :1, :1].expand(7, -1, -1, -1))  # regions, which are no map of the batch
        return x

    def _forward(self, batch_inputs, batch_data_samples=None):
        return self.extract_feat(batch_inputs)


class ToyTTA(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


@pytest.fixture(autouse=True)
def nothing_stays():
    init_default_scope('mmdet')
    yield
    assert areas.innermost() is None
    assert not areas.is_used()


@pytest.fixture
def detector():
    return PointDetector().eval()


def data(*sizes, **metainfo):
    """What a data loader gives for images of these sizes."""
    samples = []
    for i, (h, w) in enumerate(sizes):
        meta = dict(img_id=i, img_path=f'{i}.png', img_shape=(h, w), ori_shape=(h, w), scale_factor=(1.0, 1.0))
        samples.append(DetDataSample(metainfo=meta | metainfo))
    random = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, h, w), generator=random, dtype=torch.uint8) for h, w in sizes]
    return dict(inputs=images, data_samples=samples)


def pad(batch, *sides, value=0, **metainfo):
    """What a Pad in the pipeline makes of the first image: top, bottom, left, right."""
    (image, *_), (sample, *_) = batch['inputs'], batch['data_samples']
    top, bottom, left, right = sides
    h, w = image.shape[1:]
    padded = torch.empty(3, h + top + bottom, w + left + right, dtype=torch.uint8)
    padded[:] = torch.as_tensor(value).view(-1, 1, 1)
    padded[:, top : top + h, left : left + w] = image
    sample.set_metainfo(dict(ori_shape=(2 * h, 2 * w), scale_factor=(0.5, 0.5), img_shape=padded.shape[1:]) | metainfo)
    return dict(batch, inputs=[padded, *batch['inputs'][1:]])


def part(batch, i):
    return {key: values[i : i + 1] for key, values in batch.items()}


@pytest.mark.parametrize('norm', [UBN, mmubn.RBN, mmubn.IEBN, mmubn.UnitizedBN])
@torch.no_grad()
def test_batch_mates_do_not_matter(norm):
    """Where pooled terms alone see the padding, an image gives what it gives alone, but for rounding."""
    detector = PointDetector(norm).eval()
    batch = data((64, 48), (33, 64), (50, 21))
    padded = detector.test_step(batch)
    assert padded.shape[2:] == (8, 8)
    unpadded = copy.deepcopy(detector)
    unpadded.data_preprocessor = MODELS.build(dict(type='DetDataPreprocessor'))
    handle = ignore_padding(detector)
    y = detector.test_step(batch)
    for i, (h, w) in enumerate([(64, 48), (33, 64), (50, 21)]):
        alone = unpadded.test_step(part(batch, i))[0]
        assert alone.shape[1:] == (-(-h // 8), -(-w // 8))
        own = y[i, :, : alone.shape[1], : alone.shape[2]]
        torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(padded[i, :, : alone.shape[1], : alone.shape[2]], alone, rtol=1e-3)
    handle.remove()
    assert torch.equal(detector.test_step(batch), padded)


@torch.no_grad()
def test_a_detector_of_mmdetection():
    cfg = Config.fromfile(DIGITS).model
    cfg.roi_head.bbox_head.update(type='Shared4Conv1FCBBoxHead', norm_cfg=dict(type='UBN'))
    cfg.neck.norm_cfg = dict(type='UBN')
    torch.manual_seed(0)
    model = randomize(MODELS.build(cfg), scale=0.05).eval()
    batch = data((64, 64), (64, 64))
    found = []
    model.neck.register_forward_hook(lambda _, __, y: found.append(y))

    def maps(batch):
        found.clear()
        model.test_step(batch)
        return found[0]

    expected = maps(batch)
    padded_batch = data((64, 64), (40, 56))
    padded, alone = maps(padded_batch), maps(data((40, 56)))
    handle = ignore_padding(model)
    assert {name.split('.')[0] for name in handle.layers} == {'backbone', 'neck'}
    assert len(handle.layers) == 20 + 8
    assert all(map(torch.equal, maps(batch), expected)), 'bit for bit where nothing is padded'
    aware = maps(padded_batch)
    assert any(layers_with_pooled_terms(model.roi_head)), 'norms of the RoI head ran too'
    for one, other in zip(aware, padded, strict=True):
        assert torch.isfinite(one).all()
        assert not torch.equal(one[1], other[1])
        torch.testing.assert_close(one[0], other[0])  # the first image is not padded
    assert alone[0].shape[2:] == (16, 16)  # a divisor of 32 pads it alone, too


def test_in_training_everything_is_as_before(detector):
    """A frozen norm, in evaluation in a detector that trains, too: its gradient is that of the whole map."""
    batch = data((64, 48), (33, 64))
    detector.train()
    detector.neck[1].eval()
    expected = copy.deepcopy(detector)
    ignore_padding(detector)
    losses = []
    for each in (detector, expected):
        loss = each(**each.data_preprocessor(batch, True), mode='loss')['loss']
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for one, other in zip(detector.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad) if one.grad is not None else other.grad is None
    assert all(map(torch.equal, detector.buffers(), expected.buffers()))


class Pair(BaseDetector):
    """As SemiBaseDetector: its own forward in training, the teacher's methods in evaluation, by other ways."""

    def __init__(self, way):
        super().__init__()
        self.student, self.teacher, self.way = PointDetector(), PointDetector(), way

    def extract_feat(self, batch_inputs):
        return self.teacher.extract_feat(batch_inputs)

    def loss(self, batch_inputs, batch_data_samples):
        self.teacher.eval()
        x, samples = batch_inputs['sup'], batch_data_samples['sup']
        self.found = (
            self.teacher(x, samples, mode='predict') if self.way == 'call' else self.teacher.predict(x, samples)
        )
        return self.student.loss(x, samples)

    def predict(self, batch_inputs, batch_data_samples):
        if self.way == 'call':
            return self.teacher(batch_inputs, batch_data_samples, mode='predict')
        return self.teacher.predict(batch_inputs, batch_data_samples)

    _forward = predict


@pytest.mark.parametrize('way', ['method', 'call'])
def test_a_detector_of_detectors(way):
    """Training as ever, its teacher in evaluation too; evaluation without padding."""
    model = Pair(way)
    batch = PointDetector().data_preprocessor(data((64, 48), (33, 64)))
    expected = model.teacher.eval()(**batch, mode='predict')
    handle = ignore_padding(model)
    assert handle.layers == [f'{each}.{part}.1' for each in ('student', 'teacher') for part in ('backbone', 'neck')]
    aware = model.teacher(**batch, mode='predict')
    assert not torch.allclose(aware, expected, rtol=1e-3)
    model.train()(**{key: dict(sup=value) for key, value in batch.items()}, mode='loss')['loss'].backward()
    assert torch.equal(model.found, expected)
    assert torch.equal(model.eval()(**batch, mode='predict'), aware)


@torch.no_grad()
def test_an_empty_batch(detector):
    x = torch.zeros(0, 3, 64, 64)
    for samples in ([], None):
        expected = detector.extract_feat(x)
        ignore_padding(detector)
        assert detector(x, samples, mode='tensor').shape == expected.shape == (0, 4, 8, 8)
        ignore_padding(detector).remove()


@torch.no_grad()
def test_test_time_augmentation(detector):
    batch = data((64, 48), (33, 64))
    model = ToyTTA(module=detector)
    handle = ignore_padding(model)
    assert handle.layers == ['module.backbone.1', 'module.neck.1']
    y = model.test_step(dict(inputs=[batch['inputs']] * 2, data_samples=[batch['data_samples']] * 2))
    assert torch.equal(y[0][0], detector.test_step(batch)[0])


@pytest.mark.parametrize('what', ['the backbone', pytest.param('the detector', marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled(detector, what):
    ignore_padding(detector)
    batches = [data((64, 64), (64, 64)), data((64, 48), (33, 64)), data((20, 64), (64, 9))]
    expected = [detector.test_step(batch) for batch in batches]
    if what == 'the backbone':
        detector.backbone = torch.compile(detector.backbone, backend='eager')
    else:
        detector.compile(backend='eager')
    for batch, y in [*zip(batches, expected, strict=True)] * 2:
        torch.testing.assert_close(detector.test_step(batch), y)
    torch._dynamo.reset()


class TestSizes:
    @torch.no_grad()
    def test_a_pad_in_the_pipeline_is_seen(self, detector):
        """img_shape is then the padded one, and scale_factor that of Resize: an image of 100x80 made 50x40."""
        assert self.size_of(detector, pad(data((50, 40)), 0, 14, 0, 24)) == (50, 40)

    def size_of(self, detector, batch):
        """The size that is taken for that of the first image."""
        ignore_padding(detector)
        y = detector.test_step(batch)[0]
        image, sizes = batch['inputs'][0], [(50, 40), tuple(batch['inputs'][0].shape[1:])]
        found = []
        for h, w in sizes:
            alone = data((h, w))
            alone['inputs'] = [image[:, :h, :w]]
            rows, columns = -(-h // 8), -(-w // 8)
            if torch.allclose(y[:, :rows, :columns], detector.test_step(alone)[0][:, :rows, :columns], rtol=1e-4):
                found.append((h, w))
        (size,) = found
        return size

    @pytest.mark.parametrize('value', [0, 114, (104, 117, 124)])
    @pytest.mark.parametrize('flip', [dict(), dict(flip=True, flip_direction='horizontal')])
    @torch.no_grad()
    def test_a_pad_after_a_flip(self, detector, value, flip):
        """Test-time augmentation of RTMDet and YOLOX: Resize, RandomFlip, Pad."""
        detector.data_preprocessor = MODELS.build(
            dict(type='DetDataPreprocessor', mean=[103.5, 116.3, 123.7], std=[57.4, 57.1, 58.4], pad_size_divisor=8)
        )
        assert self.size_of(detector, pad(data((50, 40)), 0, 14, 0, 24, value=value, **flip)) == (50, 40)
        assert self.size_of(detector, pad(data((50, 40)), 0, 14, 0, 24, value=value, border=torch.ones(4))) == (50, 40)

    @pytest.mark.parametrize('metainfo', [dict(), dict(flip=True), dict(pad_param=(1, 1, 1, 1))])
    @torch.no_grad()
    def test_two_resizes(self, detector, metainfo):
        """scale_factor is that of the last: what is beyond ori_shape times it is image."""
        batch = data((64, 64), ori_shape=(100, 80), scale_factor=(0.5, 0.5), **metainfo)
        assert self.size_of(detector, batch) == (64, 64)
        batch['inputs'][0][:, 50:] = 0  # beside it there is more
        assert self.size_of(detector, batch) == (64, 64)

    @pytest.mark.parametrize(
        ('sides', 'metainfo'),
        [
            ((0, 14, 24, 0), dict(flip=True)),
            ((14, 0, 0, 24), dict(flip=True)),
            ((0, 0, 24, 0), dict(flip=True)),
            ((7, 7, 12, 12), dict(border=torch.tensor([7.0, 57, 12, 52]))),
            ((7, 7, 12, 12), dict(pad_param=(7, 7, 12, 12))),
        ],
    )
    def test_padding_on_another_side(self, detector, sides, metainfo):
        h, w = 64 - sides[0] - sides[1], 64 - sides[2] - sides[3]
        batch = pad(data((h, w)), *sides, value=114, **metainfo)
        ignore_padding(detector)
        with pytest.raises(
            DataError, match=rf"padded 0.png from {h}x{w} to 64x64, and by its '{next(iter(metainfo))}'"
        ):
            detector.test_step(batch)

    @torch.no_grad()
    def test_a_flip_before_the_padding_and_a_crop(self, detector):
        ignore_padding(detector)
        detector.test_step(data((40, 64), flip=True))
        detector.test_step(data((40, 64), ori_shape=(100, 100)))

    def test_larger_than_the_batch(self, detector):
        ignore_padding(detector)
        batch = data((64, 48), (33, 64))
        batch['data_samples'][0].set_metainfo(dict(img_shape=(128, 48), ori_shape=(128, 48)))
        with pytest.raises(DataError, match=r'img_shape of 0\.png is 128x48, which is larger than its batch of 64x64'):
            detector.test_step(batch)

    def test_no_img_shape(self, detector):
        batch = data((64, 48))
        batch['data_samples'] = [DetDataSample(metainfo=dict(img_id=0))]
        ignore_padding(detector)
        with pytest.raises(DataError, match=r"no 'img_shape'.*meta_keys of PackDetInputs"):
            detector(torch.zeros(1, 3, 64, 64), batch['data_samples'], mode='predict')


class TestNotKnown:
    def test_no_data_samples(self, detector):
        ignore_padding(detector)
        x = torch.zeros(2, 3, 64, 64)
        for call in (dict(mode='tensor'), dict(data_samples=None, mode='predict')):
            with pytest.raises(DataError, match='2 images came with no data samples'):
                detector(x, **call)
        with pytest.raises(DataError, match='2 images came with 1 data samples'):
            detector(x, data((64, 64))['data_samples'], mode='predict')
        with pytest.raises(DataError, match=r'expected a batch of images \(N, C, H, W\), got list'):
            detector([x], None, mode='predict')

    def test_the_backbone_alone(self, detector):
        ignore_padding(detector)
        with pytest.raises(DataError, match=r'Sequential was called outside of a forward of its detector.*remove\(\)'):
            detector.extract_feat(torch.zeros(2, 3, 64, 64))
        detector.train().extract_feat(torch.rand(2, 3, 64, 64))

    @torch.no_grad()
    def test_folded(self, detector):
        ignore_padding(detector)
        folded = mmubn.fold(detector)
        folded.test_step(data((64, 64)))
        with pytest.raises(RuntimeError, match=r'images of this batch are padded.*mmubn\.fold.*PaddingAwareHook'):
            folded.test_step(data((64, 44)))

    def test_no_detector(self):
        with pytest.raises(ConfigError, match='Linear is and has none: remove PaddingAwareHook'):
            ignore_padding(nn.Linear(2, 2))


class TestState:
    @pytest.mark.parametrize('error', [ValueError('wrong'), KeyboardInterrupt()])
    @torch.no_grad()
    def test_after_an_error(self, detector, error):
        """torch calls no hook after a KeyboardInterrupt: another model must not see what it has left."""
        ignore_padding(detector)
        batch, layer = data((64, 48), (33, 64)), randomize(UBN(3)).eval()
        expected, y = detector.test_step(batch), layer(torch.ones(2, 3, 7, 7))
        detector.stop = error
        with pytest.raises(type(error)):
            detector.test_step(batch)
        assert torch.equal(layer(torch.ones(2, 3, 7, 7)), y)
        detector.backbone.register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises((type(error), RuntimeError)):
            detector.test_step(batch)
        assert torch.equal(layer(torch.ones(2, 3, 7, 7)), y)
        detector.backbone._forward_hooks.popitem()
        detector.stop = None
        assert torch.equal(detector.test_step(batch), expected)

    @torch.no_grad()
    def test_of_copies(self, detector):
        batch = data((64, 48), (33, 64))
        before = detector.state_dict().keys()
        ignore_padding(detector)
        expected = detector.test_step(batch)
        assert detector.state_dict().keys() == before
        assert torch.equal(copy.deepcopy(detector).test_step(batch), expected)
        assert torch.equal(pickle.loads(pickle.dumps(detector)).test_step(batch), expected)

    @torch.no_grad()
    def test_copies_are_switched_off(self, detector):
        batch = data((64, 48), (33, 64))
        plain = detector.test_step(batch)
        ignore_padding(detector)
        expected = detector.test_step(batch)
        for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
            other.backbone.register_forward_hook(lambda *_: None)
            ignore_padding(other).remove()
            assert torch.equal(other.test_step(batch), plain)
            hooks = [each for module in other.modules() for name, each in vars(module).items() if 'forward' in name]
            assert sum(map(len, hooks)) == 1, "another's hook stays"
        assert torch.equal(detector.test_step(batch), expected)

    @torch.no_grad()
    def test_switched_on_twice(self, detector):
        batch = data((64, 48), (33, 64))
        plain = detector.test_step(batch)
        first, second = ignore_padding(detector), ignore_padding(detector)
        assert first.layers == second.layers
        assert len(detector._forward_pre_hooks) == 1
        assert not second.handles
        assert not torch.equal(detector.test_step(batch), plain)
        second.remove()
        assert torch.equal(detector.test_step(batch), plain)
        first.remove()
        assert torch.equal(detector.test_step(batch), plain)

    def test_of_threads(self, detector):
        ignore_padding(detector)
        batches = [data((64, 48), (33, 64)), data((20, 64), (64, 9)), data((64, 64), (64, 64))]
        with torch.no_grad():
            expected = [detector.test_step(batch) for batch in batches]
        found = [[] for _ in batches]

        def test(i):
            with torch.no_grad():
                found[i] += [detector.test_step(batches[i]) for _ in range(8)]

        threads = [threading.Thread(target=test, args=(i,)) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each, one in zip(expected, found, strict=True):
            assert len(one) == 8
            assert all(torch.equal(y, each) for y in one)


class TestHook:
    def runner(self, model, messages):
        logger = logging.Logger('runner')
        logger.addHandler(SimpleNamespace(level=0, handle=lambda record: messages.append(record.getMessage())))
        return SimpleNamespace(model=model, logger=logger)

    @torch.no_grad()
    def test_acts_within_a_run(self, detector):
        batch, messages = data((64, 48), (33, 64)), []
        hook, runner = HOOKS.build(dict(type='PaddingAwareHook')), self.runner(detector, messages)
        assert isinstance(hook, Hook)
        plain = detector.test_step(batch)
        hook.before_run(runner)
        assert not torch.equal(detector.test_step(batch), plain)
        assert messages == ['mmubn: in evaluation 2 layers of backbone and neck leave out the padding of a batch.']
        hook.before_run(runner)  # after a run that was stopped
        hook.after_run(runner)
        assert torch.equal(detector.test_step(batch), plain)
        assert not detector._forward_pre_hooks

    @torch.no_grad()
    def test_leaves_on_what_was_on(self, detector):
        batch, hook, runner = data((64, 48), (33, 64)), PaddingAwareHook(), self.runner(detector, [])
        handle = ignore_padding(detector)
        expected = detector.test_step(batch)
        hook.before_run(runner)
        hook.after_run(runner)
        assert torch.equal(detector.test_step(batch), expected)
        handle.remove()
        assert not detector._forward_pre_hooks

    def test_of_a_model_without_pooled_terms(self):
        messages = []
        PaddingAwareHook().before_run(self.runner(PointDetector(nn.BatchNorm2d), messages))
        assert messages == [
            'mmubn: in evaluation no layer of backbone and neck has to leave out the padding of a batch.'
        ]

    def test_of_a_classifier(self):
        with pytest.raises(ConfigError, match='ImgDataPreprocessor is and has none'):
            PaddingAwareHook().before_run(self.runner(ImgDataPreprocessor(), []))
