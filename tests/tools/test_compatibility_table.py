"""docs/compatibility.md is what the names of the tests say."""

import sys

from cli import ROOT, run

SCRIPT = ROOT / 'tools' / 'misc' / 'compatibility_table.py'


def test_the_document_is_up_to_date():
    result = run(sys.executable, SCRIPT, '--check')
    assert result.returncode == 0, result.stdout


def test_an_outdated_document_would_be_seen(tmp_path):
    script = SCRIPT.read_text()
    copy = tmp_path / 'tools' / 'misc' / 'compatibility_table.py'
    copy.parent.mkdir(parents=True)
    copy.write_text(script.replace("ROOT / 'docs'", f'Path({str(tmp_path)!r})'))
    for name in ('tests', 'requirements'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'compatibility.md').write_text('# Compatibility')
    result = run(sys.executable, copy, '--check')
    assert result.returncode == 1
    assert 'out of date' in result.stdout
