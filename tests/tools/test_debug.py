"""Every tool that reports errors in one line has --debug, which shows the traceback instead."""

import pytest
from cli import ROOT, call

# Arguments that are an error, in an empty folder.
ERRORS = {
    'train.py': ['gone.py'],
    'test.py': ['gone.py', 'gone.pth'],
    'misc/compile_kernels.py': ['gone.py', '--architecture', '90'],
    'misc/print_config.py': ['gone.py'],
    'misc/write_results.py': ['--from', 'gone'],
    'model_converters/convert_norm.py': ['gone.pth', 'new.pth', '--to', 'bn'],
    'analysis_tools/compare_norms.py': ['gone.yml'],
    'analysis_tools/make_report.py': ['gone'],
    'analysis_tools/measure_cost.py': ['gone.yml', '--sweeps', 'norms'],
    'analysis_tools/measure_padding.py': ['gone.yml', '--pad', '256'],
    'analysis_tools/plot_condensation.py': ['gone', '--out', 'new.png'],
    'analysis_tools/plot_curves.py': ['gone', '--out', 'new.png'],
    'analysis_tools/time_to_accuracy.py': ['--reference', 'gone', '--runs', 'gone'],
}
DEMOS = {'demo.py', 'demo_classification.py'}  # their errors are those of the tools that they start


def test_no_tool_is_left_out():
    scripts = {path for path in (ROOT / 'tools').rglob('*.py') if 'run_tool(parse_args, main)' in path.read_text()}
    assert {str(path.relative_to(ROOT / 'tools')) for path in scripts} == ERRORS.keys() | DEMOS


@pytest.mark.parametrize('name', sorted([*ERRORS, *DEMOS]))
def test_help_names_it(name, monkeypatch, capsys):
    assert call(monkeypatch, name, '--help') == 0
    assert '--debug ' in capsys.readouterr().out


@pytest.mark.parametrize('name', ERRORS)
def test_an_error(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, name, *ERRORS[name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ')
    assert 'gone' in line

    assert call(monkeypatch, name, *ERRORS[name], '--debug') == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == 'Traceback (most recent call last):'
    assert lines[-1] == f'mmubn.cli.errors.UsageError: {line.removeprefix("error: ")}'
    assert not any(tmp_path.iterdir())
