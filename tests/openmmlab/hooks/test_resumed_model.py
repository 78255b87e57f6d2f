"""A checkpoint of another norm is not resumed from, and one of the same norm is, exactly."""

import copy

import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import DATASETS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import Runner
from torch import nn

import mmubn  # noqa: F401 - registers
from mmubn.checkpoints import CheckpointError
from mmubn.openmmlab.hooks.resumed_model import ResumedModelHook
from mmubn.openmmlab.resumption import make_resumable

CHANNELS = 4


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(index)))


class Net(BaseModel):
    def __init__(self, norm_cfg, classes=2, other_norm_cfg=None):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), build_norm_layer(norm_cfg, CHANNELS)[1])
        if other_norm_cfg is not None:
            self.neck = build_norm_layer(other_norm_cfg, CHANNELS)[1]
        self.head = nn.Linear(CHANNELS, classes)

    def forward(self, inputs, mode):
        x = self.backbone(torch.stack(inputs))
        if hasattr(self, 'neck'):
            x = self.neck(x)
        return dict(loss=self.head(x.relu().mean((2, 3))).square().mean())

    def train_step(self, data, optim_wrapper):
        if not isinstance(optim_wrapper, OptimWrapperDict):
            return super().train_step(data, optim_wrapper)
        loss = self(**data, mode='loss')['loss']
        optim_wrapper['backbone'].zero_grad()
        optim_wrapper['head'].zero_grad()
        loss.backward()
        optim_wrapper['backbone'].step()
        optim_wrapper['head'].step()
        return dict(loss=loss)


class Several:
    """An optimizer for the backbone and one for the rest."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        pass

    def __call__(self, model):
        parts = dict(backbone=model.backbone.parameters(), head=model.head.parameters())
        optimizers = {name: torch.optim.AdamW(part, 0.05) for name, part in parts.items()}
        return OptimWrapperDict(**{name: OptimWrapper(each) for name, each in optimizers.items()})


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for registry, cls in ((DATASETS, Data), (MODELS, Net), (OPTIM_WRAPPER_CONSTRUCTORS, Several)):
        monkeypatch.setitem(registry.module_dict, cls.__name__, cls)
    monkeypatch.setattr(Runner, '_log_env', lambda *_: None)  # takes longer than all the rest


SGD = dict(optimizer=dict(type='SGD', lr=0.05))
MOMENTUM = dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
ADAM = dict(optimizer=dict(type='AdamW', lr=0.05))
GROUPS = dict(
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.1), paramwise_cfg=dict(norm_decay_mult=0.0)
)
SEVERAL = dict(constructor='Several')
EMA = [dict(type='EMAHook', momentum=0.1)]


def train(folder, norm, optim_wrapper=MOMENTUM, epochs=2, resume=None, hooks=(), load_from=None, **arguments):
    """Train and save after each epoch of 2 iterations; the runner."""
    norm_cfg = dict(type=norm) if isinstance(norm, str) else norm
    cfg = Config(
        dict(
            work_dir=str(folder),
            randomness=dict(seed=0),
            model=dict(type='Net', norm_cfg=norm_cfg, **arguments),
            train_dataloader=dict(
                dataset=dict(type='Data'), batch_size=4, sampler=dict(type='DefaultSampler', shuffle=False)
            ),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=copy.deepcopy(optim_wrapper),
            custom_hooks=list(hooks),
            visualizer=dict(type='Visualizer', vis_backends=[]),
            resume=resume is not None,
            load_from=load_from if resume in (None, 'auto') else str(resume),
            experiment_name=f'{folder.name}-{torch.rand(()).item()}',
        )
    )
    make_resumable(cfg)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(ResumedModelHook(), priority='VERY_HIGH')
    runner.train()
    return runner


def checkpoint_of(path):
    return torch.load(path, weights_only=False)


def assert_same(one, other, path=''):
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape, path
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f'{path}.{key}')
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f'{path}.{i}')
    else:
        assert one == other, path


# --- another norm -----------------------------------------------------------------------------------------------------

K5 = dict(type='UBN', kernel_size=5)
OTHER_NORMS = [
    ('BN', 'UBN', r'backbone\.1 is BatchNorm there and UBN with kernel_size=3 here \(not there: center_weight, neig'),
    ('UBN', 'BN', r'UBN with kernel_size=3 there and BatchNorm2d here \(not here: center_weight, neighbor_weight'),
    ('UBN', K5, r'UBN with kernel_size=3 there and UBN with kernel_size=5 here \(neighbor_weight has shape'),
    (K5, 'UBN', r'UBN with kernel_size=5 there and UBN with kernel_size=3 here'),
    ('RBN', 'UBN', r'RBN there and UBN with kernel_size=3 here \(not there: neighbor_weight, running_similarity\)'),
    ('UBN', dict(type='UBN', kernel_size=1), r'kernel_size=3 there and UBN here \(not here: neighbor_weight\)'),
    ('UBN', dict(type='UBN', scaling=False), r'kernel_size=3 here \(not here: scale_bias, scale_weight\)'),
    ('BNET', dict(type='BNET', kernel_size=5), r'BNET with kernel_size=3 there and BNET with kernel_size=5 here'),
    ('IEBN', 'RBN', r'IEBN there and RBN here \(not there: center_weight\)'),
    ('IEBN', 'UnitizedBN', r'IEBN there and UnitizedBN here \(not here: scale_bias\)'),
    ('UnitizedBN', 'BN', r'UnitizedBN there and BatchNorm2d here \(not here: scale_weight\)'),
    ('BN', 'SyncUBN', r'BatchNorm there and SyncUBN with kernel_size=3 here'),
    (
        'UBN',
        dict(type='GN', num_groups=2),
        r'UBN with kernel_size=3 there and GroupNorm here \(not here: center',
    ),
    (dict(type='GN', num_groups=2), 'UBN', r'layer with bias, weight there and UBN with kernel_size=3 here'),
]


class TestAnotherNorm:
    @pytest.mark.parametrize(('saved', 'asked', 'message'), OTHER_NORMS)
    def test_is_said_in_one_sentence(self, tmp_path, saved, asked, message):
        train(tmp_path, saved, epochs=1)
        path = tmp_path / 'epoch_1.pth'
        with pytest.raises(CheckpointError, match=message) as error:
            train(tmp_path / 'resumed', asked, resume=path)
        text = str(error.value)
        assert text.startswith(f'--resume goes on with the run of {path}, but ')
        assert f'leave --resume out and set load_from to it (--cfg-options load_from={path})' in text
        assert '\n' not in text

    @pytest.mark.parametrize('optim_wrapper', [SGD, ADAM, GROUPS, SEVERAL], ids=['sgd', 'adam', 'groups', 'several'])
    @pytest.mark.parametrize(('saved', 'asked', 'message'), [OTHER_NORMS[0], OTHER_NORMS[2]])
    def test_whatever_the_optimizer(self, tmp_path, optim_wrapper, saved, asked, message):
        train(tmp_path, saved, optim_wrapper, epochs=1)
        with pytest.raises(CheckpointError, match=message):
            train(tmp_path, asked, optim_wrapper, resume=tmp_path / 'epoch_1.pth')

    def test_with_an_averaged_model(self, tmp_path):
        train(tmp_path, 'BN', epochs=1, hooks=EMA)
        with pytest.raises(CheckpointError, match='is BatchNorm there and UBN with kernel_size=3 here'):
            train(tmp_path, 'UBN', hooks=EMA, resume=tmp_path / 'epoch_1.pth')

    def test_of_the_last_checkpoint(self, tmp_path):
        train(tmp_path, 'BN', epochs=1)
        with pytest.raises(CheckpointError, match=rf'the run of {tmp_path}/epoch_1\.pth, but'):
            train(tmp_path, 'UBN', resume='auto')

    def test_nothing_of_it_is_taken_over(self, tmp_path, monkeypatch):
        train(tmp_path, 'BN', epochs=1)
        loaded = []
        monkeypatch.setattr('mmengine.runner.runner._load_checkpoint_to_model', lambda *_, **__: loaded.append(1))
        monkeypatch.setattr(OptimWrapper, 'load_state_dict', lambda *_: loaded.append(2))
        with pytest.raises(CheckpointError):
            train(tmp_path, 'UBN', resume=tmp_path / 'epoch_1.pth')
        assert loaded == []

    def test_load_from_does_what_the_error_says(self, tmp_path):
        train(tmp_path, 'BN', epochs=1)
        runner = train(tmp_path / 'new', 'UBN', load_from=str(tmp_path / 'epoch_1.pth'))
        assert runner.iter == 4

    def test_without_an_optimizer_the_weights_are_converted(self, tmp_path):
        """A checkpoint of save_optimizer=False: nothing in it fails to fit."""
        train(tmp_path, 'BN', epochs=1)
        checkpoint = checkpoint_of(tmp_path / 'epoch_1.pth')
        del checkpoint['optimizer']
        torch.save(checkpoint, tmp_path / 'epoch_1.pth')
        assert train(tmp_path, 'UBN', resume=tmp_path / 'epoch_1.pth').iter == 4


class TestOtherParameters:
    def test_a_norm_that_the_run_had_not(self, tmp_path):
        train(tmp_path, 'BN', epochs=1)
        message = r'the optimizer has 6 parameters there and 8 parameters here \(not there: neck\.weight, neck\.bias\)'
        with pytest.raises(CheckpointError, match=message):
            train(tmp_path, 'BN', other_norm_cfg=dict(type='BN'), resume=tmp_path / 'epoch_1.pth')

    def test_groups(self, tmp_path):
        train(tmp_path, 'BN', epochs=1)
        message = r'the optimizer has 6 parameters there and 6 parameters in 6 groups \(1, 1, 1 and 3 more\) here:'
        with pytest.raises(CheckpointError, match=message):
            train(tmp_path, 'BN', GROUPS, resume=tmp_path / 'epoch_1.pth')

    @pytest.mark.parametrize('optim_wrapper', [MOMENTUM, ADAM, SEVERAL], ids=['momentum', 'adam', 'several'])
    def test_another_shape(self, tmp_path, optim_wrapper):
        train(tmp_path, 'UBN', optim_wrapper, epochs=1)
        with pytest.raises(CheckpointError, match=r'head\.weight has shape \(2, 4\) there and \(3, 4\) here'):
            train(tmp_path, 'UBN', optim_wrapper, classes=3, resume=tmp_path / 'epoch_1.pth')

    def test_another_shape_that_the_optimizer_knows_nothing_of(self, tmp_path):
        """MMEngine warns of the head and trains it anew. What torch can resume is resumed."""
        train(tmp_path, 'UBN', SGD, epochs=1)
        assert train(tmp_path, 'UBN', SGD, classes=3, resume=tmp_path / 'epoch_1.pth').iter == 4

    @pytest.mark.parametrize(('saved', 'asked'), [(ADAM, SEVERAL), (SEVERAL, ADAM)], ids=['more', 'fewer'])
    def test_several_optimizers_or_one(self, tmp_path, saved, asked):
        train(tmp_path, 'UBN', saved, epochs=1)
        with pytest.raises(CheckpointError, match='one optimizer') as error:
            train(tmp_path, 'UBN', asked, resume=tmp_path / 'epoch_1.pth')
        assert 'an optimizer for each of backbone, head' in str(error.value)


# --- the same norm ----------------------------------------------------------------------------------------------------

WRAPPERS = dict(sgd=SGD, momentum=MOMENTUM, adam=ADAM, groups=GROUPS, several=SEVERAL)


def as_version_2(checkpoint):
    """The checkpoint with ``neighbor_weight`` and what is remembered of it as (C, k*k - 1); how many tensors."""
    count = 0

    def matrix(tensor):
        nonlocal count
        count += 1
        return tensor.reshape(CHANNELS, -1)

    for weights in (checkpoint['state_dict'], checkpoint.get('ema_state_dict', {})):
        for key in weights:
            if key.endswith('neighbor_weight'):
                size = weights[key].numel()
                weights[key] = matrix(weights[key])
        for metadata in getattr(weights, '_metadata', {}).values():
            if metadata.get('version') == 3:
                metadata['version'] = 2
    saved = checkpoint['optimizer']
    for each in [saved] if 'param_groups' in saved else saved.values():
        for state in each['state'].values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.numel() == size:
                    state[key] = matrix(value)
    return count


class TestTheSameNorm:
    @pytest.mark.parametrize('hooks', [(), EMA], ids=['', 'ema'])
    @pytest.mark.parametrize('name', WRAPPERS)
    @pytest.mark.parametrize('norm', ['UBN', dict(type='BNET', kernel_size=5)], ids=str)
    def test_of_today_and_of_version_2(self, tmp_path, norm, name, hooks):
        """Weights, buffers, averages and what the optimizer remembers: all as in the run that was not stopped."""
        train(tmp_path / 'whole', norm, WRAPPERS[name], hooks=hooks)
        expected = checkpoint_of(tmp_path / 'whole' / 'epoch_2.pth')
        checkpoint = checkpoint_of(tmp_path / 'whole' / 'epoch_1.pth')
        tensors = as_version_2(checkpoint)
        assert tensors == (1 + len(hooks)) + {'sgd': 0, 'momentum': 1, 'groups': 1}.get(name, 2)
        torch.save(checkpoint, tmp_path / 'version_2.pth')
        for path in (tmp_path / 'whole' / 'epoch_1.pth', tmp_path / 'version_2.pth'):
            train(tmp_path / path.stem, norm, WRAPPERS[name], hooks=hooks, resume=path)
            found = checkpoint_of(tmp_path / path.stem / 'epoch_2.pth')
            for key in ('state_dict', 'ema_state_dict', 'optimizer'):
                assert_same(found.get(key), expected.get(key), key)

    @pytest.mark.parametrize(
        ('saved', 'asked'),
        [
            ('BN', 'BN'),
            ('RBN', 'RBN'),
            ('IEBN', 'IEBN'),
            ('UnitizedBN', 'UnitizedBN'),
            ('UBN', 'SyncUBN'),
            ('UBN', dict(type='UBN', threshold=0.5, momentum=0.2)),
            (dict(type='GN', num_groups=2), dict(type='GN', num_groups=1)),
        ],
        ids=str,
    )
    def test_of_the_same_parameters(self, tmp_path, saved, asked):
        train(tmp_path, saved, epochs=1)
        assert train(tmp_path, asked, resume=tmp_path / 'epoch_1.pth').iter == 4

    def test_without_the_count_of_batches(self, tmp_path):
        """As in checkpoints of old versions of torch, or of a tool that drops it."""
        train(tmp_path, 'UBN', epochs=1)
        checkpoint = checkpoint_of(tmp_path / 'epoch_1.pth')
        del checkpoint['state_dict']['backbone.1.num_batches_tracked']
        torch.save(checkpoint, tmp_path / 'epoch_1.pth')
        assert train(tmp_path, 'UBN', resume=tmp_path / 'epoch_1.pth').iter == 4

    def test_keys_of_a_wrapped_model(self, tmp_path):
        train(tmp_path, 'UBN', epochs=1)
        checkpoint = checkpoint_of(tmp_path / 'epoch_1.pth')
        checkpoint['state_dict'] = {f'module.{key}': value for key, value in checkpoint['state_dict'].items()}
        torch.save(checkpoint, tmp_path / 'epoch_1.pth')
        assert train(tmp_path, 'UBN', resume=tmp_path / 'epoch_1.pth').iter == 4
        with pytest.raises(CheckpointError, match=r'backbone\.1 is UBN with kernel_size=3 there and RBN here'):
            train(tmp_path, 'RBN', resume=tmp_path / 'epoch_1.pth')

    def test_another_parameter_of_as_many_elements_stays(self, tmp_path):
        """Only the neighbors of a norm of ours are reshaped: elsewhere another shape is another parameter."""
        runner = train(tmp_path, 'UBN', MOMENTUM, epochs=1)
        checkpoint = checkpoint_of(tmp_path / 'epoch_1.pth')
        index = [id(p) for p in runner.model.parameters()].index(id(runner.model.head.weight))
        buffer = checkpoint['optimizer']['state'][index]['momentum_buffer'] = torch.ones(4, 2)
        runner._resume = True
        ResumedModelHook().after_load_checkpoint(runner, checkpoint)
        assert checkpoint['optimizer']['state'][index]['momentum_buffer'] is buffer


class TestOtherLoads:
    def test_of_an_evaluation(self, tmp_path):
        runner = train(tmp_path, 'UBN', epochs=1)
        checkpoint = checkpoint_of(tmp_path / 'epoch_1.pth')
        checkpoint['state_dict'].clear()
        runner.optim_wrapper, runner._resume = None, True
        ResumedModelHook().after_load_checkpoint(runner, checkpoint)

    @pytest.mark.parametrize('optimizer', [{}, dict(state=dict(), fields=[1])], ids=['empty', 'of another library'])
    def test_an_optimizer_of_an_unknown_form_is_left_to_its_owner(self, tmp_path, optimizer):
        runner = train(tmp_path, 'UBN', epochs=1)
        runner._resume = True
        checkpoint = dict(checkpoint_of(tmp_path / 'epoch_1.pth'), optimizer=copy.deepcopy(optimizer))
        ResumedModelHook().after_load_checkpoint(runner, checkpoint)
        assert checkpoint['optimizer'] == optimizer
