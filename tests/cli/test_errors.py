"""mmubn.cli.errors: how a tool ends."""

import argparse
import logging

import pytest
from mmengine.logging import MMLogger

from mmubn.checkpoints import CheckpointError
from mmubn.cli import UsageError, add_debug_argument, errors, run_tool
from mmubn.openmmlab.errors import ConfigError, DataError


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a main; gives the exit status and what was printed to stderr."""
    monkeypatch.setattr('sys.argv', ['tool'])
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(MMLogger, '_instance_dict', {})  # no log of another test
    monkeypatch.setattr(logging, 'raiseExceptions', True)  # which run_tool changes

    def run(main, *arguments):
        parser = argparse.ArgumentParser()
        add_debug_argument(parser)
        status = 0
        try:
            run_tool(lambda: parser.parse_args(arguments), main)
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    return run


def fail_with(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize('kind', [UsageError, ConfigError, CheckpointError])
def test_an_error_of_the_user_is_one_line(run, kind):
    assert run(fail_with(kind('the file is gone'))) == (2, 'error: the file is gone\n')


@pytest.mark.parametrize('kind', [UsageError, ConfigError, CheckpointError])
def test_debug_shows_the_traceback(run, kind):
    status, output = run(fail_with(kind('the file is gone')), '--debug')
    assert status == 2
    assert output.startswith('Traceback (most recent call last):\n')
    assert ', in main\n' in output
    assert output.endswith(f'{kind.__name__}: the file is gone\n')


@pytest.mark.parametrize('arguments', [[], ['--debug']])
def test_one_process_reports_an_error(run, monkeypatch, arguments):
    monkeypatch.setenv('RANK', '1')
    assert run(fail_with(UsageError('the file is gone')), *arguments) == (2, '')


def test_any_other_error_is_one_line_too(run):
    status, output = run(fail_with(ValueError('a\nbug')))
    assert (status, output) == (1, 'error: ValueError: a bug (--debug shows the traceback)\n')
    status, output = run(fail_with(ValueError('a bug')), '--debug')
    assert status == 1
    assert output.startswith('Traceback (most recent call last):\n')
    assert output.endswith('ValueError: a bug\n')


@pytest.mark.parametrize('rank', [0, 1])
def test_the_log_of_a_run_keeps_the_traceback(run, monkeypatch, tmp_path, rank):
    logger = MMLogger.get_instance('a-run', log_file=str(tmp_path / 'run.log'))
    if rank:  # MMEngine gives the first process alone a file
        monkeypatch.setenv('RANK', '1')
        monkeypatch.setenv('WORLD_SIZE', '2')
        logger.handlers = [each for each in logger.handlers if not isinstance(each, logging.FileHandler)]
    status, output = run(fail_with(ValueError('a bug')))
    path = tmp_path / ('run_rank1.log' if rank else 'run.log')
    who = 'process 1 of 2: ' if rank else ''
    assert (status, output) == (1, f'error: {who}ValueError: a bug (traceback in {path})\n')
    text = path.read_text()
    assert text.startswith('Traceback (most recent call last):\n')
    assert text.endswith('ValueError: a bug\n')


def test_a_data_error_of_a_worker_process(run):
    """Its text is the traceback in the worker."""
    text = 'Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
    text += '  File "a.py", line 3, in f\n    g()\nmmubn.openmmlab.errors.DataError: the image is broken\n'
    assert run(fail_with(DataError(text))) == (2, 'error: the image is broken\n')


@pytest.mark.parametrize('end', [KeyboardInterrupt, GeneratorExit])
def test_what_is_no_error_is_raised(run, end):
    with pytest.raises(end):
        run(fail_with(end()))


@pytest.mark.parametrize('arguments', [{}, dict(trust_checkpoint=False), dict(trust_checkpoint=True)])
def test_the_patches_are_installed_between_the_arguments_and_the_work(monkeypatch, arguments):
    """And the safe reader but for an option that a tool may not have."""
    seen = []
    monkeypatch.setattr(errors.openmmlab, 'install', lambda: seen.append('install'))
    monkeypatch.setattr(errors, 'use_safe_reader', lambda trust: seen.append(f'trust: {trust}'))
    parsed = argparse.Namespace(debug=False, **arguments)
    run_tool(lambda: seen.append('arguments') or parsed, lambda args: seen.append('main'))
    assert seen == ['arguments', 'install', f'trust: {arguments.get("trust_checkpoint", False)}', 'main']
