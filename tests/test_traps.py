"""What PyTorch and OpenMMLab do to the norm layers of a model, and what becomes of UBN's then.

What every norm type guarantees is in ``layers/test_contract.py``; conversion to SyncBatchNorm and folding into
convolutions are in ``openmmlab/``.
"""

import copy
import inspect
from types import SimpleNamespace

import forks
import pytest
import torch
import torch.nn.functional as F
from helpers import batch, randomize
from mmdet.engine.hooks import MeanTeacherHook
from mmdet.engine.hooks.sync_norm_hook import get_norm_states
from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor
from mmdet.models import ResNet
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel, BaseModule, ExponentialMovingAverage, stack_batch
from mmengine.optim import DefaultOptimWrapperConstructor
from mmpretrain.engine.hooks import PreciseBNHook
from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor
from mmpretrain.models import ResNet as MMPretrainResNet
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmubn import UBN


def closed(layer):
    """The layer with a gate that stays closed for long."""
    layer.running_similarity.fill_(-0.9)
    return layer


def state(module):
    return copy.deepcopy(module.state_dict())


def assert_same_state(module, before, but=()):
    for key, value in module.state_dict().items():
        if key not in but:
            assert torch.equal(value, before[key]), key


class TestZeroInitialisation:
    @pytest.mark.parametrize('backbone', [ResNet, MMPretrainResNet], ids=['mmdet', 'mmpretrain'])
    @pytest.mark.parametrize('depth', [18, 50])
    def test_of_the_last_norm_makes_residual_branches_zero(self, backbone, depth):
        extra = dict(init_cfg=None) if backbone is ResNet else dict(zero_init_residual=True)
        model = backbone(depth=depth, stem_channels=8, base_channels=8, norm_cfg=dict(type='UBN'), **extra)
        model.init_weights()
        last = [m for name, m in model.named_modules() if name.endswith('.bn2' if depth == 18 else '.bn3')]
        assert len(last) == 8 if depth == 18 else 16
        model.train()
        for norm in last:
            y = norm(batch((2, norm.num_features, 4, 4), shared=1.0))
            assert y.eq(0).all()
        others = [m for m in model.modules() if isinstance(m, UBN) and m not in last]
        assert all(m.weight.eq(1).all() for m in others)


class Named(BaseModel):
    """A convolution and a UBN at the place of a backbone, and a UBN behind it."""

    def __init__(self):
        super().__init__()
        self.backbone = ConvNeXt()
        self.neck = UBN(4)

    def forward(self, inputs, **kwargs):
        return self.neck(self.backbone(inputs))

    def get_layer_depth(self, name):
        return (0 if name.startswith('backbone') else 1), 3


class ConvNeXt(BaseModule):
    """MMDetection's constructor goes by the name of the class."""

    def __init__(self):
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 1), UBN(4))])

    def forward(self, x):
        return self.downsample_layers[0](x)


OPTIMIZER = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5))
NORMS = ('backbone.downsample_layers.0.1.', 'neck.')
CONV = 'backbone.downsample_layers.0.0.'


def groups(constructor, paramwise_cfg):
    """Learning rate and weight decay of every parameter, by name."""
    model = Named()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = constructor(OPTIMIZER, paramwise_cfg)(model)
    found = {}
    for group in optimizer.optimizer.param_groups:
        found.update({names[id(parameter)]: (group['lr'], group['weight_decay']) for parameter in group['params']})
    assert len(found) == len(names)
    return found


class TestParamwise:
    def test_layer_decay_of_mmpretrain(self):
        cfg = dict(norm_decay_mult=0.0, bias_decay_mult=0.5, layer_decay_rate=0.5)
        for name, (lr, decay) in groups(LearningRateDecayOptimWrapperConstructor, cfg).items():
            assert lr == 0.1 * (0.25 if name.startswith('backbone') else 0.5), name
            assert decay == (0.0 if name.startswith(NORMS) else 0.25 if name.endswith('bias') else 0.5), name

    def test_rules_that_go_by_the_number_of_dimensions(self):
        """These take a norm for one by its flat parameters, the neighbors' taps among them."""
        flat = groups(DefaultOptimWrapperConstructor, dict(flat_decay_mult=0.0))
        layer_decay = groups(
            LearningRateDecayOptimizerConstructor, dict(num_layers=6, decay_rate=0.9, decay_type='layer_wise')
        )
        for found in (flat, layer_decay):
            for name, (_, decay) in found.items():
                assert decay == (0.5 if name == CONV + 'weight' else 0.0), name


def test_precise_bn_counts_as_with_batch_norm():
    """Even where the gate is closed; afterwards the gate acts again. PreciseBNHook sets momentum to 1."""
    data = [batch(seed=seed) + seed for seed in range(5)]
    ours, theirs = randomize(closed(UBN(3))), nn.BatchNorm2d(3)
    nn.init.zeros_(ours.center_weight)  # with it, the statistics are those of the centred input
    similarity = ours.running_similarity.clone()
    for norm in (ours, theirs):
        norm.running_mean.fill_(7)
        loop = SimpleNamespace(dataloader=Loader([{'x': x} for x in data]))
        runner = SimpleNamespace(model=Wrapped(norm), train_loop=loop, logger='silent')
        PreciseBNHook(num_samples=20)._perform_precise_bn(runner)
    expected = torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(ours.running_mean, expected)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert torch.equal(ours.running_similarity, similarity)
    assert ours.momentum == 0.1
    ours(data[0])
    assert ours.running_similarity != similarity, 'afterwards the gate must act again'


class Wrapped(BaseModel):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x)


class Loader(list):
    batch_size = 4


class TestAveragedModels:
    def train_steps(self, model, step):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for seed in range(3):
            optimizer.zero_grad()
            model(batch(seed=seed)).square().sum().backward()
            optimizer.step()
            step()

    @pytest.mark.parametrize('update_buffers', [True, False])
    def test_mmengine(self, update_buffers):
        model = Wrapped(randomize(UBN(3)))
        ema = ExponentialMovingAverage(model, momentum=0.5, update_buffers=update_buffers)
        history = []
        self.train_steps(model, lambda: (ema.update_parameters(model), history.append(state(model))))
        for key, value in ema.module.state_dict().items():
            averaged = update_buffers or key in dict(model.named_parameters())
            if value.is_floating_point():
                first, second, third = (s[key] for s in history)
                torch.testing.assert_close(
                    value, (first + second) / 4 + third / 2 if averaged else third, msg=lambda m, key=key: f'{key}: {m}'
                )
        assert len({float(s['norm.running_similarity']) for s in history}) == 3, 'the similarity must have moved'

    def test_mmengine_hook_validates_with_the_averaged_similarity(self):
        model = Wrapped(randomize(UBN(3)))
        hook = EMAHook(momentum=0.5, update_buffers=True)
        runner = SimpleNamespace(model=model, iter=0, epoch=0)
        hook.before_run(runner)
        self.train_steps(model, lambda: hook.after_train_iter(runner, 0))
        source, averaged = state(model), state(hook.ema_model.module)
        assert source['norm.running_similarity'] != averaged['norm.running_similarity']
        hook.before_val_epoch(runner)
        assert_same_state(model, averaged)
        hook.after_val_epoch(runner)
        assert_same_state(model, source)
        checkpoint = {'state_dict': state(model)}
        hook.before_save_checkpoint(runner, checkpoint)
        assert torch.equal(checkpoint['state_dict']['norm.running_similarity'], averaged['norm.running_similarity']), (
            'the checkpoint of MMEngine holds the averaged model'
        )

    @pytest.mark.parametrize('use_buffers', [True, False])
    def test_torch(self, use_buffers):
        model = randomize(UBN(3))
        averaged = AveragedModel(model, use_buffers=use_buffers)
        history = []
        self.train_steps(model, lambda: (averaged.update_parameters(model), history.append(state(model))))
        similarities = [s['running_similarity'] for s in history]
        expected = torch.stack(similarities).mean(0) if use_buffers else similarities[-1]
        torch.testing.assert_close(averaged.module.running_similarity, expected)
        torch.testing.assert_close(averaged.module.weight, torch.stack([s['weight'] for s in history]).mean(0))

    @pytest.mark.parametrize('skip_buffer', [True, False])
    def test_mean_teacher(self, skip_buffer):
        """The teacher is copied after training steps, with their graphs still alive, then follows the student."""
        student = randomize(UBN(3))
        output = student(batch())
        model = nn.ModuleDict({'student': student, 'teacher': copy.deepcopy(student)})
        output.sum().backward()
        assert model.teacher.weight.grad is None
        before = state(model.teacher)
        self.train_steps(student, lambda: None)
        assert_same_state(model.teacher, before)
        hook = MeanTeacherHook(momentum=0.25, skip_buffer=skip_buffer)
        hook.momentum_update(model, hook.momentum)
        for key, value in model.teacher.state_dict().items():
            if value.is_floating_point():
                moves = not skip_buffer or key in dict(student.named_parameters())
                share = 0.25 if moves else 0.0
                torch.testing.assert_close(value, (1 - share) * before[key] + share * student.state_dict()[key])


class TestNormEval:
    """``norm_eval=True`` is the default of MMDetection's ResNet."""

    def backbone(self, **options):
        torch.manual_seed(0)
        return ResNet(depth=18, stem_channels=8, base_channels=8, norm_cfg=dict(type='UBN'), **options)

    def test_no_buffer_moves_and_the_gate_does_not_act(self):
        model = self.backbone(norm_eval=True)
        model.train()
        x, before = batch((2, 3, 32, 32)), state(model)
        opened = model(x)
        buffers = dict(model.named_buffers())
        assert all(torch.equal(before[key], value) for key, value in buffers.items())
        for module in model.modules():
            if isinstance(module, UBN):
                closed(module)
        for one, other in zip(opened, model(x), strict=True):
            assert torch.equal(one, other)

    def test_rectifications_train(self):
        model = self.backbone(norm_eval=True, frozen_stages=-1)
        model.train()
        sum(y.square().sum() for y in model(batch((2, 3, 32, 32)))).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
        assert model.bn1.scale_weight.grad.abs().sum() > 0

    def test_without_norm_eval_all_but_frozen_stages_move(self):
        model = self.backbone(norm_eval=False, frozen_stages=1)
        model.train()
        before = state(model)
        model(batch((2, 3, 32, 32)))
        for name, module in model.named_modules():
            if isinstance(module, UBN):
                frozen = name == 'bn1' or name.startswith('layer1.')
                moved = not torch.equal(module.running_similarity, before[f'{name}.running_similarity'])
                assert moved != frozen, name


class TestBuffers:
    def test_norm_states_of_mmdetection(self):
        """Its SyncNormHook averages them over the processes and loads them."""
        model = nn.Sequential(nn.Conv2d(3, 3, 1), randomize(UBN(3)))
        model(batch())
        states = get_norm_states(model)
        assert set(states) == {key for key in model.state_dict() if key.startswith('1.')}
        before = state(model)
        model.load_state_dict({key: value + 1 for key, value in states.items()}, strict=False)
        assert_same_state(model, {key: before[key] + 1 if key in states else before[key] for key in before})


class TestPadding:
    """In evaluation, what shares a batch with an image reaches it by way of the padding alone."""

    def test_a_smaller_image_is_as_if_padded_by_hand(self):
        layer = randomize(UBN(3)).eval()
        small, large = batch((3, 5, 7)), batch((3, 8, 8), seed=1)
        y = layer(stack_batch([small, large]))
        padded = F.pad(small, (0, 1, 0, 3))
        torch.testing.assert_close(layer(padded[None])[0], y[0])
        alone = layer(small[None])[0]
        assert not torch.allclose(alone, y[0, :, :5, :7], atol=1e-2), 'the README says that the padding is seen'


class TestParallel:
    def test_replica_of_data_parallel(self):
        """All of DataParallel that runs without several GPUs: a replica, with parameters that are no leaves."""
        layer = randomize(UBN(3, similarity_momentum=1.0))
        expected = copy.deepcopy(layer)
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer.named_parameters():  # as torch.nn.parallel.replicate does
            setattr(replica, name, parameter * 1)
        x = batch(shared=1.0)
        y = replica(x)
        assert torch.equal(y, expected(x))
        y.square().sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        assert layer.running_similarity == expected.running_similarity != 1, 'the first replica holds the buffers'

    def test_two_processes_gate_on_their_own(self, tmp_path):
        """MMEngine's DDP: no broadcast of buffers, unused parameters are an error."""
        code = inspect.getsource(ddp_process)
        calls = [(f'{code}\nddp_process({rank}, {str(tmp_path)!r})', {}) for rank in range(2)]
        results = forks.together(exec, *calls)
        assert [result.returncode for result in results] == [0, 0], '\n'.join(result.stdout for result in results)
        first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
        assert first['tracked'] == [1, 2, 3, 4], 'open on the first process'
        assert second['tracked'] == [0, 0, 0, 0], 'closed on the second process'
        for result in (first, second):
            assert result['similarity'] == pytest.approx(result['similarity alone'], abs=1e-6)
        mean = (first['similarity'] + second['similarity']) / 2
        assert first['similarity'] != pytest.approx(mean, abs=0.1)
        assert [first['averaged'], second['averaged']] == pytest.approx([mean, mean], abs=1e-6), 'SyncBuffersHook'
        for name, grad in first['grads'].items():
            torch.testing.assert_close(grad, second['grads'][name], msg=lambda m, name=name: f'{name}: {m}')


def ddp_process(rank, folder):
    """One of two processes: four steps on batches that are condensed in the first and not in the second."""
    import copy
    import os
    from pathlib import Path
    from types import SimpleNamespace

    import torch
    from mmengine.hooks import SyncBuffersHook
    from torch import distributed as dist
    from torch import nn

    import mmubn

    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = mmubn.UBN(3, similarity_momentum=1.0)
    alone = copy.deepcopy(layer)
    model = nn.parallel.DistributedDataParallel(layer, broadcast_buffers=False, find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    torch.manual_seed(1 + rank)
    pattern = torch.randn(3, 6, 5)
    tracked, expected = [], []
    for _ in range(4):
        x = torch.randn(4, 3, 6, 5) + (3 * pattern if rank == 0 else 0)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        alone(x)
        optimizer.step()
        tracked.append(int(layer.num_batches_tracked))
        expected.append(float(alone.running_similarity))
    result = {
        'tracked': tracked,
        'similarity': float(layer.running_similarity),
        'similarity alone': expected[-1],
        'grads': {name: parameter.grad for name, parameter in layer.named_parameters()},
    }
    SyncBuffersHook().after_train_epoch(SimpleNamespace(model=model))
    result['averaged'] = float(layer.running_similarity)
    torch.save(result, Path(folder) / f'{rank}.pt')
    dist.barrier()
    os._exit(0)  # torch's tear-down of gloo may hang: it joins threads under the lock that they wait for
