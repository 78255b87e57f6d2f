"""The tool that measures the host's time on the way to a GPU, on a machine without one."""

import pytest
from cli import tool

pytest.importorskip('triton')


def test_a_row_for_each_layer():
    output = tool('analysis_tools/host_time.py', '--rounds', '1', '--shape', '2,4,3,4').stdout
    rows = [line.split(' | ') for line in output.splitlines() if line.startswith('| ')]
    assert [row[0].strip('| ') for row in rows[2:]] == ['bn', 'ubn', 'ubn, evaluation', 'rbn', 'bnet']
    assert all(float(row[3].split()[0]) > 0 for row in rows[2:])
