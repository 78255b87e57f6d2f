"""The processes that make the checks.

Every stage has its processes and its time, so that none can hide another: one that ends without an answer costs the
check that it was at, and another process goes on with those that are left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch

from mmubn.analysis.gpu_check import environment, sanitizer
from mmubn.analysis.gpu_check.device import is_gpu
from mmubn.analysis.gpu_check.outcome import FAILED, SKIPPED, Outcome, Skip
from mmubn.analysis.gpu_check.report import Report
from mmubn.analysis.gpu_check.stages import PLANNED_FOR, STAGES, Stage
from mmubn.analysis.gpu_check.worker import LOST, MARK

__all__ = ['Shard', 'processes', 'run_stage']

COMMAND = ['-m', 'mmubn.analysis.gpu_check.worker']


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def processes(stage: Stage, device: torch.device) -> int:
    """How many processes make a stage at once: as cores and the GPU's memory allow."""
    if stage.memory is None:
        return 1
    count = cores() if cores() <= 4 else cores() - 2
    if is_gpu(device):
        count = min(count, int(torch.cuda.mem_get_info(device)[0] / 2**30 / stage.memory))
    return max(1, min(count, PLANNED_FOR))


def run_stage(name: str, device: torch.device, report: Report, folder: Path) -> None:
    """Make the checks of a stage, and report each. What the processes print besides goes to ``folder/NAME.log``."""
    stage = STAGES[name]
    try:
        checks = [check.name for check in stage.checks(device)]
        prefix = sanitizer.prefix() if stage.sanitized else []
    except Skip as reason:
        report.add(Outcome(name, 'all checks', SKIPPED, str(reason)))
        return
    except Exception as error:
        report.add(Outcome(name, 'all checks', FAILED, f'{type(error).__name__}: {error}'))
        return
    count = processes(stage, device)
    seconds = stage.seconds if stage.memory is None else stage.seconds * max(1, PLANNED_FOR / count)
    print(f'-- {name}: {len(checks)} checks, processes: {count}, time: at most {seconds:.0f} s', flush=True)
    end = time.monotonic() + seconds
    with (folder / f'{name}.log').open('w', encoding='utf-8') as log, ThreadPoolExecutor(count) as pool:
        shards = [Shard(name, checks[i::count], device, report, log, prefix, seconds, end) for i in range(count)]
        try:
            for future in [pool.submit(shard.run) for shard in shards]:
                future.result()
        finally:
            for shard in shards:  # where the program is interrupted
                shard.end = 0.0
                shard.kill()


class Shard:
    """Checks of a stage that are made one after the other, by one process as long as it lives.

    Args:
        stage: Its name.
        names: The checks.
        device: What is checked.
        report: What is told of each.
        log: What the processes print besides.
        prefix: What their command is put after.
        seconds: The stage's time.
        end: When it is over, by :func:`time.monotonic`.
    """

    def __init__(
        self,
        stage: str,
        names: list[str],
        device: torch.device,
        report: Report,
        log: IO[str],
        prefix: list[str],
        seconds: float,
        end: float,
    ) -> None:
        self.stage, self.names, self.device = stage, list(names), device
        self.report, self.log, self.prefix = report, log, prefix
        self.seconds, self.end = seconds, end
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Make the checks; those that no process answers for are reported too."""
        barren = 0  # processes in a row without an answer
        while self.names and time.monotonic() < self.end and barren < 2:
            before = len(self.names)
            status = self._run_process()
            if time.monotonic() >= self.end:
                break
            barren = barren + 1 if len(self.names) == before else 0
            if self.names and status != LOST:
                self._fail(self.names.pop(0), f'the process ended with status {status} in it; see {self.log.name}')
            elif not self.names and status != 0:
                self._fail('end of a process', f'it ended with status {status}; see {self.log.name}')
        if self.names and barren < 2:
            self._fail(self.names.pop(0), f"it was not finished when the stage's {self.seconds:.0f} s were over")
        reason = 'processes end without an answer' if barren else f"not reached in the stage's {self.seconds:.0f} s"
        for name in self.names:
            self.report.add(Outcome(self.stage, name, SKIPPED, reason))
        self.names = []

    def kill(self) -> None:
        """End the process, if there is one, with its children."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                kill_group(self._process)

    def _fail(self, name: str, reason: str) -> None:
        self.report.add(Outcome(self.stage, name, FAILED, reason))

    def _run_process(self) -> int:
        """Hand the checks to a process, report its outcomes as they come; return its exit status."""
        request = {'stage': self.stage, 'device': str(self.device), 'names': self.names}
        with self._lock:
            process = subprocess.Popen(
                [*self.prefix, sys.executable, *COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                env=self._environment(),
                start_new_session=True,
            )
            self._process = process
        timer = threading.Timer(max(0.0, self.end - time.monotonic()), self.kill)
        timer.start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                process.stdin.write(json.dumps(request) + '\n')
                process.stdin.flush()  # and it stays open: see the worker
            for line in process.stdout:
                if line.startswith(MARK):
                    outcome = Outcome.of_dict(json.loads(line[len(MARK) :]))
                    self.names.remove(outcome.name)
                    self.report.add(outcome)
                else:
                    self.log.write(line)
                    self.log.flush()
            return process.wait()
        finally:
            timer.cancel()
            self.kill()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()

    def _environment(self) -> dict[str, str]:
        """That of the processes: this package, one thread each, and, on the CPU, Triton's interpreter."""
        paths = [str(environment.ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
        found = os.environ | {'PYTHONPATH': os.pathsep.join(paths), 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1'}
        # What cuBLAS needs for the same bits, and NCCL to find itself on a machine without a network.
        found = {'CUBLAS_WORKSPACE_CONFIG': ':4096:8', 'NCCL_SOCKET_IFNAME': 'lo'} | found
        found['TORCHINDUCTOR_COMPILE_THREADS'] = '1'  # no processes for the few kernels of one layer
        if not is_gpu(self.device):
            found['TRITON_INTERPRET'] = '1'
        return found | (sanitizer.ENVIRONMENT if self.prefix else {})


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a process and those that it started, such as compilers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # no groups on Windows
        process.kill()
