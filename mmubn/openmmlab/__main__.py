"""Prints docs/patches.md: ``python -m mmubn.openmmlab > docs/patches.md``."""

from __future__ import annotations

import re
import textwrap

from mmubn.openmmlab import patches
from mmubn.openmmlab.patches import ADDITIONS, PATCHES, Patch

__all__ = ['page']

HEAD = """# What mmubn changes in other libraries

<!-- written by: python -m mmubn.openmmlab > docs/patches.md -->

`import mmubn` checks versions, registers its norms, ConvertNorms and two hooks, and changes another library only where
a model with one of these norms would otherwise be wrong without a word:
{on_import}.
Every other change below needs a step of its own.

**Optional changes** are those applied by `mmubn.openmmlab.install()`, or some of them by their names:
`mmubn.openmmlab.install('model-key', 'layout-report')`. The tools of this package call it. A config that is run by
other tools, those of MMDetection or MMPretrain, can only import:

    custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.installed'])

**To do without** a change, whatever asks for it, name it in an environment variable before Python starts. `all` stands
for all of them but [safe-reader](#safe-reader), which has an option; a name that is none is an error:

    {skip}=layout-report,model-key python tools/train.py ...

Each change is made once per process, and stays. This page is the table `PATCHES` of `mmubn/openmmlab/patches.py` in
words; a test compares the table with all that a new interpreter finds changed.
"""


def page() -> str:
    """The table in words, in Markdown."""
    on_import = ' and '.join(f'[{patch.name}](#{patch.name})' for patch in PATCHES if patch.when == patches.ON_IMPORT)
    lines = [HEAD.format(on_import=on_import, skip=patches.SKIP)]
    lines += ['| Change | Applied by | Of |', '| --- | --- | --- |']
    lines += [f'| [{patch.name}](#{patch.name}) | {_marked(patch.when)} | {_library(patch)} |' for patch in PATCHES]
    for patch in PATCHES:
        lines += ['', f'## {patch.name}', '', _wrapped(patch.why), '', *_bullets(patch)]
    lines += ['', '## What is added', '', 'New entries, beside those that were there:', '']
    lines += ['| Where | What | Added by |', '| --- | --- | --- |']
    for addition in ADDITIONS:
        names = ', '.join(f'`{name}`' for name in addition.names)
        lines.append(f'| `{addition.place}` | {names} | {_marked(addition.when)} |')
    return '\n'.join(lines) + '\n'


def _bullets(patch: Patch) -> list[str]:
    changed = ', '.join(f'`{symbol}`' for symbol in patch.symbols)
    if patch.importers:
        copies = ', '.join(f'`{symbol}`' for symbol in patch.importers)
        changed += f', and its copies where they are loaded: {copies}'
    texts = {
        'Changed': f'{changed}.',
        'Applied by': f'{_marked(patch.when)}.',
        'Models without a norm of mmubn': patch.others,
        'Versions': f'{patch.versions}.',
        'Without it': patch.switch_off,
    }
    return [_wrapped(f'- {title}: {text}', '  ') for title, text in texts.items()]


def _marked(when: str) -> str:
    """``when`` with its code marked as code."""
    return re.sub(r'^(import [\w.]+|[\w.]+\(\)|--amp)', r'`\1`', when)


def _wrapped(text: str, indent: str = '') -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _library(patch: Patch) -> str:
    return patch.symbols[0].partition('.')[0]


if __name__ == '__main__':
    print(page(), end='')
