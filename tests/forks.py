"""Processes that start at once: forks of a Python that has imported what takes a new one seconds to import.

For what is read when a process starts, such as OMP_NUM_THREADS, and for what imports do, a test starts a new Python.
"""

import gc
import multiprocessing
import os
import subprocess
import tempfile
from pathlib import Path

IMPORTS = [
    'mmubn.cli',
    *(f'mmdet.{name}' for name in ('models', 'datasets', 'engine', 'evaluation', 'visualization')),
]
IMPORTS += ['mmpretrain', 'matplotlib.pyplot', 'sklearn.datasets', 'yapf.yapflib.yapf_api', 'setuptools']
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(IMPORTS)


def together(function, *calls):
    """Call ``function`` with each of these tuples of arguments, each in a process of its own, at the same time.

    Returns of each its exit status and, in one text, its stdout and stderr, as subprocess.run does.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(i)) for i in range(len(calls))]
        processes = [
            FORKS.Process(target=_call, args=(output, function, arguments))
            for output, arguments in zip(outputs, calls, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:  # no process stays when the test times out
            for process in processes:
                if process.is_alive():
                    process.kill()
        return [
            subprocess.CompletedProcess(arguments, process.exitcode, output.read_text())
            for arguments, process, output in zip(calls, processes, outputs, strict=True)
        ]


def _call(output, function, arguments):
    gc.freeze()  # nothing of what was imported: a tool that collects garbage would look through all of it
    multiprocessing.set_start_method(None, force=True)  # of its own processes: as in a new Python
    with output.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*arguments)
