"""The error of a config that cannot mean what it says. A module of its own, for hooks that check no config."""

__all__ = ['ConfigError']


class ConfigError(ValueError):
    """A config that cannot mean what it says."""
