"""``mmubn::PATH``: the configs that come with this package, by name, from any folder."""

import sys

import pytest
from mmengine.config import Config, utils
from mmengine.dataset import Compose
from mmengine.hub import get_config, get_model
from mmengine.registry import init_default_scope
from mmpretrain.datasets import PackInputs

from mmubn.cli import UsageError
from mmubn.cli.config import read_config
from mmubn.openmmlab import own_configs
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.own_configs import MIM, find_config, own_file

DETECTOR = 'mmubn::digits/mask-rcnn_r18_fpn_ubn_digits.py'
CLASSIFIER = 'mmubn::digits/resnet18-ubn_digits.py'


@pytest.fixture(autouse=True)
def another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class TestFindConfig:
    @pytest.mark.parametrize(
        'name', ['digits/resnet18-ubn_digits.py', 'sweeps/paper.yml', '_base_/imagenet_backbone.py']
    )
    def test_one_that_there_is(self, name):
        assert find_config(f'mmubn::{name}') == MIM / 'configs' / name

    @pytest.mark.parametrize(
        ('name', 'near'),
        [
            ('mmubn::digits/resnet18_ubn_digits.py', 'did you mean mmubn::digits/resnet18-ubn_digits.py'),
            ('mmubn::digits/resnet18-ubn_digits', 'did you mean mmubn::digits/resnet18-ubn_digits.py'),
            ('mmubn::resnet18-ubn_digits.py', r'did you mean mmubn::digits/resnet18-ubn_digits.py\?'),
            ('mmubn::configs/digits/resnet18-ubn_digits.py', r'did you mean mmubn::digits/resnet18-ubn_digits.py\?'),
            ('mmubn::no/such.py', 'they are in .*configs'),
            ('mmubn::', 'they are in .*configs'),
            ('mmubn::digits', 'they are in .*configs'),
        ],
    )
    def test_one_that_there_is_not(self, name, near):
        with pytest.raises(ConfigError, match=f'^{name}: mmubn has no config of this name; {near}') as error:
            find_config(name)
        assert '\n' not in str(error.value)

    @pytest.mark.parametrize(
        'name',
        [
            '../tools/train.py',
            'digits/../../tools/train.py',
            '/etc/passwd',
            str(MIM / 'configs/digits/resnet18-ubn_digits.py'),
            'digits/metafile.yml',
            'digits/README.md',
        ],
    )
    def test_a_file_that_is_no_config(self, name):
        with pytest.raises(ConfigError, match=f'^mmubn::{name}: mmubn has no config of this name; '):
            find_config(f'mmubn::{name}')

    def test_a_sweep_file_is_no_config(self):
        with pytest.raises(ConfigError, match=r'^mmubn::sweeps/paper\.yml: mmubn has no config of this name; '):
            find_config('mmubn::sweeps/paper.yml', ('.py',))

    def test_an_installation_without_them(self, monkeypatch, tmp_path):
        monkeypatch.setattr(own_configs, 'MIM', tmp_path / '.mim')
        with pytest.raises(
            ConfigError, match=rf'^{CLASSIFIER}: there are no configs in {tmp_path}.*install mmubn again'
        ):
            find_config(CLASSIFIER)


def test_own_file_names_what_is_here_first(tmp_path):
    assert own_file('tools/train.py') == str(MIM / 'tools' / 'train.py')
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools' / 'train.py').touch()
    assert own_file('tools/train.py') == 'tools/train.py'
    assert own_file('tools/no_such.py') == 'tools/no_such.py'


class TestReading:
    """By MMEngine and by the tools, the same."""

    @pytest.mark.parametrize('read', [get_config, read_config])
    @pytest.mark.parametrize('name', [DETECTOR, CLASSIFIER])
    def test_by_name(self, read, name):
        assert read(name).to_dict() == Config.fromfile(find_config(name)).to_dict()

    def test_as_base(self, tmp_path):
        (tmp_path / 'mine.py').write_text(f'_base_ = {CLASSIFIER!r}\ntrain_cfg = dict(max_epochs=3)\n')
        cfg = Config.fromfile('mine.py')
        expected = Config.fromfile(find_config(CLASSIFIER)).to_dict()
        assert cfg.to_dict() == expected | dict(train_cfg=expected['train_cfg'] | dict(max_epochs=3))

    def test_values_that_a_config_takes_from_its_base_can_be_built(self, tmp_path):
        """MMEngine would look their types up in a registry of this package, which has none."""
        (tmp_path / 'mine.py').write_text(f'_base_ = {CLASSIFIER!r}\npipeline = _base_.test_pipeline\n')
        init_default_scope('mmpretrain')
        assert isinstance(Compose(Config.fromfile('mine.py').pipeline).transforms[-1], PackInputs)

    @pytest.mark.parametrize('base', ['mmubn::digits/resnet18_ubn_digits.py', 'mmubn::nothing'])
    def test_a_base_that_there_is_not(self, tmp_path, base):
        (tmp_path / 'mine.py').write_text(f'_base_ = {base!r}\n')
        with pytest.raises(UsageError, match=f'^mine.py: {base}: mmubn has no config of this name; ') as error:
            read_config('mine.py')
        assert '\n' not in str(error.value)

    def test_a_name_that_there_is_not(self):
        with pytest.raises(UsageError, match=r'^mmubn::digits/nothing\.py: mmubn has no config of this name; '):
            read_config('mmubn::digits/nothing.py')

    @pytest.mark.parametrize('read', [get_config, get_model])
    @pytest.mark.parametrize(
        ('name', 'near'),
        [
            ('digits/resnet18_ubn_digits.py', r'did you mean mmubn::digits/resnet18-ubn_digits\.py\?'),
            ('resnet18-ubn_digits.py', r'did you mean mmubn::digits/resnet18-ubn_digits\.py\?'),
            ('digits/resnet18-ubn_digits', r'did you mean mmubn::digits/resnet18-ubn_digits\.py\?'),
            ('', 'they are in '),
            ('nothing.py', 'they are in '),
            ('../tools/train.py', 'they are in '),
            ('/etc/passwd', 'they are in '),
            ('digits/metafile.yml', 'they are in '),
            ('sweeps/paper.yml', 'they are in '),
        ],
    )
    def test_by_a_name_that_mmengine_does_not_find(self, read, name, near):
        with pytest.raises(ConfigError, match=f'^mmubn::{name}: mmubn has no config of this name; {near}') as error:
            read(f'mmubn::{name}')
        assert '\n' not in str(error.value)

    def test_of_other_packages_as_ever(self):
        assert get_config('mmpretrain::resnet/resnet18_8xb32_in1k.py').model.backbone.depth == 18
        with pytest.raises(ValueError, match='_get_package_and_cfg_path'):
            get_config('mmpretrain')

    def test_the_patch_of_other_packages_finds_the_same_function(self):
        """It replaces the function where it is the one that this one left (row config-packages of the table)."""
        for name in ('mmengine.config.config', 'mmengine.hub.hub'):
            assert sys.modules[name]._get_package_and_cfg_path is utils._get_package_and_cfg_path

    def test_with_an_index_that_lacks_weights(self):
        """None are released, and MMEngine must not say that it knows some that it can load."""
        cfg = get_config(CLASSIFIER, pretrained=True)
        assert cfg.model_path == 'not released/'
