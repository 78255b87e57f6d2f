"""mmubn.cli.config: the config that a command line asks for, or one sentence."""

import argparse
import re

import pytest
from mmengine.config import Config

from mmubn import UBN
from mmubn.cli import UsageError, load_config, set_run


def arguments(config, **options):
    return argparse.Namespace(**{'config': str(config), 'cfg_options': None, 'work_dir': None, **options})


IN_PURE_PYTHON = 'from mmengine.config import read_base\nwith read_base():\n    from .base import *\n'


@pytest.fixture
def in_pure_python(tmp_path):
    """Writes a config that imports what it names, and its base; gives its path."""

    def write(text, base='model = dict(backbone=dict(norm_cfg=dict(type=BatchNorm2d)))'):
        (tmp_path / 'base.py').write_text(f'from torch.nn import BatchNorm2d\n{base}\n')
        (tmp_path / 'config.py').write_text(IN_PURE_PYTHON + text)
        return tmp_path / 'config.py'

    return write


UBN_BY_CLASS = 'from mmubn import UBN\nmodel.update(dict(backbone=dict(norm_cfg=dict(type=UBN, threshold=0.2))))\n'


class TestPurePython:
    def test_classes(self, in_pure_python):
        cfg = load_config(arguments(in_pure_python(UBN_BY_CLASS)))
        assert cfg.model.backbone.norm_cfg == dict(type=UBN, threshold=0.2)

    @pytest.mark.parametrize('text', ['', UBN_BY_CLASS])
    def test_options(self, in_pure_python, text):
        options = {'model.backbone.norm_cfg.type': 'RBN', '+model.backbone.depth': 18}
        cfg = load_config(arguments(in_pure_python(text), cfg_options=options))
        assert cfg.model.backbone.norm_cfg.type == 'RBN'
        assert cfg.model.backbone.depth == 18

    @pytest.mark.parametrize(
        ('text', 'message'),
        [
            (UBN_BY_CLASS.replace('UBN', 'UBNX'), r'Failed to import UBNX from mmubn in .*config\.py, line 4'),
            (
                'from no_such import X\nhooks = [dict(type=X)]\n',
                r"Failed to import no_such .*No module named 'no_such'",
            ),
            ('import mmubn\nnorm = dict(type=mmubn.layers.X)\n', r'Failed to import mmubn\.layers\.X'),
        ],
        ids=['a name', 'a module', 'an attribute'],
    )
    def test_what_cannot_be_imported(self, in_pure_python, text, message):
        path = in_pure_python(text)
        with pytest.raises(UsageError, match=rf'^{re.escape(str(path))}: {message}') as error:
            load_config(arguments(path))
        assert '\n' not in str(error.value)

    def test_what_nothing_uses_is_not_imported(self, in_pure_python):
        load_config(arguments(in_pure_python('from no_such import X\nimport no_other\n')))

    def test_a_base_that_there_is_not(self, in_pure_python):
        path = in_pure_python('')
        path.with_name('base.py').unlink()
        with pytest.raises(UsageError, match=r'base\.py not found!') as error:
            load_config(arguments(path))
        assert '\n' not in str(error.value)


class TestLoadConfig:
    def test_custom_imports_that_fail(self, tmp_path, monkeypatch):
        (tmp_path / 'my_norms.py').write_text('import no_such\n')
        (tmp_path / 'config.py').write_text("custom_imports = dict(imports=['my_norms'])")
        monkeypatch.syspath_prepend(tmp_path)
        message = r"config\.py: Failed to import custom modules .*my_norms.* \(.*No module named 'no_such'.*\)$"
        with pytest.raises(UsageError, match=message) as error:
            load_config(arguments(tmp_path / 'config.py'))
        assert '\n' not in str(error.value)

    def test_missing(self):
        with pytest.raises(UsageError, match=r'nowhere/a\.py does not exist'):
            load_config(arguments('nowhere/a.py'))

    def test_missing_in_a_package(self):
        with pytest.raises(UsageError, match='mmdet::no_such'):
            load_config(arguments('mmdet::no_such/config.py'))

    def test_of_a_package(self):
        cfg = load_config(arguments('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'))
        assert cfg.model.type == 'FasterRCNN'

    def test_a_folder(self, tmp_path):
        with pytest.raises(UsageError, match=rf'the config {tmp_path} is a folder'):
            load_config(arguments(tmp_path))

    @pytest.mark.parametrize('inherits', [False, True], ids=['itself', 'its base'])
    @pytest.mark.parametrize(
        ('name', 'text', 'message'),
        [
            ('a.py', 'x = 1\ny = dict(a=)\n', r'a\.py, line 2: invalid syntax\.'),
            ('a.py', 'x = 1\ny = z\n', r"a\.py, line 2: NameError: name 'z' is not defined"),
            ('a.py', "_base_ = './gone.py'\n", r'a\.py: its _base_ \S*gone\.py does not exist\.'),
            ('a.py', "_base_ = 'mmdet::gone/a.py'\n", r'a\.py: file "\S*gone/a.py" does not exist'),
            ('a.json', '{"a": 1,}', r'a\.json: .*line 1'),
            ('a.yaml', 'a: [1\nb: 2', r'a\.yaml: ParserError: .* line 2'),
            ('a.json', '[1]', r'a\.json: it holds no keys'),
        ],
        ids=['syntax', 'name', 'base', 'base of a package', 'JSON', 'YAML', 'a list'],
    )
    def test_a_file_that_cannot_be_read(self, tmp_path, monkeypatch, name, text, message, inherits):
        monkeypatch.chdir(tmp_path)
        (tmp_path / name).write_text(text)
        if inherits:
            (tmp_path / 'top.py').write_text(f"_base_ = './{name}'\n")
        with pytest.raises(UsageError, match=f'^{message}') as error:
            load_config(arguments('top.py' if inherits else name))
        assert '\n' not in str(error.value)
        assert len(str(error.value)) < 300

    def test_a_base_that_does_not_merge(self, tmp_path):
        (tmp_path / 'base.py').write_text('model = dict(neck=dict(norm_cfg=None))')
        (tmp_path / 'a.py').write_text("_base_ = './base.py'\nmodel = dict(neck=dict(norm_cfg=dict(type='UBN')))")
        with pytest.raises(UsageError, match=r'a\.py, model\.neck\.norm_cfg: .*_delete_=True'):
            load_config(arguments(tmp_path / 'a.py'))

    @staticmethod
    def too_deep(path):
        raise RecursionError

    def test_a_base_of_itself(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Config, '_get_base_files', self.too_deep)  # after a thousand files
        (tmp_path / 'a.py').write_text("_base_ = './a.py'\n")
        with pytest.raises(UsageError, match=r'a\.py: its _base_ leads back to itself'):
            load_config(arguments(tmp_path / 'a.py'))

    @pytest.mark.parametrize(
        ('in_config', 'in_arguments', 'expected'),
        [(None, None, 'work_dirs/name'), ('from_config', None, 'from_config'), ('from_config', 'given', 'given')],
    )
    def test_work_dir(self, monkeypatch, in_config, in_arguments, expected):
        monkeypatch.setenv('LOCAL_RANK', '0')
        cfg = Config({'work_dir': in_config} if in_config else {})
        set_run(cfg, arguments('configs/name.py', work_dir=in_arguments, launcher='none', local_rank=0))
        assert cfg.work_dir == expected
