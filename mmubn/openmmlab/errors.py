"""The errors of a config that cannot mean what it says, of data that do not fit it, of a checkpoint that is not read.

A module of its own, for hooks that check no config and for what reads no checkpoint by itself.
"""

from mmubn.checkpoints import CheckpointError

__all__ = ['ConfigError', 'DataError', 'UnreadCheckpointError']


class ConfigError(ValueError):
    """A config that cannot mean what it says."""


class DataError(ConfigError):
    """A data set that does not fit its config, or a file of it that cannot be used."""


class UnreadCheckpointError(CheckpointError):
    """A file that a tool does not read: it holds what could run a program, or is no checkpoint."""
