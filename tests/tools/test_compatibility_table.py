"""docs/compatibility-tests.md is what the names of the tests say."""

import re
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
    (tmp_path / 'compatibility-tests.md').write_text('# Compatibility')
    result = run(sys.executable, copy, '--check')
    assert result.returncode == 1
    assert 'out of date' in result.stdout


def test_each_area_has_a_line_in_short():
    in_short, in_full = (
        (ROOT / 'docs' / f'{name}.md').read_text() for name in ('compatibility', 'compatibility-tests')
    )
    areas = re.findall(r'^## (.+)$', in_full, re.MULTILINE)
    assert re.findall(r'^\| \[(.+?)\]\(compatibility-tests.md#', in_short, re.MULTILINE) == areas
