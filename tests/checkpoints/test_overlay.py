"""Code that copies entries of a BatchNorm one by one: the layer computes that function, or there is a warning.

A BatchNorm's gamma has the name and the shape of ours, but ours is multiplied by the factor of a fresh layer.
"""

import copy
import inspect
import warnings

import forks
import pytest
import torch
from helpers import batch, randomize
from networks import TYPES
from saved_norms import CHANNELS, assert_same_function, fill, source
from saved_norms import TYPES as LAYERS
from torch import nn
from torchvision.models import resnet18

import mmubn
from mmubn import BNET, RBN, UBN
from mmubn.checkpoints import CheckpointError

EACH_TYPE = pytest.mark.parametrize('norm', TYPES)
ALONE = 'they are read alone'


def trained_batch_norm(channels=4):
    return randomize(nn.BatchNorm2d(channels)).double()


def assert_same(layer, expected):
    for training in (False, True):
        x = batch((4, 4, 5, 5), dtype=torch.float64, shared=3.0)
        y = copy.deepcopy(layer).train(training)(x)
        torch.testing.assert_close(y, copy.deepcopy(expected).train(training)(x), rtol=1e-9, atol=1e-9)


def filtered(own, other):
    return {key: value for key, value in other.items() if key in own and value.shape == own[key].shape}


@EACH_TYPE
class TestFilteredLoad:
    def test_update_of_the_models_own_state_dict(self, norm):
        plain, layer = trained_batch_norm(), norm(4).double()
        own = layer.state_dict()
        own.update(filtered(own, plain.state_dict()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            layer.load_state_dict(own)
        assert_same(layer, plain)
        assert [ALONE for each in caught if ALONE in str(each.message)] == [ALONE]

    def test_inside_a_model_and_without_the_count_of_batches(self, norm):
        """Old checkpoints have none."""
        plain = nn.Sequential(nn.Conv2d(3, 4, 1), trained_batch_norm()).double()
        model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4)).double()
        own = model.state_dict()
        entries = filtered(own, plain.state_dict())
        entries.pop('1.num_batches_tracked')
        own.update(entries)
        with pytest.warns(UserWarning, match=ALONE):
            model.load_state_dict(own)
        assert_same(model[1], plain[1])

    def test_without_update(self, norm):
        plain, layer = trained_batch_norm(), norm(4).double()
        layer.load_state_dict(filtered(layer.state_dict(), plain.state_dict()), strict=False)
        assert_same(layer, plain)

    def test_of_converted_entries(self, norm):
        plain, layer = trained_batch_norm(), norm(4).double()
        own = layer.state_dict()
        own.update(filtered(own, mmubn.convert_state_dict(layer, plain.state_dict())))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            layer.load_state_dict(own)
        assert_same(layer, plain)

    def test_what_is_no_such_load_is_left_alone(self, norm):
        """The layer's own state dict, whole, copied, averaged, or with one tensor changed by hand."""
        layer = randomize(norm(4)).double()
        own = layer.state_dict()
        changed = dict(layer.state_dict(), weight=own['weight'] * 2)
        for state_dict in (own, copy.deepcopy(own), {key: value + 0 for key, value in own.items()}, changed):
            other = copy.deepcopy(layer)
            # A copy has other tensors; this is the layer's own.
            state_dict = {
                key: other.state_dict()[key] if value is own.get(key) else value for key, value in state_dict.items()
            }
            expected = copy.deepcopy(state_dict)
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                other.load_state_dict(state_dict)
            for key, value in expected.items():
                assert torch.equal(other.state_dict()[key], value), key


@EACH_TYPE
@pytest.mark.filterwarnings('error')
def test_what_a_trained_layer_has_stays(norm):
    """Copies of some of its own tensors in its state dict; and that of a fresh layer after a forward."""
    layer = randomize(norm(4)).double()
    own = layer.state_dict()
    expected = copy.deepcopy(own)
    own.update({key: own[key].clone() for key in ('weight', 'bias', 'running_mean', 'running_var')})
    layer.load_state_dict(own)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, expected[key]), key
    fresh = norm(4)
    fresh(batch((2, 4, 5, 5)))
    fresh.load_state_dict(fresh.state_dict())


@EACH_TYPE
def test_with_children_and_parametrizations(norm):
    """Entries of modules in the norm are theirs; computed tensors are left to torch."""
    layer, other = randomize(norm(4)), norm(4)
    for each in (layer, other):
        each.add_module('adapter', nn.Linear(4, 4))
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in layer.state_dict().items())
    layer, other = randomize(norm(4)), norm(4)
    for each in (layer, other):
        nn.utils.parametrize.register_parametrization(each, 'weight', nn.Identity())
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in layer.state_dict().items())


def test_of_another_kernel_size_is_an_error():
    """Its neighbor taps do not fit, and without them it would be another function."""
    layer, other = UBN(4), randomize(UBN(4, kernel_size=5))
    own = layer.state_dict()
    own.update(filtered(own, other.state_dict()))
    with pytest.warns(UserWarning, match=ALONE), pytest.raises(CheckpointError, match='neighbor_weight is missing'):
        layer.load_state_dict(own)


def test_of_an_rbn():
    layer, other = UBN(4).double(), randomize(RBN(4)).double()
    own = layer.state_dict()
    own.update(filtered(own, other.state_dict()))
    with pytest.warns(UserWarning, match=ALONE):
        layer.load_state_dict(own)
    assert_same(layer, other)


@pytest.mark.filterwarnings('ignore:The state dict has entries of another norm')
def test_of_a_resnet():
    torch.manual_seed(0)
    plain = randomize(resnet18(num_classes=3), scale=0.02).eval()
    model = resnet18(num_classes=5, norm_layer=UBN).eval()
    own = model.state_dict()
    own.update(filtered(own, plain.state_dict()))
    model.load_state_dict(own)
    model.fc = plain.fc  # of another number of classes, as it is in transfer learning
    x = batch((2, 3, 32, 32))
    error = (model(x) - plain(x)).abs().max() / plain(x).abs().max()
    assert error < 1e-5


class TestConvertStateDict:
    @EACH_TYPE
    def test_is_what_load_state_dict_does(self, norm):
        plain = nn.ModuleDict(
            {'a': nn.Sequential(trained_batch_norm()), 'b': trained_batch_norm(), 'c': nn.Linear(2, 2)}
        )
        model = nn.ModuleDict({'a': nn.Sequential(norm(4)), 'b': norm(4), 'c': nn.Linear(2, 2)}).double()
        state_dict = plain.state_dict()
        before = copy.deepcopy(state_dict)
        converted = mmubn.convert_state_dict(model, state_dict)
        assert converted.keys() == model.state_dict().keys()
        assert converted._metadata == state_dict._metadata
        assert state_dict.keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in state_dict.items())
        assert {key: value.shape for key, value in converted.items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }
        model.load_state_dict(state_dict)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(converted[key], value, check_dtype=False)

    @pytest.mark.parametrize(('kind', 'name'), [(kind, name) for kind in LAYERS for name in sorted(LAYERS[kind][1])])
    def test_of_every_layout(self, kind, name):
        reference, layer = source(name), fill(LAYERS[kind][0]().double())
        layer.load_state_dict(mmubn.convert_state_dict(layer, reference.state_dict()))
        assert_same_function(layer, reference)

    def test_of_keys_with_another_prefix_is_an_error(self):
        model = nn.ModuleDict({'backbone': nn.Sequential(UBN(4))})
        state_dict = nn.DataParallel(nn.ModuleDict({'backbone': nn.Sequential(nn.BatchNorm2d(4))})).state_dict()
        with pytest.raises(CheckpointError, match=r"'module\.backbone\.0\.weight'.*'backbone\.0\.'"):
            mmubn.convert_state_dict(model, state_dict)

    def test_of_arguments_in_the_other_order_is_an_error(self):
        model = nn.Sequential(UBN(4))
        for arguments, got in [
            ((model.state_dict(), model), 'OrderedDict and Sequential'),
            ((model, model), 'Sequential and Sequential'),
            ((model, 'model.pth'), 'Sequential and str'),
        ]:
            with pytest.raises(TypeError, match=f'expected a model and a state dict, in this order, got {got}'):
                mmubn.convert_state_dict(*arguments)

    def test_without_a_norm_of_ours_nothing_changes(self):
        plain = nn.Sequential(nn.BatchNorm2d(4))
        assert mmubn.convert_state_dict(plain, plain.state_dict()).keys() == plain.state_dict().keys()


@pytest.mark.parametrize('norm', [UBN, BNET])
@pytest.mark.parametrize('kernel_size', [3, 5])
def test_neighbor_taps_of_version_2(norm, kernel_size):
    """They were (C, k*k - 1): the same order of elements."""
    layer = randomize(norm(CHANNELS, kernel_size=kernel_size)).double()
    old = layer.state_dict()
    old['neighbor_weight'] = old['neighbor_weight'].view(CHANNELS, -1)
    for state_dict in (old, mmubn.convert_state_dict(layer, old)):
        other = norm(CHANNELS, kernel_size=kernel_size).double()
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            other.load_state_dict(state_dict)
        for key, value in layer.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), key
    larger = norm(CHANNELS, kernel_size=kernel_size + 2).double()
    larger.load_state_dict(old)
    assert_same_function(larger, layer)


class TestFSDP2:
    def test_full_state_dict(self, tmp_path):
        """It updates the model's own state dict; of all ways, one writes into the layer before it sees anything."""
        code = inspect.getsource(fsdp_process)
        calls = [(f'{code}\nfsdp_process({rank}, {str(tmp_path)!r})', {}) for rank in range(2)]
        results = forks.together(exec, *calls)
        assert [result.returncode for result in results] == [0, 0], '\n'.join(result.stdout for result in results)
        for rank in range(2):
            found = torch.load(tmp_path / f'{rank}.pt')
            for name in ('as it is', 'broadcast', 'converted', 'converted, broadcast', 'trained', 'resumed'):
                assert found[name] < 1e-5, name
            assert found['broadcast, not strict'] > 0.1, 'else no warning is needed'
            assert found['warned of'] == ['broadcast, not strict']


def fsdp_process(rank, folder):
    """One of two processes: a BatchNorm's weights into a sharded model with UBN, in several ways; then training."""
    import copy
    import os
    import warnings
    from pathlib import Path

    import torch
    from torch import distributed as dist
    from torch import nn
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import mmubn

    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    mesh = init_device_mesh('cpu', (2,))

    def network(norm):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), nn.Conv2d(5, 4, 1), norm(4))

    plain = network(nn.BatchNorm2d)
    for _ in range(3):
        plain(torch.randn(4, 3, 8, 8) * 3 + 1)
    for norm in (plain[1], plain[4]):
        nn.init.uniform_(norm.weight, 0.5, 2)
    plain.eval()
    x = torch.randn(2, 3, 8, 8)
    weights = plain.state_dict()
    result, warned = {}, []

    def load(name, state_dict, **options):
        model = network(mmubn.UBN)
        fully_shard(model, mesh=mesh)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            set_model_state_dict(model, copy.deepcopy(state_dict), options=StateDictOptions(**options))
        if any('convert the state dict first' in str(each.message) for each in caught):
            warned.append(name)
        with torch.no_grad():
            result[name] = float((model.eval()(x) - plain(x)).abs().max() / plain(x).abs().max())
        return model

    load('as it is', weights, full_state_dict=True)
    broadcast = dict(full_state_dict=True, broadcast_from_rank0=True)
    load('broadcast', weights if rank == 0 else {}, **broadcast)
    load('broadcast, not strict', weights if rank == 0 else {}, **broadcast, strict=False)
    converted = mmubn.convert_state_dict(network(mmubn.UBN), weights)
    load('converted', converted, full_state_dict=True)
    load('converted, broadcast', converted if rank == 0 else {}, **broadcast)

    # A step on shards is that of the whole model on the whole batch.
    alone, model = network(mmubn.UBN), network(mmubn.UBN)
    fully_shard(model, mesh=mesh)
    for each in (model, alone):
        set_model_state_dict(each, dict(converted), options=StateDictOptions(full_state_dict=True))
    for each in (model.train(), alone.train()):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(x).square().mean().backward()
        optimizer.step()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))
    result['trained'] = max(
        float((full[key] - value).abs().max()) for key, value in alone.state_dict().items() if value.dim()
    )
    again = network(mmubn.UBN)
    fully_shard(again, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        set_model_state_dict(again, full, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        result['resumed'] = float((again.eval()(x) - model.eval()(x)).abs().max())
    result['warned of'] = warned
    torch.save(result, Path(folder) / f'{rank}.pt')
    dist.barrier()
    os._exit(0)  # torch's tear-down of gloo may hang: it joins threads under the lock that they wait for
