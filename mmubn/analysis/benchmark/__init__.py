"""Time and memory of norm layers side by side. Needs torch alone.

- :mod:`~mmubn.analysis.benchmark.contenders`: the layers that are compared.
- :mod:`~mmubn.analysis.benchmark.trials`: the steps that are timed.
- :mod:`~mmubn.analysis.benchmark.deployment`: evaluation after training, folded and in ONNX Runtime.
- :mod:`~mmubn.analysis.benchmark.plan`: what is run.
- :mod:`~mmubn.analysis.benchmark.measurement`: how it is measured.
- :mod:`~mmubn.analysis.benchmark.report` and :mod:`~mmubn.analysis.benchmark.figures`: tables, CSV and plots.
- :mod:`~mmubn.analysis.benchmark.arguments`: types of command-line arguments.
"""

from mmubn.analysis.benchmark.arguments import at_least, device, shape
from mmubn.analysis.benchmark.contenders import (
    CONTENDERS,
    DEFAULT_CONTENDERS,
    Contender,
    NaiveUBN,
    composition,
    resnet50,
)
from mmubn.analysis.benchmark.deployment import count_map_nodes, measure_deployed
from mmubn.analysis.benchmark.figures import plot
from mmubn.analysis.benchmark.measurement import (
    Clock,
    Quartiles,
    Result,
    compare,
    copy_bandwidth,
    measure,
    quartiles,
    saved_bytes,
)
from mmubn.analysis.benchmark.plan import Plan, sweep_axes
from mmubn.analysis.benchmark.report import deployed_markdown, growth_table, markdown, write_csv, write_deployed_csv
from mmubn.analysis.benchmark.trials import DTYPES, MEMORY_FORMATS, LayerTrial, NetworkTrial, Setting

__all__ = [
    'CONTENDERS',
    'DEFAULT_CONTENDERS',
    'DTYPES',
    'MEMORY_FORMATS',
    'Clock',
    'Contender',
    'LayerTrial',
    'NaiveUBN',
    'NetworkTrial',
    'Plan',
    'Quartiles',
    'Result',
    'Setting',
    'at_least',
    'compare',
    'composition',
    'copy_bandwidth',
    'count_map_nodes',
    'deployed_markdown',
    'device',
    'growth_table',
    'markdown',
    'measure',
    'measure_deployed',
    'plot',
    'quartiles',
    'resnet50',
    'saved_bytes',
    'shape',
    'sweep_axes',
    'write_csv',
    'write_deployed_csv',
]
