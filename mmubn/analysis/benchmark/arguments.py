"""Types of command-line arguments, for :mod:`argparse`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

__all__ = ['at_least', 'device', 'shape']


def shape(text: str) -> tuple[int, int, int, int]:
    """Parse ``2,64,50,50``, the shape of an input (N, C, H, W)."""
    parts = text.split(',')
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no shape: expected four positive integers N,C,H,W, as 2,64,50,50'
        )
    n, c, h, w = map(int, parts)
    return n, c, h, w


def at_least(lowest: int) -> Callable[[str], int]:
    """Return the parser of an integer that is not below ``lowest``."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f'expected an integer of at least {lowest}, got {text!r}')
        return int(text)

    return integer


def device(text: str) -> torch.device:
    """Parse the name of the CPU or of a GPU that this machine has."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ('cpu', 'cuda'):
        raise argparse.ArgumentTypeError(f'{text!r} is no device to measure on: expected cpu, cuda or cuda:INDEX')
    if found.type == 'cuda' and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f'{text!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices on this machine; use cpu'
        )
    return found
