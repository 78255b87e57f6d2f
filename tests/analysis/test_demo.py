"""mmubn.analysis.demo: an earlier result is there until a new one is. test_outputs.py has the renames."""

import os
import signal
import sys
from pathlib import Path

import pytest

from mmubn.analysis.demo import new_result
from mmubn.cli import UsageError


@pytest.fixture
def own_signals():
    """What runs in the background ignores an interrupt, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('earlier', [True, False])
@pytest.mark.parametrize(
    ('stop', 'error'),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit),
        (lambda: os.kill(os.getpid(), signal.SIGINT), SystemExit),
        (lambda: sys.exit('error: the command above ended with status 2'), SystemExit),
        (lambda: Path('/proc/new').touch(), OSError),
    ],
)
def test_a_demo_that_does_not_end_says_what_is_where(tmp_path, capsys, earlier, stop, error, own_signals):
    folder = tmp_path / 'demo'
    if earlier:
        folder.mkdir()
        (folder / 'result').touch()

    def run():
        with new_result(folder) as new:
            (new / 'log').touch()
            stop()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        run()
    assert signal.getsignal(signal.SIGTERM) is before
    text = capsys.readouterr().err
    assert f'the demo did not come to its end: what it did is in {folder}.new/demo; ' in text
    assert (f'still in {folder}.' if earlier else 'there is no earlier one.') in text
    assert (folder / 'result').exists() == earlier
    assert (tmp_path / 'demo.new' / 'demo' / 'log').exists()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / 'demo').touch()
    with pytest.raises(UsageError, match=f'{tmp_path}/demo cannot be written: {tmp_path}/demo is no folder'):
        new_result(tmp_path / 'demo').__enter__()
