"""The site that `make docs` builds of README, docs/, the configs' READMEs and the docstrings."""

from mmubn import __version__

# The source folder is the repository, so that the links of its Markdown files are right here too.
include_patterns = ['README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'docs/**', 'configs/*/README.md']
exclude_patterns = ['docs/results/**/README.md']
root_doc = 'README'

project = 'mmubn'
version = release = __version__
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',  # docstrings in Google's style
    'sphinx.ext.mathjax',
    'sphinx-mathjax-offline',  # the equations of a site that is read without a network
    'sphinx_copybutton',
]

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4  # as on GitHub
suppress_warnings = ['myst.header']  # the READMEs of configs begin with a heading and go on with tables

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
napoleon_numpy_docstring = False

html_theme = 'furo'
html_static_path = ['site.css']
html_css_files = ['site.css']
html_title = f'mmubn {version}'
html_extra_path = ['index.html']
html_show_copyright = False


# README is the first page. It lists the pages in words; this is the list for the site's margin.
CONTENTS = """
```{toctree}
:hidden:
:caption: Use it
docs/getting-started
docs/own-data
docs/using-ubn
docs/convert
docs/padding
docs/checkpoints
docs/deployment
```
```{toctree}
:hidden:
:caption: What it is and does
docs/method
docs/results
docs/performance
docs/reproduce
```
```{toctree}
:hidden:
:caption: With other code
docs/compatibility
docs/compatibility-tests
docs/foreign-code
docs/patches
```
```{toctree}
:hidden:
:caption: Inside
docs/api
docs/architecture
docs/extending
CONTRIBUTING
CHANGELOG
```
```{toctree}
:hidden:
:glob:
:caption: Configs
configs/*/README
```
"""


def add_contents(app, docname, source):
    if docname == root_doc:
        source[0] += CONTENTS


def setup(app):
    app.connect('source-read', add_contents)
