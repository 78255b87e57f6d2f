"""Files that a tool writes: whether it can, asked before its work, and all of them or none. Needs no other package."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ['replacing', 'unwritable', 'write_files']


def unwritable(path: Path) -> str:
    """Say why no file can be written at ``path``; an empty text where one can. Leaves nothing behind."""
    if path.is_dir():
        return f'{path} is a folder'
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f'{folder} is no folder'
    try:
        # A try says more than the permissions do: root has them all, and a file system may be read-only.
        with tempfile.TemporaryFile(dir=folder):
            return ''
    except OSError as error:
        return f'in the folder {folder}: {error.strerror}'


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files, in folders that may be new; those that are there stay as they are until all new ones are whole.

    Raises:
        OSError: One cannot be written.
    """
    drafts = {path: path.with_name(f'.{path.name}.part') for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            drafts[path].write_bytes(content)
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            if draft.is_file():
                draft.unlink()


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder of the same name in ``FOLDER.new``, which takes the place of ``folder`` at the end.

    Until then ``folder`` stays as it is. After an error or a kill the new folder is left beside it; the next start
    removes it. Configs and ``last_checkpoint`` in the new folder name the place that it takes.

    Raises:
        OSError: The folder cannot be written, or is no folder.
        BlockingIOError: Another process fills the new folder.
    """
    outer, old = (folder.with_name(f'{folder.name}{suffix}') for suffix in ('.new', '.old'))
    new = outer / folder.name  # the name is in titles and legends
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f'{folder} is no folder')
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    outer.mkdir(parents=True, exist_ok=True)
    lock = os.open(outer, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f'another process is writing {outer}') from error
        if new.exists():
            shutil.rmtree(new)
        new.mkdir()
        yield new
        for path in (*new.rglob('*.py'), new / 'last_checkpoint'):
            if path.is_file():
                path.write_text(path.read_text().replace(str(new), str(folder)))
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        outer.rmdir()
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(lock)
