"""Whether the layers are right and fast on a GPU: what ``make check-gpu`` runs. Needs torch, Triton and pytest alone.

- :mod:`~mmubn.analysis.gpu_check.outcome`: a check, and what came of it.
- :mod:`~mmubn.analysis.gpu_check.device`: what the checks ask of a device, a GPU or the CPU.
- :mod:`~mmubn.analysis.gpu_check.environment`, ``kernels``, ``layers``, ``features``, ``sanitizer``, ``speed`` and
  ``detector``: the checks, stage by stage.
- :mod:`~mmubn.analysis.gpu_check.stages`: the stages, in their order.
- :mod:`~mmubn.analysis.gpu_check.worker`: the process that makes checks.
- :mod:`~mmubn.analysis.gpu_check.report`: lines, verdict, Markdown.
- :mod:`~mmubn.analysis.gpu_check.processes`: all processes of a stage, each in its time.
"""
