"""mmubn.analysis.runs: what is read from the logs of runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.logging import HistoryBuffer
from run_logs import training, validation, write_log

from mmubn.analysis.runs import (
    group_runs,
    matching_tags,
    metric_names,
    over_seeds,
    read_layer_log,
    read_runs,
    read_scalars,
    series,
    training_records,
    training_seconds,
    validation_records,
    validation_unit,
)
from mmubn.cli import UsageError
from mmubn.openmmlab.hooks.layer_log import LayerLog

START = '20260101_120000'

# ---- scalars


def test_a_folder_without_logs_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UsageError, match=rf'{tmp_path}/\*/vis_data/scalars.json'):
        read_scalars(tmp_path)


@pytest.mark.parametrize('content', ['', '{"loss": 1.0, "st'])
def test_logs_in_which_nothing_can_be_read_are_an_error(tmp_path, content):
    write_log(tmp_path, []).write_text(content)
    with pytest.raises(UsageError, match=f'no line of {tmp_path}'):
        read_scalars(tmp_path)


@pytest.mark.parametrize(
    'bad',
    [
        '{"loss": 0.5, "st',
        '[1, 2]',
        '7',
        '{"loss": 0.5}',
        '\x00\x00',
        '{"loss": 0.5, "step": "9"}',
        '{"loss": 0.5, "step": 9, "iter": null}',
    ],
)
def test_a_line_that_is_no_record_is_reported_and_left_out(tmp_path, capsys, bad):
    log = write_log(tmp_path, [])
    good = [training(10, 1), training(20, 1)]
    log.write_text(f'{json.dumps(good[0])}\n{bad}\n{json.dumps(good[1])}\n')
    assert read_scalars(tmp_path) == good
    assert capsys.readouterr().out.startswith(f'{log}, line 2: cut off')


def test_a_resumed_start_replaces_what_the_killed_one_logged_from_there_on(tmp_path):
    """Killed in epoch 3, resumed from the end of epoch 1, killed again in epoch 2."""
    kept = [training(10, 1), validation(1, 10.0)]
    dead = [training(20, 2), validation(2, 20.0), {'gate/layer.bn': 1.0, 'step': 21}, training(30, 3)]
    resumed = [training(20, 2, loss=0.5)]
    write_log(tmp_path, kept + dead, start='20260101_120000')
    write_log(tmp_path, resumed, start='20260101_130000')
    assert read_scalars(tmp_path) == kept + resumed


def test_a_start_from_the_beginning_replaces_everything(tmp_path):
    write_log(tmp_path, [training(10, 1), validation(1, 10.0), training(20, 2)], start='20260101_120000')
    anew = [training(5, 1), validation(1, 30.0)]
    write_log(tmp_path, anew, start='20260101_130000')
    assert read_scalars(tmp_path) == anew


def test_a_start_that_logged_nothing_replaces_nothing(tmp_path):
    write_log(tmp_path, [training(10, 1)], start='20260101_120000')
    write_log(tmp_path, [], start='20260101_130000')
    assert read_scalars(tmp_path) == [training(10, 1)]


def test_records_of_training_of_validation_and_of_hooks_are_told_apart():
    """Iterations, epochs and a hook's iterations are all called step."""
    hook = {'similarity_fixed/layer.loss': 0.9, 'condensed_share': 0.5, 'step': 10}
    hierarchical = {'val/data_time': 0.1, 'val/accuracy/top1': 1.0, 'val/time': 0.1, 'step': 2}
    records = [training(10, 1), hook, validation(1, 10.0), hierarchical]
    assert training_records(records) == [records[0]]
    assert validation_records(records) == [records[2], hierarchical]
    assert metric_names(records) == ['accuracy/top1', 'val/accuracy/top1']
    assert series(records, 'loss') == ([10], [1.0])


def test_an_ap_of_minus_1_is_no_value():
    """COCO's, where there are no objects of a size. Another -1 is one."""
    records = [
        validation(epoch, value, 'coco/bbox_mAP_l') | {'coco/bbox_mAP': 0.5, 'margin': -1}
        for epoch, value in ((1, -1.0), (2, 0.25))
    ]
    assert series(validation_records(records), 'bbox_mAP_l') == ([2], [0.25])
    assert metric_names(records[:1]) == ['coco/bbox_mAP', 'margin']


def test_what_is_no_number_is_no_value():
    """MMPretrain's precision of each class is a list."""
    records = [validation(1, [0.1, 0.2], 'single-label/precision_classwise') | {'accuracy/top1': 3.0, 'ok': True}]
    assert metric_names(records) == ['accuracy/top1']
    assert series(validation_records(records), 'precision_classwise') == ([], [])


def test_a_name_means_the_very_tag_or_all_that_end_in_it():
    records = [validation(1, 0.5, 'coco/bbox_mAP') | {'lvis/bbox_mAP': 0.2, 'val/coco/bbox_mAP': 0.1}]
    assert matching_tags(records, 'coco/bbox_mAP') == ['coco/bbox_mAP']
    assert matching_tags(records, 'bbox_mAP') == ['coco/bbox_mAP', 'lvis/bbox_mAP', 'val/coco/bbox_mAP']
    assert matching_tags(records, 'mAP') == []


def without_epochs(iteration):
    return {key: value for key, value in training(iteration, 1).items() if key != 'epoch'}


@pytest.mark.parametrize(
    ('records', 'unit'),
    [
        ([training(10, 1), validation(1, 1.0)], 'epoch'),
        ([without_epochs(10), validation(10, 1.0)], 'iteration'),
        ([without_epochs(10), validation(1, 1.0)], 'epoch'),  # LoggerHook.log_metric_by_epoch is True by default
        ([validation(1, 1.0)], 'epoch'),
    ],
)
def test_the_steps_of_validations_are_epochs_or_iterations(records, unit):
    assert validation_unit(records) == unit


def test_seconds_until_an_iteration_of_a_run_without_epochs(tmp_path):
    write_log(tmp_path, [without_epochs(10), validation(10, 1.0), without_epochs(20), validation(20, 1.0)], window=10)
    np.testing.assert_allclose(training_seconds(tmp_path, read_scalars(tmp_path), [10, 20]), [1, 2])


def test_a_series_goes_by_the_tag_or_its_last_part():
    records = [{'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.4, 'step': 2}, {'coco/bbox_mAP': 0.1, 'step': 1}]
    assert series(records, 'bbox_mAP') == series(records, 'coco/bbox_mAP') == ([1, 2], [0.1, 0.2])
    assert series(records, 'mAP') == series(records, 'coco') == ([], [])


def test_the_last_value_of_a_step_counts():
    assert series([{'loss': 2.0, 'step': 1}, {'loss': 1.0, 'step': 1}], 'loss') == ([1], [1.0])


# ---- seconds


@pytest.mark.parametrize(('window', 'interval'), [(2, 2), (4, 2), (6, 3), (5, 1), (50, 2)])
def test_seconds_are_the_sum_of_the_iterations_however_the_windows_meet_or_overlap(tmp_path, window, interval):
    """MMEngine's own buffer averages the times of 18 iterations, 6 an epoch; their sum is to be found again."""
    times = np.random.default_rng(0).uniform(0.1, 2, 18)
    times[0] = 60  # as on a GPU: the first takes longest
    buffer = HistoryBuffer()
    records = []
    for i, time in enumerate(times):
        buffer.update(time)
        if (i + 1) % interval == 0:
            records.append(training(i + 1, i // 6 + 1, buffer.mean(window)))
    write_log(tmp_path, records, window=window)
    seconds = training_seconds(tmp_path, read_scalars(tmp_path), [1, 2, 3])
    np.testing.assert_allclose(seconds, np.cumsum(times)[5::6])


def test_iterations_outside_of_the_windows_are_taken_to_be_as_fast_as_the_next_window(tmp_path):
    """Epochs of 43 iterations, logged at their 25th, means of 10: 25 at 0.2 s, then 43 and the last 18 at 0.1 s."""
    records = [training(25, 1, time=0.2), validation(1, 1.0), training(68, 2, time=0.1), validation(2, 2.0)]
    write_log(tmp_path, records, window=10)
    seconds = training_seconds(tmp_path, read_scalars(tmp_path), [1, 2])
    np.testing.assert_allclose(seconds, [5 + 1.8, 5 + 4.3 + 1.8])


def test_repeated_iterations_of_a_resumed_run_count_once(tmp_path):
    """20 iterations of 0.1 s; the 10 of 9 s are those of the killed start that were done again."""
    write_log(tmp_path, [training(10, 1), training(20, 2, time=9.0)], start='20260101_120000', window=10)
    write_log(tmp_path, [training(20, 2)], start='20260101_130000', window=10)
    np.testing.assert_allclose(training_seconds(tmp_path, read_scalars(tmp_path), [1, 2]), [1, 2])


def test_one_epoch_alone_ends_with_the_last_logged_iteration(tmp_path):
    write_log(tmp_path, [training(10, 1), training(20, 1)], window=10)
    np.testing.assert_allclose(training_seconds(tmp_path, read_scalars(tmp_path), [1]), [2])


def test_without_a_config_the_window_is_ten_iterations_and_that_is_reported(tmp_path, capsys):
    """Logged every 5, means of 10: iterations 1 to 5 take 1 s each, 6 to 10 take 2 s each, 15 s in all."""
    write_log(tmp_path, [training(5, 1, time=1.0), training(10, 2, time=1.5)])
    np.testing.assert_allclose(training_seconds(tmp_path, read_scalars(tmp_path), [1, 2]), [5, 15])
    assert capsys.readouterr().out.startswith(f'{tmp_path}: no config beside its logs')


@pytest.mark.parametrize('key', ['time', 'epoch'])
def test_seconds_are_unknown_where_the_log_lacks_what_they_come_from(tmp_path, capsys, key):
    records = [{name: value for name, value in training(10, 1).items() if name != key}, validation(1, 1.0)]
    assert np.isnan(training_seconds(tmp_path, records, [1, 2])).tolist() == [True, True]
    assert capsys.readouterr().out.startswith(f'{tmp_path}: its logs have no time of an iteration, or no epochs')


# ---- runs and seeds


@pytest.mark.parametrize(
    'groups',
    [
        {'UBN': ['w/UBN/seed0', 'w/UBN/seed1'], 'BN': ['w/BN/seed0']},
        {'bn': ['w/bn-seed0', 'w/bn-seed11'], 'ubn': ['w/ubn_seed_3']},
        {'bn': ['w/seed0/bn', 'w/seed1/bn'], 'ubn': ['w/seed0/ubn']},
        {'bn-long': ['w/bn-seed0-long', 'w/bn-seed1-long']},
        {'linseed3': ['w/linseed3'], 'linseed4': ['w/linseed4'], 'seedling5': ['w/seedling5']},
        {'r50/bn': ['r50/bn'], 'r101/bn': ['r101/bn'], 'ubn': ['r50/ubn']},
    ],
)
def test_runs_that_differ_in_their_seed_alone_are_a_group(groups):
    expected = {label: list(map(Path, runs)) for label, runs in groups.items()}
    assert group_runs(run for runs in expected.values() for run in runs) == expected


def test_seeds_of_the_current_folder_have_its_name(tmp_path, monkeypatch):
    folder = tmp_path / 'UBN'
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert group_runs([Path('seed0'), Path('seed1')]) == {'UBN': [Path('seed0'), Path('seed1')]}


def test_the_same_run_twice_counts_once_by_whatever_path(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / 'bn', [training(10, 1)])
    (tmp_path / 'link').symlink_to(tmp_path / 'bn')
    monkeypatch.chdir(tmp_path)
    assert read_runs([Path('bn'), tmp_path / 'bn', Path('link')]) == {'bn': {Path('bn'): [training(10, 1)]}}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f'{each} is given twice, also as bn; it counts once.' for each in (tmp_path / 'bn', 'link')]


def test_runs_that_cannot_be_read_are_all_named(tmp_path):
    write_log(tmp_path / 'good', [training(10, 1)])
    (tmp_path / 'file').touch()
    (tmp_path / 'folder' / START / 'vis_data' / 'scalars.json').mkdir(parents=True)
    write_log(tmp_path / 'silent', [{'step': 1}])
    bad = [tmp_path / name for name in ('gone', 'file', 'folder', 'silent')]
    with pytest.raises(UsageError) as error:
        read_runs([tmp_path / 'good', *bad])
    assert f'{tmp_path}/gone does not exist; give the work dir of a run' in str(error.value)
    assert f'{tmp_path}/file is a file, not a folder; give' in str(error.value)
    assert f'{tmp_path}/folder/{START}/vis_data/scalars.json cannot be read: Is a directory.' in str(error.value)
    assert f'{tmp_path}/silent has logged no loss and no metric yet.' in str(error.value)


def test_a_folder_above_or_below_a_run_is_answered_with_the_run(tmp_path):
    write_log(tmp_path / 'w' / 'bn', [training(10, 1)])
    write_log(tmp_path / 'w' / 'ubn' / 'seed0', [training(10, 1)])
    with pytest.raises(UsageError, match=f'give the runs themselves: {tmp_path}/w/bn, {tmp_path}/w/ubn/seed0[.]'):
        read_scalars(tmp_path / 'w')
    with pytest.raises(UsageError, match=f'is one start of a run; give the work dir, {tmp_path}/w/bn[.]'):
        read_scalars(tmp_path / 'w' / 'bn' / START)


def test_two_models_that_are_named_like_seeds_of_one_are_an_error(tmp_path):
    write_log(tmp_path / 'ubn-seed0', [validation(1, 40.0)])
    write_log(tmp_path / 'ubn-seed1', [validation(1, 0.4, 'coco/bbox_mAP')])
    with pytest.raises(UsageError, match=r'ubn-seed0 \(accuracy/top1\) and .*ubn-seed1 \(coco/bbox_mAP\) differ'):
        read_runs([tmp_path / 'ubn-seed0', tmp_path / 'ubn-seed1'])


def test_values_over_seeds_are_those_of_the_steps_that_all_have():
    steps, values = over_seeds([([1, 2, 4], [10, 20, 40]), ([1, 3, 4, 5], [1, 3, 4, 5])])
    assert steps.tolist() == [1, 4]
    assert values.tolist() == [[10, 40], [1, 4]]


def test_seeds_without_a_common_step_have_no_values():
    steps, values = over_seeds([([1], [10.0]), ([], [])])
    assert steps.shape == (0,)
    assert values.shape == (2, 0)


# ---- logs of hooks

FILE = 'feature_condensation.jsonl'


def test_what_a_hook_wrote_is_read_back_to_five_digits(tmp_path):
    """Quantities may have steps of their own; NaN is null in the file, which is JSON."""
    log = LayerLog(tmp_path / '1' / FILE, ['bn1', 'bn2'], threshold=0.3)
    log.append(0, 0, fixed=[1 / 3, float('nan')])
    log.append(50, 1, batch=[0.5, 0.25])
    log.append(50, 1, fixed=[2.0, 3e-9])
    assert 'NaN' not in (tmp_path / '1' / FILE).read_text()

    quantities = read_layer_log(tmp_path, FILE)
    assert list(quantities) == ['fixed', 'batch']
    fixed, batch = quantities['fixed'], quantities['batch']
    assert (fixed.layers, fixed.settings) == (['bn1', 'bn2'], {'threshold': 0.3})
    assert (fixed.steps.tolist(), fixed.epochs.tolist()) == ([0, 50], [0, 1])
    np.testing.assert_array_equal(fixed.values, [[0.33333, np.nan], [2.0, 3e-9]])
    assert (batch.steps.tolist(), batch.values.tolist()) == ([50], [[0.5, 0.25]])


def test_a_resumed_hook_replaces_what_the_killed_one_logged_from_there_on(tmp_path):
    for start, lines in {'1': {0: 0.0, 10: 0.1, 20: 0.2, 30: 0.3}, '2': {20: 0.7}}.items():
        log = LayerLog(tmp_path / start / FILE, ['bn'])
        for step, value in lines.items():
            log.append(step, step // 10, fixed=[value])
    fixed = read_layer_log(tmp_path, FILE)['fixed']
    assert (fixed.steps.tolist(), fixed.values.tolist()) == ([0, 10, 20], [[0.0], [0.1], [0.7]])


def test_a_start_with_other_layers_is_reported_and_left_out(tmp_path, capsys):
    LayerLog(tmp_path / '1' / FILE, ['bn', 'extra']).append(0, 0, fixed=[0.1, 0.2])
    LayerLog(tmp_path / '2' / FILE, ['bn']).append(5, 0, fixed=[0.5])
    assert read_layer_log(tmp_path, FILE)['fixed'].values.tolist() == [[0.5]]
    assert capsys.readouterr().out.startswith(f'{tmp_path}/1/{FILE}: has other layers than {tmp_path}/2/{FILE}')


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('{"step":9,"epoch":0,"fix', ', line 3: cut off'),
        ('{"step":9,"epoch":0,"fixed":[1.0]}', ': a line without step, epoch and 2 values each'),
        ('{"step":9,"epoch":0,"fixed":[1.0,"x"]}', ': a line without step, epoch and 2 values each'),
        ('{"step":9,"fixed":[1.0,1.0]}', ': a line without step, epoch and 2 values each'),
    ],
)
def test_a_line_of_a_hook_that_cannot_be_read_is_reported_and_left_out(tmp_path, capsys, line, message):
    path = tmp_path / '1' / FILE
    LayerLog(path, ['bn1', 'bn2']).append(5, 0, fixed=[0.25, 0.5])
    with path.open('a') as file:
        file.write(line)
    assert read_layer_log(tmp_path, FILE)['fixed'].steps.tolist() == [5]
    assert capsys.readouterr().out.startswith(f'{path}{message}')


def test_a_file_of_a_hook_without_its_first_line_is_reported_and_the_others_read(tmp_path, capsys):
    LayerLog(tmp_path / '1' / FILE, ['bn']).append(5, 0, fixed=[0.25])
    (tmp_path / '2').mkdir()
    (tmp_path / '2' / FILE).write_text('{"layers": ["b')
    assert read_layer_log(tmp_path, FILE)['fixed'].steps.tolist() == [5]
    assert f'{tmp_path}/2/{FILE}, line 1: names no layers' in capsys.readouterr().out


def test_a_run_without_the_file_of_a_hook_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UsageError, match=rf'no file matches {tmp_path}/\*/{FILE}'):
        read_layer_log(tmp_path, FILE)
    (tmp_path / '1').mkdir()
    (tmp_path / '1' / FILE).touch()
    with pytest.raises(UsageError, match=rf'none of these files can be read: {tmp_path}/\*/{FILE}'):
        read_layer_log(tmp_path, FILE)
