"""The rooms of the package: what each may import, and how large a file may be. docs/architecture.md shows them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmubn'
# From the bottom up: a room imports itself and rooms before it.
ROOMS = (
    'version',
    'functional',
    'checkpoints',
    'ops',
    'layers',
    'convert',
    'deploy',
    'openmmlab',
    'cli',
    'analysis',
    '__main__',
)
TORCH_ALONE = ('functional', 'checkpoints', 'ops', 'layers', 'convert', 'deploy')
LIBRARIES = {'torch', 'triton'}
# Names that configs of earlier drafts import.
OLD_NAMES = {'faults', 'models', 'pretrained'}
LONGEST = 700  # lines

MODULES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
    for path in PACKAGE.rglob('*.py')
}


def imports(path):
    """Full names of all that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: imports are absolute'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def module_of(name):
    """The module that an import of ``name`` loads, for names of this package."""
    while name not in MODULES:
        name = name.rpartition('.')[0]
    return name


def own_imports(module):
    return {module_of(name) for name in imports(MODULES[module]) if name.split('.')[0] == 'mmubn'}


def room_of(module):
    parts = module.split('.')
    return parts[1] if len(parts) > 1 else 'mmubn'


def test_every_file_is_in_a_room():
    assert {room_of(module) for module in MODULES} == {'mmubn', *ROOMS, *OLD_NAMES}


@pytest.mark.parametrize('module', sorted(set(MODULES) - {'mmubn'} - {f'mmubn.{name}' for name in OLD_NAMES}))
def test_no_import_runs_upwards(module):
    room = room_of(module)
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    found = {room_of(name) for name in own_imports(module)}
    # `from mmubn import functional` loads mmubn first, as any import of the package does.
    assert found - {'mmubn'} <= allowed, f'{module} may import {sorted(allowed)}'
    assert 'mmubn' not in found or room in ('cli', 'analysis', '__main__'), (
        f'{module} must import what it needs by its own name'
    )


def test_no_circle():
    """In the imports as they are written, wherever in a file."""
    waiting = {module: own_imports(module) - {module, 'mmubn'} for module in MODULES if module != 'mmubn'}
    while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {module: needs for module, needs in waiting.items() if module not in ready}
    assert not waiting, f'these import each other: {sorted(waiting)}'


@pytest.mark.parametrize('room', TORCH_ALONE)
def test_needs_torch_alone(room):
    for module, path in MODULES.items():
        if room_of(module) == room:
            tops = {name.split('.')[0] for name in imports(path)} - {'mmubn'}
            assert tops - set(__import__('sys').stdlib_module_names) <= LIBRARIES, module


def test_no_file_is_too_long():
    files = [path for folder in ('mmubn', 'tools') for path in (ROOT / folder).rglob('*')]
    sources = [path for path in files if path.suffix in ('.py', '.cpp', '.h', '.sh')]
    lengths = {path: len(path.read_text().splitlines()) for path in sources}
    assert lengths
    assert {str(path): length for path, length in lengths.items() if length > LONGEST} == {}


def test_no_script_imports_a_script():
    scripts = {path.stem: path for path in (ROOT / 'tools').rglob('*.py')}
    for path in scripts.values():
        assert not {name.split('.')[0] for name in imports(path)} & scripts.keys(), path


def test_f_is_torch_nn_functional():
    for path in (ROOT / folder for folder in ('mmubn', 'tools', 'tests')):
        for file in path.rglob('*.py'):
            for node in ast.walk(ast.parse(file.read_text())):
                for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                    if alias.asname == 'F':
                        module = getattr(node, 'module', None)
                        assert '.'.join(filter(None, (module, alias.name))) == 'torch.nn.functional', file
