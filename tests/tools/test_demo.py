"""tools/demo.py, with a run of seconds in the place of its own."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cli import call
from PIL import Image

import mmubn.cli

TEST = Path('test') / '20260101_120000'


@pytest.fixture
def demo(monkeypatch, tmp_path, trained):
    """Call the demo where there is an earlier result; of its commands, the training copies a run. Those it started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'work_dirs' / 'demo').mkdir(parents=True)
    (tmp_path / 'work_dirs' / 'demo' / 'result').write_text('old')

    def run(fail=None):
        commands = []

        def run_command(*command):
            assert (tmp_path / 'work_dirs' / 'demo' / 'result').read_text() == 'old'
            script = next(Path(part) for part in command if Path(part).suffix in ('.py', '.sh'))
            commands.append(script.name)
            if script.name == fail:
                sys.exit('error: the command above ended with status 1')
            if script.name == 'dist_train.sh':
                new = Path(command[command.index('--work-dir') + 1])
                shutil.copytree(trained, new, dirs_exist_ok=True)
                (new / 'last_checkpoint').write_text(str(new.absolute() / 'epoch_2.pth'))
            if script.name == 'test.py':
                assert Path(command[3]).exists(), 'the checkpoint'
                work_dir = Path(command[command.index('--work-dir') + 1])
                (work_dir / TEST.name).mkdir(parents=True)
                names = (f'coco/{kind}_mAP{suffix}' for kind in ('bbox', 'segm') for suffix in ('', '_50'))
                (work_dir / TEST.name / f'{TEST.name}.json').write_text(json.dumps(dict.fromkeys(names, 0.625)))

        monkeypatch.setattr(mmubn.cli, 'run_command', run_command)
        return call(monkeypatch, 'demo.py'), commands

    return run


def test_the_new_result_is_whole_and_takes_the_place_of_the_old_one(demo, tmp_path, capsys):
    status, commands = demo()
    assert status == 0
    assert commands == ['digits_to_coco.py', 'dist_train.sh', 'test.py', 'plot_curves.py']
    folder = tmp_path / 'work_dirs' / 'demo'
    assert [path.name for path in folder.parent.iterdir()] == ['demo']
    assert not (folder / 'result').exists()
    assert (folder / 'last_checkpoint').read_text() == str(folder / 'epoch_2.pth')
    text = ''.join(capsys.readouterr().out.split())
    assert '0.625(0.625)' in text
    for place in ('curves.png', 'predictions.png', 'epoch_2.pth', TEST / 'predictions'):
        assert f'work_dirs/demo/{place}' in text
    assert 'demo.new' not in text
    with Image.open(folder / 'predictions.png') as sheet:
        assert len(np.unique(np.asarray(sheet.convert('RGB')).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize('fail', ['digits_to_coco.py', 'test.py'])
def test_a_command_that_fails_leaves_the_old_result(demo, tmp_path, capsys, fail):
    status, commands = demo(fail)
    assert status == 'error: the command above ended with status 1'
    assert commands[-1] == fail
    assert (tmp_path / 'work_dirs' / 'demo' / 'result').read_text() == 'old'
    assert 'the result of an earlier one is still in work_dirs/demo.' in capsys.readouterr().err
