"""What a process knows of its launcher, and no orphans: it ends when the one that started it has gone."""

from __future__ import annotations

import atexit
import os
import sys
import threading

__all__ = ['RANK_VARIABLES', 'end_with_launcher']

# How Slurm and Open MPI name what torch.distributed reads from the environment.
RANK_VARIABLES = {
    'slurm': {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'},
    'mpi': {
        'RANK': 'OMPI_COMM_WORLD_RANK',
        'WORLD_SIZE': 'OMPI_COMM_WORLD_SIZE',
        'LOCAL_RANK': 'OMPI_COMM_WORLD_LOCAL_RANK',
    },
}


def end_with_launcher(interval: float = 1.0) -> None:
    """End this process when the one that started it has gone.

    torchrun ends its processes when one of them or it itself fails, but not when it is killed outright (SIGKILL, the
    out-of-memory killer): they would train on, beside the run that resumes. A thread looks for another parent rather
    than asking Linux for a signal (PR_SET_PDEATHSIG), which comes when the parent's *thread* ends.
    """
    parent, ended = os.getppid(), threading.Event()

    def watch() -> None:
        while not ended.wait(interval):
            if os.getppid() != parent:
                print(f'error: the launcher (process {parent}) has gone; process {os.getpid()} ends.', file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    thread = threading.Thread(target=watch, name='end-with-launcher', daemon=True)
    thread.start()

    @atexit.register
    def stop() -> None:  # no thread of ours runs while the interpreter ends
        ended.set()
        thread.join()
