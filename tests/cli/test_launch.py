"""mmubn.cli.launch: torchrun, whose errors are one line."""

import os
import socket
import subprocess
from pathlib import Path

import forks
import pytest

from mmubn.cli.launch import launch

TOOLS = Path(__file__).resolve().parent.parent.parent / 'tools'
STANDALONE = ['--standalone', '--local_addr=127.0.0.1', '--nproc_per_node=2']


def launched(*arguments):
    """Its status and lines, of a process of its own: torchrun handles signals."""
    code = f'from mmubn.cli.launch import launch\nraise SystemExit(launch({[str(each) for each in arguments]!r}))'
    (result,) = forks.together(exec, (code,))
    return result.returncode, [line for line in result.stdout.splitlines() if line]


@pytest.fixture
def script(tmp_path):
    def write(text):
        (tmp_path / 'script.py').write_text(f'import os, sys\nrank = os.environ["RANK"]\n{text}\n')
        return tmp_path / 'script.py'

    return write


def test_a_script_that_says_why_it_fails(script):
    text = 'if rank == "1":\n    print("error: the file is gone", file=sys.stderr)\n    sys.exit(3)'
    assert launched(*STANDALONE, script(text)) == (3, ['error: the file is gone'])


def test_a_process_that_is_killed(script):
    status, (line,) = launched(*STANDALONE, script('if rank == "1": os.kill(os.getpid(), 9)'))
    assert status == 128 + 9
    assert line.startswith('error: process 1 (pid ')
    assert line.endswith('was ended by SIGKILL; was the memory of this machine used up?')


def test_a_port_that_is_taken(script):
    with socket.socket(socket.AF_INET6) as s:  # as torch's store listens
        s.bind(('::', 0))
        s.listen()
        port = s.getsockname()[1]
        status, lines = launched('--nproc_per_node=1', f'--master_port={port}', script('pass'))
    assert status == 1
    assert lines[-1] == f'error: port {port} is taken: set PORT (--master_port) to another, or leave it out.'
    assert not any('Traceback' in line for line in lines)


@pytest.mark.parametrize('processes', ['0', 'two', '-1'])
def test_a_number_of_processes_that_is_none(processes, capsys):
    assert launch([f'--nproc_per_node={processes}', 'script.py']) == 2
    expected = f'error: --nproc_per_node must be a number of processes, at least 1, got {processes}.\n'
    assert capsys.readouterr().err == expected


class TestScripts:
    """tools/dist_*.sh. tests/tools/ has what they run."""

    @pytest.mark.parametrize('name', ['dist_train.sh', 'dist_test.sh'])
    @pytest.mark.parametrize('processes', ['0', 'two', '--resume'])
    def test_a_number_of_processes_that_is_none(self, name, processes):
        arguments = ['config.py', *(['checkpoint.pth'] if name == 'dist_test.sh' else []), processes]
        result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)
        assert result.returncode == 2
        error, usage = result.stderr.splitlines()
        assert error == f'error: GPUS must be a number of processes, at least 1, got {processes}.'
        assert usage.startswith(f'usage: {TOOLS / name} CONFIG ')

    def test_slurm(self):
        environment = os.environ | {'GPUS': 'two'}
        command = [TOOLS / 'slurm_train.sh', 'partition', 'job', 'config.py', 'work_dir']
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 2
        assert result.stderr == 'error: GPUS, GPUS_PER_NODE and CPUS_PER_TASK must be numbers, at least 1, got two.\n'

    def test_port_and_addresses(self, tmp_path):
        """What the launcher is given, with a stand-in for python: MMDetection's variables mean what they mean there."""
        (tmp_path / 'python').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / 'python').chmod(0o755)
        path = f'{tmp_path}:{os.environ["PATH"]}'

        def given(**variables):
            environment = {
                key: value for key, value in os.environ.items() if key not in ('PORT', 'NNODES', 'NODE_RANK')
            }
            command = [TOOLS / 'dist_train.sh', 'config.py', '2', '--amp']
            result = subprocess.run(
                command, capture_output=True, text=True, env=environment | {'PATH': path} | variables
            )
            launcher, *arguments = result.stdout.splitlines()
            assert launcher.endswith('mmubn/cli/launch.py')
            assert arguments[-4:] == ['config.py', '--launcher', 'pytorch', '--amp']
            return arguments[:-5]

        assert given() == STANDALONE
        one = ['--nnodes=1', '--node_rank=0', '--master_addr=127.0.0.1', '--master_port=1234', '--nproc_per_node=2']
        assert given(PORT='1234') == one
        two = ['--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1', '--master_port=29500', '--nproc_per_node=2']
        assert given(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1') == two

    def test_a_bad_config(self):
        result = subprocess.run([TOOLS / 'dist_train.sh', 'nowhere.py', '2'], capture_output=True, text=True)
        assert result.returncode == 2
        errors = [line for line in result.stderr.splitlines() if 'error' in line.lower()]
        assert len(errors) == 1, result.stderr
        assert errors[0].startswith('error: the config nowhere.py does not exist; ')
        assert 'Traceback' not in result.stderr
