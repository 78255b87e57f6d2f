"""Prints, as JSON, what imports and calls of this package change in other libraries. Run by test_import.py.

``python import_worker.py modules``: the modules of this package that ``import mmubn`` loads, and those of others that
all steps below load. ``python import_worker.py changes FILE``: of each step what changed and is not in the table, and
what is in the table and did not change. The modules that FILE lists are loaded before, so that no library changes
anything by its own import.
"""

import atexit
import contextlib
import gc
import importlib
import json
import logging
import operator
import os
import pkgutil
import random
import re
import signal
import sys
import threading
import types
import warnings
from pathlib import Path

LIBRARIES = ('torch', 'torchvision', 'triton', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'timm', 'numpy', 'matplotlib')
# Loaded before: what this package changes, and what a user of it has loaded.
LOADED = ('torch', 'torchvision', 'torch.fx', 'mmengine.runner', 'mmengine._strategy', 'mmengine.analysis')
LOADED += (
    'mmcv.cnn',
    'mmcv.ops',
    'mmdet.models',
    'mmdet.engine',
    'mmpretrain.models',
    'mmpretrain.engine',
    'matplotlib',
    'timm',
)


def build(wrapper):
    import torch

    pkgutil.resolve_name(wrapper)(torch.optim.SGD([torch.zeros(1)], lr=0.1))


def convert():
    import torch

    import mmubn

    mmubn.convert_norms(torch.nn.BatchNorm2d(2))


def train_atomically():
    from mmubn.openmmlab import patches

    patches.apply(patches.ON_ATOMIC_CHECKPOINTS)


def install():
    import mmubn.openmmlab

    mmubn.openmmlab.install()


def start_tool():
    from mmubn.openmmlab.safe_reader import use_safe_reader

    use_safe_reader(trust=False)


def importing(*names):
    return lambda: [importlib.import_module(name) for name in names]


STEPS = {  # in the words of the table
    'import mmubn': importing('mmubn'),
    'mmubn.convert_norms()': convert,
    'mmubn.openmmlab.install()': install,
    'import mmubn.openmmlab.installed': importing('mmubn.openmmlab.installed'),
    'import mmubn.openmmlab.pretrained': importing('mmubn.openmmlab.pretrained'),
    'import mmubn.openmmlab.mixed_precision': importing('mmubn.openmmlab.mixed_precision'),
    '--amp on a CPU (CPUAmpOptimWrapper)': lambda: build('mmubn.openmmlab.mixed_precision.CPUAmpOptimWrapper'),
    'import mmubn.openmmlab.resumption': importing('mmubn.openmmlab.resumption'),
    'training with AtomicCheckpointHook': train_atomically,
    'import mmubn.openmmlab.models': importing('mmubn.openmmlab.models'),
    'import mmubn.cli': importing('mmubn.cli', 'mmubn.cli.launcher'),
    'each tool of this package, at its start': start_tool,
    'import mmubn.analysis.plots': importing('mmubn.analysis.plots', 'mmubn.analysis.condensation'),
}


# --- what there is ----------------------------------------------------------------------------------------------------


class Snapshot:
    """Every attribute of every module, class and function of other libraries, every entry of their tables, and state.

    Attributes:
        owners: id of the owner: what the reader knows it by, the owner itself, so that no other object gets its id, and
            what it has.
    """

    def __init__(self):
        self.owners = {STATE: ('', None, state())}
        self.owners[id(sys.modules)] = ('', None, {})  # not to be looked into
        for name, module in list(sys.modules.items()):
            if isinstance(module, types.ModuleType) and name.partition('.')[0] not in ('mmubn', '__main__'):
                self.add_module(name, module)

    def add(self, path, owner, items):
        """Whether the owner is new."""
        is_new = id(owner) not in self.owners
        if is_new:
            self.owners[id(owner)] = path, owner, items
        return is_new

    def add_module(self, path, module):
        items = {key: value for key, value in vars(module).items() if key not in IGNORED}
        # A submodule becomes an attribute when it is first imported.
        attributes = {key: value for key, value in items.items() if not isinstance(value, types.ModuleType)}
        if self.add(f'{path}.', module, attributes) and path.partition('.')[0] in LIBRARIES:
            for key, value in attributes.items():
                self.add_value(f'{path}.{key}', value)

    def add_value(self, path, value, is_nested=False):
        if isinstance(value, type):
            if is_of_library(value) and self.add(
                f'{value.__module__}.{value.__qualname__}.',
                value,
                {k: v for k, v in vars(value).items() if k not in IGNORED},
            ):
                for key, each in vars(value).items():
                    self.add_table(f'{path}.{key}', each)
        elif isinstance(value, types.FunctionType):
            if is_of_library(value):
                parts = {'__code__': value.__code__, '__defaults__': value.__defaults__}
                self.add(f'{path}.', value, parts | vars(value))
        elif isinstance(value, (dict, list, set)):
            self.add_table(path, value)
        elif not is_nested and self.add('', value, {}):  # a registry or another object
            for key, each in list(getattr(value, '__dict__', {}).items()):
                self.add_value(f'{path}.{key}', each, is_nested=True)

    def add_table(self, path, table):
        if isinstance(table, dict):
            self.add(f'{path}[]', table, dict(table.items()))
        elif isinstance(table, (list, set)):
            self.add(f'{path}[]', table, {id(each): each for each in table})

    def changes(self, other):
        """What differs in a later snapshot, as (id of the owner, key): a name of it.

        Only of owners that are in both: all else is new where one of these has changed.
        """
        changes = {}
        for owner in self.owners.keys() & other.owners.keys():
            (path, _, before), (_, _, after) = self.owners[owner], other.owners[owner]
            if list(map(id, before)) == list(map(id, after)) and all(
                map(operator.is_, before.values(), after.values())
            ):
                continue
            for key in before.keys() | after.keys():
                value = after.get(key, before.get(key))
                if before.get(key, MISSING) is not after.get(key, MISSING):
                    entry = f'[{key!r:.80}]: {value!r:.80}'
                    changes[owner, key] = f'{path[:-2]}{entry}' if path.endswith('[]') else f'{path}{key}'
        return {slot: name for slot, name in changes.items() if slot[0] != STATE} | self.changed_state(other)

    def changed_state(self, other):
        before, after = self.owners[STATE][2], other.owners[STATE][2]
        return {(STATE, key): key for key in before if before[key] != after[key]}


STATE = 'state'
MISSING = object()
# The third is part of the state, the last a count of hooks.
IGNORED = ('__warningregistry__', '__builtins__', '_marked_safe_globals_set', 'next_id')


def is_of_library(value):
    return (value.__module__ or '').partition('.')[0] in LIBRARIES


def state():
    """What a process has one of."""
    import numpy as np
    import torch

    loggers = {name: each for name, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)}
    loggers['root'] = logging.root
    loggers = {name: each for name, each in loggers.items() if name.partition('.')[0] in ('root', 'mmubn', *LIBRARIES)}
    return {
        'atexit': atexit._ncallbacks(),
        'warnings': repr(warnings.filters),
        'showwarning': id(warnings.showwarning),
        'loggers': repr({name: (each.level, each.handlers, each.propagate) for name, each in loggers.items()}),
        'meta_path': repr(sys.meta_path),
        'path': repr(sys.path),
        'path_hooks': repr(sys.path_hooks),
        'excepthook': (id(sys.excepthook), id(threading.excepthook)),
        'environ': repr(sorted(os.environ.items())),
        'signals': repr([signal.getsignal(each) for each in signal.valid_signals()]),
        'threads': len(threading.enumerate()),
        'gc': (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        'random': (hash(random.getstate()), np.random.get_state()[2], torch.get_rng_state().sum().item()),
        'torch': (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        'safe_globals': tuple(sorted(map(str, torch.serialization.get_safe_globals()))),
        'operators': tuple(sorted(torch._C._dispatch_get_all_op_names())),
    }


# --- what there may be ------------------------------------------------------------------------------------------------


def slots_of(symbol):
    """Of a symbol of the table."""
    if symbol == 'torch.serialization.get_safe_globals()':
        return {(STATE, 'safe_globals')}
    if symbol.startswith(('torch.nn.modules.module._global_', 'torch.optim.optimizer._global_')):  # keys are numbers
        table = pkgutil.resolve_name(symbol)
        return {(id(table), key) for key, hook in table.items() if hook.__module__.startswith('mmubn.')}
    if '.*.' in symbol:  # in any module of a library that has it
        library, _, name = symbol.partition('.*.')
        modules = [each for key, each in sys.modules.items() if key.partition('.')[0] == library]
        return {(id(each), name) for each in modules if name in vars(each)}
    if entry := re.fullmatch(r"(.+)\['(.*)'\]", symbol):
        table = pkgutil.resolve_name(entry[1])
        return {(id(getattr(table, '_module_dict', table)), entry[2])}
    path, _, name = symbol.rpartition('.')
    return {(id(pkgutil.resolve_name(path)), name)}


def expected(step):
    """What the table says that a step changes and adds: a name and its slots."""
    from mmubn.openmmlab.patches import ADDITIONS, PATCHES

    slots = {}
    for patch in PATCHES:
        if patch.when == step:
            slots |= {symbol: slots_of(symbol) for symbol in (*patch.symbols, *patch.importers)}
    for addition in ADDITIONS:
        # Operators are looked at as a whole; yaml's table has types for names.
        if addition.place.startswith('mm') and addition.when == step:
            slots |= {name: slots_of(f"{addition.place}['{name}']") for name in addition.names}
    return slots


def check(step, before, after):
    changes, known, missing = before.changes(after), {(STATE, 'operators')}, []
    for name, slots in expected(step).items():
        known |= slots
        if not slots & changes.keys():
            missing.append(name)
    operators = [set(each.owners[STATE][2]['operators']) for each in (before, after)]
    return dict(
        unexpected=sorted(name for slot, name in changes.items() if slot not in known),
        missing=missing,
        operators=sorted(operators[0] ^ operators[1]),
    )


def all_modules():
    return [name for name in sys.modules if name != '__main__']


def main():
    result = {}
    if sys.argv[1] == 'modules':
        importlib.import_module('mmubn')
        result['import mmubn'] = [name for name in all_modules() if name.partition('.')[0] == 'mmubn']
        result['argparse'] = [name for name in result['import mmubn'] if hasattr(sys.modules[name], 'argparse')]
        importing(*LOADED)()
        for step in STEPS.values():
            step()
        result['all'] = [name for name in all_modules() if name.partition('.')[0] != 'mmubn']
    else:
        importing(*LOADED)()
        for name in json.loads(Path(sys.argv[2]).read_text()):
            with contextlib.suppress(Exception):  # one that is no file, but made by another
                importlib.import_module(name)
        assert not any(name.partition('.')[0] == 'mmubn' for name in sys.modules)
        Snapshot()  # some libraries answer a look at what they have by an import
        build('mmengine.optim.OptimWrapper')  # torch and MMEngine change themselves when the first is built
        logging.getLogger('mmubn')  # a name alone, to which convert_norms writes
        before = Snapshot()
        for name, step in STEPS.items():
            step()
            after = Snapshot()
            result[name] = check(name, before, after)
            before = after
    print(json.dumps(result))


if __name__ == '__main__':
    main()
