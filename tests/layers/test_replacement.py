"""No converter puts another norm in the place of one of ours without a word; nobody else is disturbed."""

import copy
import io
import json
import pickle

import pytest
import torch
import torchvision
import yaml
from helpers import batch, randomize
from networks import TYPES, Net
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import mkldnn

from mmubn import RBN, UBN, SyncUBN, fold

EACH_TYPE = pytest.mark.parametrize('norm', TYPES)


def replace_all(model, make):
    """A generic converter, of which many repositories have one of their own."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            setattr(model, name, make(child))
        else:
            replace_all(child, make)
    return model


def by_arguments(old):
    """timm's ``convert_sync_batchnorm``."""
    new = nn.SyncBatchNorm(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    with torch.no_grad():
        new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    return new


def by_attributes(old):
    new = nn.SyncBatchNorm(old.num_features)
    new.eps, new.momentum = old.eps, old.momentum
    new.weight.data = old.weight.data.clone()
    return new


def by_copies(old):
    new = nn.SyncBatchNorm(old.num_features, eps=float(old.eps))
    new.load_state_dict({key: value.clone() for key, value in old.state_dict().items()}, strict=False)
    return new


def by_eps_alone(old):
    return nn.BatchNorm2d(old.num_features, eps=old.eps)


def frozen(old):
    """detectron2's and torchvision's."""
    new = torchvision.ops.FrozenBatchNorm2d(old.num_features, eps=old.eps)
    new.weight.copy_(old.weight.detach())
    new.running_var.copy_(old.running_var)
    return new


CONVERTERS = [by_arguments, by_attributes, by_copies, by_eps_alone, frozen]


def net(norm, trained=True):
    model = Net(norm)
    return randomize(model) if trained else model


@EACH_TYPE
class TestReplacement:
    @pytest.mark.parametrize('make', CONVERTERS)
    @pytest.mark.parametrize('setting', ['setattr', 'add_module', 'register_module'])
    def test_is_an_error_that_names_the_layer(self, norm, make, setting):
        model = net(norm)
        new = make(model.bn)
        set_new = {'setattr': lambda: setattr(model, 'bn', new)}
        set_new |= {
            name: lambda name=name: getattr(model, name)('bn', new) for name in ('add_module', 'register_module')
        }
        if issubclass(norm, SyncUBN) and isinstance(new, nn.SyncBatchNorm):
            set_new[setting]()
            assert type(model.bn) is norm, 'it is synchronised already'
            return
        kind = type(new).__name__
        with pytest.raises(RuntimeError, match=rf'^Net\.bn, of type {norm.__name__}, would be replaced by a {kind} '):
            set_new[setting]()
        assert type(model.bn) is norm

    def test_of_a_fresh_one(self, norm):
        """By the eps or the tensors: values say nothing yet."""
        for make in (by_arguments, by_attributes, by_eps_alone, frozen):
            model = net(norm, trained=False)
            new = make(model.bn)
            if not (issubclass(norm, SyncUBN) and isinstance(new, nn.SyncBatchNorm)):
                with pytest.raises(RuntimeError, match=r'^Net\.bn, of type '):
                    model.bn = new

    def test_in_a_container(self, norm):
        for container in (nn.Sequential(norm(4)), nn.ModuleList([norm(4)])):
            with pytest.raises(RuntimeError, match=r'\.0, of type '):
                container[0] = frozen(container[0])
        container = nn.ModuleDict({'norm': norm(4)})
        with pytest.raises(RuntimeError, match=r'\.norm, of type '):
            container['norm'] = frozen(container['norm'])

    @pytest.mark.filterwarnings('ignore::DeprecationWarning')
    def test_by_mkldnn(self, norm):
        with pytest.raises(RuntimeError, match='would be replaced by a MkldnnBatchNorm'):
            mkldnn.to_mkldnn(net(norm).eval())

    def test_that_is_the_users_own_choice(self, norm):
        """Another norm that owes the old one nothing; one of ours; what is no such norm; and after ``del``."""
        others = [
            nn.BatchNorm2d(4),
            nn.Identity(),
            nn.GroupNorm(2, 4),
            RBN(4),
            UBN(4),
            copy.deepcopy(net(norm).bn),
            None,
        ]
        for new in others:
            model = net(norm)
            model.bn = new
            assert model.bn is new
        model = net(norm)
        new = frozen(model.bn)
        del model.bn
        model.bn = new
        assert model.bn is new

    def test_copies_and_folds_are_none(self, norm):
        model = net(norm).eval()
        x = batch((2, 3, 6, 6))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fold(model)):
            torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('make', CONVERTERS)
def test_others_are_converted_as_before(make):
    model = replace_all(net(nn.BatchNorm2d), make)
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules()) or make is by_eps_alone
    assert model.bn.eps == 1e-5


@EACH_TYPE
class TestEps:
    """An ordinary number wherever it goes, but in the sum with the variance of its own layer."""

    def test_in_files(self, norm):
        eps = norm(4, eps=1e-3).eps
        for dumper in (yaml.SafeDumper, yaml.Dumper, getattr(yaml, 'CSafeDumper', yaml.SafeDumper)):
            assert yaml.safe_load(yaml.dump({'eps': eps}, Dumper=dumper)) == {'eps': 1e-3}
        assert yaml.safe_load(yaml.safe_dump([eps])) == [1e-3]
        assert json.dumps(eps) == '0.001'
        for options in ({}, dict(_use_new_zipfile_serialization=False)):
            file = io.BytesIO()
            torch.save({'eps': eps}, file, **options)
            file.seek(0)
            read = torch.load(file, weights_only=True)['eps']
            assert (type(read), read) == (float, 1e-3)
        for other in (pickle.loads(pickle.dumps(eps)), copy.deepcopy(eps), copy.copy(eps)):
            assert (type(other), other) == (float, 1e-3)

    @pytest.mark.parametrize(
        'make', [nn.BatchNorm2d, nn.SyncBatchNorm, torchvision.ops.FrozenBatchNorm2d, nn.LayerNorm]
    )
    def test_in_another_norm(self, norm, make):
        layer = randomize(norm(4, eps=1e-3))
        other = make(4, eps=layer.eps)
        assert (type(other.eps), other.eps) == (float, 1e-3)

    def test_in_a_batch_norm_that_is_folded(self, norm):
        layer = randomize(norm(4, eps=1e-3))
        conv, bn = nn.Conv2d(3, 4, 1).eval(), nn.BatchNorm2d(4, eps=layer.eps).eval()
        x = batch((2, 3, 5, 5))
        fused = torch.nn.utils.fuse_conv_bn_eval(conv, bn)
        torch.testing.assert_close(fused(x), bn(conv(x)))
        bn.eps = layer.eps  # after the constructor
        torch.testing.assert_close(torch.nn.utils.fuse_conv_bn_eval(conv, bn)(x), bn(conv(x)))

    def test_with_other_tensors(self, norm):
        eps = norm(4, eps=0.5).eps
        x = torch.rand(4)
        for found in (x + eps, eps + x, torch.add(x, eps), x.clone().add_(eps), torch.rsqrt(x + eps) ** -2):
            torch.testing.assert_close(found, x + 0.5)
        assert type(torch.full((2,), 1.0) * eps) is torch.Tensor

    def test_with_the_variance_in_any_form(self, norm):
        layer = randomize(norm(4))
        var, eps = layer.running_var, layer.eps
        conv = nn.Conv2d(3, 4, 1)
        for compute in (
            lambda: var + eps,
            lambda: eps + var,
            lambda: torch.add(input=var, other=eps),
            lambda: var.add_(eps),
            lambda: var.view(1, -1, 1, 1) + eps,
            lambda: var.double() + eps,
            lambda: var.clone() + eps,
            lambda: var.detach() + eps,
            lambda: copy.deepcopy(layer).running_var + layer.eps,
            lambda: torch.nn.utils.fuse_conv_bn_eval(conv.eval(), copy.deepcopy(layer).eval()),
        ):
            before = var.clone()
            with pytest.raises(RuntimeError, match=f'{norm.__name__} of 4 channels as a BatchNorm'):
                compute()
            assert torch.equal(var, before)
