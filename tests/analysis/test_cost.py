"""mmubn.analysis.cost and tools/analysis_tools/measure_cost.py, on networks of one layer each but in the last test."""

import csv
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import ROOT, call
from mmengine.registry import MODELS
from torch import nn
from toy import ToyModel, config

from mmubn.analysis import cost
from mmubn.analysis.benchmark import saved_bytes
from mmubn.analysis.cost import HEADER, Trial, measure_costs
from mmubn.analysis.sweeps import RUN_DONE, read_sweeps
from mmubn.cli import UsageError

TOOL = 'analysis_tools/measure_cost.py'
SWEEPS = """
sweeps:
  kernels:
    configs: [CONFIG]
    seeds: [3, 0]
    metrics: [acc]
    baseline: 1x1
    variants:
      1x1: {model.kernel_size: 1}
      3x3: {model.draws: 5}
  no-baseline:
    configs: [CONFIG]
    variants: {1x1: {model.kernel_size: 1}}
"""


@MODELS.register_module(force=True)
class DrawingToy(ToyModel):
    """Draws numbers when it is built: as many as it is told, as networks of other sizes do. Takes a batch, stacked."""

    def __init__(self, draws, **arguments):
        super().__init__(**arguments)
        for _ in range(draws):
            torch.rand(1), random.random(), np.random.rand()
        self.data_preprocessor = MODELS.build(dict(type='ImgDataPreprocessor'))

    def forward(self, inputs, mode, data_samples=None):
        x = self.layers(inputs)
        return dict(loss=x.square().mean()) if mode == 'loss' else [1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A sweep file whose first seed is done."""
    monkeypatch.chdir(tmp_path)
    cfg = config('unused', workers=2, persistent=True)
    cfg.model = dict(type='DrawingToy', draws=0, kernel_size=3)
    cfg.optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.5), clip_grad=dict(max_norm=1e-3))
    cfg.dump('config.py')
    Path('sweeps.yml').write_text(SWEEPS.replace('CONFIG', f'{tmp_path}/config.py'))
    for run in read_sweeps(Path('sweeps.yml'))[0].runs:
        if run.seed == 3:
            path = run.folder(Path('work_dirs/sweeps')) / 'epoch_1.pth'
            path.parent.mkdir(parents=True)
            torch.save(dict(state_dict=MODELS.build(run.load().model).state_dict(), meta={}), path)
            (path.parent / 'last_checkpoint').write_text(str(path))
            (path.parent / RUN_DONE).touch()
    return Path('work_dirs/sweeps')


def kernels():
    return read_sweeps(Path('sweeps.yml'), ['kernels'])[0]


@pytest.fixture
def trials(folder):
    """The networks of the two choices, by label."""
    return {run.label: Trial(run, run.folder(folder), folder / 'logs') for run in kernels().runs if run.seed == 3}


def test_training_keeps_the_weights_and_evaluation_sees_the_trained_network(folder, trials):
    """In spite of weight decay and clipped gradients, and though the running statistics move on."""
    trial = trials['3x3']
    trained = torch.load(folder / 'kernels/3x3/seed3/epoch_1.pth', weights_only=True)['state_dict']
    for _ in range(3):
        trial.training()
        trial.evaluation()
    for name, parameter in trial.model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
        assert trial.optimizer.optimizer.state[parameter]['exp_avg'].any() or name == 'layers.4.bias', name
    moved = {name for name, buffer in trial.model.named_buffers() if not torch.equal(buffer, trained[name])}
    assert 'layers.1.running_mean' in moved
    assert all(torch.equal(value, trained[name]) for name, value in trial.evaluated.state_dict().items())


def test_all_choices_get_the_same_batches(trials):
    """Whatever their networks drew before: the data draw of all three generators."""
    own, other = (trial.batches for trial in trials.values())
    for split in ('train', 'val'):
        assert all(map(torch.equal, own[split]['inputs'], other[split]['inputs'])), split
    assert not torch.equal(own['train']['inputs'][0], own['val']['inputs'][0])


def test_the_data_are_no_saved_memory(trials):
    layer, x = nn.Linear(3, 2), torch.ones(5, 3)
    assert saved_bytes(layer, lambda: layer(x)) == x.nbytes
    assert saved_bytes(layer, lambda: layer(x), [x]) == 0
    trial = trials['3x3']
    data = trial.model.data_preprocessor(trial.batches['train'], True)
    whole = saved_bytes(trial.model, lambda: trial.model(**data, mode='loss'))
    assert trial.saved() == whole - data['inputs'].nbytes > 0


class SlowerAndSlower:
    """In place of Clock: a turn takes as many milliseconds as its number, twice that where the kernel is 3x3."""

    def __init__(self, device):
        assert device.type == 'cpu'
        self.steps = []

    def times(self, steps):
        (step,) = steps
        label = f'{step.__self__.model.layers[1].kernel_size}'
        self.steps.append((label, step.__name__))
        turn = (len(self.steps) - 1) // 4 + 1
        return [float(turn * (2 if '3' in label else 1))]


def test_times_are_compared_within_a_turn(folder, monkeypatch):
    clocks, calls = [], []
    monkeypatch.setattr(cost, 'Clock', lambda device: clocks.append(SlowerAndSlower(device)) or clocks[0])
    rows = measure_costs([kernels()], folder, 5, 2, lambda: calls.append(1))
    assert len(calls) == 2 + 5 + 2
    found = {(row[1], row[2]): row[3:] for row in rows}
    for name in ('training', 'evaluation'):
        # Turns 3 to 7 count.
        assert found['1x1', name] == ('ms', 4.0, 5.0, 6.0, 1.0, 1.0, 1.0)
        assert found['3x3', name] == ('ms', 8.0, 10.0, 12.0, 2.0, 2.0, 2.0)
    (clock,) = clocks
    turns = [tuple(clock.steps[i : i + 4]) for i in range(0, len(clock.steps), 4)]
    assert all(len(set(turn)) == 4 for turn in turns)
    assert len({turn[0][0] for turn in turns}) == 2, 'one choice is always the first'
    # A kernel of 4 channels has 32 weights more with 3x3 taps than with one.
    one, nine = (found[label, 'parameters'][1] for label in ('1x1', '3x3'))
    assert (nine - one, found['3x3', 'parameters'][5]) == (32, nine / one)


def test_the_tool_writes_what_it_measured(folder, monkeypatch, capsys):
    assert call(monkeypatch, TOOL, 'sweeps.yml', '--sweeps', 'kernels', '--repeats', '2', '--warmup', '0') == 0
    with (folder / 'kernels/cost.csv').open(newline='') as file:
        header, *rows = csv.reader(file)
    assert header == HEADER
    measures = ['training', 'evaluation', 'saved memory', 'parameters']
    assert [row[:3] for row in rows] == [['kernels', label, name] for label in ('1x1', '3x3') for name in measures]
    assert all(float(value) > 0 for row in rows for value in row[4:])
    captured = capsys.readouterr()
    assert 'values: work_dirs/sweeps/kernels/cost.csv' in captured.out
    assert 'checkpoint' not in captured.out
    assert {line.partition(':')[0] for line in captured.err.split('\r') if line.strip()} == {'kernels'}


def test_nothing_is_measured_where_something_is_missing(folder, monkeypatch, capsys):
    monkeypatch.setattr(cost, 'Trial', lambda *_: pytest.fail('it measures'))
    assert call(monkeypatch, TOOL, 'sweeps.yml', '--sweeps', 'no-baseline', 'kernels') == 2
    assert "sweep 'no-baseline' has no baseline" in capsys.readouterr().err
    assert call(monkeypatch, TOOL, 'sweeps.yml', '--sweeps', 'kernels', 'no-baseline') == 2
    assert "sweeps 'kernels' and 'no-baseline' both have a choice '1x1'" in capsys.readouterr().err
    run = kernels().runs[2]
    (run.folder(folder) / RUN_DONE).unlink()
    # Another seed does not stand in for the first.
    (folder / 'kernels/3x3/seed0').mkdir()
    (folder / 'kernels/3x3/seed0' / RUN_DONE).touch()
    assert call(monkeypatch, TOOL, 'sweeps.yml', '--sweeps', 'kernels') == 2
    error = capsys.readouterr().err
    assert 'the first seed of the sweep are not done in work_dirs/sweeps: kernels: 3x3, seed 3. Train them' in error
    assert not (folder / 'kernels/cost.csv').exists()


def test_validation_data_are_needed(folder, tmp_path):
    run = kernels().runs[0]
    cfg = config('unused', validate=False)
    cfg.model = dict(type='DrawingToy', draws=0, kernel_size=3)
    cfg.dump('other.py')
    with pytest.raises(UsageError, match='kernels: 1x1, seed 3: the config has no val_dataloader'):
        Trial(replace(run, config=f'{tmp_path}/other.py'), run.folder(folder), folder)


@pytest.mark.slow
def test_a_sweep_that_compare_norms_trained(tmp_path, monkeypatch, capsys):
    """The whole way: a detector whose norms are replaced in the backbone, and in the neck too."""
    monkeypatch.chdir(tmp_path)
    assert (
        call(monkeypatch, 'dataset_converters/digits_to_coco.py', 'data/digits', '--num-train', '8', '--num-val', '4')
        == 0
    )
    Path('tiny.yml').write_text(f"""
sweeps:
  places:
    configs: [{ROOT}/configs/sweeps/mask-rcnn_r18_fpn_placement_digits.py]
    metrics: [bbox_mAP]
    options:
      model.backbone.module.norm_cfg.type: BN
      train_cfg.max_epochs: 1
    baseline: backbone
    variants: {{backbone: {{}}, backbone and neck: {{model.neck.norm_cfg: {{type: UBN}}}}}}
""")
    assert call(monkeypatch, 'analysis_tools/compare_norms.py', 'tiny.yml') == 0
    assert call(monkeypatch, TOOL, 'tiny.yml', '--sweeps', 'places', '--repeats', '1', '--warmup', '0') == 0
    with Path('work_dirs/tiny/places/cost.csv').open(newline='') as file:
        ratios = {row['measure']: float(row['ratio']) for row in csv.DictReader(file) if row['choice'] != 'backbone'}
    assert ratios['saved memory'] > 1
    assert ratios['parameters'] > 1
