"""How the C++ kernels are compiled and kept, and what happens where they are not to be had."""

from __future__ import annotations

import concurrent.futures
import os
import re
import time
from pathlib import Path

import pytest
import torch

import mmubn
from mmubn import ops
from mmubn.ops.cpp import CppBackend, boundary, library


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of sources that are quickly compiled. ``answer()`` is 42."""
    folder = tmp_path / 'sources'
    folder.mkdir()
    (folder / 'kernels.cpp').write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (folder / 'answer.h').write_text('#define ANSWER 42\n')
    monkeypatch.setattr(library, 'SOURCES', folder)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    return folder


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As at the start of a process, with an empty cache, in this folder."""
    monkeypatch.setattr(library._first_use, 'outcomes', {})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    return tmp_path / 'cache'


def reported(capsys):
    return capsys.readouterr().err.splitlines()


def test_compiled_once(tmp_path, sources):
    """A second load finds the file; a change of any source does not."""
    folder = tmp_path / 'cache'
    assert library.load(folder).answer() == 42
    (built,) = folder.iterdir()
    before = built.stat().st_mtime_ns
    library.load(folder)
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [before]
    (sources / 'answer.h').write_text('#define ANSWER 43\n')
    assert library.load(folder).answer() == 43
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize('change', ['cut off', 'empty', 'changed', 'no library'])
def test_a_file_with_other_content_is_compiled_again(tmp_path, sources, capsys, change):
    folder = tmp_path / 'cache'
    library.load(folder)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.unlink()  # a new file: the old one is loaded
    wrong = dict(zip(('cut off', 'empty', 'changed'), (whole[: len(whole) // 2], b'', whole + b'\0'), strict=True))
    path.write_bytes(wrong.get(change, b'garbage'))
    path.chmod(0o700)
    changed = path.with_name(path.name.replace(path.stem[-16:], '0123456789abcdef'))
    changed.write_bytes(whole)
    other = folder / 'kernels-of-another-key-0123456789abcdef.so'
    other.write_bytes(b'')
    assert library.load(folder).answer() == 42
    assert len(reported(capsys)) == 2
    assert sorted(folder.iterdir()) == sorted([path, other])
    assert path.read_bytes() == whole


def test_a_file_that_another_process_removes(tmp_path, sources):
    """Found, and gone when it is read."""
    (tmp_path / f'kernels-{library._key(library._compiler())}-0123456789abcdef.so').symlink_to('nowhere')
    assert library.load(tmp_path).answer() == 42


def test_folder_and_file_are_for_this_user_alone(tmp_path, sources):
    before = os.umask(0)
    try:
        library.load(tmp_path / 'cache')
    finally:
        os.umask(before)
    (built,) = (tmp_path / 'cache').iterdir()
    assert (tmp_path / 'cache').stat().st_mode & 0o777 == 0o700
    assert built.stat().st_mode & 0o777 == 0o700
    assert library.load(tmp_path / 'cache').answer() == 42


@pytest.mark.parametrize('mode', [0o770, 0o702, 0o1777], ids=oct)
def test_a_folder_that_others_may_write_to(tmp_path, sources, mode):
    folder = tmp_path / 'cache'
    library.load(folder)
    folder.chmod(mode)
    message = rf'{folder} may be written to by other users.* run `chmod go-w {folder}` or set XDG_CACHE_HOME'
    with pytest.raises(RuntimeError, match=message):
        library.load(folder)
    folder.chmod(0o700)
    assert library.load(folder).answer() == 42


def test_a_file_that_others_may_write_to(tmp_path, sources):
    library.load(tmp_path)
    (path,) = tmp_path.glob('*.so')
    path.chmod(0o720)
    with pytest.raises(RuntimeError, match=rf'run `chmod go-w {path}` or set XDG_CACHE_HOME'):
        library.load(tmp_path)


@pytest.mark.parametrize('which', ['folder', 'file'])
def test_what_another_user_owns(tmp_path, sources, monkeypatch, which):
    folder = tmp_path / 'cache'
    library.load(folder)
    path = folder if which == 'folder' else next(folder.iterdir())
    if os.geteuid() == 0:  # root trusts itself alone
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, 'geteuid', lambda: 12345)
    with pytest.raises(RuntimeError, match=r'cache.* belongs to another user.* set XDG_CACHE_HOME to a folder of your'):
        library.load(folder)


def test_several_at_once(tmp_path, sources):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: library.load(tmp_path / 'cache').answer(), range(4)))
    assert found == [42] * 4
    assert all(path.name.startswith('kernels-') for path in (tmp_path / 'cache').iterdir())  # nothing half done


def test_several_threads_load_once(fresh, monkeypatch):
    loaded = []

    def load(folder):
        time.sleep(0.1)
        loaded.append(folder)
        return 'a library'

    monkeypatch.setattr(library, 'load', load)
    monkeypatch.setattr(boundary, 'bind', loaded.append)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: library.prepare(), range(4))) == [None] * 4
    assert loaded == [fresh / 'mmubn' / 'kernels', 'a library']


def test_a_source_that_does_not_compile(tmp_path, sources):
    (sources / 'answer.h').write_text('no C++\n')
    with pytest.raises(RuntimeError, match=r'cannot compile them: .*error'):
        library.load(tmp_path / 'cache')
    assert list((tmp_path / 'cache').iterdir()) == []


def test_compiling_is_reported(tmp_path, sources, monkeypatch, capsys):
    library.load(tmp_path / 'a')
    line = f'mmubn: compiling the C++ kernels for this machine, about 15 s; kept in {tmp_path / "a"}'
    assert reported(capsys) == [line]
    library.load(tmp_path / 'a')
    assert reported(capsys) == []
    monkeypatch.setenv('HOME', str(tmp_path))
    library.load(tmp_path / 'b')
    assert reported(capsys) == ['mmubn: compiling the C++ kernels for this machine, about 15 s; kept in ~/b']
    monkeypatch.setenv('LOCAL_RANK', '1')
    library.load(tmp_path / 'c')
    assert reported(capsys) == []


def test_where_they_are_kept(monkeypatch):
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    assert library.cache_folder() == Path.home() / '.cache' / 'mmubn' / 'kernels'
    monkeypatch.setenv('XDG_CACHE_HOME', '/elsewhere')
    assert library.cache_folder() == Path('/elsewhere/mmubn/kernels')


def test_asking_compiles_nothing(fresh, monkeypatch, capsys):
    def start(*args, **kwargs):
        raise AssertionError('a process was started')

    monkeypatch.setattr(library.subprocess, 'run', start)
    x = torch.zeros(2, 4, 3, 3)
    assert CppBackend().problem(x, 3) is None
    assert mmubn.backend_info(mmubn.UBN(4), x) == 'cpp: the C++ kernels handle this input'
    monkeypatch.setenv('CXX', 'no-such-compiler')
    reason = 'the C++ kernels are not there: there is no C++ compiler no-such-compiler'
    assert CppBackend().problem(x, 3) == reason
    assert mmubn.backend_info(mmubn.UBN(4), x) == f'torch: {reason}'
    assert not fresh.exists()
    assert reported(capsys) == []


def test_a_failure_is_reported_once(fresh, sources, monkeypatch, capsys):
    """A layer works all the same, and says why it is by torch's operators."""
    (sources / 'answer.h').write_text('no C++\n')
    layer, x = mmubn.UBN(4), torch.ones(2, 4, 3, 3)
    assert mmubn.backend_info(layer, x) == 'cpp: the C++ kernels handle this input'
    assert layer(x).shape == x.shape
    first, second = reported(capsys)
    assert first.startswith('mmubn: compiling the C++ kernels')
    head, tail = 'mmubn: ', "; torch's operators are used instead"
    reason = second.removeprefix(head).removesuffix(tail)
    assert second == head + reason + tail
    assert re.match(r'the C\+\+ kernels are not there: \S+ cannot compile them: .*error', reason)
    monkeypatch.setattr(library, 'load', None)  # nor is it tried again
    assert layer(x).shape == x.shape
    assert reported(capsys) == []
    assert mmubn.backend_info(layer, x) == f'torch: {reason}'
    assert CppBackend().prepare(x.device) == CppBackend().problem(x, 3) == reason
    with ops.use_backend('cpp'), pytest.raises(ValueError, match=r'are not there: .* leaves no other'):
        layer(x)


@pytest.mark.parametrize(
    ('environment', 'reason'),
    [
        (dict(CXX='no-such-compiler'), 'there is no C++ compiler no-such-compiler'),
        (dict(XDG_CACHE_HOME='/dev/null'), "[Errno 20] Not a directory: '/dev/null/mmubn/kernels'"),
    ],
    ids=['no compiler', 'no folder'],
)
def test_without_them_torch_computes(fresh, sources, monkeypatch, environment, reason):
    """A layer says why, and works."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    x = torch.ones(2, 4, 3, 3)
    assert mmubn.UBN(4)(x).shape == x.shape
    assert ops.name_and_reason(x, 3) == ('torch', f'the C++ kernels are not there: {reason}')


def test_a_library_that_does_not_fit_is_not_used(fresh, sources, capsys):
    """One that compiles, but has none of the functions."""
    x = torch.ones(2, 4, 3, 3)
    assert mmubn.UBN(4)(x).shape == x.shape
    assert 'has no function moments_size' in ops.name_and_reason(x, 3)[1]
    assert len(reported(capsys)) == 2


@pytest.mark.parametrize('content', [b'printf "compil\\351"', b'exit 3'], ids=['other encoding', 'silent failure'])
def test_a_compiler_of_few_words(fresh, sources, monkeypatch, capsys, content):
    """Whatever it prints: torch computes, and a line says why."""
    compiler = fresh.parent / 'compiler'
    compiler.write_bytes(b'#!/bin/sh\n' + content + b'\nexit 1\n')
    compiler.chmod(0o700)
    monkeypatch.setenv('CXX', str(compiler))
    assert mmubn.UBN(4)(torch.ones(2, 4, 3, 3)).shape == (2, 4, 3, 3)
    assert 'cannot compile them: it does not say why' in reported(capsys)[-1]


def test_a_compiler_that_is_no_command(fresh, monkeypatch):
    monkeypatch.setenv('CXX', "g++ 'foo")
    x = torch.ones(2, 4, 3, 3)
    assert 'CXX is no command: No closing quotation' in mmubn.backend_info(mmubn.UBN(4), x)
    assert mmubn.UBN(4)(x).shape == x.shape


def test_a_folder_that_others_may_write_to_is_known_before_the_first_use(fresh):
    fresh.joinpath('mmubn', 'kernels').mkdir(parents=True)
    fresh.joinpath('mmubn', 'kernels').chmod(0o770)
    assert 'may be written to by other users' in mmubn.backend_info(mmubn.UBN(4), torch.ones(2, 4, 3, 3))
