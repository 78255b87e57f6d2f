"""Nothing replaces a norm of mmubn without a word: conversions and foldings are errors; other models are as before."""

import copy
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import mmcv.cnn
import mmdet.models  # noqa: F401 - registers them
import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.hub import get_config
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain.models.backbones import levit, mobileone, replknet, repmlp, repvgg
from torch import distributed as dist
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils import fusion

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN
from mmubn.deploy import FoldedUBN, fold
from mmubn.guards import UnfoldableEps, install_guards

TYPES = [UBN, SyncUBN, RBN, BNET, IEBN, UnitizedBN]
# What to do instead of the conversion to SyncBatchNorm.
REMEDIES = {
    UBN: "build the model with norm_cfg=dict(type='SyncUBN') instead",
    RBN: "build the model with norm_cfg=dict(type='SyncUBN', threshold=None, kernel_size=1) instead",
    BNET: "build the model with norm_cfg=dict(type='SyncUBN', threshold=None, centering=False, scaling=False) instead",
    IEBN: 'there is no synchronised IEBN: leave sync_bn and use_syncbn out',
    UnitizedBN: 'there is no synchronised UnitizedBN: leave sync_bn and use_syncbn out',
}


class Net(nn.Module):
    """A convolution with its norm, and deeper down another with a BatchNorm."""

    def __init__(self, norm=UBN):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = norm(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.block(self.bn(self.conv(x)))


def randomize(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def trained(model):
    """The model in evaluation mode, after one batch."""
    torch.manual_seed(0)
    model.train()
    model(torch.randn(2, 3, 6, 6))
    return model.eval()


def runner_wrap_model(model, sync_bn):
    """What a distributed Runner does with its config's ``sync_bn``; returns before it wraps in DDP."""
    wrapped = []
    runner = SimpleNamespace(distributed=True, cfg={'sync_bn': sync_bn}, logger=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LOCAL_RANK', '0')
        patch.setattr('mmengine.runner.runner.get_device', lambda: 'cpu')
        patch.setattr('mmengine.runner.runner.MMDistributedDataParallel', lambda module, **_: wrapped.append(module))
        Runner.wrap_model(runner, None, model)
    return wrapped[0]


CONVERSIONS = {
    'torch': nn.SyncBatchNorm.convert_sync_batchnorm,
    'torch, by keyword': lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(module=model, process_group=None),
    "Runner, sync_bn='torch'": lambda model: runner_wrap_model(model, 'torch'),
    "Runner, sync_bn='mmcv'": lambda model: runner_wrap_model(model, 'mmcv'),
}


@pytest.fixture(scope='module', autouse=True)
def process_group(tmp_path_factory):
    """Of one process; mmcv's SyncBatchNorm asks for one."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path_factory.mktemp("group")}/r', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestConversionToSyncBatchNorm:
    @pytest.mark.parametrize('norm', REMEDIES)
    @pytest.mark.parametrize('convert', CONVERSIONS.values(), ids=CONVERSIONS)
    def test_each_type_is_an_error_that_names_layer_and_remedy(self, convert, norm):
        model = Net(norm)
        start = r'convert_sync_batchnorm .*sync_bn.* Net\.bn, of type '
        with pytest.raises(RuntimeError, match=f'{start}{norm.__name__}, .*{re.escape(REMEDIES[norm])}'):
            convert(model)
        assert type(model.bn) is norm
        assert type(model.block[1]) is nn.BatchNorm2d, 'nothing may be converted before the error'

    @pytest.mark.parametrize(
        ('norm', 'options'),
        [
            (UBN, {}),
            (UBN, dict(threshold=0.2, similarity_samples=4, kernel_size=5, calibrate_bias=True, eps=1e-3)),
            (UBN, dict(threshold=None, centering=False)),
            (RBN, dict(momentum=0.2)),
            (BNET, {}),
            (BNET, dict(kernel_size=7)),
        ],
    )
    def test_the_remedy_computes_the_same(self, norm, options):
        layer = randomize(norm(3, **options))
        with pytest.raises(RuntimeError) as error:
            nn.SyncBatchNorm.convert_sync_batchnorm(layer)
        remedy = eval(re.search(r'norm_cfg=(dict\(.*?\))', str(error.value))[1])
        assert remedy.pop('type') == 'SyncUBN'
        other = SyncUBN(3, **remedy)
        assert dict(other.named_parameters()).keys() == dict(layer.named_parameters()).keys()
        other.load_state_dict({**other.state_dict(), **layer.state_dict()})
        x = torch.randn(6, 3, 5, 4)
        for training in (True, False):
            torch.testing.assert_close(other.train(training)(x), layer.train(training)(x))
        for name, value in layer.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)

    @pytest.mark.parametrize('convert', CONVERSIONS.values(), ids=CONVERSIONS)
    def test_sync_ubn_stays_and_the_others_are_converted(self, convert):
        model = Net(SyncUBN)
        norm = model.bn
        assert convert(model) is model
        assert model.bn is norm
        assert type(model.block[1]).__name__ == 'SyncBatchNorm'

    @pytest.mark.parametrize('convert', CONVERSIONS.values(), ids=CONVERSIONS)
    def test_without_ubn_nothing_changes(self, convert):
        model = convert(Net(nn.BatchNorm2d))
        assert [type(m).__name__ for m in (model.bn, model.block[1])] == ['SyncBatchNorm'] * 2
        assert type(convert(nn.BatchNorm2d(3))).__name__ == 'SyncBatchNorm'

    def test_rtmdet(self, monkeypatch):
        cfg = get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py').model
        cfg.backbone.update(norm_cfg=dict(type='UBN'), init_cfg=None)
        monkeypatch.setattr('mmdet.models.detectors.rtmdet.get_world_size', lambda: 8)
        error = pytest.raises(RuntimeError, match=r'RTMDet\.backbone\.stem\.0\.bn, of type UBN.*SyncUBN')
        with DefaultScope.overwrite_default_scope('mmdet'), error:
            MMDET_MODELS.build(cfg)

    def test_wrong_arguments_get_the_error_of_the_library(self):
        with pytest.raises(TypeError, match='module'):
            nn.SyncBatchNorm.convert_sync_batchnorm()
        with pytest.raises(ValueError, match='should be "torch" or "mmcv"'):
            Runner.wrap_model.__globals__['convert_sync_batchnorm'](nn.BatchNorm2d(3), 'other')


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
        model, name = nn.ModuleDict({'backbone': Net(norm)}), norm.__name__
        error = rf'efficient_conv_bn_eval would fold Net\.bn, of type {name}, .*only modules without {name}\.'
        with pytest.raises(RuntimeError, match=error):
            turn_on_efficient_conv_bn_eval(model, ['backbone'])

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
        for other in (copy.deepcopy(layer.eps), pickle.loads(pickle.dumps(layer.eps))):
            assert (type(other), other, other.layer) == (UnfoldableEps, 2e-3, 'UBN')

    def test_the_layer_uses_what_was_set(self):
        layer, other = UBN(3), UBN(3, eps=0.5)
        layer.eps = 0.5
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(layer(x), other(x))

    def test_errors_in_either_order_and_in_place(self):
        eps = UBN(3).eps
        for compute in (
            lambda v: v + eps,
            lambda v: eps + v,
            lambda v: v.add_(eps),
            lambda v: torch.add(input=v, other=eps),
        ):
            with pytest.raises(RuntimeError, match='UBN of 3 channels'):
                compute(torch.ones(3))


class TestTracing:
    @pytest.mark.parametrize('norm', TYPES)
    def test_each_type_is_one_node_and_follows_the_mode(self, norm):
        model, x = trained(Net(norm)), torch.randn(2, 3, 6, 6)
        graph = torch.fx.symbolic_trace(model)
        assert ['call_module', 'bn'] in [[node.op, node.target] for node in graph.graph.nodes]
        torch.testing.assert_close(graph(x), model(x))
        graph.train()(x)
        assert graph.bn.num_batches_tracked == 2

    def test_others_are_as_before(self):
        graph = torch.fx.symbolic_trace(Net(nn.BatchNorm2d)).graph
        assert [node.target for node in graph.nodes] == ['x', 'conv', 'bn', 'block.0', 'block.1', 'block.2', 'output']


def run(code):
    """Run ``code`` in a new interpreter and return what it printed last."""
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_names_imported_before_mmubn():
    """Including one under another name, which calls the guard for the children of its argument alone."""
    code = """
from mmengine.model.utils import convert_sync_batchnorm as convert
from mmengine.runner import runner
import mmubn
from torch import nn
errors = 0
for function in (convert, runner.convert_sync_batchnorm):
    try:
        function(nn.Sequential(nn.Sequential(mmubn.UBN(3))))
    except RuntimeError:
        errors += 1
print(errors)
"""
    assert run(code) == '2'


def test_with_torch_alone():
    code = """
import sys
sys.modules.update(dict.fromkeys(['mmengine', 'mmcv', 'mmdet', 'mmpretrain']))
import mmubn
from torch import nn
try:
    nn.SyncBatchNorm.convert_sync_batchnorm(mmubn.UBN(3))
except RuntimeError as error:
    print('UBN' in str(error), any(name.startswith('mm') and '.' in name and not name.startswith('mmubn')
                                   for name in sys.modules))
"""
    assert run(code) == 'True False'


def test_installing_twice_is_installing_once():
    before = nn.SyncBatchNorm.convert_sync_batchnorm.__func__, torch.fx.Tracer.is_leaf_module
    install_guards()
    assert before == (nn.SyncBatchNorm.convert_sync_batchnorm.__func__, torch.fx.Tracer.is_leaf_module)
    assert not hasattr(before[1].__wrapped__, '__wrapped__')
