"""torchrun, with errors in one line: ``python -m mmubn.cli.launch`` takes torchrun's arguments.

A process that fails says why itself. torchrun would add a traceback of its own and end with status 1; this ends with
the status of the process, and speaks only where the process could not: when a signal killed it.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed import DistNetworkError, run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

__all__ = ['launch']

WORDS = ('auto', 'cpu', 'gpu', 'xpu')  # that torchrun takes for a number of processes


def launch(arguments: Sequence[str] | None = None) -> int:
    """Run a script in several processes; return the exit status.

    Args:
        arguments: torchrun's; those of this process by default.
    """
    args = run.get_args_parser().parse_args(arguments)
    processes = str(args.nproc_per_node)
    if not (processes.isdigit() and int(processes) > 0) and processes not in WORDS:
        return _error(f'--nproc_per_node must be a number of processes, at least 1, got {processes}.', 2)
    # Of a process that failed: its pid, its exit code and where torchrun noticed.
    logging.getLogger('torch.distributed.elastic.multiprocessing.api').setLevel(logging.CRITICAL)
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = '; was the memory of this machine used up?' if name == 'SIGKILL' else '.'
        return _error(f'process {rank} (pid {failure.pid}) was ended by {name}{hint}', 128 - failure.exitcode)
    except SignalException as error:
        return _error(f'ended by {error.sigval.name}.', 128 + error.sigval.value)
    except (DistNetworkError, RuntimeError) as error:
        if 'EADDRINUSE' not in str(error) and 'already in use' not in str(error):
            return _error(' '.join(str(error).split()), 1)
        return _error(f'port {args.master_port} is taken: set PORT (--master_port) to another, or leave it out.', 1)
    except (OSError, ValueError) as error:
        return _error(' '.join(str(error).split()), 1)
    return 0


def _error(text: str, status: int) -> int:
    print(f'error: {text}', file=sys.stderr, flush=True)
    return status


if __name__ == '__main__':
    sys.exit(launch())
