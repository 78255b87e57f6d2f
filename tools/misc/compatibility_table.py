"""Write docs/compatibility-tests.md from the names of the tests, so that it says what is tested and nothing else.

docs/compatibility.md, which has a line for each area, is written by hand.

Example:

    python tools/misc/compatibility_table.py          # write
    python tools/misc/compatibility_table.py --check  # end with status 1 where the file is out of date
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = ROOT / 'docs' / 'compatibility-tests.md'
AREAS = {
    'Checkpoints': [f'tests/checkpoints/test_{name}.py' for name in ('conversion', 'layouts', 'loading', 'overlay')],
    'Checkpoints that could run a program': [
        'tests/openmmlab/test_safe_reader.py',
        'tests/tools/test_trust_checkpoint.py',
    ],
    'MMDetection and MMPretrain': [
        'tests/test_traps.py',
        'tests/openmmlab/test_registration.py',
        'tests/layers/test_contract.py',
        'tests/openmmlab/test_config_types.py',
    ],
    'MMSegmentation': ['tests/test_mmseg.py'],
    'MMRotate': ['tests/test_mmrotate.py'],
    'Code written for BatchNorm2d': [
        'tests/layers/test_as_batch_norm.py',
        'tests/openmmlab/test_freezing.py',
        'tests/layers/test_transforms.py',
    ],
    'Tools and the command line': [
        'tests/tools/test_train_and_test.py',
        'tests/tools/test_convert_norm.py',
        'tests/openmmlab/test_pretrained.py',
    ],
    'Installed without a clone': ['tests/test_distribution.py', 'tests/openmmlab/test_own_configs.py'],
    'Resuming and faults': ['tests/openmmlab/hooks/test_resumed_model.py', 'tests/tools/test_faults.py'],
    'Converted models': ['tests/test_convert.py', 'tests/openmmlab/test_convert_norms.py'],
    'What would replace UBN': [
        'tests/openmmlab/test_sync_guards.py',
        'tests/openmmlab/test_folding.py',
        'tests/layers/test_replacement.py',
        'tests/layers/test_tracing.py',
    ],
    'timm': ['tests/test_timm.py'],
    'Several processes': ['tests/layers/test_sync_ubn.py'],
    'Mixed precision, versions, loading': [
        f'tests/openmmlab/test_{name}.py' for name in ('mixed_precision', 'versions', 'loading')
    ],
    'Activation checkpointing': ['tests/layers/test_recomputation.py'],
    'Compile, export, fold': ['tests/test_deploy.py', 'tests/test_detector_export.py'],
    'TorchScript, quantization, pruning': [
        'tests/test_torchscript.py',
        'tests/test_quantization.py',
        'tests/layers/test_pruning.py',
    ],
    'Parameter and FLOP counters': ['tests/openmmlab/test_counters.py', 'tests/layers/test_flop_counter.py'],
}
LOCKED = (
    'torch',
    'torchvision',
    *(f'onedl-{name}' for name in ('mmengine', 'mmcv', 'mmdetection', 'mmpretrain', 'mmsegmentation', 'mmrotate')),
)

# What was run by hand: pytest with these packages ahead on PYTHONPATH, mmcv compiled for this torch.
STOCK = (
    'and, but for "Tools and the command line" and "Resuming and faults", with OpenMMLab\'s own mmengine 0.10.7, '
    'mmcv 2.1.0, mmdet 3.3.0 and mmpretrain 1.2.0 on torch 2.12.0 (2026-11-21).'
)


def tests(path: Path) -> Iterator[tuple[str, str, str]]:
    """Find the tests of a file: name for pytest, name as a sentence, and whether it is about a refusal."""
    for node in ast.parse(path.read_text()).body:
        group = [node]
        scope = ()
        if isinstance(node, ast.ClassDef):
            group, scope = node.body, (node.name,)
        for function in group:
            if isinstance(function, ast.FunctionDef) and function.name.startswith('test_'):
                subject = [re.sub(r'(?<=[a-z0-9])(?=[A-Z])', ' ', name.removeprefix('Test')) for name in scope]
                sentence = ': '.join([*subject, function.name.removeprefix('test_').replace('_', ' ')])
                refused = re.search(r'refus|error|broken|missing', sentence)
                yield '::'.join([*scope, function.name]), sentence, 'refused' if refused else 'supported'


def document() -> str:
    lock = (ROOT / 'requirements' / 'lock.txt').read_text()
    versions = [re.search(rf'^({name})={{2,3}}([\w.]+)', lock, re.MULTILINE).groups() for name in LOCKED]
    lines = [
        '# Compatibility, test by test',
        '',
        'Each line is a test of that name: of what is supported or, by an error that says what to do, refused.',
        '[Compatibility](compatibility.md) has it in short. `make test-all` runs them;',
        '`python tools/misc/compatibility_table.py` writes this page.',
        '',
        'Tested on the CPU with:',
        '',
        *(f'- {name} {version}' for name, version in versions),
        '',
        STOCK,
    ]
    for area, files in AREAS.items():
        lines += ['', f'## {area}', '', '| what | verdict | test |', '|---|---|---|']
        for file in files:
            lines += [f'| {what} | {verdict} | `{file}::{name}` |' for name, what, verdict in tests(ROOT / file)]
    return '\n'.join([*lines, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--check', action='store_true', help='only compare')
    args = parser.parse_args()
    if not DOCUMENT.is_file():
        sys.exit(f'{DOCUMENT} does not exist: it is made from the tests of a clone of mmubn')
    if args.check:
        if DOCUMENT.read_text() != document():
            sys.exit('docs/compatibility-tests.md is out of date: python tools/misc/compatibility_table.py writes it')
        return
    DOCUMENT.write_text(document())


if __name__ == '__main__':
    main()
