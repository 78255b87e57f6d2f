"""A process that makes the checks it is given, one after the other, and prints what came of each.

    python -m mmubn.analysis.gpu_check.worker

The first line of its input says what to do, in JSON: ``{"stage": ..., "device": ..., "names": [...]}``. Its parent
keeps the input open: when that ends, so does the worker. Lines that begin with :data:`MARK` are outcomes, in JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
import warnings

import torch

from mmubn.analysis.gpu_check.device import is_gpu, synchronize
from mmubn.analysis.gpu_check.outcome import FAILED, OK, SKIPPED, Check, Finding, Outcome, Skip
from mmubn.analysis.gpu_check.stages import STAGES

__all__ = ['LOST', 'MARK', 'outcome_of']

MARK = '@check '
LOST = 3  # exit status: the device takes no more work from this process


def outcome_of(stage: str, check: Check, device: torch.device) -> Outcome:
    """Make one check. Its traceback, if it fails, goes to stderr."""
    start = time.perf_counter()
    outcome = Outcome(stage, check.name, OK)
    try:
        found = check.run()
        synchronize(device)
        finding = found if isinstance(found, Finding) else Finding(found or '')
        outcome.note, outcome.bars, outcome.table = finding.note, list(finding.bars), finding.table
    except Skip as reason:
        outcome.status, outcome.note = SKIPPED, str(reason)
    except torch.cuda.OutOfMemoryError as error:
        outcome.status, outcome.note = SKIPPED, f'the GPU has too little memory: {_first_line(error)}'
    except Exception as error:
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f'{os.path.basename(place.filename)}, line {place.lineno}'  # noqa: PTH119
        outcome.status, outcome.note = FAILED, f'{type(error).__name__}: {_first_line(error)} ({where})'
    outcome.seconds = time.perf_counter() - start
    return outcome


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else 'no message'


def is_lost(device: torch.device) -> bool:
    """Whether the device takes no more work from this process, as after an illegal access."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def end_with_parent() -> None:
    """Wait for the end of the input, in a thread, and end the process there."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    device = torch.device(request['device'])
    if is_gpu(device):
        torch.cuda.set_device(device)
    checks = {check.name: check for check in STAGES[request['stage']].checks(device)}
    for name in request['names']:
        outcome = outcome_of(request['stage'], checks[name], device)
        lost = outcome.status == FAILED and is_lost(device)
        if lost:
            outcome.note += '; the device takes no more work from this process, another goes on'
        print(MARK + json.dumps(outcome.as_dict()), flush=True)
        if lost:
            os._exit(LOST)
        gc.collect()
        if is_gpu(device):
            torch.cuda.empty_cache()


if __name__ == '__main__':
    main()
