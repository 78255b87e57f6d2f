"""tools/demo_classification.py, on few digits, and what it makes of the logs of runs."""

import json
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from cli import ROOT, run
from mmengine.config import Config
from PIL import Image

SCRIPT = ROOT / 'tools' / 'demo_classification.py'
# Of three seeds each, in percent after each of four epochs.
CURVES = {
    'BN': [[20, 60, 80, 90], [30, 70, 85, 94], [10, 50, 90, 92]],
    'UBN': [[40, 80, 95, 97], [50, 60, 96, 95], [45, 75, 88, 98.5]],
}


@pytest.fixture(scope='module')
def demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools'))
        import demo_classification

        yield demo_classification


@pytest.fixture
def results(demo, tmp_path, monkeypatch):
    """What the demo reads from logs of runs with the accuracies above."""
    monkeypatch.chdir(tmp_path)
    for norm, curves in CURVES.items():
        for seed, values in zip((7, 8, 9), curves, strict=True):
            folder = demo.WORK_DIR / f'{norm.lower()}-seed{seed}' / '20200101' / 'vis_data'
            folder.mkdir(parents=True)
            records = [{'loss': 1.0, 'step': 43}, *({'accuracy/top1': v, 'step': i} for i, v in enumerate(values, 1))]
            (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, records)))
    for split, count in (('train', 6), ('val', 5)):
        for i in range(count):
            path = demo.DATA / split / str(i % 2) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return {norm: demo.accuracies(norm, [7, 8, 9]) for norm in CURVES}


def test_from_digits_to_table_and_plot(tmp_path):
    """Both norms are trained, from one seed and on the same digits, and the table tells what they logged."""
    arguments = ['--seeds', '3', '--epochs', '1', '--train-per-class', '8']
    result = run('env', '-C', tmp_path, sys.executable, SCRIPT, *arguments)
    assert result.returncode == 0, result.stdout
    folder = tmp_path / 'work_dirs' / 'demo-classification'
    rows = dict(re.findall(r'^\| (U?BN) (\|.*\|)$', (folder / 'table.md').read_text(), re.MULTILINE))
    for norm in ('BN', 'UBN'):
        work_dir = folder / f'{norm.lower()}-seed3'
        log = next(work_dir.glob('*/vis_data/scalars.json')).read_text()
        (accuracy,) = (each['accuracy/top1'] for each in map(json.loads, log.splitlines()) if 'accuracy/top1' in each)
        expected = rf'\| 1 \| 1 \| {accuracy:.2f} \| {accuracy:.2f} to {accuracy:.2f} \| \d+ \|'
        assert re.fullmatch(expected, rows[norm]), rows[norm]
        assert f'{norm}, seed 3: Epoch(val) [1]' in result.stdout, 'progress must be visible'

        cfg = Config.fromfile(work_dir / 'resnet18-ubn_digits.py')
        assert cfg.randomness.seed == 3
        assert cfg.param_scheduler.T_max == 1
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            assert loader.dataset.data_root == 'work_dirs/demo-classification/digits'
        state_dict = torch.load(work_dir / 'epoch_1.pth', weights_only=True, map_location='cpu')['state_dict']
        assert ('backbone.bn1.running_similarity' in state_dict) == (norm == 'UBN')
    assert 'trained on 80 handwritten digits' in (folder / 'table.md').read_text()
    assert re.search(r'\d+ s in all', result.stdout.splitlines()[-1])
    pixels = np.asarray(Image.open(folder / 'accuracy.png').convert('RGB'))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, 'an empty page has few colours'


def test_table(demo, results):
    """Means of 92, and of 290.5 / 3; one of 5 validation digits is 20 points."""
    text = demo.table(results, {'BN': 12.4, 'UBN': 15.6})
    assert '| BN | 3 | 4 | 92.00 | 90.00 to 94.00 | 12 |\n| UBN | 3 | 4 | 96.83 | 95.00 to 98.50 | 16 |\n' in text
    assert 'trained on 6 handwritten digits' in text
    assert 'on 5 other digits; one digit is 20.00 points' in text


def test_plot(demo, results, tmp_path, monkeypatch):
    monkeypatch.setattr(plt, 'close', lambda figure: None)
    demo.plot(results, tmp_path / 'accuracy.png')
    monkeypatch.undo()
    axes = plt.gcf().axes
    plt.close()
    for axis, first in zip(axes, (0, 2), strict=True):
        assert axis.get_xlabel() == 'epoch'
        assert axis.get_ylabel().endswith('(%)')
        lines = []
        for container, (norm, curves) in zip(axis.containers, CURVES.items(), strict=True):
            line, _, (bars,) = container
            values = np.array(curves)[:, first:]
            np.testing.assert_allclose(line.get_xdata(), np.arange(first + 1, 5), atol=0.1)
            np.testing.assert_allclose(line.get_ydata(), values.mean(0))
            ends = np.array(bars.get_segments())[:, :, 1]
            np.testing.assert_allclose(ends, np.stack([values.min(0), values.max(0)], axis=1))
            assert container.get_label() == f'{norm}, mean and range of 3 seeds'
            lines.append(line)
        assert len(axis.get_legend().get_texts()) == 2
        for style in (plt.Line2D.get_linestyle, plt.Line2D.get_marker):
            assert style(lines[0]) != style(lines[1]), 'the norms must stay apart in black and white'


def test_a_failed_run_ends_the_demo_with_its_message(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, 'CONFIG', tmp_path / 'missing.py')
    with pytest.raises(SystemExit, match=r'(?s)missing\.py does not exist.*error: BN with seed 4 ended with status 2'):
        demo.train('BN', 4, 1)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--epochs', '0'], '--epochs must be positive, got 0'),
        (['--seeds', '1', '2', '1'], '--seeds must differ and not be negative, got 1 2 1'),
        (['--seeds', '-1'], '--seeds must differ and not be negative, got -1'),
    ],
)
def test_bad_arguments(demo, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['demo_classification.py', *arguments])
    with pytest.raises(SystemExit, match='2'):
        demo.main()
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
