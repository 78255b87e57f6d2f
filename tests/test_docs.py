"""README, docs/ and the READMEs of configs/: links lead somewhere, and every block is run or says what it needs.

A block of bash or Python has one of these:

    # needs: COCO in data/coco, 8 GPUs         its first line, for the reader
    <!-- run by: tests/test_x.py::test_y -->   the line before it, or the one below the page's title for all its blocks

What the commands name is checked whether or not they are run: tools, their options, configs and their keys, and files,
which an earlier command of the page must make.
"""

import ast
import doctest
import functools
import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import mmdet
import mmengine.config.utils
import pytest
import torch
import yaml
from cli import ROOT
from markdown_it import MarkdownIt
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import nn

import mmubn.openmmlab
from mmubn.analysis.sweeps import SweepRun, read_sweeps
from mmubn.cli.config import load_config
from mmubn.openmmlab.config_checks import check_norm_types, check_norms_used

PAGES = [ROOT / 'README.md', ROOT / 'CHANGELOG.md', *sorted((ROOT / 'docs').glob('*.md'))]
PAGES += sorted((ROOT / 'configs').glob('*/README.md'))
GETTING_STARTED, USING_UBN, EXTENDING, FOREIGN_CODE = (
    ROOT / 'docs' / f'{name}.md' for name in ('getting-started', 'using-ubn', 'extending', 'foreign-code')
)


def name_of(page):
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize('page', PAGES, ids=name_of)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    run_by: re.Match | None

    @property
    def needs(self):
        """What the reader must have for it."""
        needs = re.match('# needs: (.+)', self.text)
        return needs and needs[1]

    @property
    def file_name(self):
        """The name to save it under, of a block that begins with one."""
        name = re.match(r'# (\S+\.(?:py|yml))\n', self.text)
        return name and name[1]


@functools.cache
def parse(page):
    return MarkdownIt().enable('table').parse(page.read_text())


def blocks(page, *languages):
    tokens = parse(page)
    marks = [re.fullmatch(r'<!-- run by: (.+?)(?:::(.+))? -->', token.content.strip()) for token in tokens]
    of_page = marks[3]  # after the three tokens of the title
    found = [
        Block(token.info, token.content, marks[i - 1] or of_page)
        for i, token in enumerate(tokens)
        if token.type == 'fence'
    ]
    return [block for block in found if not languages or block.language in languages]


# ---- links


def anchors(page):
    """Of its headings, as GitHub makes them."""
    tokens = parse(page)
    titles = [
        ''.join(part.content for part in tokens[i + 1].children if part.type in ('text', 'code_inline'))
        for i, token in enumerate(tokens)
        if token.type == 'heading_open'
    ]
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@each_page
def test_links_lead_somewhere(page):
    parts = [part for token in parse(page) for part in token.children or ()]
    targets = [part.attrs.get('href') or part.attrs.get('src') for part in parts if part.attrs]
    for target in targets:
        if '://' in target:
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f'{target} leads nowhere'
        assert file.is_relative_to(ROOT), f'{target} leads out of the repository'
        assert not anchor or anchor in anchors(file), f'{target}: {name_of(file)} has no such heading'


# ---- blocks


def names_of_tests(path):
    """Names of the tests and of the classes of tests in a file, as pytest calls them."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
            yield from (f'{node.name}::{child.name}' for child in node.body if isinstance(child, ast.FunctionDef))


@each_page
def test_every_block_is_run_or_says_what_it_needs(page):
    for block in blocks(page):
        # {eval-rst}: of the site alone, which tests/test_site.py builds
        assert block.language in ('', 'text', 'bash', 'python', 'yaml', '{eval-rst}'), (
            f'no block of this language is checked:\n{block}'
        )
        if block.language == 'yaml':
            assert block.file_name, f'no command reads a file that has no name:\n{block.text}'
        if block.language not in ('bash', 'python') or block.needs:
            continue
        assert block.run_by, (
            f'begin it with "# needs: ...", or name a test before it, "<!-- run by: ... -->":\n{block.text}'
        )
        file, test = block.run_by.groups()
        assert (ROOT / file).is_file(), f'{file} does not exist'
        assert test in {None, *names_of_tests(ROOT / file)}, f'{file} has no {test}'


@pytest.mark.parametrize('page', [page for page in PAGES if '>>> ' in page.read_text()], ids=name_of)
def test_examples(page):
    names = {'mmubn': mmubn, 'torch': torch}
    test = doctest.DocTestParser().get_doctest(page.read_text(), names, page.name, str(page), 0)
    assert doctest.DocTestRunner().run(test).failed == 0


# ---- commands

# Bash goes through loops and variables; the commands that it comes to are written down, a line each, and not run.
WRITE_DOWN = r"""
command_not_found_handle() { printf '%s\0' "$@"; echo; }
for name in cd tools/*.sh; do eval "$name() { command_not_found_handle $name \"\$@\"; }"; done
PATH=/nowhere
"""


def commands(script):
    result = subprocess.run(['bash', '-euc', WRITE_DOWN + script], capture_output=True, text=True)
    assert result.returncode == 0, f'{result.stderr}\n{script}'
    return [line.split('\0')[:-1] for line in result.stdout.splitlines()]


# The arguments of a tool that name what it reads, and what it writes.
READS_AND_WRITES = {
    'tools/train.py': ('', ''),
    'tools/test.py': ('checkpoint', 'out'),
    'tools/demo_classification.py': ('', ''),
    'tools/misc/compile_kernels.py': ('', ''),
    'tools/misc/print_config.py': ('', 'save_path'),
    'tools/dataset_converters/digits_to_coco.py': ('', 'out_dir'),
    'tools/dataset_converters/digits_to_imagefolder.py': ('', 'out_dir'),
    'tools/model_converters/convert_norm.py': ('src', 'dst'),
    'tools/analysis_tools/benchmark_norm.py': ('', 'out'),
    'tools/analysis_tools/compare_norms.py': ('sweeps_file', 'work_dir'),
    'tools/analysis_tools/count_launches.py': ('', ''),
    'tools/analysis_tools/host_time.py': ('', ''),
    'tools/analysis_tools/inspect_kernels.py': ('', ''),
    'tools/analysis_tools/make_report.py': ('work_dir', 'out'),
    'tools/analysis_tools/measure_cost.py': ('sweeps_file work_dir', ''),
    'tools/analysis_tools/measure_padding.py': ('sweeps_file work_dir', ''),
    'tools/analysis_tools/plot_condensation.py': ('runs', 'out'),
    'tools/analysis_tools/plot_curves.py': ('runs', 'out'),
    'tools/analysis_tools/time_to_accuracy.py': ('reference runs', 'out'),
    'tools/check_gpu.py': ('', 'out'),
}


METAFILES = [yaml.safe_load(path.read_text()) for path in (ROOT / 'configs').glob('*/metafile.yml')]


@functools.cache
def functions_of(tool):
    # As Python starts a script: its folder is where it imports from first.
    with mock.patch.object(sys, 'path', [str(Path(tool).resolve().parent), *sys.path]):
        return runpy.run_path(tool)


class Reader:
    """Follows a page without running anything: each command must find what it reads, and leaves what it writes."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)  # what the machine lacks, the block says it needs

    def follow(self, page):
        for block in blocks(page, 'bash', 'python', 'yaml'):
            if block.file_name:
                Path(block.file_name).write_text(block.text)
            elif block.language == 'bash':
                for words in commands(block.text):
                    self._run(words, block.needs or '')

    def _run(self, words, needs):
        match words:
            case ['git' | 'pip' | 'cd', *_]:
                pass
            case ['make', target]:
                assert re.search(f'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE), f'no target {target}'
            case ['mkdir', '-p', *folders]:
                for folder in folders:
                    Path(folder).mkdir(parents=True, exist_ok=True)
            case ['cp', source, target]:
                shutil.copy(source, target)
            case ['tools/dist_train.sh', config, _processes, *rest]:
                self._tool('tools/train.py', [config, *rest], needs)
            case ['tools/dist_test.sh', config, checkpoint, _processes, *rest]:
                self._tool('tools/test.py', [config, checkpoint, *rest], needs)
            case ['tools/slurm_train.sh', _partition, _job_name, config, work_dir, *rest]:
                self._tool('tools/train.py', [config, '--work-dir', work_dir, *rest], needs)
            case ['mim', 'run', 'mmubn', name, *arguments]:
                (tool,) = Path('tools').glob(f'*/{name}.py')
                self._tool(str(tool), arguments, needs)
            case ['mim', 'train', 'mmubn', config, *arguments]:
                self._tool('tools/train.py', [self._found(config), *arguments], needs)
            case ['mim', 'test', 'mmubn', config, '--checkpoint', checkpoint, *arguments]:
                self._tool('tools/test.py', [self._found(config), checkpoint, *arguments], needs)
            case ['mim', 'download', 'mmubn', '--config', config, '--dest', _]:
                self._found(f'{config}.py')
            case ['mim', 'search', 'mmubn', '--model', model]:
                assert model in {each['Collections'][0]['Name'].lower() for each in METAFILES}, f'no model {model}'
            case ['python', '-m', 'pytest', path, *_]:
                assert Path(path).is_file(), f'{path} does not exist'
            case ['python', '-m', module]:
                assert importlib.util.find_spec(f'{module}.__main__'), f'no module {module}'
            case ['python', tool, *_] if '/.mim/' in tool:  # of MMDetection, below what the page asks Python for
                assert (Path(mmdet.__file__).parent / tool[tool.index('.mim') :]).is_file(), f'{tool} does not exist'
            case ['python', script] if not script.startswith('tools/'):
                assert Path(script).is_file(), f'{script} does not exist'
            case ['python', tool, *arguments]:
                self._tool(tool, arguments, needs)
            case _:
                pytest.fail(f'what does this run? {words}')

    def _found(self, config):
        """As mim finds it."""
        path = Path(config)
        return str(path if path.is_file() else next(Path('configs').glob(f'*/{config}')))

    def _tool(self, tool, arguments, needs):
        self._monkeypatch.setattr(sys, 'argv', [tool, *arguments])
        args = functions_of(tool)['parse_args']()
        reads, writes = (self._paths(args, names) for names in READS_AND_WRITES[tool])
        for path in reads:
            assert path.exists() or str(path) in needs, f'{tool} {" ".join(arguments)}: no command before made {path}'
        for path in writes:
            folder = path.parent if path.suffix else path
            folder.mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.touch()
        if hasattr(args, 'config'):
            cfg = load_config(args) if '::' in args.config else self._config(args)
        if tool == 'tools/train.py':
            work_dir = Path(args.work_dir or f'work_dirs/{Path(args.config).stem}')
            work_dir.mkdir(parents=True, exist_ok=True)
            schedule = cfg.train_cfg
            last = f'epoch_{schedule.max_epochs}' if 'max_epochs' in schedule else f'iter_{schedule.max_iters}'
            (work_dir / f'{last}.pth').touch()
            if metric := cfg.default_hooks.checkpoint.get('save_best'):
                (work_dir / f'best_{metric.replace("/", "_")}_epoch_1.pth').touch()
        if tool == 'tools/analysis_tools/compare_norms.py':
            for sweep in read_sweeps(args.sweeps_file, args.sweeps, args.seeds):
                for run in sweep.runs:
                    run.folder(args.work_dir).mkdir(parents=True, exist_ok=True)

    def _config(self, args):
        """The config, in which the keys of --cfg-options and the arguments of norms must be known."""
        path = str(Path(args.config).resolve())
        return SweepRun(sweep='', label='', seed=0, config=path, gpus=1, options=args.cfg_options or {}).load()

    def _paths(self, args, names):
        values = [getattr(args, name) for name in names.split()]
        return [Path(path) for value in values if value for path in (value if isinstance(value, list) else [value])]


# MMEngine reads all metafiles of a package, 0.2 s, for each of its configs that it comes across.
read_metafile = functools.cache(mmengine.config.utils.load)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the repository, as far as a page needs one, with what a page registers forgotten afterwards."""
    for name in ('configs', 'docs', 'tests', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(MODELS, '_module_dict', dict(MODELS.module_dict))
    monkeypatch.setattr(mmengine.config.utils, 'load', read_metafile)
    yield tmp_path
    sys.modules.pop('my_norms', None)


@each_page
def test_commands_name_what_is_there(page, folder, monkeypatch):
    if package := {'fcn': 'mmseg', 'rotated_retinanet': 'mmrotate'}.get(page.parent.name):
        pytest.importorskip(package)
    mmubn.openmmlab.install('config-packages')  # as the tools do
    Reader(monkeypatch).follow(page)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_getting_started_runs(folder):
    for block in blocks(GETTING_STARTED, 'bash', 'python'):
        if block.file_name:
            Path(block.file_name).write_text(block.text)
        elif not block.needs and block.language == 'bash':
            environment = os.environ | {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
            assert subprocess.run(['bash', '-euc', block.text], env=environment).returncode == 0, block.text
    for path in ('curves.png', 'condensation.png', 'my_config/report.html'):
        assert (folder / 'work_dirs' / path).stat().st_size > 10_000


# ---- configs

BASE = blocks(USING_UBN, 'python')[0].text
CONFIGS = [
    pytest.param(block.text if '_base_' in block.text else BASE + block.text, id=f'{name_of(page)}-{i}')
    for page in PAGES
    for i, block in enumerate(blocks(page, 'python'))
    if block.run_by and block.run_by[2] == 'test_a_config_builds'
]


@pytest.mark.parametrize('text', CONFIGS)
def test_a_config_builds(text, tmp_path):
    """Into a network that has the norms it is told to."""
    (tmp_path / 'config.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'config.py')
    check_norm_types(cfg)
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    check_norms_used(cfg, model)
    assert any(isinstance(layer, mmubn.UBN) for layer in model.modules()) == (text != BASE)
    for hook in cfg.get('custom_hooks', ()):
        HOOKS.build(hook)


# ---- a norm of one's own


def load(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / 'tests' / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = load('layers/test_contract.py')
# The contract without the list of the norms that it is for.
Contract = type('Contract', (), {name: test for name, test in vars(contract.TestContract).items() if name[:2] != '__'})
del Contract.pytestmark


@pytest.mark.filterwarnings('ignore')
def test_foreign_code(folder):
    """The blocks of docs/foreign-code.md, in order: each uses what those above it made."""
    names = {}
    for block in blocks(FOREIGN_CODE, 'python'):
        if not block.needs:
            exec(block.text, names)


class TestExtending(Contract):
    """The norm of docs/extending.md keeps the contract, with what the page says of it."""

    @pytest.fixture(autouse=True)
    def page(self, folder):
        """The blocks of the page, by what they begin with; those that are files are saved."""
        found = blocks(EXTENDING, 'python')
        for block in found:
            if block.file_name:
                Path(block.file_name).write_text(block.text)
        return [block.text for block in found if not block.file_name]

    @pytest.fixture
    def norm(self, page):
        names = vars(contract) | {'TYPES': {}}
        exec(page[0], names)
        return names['TYPES']['CenteredBNET']

    def test_the_config_of_the_page(self, page):
        cfg = Config.fromfile('my_config.py')
        check_norm_types(cfg)
        model = MODELS.build(cfg.model)
        check_norms_used(cfg, model)
        assert repr(model.backbone.bn1) == 'CenteredBNET(32, eps=1e-05, momentum=0.1, kernel_size=5)'

    @pytest.mark.slow
    def test_compiles(self, norm):
        contract.test_compiles_to_one_graph(norm)

    def test_starts_from_batch_norm_folds_and_is_not_replaced(self, norm):
        batch_norm, layer = contract.randomize(nn.BatchNorm2d(3)).eval(), norm(3).eval()
        layer.load_state_dict(batch_norm.state_dict())
        x = contract.batch()
        torch.testing.assert_close(layer(x), batch_norm(x))

        layer = contract.randomize(norm(3)).eval()
        folded = mmubn.fold(layer)
        assert type(folded) is mmubn.FoldedUBN
        torch.testing.assert_close(folded(x), layer(x))

        with pytest.raises(RuntimeError, match='CenteredBNET'):
            nn.SyncBatchNorm.convert_sync_batchnorm(layer)

    def test_the_gate_of_the_page(self, page):
        """Two batches as BatchNorm, then the running statistics, which stay."""
        names = {}
        exec(page[1], names)
        layer, batch_norm = names['FreezingBN'](3, batches=2), nn.BatchNorm2d(3)
        for seed in range(2):
            x = contract.batch(seed=seed)
            torch.testing.assert_close(layer(x), batch_norm(x))
        x = contract.batch(seed=2)
        torch.testing.assert_close(layer(x), batch_norm.eval()(x))
        torch.testing.assert_close(layer.running_mean, batch_norm.running_mean)
        assert layer.num_batches_tracked == 2
