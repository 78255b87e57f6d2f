"""``import mmubn`` changes in other libraries what the table of patches says and nothing else, and loads what it needs.

Also each of the other steps that the table knows. A new interpreter looks at every attribute of every module and class
that is loaded, before and after (import_worker.py).
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import import_worker
import pytest

from mmubn.openmmlab.patches import ADDITIONS, ON_IMPORT, ON_INSTALL, PATCHES

WORKER = Path(import_worker.__file__)
PLOTS = 'import mmubn.analysis.plots'

# Where torch and Triton keep the names of operators and kernels, each under ours.
OPERATORS = re.compile(
    r'torch\.(_library|library|ops|jit\._builtins)\.[\w.]+\[.*\bmmubn\b.*'
    r"|triton\.runtime\.jit\._triton_jit_function_registry\['mmubn\..*"
)


def worker(*arguments):
    command = [sys.executable, '-W', 'ignore', str(WORKER), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def modules():
    return worker('modules')


@pytest.fixture(scope='module')
def changes(modules, tmp_path_factory):
    path = tmp_path_factory.mktemp('modules') / 'all.json'
    path.write_text(json.dumps(modules['all']))
    return worker('changes', path)


class TestChanges:
    @pytest.mark.parametrize('step', [step for step in import_worker.STEPS if step != PLOTS])
    def test_are_those_of_the_table(self, changes, step):
        """Including none where the table has no row, and the state of the process: exit handlers, loggers, filters."""
        assert [label for label in changes[step]['unexpected'] if not OPERATORS.match(label)] == []
        assert changes[step]['missing'] == []

    def test_of_plots_are_at_most_those_of_the_table(self, changes):
        (row,) = [patch for patch in PATCHES if patch.when == PLOTS]
        for label in changes[PLOTS]['unexpected']:
            # What matplotlib.use itself sets, for the one entry ``backend`` of the table.
            assert re.match(
                r"matplotlib\.(backends\.|pyplot\.|rcParamsDefault\['backend'\]|rcParams\['backend_f)", label
            )
        never = set(changes[PLOTS]['missing'])
        assert never < set(row.symbols)

    @pytest.mark.parametrize('step', import_worker.STEPS)
    def test_operators_are_ours(self, changes, step):
        names = changes[step]['operators']
        assert all(name.startswith('mmubn::') for name in names)
        assert not names or step == ON_IMPORT

    def test_every_row_has_a_step(self):
        assert {patch.when for patch in PATCHES} <= import_worker.STEPS.keys()
        assert {addition.when.partition(',')[0] for addition in ADDITIONS} <= import_worker.STEPS.keys()

    def test_what_an_import_and_an_install_may_change(self):
        """By name, so that a row more is a decision."""
        assert [patch.name for patch in PATCHES if patch.when == ON_IMPORT] == [
            'sync-bn-torch',
            'sync-bn-mmengine',
            'replaced-norms',
            'released-names',
            'plain-eps',
            'timm-norm-act',
            'own-configs',
            'own-config-names',
        ]
        assert [patch.name for patch in PATCHES if patch.when == ON_INSTALL] == [
            'config-packages',
            'layout-report',
            'model-key',
            'safe-globals',
            'flop-counter-mmengine',
            'flop-counter-mmcv',
        ]


class TestModules:
    def test_the_rooms_that_an_import_loads(self, modules):
        rooms = {name.split('.')[1] for name in modules['import mmubn'] if '.' in name}
        assert rooms == {'checkpoints', 'convert', 'deploy', 'functional', 'layers', 'openmmlab', 'ops', 'version'}

    def test_of_openmmlab(self, modules):
        """None of the tools' parts: no FLOP counters, networks, initializers, mixed precision, checkpoint hooks."""
        loaded = {name for name in modules['import mmubn'] if name.startswith('mmubn.openmmlab')}
        assert loaded == {
            'mmubn.openmmlab',
            'mmubn.openmmlab.config_types',
            'mmubn.openmmlab.convert_norms',
            'mmubn.openmmlab.errors',
            'mmubn.openmmlab.hooks',
            'mmubn.openmmlab.hooks.covariate_shift',
            'mmubn.openmmlab.hooks.feature_condensation',
            'mmubn.openmmlab.hooks.fixed_batch',
            'mmubn.openmmlab.hooks.layer_log',
            'mmubn.openmmlab.hooks.padding_aware',
            'mmubn.openmmlab.own_configs',
            'mmubn.openmmlab.padding',
            'mmubn.openmmlab.patches',
            'mmubn.openmmlab.plain_eps',
            'mmubn.openmmlab.registration',
            'mmubn.openmmlab.sync_guards',
            'mmubn.openmmlab.timm_norms',
            'mmubn.openmmlab.versions',
        }

    def test_no_command_line(self, modules):
        assert modules['argparse'] == []
