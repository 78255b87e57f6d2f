"""Nothing folds a norm of mmubn into a convolution without a word: it is an error; BatchNorm is folded as before."""

import copy
from types import SimpleNamespace

import mmcv.cnn
import pytest
import torch
from helpers import randomize
from mmcv.cnn import ConvModule
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmpretrain.models.backbones import levit, mobileone, replknet, repmlp, repvgg
from networks import TYPES, Net, trained
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils import fusion

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN
from mmubn.deploy import FoldedUBN, fold
from mmubn.layers.unfoldable_eps import UnfoldableEps


def conv_norm(norm):
    """What MMPretrain's blocks call a branch."""
    return SimpleNamespace(conv=nn.Conv2d(3, 4, 3), norm=norm)


FOLDINGS = {
    '_fuse_conv_bn of mmcv': mmcv.cnn.fuse_conv_bn,
    'torch fuse_conv_bn_eval': lambda model: fusion.fuse_conv_bn_eval(model.conv, model.bn),
    'RepVGG': lambda model: repvgg.RepVGGBlock._fuse_conv_bn(None, conv_norm(model.bn)),
    'MobileOne': lambda model: mobileone.MobileOneBlock._fuse_conv_bn(None, conv_norm(model.bn)),
    'RepLKNet': lambda model: replknet.fuse_bn(model.conv, model.bn),
    'RepMLP': lambda model: repmlp.fuse_bn(model.conv, model.bn),
}


class TestFolding:
    @pytest.mark.parametrize('norm', TYPES)
    @pytest.mark.parametrize('fold', FOLDINGS.values(), ids=FOLDINGS)
    def test_each_type_is_an_error_that_names_the_caller_and_the_remedy(self, fold, norm):
        model = trained(Net(norm))
        before = copy.deepcopy(model.state_dict())
        remedy = r'no fuse_conv_bn.*mmubn\.deploy\.fold'
        with pytest.raises(RuntimeError, match=rf'fuse\w* treats the {norm.__name__} of 4 channels .*{remedy}'):
            fold(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    @pytest.mark.parametrize('fold', FOLDINGS.values(), ids=FOLDINGS)
    def test_batch_norm_folds(self, fold):
        fold(trained(Net(nn.BatchNorm2d)))

    def test_folded_batch_norm_is_right(self):
        model, x = trained(Net(nn.BatchNorm2d)), torch.randn(2, 3, 6, 6)
        torch.testing.assert_close(mmcv.cnn.fuse_conv_bn(copy.deepcopy(model))(x), model(x))

    @pytest.mark.parametrize('norm', [UBN, SyncUBN, RBN, BNET, IEBN])
    @pytest.mark.parametrize('rectified', [True, False])
    def test_remedy(self, rectified, norm):
        """What ``mmubn.deploy.fold`` makes of a norm is a BatchNorm for others to fold, or no norm to them."""
        model, x = trained(Net(norm)), torch.randn(2, 3, 6, 6)
        if rectified:
            randomize(model.bn)
        fused = mmcv.cnn.fuse_conv_bn(fold(model))
        assert isinstance(fused.bn, FoldedUBN if rectified else nn.Identity)
        torch.testing.assert_close(fused(x), model(x))

    def test_a_unitized_bn_that_does_not_fold_stays_an_error(self):
        model, x = trained(Net(UnitizedBN)), torch.randn(2, 3, 6, 6)
        expected = model(x)
        torch.testing.assert_close(mmcv.cnn.fuse_conv_bn(fold(model))(x), expected)  # alpha = 0
        randomize(model.bn)
        with pytest.raises(RuntimeError, match='treats the UnitizedBN of 4 channels as a BatchNorm'):
            mmcv.cnn.fuse_conv_bn(fold(model))

    def test_deploy_mode_of_a_block(self):
        for block in (
            repvgg.RepVGGBlock(4, 4, norm_cfg=dict(type='UBN')),
            mobileone.MobileOneBlock(4, 4, 3, 1, norm_cfg=dict(type='UBN')),
        ):
            with pytest.raises(AssertionError, match='not allowed when norm_cfg'):  # these two see to it themselves
                block.eval().switch_to_deploy()
        with pytest.raises(RuntimeError, match='UBN of 4 channels'):
            levit.ConvolutionBatchNorm(3, 4, 3, 1, 1, norm_cfg=dict(type='UBN')).eval().fuse()

    @pytest.mark.parametrize('norm', TYPES)
    def test_efficient_conv_bn_eval_of_a_conv_module(self, norm):
        module = ConvModule(3, 4, 3, norm_cfg=dict(type=norm.__name__), efficient_conv_bn_eval=True)
        x = torch.randn(2, 3, 6, 6)
        module(x)
        with pytest.raises(RuntimeError, match=f'efficient_conv_bn_eval_forward .*{norm.__name__} of 4 channels'):
            module.eval()(x)

    @pytest.mark.parametrize('norm', TYPES)
    def test_efficient_conv_bn_eval_of_the_runner(self, norm):
        """In the first evaluation; the tools of this package say it before training (check_efficient_conv_bn_eval)."""
        model, x = Net(norm), torch.randn(2, 3, 6, 6)
        expected = copy.deepcopy(model)(x)
        turn_on_efficient_conv_bn_eval(nn.ModuleDict({'backbone': model}), ['backbone'])
        torch.testing.assert_close(model(x), expected)
        with pytest.raises(RuntimeError, match=f'efficient_conv_bn_eval_forward .*{norm.__name__} of 4 channels'):
            model.eval()(x)

    def test_efficient_conv_bn_eval_without_ubn(self):
        model, x = trained(Net(nn.BatchNorm2d)), torch.randn(2, 3, 6, 6)
        expected = model(x)
        turn_on_efficient_conv_bn_eval(nn.ModuleDict({'backbone': model}), 'backbone')
        assert 'efficient_conv_bn_eval' in model.forward.__self__.code
        torch.testing.assert_close(model(x), expected)

    @pytest.mark.parametrize('norm', TYPES)
    def test_quantization_knows_no_way_to_fold_it(self, norm):
        with pytest.raises(AssertionError, match=norm.__name__):
            torch.ao.quantization.fuse_modules(Net(norm).eval(), ['conv', 'bn'])

    @pytest.mark.parametrize('norm', TYPES)
    def test_fx_fusion_folds_the_others_and_keeps_ours(self, norm):
        model, x = trained(Net(norm)), torch.randn(2, 3, 6, 6)
        fused = optimization.fuse(model)
        assert [type(m) for m in fused.modules() if hasattr(m, 'running_mean')] == [norm]
        torch.testing.assert_close(fused(x), model(x))


class TestEps:
    def test_reads_and_sets_as_a_float(self):
        layer = UBN(3, eps=1e-3)
        assert layer.eps == 1e-3
        assert repr(layer.eps) == '0.001'
        assert 'eps=0.001' in repr(layer)
        layer.eps = 2e-3
        assert isinstance(layer.eps, UnfoldableEps)
        assert copy.deepcopy(layer).eps == 2e-3
        assert layer.eps.layer is layer

    def test_the_layer_uses_what_was_set(self):
        layer, other = UBN(3), UBN(3, eps=0.5)
        layer.eps = 0.5
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(layer(x), other(x))

    def test_errors_in_either_order_and_in_place(self):
        layer = UBN(3)
        eps = layer.eps
        for compute in (
            lambda v: v + eps,
            lambda v: eps + v,
            lambda v: v.add_(eps),
            lambda v: torch.add(input=v, other=eps),
        ):
            with pytest.raises(RuntimeError, match='UBN of 3 channels'):
                compute(layer.running_var)
