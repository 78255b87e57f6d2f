"""tools/analysis_tools/inspect_kernels.py: it reads the machine code that a training step launches."""

import re

import pytest
import torch
from cli import call

pytest.importorskip('triton')

from mmubn.analysis.machine_code import Code, instructions_per_value, kernel_name, launches_of_a_step

TOOL = 'analysis_tools/inspect_kernels.py'


def test_the_launches_of_a_training_step():
    """Launches cost as much as a small map: none is added without notice."""

    def names(shape, memory_format):
        return [kernel_name(launch) for launch in launches_of_a_step(shape, torch.bfloat16, memory_format, 3)]

    forward = ['moments', 'similarity', 'coefficients', 'copy_statistics', 'apply']
    whole = [*forward, 'tap_sums', 'coefficients_backward', 'input_gradient']
    assert names((64, 512, 7, 7), torch.contiguous_format) == whole
    split = names((64, 64, 56, 56), torch.channels_last)
    assert split == [*whole[:1], 'merge_moments', *whole[1:6], 'merge_tap_sums', *whole[6:]]


def test_instructions_are_counted_by_loops():
    """100 instructions of which 60 are a loop of three rounds, in 2 programs of 32 lanes, for 64 values."""
    launch = launches_of_a_step((1, 1, 1, 24), torch.float32, torch.contiguous_format, 1)[4]
    assert kernel_name(launch) == 'apply'
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    arguments['width'] = 3 * launch.constants['BLOCK_Q'] * launch.constants['COLUMNS']
    launch = launch._replace(programs=2, num_warps=1, arguments=tuple(arguments.values()))
    code = Code(registers=1, shared=0, spills=0, instructions=100, loops=[60, 20])
    assert instructions_per_value(launch, code, 64) == 100 + 2 * 60
    assert instructions_per_value(launch, code._replace(loops=[]), 64) == 100


def test_report(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    options = ['--shapes', '2,16,8,8', '--kernel-size', '1', '--dtype', 'fp32', '--memory-format', 'channels_last']
    assert call(monkeypatch, TOOL, *options) == 0
    header, _, *lines = (
        [cell.strip() for cell in line.strip('|\n').split('|')] for line in capsys.readouterr().out.splitlines()
    )
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [row['kernel'] for row in rows] == ['moments', 'apply', 'tap_sums', 'input_gradient']
    assert [row['bytes / value'] for row in rows] == ['4', '8', '8', '12']
    for row in rows:
        assert row['input'] == '2x16x8x8 fp32 channels_last'
        assert 16 <= int(row['registers']) <= 255
        # Less than one instruction for what is loaded and stored, or thousands, would be a wrong count.
        assert 1 < float(row['instructions / value']) < 1000


@pytest.mark.parametrize('shapes', ['2,16,8', '2,16,8,0', 'large'])
def test_a_shape_that_is_none(monkeypatch, capsys, shapes):
    assert call(monkeypatch, TOOL, '--shapes', shapes) == 2
    assert re.search(rf'.{shapes}. is no shape: expected four positive integers N,C,H,W', capsys.readouterr().err)
