"""mmubn.cli.errors: how a tool ends."""

import argparse

import pytest

from mmubn.checkpoints import CheckpointError
from mmubn.cli import UsageError, add_debug_argument, errors, run_tool
from mmubn.openmmlab.errors import ConfigError


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a main; gives the exit status and what was printed to stderr."""
    monkeypatch.setattr('sys.argv', ['tool'])
    monkeypatch.delenv('RANK', raising=False)

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


def test_any_other_error_is_raised(run):
    with pytest.raises(ValueError, match='a bug'):
        run(fail_with(ValueError('a bug')))


@pytest.mark.parametrize('arguments', [{}, dict(trust_checkpoint=False), dict(trust_checkpoint=True)])
def test_the_patches_are_installed_between_the_arguments_and_the_work(monkeypatch, arguments):
    """And the safe reader but for an option that a tool may not have."""
    seen = []
    monkeypatch.setattr(errors.openmmlab, 'install', lambda: seen.append('install'))
    monkeypatch.setattr(errors, 'use_safe_reader', lambda trust: seen.append(f'trust: {trust}'))
    parsed = argparse.Namespace(debug=False, **arguments)
    run_tool(lambda: seen.append('arguments') or parsed, lambda args: seen.append('main'))
    assert seen == ['arguments', 'install', f'trust: {arguments.get("trust_checkpoint", False)}', 'main']
