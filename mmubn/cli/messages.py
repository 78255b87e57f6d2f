"""What to say, in one line, of an error that another library raised.

Its own words are seldom enough: MMEngine does not say which dict of a config it was building, the text of an error in a
data-loader worker is a whole traceback, and an assertion may have no words at all.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import re
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any
from urllib.error import URLError

from mmengine.config import Config
from mmengine.registry import Registry
from torch.utils.data import DataLoader

from mmubn.openmmlab.arguments import arguments_of, did_you_mean, registered_names
from mmubn.openmmlab.config_types import find_dicts, find_type
from mmubn.openmmlab.hooks.sample_errors import no_batch

__all__ = ['first_cause', 'in_one_line', 'one_line_of', 'own_words', 'shortened', 'where', 'with_place']

LENGTH = 600  # characters; some libraries print whole configs
BUILDERS = {'build_from_cfg': 'cfg', 'build_dataloader': 'dataloader'}  # of MMEngine, and what each is given
SAYS_LITTLE = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, TypeError)
REMEDIES = {
    errno.ENOSPC: 'the disk is full: free some space, or write elsewhere',
    errno.EDQUOT: 'the quota of this disk is used up: free some space, or write elsewhere',
    errno.EACCES: 'change its permissions, or write elsewhere',
    errno.EROFS: 'write elsewhere',
}
# Of train_cfg and of the data loaders: the least that each can be. Their errors seldom name them.
LEAST = {'batch_size': 1, 'max_epochs': 1, 'max_iters': 1, 'num_workers': 0, 'prefetch_factor': 1, 'val_interval': 1}


def one_line_of(error: BaseException) -> str:
    """What happened, where in the config if it is known, and what to do if that is."""
    text = str(error)
    if 'Original Traceback' in text:  # that of a data-loader worker, and no other place is of use
        return shortened(_end_of_traceback(text))
    if isinstance(error, (URLError, ConnectionError, TimeoutError)) and (url := _url(error)) is not None:
        return _of_download(error, url)
    if isinstance(error, OSError) and error.strerror:
        return _of_os_error(error)
    text = re.sub(r'^(class `\w+` in \S+\.py: )+', '', own_words(error))  # MMEngine's prefixes (0.10.7)
    text = text.partition(', but expected one of:')[0]  # torch lists the signatures of the function
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text = f'{text} ({type(cause).__name__}: {cause})'
    number = _wrong_number(error)
    if number is not None:
        return shortened(f'{number} ({type(error).__name__}: {text})')
    if 'epoch_length` must be a positive integer, but got 0' in text and (empty := _of_no_batch(error)):
        return empty
    building = _building(error)
    if building is not None:
        return shortened(_of_config(error, text, building))
    text = f'{type(error).__name__}: {text}'.removesuffix(': ')
    if isinstance(error, SAYS_LITTLE):
        text += where(error)
    elif 'Connection closed by peer' in text or 'Connection reset by peer' in text:
        text += ' (another process of this run has ended: the cause is in its error)'
    return shortened(text)


def with_place(error: BaseException) -> str:
    """The words of an error of this package, after the key of the dict that was built where it was raised."""
    text = str(error)
    building = _building(error)
    return text if building is None or building[1] in text else f'{building[1]}: {text}'


def first_cause(error: BaseException) -> str:
    """The error with its first cause. MMEngine raises an error of its own for one of the module that it imports."""
    first = error
    while (cause := first.__cause__ or first.__context__) is not None:
        first = cause
    text = own_words(error)
    if own_words(first) in text:
        return shortened(text)
    cause = f' ({shortened(str(first), LENGTH // 2)})'
    return shortened(text, LENGTH - len(cause)) + cause


def shortened(text: str, length: int = LENGTH) -> str:
    """In one line of a length that can be read."""
    text = in_one_line(text)
    return text if len(text) <= length else f'{text[:length]}...'


def own_words(error: BaseException) -> str:
    """``str(error)``, which quotes the words of a KeyError."""
    return str(error.args[0]) if isinstance(error, KeyError) and len(error.args) == 1 else str(error)


def in_one_line(text: str) -> str:
    return ' '.join(text.split())


def _end_of_traceback(text: str) -> str:
    lines = text.splitlines()
    last_frame = max((i for i, line in enumerate(lines) if line.startswith('  File "')), default=-1)
    after = [line for line in lines[last_frame + 1 :] if not line.startswith('    ')]
    return ' '.join(after)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Those that the error went through, the innermost last."""
    each: BaseException | None = error
    while each is not None:
        for frame, _ in traceback.walk_tb(each.__traceback__):
            yield frame
        inner = each.__context__  # stock MMEngine raises the error of a part anew for each part that it is in
        each = inner if inner is not None and str(inner) in own_words(each) else None


def where(error: BaseException) -> str:
    """``' (FILE, line NUMBER: LINE)'``, where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    return ''.join(f' ({"/".join(each.filename.split("/")[-3:])}, line {each.lineno}: {each.line})' for each in place)


def _of_os_error(error: OSError) -> str:
    path = error.filename if error.filename is not None else _path_in(error)
    text = error.strerror or str(error)
    if path is not None:
        text = f'{text}: {os.fspath(path) if isinstance(path, os.PathLike) else path}'
    return shortened(f'{text}; {REMEDIES[error.errno]}' if error.errno in REMEDIES else text)


def _path_in(error: OSError) -> str | None:
    """The file that was written when the system named none, as for a full disk: what the code calls a path or file."""
    for frame in reversed(list(_frames(error))):
        for name, value in frame.f_locals.items():
            value = getattr(value, 'name', value) if name in ('f', 'file') else value
            if ('file' in name or 'path' in name or name == 'f') and isinstance(value, (str, os.PathLike)):
                return os.fspath(value)
    return None


def _config(error: BaseException) -> Config | None:
    values = (each for frame in _frames(error) for each in frame.f_locals.values())
    return next((each for each in values if isinstance(each, Config)), None)


def _url(error: BaseException) -> str | None:
    """What was downloaded."""
    values = [each for frame in _frames(error) for each in frame.f_locals.values() if isinstance(each, str)]
    return next((each for each in values if re.match(r'https?://\S+$', each)), None)


def _of_download(error: OSError, url: str) -> str:
    """The key too, of which the value is the URL or a name for it, such as torchvision://resnet50."""
    cfg = _config(error)
    names = {each for frame in _frames(error) for each in frame.f_locals.values() if isinstance(each, str)}
    dicts = find_dicts(cfg._cfg_dict) if cfg is not None else ()
    keys = [
        f'{place}.{key}'.removeprefix('.')
        for place, each in dicts
        for key, value in each.items()
        if isinstance(value, str) and '://' in value and value in names
    ]
    reason = getattr(error, 'reason', None) or error.strerror or error
    reason = getattr(reason, 'strerror', None) or reason
    owner = f'{keys[0]} ' if keys else ''
    remedy = f'and give {owner}the path of the file'
    key = f'{keys[0]}: ' if keys else ''
    return shortened(f'{key}cannot download {url}: {reason}; check the network, or download it by hand {remedy}.')


def _wrong_number(error: BaseException) -> str | None:
    """The key of a loop or data loader whose value is no number, or one that it cannot be."""
    cfg = _config(error)
    if cfg is None or not isinstance(error, (ArithmeticError, AssertionError, TypeError, ValueError)):
        return None
    for place in ('train_cfg', 'train_dataloader', 'val_dataloader', 'test_dataloader'):
        node = cfg.get(place)
        for key, least in LEAST.items() if isinstance(node, dict) else ():
            value = node.get(key)
            is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if value is not None and not (is_whole and value >= least):
                return f'{place}.{key} must be a whole number of at least {least}, got {value!r}'
    return None


def _building(error: BaseException) -> tuple[dict, str, FrameType] | None:
    """The dict that MMEngine was building something from, its key in the config, and MMEngine's frame.

    It is the innermost that the config has: classes build parts of themselves from dicts of their own.
    """
    cfg = _config(error)
    if cfg is None:
        return None
    frames = [frame for frame in _frames(error) if BUILDERS.get(frame.f_code.co_name) in frame.f_locals]
    places = list(find_dicts(cfg._cfg_dict))
    for frame in reversed(frames):
        node = frame.f_locals[BUILDERS[frame.f_code.co_name]]
        if not isinstance(node, dict):
            found = [f'{place}.{key}' for place, each in places if place for key in each if each[key] == node]
            return ({}, found[0], frame) if found else None
        found = [place for place, each in places if place and each == node]
        if not found:  # detectors add to the dicts of their parts
            inside = [(place, each) for place, each in places if place and each.get('type') is not None]
            found = [place for place, each in inside if all(key in node and node[key] == each[key] for key in each)]
        if found:
            return node, found[0], frame
    return None


def _of_config(error: BaseException, text: str, building: tuple[dict, str, FrameType]) -> str:
    node, place, frame = building
    if not node:
        return f'{place} must be a dict with a type, got {frame.f_locals["cfg"]!r}.'
    registry = frame.f_locals.get('registry')
    kind = DataLoader if frame.f_code.co_name == 'build_dataloader' else node.get('type')
    name = getattr(kind, '__name__', kind)
    if kind is None and isinstance(error, KeyError) and '"type"' in text:
        return f'{place} has no type: give it one (a dict with _delete_=True keeps none of its base).'
    if isinstance(kind, str) and isinstance(registry, Registry):
        if isinstance(error, KeyError) and f'{kind} is not in the ' in text:
            remedy = 'correct the name, or add the module that registers it to custom_imports'
            return f'{place}.type={kind!r} is not registered{did_you_mean(kind, registered_names(registry))}; {remedy}.'
        kind = find_type(kind, registry)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown is not None and unknown[1] in node:
        known = arguments_of(kind).names
        return f'{place}.{unknown[1]}: {name} has no such argument{did_you_mean(unknown[1], known) or "."}'
    if 'need at least one array to concatenate' in text:
        text = _of_no_images(error) or text
    if isinstance(error, SAYS_LITTLE):
        text = f'{type(error).__name__}: {text}{where(error)}'
    if isinstance(error, TypeError):
        text = f'{_no_integers(kind, node, place)}{text}'
    return f'{place} ({name}): {text}'


def _no_integers(kind: object, node: dict, place: str) -> str:
    """The arguments in a dict whose values are no integers, though their defaults are."""
    defaults: dict[str, Any] = {}
    for each in reversed(kind.__mro__) if isinstance(kind, type) else ():
        if '__init__' in vars(each) and each is not object:
            with contextlib.suppress(TypeError, ValueError):  # built in
                parameters = inspect.signature(each.__init__).parameters.values()
                defaults.update({one.name: one.default for one in parameters})
    wrong = [
        f'{place}.{key}={value!r} must be an integer; '
        for key, value in node.items()
        if isinstance(value, (float, str)) and type(defaults.get(key)) is int
    ]
    return ''.join(wrong)


def _of_no_images(error: BaseException) -> str | None:
    """MMEngine meets a data set without images when it joins them to one array."""
    owners = (each.f_locals['self'] for each in _frames(error) if each.f_code.co_name == '_serialize_data')
    for dataset in owners:
        keys = dict(ann_file=dataset.ann_file, filter_cfg=dataset.filter_cfg, indices=dataset._indices)
        told = ', '.join(f'{key}={value!r}' for key, value in keys.items() if value not in (None, '', {}))
        return (
            f'no images are left of it ({told}): filter_cfg leaves out images without objects of the classes and '
            'small ones; correct metainfo.classes, ann_file, filter_cfg or indices.'
        )
    return None


def _of_no_batch(error: BaseException) -> str | None:
    """MMEngine meets a data loader without a batch when it counts the iterations of schedulers."""
    loaders = (getattr(each.f_locals.get('self'), 'train_dataloader', None) for each in _frames(error))
    loader = next((each for each in loaders if isinstance(each, DataLoader)), None)
    return None if loader is None else no_batch(loader)
