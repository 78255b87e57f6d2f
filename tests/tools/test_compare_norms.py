"""tools/analysis_tools/compare_norms.py, with a stand-in for the training except in the last test."""

import csv
import json
import os
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
from cli import ROOT, call, tool
from mmengine.config import Config
from PIL import Image

TOOL = 'analysis_tools/compare_norms.py'
CONFIG = ROOT / 'configs/digits/resnet18-ubn_digits.py'
# Logs what MMEngine would; the accuracy after epoch e is 10 e + 2 for every run with a "b" in its folder, + seed.
TRAIN = """
import json, os, sys, time
from pathlib import Path
config, folder = sys.argv[1], Path(sys.argv[sys.argv.index('--work-dir') + 1])
assert '--resume' in sys.argv and Path(config).exists()
with Path('calls').open('a') as calls:
    cuda, threads = os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS']
    calls.write(json.dumps([folder.parent.name, folder.name, cuda, threads, len(sys.argv)]) + '\\n')
if Path('sleep').exists():
    Path(f'pid{os.getpid()}').touch()
    time.sleep(60)
if Path('broken').exists() and folder.name == 'seed1':
    sys.exit('RuntimeError: the loss is gone')
log = folder / '1' / 'vis_data' / 'scalars.json'
log.parent.mkdir(parents=True)
seed, bonus = int(folder.name[4:]), 2 * (folder.parent.name == 'b')
lines = []
for epoch in (1, 2, 3):
    print(f'x - mmengine - INFO - Epoch(train) [{epoch}][2/2] lr: 0.1', flush=True)
    lines.append({'loss': 1.0, 'epoch': epoch, 'iter': 2 * epoch, 'step': 2 * epoch})
    lines.append({'accuracy/top1': 10 * epoch + bonus * epoch + seed, 'data_time': 0.1, 'step': epoch})
log.write_text('\\n'.join(map(json.dumps, lines)))
"""
DIST_TRAIN = '#!/bin/sh\nexec python train_tools/train.py "$1" --processes "$2" --port "$PORT" "${@:3}"\n'
SWEEP = f"""
sweeps:
  both:
    configs: [{CONFIG}]
    seeds: [0, 1]
    metrics: [top1]
    baseline: a
    target: 31
    variants: {{a: {{}}, b: {{}}}}
"""


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Call the tool, in this process; returns its exit status and what it printed."""
    tools = tmp_path / 'train_tools'
    (tools / 'analysis_tools').mkdir(parents=True)
    # The tool starts the scripts beside it.
    script = shutil.copy(ROOT / 'tools' / TOOL, tools / TOOL)
    (tools / 'train.py').write_text(TRAIN)
    (tools / 'dist_train.sh').write_text(DIST_TRAIN.replace('python', sys.executable).replace('/bin/sh', '/bin/bash'))
    (tools / 'dist_train.sh').chmod(0o755)
    (tmp_path / 'sweeps.yml').write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)

    def run(*arguments):
        return call(monkeypatch, script, 'sweeps.yml', *arguments), capsys.readouterr()

    return run


def calls(folder):
    return [json.loads(line) for line in (folder / 'calls').read_text().splitlines()]


def rows(path):
    return list(csv.DictReader(path.open()))


def test_tables_have_what_the_logs_say(compare, tmp_path):
    assert compare()[0] == 0
    folder = tmp_path / 'work_dirs/sweeps/both'
    found = {(row['choice'], row['seed'], row['epoch']): float(row['value']) for row in rows(folder / 'runs.csv')}
    assert found == {
        (label, str(seed), str(epoch)): (10 + bonus) * epoch + seed
        for label, bonus in (('a', 0), ('b', 2))
        for seed in (0, 1)
        for epoch in (1, 2, 3)
    }
    means = {(row['choice'], row['epoch']): row for row in rows(folder / 'epochs.csv')}
    assert float(means['b', '2']['mean']) == 24.5
    assert float(means['b', '2']['standard deviation']) == pytest.approx(0.5**0.5)
    text = (folder / 'summary.md').read_text()
    # 30 and 31 after the last epoch; one of the two reaches 31. b is at 36 and 37: 6 more with each seed.
    assert '| a | 2 | 3 | 30.50 | 0.71 | 30.00 to 31.00 | 3.0 (1 of 2) |  |' in text
    assert '| b | 2 | 3 | 36.50 | 0.71 | 36.00 to 37.00 | 3.0 (2 of 2) | +6.00 [+6.00, +6.00]: higher |' in text
    assert '| top1 (%) after epoch | 1 | 2 | 3 |' in text
    assert '| b | 12.5 ± 0.7 | 24.5 ± 0.7 | 36.5 ± 0.7 |' in text
    for suffix in ('png', 'svg'):
        assert (folder / f'top1.{suffix}').exists()
    pixels = np.asarray(Image.open(folder / 'top1.png').convert('RGB'))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, 'an empty page has few colours'


def test_a_metric_may_be_a_whole_tag(compare, tmp_path):
    path = tmp_path / 'sweeps.yml'
    path.write_text(path.read_text().replace('[top1]', '[accuracy/top1]'))
    assert compare('--seeds', '0')[0] == 0
    folder = tmp_path / 'work_dirs/sweeps/both'
    assert '| accuracy/top1, mean (%) |' in (folder / 'summary.md').read_text()
    assert {path.name for path in folder.glob('*.png')} == {'accuracy_top1.png'}
    assert {row['metric'] for row in rows(folder / 'runs.csv')} == {'accuracy/top1'}


def test_an_identical_choice_is_no_comparison(compare, tmp_path):
    path = tmp_path / 'sweeps.yml'
    path.write_text(path.read_text().replace('a: {}, b: {}', 'a: {}, same: {}, b: {}'))
    assert compare()[0] == 0
    text = (tmp_path / 'work_dirs/sweeps/both/summary.md').read_text()
    # One of the two is identical to the baseline: one comparison.
    assert '| same | 2 | 3 | 30.50 | 0.71 | 30.00 to 31.00 | 3.0 (1 of 2) | identical |' in text
    assert 'at once' not in text


def test_what_is_done_is_not_run_again(compare, tmp_path):
    compare('--seeds', '0')
    assert [call[:2] for call in calls(tmp_path)] == [['a', 'seed0'], ['b', 'seed0']]
    _, output = compare()
    assert [call[:2] for call in calls(tmp_path)][2:] == [['a', 'seed1'], ['b', 'seed1']]
    assert '4 runs, of which 2 are done already' in output.out


def test_a_failure_is_reported_the_others_go_on_and_it_is_tried_again(compare, tmp_path):
    (tmp_path / 'broken').touch()
    status, output = compare()
    assert status == 2
    assert output.err.startswith('error: 2 runs failed')
    assert 'both: a, seed 1 ended with status 1: RuntimeError: the loss is gone' in output.err
    assert 'seed1.out' in output.err
    assert '| b | 1 | 3 | 36.00 |  | 36.00 to 36.00 |' in (tmp_path / 'work_dirs/sweeps/both/summary.md').read_text()
    (tmp_path / 'broken').unlink()
    assert compare()[0] == 0
    assert [call[:2] for call in calls(tmp_path)][4:] == [['a', 'seed1'], ['b', 'seed1']]
    assert '| b | 2 |' in (tmp_path / 'work_dirs/sweeps/both/summary.md').read_text()


def test_a_choice_without_a_run_is_named(compare, tmp_path):
    (tmp_path / 'broken').touch()
    assert compare('--seeds', '1')[0] == 2
    text = (tmp_path / 'work_dirs/sweeps/both/summary.md').read_text()
    assert 'Nothing yet of: a, b.' in text
    assert '|' not in text


def test_the_option_to_trust_checkpoints_is_passed_on(compare, tmp_path):
    for seed, options in (('0', []), ('1', ['--trust-checkpoint'])):
        assert compare('--seeds', seed, *options)[0] == 0
    lengths = {folder: length for _, folder, _, _, length in calls(tmp_path)}
    assert lengths['seed1'] == lengths['seed0'] + 1


def test_ended_by_a_signal_it_ends_its_runs_and_continues_later(compare, tmp_path):
    (tmp_path / 'sleep').touch()

    def end():
        while len(list(tmp_path.glob('pid*'))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=end)
    thread.start()
    status, output = compare('--jobs', '2')
    thread.join()
    assert status == 2
    assert 'the same command continues' in output.err
    assert signal.getsignal(signal.SIGTERM) == handler
    for path in tmp_path.glob('pid*'):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name[3:]), 0)
    (tmp_path / 'sleep').unlink()
    compare()
    assert len(rows(tmp_path / 'work_dirs/sweeps/both/runs.csv')) == 12


def test_a_folder_with_a_run_of_another_config_is_left_alone(compare, tmp_path):
    compare('--seeds', '0')
    path = tmp_path / 'sweeps.yml'
    path.write_text(path.read_text().replace('a: {}', 'a: {train_cfg.max_epochs: 9}'))
    status, output = compare('--seeds', '0')
    assert status == 2
    assert 'both/a/seed0 has a run of another config than both: a, seed 0 asks for' in output.err
    assert compare('--seeds', '0', '--work-dir', 'other')[0] == 0


def test_runs_at_a_time_share_gpus_and_cores(compare, tmp_path, monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 4)
    monkeypatch.setattr('os.cpu_count', lambda: 8)
    path = tmp_path / 'sweeps.yml'
    path.write_text(path.read_text().replace('seeds:', 'gpus: 2\n    seeds:'))
    status, output = compare('--jobs', '3')
    assert status == 2
    assert '3 runs at a time need 6 GPUs, and there are 4: lower --jobs' in output.err
    assert compare('--jobs', '2')[0] == 0
    found = calls(tmp_path)
    assert len(found) == 4
    assert {call[2] for call in found} == {'0,1', '2,3'}
    assert {call[3] for call in found} == {'2'}
    assert {call[4] for call in found} == {9}, 'dist_train.sh was not used'


@pytest.mark.slow
def test_trains_for_real(tmp_path):
    result = tool('dataset_converters/digits_to_imagefolder.py', tmp_path / 'digits', '--train-per-class', '6')
    assert result.returncode == 0, result.stdout
    (tmp_path / 'sweeps.yml').write_text(f"""
sweeps:
  norms:
    configs: [{CONFIG}]
    options:
      train_cfg.max_epochs: 2
      train_dataloader.dataset.data_root: {tmp_path}/digits/
      val_dataloader.dataset.data_root: {tmp_path}/digits/
      train_dataloader.num_workers: 0
      val_dataloader.num_workers: 0
    variants: {{BN: {{model.backbone.norm_cfg.type: BN}}, UBN: {{}}}}
""")
    arguments = [
        TOOL,
        tmp_path / 'sweeps.yml',
        '--work-dir',
        tmp_path / 'out',
        '--jobs',
        '2',
    ]
    result = tool(*arguments)
    assert result.returncode == 0, result.stdout
    found = rows(tmp_path / 'out/norms/runs.csv')
    assert [(row['choice'], row['epoch']) for row in found] == [('BN', '1'), ('BN', '2'), ('UBN', '1'), ('UBN', '2')]
    assert Config.fromfile(tmp_path / 'out/norms/BN/seed0.py').model.backbone.norm_cfg == dict(type='BN')
    result = tool(*arguments)
    assert '2 runs, of which 2 are done already' in result.stdout
