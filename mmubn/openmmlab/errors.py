"""The errors of a config that cannot mean what it says and of a checkpoint that is not read.

A module of its own, for hooks that check no config and for what reads no checkpoint by itself.
"""

from mmubn.checkpoints import CheckpointError

__all__ = ['ConfigError', 'UnreadCheckpointError']


class ConfigError(ValueError):
    """A config that cannot mean what it says."""


class UnreadCheckpointError(CheckpointError):
    """A file that a tool does not read: it holds what could run a program, or is no checkpoint."""
