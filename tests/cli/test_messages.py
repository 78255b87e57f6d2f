"""mmubn.cli.messages: what is said of another library's error, in one line."""

import errno
from urllib.error import URLError

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIMIZERS
from mmengine.runner import Runner
from torch import nn
from torch._utils import ExceptionWrapper

from mmubn.cli.messages import LENGTH, first_cause, one_line_of, with_place
from mmubn.openmmlab.errors import ConfigError


def message_of(function, *arguments):
    with pytest.raises(Exception) as error:  # noqa: PT011 - of all kinds
        function(*arguments)
    text = one_line_of(error.value)
    assert '\n' not in text
    return text


@MODELS.register_module()
class PartOfAModel(nn.Module):
    def __init__(self, depth=3, part=None, width=1):
        super().__init__()
        if width > 1:
            MODELS.build(dict(type=nn.Linear, in_features=1, out_features=width))
        if part is not None:
            MODELS.build(dict(part, depth=part.get('depth', 4)))  # as detectors do
        if depth > 9:
            raise KeyError(f'invalid depth {depth}')


@DATASETS.register_module()
class TwoSamples(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise FileNotFoundError(errno.ENOENT, 'No such file or directory', 'data/gone.jpg')


class TestConfigs:
    """The key of the dict that MMEngine was building something from."""

    @pytest.mark.parametrize(
        ('part', 'expected'),
        [
            (
                dict(type='PartOfAModel', dept=3),
                'model.part.dept: PartOfAModel has no such argument; did you mean depth?',
            ),
            (dict(type='PartOfAModel', nothing=3), 'model.part.nothing: PartOfAModel has no such argument.'),
            (
                dict(type='PartOfAModell'),
                "model.part.type='PartOfAModell' is not registered; did you mean PartOfAModel?",
            ),
            (dict(depth=3), 'model.part has no type: give it one'),
            (dict(type='PartOfAModel', depth=10), 'model.part (PartOfAModel): KeyError: invalid depth 10 ('),
        ],
        ids=['a slip', 'unknown', 'type', 'no type', 'value'],
    )
    def test_of_a_part(self, part, expected):
        cfg = Config(dict(model=dict(type='PartOfAModel', part=part)))

        def main(cfg):
            MODELS.build(cfg.model)

        assert message_of(main, cfg).startswith(expected)

    def test_a_string(self):
        def main(cfg):
            for hook in cfg.default_hooks.values():
                HOOKS.build(hook)

        cfg = Config(dict(default_hooks=dict(logger='LoggerHook')))
        assert message_of(main, cfg) == "default_hooks.logger must be a dict with a type, got 'LoggerHook'."

    def test_an_optimizer(self):
        def main(cfg):
            OPTIMIZERS.build(dict(cfg.optim_wrapper.optimizer, params=[torch.zeros(1)]))

        cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentun=0.9))))
        expected = 'optim_wrapper.optimizer.momentun: SGD has no such argument; did you mean momentum?'
        assert message_of(main, cfg) == expected

    def test_a_data_loader(self):
        sampler = dict(type='DefaultSampler', shuffle=False)
        loader = dict(dataset=dict(type='TwoSamples'), sampler=sampler, batchsize=2)
        cfg = Config(dict(train_dataloader=loader))
        expected = 'train_dataloader.batchsize: DataLoader has no such argument; did you mean batch_size?'
        assert message_of(lambda cfg: Runner.build_dataloader(cfg.train_dataloader), cfg) == expected

    def test_a_value_that_is_no_integer(self):
        """The class builds a part of its own, which the config does not have; torch lists its signatures."""
        cfg = Config(dict(model=dict(type='PartOfAModel', width=8.0)))
        text = message_of(lambda cfg: MODELS.build(cfg.model), cfg)
        assert text.startswith('model (PartOfAModel): model.width=8.0 must be an integer; TypeError: empty() received')
        assert 'tuple of names' not in text

    @pytest.mark.parametrize(
        ('place', 'key', 'value', 'least'),
        [
            ('train_cfg', 'val_interval', 0, 1),
            ('train_cfg', 'max_epochs', 'two', 1),
            ('val_dataloader', 'batch_size', 'two', 1),
            ('train_dataloader', 'num_workers', -1, 0),
        ],
    )
    def test_a_number_of_the_run(self, place, key, value, least):
        def main(cfg):
            return 3 % 0 if value == 0 else int('two')

        expected = f'{place}.{key} must be a whole number of at least {least}, got {value!r} ('
        assert message_of(main, Config({place: {key: value}})).startswith(expected)

    def test_numbers_that_are_right(self):
        cfg = Config(dict(train_cfg=dict(max_iters=1e3, val_interval=1), train_dataloader=dict(num_workers=0)))
        assert message_of(lambda cfg: int('two'), cfg).startswith('ValueError: invalid literal')

    @pytest.mark.parametrize('value', ['https://host.invalid/x.pth', 'torchvision://x'])
    def test_a_download(self, value):
        def fetch(name, url):
            raise URLError(OSError(-2, 'Name or service not known'))

        cfg = Config(dict(model=dict(init_cfg=dict(checkpoint=value))))
        key = 'model.init_cfg.checkpoint'
        assert message_of(lambda cfg: fetch(value, 'https://host.invalid/x.pth'), cfg) == (
            f'{key}: cannot download https://host.invalid/x.pth: Name or service not known; check the network, or '
            f'download it by hand and give {key} the path of the file.'
        )

    def test_the_words_of_stock_mmengine(self):
        """It raises the error anew for each class that it was building (0.10.7)."""

        def build_from_cfg(cfg):
            try:
                if 'part' in cfg:
                    build_from_cfg(cfg['part'])
                raise ValueError('the depth is wrong')
            except ValueError as error:
                raise type(error)(f'class `{cfg["type"]}` in mmdet/a.py: {error}')  # noqa: B904 - as it does

        def main(cfg):
            build_from_cfg(cfg.model)

        cfg = Config(dict(model=dict(type='A', part=dict(type='B'))))
        assert message_of(main, cfg) == 'model.part (B): the depth is wrong'


class TestOthers:
    def test_of_a_worker_process(self):
        try:
            TwoSamples()[0]
        except FileNotFoundError:
            error = ExceptionWrapper(where='in DataLoader worker process 0')  # as the worker hands it over
        assert message_of(error.reraise) == "FileNotFoundError: [Errno 2] No such file or directory: 'data/gone.jpg'"

    def test_of_the_system(self):
        assert message_of(open, 'gone.txt') == 'No such file or directory: gone.txt'

    def test_a_full_disk(self):
        """The system does not say which file it was."""

        def write(file_path):
            raise OSError(errno.ENOSPC, 'No space left on device')

        expected = 'No space left on device: work/log.json; the disk is full: free some space, or write elsewhere'
        assert message_of(write, 'work/log.json') == expected

    def test_without_words(self):
        def check(x):
            assert x == 2

        assert message_of(check, 1).endswith(
            f'test_messages.py, line {check.__code__.co_firstlineno + 1}: assert x == 2)'
        )

    def test_a_cause(self):
        def fail():
            raise RuntimeError('no data') from OSError('the disk is gone')

        assert message_of(fail) == 'RuntimeError: no data (OSError: the disk is gone)'

    def test_another_process_that_has_ended(self):
        def fail():
            raise RuntimeError('[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:4')

        assert 'another process of this run has ended' in message_of(fail)

    def test_is_short(self):
        def fail():
            raise RuntimeError('word ' * 1000)

        assert len(message_of(fail)) < LENGTH + 10

    def test_the_first_cause(self):
        error = ImportError('in one line:\nno module')
        error.__cause__ = ModuleNotFoundError('my_norms')
        assert first_cause(error) == 'in one line: no module (my_norms)'


class TestWithPlace:
    """Of an error of this package: its words, and the key of what was built."""

    def test_convert_norms(self):
        part = dict(type='ConvertNorms', module=dict(type='PartOfAModel'), norm_cfg=dict(type='UBN'), where='*.bn3')
        cfg = Config(dict(model=dict(type='ConvertsAPart', part=part)))
        with pytest.raises(ConfigError) as error:
            build_model(cfg)
        assert (
            with_place(error.value) == 'model.part: ConvertNorms of PartOfAModel: this PartOfAModel has no BatchNorm.'
        )

    def test_elsewhere(self):
        with pytest.raises(ConfigError) as error:
            raise ConfigError('model.norm_cfg has no type.')
        assert with_place(error.value) == 'model.norm_cfg has no type.'


@MODELS.register_module()
class ConvertsAPart(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = MODELS.build(part)


def build_model(cfg):
    return MODELS.build(cfg.model)
