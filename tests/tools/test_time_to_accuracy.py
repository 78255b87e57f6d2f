"""tools/analysis_tools/time_to_accuracy.py."""

import json
import re

import pytest
from cli import call
from run_logs import training, validation, write_log


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Call the tool; returns its status, the cells of the table's rows by run, the whole file and what was printed."""

    def run(*arguments):
        out = tmp_path / 'out' / 'table.md'
        status = call(monkeypatch, 'analysis_tools/time_to_accuracy.py', *arguments, '--out', out)
        text = out.read_text() if out.exists() else ''
        rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]
        return status, {row[0]: row[1:] for row in rows[2:]}, text, capsys.readouterr()

    return run


def write_run(run, time, values, tag='accuracy/top1'):
    """A run of epochs of 10 iterations, which take ``time`` seconds each."""
    records = []
    for epoch, value in enumerate(values, 1):
        records += [training(10 * epoch, epoch, time=time), validation(epoch, value, tag)]
    write_log(run, records, window=10)
    return run


@pytest.fixture
def bn(tmp_path):
    """Mean 55, 85, 90, 89: the best is 90 after epoch 3 of 4. 1 s and 3 s an epoch, 2 s in the mean."""
    return [
        write_run(tmp_path / 'bn' / 'seed0', 0.1, [50.0, 80.0, 92.0, 88.0]),
        write_run(tmp_path / 'bn' / 'seed1', 0.3, [60.0, 90.0, 88.0, 90.0]),
    ]


@pytest.fixture
def ubn(tmp_path):
    """Mean 75, 90, 93: as high after epoch 2. 2.5 s and 3.5 s an epoch, 3 s in the mean."""
    return [
        write_run(tmp_path / 'ubn' / 'seed0', 0.25, [70.0, 91.0, 95.0]),
        write_run(tmp_path / 'ubn' / 'seed1', 0.35, [80.0, 89.0, 91.0]),
    ]


def test_epochs_and_seconds_until_the_mean_of_the_seeds_reaches_the_best_mean(bn, ubn, tmp_path, compare):
    """Of the reference 3 epochs of 2 s, 8 s in all; of UBN 2 epochs of 3 s; GN stays below."""
    gn = write_run(tmp_path / 'gn', 0.2, [60.0, 85.0, 84.0])
    status, rows, text, output = compare('--reference', *bn, '--runs', *ubn, gn)
    assert status == 0
    assert text.startswith('## The best of bn: top1 90.00%\n')
    assert 'Reached after epoch 3 of 4 and 6.0 s of 8.0 s of training. Seeds: 2.' in text
    assert rows == {
        'ubn': ['2 (3)', '6.0', '1.00', '0.75', '2 of 2: 2.5 (2 to 3)'],
        'gn': ['never; 85.00% after 2 (3)', '', '', '', '0 of 1'],
    }
    assert 'without start-up, validation and checkpoints' in text
    assert 'ubn' in output.out
    assert '6.0' in output.out


def test_every_reference_has_a_table(bn, ubn, tmp_path, compare):
    """To the best of UBN, 93, no epoch of BN comes, though a seed of it has 92."""
    _, _, text, _ = compare('--reference', *bn, *ubn, '--runs', *bn)
    assert re.findall(r'^## .*', text, re.MULTILINE) == [
        '## The best of bn: top1 90.00%',
        '## The best of ubn: top1 93.00%',
    ]
    assert '| bn | 3 (4) | 6.0 | 1.00 | 0.75 | 2 of 2: 2.5 (2 to 3) |' in text
    assert '| bn | never; 90.00% after 3 (4) |  |  |  | 0 of 2 |' in text


def test_equal_means_of_other_numbers_are_as_high(tmp_path, compare):
    """(0.1 + 0.5) / 2 and (0.2 + 0.4) / 2 differ in the last bit."""
    reference = [write_run(tmp_path / 'a' / f'seed{i}', 0.1, [v], 'coco/bbox_mAP') for i, v in enumerate([0.2, 0.4])]
    runs = [write_run(tmp_path / 'b' / f'seed{i}', 0.1, [v], 'coco/bbox_mAP') for i, v in enumerate([0.1, 0.5])]
    assert (0.2 + 0.4) / 2 > (0.1 + 0.5) / 2
    _, rows, text, _ = compare('--reference', *reference, '--runs', *runs, '--metric', 'bbox_mAP')
    assert text.startswith('## The best of a: bbox_mAP 0.300\n')
    assert rows['b'][0] == '1 (1)'


def test_an_interrupted_seed_ends_the_mean_and_the_table_says_so(bn, ubn, tmp_path, compare):
    """With a third seed of one epoch, UBN's mean is that of the first epoch; two seeds reach 90 all the same."""
    third = write_run(tmp_path / 'ubn' / 'seed2', 0.3, [60.0])
    _, rows, text, _ = compare('--reference', *bn, '--runs', *ubn, third)
    assert rows['ubn'] == ['never; 70.00% after 1 (1)', '', '', '', '2 of 3: 2.5 (2 to 3)']
    assert 'ubn: 1 of 3 validated epochs, those that all seeds have.' in text


def test_a_run_without_times_has_epochs_and_no_seconds(bn, tmp_path, compare):
    run = tmp_path / 'ubn'
    write_log(run, [validation(1, 80.0), validation(2, 95.0)])
    status, rows, _, output = compare('--reference', *bn, '--runs', run)
    assert status == 0
    assert rows['ubn'] == ['2 (2)', 'unknown', 'unknown', 'unknown', '1 of 1: 2.0 (2 to 2)']
    assert f'{run}: its logs have no time' in output.out


def test_runs_that_cannot_be_compared_are_named_before_anything_is_written(bn, ubn, tmp_path, compare):
    detector = write_run(tmp_path / 'detector', 0.1, [0.3], 'coco/bbox_mAP')
    untested = tmp_path / 'untested'
    write_log(untested, [training(10, 1)])
    status, _, text, output = compare('--reference', *bn, '--runs', detector, untested, *ubn)
    assert (status, text) == (2, '')
    assert output.err.count('\n') == 1
    assert (
        'detector has no validation with top1 in all its logs; logged are: coco/bbox_mAP; choose one by --metric.'
        in output.err
    )
    assert 'untested has no validation with top1 in all its logs; no metric is logged yet.' in output.err


@pytest.mark.parametrize('option', ['--reference', '--runs'])
def test_a_missing_run_is_an_error_that_writes_nothing(bn, tmp_path, compare, option):
    other = '--runs' if option == '--reference' else '--reference'
    status, _, text, output = compare(option, tmp_path / 'none', *bn, other, *bn)
    assert (status, text) == (2, '')
    assert f'{tmp_path}/none does not exist' in output.err


def test_metrics_of_one_name_are_not_compared(tmp_path, compare):
    a = write_run(tmp_path / 'a', 0.1, [50.0], 'multi-label/mAP')
    b = write_run(tmp_path / 'b', 0.1, [0.6], 'pascal_voc/mAP')
    status, _, text, output = compare('--reference', a, '--runs', b, '--metric', 'mAP')
    assert (status, text) == (2, '')
    assert 'mAP is not one and the same metric in these runs: multi-label/mAP, pascal_voc/mAP.' in output.err


def test_an_accuracy_below_one_percent_is_percent(tmp_path, compare):
    a = write_run(tmp_path / 'a', 0.1, [0.5, 0.8])
    assert compare('--reference', a, '--runs', a)[2].startswith('## The best of a: top1 0.80%\n')


def test_runs_without_epochs_are_compared_by_iterations(bn, tmp_path, compare):
    record = {key: value for key, value in training(10, 1).items() if key != 'epoch'}
    write_log(tmp_path / 'a', [record, validation(10, 50.0), {**record, 'iter': 20, 'step': 20}, validation(20, 60.0)])
    status, rows, text, _ = compare('--reference', tmp_path / 'a', '--runs', tmp_path / 'a')
    assert status == 0
    assert 'Reached after iteration 20 of 20 and 2.0 s of 2.0 s' in text
    assert rows['a'][:2] == ['20 (20)', '2.0']
    status, _, _, output = compare('--reference', tmp_path / 'a', '--runs', *bn)
    assert status == 2
    assert 'runs that count epochs and iterations cannot be compared: a iterations, bn epochs.' in output.err


def test_a_table_that_cannot_be_written_is_said_before_the_logs_are_read(monkeypatch, tmp_path, capsys):
    arguments = ['--reference', 'gone', '--runs', 'gone', '--out', tmp_path]
    assert call(monkeypatch, 'analysis_tools/time_to_accuracy.py', *arguments) == 2
    assert f'{tmp_path} is a folder' in capsys.readouterr().err


def test_a_cut_off_line_is_reported_and_the_rest_compared(bn, ubn, compare):
    log = next(ubn[0].glob('*/vis_data/scalars.json'))
    log.write_text(log.read_text()[:-20])
    status, rows, _, output = compare('--reference', *bn, '--runs', ubn[0])
    assert status == 0
    assert f'{log}, line 6: cut off' in output.out
    assert rows['ubn'][0] == '2 (2)'


def test_seconds_of_a_run_of_mmdetection(trained, compare):
    """8 iterations, each logged, in a window of 50: the last mean is that of all. Its best is its only validation."""
    records = [json.loads(line) for line in next(trained.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    (time,) = (record['time'] for record in records if record.get('iter') == 8)
    status, rows, text, _ = compare('--reference', trained, '--runs', trained, '--metric', 'segm_mAP')
    assert status == 0
    assert f'## The best of {trained.name}: segm_mAP {records[-1]["coco/segm_mAP"]:.3f}' in text
    assert rows[trained.name] == ['2 (2)', f'{8 * time:.1f}', '1.00', '1.00', '1 of 1: 2.0 (2 to 2)']
