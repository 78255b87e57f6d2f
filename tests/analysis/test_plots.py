"""mmubn.analysis.plots: what all plots share."""

from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mmubn.analysis.plots import check_output, check_plot, line_style, plt, save, save_all
from mmubn.cli import UsageError


@pytest.fixture
def figure():
    figure, axis = plt.subplots(figsize=(4, 3))
    for i in range(3):
        axis.plot([1, 2, 3], [i, i + 1, i], label=str(i), **line_style(i))
    axis.legend()
    yield figure
    plt.close(figure)


def test_no_two_of_70_lines_look_the_same():
    styles = [line_style(i) for i in range(70)]
    assert len({(style['color'], style['marker']) for style in styles}) == 70


def test_no_two_of_20_lines_look_the_same_in_black_and_white():
    styles = [line_style(i) for i in range(20)]
    assert len({(style['linestyle'], style['marker']) for style in styles}) == 20


@pytest.mark.parametrize('name', ['out', 'out.png', 'out.svg'])
def test_a_plot_is_written_as_png_and_svg_and_reported(figure, tmp_path, capsys, name):
    paths = save(figure, tmp_path / 'new' / name, 'What is shown.')
    assert paths == [tmp_path / 'new' / 'out.png', tmp_path / 'new' / 'out.svg']
    assert capsys.readouterr().out == f'wrote {paths[0]}\nwrote {paths[1]}\n'
    assert len(np.unique(np.asarray(Image.open(paths[0]).convert('L')))) > 10, 'an empty page has few shades'
    assert ElementTree.parse(paths[1]).getroot().tag.endswith('svg')
    assert not plt.fignum_exists(figure.number)


def test_a_long_caption_is_whole_and_no_wider_than_the_figure(figure, tmp_path):
    """The saved page is cut at what is drawn: beyond the figure's 4 inches at 110 dots there may be the margins."""
    caption = ' '.join(f'word{i}' for i in range(100))
    path, _ = save(figure, tmp_path / 'out', caption)
    (text,) = figure.texts
    assert text.get_text().split() == caption.split()
    assert Image.open(path).width <= (4 + 0.2) * 110 + 2


def test_the_same_data_give_the_same_files(tmp_path):
    contents = []
    for folder in ('a', 'b'):
        figure, axis = plt.subplots()
        axis.plot([1, 2], [3, 4], **line_style(0))
        contents.append([path.read_bytes() for path in save(figure, tmp_path / folder / 'out', 'What is shown.')])
    assert contents[0] == contents[1]


def test_another_kind_of_file_is_an_error(figure, tmp_path):
    with pytest.raises(UsageError, match=r'PNG and SVG, got .*out\.pdf'):
        save(figure, tmp_path / 'out.pdf', '')
    assert not any(tmp_path.iterdir())


def test_of_several_plots_all_are_written_or_none(figure, tmp_path):
    (tmp_path / 'file').touch()
    other = plt.figure()
    with pytest.raises(UsageError, match=f'{tmp_path}/file/b.png cannot be written: {tmp_path}/file is no folder'):
        save_all([(figure, tmp_path / 'a.png', ''), (other, tmp_path / 'file' / 'b.png', '')])
    plt.close(other)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_a_full_disk_leaves_the_old_plot(figure, tmp_path):
    (tmp_path / 'out.png').write_text('old')
    (tmp_path / '.out.svg.part').symlink_to('/dev/full')
    with pytest.raises(UsageError, match=f'{tmp_path}/out.png, {tmp_path}/out.svg cannot be written: No space left'):
        save(figure, tmp_path / 'out.png', '')
    assert (tmp_path / 'out.png').read_text() == 'old'
    assert not (tmp_path / 'out.svg').exists()


def test_what_cannot_be_written_is_said_before(tmp_path):
    with pytest.raises(UsageError, match=f'{tmp_path} is a folder; give the name of a plot in it'):
        check_plot(tmp_path)
    (tmp_path / 'out.svg').mkdir()
    with pytest.raises(UsageError, match=f'{tmp_path}/out.svg is a folder'):
        check_plot(tmp_path / 'out')
    with pytest.raises(UsageError, match=r'out\.pdf must end in \.html or \.htm'):
        check_output(tmp_path / 'out.pdf', ('.html', '.htm'))
