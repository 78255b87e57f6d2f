"""mmubn.cli.config: the config that a command line asks for, or one sentence."""

import argparse

import pytest
from mmengine.config import Config

from mmubn.cli import UsageError, load_config, set_run


def arguments(config, **options):
    return argparse.Namespace(**{'config': str(config), 'cfg_options': None, 'work_dir': None, **options})


class TestLoadConfig:
    def test_missing(self):
        with pytest.raises(UsageError, match=r'nowhere/a\.py does not exist'):
            load_config(arguments('nowhere/a.py'))

    def test_missing_in_a_package(self):
        with pytest.raises(UsageError, match='mmdet::no_such'):
            load_config(arguments('mmdet::no_such/config.py'))

    def test_of_a_package(self):
        cfg = load_config(arguments('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'))
        assert cfg.model.type == 'FasterRCNN'

    def test_options_that_do_not_fit(self):
        options = {'train_dataloader.dataset.pipeline.99.type': 'X'}
        with pytest.raises(UsageError, match='--cfg-options'):
            load_config(arguments('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', cfg_options=options))

    @pytest.mark.parametrize(
        ('in_config', 'in_arguments', 'expected'),
        [(None, None, 'work_dirs/name'), ('from_config', None, 'from_config'), ('from_config', 'given', 'given')],
    )
    def test_work_dir(self, monkeypatch, in_config, in_arguments, expected):
        monkeypatch.setenv('LOCAL_RANK', '0')
        cfg = Config({'work_dir': in_config} if in_config else {})
        set_run(cfg, arguments('configs/name.py', work_dir=in_arguments, launcher='none', local_rank=0))
        assert cfg.work_dir == expected
