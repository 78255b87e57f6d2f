"""tools/analysis_tools/make_report.py: the page has what the run left, says what it has not, and needs nothing else."""

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from cli import CONFIG, call
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from run_logs import training, validation, write_log

from mmubn.openmmlab.hooks.layer_log import LayerLog

TOOL = 'analysis_tools/make_report.py'
START = '20260101_120000'
SECTIONS = [
    'Summary',
    'Curves',
    'Feature condensation',
    'Feature condensation, layer by layer',
    'Covariate shift',
    'Example predictions',
    'Config',
    'Environment',
]
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
VOID = ('meta', 'img')  # elements without an end


class Page(HTMLParser):
    """What a page has: text by element, attributes of the elements. Elements that do not nest are an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.texts, self.attributes = [], [], {}, []
        self.feed(html)
        assert not self.open, f'never closed: {self.open}'

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append('')
        if tag == 'img':
            assert dict(attributes)['alt']

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    @property
    def images(self):
        return [value for name, value in self.attributes if name == 'src']

    @property
    def rows(self):
        return [[cell.strip() for cell in row.split('\n') if cell.strip()] for row in self.texts['tr']]


def write_hook_files(start):
    layers = ['backbone.<bn1>', 'backbone.bn2']
    log = LayerLog(start / 'feature_condensation.jsonl', layers, types=['UBN'] * 2, threshold=0.3, num_samples=4)
    log.append(0, 0, fixed=[0.9, 0.2])
    log.append(1, 0, batch=[0.9, 0.2], running=[1.0, 0.92], gate=[1.0, 0.0])
    log.append(8, 2, fixed=[0.5, 0.1], running=[0.7, 0.6], gate=[1.0, 1.0])
    log = LayerLog(start / 'covariate_shift.jsonl', layers, types=['UBN'] * 2, num_samples=4)
    log.append(1, 0, channel=[0.1, 0.0], joint=[0.2, float('nan')])
    log.append(8, 2, channel=[0.01, 0.1], joint=[0.1, 0.05])


def write_run(run, values=(40.0, 60.0), start=START):
    """A run by hand: log, config, environment."""
    records = [training(5, 1, loss=2.0), validation(1, values[0]), training(10, 2), validation(2, values[1])]
    log = write_log(run, records, start)
    (log.parent / 'config.py').write_text("note = '</pre><script>alert(1)</script> &amp; '\n")
    line = '-' * 60
    (run / start / f'{start}.log').write_text(
        f'2026/01/01 12:00:00 - mmengine - INFO - \n{line}\nSystem environment:\n    PyTorch: 2.<12>\n{line}\n\n'
        '2026/01/01 13:01:05 - mmengine - INFO - Saving checkpoint at 2 epochs\nno time in this line\n'
    )
    return log


def make(monkeypatch, work_dir):
    """The page that the tool makes of ``work_dir``."""
    assert call(monkeypatch, TOOL, work_dir) == 0
    return Page((work_dir / 'report.html').read_text())


@pytest.fixture(scope='module')
def report(trained, tmp_path_factory):
    """Of a real run, whose checkpoint makes predictions, with files of the hooks by hand: the run and its page."""
    run = tmp_path_factory.mktemp('report') / 'a <b> & c'
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns('*.pth'))
    write_hook_files(next(run.glob('*/vis_data')).parent)
    with pytest.MonkeyPatch.context() as patch:
        make(patch, run)
    return run


def test_the_page_of_a_run_is_valid_and_has_all_sections(report):
    page = Page((report / 'report.html').read_text())
    assert page.texts['h1'] == page.texts['title'] == [str(report)]
    assert page.texts['h2'] == SECTIONS
    # Loss, learning rate, box AP and mask AP; means, heat maps, covariate shift; the four validation images.
    assert len(page.images) == 4 + 3 + 4


def test_the_page_needs_nothing_but_itself(report):
    page = Page((report / 'report.html').read_text())
    assert not {'script', 'link', 'iframe', 'object'} & set(page.elements)
    for name, value in page.attributes:
        if name in ('src', 'href', 'srcset', 'data', 'action'):
            assert value.startswith('data:'), value
    (style,) = page.texts['style']
    assert 'url(' not in style
    assert '@import' not in style


def test_the_images_are_pictures(report):
    for uri in Page((report / 'report.html').read_text()).images:
        kind, data = re.fullmatch(r'data:image/(jpeg|svg\+xml);base64,(.*)', uri).groups()
        data = base64.b64decode(data, validate=True)
        if kind == 'jpeg':
            with Image.open(io.BytesIO(data)) as image:
                # 64x64, 8 times enlarged, annotated and predicted, below a strip that says so; then 1000 pixels wide.
                assert image.width == 1000
                assert 500 < image.height < 560
                assert np.asarray(image).std() > 5
        else:
            assert ElementTree.fromstring(data).tag.endswith('svg')


def test_config_and_environment_are_those_of_the_run(report):
    (start,) = (log.parent.parent for log in report.glob('*/vis_data/scalars.json'))
    config, environment = Page((report / 'report.html').read_text()).texts['pre']
    assert config.strip() == (start / 'vis_data' / 'config.py').read_text().strip()
    assert environment.startswith('System environment:\n')
    assert f'PyTorch: {torch.__version__}' in environment
    assert 'seed: 0' in environment


def test_the_summary_has_the_last_values_of_the_log(report):
    (log,) = report.glob('*/vis_data/scalars.json')
    last = json.loads(log.read_text().splitlines()[-1])
    page = Page((report / 'report.html').read_text())
    metrics = {tag: value for tag, value in last.items() if tag.startswith('coco/') and value != -1}
    assert len(metrics) < 12, 'there are no large digits'
    rows = [f'{tag}{f"{value:.4g} (epoch 2)" * 2}' for tag, value in metrics.items()]
    assert page.texts['tr'] == ['metriclasthighest', *rows]
    assert re.search(r'Trained for 8 iterations, 2 epochs in \d:\d\d:\d\d ', ' '.join(page.texts['p']))
    visible = [text for tag in ('h1', 'h2', 'tr', 'figcaption') for text in page.texts[tag]]
    assert [text for text in visible if report.name in text] == [str(report)], 'the title alone names the run'


@pytest.fixture
def browse(tmp_path):
    """Open a page in a window of a width; its document afterwards, and maybe a picture of it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f'no browser is installed: none of {", ".join(BROWSERS)} is on the PATH')
    flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking'
    flags += ' --disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files'

    def run(page, width, height, picture=None):
        size = f'--window-size={width},{height}'
        command = [browser, *flags.split(), size, f'--user-data-dir={tmp_path / "profile"}']
        for output in ('--dump-dom', *([f'--screenshot={picture}'] if picture else [])):
            result = subprocess.run([*command, output, page.as_uri()], capture_output=True, text=True, timeout=120)
            assert result.returncode == 0, result.stderr
            if output == '--dump-dom':
                dom = result.stdout
        return dom

    return run


def test_on_a_phone_what_is_wide_scrolls_by_itself_and_not_the_page(browse, monkeypatch, tmp_path):
    """A window has at least 500 pixels, so the page is in a frame of 360."""
    for name in ('a_run_with_a_name_that_is_longer_than_a_phone_is_wide', 'ubn'):
        write_run(tmp_path / 'runs' / name)
        write_hook_files(tmp_path / 'runs' / name / START)
    make(monkeypatch, tmp_path / 'runs')
    frame = tmp_path / 'frame.html'
    frame.write_text("""<iframe src="runs/report.html" style="width: 360px; height: 800px; border: 0"></iframe>
        <script>addEventListener('load', () => {
            const page = frames[0].document;
            for (const each of page.querySelectorAll('details')) each.open = true;
            const box = page.querySelector('table').parentElement;
            box.scrollLeft = 10000;
            const seen = page.querySelector('tr').lastElementChild.getBoundingClientRect();
            const result = {
                page: page.documentElement.scrollWidth,
                table: box.scrollWidth,
                box: box.clientWidth,
                lastColumnEnds: seen.right,
                sizes: [...page.images].map(image => image.getBoundingClientRect().width / image.naturalWidth),
            };
            document.documentElement.dataset.result = JSON.stringify(result);
        });</script>""")
    dom = browse(frame, 600, 800)
    result = json.loads(re.search('data-result="(.*?)"', dom)[1].replace('&quot;', '"'))
    assert result['page'] == 360
    assert result['table'] > result['box']
    assert result['lastColumnEnds'] <= 360, 'the last column can be scrolled to'
    assert min(result['sizes']) > 0.6, 'what is drawn is not shrunk until it cannot be read'


def test_the_page_opens_in_a_browser_without_a_network(browse, report, tmp_path):
    # Before the policy of the page, which lets no script in after it.
    script = """<script>addEventListener('load', () => {
        const images = [...document.images];
        document.documentElement.dataset.decoded = images.filter(image => image.complete && image.naturalWidth).length;
        document.documentElement.dataset.loaded = performance.getEntriesByType('resource').map(each => each.name)
            .filter(name => !name.startsWith('data:')).join();
        document.documentElement.dataset.wide = document.documentElement.scrollWidth;
    });</script>"""
    html = (report / 'report.html').read_text()
    copy = tmp_path / 'copy.html'
    copy.write_text(html.replace('<head>', f'<head>{script}', 1))
    picture = tmp_path / 'page.png'
    dom = browse(copy, 600, 4000, picture)
    assert f'data-decoded="{len(Page(html).images)}"' in dom
    assert 'data-loaded=""' in dom
    assert 'data-wide="600"' in dom, 'what is wider than a small window scrolls by itself, not the page'
    assert re.findall('<h2>(.*?)</h2>', dom) == SECTIONS
    with Image.open(picture) as image:
        assert image.size == (600, 4000)
        assert len(image.convert('RGB').getcolors(2**24)) > 1000, 'an empty page has few colours'


def test_text_of_the_run_is_shown_as_it_is(monkeypatch, tmp_path):
    write_run(tmp_path / '<i>run')
    page = make(monkeypatch, tmp_path / '<i>run')
    assert not {'script', 'i'} & set(page.elements)
    config, environment = page.texts['pre']
    assert config == "note = '</pre><script>alert(1)</script> &amp; '\n"
    assert environment == 'System environment:\n    PyTorch: 2.<12>'


def test_what_was_not_measured_says_how_to(monkeypatch, tmp_path):
    write_run(tmp_path)
    paragraphs = ' '.join(make(monkeypatch, tmp_path).texts['p'])
    for hook in ('FeatureCondensationHook', 'CovariateShiftHook'):
        assert f"custom_hooks=[dict(type='{hook}')]" in paragraphs


def test_several_runs_have_a_table_common_curves_and_a_part_each(monkeypatch, tmp_path):
    for seed, last in enumerate((60.0, 30.0)):
        write_run(tmp_path / 'BN' / f'seed{seed}', (40.0, last))
    write_run(tmp_path / 'UBN')
    write_hook_files(tmp_path / 'UBN' / START)
    page = make(monkeypatch, tmp_path)
    assert page.texts['tr'][1:] == [
        'BN/seed0accuracy/top160% (epoch 2)60% (epoch 2)1021:01:05',
        'BN/seed1accuracy/top130% (epoch 2)40% (epoch 1)1021:01:05',
        'UBNaccuracy/top160% (epoch 2)60% (epoch 2)1021:01:05',
    ]
    assert page.texts['h2'] == [*SECTIONS[:3], 'Runs']
    assert [each.strip() for each in page.texts['summary'] if each != 'Show'] == ['BN/seed0', 'BN/seed1', 'UBN']
    assert page.texts['h3'] == [*SECTIONS[4:], *SECTIONS[4:], *SECTIONS[3:]]
    # Loss, learning rate, accuracy and similarity; the two pictures of the hooks.
    assert len(page.images) == 4 + 2
    text = ' '.join(page.texts['p'])
    assert 'No measurement in BN/seed0, BN/seed1.' in text
    assert 'standard deviation' in text


def test_images_that_the_last_test_left_are_shown(monkeypatch, tmp_path):
    write_run(tmp_path)
    for stamp, count in (('20260102_120000', 2), ('20260103_120000', 8)):
        folder = tmp_path / 'test' / stamp / 'predictions'
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (1200, 600), (i, 0, 0)).save(folder / f'{i}.png')
    (folder / '1.png').write_text('no image')
    Image.new('RGB', (8, 8)).save(tmp_path / 'curves.png')  # no prediction
    page = make(monkeypatch, tmp_path)
    shown = [base64.b64decode(uri.split(',')[1]) for uri in page.images if 'jpeg' in uri]
    assert [Image.open(io.BytesIO(each)).size for each in shown] == [(1000, 500)] * 5
    text = ' '.join(page.texts['p'])
    assert f'The first images of {folder}.' in text
    assert f'{folder / "1.png"}: cannot be shown' in text


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(monkeypatch, tmp_path, capsys):
    log = write_run(tmp_path)
    log.write_text(log.read_text()[:-10])
    write_hook_files(tmp_path / START)
    (tmp_path / START / 'feature_condensation.jsonl').write_text('{"layers": ["bn"')
    (tmp_path / START / f'{START}.log').unlink()
    (tmp_path / 'failed' / START / 'vis_data').mkdir(parents=True)
    page = make(monkeypatch, tmp_path)
    assert page.texts['h2'][0] == 'What could not be read'
    assert page.texts['h2'][1:] == [name for name in SECTIONS if name != 'Feature condensation, layer by layer']
    notes, printed = ' '.join(page.texts['p']), capsys.readouterr().out
    for text in (notes, printed):
        assert f'{log}, line 4: cut off' in text
        assert f'{tmp_path}/*/feature_condensation.jsonl' in text
        assert f'{START}.log: cannot be read: No such file' in text
        assert f'{tmp_path / "failed"}: a run that has logged nothing' in text
        assert f'{tmp_path / "last_checkpoint"} does not exist' in text
    assert page.texts['tr'][1] == 'accuracy/top140% (epoch 1)40% (epoch 1)'
    assert 'Trained for 10 iterations, 2 epochs in 0:00:00 ' in notes


def test_images_of_mmdetections_hook_say_which_half_is_which(monkeypatch, tmp_path):
    """The hook draws a pair; its start's config says that it did."""
    write_run(tmp_path)
    folder = tmp_path / 'test' / '20260102_120000'
    (folder / 'predictions').mkdir(parents=True)
    Image.new('RGB', (240, 120), (200, 0, 0)).save(folder / 'predictions' / '1.png')
    sizes = {}
    for hook in ('DetVisualizationHook', 'VisualizationHook'):
        (folder / 'vis_data').mkdir(exist_ok=True)
        (folder / 'vis_data' / 'config.py').write_text(f"default_hooks = dict(visualization=dict(type='{hook}'))\n")
        (uri,) = (uri for uri in make(monkeypatch, tmp_path).images if 'jpeg' in uri)
        with Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))) as image:
            sizes[hook] = image.size
            if hook == 'DetVisualizationHook':
                strip = np.asarray(image.convert('L'))[: image.height - 480]
    assert sizes['VisualizationHook'] == (240, 120)
    assert sizes['DetVisualizationHook'][0] == 960
    assert all(half.min() < 100 < 250 < half.max() for half in np.split(strip, 2, axis=1)), 'each half is named'


@pytest.mark.parametrize('case', ['gone', 'file', 'report.pdf', '.', 'file/report.html'])
def test_what_cannot_be_read_or_written_is_said_before_any_work(monkeypatch, tmp_path, capsys, case):
    write_run(tmp_path / 'run')
    (tmp_path / 'file').touch()
    before = sorted(tmp_path.rglob('*'))
    arguments = [tmp_path / case] if case in ('gone', 'file') else [tmp_path / 'run', '--out', tmp_path / case]
    assert call(monkeypatch, TOOL, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ')
    assert str(tmp_path / case) in line
    assert sorted(tmp_path.rglob('*')) == before


def test_a_folder_without_runs(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, TOOL, tmp_path) == 2
    assert f'{tmp_path} has no run with a log' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('missing', ['checkpoint', 'data'])
def test_without_checkpoint_or_data_the_page_says_which(monkeypatch, report, tmp_path, missing):
    run = tmp_path / 'run'
    shutil.copytree(report, run)
    config = next(run.glob('*/vis_data/config.py'))
    if missing == 'checkpoint':
        (run / 'last_checkpoint').write_text('/elsewhere/epoch_2.pth')
        expected = f'{run / "epoch_2.pth"}, which {run / "last_checkpoint"} names, does not exist.'
    else:
        config.write_text(re.sub(r"data_root='[^']*'", "data_root='/elsewhere/'", config.read_text()))
        expected = 'the val annotation file /elsewhere/annotations/instances_val2017.json does not exist'
    page = make(monkeypatch, run)
    assert not any('jpeg' in uri for uri in page.images)
    why, what_to_do = next(pair for pair in itertools.pairwise(page.texts['p']) if pair[0].startswith('None: '))
    assert expected in why
    assert '--show-dir' in what_to_do


def test_a_classifier_predicts(monkeypatch, tmp_path):
    write_run(tmp_path / 'run')
    for name in '0123456789':
        folder = tmp_path / 'data' / 'val' / name
        folder.mkdir(parents=True)
        Image.new('RGB', (32, 32), (20 * int(name), 0, 0)).save(folder / 'image.png')
    cfg = Config.fromfile(CONFIG.parent / 'resnet18-ubn_digits.py')
    cfg.val_dataloader.dataset.data_root = str(tmp_path / 'data')
    cfg.dump(tmp_path / 'run' / START / 'vis_data' / 'config.py')
    init_default_scope('mmpretrain')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'run' / 'epoch_2.pth')
    (tmp_path / 'run' / 'last_checkpoint').write_text('epoch_2.pth')
    page = make(monkeypatch, tmp_path / 'run')
    assert 'epoch_2.pth on the first validation images.' in ' '.join(page.texts['p'])
    captions = [text.strip() for text in page.texts['figcaption']]
    assert captions[-6:] == [f'{i}-image' for i in range(1, 7)]
    pictures = [uri for uri in page.images if 'jpeg' in uri]
    assert len(pictures) == 6
    for uri in pictures:
        with Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))) as image:
            assert image.size == (224, 224)
