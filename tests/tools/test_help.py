"""Tools that no other test starts as a user does, in a new Python: that they start there, with all that they import."""

import sys

import pytest
from cli import ROOT, run


@pytest.mark.parametrize('name', ['model_converters/convert_norm.py'])
def test_help(name):
    result = run(sys.executable, ROOT / 'tools' / name, '--help')
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith('usage: ')
