"""mmubn.cli.commands: a command is shown as it is run."""

import sys
from pathlib import Path

import pytest

from mmubn.cli import print_command, run_command


def test_a_command_is_shown(capsys):
    assert print_command('tool', Path('a/b'), 3) == ['tool', 'a/b', '3']
    assert capsys.readouterr().out == '\n$ tool a/b 3\n'


def test_a_command_is_run_to_its_end(tmp_path):
    run_command(sys.executable, '-c', f'open({str(tmp_path / "file")!r}, "w")')
    assert (tmp_path / 'file').exists()


def test_a_command_that_fails_ends_the_tool():
    with pytest.raises(SystemExit, match='error: the command above ended with status 3'):
        run_command(sys.executable, '-c', 'raise SystemExit(3)')
