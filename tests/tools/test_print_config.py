"""tools/misc/print_config.py."""

import sys

from cli import CONFIG, ROOT, run, tool
from mmengine.config import Config


def test_prints_a_config_that_reads_back(tmp_path):
    path = tmp_path / 'resolved.py'
    result = tool(
        'misc/print_config.py', CONFIG, '--save-path', path, '--cfg-options', 'model.backbone.norm_cfg.threshold=0.3'
    )
    assert result.returncode == 0, result.stdout
    assert 'threshold=0.3' in result.stdout
    expected = Config.fromfile(CONFIG)
    expected.merge_from_dict({'model.backbone.norm_cfg.threshold': 0.3})
    assert Config.fromfile(path).to_dict() == expected.to_dict()


def test_a_config_of_mmdetection():
    script = ROOT / 'tools' / 'misc' / 'print_config.py'
    result = run(sys.executable, script, 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert result.returncode == 0, result.stdout
    assert "type='RetinaNet'" in result.stdout


def test_bad_save_path():
    result = tool('misc/print_config.py', CONFIG, '--save-path', 'config.txt')
    assert result.returncode == 2
    assert 'config.txt' in result.stdout
