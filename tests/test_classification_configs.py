"""Every classification config builds, with the network, the norm and the recipe that its name and the paper promise."""

import copy
import functools
import itertools
import os
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from helpers import is_third_norm
from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.datasets import CIFAR100
from mmpretrain.registry import DATASETS, MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import BNET, IEBN, RBN, UBN, UnitizedBN
from mmubn.openmmlab.config_checks import check_norm_types, check_norms_used
from mmubn.openmmlab.errors import ConfigError
from mmubn.openmmlab.hooks.class_count import ClassCountHook
from mmubn.openmmlab.own_configs import PREFIX, find_config

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('imagenet', 'cifar10', 'cifar100')
ALL = [path for folder in FOLDERS for path in sorted((ROOT / 'configs' / folder).glob('*.py'))]
CONFIGS = [path for path in ALL if not is_third_norm(path)]  # test_third_norm_configs.py has the others
SWEEPS = yaml.safe_load((ROOT / 'configs/sweeps/paper.yml').read_text())['sweeps']

# The rows of the paper's tables 2 to 4, and UnitizedBN.
EXPECTED = {
    'imagenet': ['resnet50', 'resnet101', 'resnext50-32x4d', 'res2net50-w26-s4'],
    'cifar10': ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'vgg11'],
    'cifar100': ['resnet50', 'resnet101', 'resnet152', 'resnext50-32x4d', 'vgg13', 'inception-v4'],
}
COMPARED = ('in', 'gn', 'iebn', 'rbn', 'bnet', 'unitizedbn')
CLASSES = {'imagenet': 1000, 'cifar10': 10, 'cifar100': 100}

LAYERS = {
    'resnet18': 20,
    'resnet34': 36,
    'resnet50': 53,
    'resnet101': 104,
    'resnet152': 155,
    'resnext50-32x4d': 53,
    'res2net50-w26-s4': 85,
    'vgg11': 8,
    'vgg13': 10,
    'inception-v4': 149,
}
# The type of a norm, and how many parameters of a channel BatchNorm has not.
NORMS = {
    'bn': (nn.BatchNorm2d, 0),
    'in': (nn.InstanceNorm2d, 0),
    'gn': (nn.GroupNorm, 0),
    'iebn': (IEBN, 2),
    'rbn': (RBN, 3),
    'bnet': (BNET, 8),
    'ubn': (UBN, 8 + 3),
    'unitizedbn': (UnitizedBN, 1),
}


@functools.cache
def _load(path):
    return Config.fromfile(path)


def load(path):
    """The config, read once."""
    return copy.deepcopy(_load(path))


def parts(path):
    """Network, norm, number of GPUs and images per GPU of a config."""
    network, norm, gpus, batch = re.fullmatch(r'(.+)-([a-z]+)_(\d+)xb(\d+)_\w+', path.stem).groups()
    return network, norm, int(gpus), int(batch)


def parameters_with_batch_norm(network, classes, cifar):
    """By torchvision's networks; by timm's (1.0.31) where it has none."""
    if network == 'res2net50-w26-s4':
        return 25_699_120
    if network == 'inception-v4':
        return 42_679_816 - 1537 * (1000 - classes)
    name = {'resnext50-32x4d': 'resnext50_32x4d', 'vgg11': 'vgg11_bn', 'vgg13': 'vgg13_bn'}.get(network, network)
    with torch.device('meta'):
        count = sum(
            parameter.numel() for parameter in torchvision.models.get_model(name, num_classes=classes).parameters()
        )
    if not cifar:
        return count
    # A stem of 3x3, not 7x7; a classifier of 1x1 pixel, not 7x7.
    return count - (512 * (49 - 1) * 4096 if network.startswith('vgg') else 64 * 3 * (49 - 9))


def test_the_paper_s_configs_are_all_there():
    found = {(path.parent.name, *parts(path)[:2]) for path in CONFIGS}
    expected = {(folder, network, norm) for folder in FOLDERS for network in EXPECTED[folder] for norm in ('bn', 'ubn')}
    assert found == expected | {('cifar100', 'resnet50', norm) for norm in COMPARED}


@pytest.fixture
def no_values(monkeypatch):
    """Weights stay what is in memory: drawing millions of values takes longer than all else."""
    for layer in (nn.Conv2d, nn.Linear):
        monkeypatch.setattr(layer, 'reset_parameters', lambda layer: None)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_network_and_norm(path, no_values):
    network, norm, _, _ = parts(path)
    classes = CLASSES[path.parent.name]
    cfg = load(path)
    check_norm_types(cfg)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    check_norms_used(cfg, model)
    kind, extra = NORMS[norm]
    found = [module for module in model.modules() if isinstance(module, kind)]
    assert len(found) == LAYERS[network]
    assert all(module in found for module in model.modules() if isinstance(module, _BatchNorm))
    channels = sum(layer.weight.numel() for layer in found)
    expected = parameters_with_batch_norm(network, classes, cifar=path.parent.name != 'imagenet')
    assert sum(parameter.numel() for parameter in model.parameters()) == expected + extra * channels
    assert model.head.num_classes == cfg.data_preprocessor.num_classes == classes


def learning_rates(cfg, iterations):
    """The learning rate of each iteration, a list for each epoch, as MMEngine's Runner sets it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    settings = cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]
    schedulers = [
        PARAM_SCHEDULERS.build(dict(setting), default_args=dict(optimizer=optimizer, epoch_length=iterations))
        for setting in settings
    ]
    rates = []
    for _ in range(cfg.train_cfg.max_epochs):
        rates.append([])
        for _ in range(iterations):
            rates[-1].append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()
        for scheduler in schedulers:
            if scheduler.by_epoch:
                scheduler.step()
    return rates


def steps(first, *changes, epochs):
    """A learning rate for each epoch: ``first``, and from each (epoch, rate) on another."""
    rates = [first] * epochs
    for epoch, rate in changes:
        rates[epoch:] = [rate] * (epochs - epoch)
    return rates


# Section 4.1 of the paper.
SCHEDULES = {
    'imagenet': steps(0.1, (30, 1e-2), (60, 1e-3), epochs=90),
    'cifar10': steps(0.1, (100, 1e-2), (150, 1e-3), epochs=200),
    'cifar100': steps(0.1, (60, 0.02), (120, 0.004), (160, 0.0008), epochs=200),
}
WEIGHT_DECAY = {'imagenet': 1e-4, 'cifar10': 1e-4, 'cifar100': 5e-4}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_recipe_of_the_paper(path):
    folder = path.parent.name
    network, _, gpus, batch = parts(path)
    cfg = load(path)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum) == ('SGD', 0.1, 0.9)
    assert optimizer.weight_decay == WEIGHT_DECAY[folder]
    rates = learning_rates(cfg, iterations=5)
    if folder == 'cifar100':
        assert rates[0] == pytest.approx(np.linspace(0.001, 0.1, 5))
    assert [epoch[-1] for epoch in rates] == pytest.approx(SCHEDULES[folder])
    assert all(epoch == epoch[:1] * 5 for epoch in rates[1:])

    assert gpus == {'imagenet': 4 if network == 'resnet50' else 8, 'cifar10': 3, 'cifar100': 3}[folder]
    assert batch == {'imagenet': 256, 'cifar10': 128, 'cifar100': 128}[folder]
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.auto_scale_lr.base_batch_size == gpus * batch
    data = {'imagenet': ('ImageNet', 'val'), 'cifar10': ('CIFAR10', 'test'), 'cifar100': ('CIFAR100', 'test')}[folder]
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert (loader.dataset.type, loader.dataset.split) == data
    assert (cfg.train_dataloader.dataset.type, cfg.train_dataloader.dataset.split) == (data[0], 'train')
    assert cfg.val_evaluator.topk == cfg.test_evaluator.topk == (1, 5)


def options_of(sweep):
    """The sets of --cfg-options of a sweep."""
    if 'variants' in sweep:
        return list(sweep['variants'].values())
    return [dict(zip(sweep['grid'], values, strict=True)) for values in itertools.product(*sweep['grid'].values())]


@pytest.mark.parametrize('name', SWEEPS)
def test_sweep(name):
    """Each set of options changes what the config has already, to a norm that can be built."""
    sweep = SWEEPS[name]
    assert set(sweep) == {'paper', 'configs', 'gpus', 'variants' if 'variants' in sweep else 'grid'}
    for path in sweep['configs']:
        batch_sizes, norms = set(), set()
        for options in options_of(sweep):
            cfg = load(find_config(path))
            cfg.merge_from_dict(options)
            for key, value in options.items():
                node = cfg
                for part in key.split('.'):
                    node = node[part]
                assert node == value
            batch_sizes.add(cfg.train_dataloader.batch_size)
            norms.add(repr(build_norm_layer(cfg.model.backbone.norm_cfg, 4)[1]))
        assert len(batch_sizes) * len(norms) == len(options_of(sweep)), 'some sets of options are the same'


def test_the_first_component_is_batch_norm():
    sweep = SWEEPS['components']
    cfg = load(find_config(sweep['configs'][0]))
    cfg.merge_from_dict(sweep['variants']['BN'])
    layer, expected = build_norm_layer(cfg.model.backbone.norm_cfg, 4)[1], nn.BatchNorm2d(4)
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(layer(x), expected(x))


@pytest.mark.parametrize('folder', FOLDERS)
def test_readme_has_every_config(folder):
    text = (ROOT / 'configs' / folder / 'README.md').read_text()
    assert set(re.findall(r'\]\(([\w-]+\.py)\)', text)) == {path.name for path in ALL if path.parent.name == folder}


# Stands in for the tools and for Python: notes its arguments and makes what a training leaves behind.
STAND_IN = """#!/usr/bin/env bash
set -e
echo "$(basename "$0") $*" >> runs.txt
case $0 in
*dist_train.sh)
    test -f "$1"
    work_dir=work_dirs/$(basename "$1" .py)
    if [ "$3" = --work-dir ]; then work_dir=$4; fi
    mkdir -p "$work_dir"
    touch "$work_dir"/epoch_{12,90,100,200}.pth
    ;;
*dist_test.sh) test -f "$1" && test -f "$2" ;;
*python) for path in "$@"; do case $path in work_dirs/*) test -d "$path" ;; *.py) test -f "$path" ;; esac; done ;;
esac
"""


def test_the_commands_of_the_tables(tmp_path):
    """docs/reproduce.md, from its first command to its last: files are there, and every config is run."""
    text = (ROOT / 'docs/reproduce.md').read_text()
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    for name in ('tools/dist_train.sh', 'tools/dist_test.sh', 'bin/python'):
        stand_in = tmp_path / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
    (tmp_path / 'tools/analysis_tools').symlink_to(ROOT / 'tools/analysis_tools')
    commands = '\n'.join(re.findall(r'```bash\n(.*?)```', text, re.DOTALL))
    environment = os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'}
    result = subprocess.run(
        ['bash', '-ec', commands],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    runs = [line.split() for line in (tmp_path / 'runs.txt').read_text().splitlines()]
    trained = {config: int(gpus) for tool, config, gpus, *rest in runs if tool == 'dist_train.sh' and not rest}
    expected = {str(path.relative_to(ROOT)): parts(path)[2] for path in CONFIGS}
    detectors = {
        f'configs/{detector}/{detector.replace("_", "-")}_r{depth}_fpn_{norm}-backbone_1x_coco.py': 8
        for detector in ('faster_rcnn', 'mask_rcnn')
        for depth in (50, 101)
        for norm in ('bn', 'ubn')
    }
    third = [path for path in (ROOT / 'configs').glob('*/*.py') if is_third_norm(path)]
    gpus = {str(path.relative_to(ROOT)): 4 if '_4xb256_' in path.stem else 8 for path in third}
    assert trained == expected | detectors | gpus
    # Table 7, and two ablations.
    varied = [(line[1], line[-1]) for line in runs if '--cfg-options' in line]
    table_7 = [
        (path.replace(PREFIX, 'configs/'), f'{key}={value}')
        for name in ('batch-size-cifar10', 'batch-size-cifar100')
        for path in SWEEPS[name]['configs']
        for options in options_of(SWEEPS[name])
        for key, value in options.items()
    ]
    assert varied[: len(table_7)] == table_7
    assert len(varied) == len(table_7) + 2
    assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == {
        f'resnet{depth}-{norm}_in1k.pth' for depth in (50, 101) for norm in ('bn', 'ubn', 'bnet3-k3', 'bnet3-k5')
    } | {'resnet50-bnet3-k7_in1k.pth', 'resnet50-ubn3_in1k.pth'}


@DATASETS.register_module()
class FewCIFAR100(CIFAR100):
    """MMPretrain's data set, with files of any content."""

    train_list = [['train', None]]
    test_list = [['test', None]]


@pytest.fixture
def cifar(tmp_path):
    """A config for CIFAR-100, of a small network, and its data: 12 images to train on, 4 to validate."""
    folder = tmp_path / 'data' / CIFAR100.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('test', 4)):
        data = dict(
            data=rng.integers(0, 256, (count, 3072), np.uint8), fine_labels=rng.integers(0, 100, count).tolist()
        )
        (folder / split).write_bytes(pickle.dumps(data))
    cfg = load(ROOT / 'configs/cifar100/resnet50-ubn_3xb128_cifar100.py')
    options = {'model.backbone.depth': 18, 'model.backbone.stem_channels': 8, 'model.backbone.base_channels': 8}
    options |= {'model.head.in_channels': 64, 'train_cfg.max_epochs': 2, 'work_dir': str(tmp_path / 'work_dir')}
    for split in ('train', 'val', 'test'):
        options[f'{split}_dataloader.dataset.type'] = 'FewCIFAR100'
        options[f'{split}_dataloader.dataset.data_root'] = str(folder.parent)
        options |= {f'{split}_dataloader.batch_size': 4, f'{split}_dataloader.num_workers': 0}
    cfg.merge_from_dict(options)
    cfg.experiment_name = tmp_path.name  # MMEngine keeps runners of the same name apart by the second
    return cfg


class Rates(Hook):
    def __init__(self):
        self.rates = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates.extend(runner.optim_wrapper.get_lr()['lr'][:1])


def test_trains_and_validates(cifar):
    runner, rates = Runner.from_cfg(cifar), Rates()
    runner.register_hook(rates, priority='VERY_LOW')
    runner.register_hook(ClassCountHook())
    runner.train()
    assert rates.rates == pytest.approx([*np.linspace(0.001, 0.1, 3), *[0.1] * 3])
    layers = [module for module in runner.model.modules() if isinstance(module, UBN)]
    assert len(layers) == 20
    assert all(layer.running_similarity < 1 for layer in layers)
    assert runner.message_hub.get_scalar('val/accuracy/top5').current() in (0, 25, 50, 75, 100)


def test_class_counts_that_differ(cifar):
    """As where a config for CIFAR-10 is given the data of CIFAR-100."""
    cifar.model.head.num_classes = 10
    runner, rates = Runner.from_cfg(cifar), Rates()
    runner.register_hook(rates, priority='VERY_LOW')
    runner.register_hook(ClassCountHook())
    with pytest.raises(
        ConfigError, match=r'model\.head\.num_classes is 10, but the train data set \(FewCIFAR100\) has 100'
    ):
        runner.train()
    assert rates.rates == []


@pytest.mark.parametrize('norm', ['UBN', 'RBN', 'BNET', 'IEBN', 'UnitizedBN'])
def test_one_pixel_of_one_image(norm):
    """The last stage of a network for 224 pixels makes one of 32."""
    init_default_scope('mmpretrain')
    model = MODELS.build(dict(type='ResNet', depth=18, base_channels=8, stem_channels=8, norm_cfg=dict(type=norm)))
    model.train()
    with pytest.raises(
        ValueError, match=rf'{norm} needs more than 1 value per channel in training, got .*\(1, 64, 1, 1\)'
    ):
        model(torch.zeros(1, 3, 32, 32))
    model.eval()
    assert model(torch.zeros(1, 3, 32, 32))[-1].shape == (1, 64, 1, 1)
