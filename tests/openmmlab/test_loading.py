"""How MMEngine reads checkpoints with the optional changes: its log history, the key ``model``, what the log says."""

import argparse
import copy
import logging
import pickle
import subprocess
import sys
import textwrap
import warnings

import hostile
import mmengine.model
import numpy as np
import pytest
import torch
from helpers import randomize
from mmdet.models.backbones import ResNet
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn
from torchvision.models import resnet50

from mmubn import BNET, IEBN, RBN, UBN, UnitizedBN
from mmubn.checkpoints import CheckpointError, convert_state_dict
from mmubn.openmmlab.pretrained import PretrainedInit

CHANNELS = 6
LOADING = ('layout-report', 'model-key', 'safe-globals')


# --- what torch.load accepts ------------------------------------------------------------------------------------------


def python(code, *arguments):
    """Run code in a new interpreter."""
    command = [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


LOAD = "import sys, torch; torch.load(sys.argv[1], weights_only=True)['message_hub']"
INSTALL = "import mmubn.openmmlab; mmubn.openmmlab.install('safe-globals')"


@pytest.fixture
def training_checkpoint(tmp_path):
    hub = MessageHub.get_instance('test_allow_list')
    hub.update_scalar('train/loss', 1.5)
    hub.update_scalar('train/accuracy', np.float32(0.5))
    hub.update_info('epoch', 3)
    path = tmp_path / 'epoch_1.pth'
    arguments = argparse.Namespace(lr=0.1)  # as torchvision's training scripts save
    content = {'message_hub': hub.state_dict(), 'state_dict': {}, 'meta': {'time': np.int64(3)}, 'args': arguments}
    content['empty'] = np.zeros(0)
    torch.save(content, path)
    return path


@pytest.mark.parametrize('before', ['import mmengine.logging', 'import mmubn'])
def test_torch_refuses_the_log_history_of_mmengine(training_checkpoint, before):
    """What stock MMEngine runs into on torch >= 2.6; ``import mmubn`` is no remedy by itself."""
    refused = python(f'{before}; {LOAD}', training_checkpoint)
    assert refused.returncode != 0
    assert 'HistoryBuffer' in refused.stderr


@pytest.mark.parametrize('install', [INSTALL, 'import mmubn.openmmlab.installed'])
def test_mmengine_checkpoints_load_through_the_allow_list(training_checkpoint, install):
    # Also after a load by MMEngine, whose own list is taken away again.
    by_mmengine = 'from mmengine.runner.checkpoint import _load_checkpoint; _load_checkpoint(sys.argv[1])'
    loaded = python(f'{install}; {LOAD}; {by_mmengine}; {LOAD}', training_checkpoint)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize('install', ['', INSTALL])
def test_the_initializer_accepts_them_for_the_time_of_its_load(training_checkpoint, install):
    """And leaves the list as it was: without the change nobody else can read them afterwards, with it everybody."""
    code = f"""
        import sys, mmubn.openmmlab.pretrained, torch
        {install}
        before = set(torch.serialization.get_safe_globals())
        checkpoint = mmubn.openmmlab.pretrained.PretrainedInit(sys.argv[1])._read()
        assert checkpoint['message_hub']['log_scalars'], checkpoint
        assert set(torch.serialization.get_safe_globals()) == before
        print(any('HistoryBuffer' in str(each) for each in before))
        """
    result = python(code, training_checkpoint)
    assert result.returncode == 0, result.stderr
    assert 'Could not safely load' not in result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == str(bool(install))


@pytest.mark.parametrize('core', ['core', '_core'])
def test_the_allow_list_has_the_names_of_numpy_1_and_2(tmp_path, core):
    content = pickle.dumps({'message_hub': [np.arange(3.0), np.float64(2.5)]}, 2)
    for name in (b'numpy.core.multiarray', b'numpy._core.multiarray'):
        content = content.replace(name, f'numpy.{core}.multiarray'.encode())
    (tmp_path / 'file.pth').write_bytes(hostile.archive(content))
    loaded = python(f'{INSTALL}; {LOAD}', tmp_path / 'file.pth')
    assert loaded.returncode == 0, loaded.stderr


def test_the_allow_list_does_not_let_code_run(tmp_path):
    class Prints:
        def __reduce__(self):
            return (print, ('code ran',))

    class LooksUp:  # harmless stand-ins for any other look-up: of another type, and of another method of an allowed one
        def __init__(self, owner, name):
            self.reduced = getattr, (owner, name)

        def __reduce__(self):
            return self.reduced

    bad = {'prints': Prints(), 'type': LooksUp(dict, 'clear'), 'method': LooksUp(HistoryBuffer, 'update')}
    paths = [str(tmp_path / f'{name}.pth') for name in bad]
    for path, each in zip(paths, bad.values(), strict=True):
        torch.save({'message_hub': each}, path)
    result = python(
        f"""
        {INSTALL}
        import sys, torch
        for path in sys.argv[1:]:
            try:
                torch.load(path, weights_only=True)
            except Exception as error:
                print(f'{{path}}: {{type(error).__name__}}')
        """,
        *paths,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-3:] == [f'{path}: UnpicklingError' for path in paths]
    assert 'code ran' not in result.stdout


# --- init_cfg ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def batch_norm_resnet():
    torch.manual_seed(0)
    model = resnet50()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    return model


def saved(path, state_dict, wrap):
    """Write ``state_dict`` as ``wrap`` says; the init_cfg that reads it."""
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    if 'prefix' in wrap:
        state_dict = {f'backbone.{key}': value for key, value in state_dict.items()}
        init_cfg['prefix'] = 'backbone.'
    if 'model' in wrap:
        state_dict = {'model': state_dict, 'epoch': 90, 'args': argparse.Namespace(lr=0.1)}
    elif wrap != 'plain':
        state_dict = {'state_dict': state_dict, 'meta': {}}
    torch.save(state_dict, path)
    return init_cfg


OURS = (PretrainedInit, ())
OTHERS = [(mmengine.model.PretrainedInit, LOADING), (PretrainedInit, LOADING)]
WRAPS = ('plain', 'state_dict', 'prefix', 'model', 'model prefix')


@pytest.mark.parametrize(
    ('norm', 'wrap', 'initializer', 'names'),
    [
        *[('UBN', wrap, *OURS) for wrap in WRAPS],
        *[(norm, 'plain', *OURS) for norm in ('RBN', 'BNET', 'IEBN', 'UnitizedBN')],
        *[('UBN', wrap, *other) for wrap in WRAPS for other in OTHERS],
    ],
)
def test_resnet50_through_init_cfg(
    tmp_path, capsys, monkeypatch, install, batch_norm_resnet, norm, wrap, initializer, names
):
    """By MMEngine's initializer with the optional changes, and by ours without and with them: told once."""
    install(*names)
    monkeypatch.setitem(WEIGHT_INITIALIZERS.module_dict, 'Pretrained', initializer)
    log = tmp_path / 'log'
    state_dict = batch_norm_resnet.state_dict()
    init_cfg = saved(tmp_path / 'resnet50.pth', state_dict, wrap)
    MMLogger.get_instance(f'{tmp_path}', log_file=str(log))  # becomes the current one
    model = ResNet(50, norm_cfg=dict(type=norm), norm_eval=False, init_cfg=init_cfg)
    model.init_weights()

    assert log.read_text().count('mmubn: ') == 1
    assert f'mmubn: 53 {norm} layers read: 53 from BatchNorm\n' in log.read_text()
    assert 'missing keys' not in log.read_text()
    where = 'backbone. in model' if 'prefix' in wrap else 'model'
    assert f'load {where} from: {tmp_path}/resnet50.pth\n' in log.read_text()
    assert 'Could not safely load' not in capsys.readouterr().out  # nor did it take the unsafe way
    assert torch.equal(model.layer4[2].conv3.weight, state_dict['layer4.2.conv3.weight'])
    assert torch.equal(model.layer4[2].bn3.running_mean, state_dict['layer4.2.bn3.running_mean'])
    if names:
        return
    x = torch.randn(2, 3, 64, 64)
    reference = copy.deepcopy(batch_norm_resnet)
    for training, tolerance in ((True, 2e-3), (False, 1e-4)):
        model.train(training), reference.train(training)
        y = model(x)[-1]
        expected = nn.Sequential(*list(reference.children())[:-2])(x)
        assert (y - expected).abs().max() / expected.abs().max() < tolerance


# --- load_from, and what the log says ---------------------------------------------------------------------------------


class Network(BaseModel):
    def __init__(self, norm):
        super().__init__()
        self.norm = randomize(norm)

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize(('layout', 'kind', 'norm'), [('rbn-released', RBN, UBN), ('iebn-released', IEBN, IEBN)])
def test_runner_loads_from_a_model_key(tmp_path, install, layout, kind, norm):
    install(*LOADING)
    reference, path, title = randomize(kind(CHANNELS)), tmp_path / 'checkpoint.pth', f'released {kind.__name__}'
    state_dict, *_ = convert_state_dict(nn.ModuleDict({'norm': reference}).state_dict(), layout)
    torch.save({'model': state_dict}, path)
    runner = Runner(Network(norm(CHANNELS)), str(tmp_path), load_from=str(path), experiment_name=f'{tmp_path}')
    runner.load_or_resume()
    x = torch.randn(4, CHANNELS, 5, 7)
    torch.testing.assert_close(runner.model.eval()(x), reference.eval()(x))
    (log,) = tmp_path.rglob('*.log')
    assert f'mmubn: 1 {norm.__name__} layers read: 1 from {title}\n' in log.read_text()


def test_a_dict_with_state_dict_or_without_tensors_is_read_as_ever(tmp_path, install):
    install('model-key')
    tensors, path = {'weight': torch.zeros(CHANNELS)}, tmp_path / 'checkpoint.pth'
    other = {'other': torch.zeros(CHANNELS)}
    for content in (tensors, {'state_dict': tensors, 'model': other}, {'model': {}}, {'model': 'resnet50'}):
        torch.save(content, path)
        read = mmengine_checkpoint._load_checkpoint(str(path))
        assert read.keys() == content.keys()
        assert 'state_dict' not in read or read['state_dict'].keys() == {'weight'}
    torch.save({'model': other, 'epoch': 3}, path)
    read = mmengine_checkpoint._load_checkpoint(str(path))
    assert read.keys() == {'model', 'epoch', 'state_dict'}
    assert read['state_dict'].keys() == {'other'}


def logged(caplog, model, state_dict):
    caplog.clear()
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        mmengine_checkpoint.load_state_dict(model, state_dict, logger=logging.getLogger('load'))
    return [record.getMessage() for record in caplog.records if 'mmubn' in record.getMessage()]


def source(layer, layout=None, calibrate_bias=False):
    """A layer's state dict, with values that count, in a layout."""
    state_dict = randomize(layer).state_dict()
    return state_dict if layout is None else convert_state_dict(state_dict, layout, calibrate_bias)[0]


def side_by_side(**state_dicts):
    return {f'{name}.{key}': value for name, each in state_dicts.items() for key, value in each.items()}


def test_the_log_counts_layouts(caplog, install):
    install('layout-report')
    state_dict = side_by_side(
        a=source(nn.BatchNorm2d(CHANNELS)),
        b=source(nn.BatchNorm2d(CHANNELS)),
        c=source(RBN(CHANNELS)),
        d=source(RBN(CHANNELS), 'rbn-released'),
        e=source(BNET(CHANNELS), 'bnet-released'),
        f=source(UBN(CHANNELS, calibrate_bias=True), 'ubn-released', calibrate_bias=True),
        g=source(UBN(CHANNELS)),
        h=source(UBN(CHANNELS)),
        i=source(UBN(CHANNELS, scaling=False, kernel_size=5)),
    )
    layers = {name: UBN(CHANNELS) for name in 'abcdefghj'} | {'i': UBN(CHANNELS, scaling=False, kernel_size=7)}
    assert logged(caplog, nn.ModuleDict(layers), state_dict) == [
        'mmubn: 9 UBN layers read: 2 from BatchNorm, 1 from RBN, 1 from released RBN, 1 from released BNET, 1 from '
        'released UBN, its bias approximately, 2 from UBN, 1 from UBN of other arguments; 1 not in the state dict'
    ]
    network, own = nn.Sequential(UBN(CHANNELS), UBN(CHANNELS)), nn.Sequential(UBN(CHANNELS), UBN(CHANNELS)).state_dict()
    del own['1.num_batches_tracked']
    # A count does not go on from the load before, even from one that was refused.
    with pytest.raises(CheckpointError, match='foo'):
        logged(caplog, network, own | {'1.foo': torch.zeros(CHANNELS)})
    assert logged(caplog, network, own) == ['mmubn: 2 UBN layers read: 2 from UBN']
    batch_norm = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    assert logged(caplog, batch_norm, batch_norm.state_dict()) == []


def test_the_log_counts_each_type(caplog, install):
    install('layout-report')
    ubn = UBN(CHANNELS)
    with torch.no_grad():
        randomize(ubn)
        ubn.center_weight.zero_(), ubn.scale_weight.zero_()
    saved = dict(
        rbn=(RBN, source(RBN(CHANNELS))),
        rbn_released=(RBN, source(RBN(CHANNELS), 'rbn-released')),
        bnet_released=(BNET, source(BNET(CHANNELS), 'bnet-released')),
        iebn=(IEBN, source(IEBN(CHANNELS))),
        iebn_released=(IEBN, source(IEBN(CHANNELS), 'iebn-released')),
        bn=(UnitizedBN, source(nn.BatchNorm2d(CHANNELS))),
        unitizedbn=(UnitizedBN, source(UnitizedBN(CHANNELS))),
        ubn=(BNET, ubn.state_dict()),
    )
    model = nn.ModuleDict({name: kind(CHANNELS) for name, (kind, _) in saved.items()})
    state_dict = side_by_side(**{name: each for name, (_, each) in saved.items()})
    assert logged(caplog, model, state_dict) == [
        'mmubn: 2 RBN layers read: 1 from RBN, 1 from released RBN',
        'mmubn: 2 BNET layers read: 1 from released BNET, 1 from UBN taken to be without calibrate_bias',
        'mmubn: 2 IEBN layers read: 1 from IEBN, 1 from released IEBN',
        'mmubn: 2 UnitizedBN layers read: 1 from BatchNorm, 1 from UnitizedBN',
    ]
