"""mmubn.cli.runner: what is checked before anything is built. tests/tools/ has what it runs."""

import pytest
from mmengine.config import Config

from mmubn.cli import UsageError, build_runner
from mmubn.openmmlab.errors import ConfigError


def config(**others):
    return Config(dict(model=dict(type='Sequential', norm_cfg=dict(type='UBN')), launcher='none', **others))


def test_a_norm_type_that_is_not_registered():
    cfg = config()
    cfg.model.norm_cfg.type = 'UBNX'
    with pytest.raises(ConfigError, match='UBNX'):
        build_runner(cfg)


def test_a_config_that_replaces_norms_of_ours():
    with pytest.raises(ConfigError, match='efficient_conv_bn_eval'):
        build_runner(config(efficient_conv_bn_eval='[backbone]'))


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr('mmubn.cli.runner.get_device', lambda: 'cuda')
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    cfg = config()
    cfg.launcher = 'slurm'
    with pytest.raises(UsageError, match='4 processes were asked for on a machine with 2 GPUs; ask for 2'):
        build_runner(cfg)


@pytest.mark.parametrize(('launcher', 'variable'), [('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_RANK')])
def test_a_launcher_that_did_not_start_this_process(monkeypatch, launcher, variable):
    monkeypatch.setattr('mmubn.cli.runner.get_device', lambda: 'cpu')
    monkeypatch.delenv(variable, raising=False)
    cfg = config()
    cfg.launcher = launcher
    with pytest.raises(UsageError, match=f'found no {variable} in the environment; start it with {launcher}'):
        build_runner(cfg)
