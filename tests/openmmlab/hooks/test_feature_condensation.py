"""What the hook measures, against loops over all pairs of samples in float64; that training does not notice it."""

import copy
import itertools
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from mmpretrain.structures import DataSample
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from mmubn import BNET, UBN, SyncUBN
from mmubn.analysis.runs import read_layer_log, read_scalars, series
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.hooks import FeatureCondensationHook
from mmubn.openmmlab.hooks.fixed_batch import norm_layers

NUMBERS = itertools.count()


class Images(Dataset):
    """Images that have something in common, of 3 channels and 4 x 4 pixels; others each time with ``noise``."""

    def __init__(self, noise=False):
        shared = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
        own = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        self.images = 0.7 * shared + own
        self.noise = noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        scale = 1 + random.random() + np.random.rand() + torch.rand(()) if self.noise else 1
        return dict(inputs=scale * self.images[index])


class Net(BaseModel):
    """Layers in a row."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def body(self, x):
        return self.layers(x)

    def forward(self, inputs, mode='tensor'):
        y = self.body(inputs)
        if mode == 'loss':
            return dict(loss=(y - torch.linspace(-1, 2, y.shape[-1])).square().mean())
        return y if mode == 'tensor' else [{}] * len(y)


class Beside(Net):
    """Layers side by side, each of which gets the images as they are."""

    def body(self, x):
        return sum(layer(x) for layer in self.layers)


def train(folder, model, hooks=(), epochs=1, batch_size=4, lr=0.0, data=None, workers=0, backends=(), **options):
    """A runner that has trained, without shuffling unless ``data`` differs each time; its work dir is ``folder``."""
    data = Images() if data is None else data
    loader = dict(
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=dict(type='default_collate' if isinstance(data, Images) else 'pseudo_collate'),
    )
    in_order = dict(type='DefaultSampler', shuffle=False)
    sampler = dict(type='DefaultSampler', shuffle=getattr(data, 'noise', False))
    validation = Images() if isinstance(data, Images) else data
    settings = dict(
        train_dataloader=dict(loader, dataset=data, sampler=sampler),
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_begin=1000),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=lr, momentum=0.9)),
        val_dataloader=dict(loader, dataset=validation, sampler=in_order),
        val_cfg={},
        val_evaluator=[],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        custom_hooks=list(hooks),
        visualizer=dict(
            type='Visualizer', vis_backends=[dict(type=f'{name}VisBackend') for name in ('Local', *backends)]
        ),
        randomness=dict(seed=0),
        experiment_name=f'{folder} {next(NUMBERS)}',  # MMEngine keeps one visualizer per name
    )
    runner = Runner(model, str(folder), **settings | options)
    runner.train()
    return runner


def measured(folder, quantity):
    """What the hook wrote: values by step, of one layer after the other."""
    log = read_layer_log(folder, 'feature_condensation.jsonl')[quantity]
    return dict(zip(log.steps.tolist(), log.values.tolist(), strict=True))


def similarity(*inputs):
    """The mean cosine over the ordered pairs of samples within each of the inputs."""
    cosines = []
    for x in inputs:
        f = x.flatten(1).double().numpy()
        lengths = [math.sqrt((each**2).sum()) for each in f]
        cosines += [f[i] @ f[j] / lengths[i] / lengths[j] for i in range(len(f)) for j in range(len(f)) if i != j]
    return np.mean(cosines) if cosines else math.nan


def inputs_of(model, *args, **kwargs):
    """What each norm of a copy of ``model`` gets in one forward, by name: a list, of one tensor per call."""
    model = copy.deepcopy(model)
    found = {name: [] for name in norm_layers(model)}
    for name, layer in norm_layers(model).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: found[name].append(x[0].clone()))
    with torch.no_grad():
        model(*args, mode='tensor', **kwargs)
    return found


def similarities(model, *args, **kwargs):
    return [similarity(*inputs) for inputs in inputs_of(model, *args, **kwargs).values()]


def drawn(count, images):
    """The images of a fixed batch."""
    return images[np.random.default_rng(0).choice(len(images), count, replace=False)]


def net():
    torch.manual_seed(0)
    return Net(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), UBN(4))


NAMES = ['layers.0', 'layers.2', 'layers.3', 'layers.4']


class TestFixedBatch:
    """10 of 12 images, forwarded in chunks of 4, 4 and 2."""

    @pytest.fixture(scope='class')
    @classmethod
    def run(cls, tmp_path_factory):
        folder, model = tmp_path_factory.mktemp('run'), net()
        before = copy.deepcopy(model).eval()
        hook = FeatureCondensationHook(fixed_interval=4, num_samples=10, threshold=0.28)
        train(folder, model, [hook], epochs=2, lr=0.1)
        images = drawn(10, Images().images)
        return folder, similarities(before, images), similarities(model.eval(), images)

    def test_the_similarity_is_that_of_all_pairs_of_the_whole_batch(self, run):
        folder, first, last = run
        found = measured(folder, 'fixed')
        assert list(found) == [0, 4, 6]
        np.testing.assert_allclose(found[0], first, rtol=5e-5, atol=1e-6)
        np.testing.assert_allclose(found[6], last, rtol=5e-5, atol=1e-6)
        assert np.abs(np.subtract(first, last)).max() > 0.01, 'training has changed it'

    def test_the_visualizer_has_it_by_layer_with_the_share_of_condensed_layers_and_the_mean(self, run):
        folder, *expected = run
        records = read_scalars(folder)
        for position, name in enumerate(NAMES):
            steps, values = series(records, f'similarity_fixed/layer.{name}')
            assert steps == [0, 4, 6]
            np.testing.assert_allclose(values[::2], [each[position] for each in expected], atol=1e-6)
        shares = [np.mean(np.array(each) > 0.28) for each in expected]
        assert 0 < shares[0] < 1
        assert series(records, 'condensed_share')[1][::2] == shares
        np.testing.assert_allclose(
            series(records, 'similarity_fixed_mean')[1][::2], [np.mean(each) for each in expected], atol=1e-6
        )

    def test_the_file_names_the_layers_and_their_types(self, run):
        log = read_layer_log(run[0], 'feature_condensation.jsonl')['fixed']
        assert log.layers == NAMES
        assert log.settings == {
            'types': ['BatchNorm2d', 'GroupNorm', 'InstanceNorm2d', 'UBN'],
            'threshold': 0.28,
            'num_samples': 10,
        }
        assert log.epochs.tolist() == [0, 1, 2]


class Recorder(Hook):
    """How many pre-hooks the first norm has in each iteration."""

    priority = 'LOW'

    def before_run(self, runner):
        self.counts = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.counts.append(len(runner.model.layers[0]._forward_pre_hooks))


class TestTrainingBatch:
    def test_the_similarity_is_that_of_its_first_samples_at_the_first_and_each_interval(self, tmp_path):
        """With learning rate 0 each layer gets what it gets from a copy of the model."""
        model, recorder = net(), Recorder()
        copied = copy.deepcopy(model)
        hook = FeatureCondensationHook(interval=2, num_samples=3)
        train(tmp_path, model, [hook, recorder], epochs=2)
        found = measured(tmp_path, 'batch')
        assert list(found) == [1, 2, 4, 6]
        assert recorder.counts == [1, 1, 0, 1, 0, 1]
        assert read_layer_log(tmp_path, 'feature_condensation.jsonl')['batch'].epochs.tolist() == [0, 0, 1, 2]
        for step, values in found.items():
            batch = Images().images[4 * ((step - 1) % 3) :][:4]
            expected = [similarity(*(x[:3] for x in inputs)) for inputs in inputs_of(copied, batch).values()]
            np.testing.assert_allclose(values, expected, rtol=5e-5, atol=1e-6)
        records = read_scalars(tmp_path)
        assert series(records, 'similarity_batch/layer.layers.0')[0] == [1, 2, 4, 6]

    def test_a_non_finite_input_has_no_similarity(self, tmp_path):
        data = Images()
        data.images[1] = math.inf
        train(tmp_path, Beside(nn.GroupNorm(1, 3)), [FeatureCondensationHook(interval=1)], data=data)
        found = measured(tmp_path, 'batch')
        assert math.isnan(found[1][0])
        assert found[2][0] == pytest.approx(similarity(data.images[4:8]), rel=5e-5)
        assert series(read_scalars(tmp_path), 'similarity_batch/layer.layers.0')[0] == [2, 3]


class Frozen(UBN):
    """Stays in evaluation mode, as in a backbone with norm_eval."""

    def train(self, mode=True):
        return super().train(False)


def test_running_similarity_and_gate_are_those_that_the_batch_saw(tmp_path):
    """Images without anything in common: s = 0, so tau = 0.9^t, which falls below 0.8 in the third iteration."""
    data = Images()
    data.images = torch.eye(48)[:12].view(12, 3, 4, 4)
    layers = [UBN(3, threshold=0.8), UBN(3, threshold=None), Frozen(3), BNET(3), nn.BatchNorm2d(3)]
    train(tmp_path, Beside(*layers), [FeatureCondensationHook(interval=1)], data=data)
    none = math.nan
    np.testing.assert_allclose(measured(tmp_path, 'batch')[3], [0] * 5, atol=1e-6)
    running = measured(tmp_path, 'running')
    for step in (1, 2, 3):
        np.testing.assert_allclose(running[step], [0.9**step, 1, 1, none, none], rtol=1e-5)
    expected = {1: [1, 1, 0, none, none], 2: [1, 1, 0, none, none], 3: [0, 1, 0, none, none]}
    np.testing.assert_equal(measured(tmp_path, 'gate'), expected)
    records = read_scalars(tmp_path)
    assert series(records, 'gate/layer.layers.0') == ([1, 2, 3], [1, 1, 0])
    assert series(records, 'running_similarity/layer.layers.0')[1] == pytest.approx([0.9, 0.81, 0.729])
    assert series(records, 'gate/layer.layers.3') == ([], [])


class Shared(Net):
    """One norm for two maps: of three samples as many columns as there are samples, and half of every sample."""

    def body(self, x):
        maps = x[:3, ..., : len(x)], x[..., :2]
        return sum(self.call(each).mean((0, 2, 3)).sum() for each in maps) + x.mean((1, 2, 3))[:, None]

    def call(self, x):
        return self.layers(x)


class Checkpointed(Shared):
    """What it makes of the first three samples is not kept, but computed again in the backward."""

    def call(self, x):
        if len(x) > 3:
            return super().call(x)
        return checkpoint(self.layers, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize('reentrant', [None, True, False], ids=['', 'reentrant checkpoint', 'checkpoint'])
def test_of_a_layer_that_is_called_twice_the_pairs_within_each_call_count(tmp_path, reentrant):
    model = Shared(nn.GroupNorm(1, 3)) if reentrant is None else Checkpointed(nn.GroupNorm(1, 3))
    model.reentrant = reentrant
    train(tmp_path, model, [FeatureCondensationHook(interval=1, num_samples=10)])
    batch = Images().images[4:8]
    assert measured(tmp_path, 'batch')[2][0] == pytest.approx(similarity(batch[:3], batch[..., :2]), rel=5e-5)
    fixed = drawn(10, Images().images)
    # The last chunk has two samples, so the first call there is of another shape, that of the second call.
    first_three = torch.cat([chunk[:3] for chunk in fixed[:8].split(4)])
    expected = similarity(first_three, fixed[8:, ..., :2], fixed[..., :2])
    assert measured(tmp_path, 'fixed')[0][0] == pytest.approx(expected, rel=5e-5)


class Regions(Net):
    """Of each image as many regions as its bound allows, as behind a detector's proposals; in a batch maybe none."""

    def body(self, x):
        regions = torch.cat([x[..., :2], x[..., 2:]])
        chosen = regions[regions.mean((1, 2, 3)) > self.bound]
        return self.layers(chosen).sum() + x.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize('bound', [-9, 0.1, 0.2, 9])
def test_where_regions_are_the_samples_their_number_may_vary_down_to_none(tmp_path, bound):
    model = Regions(nn.GroupNorm(1, 3))
    model.bound = bound
    train(tmp_path, model, [FeatureCondensationHook(interval=1)])
    images = Images().images

    def chosen(x):
        regions = torch.cat([x[..., :2], x[..., 2:]])
        return regions[[index for index, each in enumerate(regions) if each.mean() > bound]]

    for step in (1, 2, 3):
        expected = similarity(chosen(images[4 * step - 4 : 4 * step]))
        np.testing.assert_allclose(measured(tmp_path, 'batch')[step], [expected], rtol=5e-5, atol=1e-6)
    expected = similarity(torch.cat([chosen(chunk) for chunk in drawn(12, images).split(4)]))
    np.testing.assert_allclose(measured(tmp_path, 'fixed')[0], [expected], rtol=5e-5, atol=1e-6)
    assert bool(series(read_scalars(tmp_path), 'condensed_share')[0]) == (bound < 9)


class TestTrainingIsTheSame:
    @staticmethod
    def state(folder, hooks, workers):
        torch.manual_seed(0)
        validated = dict(by_epoch=True, max_epochs=2)
        model = Net(nn.Conv2d(3, 4, 3), Frozen(4), UBN(4), nn.Dropout(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        runner = train(folder, model, hooks, lr=0.1, data=Images(noise=True), workers=workers, train_cfg=validated)
        generators = (random.random(), np.random.rand(), torch.rand(()))
        losses = series(read_scalars(folder), 'loss')
        assert len(losses[0]) == 6
        return model.state_dict(), runner.optim_wrapper.state_dict(), generators, losses

    @pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
    def test_bit_for_bit(self, tmp_path, workers):
        """With augmentation and dropout by all generators, frozen statistics, a validation after each epoch."""
        hook = FeatureCondensationHook(interval=1, fixed_interval=1, num_samples=5)
        without, having = (self.state(tmp_path / str(len(hooks)), hooks, workers) for hooks in ([], [hook]))
        torch.testing.assert_close(having, without, rtol=0, atol=0)
        assert list(measured(tmp_path / '1', 'fixed')) == [0, 1, 2, 3, 4, 5, 6]
        lines = next((tmp_path / '1').glob('*/feature_condensation.jsonl')).read_text().splitlines()
        assert len(lines) == 8, 'a line per step, below the names'

    def test_in_two_processes(self, tmp_path):
        """The processes of one run are forks of this one: an import would take longer than the test."""
        torch.multiprocessing.start_processes(self.process, (tmp_path,), nprocs=2, start_method='fork')
        results = [torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1)]
        for without, having in results:
            torch.testing.assert_close(having, without, rtol=0, atol=0)
        # The first process has every other image. It alone has loaded a fixed batch.
        images = Images().images[::2]
        expected = [similarity(images[start : start + 2]) for start in (0, 2, 4)]
        found = measured(tmp_path / 'True', 'batch')
        np.testing.assert_allclose([found[step][0] for step in (1, 2, 3)], expected, rtol=5e-5)
        assert len(list(tmp_path.rglob('feature_condensation.jsonl'))) == 1

    @staticmethod
    def process(rank, folder):
        os.environ |= {'RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_RANK': str(rank)}
        distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
        wrapper = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
        states = []
        for hooks in ([], [FeatureCondensationHook(interval=1, fixed_interval=1)]):
            torch.manual_seed(0)
            options = dict(launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper))
            model = Net(SyncUBN(3, threshold=0.5), nn.Conv2d(3, 3, 3), SyncUBN(3))
            train(folder / str(bool(hooks)), model, hooks, batch_size=2, lr=0.1, **options)
            states.append(model.state_dict())
        assert ('_chunks' in hooks[0]._fixed_batch.__dict__) == (rank == 0)
        torch.save(states, folder / f'{rank}.pt')
        distributed.barrier()
        os._exit(0)  # torch's tear-down of gloo may hang


def test_tensorboard_has_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, net(), [FeatureCondensationHook(interval=2)], backends=['Tensorboard'])
    events = EventAccumulator(str(next(tmp_path.glob('*/vis_data')))).Reload()
    records = read_scalars(tmp_path)
    tags = [tag for tag in events.Tags()['scalars'] if 'layer.' in tag or 'similarity' in tag or 'condensed' in tag]
    assert len(tags) == 4 + 4 + 1 + 1 + 2
    for tag in tags:
        found = events.Scalars(tag)
        steps, values = series(records, tag)
        assert [event.step for event in found] == steps
        assert [event.value for event in found] == pytest.approx(values)


def test_a_resumed_run_measures_the_same_samples(tmp_path):
    hooks = [FeatureCondensationHook(num_samples=6)]
    train(tmp_path, net(), hooks, lr=0.1)
    killed = measured(tmp_path, 'fixed')
    assert list(killed) == [0, 3]
    # Folders are named by the second, and the two starts may be in the same one.
    next(tmp_path.glob('*/vis_data')).parent.rename(tmp_path / '20000101_000000')
    train(tmp_path, net(), hooks, epochs=2, lr=0.1, resume=True)
    resumed = max(tmp_path.glob('*/feature_condensation.jsonl'))
    assert resumed.read_text().splitlines()[1].startswith('{"step":3,"epoch":1,')
    found = measured(tmp_path, 'fixed')
    assert list(found) == [0, 3, 6]
    assert found[3] == killed[3]


class Boxes(Dataset):
    """Noise of two sizes with a box, in uint8, as MMDetection's pipelines pack it."""

    metainfo = dict(classes=tuple('0123456789'))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        shape = (64, 64 - 32 * (index % 2))
        sample = DetDataSample(metainfo=dict(img_id=index, img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
        masks = BitmapMasks(np.ones((1, *shape), np.uint8), *shape)
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor([[4.0, 8.0, 28.0, 60.0]])), labels=torch.tensor([index]), masks=masks
        )
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randint(256, (3, *shape), dtype=torch.uint8, generator=generator), data_samples=sample)


class Labels(Dataset):
    metainfo = Boxes.metainfo

    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=generator)
        return dict(inputs=inputs, data_samples=DataSample().set_gt_label(index))


DIGITS = Path(__file__).resolve().parents[3] / 'configs' / 'digits'


def mask_rcnn():
    cfg = Config.fromfile(DIGITS / 'mask-rcnn_r18_fpn_ubn_digits.py')
    norm = dict(type='GN', num_groups=8)
    head = dict(type='ConvFCBBoxHead', num_shared_convs=1, num_shared_fcs=1, conv_out_channels=64, norm_cfg=norm)
    cfg.model.roi_head.bbox_head.update(head)
    cfg.model.roi_head.mask_head.norm_cfg = norm
    cfg.model.test_cfg.rpn.max_per_img = 10
    return cfg


def fcos():
    cfg = get_config('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')
    cfg.model.backbone.update(depth=18, base_channels=8, stem_channels=8, init_cfg=None, norm_cfg=dict(type='UBN'))
    cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=32)
    cfg.model.bbox_head.update(num_classes=10, in_channels=32, feat_channels=32, stacked_convs=1)
    return cfg


def classifier():
    return Config.fromfile(DIGITS / 'resnet18-ubn_digits.py')


@pytest.mark.parametrize(
    ('config', 'data', 'calls'),
    [
        pytest.param(mask_rcnn, Boxes(), {'backbone': 1, 'roi_head': 1}, marks=pytest.mark.slow),
        (fcos, Boxes(), {'backbone': 1, 'bbox_head': 5}),
        (classifier, Labels(), {'backbone': 1}),
    ],
    ids=['heads of regions', 'head shared by levels', 'classifier'],
)
def test_a_model_of_mmdetection_or_mmpretrain(tmp_path, config, data, calls):
    """Its four images are forwarded two at a time, padded to one size."""
    cfg = config()
    hook = FeatureCondensationHook(interval=1)
    scope = dict(default_scope=cfg.default_scope, data_preprocessor=cfg.get('data_preprocessor'))
    model = train(tmp_path, cfg.model, [hook], batch_size=2, data=data, **scope).model.eval()
    indices = np.random.default_rng(0).choice(4, 4, replace=False)
    batch = model.data_preprocessor(pseudo_collate([data[int(index)] for index in indices]), False)
    halves = ({key: values[part] for key, values in batch.items()} for part in (slice(2), slice(2, 4)))
    parts = [inputs_of(model, **half) for half in halves]
    inputs = {
        name: [torch.cat(each) for each in zip(*(part[name] for part in parts), strict=True)] for name in parts[0]
    }
    assert {(name.split('.')[0], len(each)) for name, each in inputs.items()} == set(calls.items())
    expected = [similarity(*each) for each in inputs.values()]
    np.testing.assert_allclose(measured(tmp_path, 'fixed')[2], expected, rtol=1e-4, atol=1e-6)
    assert np.isfinite(measured(tmp_path, 'batch')[1]).all()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(interval=0), 'interval must be a positive integer, got 0'),
        (dict(fixed_interval=2.5), 'fixed_interval must be a positive integer, got 2.5'),
        (dict(num_samples=1), 'num_samples must be an integer of at least 2, got 1'),
        (dict(threshold=2), r'threshold must be a number in \[-1, 1\], got 2'),
        (dict(threshold=None), r'threshold must be a number in \[-1, 1\], got None'),
    ],
)
def test_an_argument_outside_its_range_is_named(arguments, message):
    with pytest.raises(ValueError, match=f'FeatureCondensationHook: {message}'):
        FeatureCondensationHook(**arguments)


class TestConfigs:
    def test_the_hook_is_found_by_its_name(self):
        assert isinstance(HOOKS.build(dict(type='FeatureCondensationHook')), FeatureCondensationHook)

    def test_compile_would_hide_the_layers(self):
        for compiled in (True, Config(dict(backend='eager'))):
            runner = SimpleNamespace(cfg=Config(dict(compile=compiled)))
            with pytest.raises(ConfigError, match=r'FeatureCondensationHook .* got compile=.*; leave compile out'):
                FeatureCondensationHook().before_train(runner)

    def test_no_validation_set(self, tmp_path):
        nothing = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
        with pytest.raises(ConfigError, match=r'FeatureCondensationHook .*val_dataloader, which is None'):
            train(tmp_path, net(), [FeatureCondensationHook()], **nothing)

    def test_no_norm(self, tmp_path):
        with pytest.raises(ConfigError, match='FeatureCondensationHook measures at norm layers, and Net has none'):
            train(tmp_path, Net(nn.Conv2d(3, 3, 1)), [FeatureCondensationHook()])
