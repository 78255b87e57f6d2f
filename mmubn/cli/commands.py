"""Commands that a tool starts, printed as they are run."""

from __future__ import annotations

import subprocess
import sys

__all__ = ['print_command', 'run_command']


def print_command(*command: object) -> list[str]:
    """Print a command; return it as :mod:`subprocess` takes it."""
    line = [str(part) for part in command]
    print(f'\n$ {" ".join(line)}', flush=True)
    return line


def run_command(*command: object) -> None:
    """Print and run a command; exit where it fails."""
    if (status := subprocess.run(print_command(*command)).returncode) != 0:
        sys.exit(f'error: the command above ended with status {status}')
