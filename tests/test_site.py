"""The site of `make docs`: built without a warning or a network, with every page and every public name."""

import re
import socket
from pathlib import Path

import pytest

pytest.importorskip('sphinx')

from sphinx.cmd.build import build_main

import mmubn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')

    def refused(*args):
        raise OSError('the build asked for the network')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, 'connect', refused)
        status = build_main(['-q', '-W', '--keep-going', '-c', str(ROOT / 'docs'), str(ROOT), str(folder)])
    assert status == 0, 'Sphinx warned: see its lines above'
    return folder


def test_pages(site):
    assert 'url=README.html' in (site / 'index.html').read_text()
    for page in [*(ROOT / 'docs').glob('*.md'), *(ROOT / 'configs').glob('*/README.md')]:
        assert (site / page.relative_to(ROOT)).with_suffix('.html').is_file()


def test_public_names_have_their_docstrings(site):
    text = (site / 'docs' / 'api.html').read_text()
    for name in set(mmubn.__all__) - {'__version__'}:
        assert f'id="mmubn.{name}"' in text


def test_equations_are_drawn_without_a_network(site):
    for page in ('docs/method.html', 'docs/api.html'):
        text = (site / page).read_text()
        assert 'class="math ' in text
        (script,) = re.findall(r'src="([^"]*mathjax[^"]*)"', text)
        assert ((site / page).parent / script.partition('?')[0]).is_file()


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(r'(?:<script[^>]* src|<link[^>]* rel="stylesheet"[^>]* href|<img[^>]* src)="(?:https?:)?//')
    for page in site.rglob('*.html'):
        assert not fetched.search(page.read_text()), page
