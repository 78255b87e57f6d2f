"""Nothing converts a norm of mmubn to SyncBatchNorm without a word; other models are converted as before."""

import re
import subprocess
import sys
from types import SimpleNamespace

import mmdet.models  # noqa: F401 - registers them
import pytest
import torch
from helpers import randomize
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from networks import Net
from torch import distributed as dist
from torch import nn

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN

# What to do instead of the conversion to SyncBatchNorm.
REMEDIES = {
    UBN: "build the model with norm_cfg=dict(type='SyncUBN') instead",
    RBN: "build the model with norm_cfg=dict(type='SyncUBN', threshold=None, kernel_size=1) instead",
    BNET: "build the model with norm_cfg=dict(type='SyncUBN', threshold=None, centering=False, scaling=False) instead",
    IEBN: 'there is no synchronised IEBN: leave sync_bn and use_syncbn out',
    UnitizedBN: 'there is no synchronised UnitizedBN: leave sync_bn and use_syncbn out',
}


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
