"""tools/demo_classification.py, on few digits."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from cli import ROOT, call, checkpoint_of, run
from mmengine.config import Config
from PIL import Image

SCRIPT = ROOT / 'tools' / 'demo_classification.py'


@pytest.mark.slow
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
        state_dict = checkpoint_of(work_dir / 'epoch_1.pth')['state_dict']
        assert ('backbone.bn1.running_similarity' in state_dict) == (norm == 'UBN')
    assert 'trained on 80 handwritten digits' in (folder / 'table.md').read_text()
    assert re.search(r'\d+ s in all', result.stdout.splitlines()[-1])
    pixels = np.asarray(Image.open(folder / 'accuracy.png').convert('RGB'))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, 'an empty page has few colours'


def test_a_failed_run_ends_the_demo_with_its_message(tmp_path):
    """The demo starts the scripts beside it."""
    script = tmp_path / 'tools' / 'demo_classification.py'
    (script.parent / 'dataset_converters').mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    (script.parent / 'dataset_converters' / 'digits_to_imagefolder.py').touch()
    (script.parent / 'train.py').write_text('import sys\nprint(f"error: {sys.argv[1]} is gone")\nsys.exit(2)\n')
    result = run('env', '-C', tmp_path, sys.executable, script, '--seeds', '4', '--epochs', '1')
    assert result.returncode == 1
    config = tmp_path / 'configs' / 'digits' / 'resnet18-ubn_digits.py'
    assert result.stdout.endswith(f'error: {config} is gone\nerror: BN with seed 4 ended with status 2\n')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--epochs', '0'], '--epochs must be positive, got 0'),
        (['--seeds', '1', '2', '1'], '--seeds must differ and not be negative, got 1 2 1'),
        (['--seeds', '-1'], '--seeds must differ and not be negative, got -1'),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, SCRIPT, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
