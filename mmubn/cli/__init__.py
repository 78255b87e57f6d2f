"""What the tools share. Needs OpenMMLab.

- :mod:`~mmubn.cli.errors`: errors in one line, ``--debug``, ``--trust-checkpoint``.
- :mod:`~mmubn.cli.messages`: what to say of an error of another library.
- :mod:`~mmubn.cli.config`: the config that a command line asks for.
- :mod:`~mmubn.cli.overrides`: which ``--cfg-options`` change something.
- :mod:`~mmubn.cli.paths`: whether the files of a run are there.
- :mod:`~mmubn.cli.runner`: the runner, process groups on the CPU.
- :mod:`~mmubn.cli.launcher`: what a process knows of its launcher; processes end with it.
- :mod:`~mmubn.cli.launch`: torchrun, with errors in one line.
- :mod:`~mmubn.cli.commands`: commands that a tool starts.
"""

from mmubn.cli.commands import print_command, run_command
from mmubn.cli.config import add_config_arguments, add_run_arguments, load_config, set_run
from mmubn.cli.errors import UsageError, add_debug_argument, add_trust_argument, run_tool
from mmubn.cli.paths import check_file, check_paths
from mmubn.cli.runner import build_runner

__all__ = [
    'UsageError',
    'add_config_arguments',
    'add_debug_argument',
    'add_run_arguments',
    'add_trust_argument',
    'build_runner',
    'check_file',
    'check_paths',
    'load_config',
    'print_command',
    'run_command',
    'run_tool',
    'set_run',
]
