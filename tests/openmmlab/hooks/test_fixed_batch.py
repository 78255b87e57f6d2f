"""Which samples a fixed batch has, what a hook sees of them, and that nothing of a forward stays."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.model import BaseDataPreprocessor, BaseModel, ImgDataPreprocessor, MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

import mmubn
from mmubn.analysis.runs import series
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.hooks.fixed_batch import FixedBatch, layer_scalars, norm_layers


class Numbered(Dataset):
    """Image i is full of i; it has 4 rows and, with ``sizes``, as many columns more than 4 as they say."""

    def __init__(self, count=20, sizes=None):
        self.sizes = sizes or [0] * count

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 4, 4 + self.sizes[index]), float(index)), data_samples=f'image {index}')


class Net(BaseModel):
    """A norm, something that overwrites its output, and two calls of a norm that is shared."""

    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.first = nn.BatchNorm2d(3)
        self.shared = nn.GroupNorm(1, 3)
        self.seen = []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        self.seen.append((mode, len(inputs), data_samples))
        x = self.first(inputs).mul_(0)
        self.shared(x)
        return self.shared(x[..., :2])


def runner(model, dataset=None, batch_size=8, collate=default_collate, batch_sampler=None):
    """As much of a runner as a fixed batch looks at."""
    dataset = Numbered() if dataset is None else dataset
    loader = DataLoader(dataset, batch_size=3, collate_fn=collate)
    train = (
        DataLoader(dataset, batch_size=batch_size)
        if batch_sampler is None
        else DataLoader(dataset, batch_sampler=batch_sampler)
    )
    return SimpleNamespace(model=model, val_loop=object(), val_dataloader=loader, train_dataloader=train)


def observed(batch):
    """All calls that a forward of ``batch`` makes of its layers: (name, call, input, output as it was then)."""
    calls = []
    batch.forward(lambda name, call, x, y: calls.append((name, call, x.clone(), y.clone())))
    return calls


def images(calls):
    """The numbers of the images that the first layer got."""
    return [int(sample.max()) for name, _, x, _ in calls if name == 'first' for sample in x]


class TestSamples:
    def test_are_drawn_without_replacement_with_seed_0(self):
        batch = FixedBatch(runner(Net()), 6, 'Hook')
        expected = np.random.default_rng(0).choice(20, 6, replace=False).tolist()
        assert images(observed(batch)) == expected
        assert len(set(expected)) == batch.num_samples == 6

    def test_are_the_same_each_time(self):
        batch = FixedBatch(runner(Net()), 6, 'Hook')
        first = images(observed(batch))
        np.random.seed(5)
        assert images(observed(batch)) == first
        assert images(observed(FixedBatch(runner(Net()), 6, 'Hook'))) == first

    def test_are_all_there_are_where_more_were_asked_for(self):
        batch = FixedBatch(runner(Net(), Numbered(5)), 32, 'Hook')
        assert batch.num_samples == 5
        assert sorted(images(observed(batch))) == [0, 1, 2, 3, 4]

    def test_are_loaded_at_the_first_forward_and_once(self):
        class Counted(Numbered):
            loaded = 0

            def __getitem__(self, index):
                self.loaded += 1
                return super().__getitem__(index)

        dataset = Counted()
        batch = FixedBatch(runner(Net(), dataset), 6, 'Hook')
        assert dataset.loaded == 0
        observed(batch), observed(batch)
        assert dataset.loaded == 6

    def test_share_one_padding_across_chunks(self):
        model = Net(ImgDataPreprocessor(pad_size_divisor=4))
        sizes = [0] * 9 + [7]
        batch = FixedBatch(runner(model, Numbered(sizes=sizes), 4, pseudo_collate), 10, 'Hook')
        widths = {x.shape[3] for name, _, x, _ in observed(batch) if name == 'first'}
        assert widths == {12}, '11 columns, up to a multiple of 4'

    @pytest.mark.parametrize(
        ('training', 'chunks'),
        [
            (dict(batch_size=8), [8, 8, 4]),
            (dict(batch_size=32), [20]),
            (dict(batch_sampler=BatchSampler(SequentialSampler(range(20)), 6, False)), [6, 6, 6, 2]),
            (dict(batch_sampler=[[0, 1], [2]]), [1] * 20),
        ],
        ids=['smaller', 'larger', 'batch sampler', 'batch sampler without a size'],
    )
    def test_are_forwarded_as_many_at_a_time_as_a_training_batch_has(self, training, chunks):
        model = Net()
        FixedBatch(runner(model, **training), 20, 'Hook').forward(lambda *_: None)
        assert [(mode, count) for mode, count, _ in model.seen] == [('tensor', count) for count in chunks]

    def test_keep_their_data_samples(self):
        model = Net()
        batch = FixedBatch(runner(model), 10, 'Hook')
        numbers = images(observed(batch))
        assert [name for _, _, names in model.seen for name in names] == [f'image {number}' for number in numbers]

    def test_may_be_positional_arguments_or_have_no_data_samples(self):
        class Positional(BaseDataPreprocessor):
            def forward(self, data, training=False):
                return [self.cast_data(data['inputs']), None]

        batch = FixedBatch(runner(Net(Positional())), 10, 'Hook')
        assert images(observed(batch)) == np.random.default_rng(0).choice(20, 10, replace=False).tolist()


class TestObserver:
    def test_sees_each_call_of_a_shared_layer_counted_anew_in_each_chunk(self):
        calls = [(name, call, len(x)) for name, call, x, _ in observed(FixedBatch(runner(Net()), 10, 'Hook'))]
        assert calls == [
            *[('first', 0, 8), ('shared', 0, 8), ('shared', 1, 8)],
            *[('first', 0, 2), ('shared', 0, 2), ('shared', 1, 2)],
        ]

    def test_sees_an_output_before_it_is_overwritten(self):
        _, _, x, y = observed(FixedBatch(runner(Net()), 4, 'Hook'))[0]
        torch.testing.assert_close(y, x / (1 + 1e-5) ** 0.5)

    def test_sees_no_gradient_and_does_not_change_the_output(self):
        model = Net()
        batch = FixedBatch(runner(model), 4, 'Hook')
        batch.forward(lambda name, call, x, y: y.requires_grad and pytest.fail('a gradient is recorded'))

    def test_sees_the_model_without_its_wrapper(self):
        wrapper = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
        nn.Module.__init__(wrapper)
        wrapper.module = Net()
        batch = FixedBatch(runner(wrapper), 4, 'Hook')
        assert batch.model is wrapper.module
        assert [name for name, *_ in observed(batch)] == ['first', 'shared', 'shared']


class Restless(Numbered):
    """Draws from all generators."""

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(())
        return super().__getitem__(index)


class Picky(Net):
    """A norm that stays in evaluation mode, draws by the forward, and a train() that must not run."""

    def __init__(self):
        super().__init__()
        self.first.eval()
        self.dropout = nn.Dropout()

    def train(self, mode=True):
        pytest.fail('train() of a backbone may do more than set flags')

    def forward(self, inputs, data_samples=None, mode='tensor'):
        assert not any(module.training for module in self.modules())
        torch.rand(()), self.dropout(inputs)
        return super().forward(inputs, data_samples, mode)


class TestNothingStays:
    @staticmethod
    def state(model):
        flags = {name: module.training for name, module in model.named_modules()}
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
        return flags, tensors, hooks, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    def test_of_a_forward(self):
        model = Picky()
        before = self.state(model)
        observed(FixedBatch(runner(model, Restless()), 12, 'Hook'))
        torch.testing.assert_close(self.state(model), before, rtol=0, atol=0)
        assert before[0] | {'first': True} != before[0], 'one flag was off'

    def test_of_a_forward_that_fails(self):
        model = Picky()
        before = self.state(model)

        def fail(*_):
            torch.rand(())
            raise RuntimeError('no memory')

        with pytest.raises(RuntimeError, match='no memory'):
            FixedBatch(runner(model, Restless()), 12, 'Hook').forward(fail)
        torch.testing.assert_close(self.state(model), before, rtol=0, atol=0)


class TestErrors:
    def test_no_validation_set(self):
        without = runner(Net())
        without.val_loop = None
        with pytest.raises(ConfigError, match=r'MyHook .* val_dataloader, which is None; set val_dataloader'):
            FixedBatch(without, 4, 'MyHook')

    def test_no_norm(self):
        model = Net()
        model.first = model.shared = nn.Identity()
        with pytest.raises(ConfigError, match='MyHook measures at norm layers, and Net has none'):
            FixedBatch(runner(model), 4, 'MyHook')

    def test_a_wrapper_that_shares_the_model_between_processes(self):
        class Sharded(nn.Module):
            module = None

        MODEL_WRAPPERS.register_module(module=Sharded)
        try:
            with pytest.raises(ConfigError, match=r'MyHook .* Sharded shares it between processes; train with'):
                FixedBatch(runner(Sharded()), 4, 'MyHook')
        finally:
            MODEL_WRAPPERS.module_dict.pop('Sharded')


def test_norm_layers_are_all_norms_by_name():
    norms = {
        'bn': nn.BatchNorm1d(2),
        'sync': nn.SyncBatchNorm(2),
        'instance': nn.InstanceNorm2d(2),
        'group': nn.GroupNorm(1, 2),
        'layer': nn.LayerNorm(2),
        'rms': nn.RMSNorm(2),
        'ubn': mmubn.UBN(2),
        'unitized': mmubn.UnitizedBN(2),
    }
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ModuleDict(norms), nn.Dropout())
    assert norm_layers(model) == {f'1.{name}': norm for name, norm in norms.items()}


def test_layer_scalars_leave_out_nan_and_pass_for_no_other_scalar():
    scalars = layer_scalars('gate', ['loss', 'neck', 'top1'], [0.0, float('nan'), 1.0])
    assert scalars == {'gate/layer.loss': 0.0, 'gate/layer.top1': 1.0}
    assert series([dict(scalars, step=1)], 'loss') == ([], [])
