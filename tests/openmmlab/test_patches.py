"""The table of changes in other libraries: each row can be applied, once, and left out; the page of docs/ has them all.

What the rows do is tested where they are implemented; that nothing else changes, in test_import.py.
"""

import inspect
import os
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import mmubn.openmmlab
from mmubn.openmmlab import patches
from mmubn.openmmlab.__main__ import page
from mmubn.openmmlab.patches import ADDITIONS, PATCHES, SKIP, Patch

ROOT = Path(__file__).parents[2]


def run(code, **environment):
    """Run ``code`` in a new interpreter."""
    command = [sys.executable, '-W', 'ignore', '-c', code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


LIBRARY = """
def double(x):
    return 2 * x

class Class:
    @classmethod
    def name(cls):
        return 'old'
"""


@pytest.fixture
def library(monkeypatch):
    """A library, and a table of rows that change it."""
    library = types.ModuleType('library')
    exec(LIBRARY, library.__dict__)
    user = types.ModuleType('user')
    user.double, user.triple = library.double, library.double
    helpers = types.ModuleType('helpers_of_patches')
    helpers.calls = []
    helpers.add_one = lambda original: lambda x: original(x) + 1
    helpers.rename = lambda original: classmethod(lambda cls: original.__func__(cls) + ' and new')
    helpers.act = lambda: helpers.calls.append('acted')
    for name, module in (('library', library), ('user', user), ('helpers_of_patches', helpers)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(patches.util, 'find_spec', lambda name: name if name != 'absent' else None)

    def row(name, symbol, when, **how):
        return Patch(name, (symbol,), when, 'why', 'others', 'library 1', 'no remedy', **how)

    install = patches.ON_INSTALL
    helper = 'helpers_of_patches:{}'.format
    importers = ('user.double', 'not_loaded.double')
    table = (
        row('function', 'library.double', install, replacement=helper('add_one'), importers=importers),
        row('method', 'library.Class.name', install, replacement=helper('rename')),
        row('missing', 'library.gone', 'other', replacement=helper('rename')),
        row('action', 'library.anything', patches.ON_IMPORT, action=helper('act')),
        row('absent', 'absent.thing', patches.ON_IMPORT, replacement=helper('rename')),
        row('elsewhere', 'library.style', patches.ON_IMPORT),
    )
    monkeypatch.setattr(patches, 'PATCHES', table)
    monkeypatch.setattr(patches, '_applied', set())
    monkeypatch.delenv(SKIP, raising=False)
    return library


class TestInstall:
    def test_all(self, library):
        patches.install()
        assert library.double(2) == 5
        assert library.Class.name() == 'old and new'
        assert sys.modules['helpers_of_patches'].calls == []

    def test_some(self, library):
        patches.install('method')
        assert library.double(2) == 4
        assert library.Class.name() == 'old and new'

    def test_once(self, library):
        for _ in range(2):
            patches.install()
            patches.install('function')
        assert library.double(2) == 5
        assert library.Class.name() == 'old and new'

    def test_copies_that_the_table_names_and_no_others(self, library):
        patches.install()
        assert sys.modules['user'].double is library.double
        assert sys.modules['user'].triple(2) == 4

    def test_a_copy_that_is_another_function_stays(self, library):
        sys.modules['user'].double = other = lambda x: x
        patches.install()
        assert sys.modules['user'].double is other

    @pytest.mark.parametrize('names', [('unknown',), ('function', 'action')])
    def test_a_name_that_is_no_optional_row(self, library, names):
        with pytest.raises(ValueError, match=rf"optional patches \(function, method\), got \['{names[-1]}'\]"):
            patches.install(*names)
        assert library.double(2) == 4

    def test_is_what_the_package_exports(self):
        assert mmubn.openmmlab.install is patches.install


class TestApply:
    def test_rows_of_what_is_named(self, library):
        for _ in range(2):
            patches.apply(patches.ON_IMPORT)
        assert sys.modules['helpers_of_patches'].calls == ['acted']
        assert library.double(2) == 4
        assert patches._applied == {'action', 'elsewhere'}, 'absent is of a library that is not installed'

    def test_what_is_not_there_is_named_with_its_remedy(self, library):
        error = rf'apply missing: there is no library\.gone .*library 1.*{SKIP}=missing .*: no remedy'
        with pytest.raises(RuntimeError, match=error):
            patches.apply('other')


class TestSkip:
    @pytest.mark.parametrize('names', ['function', 'function,method', ' method function ', 'all'])
    def test_by_name(self, library, monkeypatch, names):
        monkeypatch.setenv(SKIP, names)
        patches.install()
        patches.install('function')
        assert library.double(2) == 4
        assert library.Class.name() == ('old and new' if names == 'function' else 'old')

    def test_of_a_row_that_something_else_applies(self, library, monkeypatch):
        monkeypatch.setenv(SKIP, 'action')
        patches.apply(patches.ON_IMPORT)
        assert sys.modules['helpers_of_patches'].calls == []

    def test_a_name_that_is_none(self, library, monkeypatch):
        monkeypatch.setenv(SKIP, 'function,nothing')
        with pytest.raises(ValueError, match=rf"{SKIP}: .*\(function, method, .* or all, got \['nothing'\]"):
            patches.apply(patches.ON_IMPORT)

    def test_the_reader_of_the_tools_has_an_option_instead(self):
        assert "got ['safe-reader']" in run('import mmubn', **{SKIP: 'safe-reader'}).stderr

    def test_on_import(self):
        code = 'import torch; old = vars(torch.nn.SyncBatchNorm)["convert_sync_batchnorm"]; import mmubn\n'
        code += 'print(vars(torch.nn.SyncBatchNorm)["convert_sync_batchnorm"] is old)'
        assert run(code).stdout.split()[-1] == 'False'
        assert run(code, **{SKIP: 'sync-bn-torch'}).stdout.split()[-1] == 'True'
        assert "got ['sync-bn']" in run('import mmubn', **{SKIP: 'sync-bn'}).stderr

    def test_of_the_initializer(self):
        code = 'import mmubn.openmmlab.pretrained\nfrom mmengine.registry import WEIGHT_INITIALIZERS\n'
        code += 'print(WEIGHT_INITIALIZERS.get("Pretrained").__module__)'
        assert run(code).stdout.split()[-1] == 'mmubn.openmmlab.pretrained'
        assert run(code, **{SKIP: 'strict-pretrained'}).stdout.split()[-1] == 'mmengine.model.weight_init'


class TestTable:
    def test_names_are_unique(self):
        assert len({patch.name for patch in PATCHES}) == len(PATCHES)

    @pytest.mark.parametrize('patch', PATCHES, ids=lambda patch: patch.name)
    def test_each_row_says_all_and_can_be_applied(self, patch):
        for text in (patch.why, patch.others, patch.switch_off):
            assert text.endswith('.')
        assert patch.versions
        assert not (patch.replacement and patch.action)
        if patch.replacement:
            assert len(inspect.signature(pkgutil.resolve_name(patch.replacement)).parameters) == 1
            for symbol in patch.symbols:
                owner, name = patches.owner_of(symbol)
                assert name in vars(owner)
        elif patch.action:
            inspect.signature(pkgutil.resolve_name(patch.action)).bind()
        else:
            assert patch.when.startswith('import '), 'the module makes the change itself'

    def test_the_page_is_the_table(self):
        assert (ROOT / 'docs' / 'patches.md').read_text() == page(), 'python -m mmubn.openmmlab > docs/patches.md'

    def test_the_page_has_every_row(self):
        words = ' '.join(page().split())
        for patch in PATCHES:
            texts = (patch.why, patch.others, patch.switch_off, *patch.symbols, *patch.importers)
            assert all(text in words for text in (f'## {patch.name} ', *texts))
        assert SKIP in words
        for addition in ADDITIONS:
            assert all(f'`{name}`' in page() for name in addition.names)

    def test_python_m_prints_the_page(self):
        result = subprocess.run(
            [sys.executable, '-W', 'ignore', '-m', 'mmubn.openmmlab'], capture_output=True, text=True, cwd=ROOT
        )
        assert result.stdout == page()
        assert result.stderr == ''
