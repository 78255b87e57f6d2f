"""mmubn.analysis.sweeps: a sweep file is read whole, or an error says what is wrong with it."""

import textwrap
from pathlib import Path

import pytest

from mmubn import UBN
from mmubn.analysis.sweeps import read_sweeps
from mmubn.cli import UsageError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/digits/resnet18-ubn_digits.py'


def sweep_file(folder, text):
    path = folder / 'sweeps.yml'
    path.write_text(textwrap.dedent(text).replace('CONFIG', str(CONFIG)))
    return path


@pytest.mark.parametrize('path', sorted((ROOT / 'configs/sweeps').glob('*.yml')), ids=lambda path: path.stem)
def test_every_sweep_file_of_the_repository_can_be_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for sweep in read_sweeps(path):
        # One choice alone: it repeats a run of the sweep detectors.
        assert len(sweep.labels) > 1 or sweep.name == 'detectors-no-gate'
        assert len({(run.label, run.seed) for run in sweep.runs}) == len(sweep.runs)


def test_a_grid_is_every_combination_and_each_is_run_with_every_seed(tmp_path):
    path = sweep_file(
        tmp_path,
        """
        sweeps:
          both:
            configs: [CONFIG]
            seeds: [3, 4]
            options: {train_cfg.max_epochs: 1}
            grid:
              model.backbone.norm_cfg.threshold: [null, 0.5]
              train_dataloader.batch_size: [8, 16]
        """,
    )
    (sweep,) = read_sweeps(path)
    assert sweep.labels == [f'threshold={t}, batch_size={n}' for t in (None, 0.5) for n in (8, 16)]
    found = []
    for run in sweep.runs:
        cfg = run.load()
        assert cfg.train_cfg.max_epochs == 1
        found.append((cfg.model.backbone.norm_cfg.threshold, cfg.train_dataloader.batch_size, cfg.randomness.seed))
    assert found == [(t, n, seed) for t in (None, 0.5) for n in (8, 16) for seed in (3, 4)]


def test_a_set_of_options_goes_before_those_of_all_and_has_the_seed_in_its_values(tmp_path):
    path = sweep_file(
        tmp_path,
        """
        sweeps:
          one:
            configs: [CONFIG]
            options: {load_from: 'all{seed}.pth'}
            variants:
              A: {}
              B: {load_from: 'b{seed}.pth', model.backbone.norm_cfg: {_delete_: true, type: GN, num_groups: 8}}
        """,
    )
    (sweep,) = read_sweeps(path, seeds=[7])
    a, b = (run.load() for run in sweep.runs)
    assert (a.load_from, b.load_from) == ('all7.pth', 'b7.pth')
    assert a.model.backbone.norm_cfg == dict(type='UBN')
    assert b.model.backbone.norm_cfg == dict(type='GN', num_groups=8)
    assert [run.seed for run in sweep.runs] == [7, 7]


def test_seeds_that_are_not_named_are_zero_and_several_configs_name_their_choices(tmp_path):
    text = 'sweeps: {one: {configs: [CONFIG, CONFIG], variants: {A: {}, B: }}}'
    (sweep,) = read_sweeps(sweep_file(tmp_path, text))
    assert {run.seed for run in sweep.runs} == {0}
    assert sweep.labels[:2] == ['resnet18-ubn_digits, A', 'resnet18-ubn_digits, B']


GOOD = 'configs: [CONFIG], variants: {A: {}, B: {}}'


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('sweeps:\n  one:\n    seeds: [1, 2\n', 'line 4: not YAML'),
        ('runs: {}', 'must have the key "sweeps"'),
        (f'sweep: 1\nsweeps: {{one: {{{GOOD}}}}}', "unknown key 'sweep'"),
        ('sweeps: {one: 3}', "sweep 'one' must have keys such as configs and grid, got 3"),
        (f'sweeps: {{one: {{{GOOD}, seed: [1]}}}}', "sweep 'one' has an unknown key 'seed'; did you mean 'seeds'?"),
        (f'sweeps: {{one: {{{GOOD}, seeds: 3}}}}', "sweep 'one': seeds must be a list that is not empty, got 3"),
        (f'sweeps: {{one: {{{GOOD}, seeds: [-1]}}}}', 'seeds must be integers from 0, got -1'),
        (f'sweeps: {{one: {{{GOOD}, grid: {{load_from: [a]}}}}}}', 'either grid or variants'),
        ('sweeps: {one: {configs: [CONFIG]}}', 'either grid or variants'),
        (f'sweeps: {{one: {{{GOOD}, baseline: C}}}}', "baseline 'C' is none of its choices: A, B"),
        ('sweeps: {one: {configs: [CONFIG], grid: {load_from: a}}}', 'grid.load_from must be a list of values'),
        ('sweeps: {one: {configs: [missing.py], variants: {A: {}}}}', 'the config missing.py does not exist'),
        ('sweeps: {one: {configs: [CONFIG], grid: {train_cfg.max_epoch: [1]}}}', 'did you mean train_cfg.max_epochs?'),
        ('sweeps: {one: {configs: [CONFIG], grid: {modal.head.topk: [1]}}}', 'no modal; did you mean model.head.topk?'),
        ('sweeps: {one: {configs: [CONFIG], grid: {load_form: [a]}}}', 'did you mean load_from?'),
        (
            'sweeps: {one: {configs: [CONFIG], grid: {model.backbone.norm_cfg.threshld: [0.1]}}}',
            'model.backbone.norm_cfg (UBN) has no argument threshld; did you mean model.backbone.norm_cfg.threshold?',
        ),
        (
            'sweeps: {one: {configs: [CONFIG], grid: {model.backbone.norm_cfg.threshold: [2]}}}',
            'threshold must be a number in [-1, 1], or None, got 2',
        ),
        (
            'sweeps: {one: {configs: [CONFIG], grid: {model.backbone.norm_cfg.type: [UBM]}}}',
            "type='UBM' is not a registered norm",
        ),
        ('sweeps: {one: {configs: [CONFIG], grid: {train_cfg.max_epochs: [{a: 1}]}}}', 'max_epochs is 10 and no dict'),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, expected):
    path = sweep_file(tmp_path, text)
    with pytest.raises(UsageError) as error:
        read_sweeps(path)
    assert str(path) in str(error.value)
    assert expected in str(error.value)


def test_every_wrong_sweep_is_named_and_so_are_those_that_are_right(tmp_path):
    path = sweep_file(
        tmp_path, f'sweeps: {{one: {{{GOOD}, seed: [1]}}, two: {{{GOOD}}}, three: {{{GOOD}, target: high}}}}'
    )
    with pytest.raises(UsageError) as error:
        read_sweeps(path)
    assert "'one' has an unknown key" in str(error.value)
    assert "'three': target must be a number, got 'high'" in str(error.value)
    assert '--sweeps: two.' in str(error.value)
    assert [sweep.name for sweep in read_sweeps(path, ['two'])] == ['two']


def test_a_sweep_that_is_not_there(tmp_path):
    path = sweep_file(tmp_path, f'sweeps: {{one: {{{GOOD}}}}}')
    with pytest.raises(UsageError, match=r"no sweep 'oen'; did you mean 'one'\?"):
        read_sweeps(path, ['oen'])
    with pytest.raises(UsageError, match='cannot be read: No such file'):
        read_sweeps(tmp_path / 'missing.yml')


@pytest.mark.parametrize(
    ('kernel_size', 'message'), [(5, None), (4, 'UBN: kernel_size must be a positive odd integer')]
)
def test_norms_that_a_config_in_pure_python_names_by_class(tmp_path, kernel_size, message):
    text = 'from mmubn import UBN\nmodel = dict(backbone=dict(norm_cfg=dict(type=UBN)))\n'
    (tmp_path / 'config.py').write_text(text)
    text = f"""
        sweeps:
          sizes:
            configs: [{tmp_path}/config.py]
            grid: {{model.backbone.norm_cfg.kernel_size: [{kernel_size}]}}
        """
    path = sweep_file(tmp_path, text)
    if message is None:
        (run,) = read_sweeps(path)[0].runs
        assert run.load().model.backbone.norm_cfg == dict(type=UBN, kernel_size=5)
    else:
        with pytest.raises(UsageError, match=message):
            read_sweeps(path)
