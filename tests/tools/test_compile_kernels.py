"""tools/misc/compile_kernels.py: the kernels of a config, from its command line to Triton's cache."""

import re

import pytest
from cli import CONFIG, ROOT, call

pytest.importorskip('triton')

from mmubn.analysis import kernel_cache

TOOL = 'misc/compile_kernels.py'
CLASSIFIER = ROOT / 'configs' / 'digits' / 'resnet18-ubn_digits.py'


@pytest.fixture
def compiled(monkeypatch):
    """What would be compiled, in place of compiling it; tests/analysis/test_kernel_cache.py compiles."""
    found = []

    def compile_variants(variants, architectures, jobs):
        found.append((list(variants), architectures, jobs))
        return iter([variant for variant in variants for _ in architectures])

    monkeypatch.setattr(kernel_cache, 'compile_variants', compile_variants)
    return found


def test_summary(monkeypatch, capsys, tmp_path, compiled):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    assert call(monkeypatch, TOOL, CLASSIFIER, '--architecture', '80', '90', '--jobs', '3') == 0
    ((variants, architectures, jobs),) = compiled
    assert len(variants) == len(set(variants))
    assert (architectures, jobs) == ([80, 90], 3)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf'{len(variants)} variants for sm_80, sm_90 in \d+ s, in {tmp_path}', last)


def test_more_is_compiled_for_more_dtypes_and_layouts(monkeypatch, compiled):
    options = ['--architecture', '90', '--sizes', '32,32']
    assert call(monkeypatch, TOOL, CLASSIFIER, *options) == 0
    more = ['--dtype', 'fp32', 'bf16', '--memory-format', 'nchw', 'channels_last']
    assert call(monkeypatch, TOOL, CLASSIFIER, *options, *more) == 0
    few, many = (set(variants) for variants, *_ in compiled)
    assert few < many


ERRORS = {
    'no GPU': ([CONFIG], 'no GPU here.*--architecture'),
    'too old': ([CONFIG, '--architecture', '75'], 'must be 80 or more.*75'),
    'none': ([CONFIG, '--architecture', '83'], 'capability 8.3'),
    'no such config': (['none.py', '--architecture', '90'], 'none.py does not exist'),
    'no norm of ours': (
        [CONFIG, '--architecture', '90', '--cfg-options', 'model.backbone.norm_cfg.type=BN'],
        'no norm of mmubn',
    ),
}


@pytest.mark.parametrize('name', ERRORS)
def test_errors(monkeypatch, capsys, compiled, name):
    arguments, words = ERRORS[name]
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    assert call(monkeypatch, TOOL, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(words, error)
    assert not compiled


def test_without_triton(monkeypatch, capsys):
    find_spec = __import__('importlib.util').util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'triton' else find_spec(name))
    assert call(monkeypatch, TOOL, CONFIG, '--architecture', '90') == 2
    assert 'Triton is not installed' in capsys.readouterr().err
