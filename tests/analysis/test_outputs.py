"""mmubn.analysis.outputs: all files or none, and a folder that is replaced at the end."""

import multiprocessing
import signal

import pytest

from mmubn.analysis.outputs import replacing, unwritable, write_files


def names(path):
    """Of what is beside it, and its own."""
    return sorted(each.name for each in path.parent.iterdir())


# ---- files


def test_where_a_file_can_be_written(tmp_path):
    assert unwritable(tmp_path / 'new' / 'folder' / 'a.txt') == ''
    assert not any(tmp_path.iterdir())
    (tmp_path / 'a.txt').touch()
    assert unwritable(tmp_path / 'a.txt') == ''


def test_where_none_can(tmp_path):
    (tmp_path / 'file').touch()
    assert unwritable(tmp_path) == f'{tmp_path} is a folder'
    assert unwritable(tmp_path / 'file' / 'new' / 'a.txt') == f'{tmp_path / "file"} is no folder'
    assert unwritable('/proc' / (tmp_path / 'a.txt').relative_to('/')).startswith('in the folder /proc: ')


def test_files_are_all_written_or_none(tmp_path):
    (tmp_path / 'a').write_text('old')
    (tmp_path / 'file').touch()
    contents = {tmp_path / 'a': b'new', tmp_path / 'b' / 'c': b'new'}
    with pytest.raises(OSError, match='file'):
        write_files({**contents, tmp_path / 'file' / 'd': b'new'})
    assert (tmp_path / 'a').read_text() == 'old'
    assert names(tmp_path / 'a') == ['a', 'b', 'file']
    assert not any((tmp_path / 'b').iterdir())
    write_files(contents)
    assert {path: path.read_bytes() for path in contents} == contents
    assert names(tmp_path / 'a') == ['a', 'b', 'file']


# ---- a folder


@pytest.fixture
def folder(tmp_path):
    """One with an earlier result."""
    path = tmp_path / 'work' / 'demo'
    path.mkdir(parents=True)
    (path / 'result').write_text('old')
    return path


def test_a_folder_takes_the_place_of_the_old_one_at_the_end(folder):
    with replacing(folder) as new:
        (new / 'start' / 'vis_data').mkdir(parents=True)
        (new / 'start' / 'vis_data' / 'config.py').write_text(f"work_dir = '{new}'\n")
        (new / 'last_checkpoint').write_text(str(new / 'epoch_1.pth'))
        assert (folder / 'result').read_text() == 'old'
        assert names(folder) == ['demo', 'demo.new']
        assert new.name == folder.name, 'plots are labelled with it'
    assert names(folder) == ['demo']
    assert not (folder / 'result').exists()
    assert (folder / 'start' / 'vis_data' / 'config.py').read_text() == f"work_dir = '{folder}'\n"
    assert (folder / 'last_checkpoint').read_text() == str(folder / 'epoch_1.pth')


def test_the_first_result_has_nothing_to_replace(tmp_path):
    with replacing(tmp_path / 'a' / 'demo') as new:
        (new / 'result').touch()
    assert (tmp_path / 'a' / 'demo' / 'result').exists()


def test_after_an_error_the_old_one_stays_and_the_next_start_is_empty(folder):
    def fail():
        with replacing(folder) as new:
            (new / 'part').mkdir()
            (new / 'part' / 'file').touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (folder / 'result').read_text() == 'old'
    assert (folder.with_name('demo.new') / 'demo' / 'part' / 'file').exists()
    with replacing(folder) as new:
        assert not any(new.iterdir())


def test_one_that_was_killed_between_the_renames_is_found_again(folder):
    folder.rename(folder.with_name('demo.old'))
    with pytest.raises(RuntimeError), replacing(folder):
        raise RuntimeError
    assert (folder / 'result').read_text() == 'old'


def test_two_at_a_time_are_an_error_and_a_killed_one_is_none(folder):
    def work(entered):
        with replacing(folder):
            entered.set()
            signal.pause()

    context = multiprocessing.get_context('fork')
    entered = context.Event()
    process = context.Process(target=work, args=(entered,))
    process.start()
    try:
        assert entered.wait(30)
        with pytest.raises(BlockingIOError, match=r'another process is writing .*demo\.new'), replacing(folder):
            pytest.fail('both write')
    finally:
        process.kill()
        process.join()
    with replacing(folder) as new:
        (new / 'result').write_text('new')
    assert (folder / 'result').read_text() == 'new'


def test_a_file_in_its_place_is_an_error(tmp_path):
    (tmp_path / 'demo').touch()
    with pytest.raises(NotADirectoryError, match='demo is no folder'), replacing(tmp_path / 'demo'):
        pytest.fail('there is a file')
    assert (tmp_path / 'demo').is_file()
