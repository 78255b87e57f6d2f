"""A checkpoint runs no program in a tool, by no way into it, but for --trust-checkpoint; real ones are read."""

import functools
import http.server
import os
import shutil
import threading

import pytest
import torch
import toy
from cli import ROOT, call, checkpoint_of, free_port, metrics, ranks, run, tool
from hostile import program
from mmengine.config import Config
from test_make_report import START
from test_make_report import TOOL as REPORT
from torch import nn

TRUST = '--trust-checkpoint'
REFUSED = (
    f'holds os.makedirs, which could run a program, so it is not read; if you trust where it comes from, add {TRUST}.'
)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A config that trains, evaluates and averages."""
    folder = tmp_path_factory.mktemp('toy')
    cfg = toy.config(folder, epochs=1)
    cfg.update(test_dataloader=cfg.val_dataloader, test_evaluator=cfg.val_evaluator, test_cfg=dict())
    cfg.custom_hooks = [dict(type='EMAHook')]
    cfg.custom_imports.imports = ['toy', 'reading_hooks']
    cfg.dump(folder / 'toy.py')
    return folder / 'toy.py'


@pytest.fixture(scope='module')
def real(config):
    """A checkpoint of tools/train.py, with optimizer, schedulers, log history and averaged weights."""
    result = tool('train.py', config, '--work-dir', config.parent / 'run')
    assert result.returncode == 0, result.stdout
    return config.parent / 'run' / 'epoch_1.pth'


@pytest.fixture
def marker(tmp_path):
    """The folder that the program in a hostile checkpoint makes."""
    return tmp_path / 'program-ran'


@pytest.fixture(params=['zip', 'old'])
def bad(request, real, tmp_path, marker):
    """The real checkpoint with a program in its log history, in both formats of torch."""
    content = checkpoint_of(real)
    content['message_hub']['runtime_info']['program'] = program(marker)
    torch.save(content, tmp_path / 'bad.pth', _use_new_zipfile_serialization=request.param == 'zip')
    return tmp_path / 'bad.pth'


def is_silent(result):
    """Of several processes the one that has an error first says it."""
    return 'error: ' not in result.stdout


def check_refused(result, marker, path, sentence=REFUSED):
    """That a tool ended in one sentence, and nothing ran."""
    assert result.returncode == 2, result.stdout
    assert result.stdout.splitlines()[-1] == f'error: {path} {sentence}'
    assert 'Traceback' not in result.stdout
    assert 'Falling back' not in result.stdout
    assert not marker.exists()


def check_trusted(result, marker):
    """That the same with --trust-checkpoint ended well, and ran the program."""
    assert result.returncode == 0, result.stdout
    assert marker.exists()


# --- hostile checkpoints, by each way into a tool ---------------------------------------------------------------------


def test_evaluation(config, bad, marker, tmp_path):
    arguments = ('test.py', config, bad, '--work-dir', tmp_path / 'test')
    check_refused(tool(*arguments), marker, bad)
    assert not list(tmp_path.glob('test/*/*.json')), 'there must be no metrics'
    check_trusted(tool(*arguments, TRUST), marker)
    assert 'acc' in metrics(tmp_path / 'test')


def test_resuming(config, bad, marker, tmp_path):
    arguments = ('train.py', config, '--work-dir', tmp_path / 'run', '--resume', bad)
    options = ('--cfg-options', 'train_cfg.max_epochs=2')
    check_refused(tool(*arguments, *options), marker, bad)
    result = tool(*arguments, TRUST, *options)
    check_trusted(result, marker)
    assert 'resumed epoch: 1' in result.stdout


def test_resuming_from_the_last_checkpoint(config, bad, marker, tmp_path):
    (tmp_path / 'last_checkpoint').write_text(str(bad))
    arguments = ('train.py', config, '--work-dir', tmp_path, '--resume')
    check_refused(tool(*arguments), marker, bad)
    check_trusted(tool(*arguments, TRUST), marker)


@pytest.mark.parametrize(
    'reading',
    [
        'load_from="{}"',
        'model=dict(init_cfg=dict(type="Pretrained", checkpoint="{}"))',
        'model=dict(init_cfg=dict(type="Pretrained", checkpoint="{}", strict=True))',
        'custom_hooks=[dict(type="TeacherHook", checkpoint="{}")]',
        'custom_hooks=[dict(type="EverythingHook", checkpoint="{}")]',
    ],
    ids=['load_from', 'init_cfg', 'init_cfg strict', 'teacher', 'everything'],
)
def test_what_a_config_reads(config, bad, marker, tmp_path, reading):
    path = tmp_path / 'reading.py'
    path.write_text(f'_base_ = "{config}"\n{reading.format(bad)}\n')
    arguments = ('train.py', path, '--work-dir', tmp_path / 'run')
    result = tool(*arguments)
    place = 'custom_hooks.0: ' if 'TeacherHook' in reading else ''  # which reads while it is built
    check_refused(result, marker, f'{place}{bad}')
    check_trusted(tool(*arguments, TRUST), marker)


def test_conversion(monkeypatch, capsys, marker, tmp_path):
    source, target = tmp_path / 'source.pth', tmp_path / 'target.pth'
    norm = nn.Sequential(nn.BatchNorm2d(4)).state_dict()
    torch.save({'model': norm, 'more': program(marker)}, source)
    arguments = (monkeypatch, 'model_converters/convert_norm.py', source, target, '--to', 'ubn')
    assert call(*arguments) == 2
    assert capsys.readouterr().err == f'error: {source} {REFUSED}\n'
    assert not marker.exists()
    assert not target.exists()
    assert call(*arguments, TRUST) == 0
    assert marker.exists()
    assert torch.load(target)['model'].keys() > norm.keys()


def test_report(monkeypatch, capsys, config, bad, marker, tmp_path):
    """A page without example predictions that says why."""
    run_dir = tmp_path / 'run'
    log = run_dir / START / 'vis_data'
    log.mkdir(parents=True)
    (log / 'scalars.json').write_text('{"loss": 1.0, "epoch": 1, "iter": 1, "step": 1}\n')
    cfg = Config.fromfile(config)
    cfg.visualizer = dict(type='Visualizer')
    cfg.dump(log / 'config.py')
    (run_dir / 'last_checkpoint').write_text(str(bad))
    assert call(monkeypatch, REPORT, run_dir) == 0
    assert f'{run_dir}: no example predictions: {bad} {REFUSED}\n' in capsys.readouterr().out
    assert REFUSED in (run_dir / 'report.html').read_text()
    assert not marker.exists()
    assert call(monkeypatch, REPORT, run_dir, TRUST) == 0
    assert REFUSED not in capsys.readouterr().out
    assert marker.exists()


def test_every_process_ends(config, bad, marker, tmp_path):
    arguments = ('train.py', config, '--work-dir', tmp_path / 'run', '--resume', bad)
    first, second = sorted(ranks(2, *arguments), key=is_silent)
    check_refused(first, marker, bad)
    assert (second.returncode, is_silent(second), 'c10::Error' in second.stdout) == (2, True, False), second.stdout
    for result in ranks(2, *arguments, TRUST, '--cfg-options', 'find_unused_parameters=True'):
        assert result.returncode == 0, result.stdout
    assert marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize('bad', ['zip'], indirect=True)
def test_the_launcher_of_several_processes(config, bad, marker, tmp_path):
    environment = dict(PYTHONPATH=f'{ROOT}/tests/tools:{ROOT}/tests', PORT=free_port())
    command = (ROOT / 'tools/dist_test.sh', config, bad, '2', '--work-dir', tmp_path / 'test')
    refused = run(*command, **environment)
    assert refused.returncode != 0
    assert refused.stdout.count(f'error: {bad} {REFUSED}') == 1
    assert not marker.exists()
    check_trusted(run(*command, TRUST, **environment), marker)


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [('dist_train.sh', 'CONFIG 2'), ('dist_test.sh', 'CONFIG FILE 2'), ('slurm_train.sh', 'PARTITION JOB CONFIG DIR')],
)
def test_the_scripts_pass_the_option_on(tmp_path, script, arguments):
    for name in ('python', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / name).chmod(0o755)
    result = run(ROOT / 'tools' / script, *arguments.split(), TRUST, PATH=f'{tmp_path}:{os.environ["PATH"]}')
    assert result.stdout.split()[-1] == TRUST


@pytest.mark.parametrize(
    'name', ['train.py', 'test.py', 'model_converters/convert_norm.py', REPORT, 'analysis_tools/compare_norms.py']
)
def test_the_option_is_explained(monkeypatch, capsys, name):
    assert call(monkeypatch, name, '--help') == 0
    assert f'{TRUST} ' in capsys.readouterr().out.replace('\n', ' ')


@pytest.fixture
def server(tmp_path):
    """The URL of the test's folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_url(config, bad, marker, tmp_path, server):
    home = dict(TORCH_HOME=str(tmp_path / 'cache'))
    cached = tmp_path / 'cache' / 'hub' / 'checkpoints' / 'bad.pth'
    arguments = ('test.py', config, f'{server}/bad.pth', '--work-dir', tmp_path / 'test')
    for _ in range(2):  # downloaded, and from the cache
        check_refused(tool(*arguments, **home), marker, cached)
    first, second = sorted(ranks(2, *arguments, **home), key=is_silent)
    check_refused(first, marker, cached)
    assert (second.returncode, is_silent(second), 'c10::Error' in second.stdout) == (2, True, False), second.stdout
    check_trusted(tool(*arguments, TRUST, **home), marker)


# --- a program that is no pickle --------------------------------------------------------------------------------------


def test_the_text_of_a_config_in_a_checkpoint(config, real, marker, tmp_path):
    """MMEngine runs it as Python when it resumes."""
    content = checkpoint_of(real)
    content['meta']['config'] = f'x = __import__("os").makedirs({str(marker)!r})\n'
    path = tmp_path / 'bad.pth'
    torch.save(content, path)
    sentence = (
        'holds the Python text of a config (meta.config), which resuming would run, so it is not resumed from; if you '
        f'trust where it comes from, add {TRUST}.'
    )
    arguments = ('train.py', config, '--work-dir', tmp_path / 'run', '--resume')
    check_refused(tool(*arguments, path), marker, path, sentence)
    last = tmp_path / 'run' / 'bad.pth'
    shutil.copy(path, last)
    (tmp_path / 'run' / 'last_checkpoint').write_text(str(last))
    check_refused(tool(*arguments), marker, last, sentence)
    result = tool('test.py', config, path, '--work-dir', tmp_path / 'test')  # where nothing would run it
    assert result.returncode == 0, result.stdout
    assert not marker.exists()
    check_trusted(tool(*arguments, path, TRUST), marker)


# --- real checkpoints, and what is none -------------------------------------------------------------------------------


@pytest.mark.parametrize('is_zip', [True, False])
def test_a_real_checkpoint_needs_no_trust(config, real, tmp_path, is_zip):
    content = checkpoint_of(real)
    assert content.keys() >= {'optimizer', 'param_schedulers', 'message_hub', 'ema_state_dict', 'state_dict', 'meta'}
    path = tmp_path / 'real.pth'
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    options = ('--cfg-options', 'train_cfg.max_epochs=2')
    for name, arguments in {'train.py': ('--resume', path, *options), 'test.py': (path,)}.items():
        result = tool(name, config, *arguments, '--work-dir', tmp_path / name)
        assert result.returncode == 0, result.stdout
        assert 'weights_only' not in result.stdout


@pytest.mark.parametrize('content', [b'', b'<html>not found</html>', None], ids=['empty', 'page', 'folder'])
def test_what_is_no_checkpoint_ends_in_one_line(config, tmp_path, content):
    path = tmp_path / 'file.pth'
    path.mkdir() if content is None else path.write_bytes(content)
    for arguments in (('test.py', config, path), ('train.py', config, '--resume', path)):
        result = tool(*arguments, '--work-dir', tmp_path / 'run')
        assert result.returncode == 2, result.stdout
        last = result.stdout.splitlines()[-1]
        assert last.startswith(
            (
                f'error: {path} is no checkpoint, or only',
                f'error: {path} is no checkpoint: the file is empty',
                f'error: the checkpoint {path} is a folder',
            )
        )
        assert 'Traceback' not in result.stdout


def test_a_variable_that_forbids_trust(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    arguments = (tmp_path / 'source.pth', tmp_path / 'target.pth', '--to', 'ubn', TRUST)
    assert call(monkeypatch, 'model_converters/convert_norm.py', *arguments) == 2
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD in the environment forbids it' in capsys.readouterr().err
