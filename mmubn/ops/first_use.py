"""What a backend does once for a device, before its first use there, and what came of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

__all__ = ['FirstUse', 'NotNowError']


class NotNowError(Exception):
    """It cannot be done at this moment, which says nothing of the next."""


class FirstUse:
    """Does something once for each device in a process, such as compiling.

    One thread does it while the others wait.

    Args:
        get_ready: Does it. Returns None, or why the backend cannot be used on the device, or raises
            :class:`NotNowError`.
        report: Told why, once for each device.

    Attributes:
        outcomes: What ``get_ready`` returned, by device.
    """

    def __init__(self, get_ready: Callable[[torch.device], str | None], report: Callable[[str], None]) -> None:
        self._get_ready, self._report = get_ready, report
        self.outcomes: dict[torch.device, str | None] = {}
        self._renew_lock()
        if hasattr(os, 'register_at_fork'):
            # The thread that holds the lock is not in the new process, and would never release it.
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, device: torch.device) -> str | None:
        """Get ready at the first call. Return why the backend cannot be used on the device, or None."""
        try:
            return self.outcomes[device]
        except KeyError:
            pass
        with self._lock:
            if device not in self.outcomes:
                try:
                    failure = self._get_ready(device)
                except NotNowError:
                    return None
                self.outcomes[device] = failure
                if failure is not None:
                    self._report(failure)
            return self.outcomes[device]
