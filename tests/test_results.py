"""docs/results.md: its tables are what its raw data say, and its raw data are whole."""

import csv
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from mmubn.analysis import comparison
from mmubn.analysis.sweeps import SweepRun

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'docs' / 'results'
SHORT = FOLDER / 'short'  # detectors of 4 epochs on 150 images, whose sweeps were replaced
PAGE = ROOT / 'docs' / 'results.md'
TOOL = runpy.run_path(str(ROOT / 'tools' / 'misc' / 'write_results.py'))
OF_LAYERS = {'similarity', 'closed', 'cost'}
NAMES = sorted({path.stem for path in FOLDER.glob('*.csv')} - OF_LAYERS)


@pytest.fixture(scope='module')
def sweeps():
    return TOOL['sweeps']()


def curves(name, folder=FOLDER):
    return comparison.read_table(folder / f'{name}.csv')


def test_every_sweep_of_the_digits_is_there(sweeps):
    assert sorted(sweeps) == NAMES


@pytest.mark.parametrize('name', NAMES)
def test_no_run_is_left_out(name, sweeps):
    expected = {(run.label, run.seed) for run in sweeps[name].runs}
    for metric in sweeps[name].metrics:
        values = curves(name)[metric]
        assert {(label, seed) for label, curve in values.items() for seed in curve.seeds} == expected
        assert all(np.isfinite(curve.values).all() for curve in values.values())


@pytest.mark.parametrize('name', NAMES)
def test_every_run_came_to_its_end(name, sweeps):
    epochs = {run.load().train_cfg.max_epochs for run in sweeps[name].runs}
    for by_label in curves(name).values():
        assert {curve.epochs[-1] for curve in by_label.values()} == epochs


def test_the_page_is_what_the_values_say():
    page = PAGE.read_text()
    assert TOOL['written'](page) == page
    blocks = {block[1] for block in TOOL['BLOCK'].findall(page)}
    assert {block.partition(' ')[0] for block in blocks} == set(TOOL['WRITERS'])
    shown = {name for name in NAMES if name not in TOOL['SHOWN_OTHERWISE']}
    assert {f'tables {name}' for name in shown} == {block for block in blocks if block.startswith('tables ')}


def test_every_picture_is_on_the_page():
    shown = set(re.findall(r'\(results/(\S+)\.png\)', PAGE.read_text()))
    assert shown == {path.stem for path in FOLDER.glob('*.png')}


@pytest.mark.parametrize('name', NAMES)
def test_the_intervals_are_those_of_the_values(name, sweeps):
    """Recomputed from the rows of the file, by the quantile of Student's t."""
    values = {}
    with (FOLDER / f'{name}.csv').open() as file:
        for row in csv.DictReader(file):
            values.setdefault((row['metric'], row['choice']), {})[int(row['seed']), int(row['epoch'])] = float(
                row['value']
            )
    baseline = sweeps[name].baseline
    text = PAGE.read_text()
    for (metric, _), own in values.items():
        if baseline is None or metric.startswith('val/') or own == values[metric, baseline]:
            continue
        epoch, seeds = max(e for _, e in own), sorted({seed for seed, _ in own})
        differences = [own[seed, epoch] - values[metric, baseline][seed, epoch] for seed in seeds]
        m = sum(values[metric, each] != values[metric, baseline] for each in sweeps[name].labels)
        digits, cells = (2 if 'top1' in metric else 3), []
        for level in {1: [0.05]}.get(m, [0.05, 0.05 / m]):
            half = stats.t.ppf(1 - level / 2, len(seeds) - 1) * np.std(differences, ddof=1) / len(seeds) ** 0.5
            cells.append(f'[{np.mean(differences) - half:+.{digits}f}, {np.mean(differences) + half:+.{digits}f}]')
        assert f'| {np.mean(differences):+.{digits}f} {" | ".join(cells)}: ' in text


def test_the_layers_of_every_run_are_there(sweeps):
    """Of each run with a gate, and of each run of the condensation."""
    for name, kept in (('closed', TOOL['WITH_GATES']), ('similarity', ('condensation',))):
        rows = TOOL['rows'](f'{name}.csv')
        layers = {}
        for row in rows:
            layers.setdefault((row['sweep'], row['choice'], int(row['seed'])), set()).add(row['layer'])
        runs = {
            (run.sweep, run.label, run.seed)
            for each in kept
            for run in sweeps[each].runs
            if has_gate(run) or name == 'similarity'
        }
        assert layers.keys() == runs
        assert {len(each) for each in layers.values()} == {20}


def test_a_gate_that_was_never_closed_is_no_gate():
    """BNET + RBN, which is UBN without a gate, repeats the detector of UBN to the last bit."""
    assert all(
        row['batches'] == row[TOOL['HEADERS']['closed'][-1]]
        for row in TOOL['rows']('closed.csv')
        if row['sweep'] == 'detectors'
    )
    for metric, by_label in curves('detectors-no-gate').items():
        own = curves('detectors')[metric]['UBN']
        assert np.array_equal(by_label['BNET + RBN'].values[0], own.values[own.seeds.index(0)])


def test_a_hook_that_looks_on_changes_nothing():
    """The sweep condensation is the same trainings as those of the sweep norms."""
    for label, curve in curves('condensation')['top1'].items():
        assert np.array_equal(curve.values, curves('norms')['top1'][label].values)


def test_the_same_training_in_several_sweeps_has_one_outcome():
    names = ('learning-rate', 'fresh-kernel', 'placement', 'gate')
    rates, fresh, placed, gate = (curves(name)['test/accuracy/top1'] for name in names)
    for norm, others in (
        ('BN', [placed['BN']]),
        ('BNET', [placed['BNET, 3x3, all'], fresh['BNET']]),
        ('UBN', [placed['UBN, 3x3, all'], fresh['UBN'], gate['input']]),
    ):
        for other in others:
            assert np.array_equal(other.values, rates[f'type={norm}, lr=0.002'].values)


def has_gate(run):
    return 'UBN' in run.load().model.backbone.norm_cfg.type


def words(values, digits=1):
    return [f'{value:.{digits}f}' for value in values]


def test_what_the_sections_say_is_in_the_raw_data():
    """Each sentence outside of the blocks that has a number or a verdict."""
    text = ' '.join(PAGE.read_text().split())

    def compare(name, metric, label, epoch=None, baseline='BN', comparisons=1):
        one, other = curves(name)[metric][label], curves(name)[metric][baseline]
        return comparison.difference(*(each.until(epoch or each.epochs[-1]) for each in (one, other)), comparisons)

    near, unknown = ('UBN', 'RBN', 'IEBN'), ('BNET', 'UnitizedBN')
    for label in (*near, *unknown):
        _, low, high = compare('norms', 'top1', label)
        assert (low > -1 and high < 1) is (label in near)
        assert low < 0 < high
        _, low_of_all, high_of_all = compare('norms', 'top1', label, comparisons=7)
        assert low_of_all < -1 or high_of_all > 1
        interval = f'{low:+.2f} to {high:+.2f}'
        assert (f'{label} {interval}' if label in near else f'{label} ({interval})') in text
    by_label = curves('norms')['top1']
    lower = [c for c in by_label if 'lower' in comparison.compared(by_label[c], by_label['BN'], 2, 7)]
    assert (lower, 'all seven at once IN alone is lower' in text) == (['IN'], True)

    early = [compare('norms', 'top1', 'UBN', epoch) for epoch in range(1, 11)]
    assert [low > 0 for _, low, _ in early] == [True] * 3 + [False] * 7
    assert all(high > 0 for _, _, high in early)
    means = words(mean for mean, _, _ in early[:3])
    assert f'after epochs 1 to 3, by {means[0]}, {means[1]} and {means[2]} points' in text
    early = [compare('norms', 'top1', 'BNET', epoch)[1] > 0 for epoch in range(1, 11)]
    assert early == [True] * 2 + [False] * 8

    mean, low, high = words(compare('components', 'top1', 'BN + affine rectification'))
    assert f'BN with the affine rectification is {mean} points higher than BN ({low} to {high})' in text
    normalization = [compare('components', 'top1', 'BN + normalization rectification', epoch) for epoch in range(1, 5)]
    assert [high < 0 for _, _, high in normalization] == [False, True, True, False]
    thresholds = [compare('threshold', 'top1', 'threshold=0.5', e, 'threshold=None') for e in range(1, 5)]
    assert [high < 0 for _, _, high in thresholds] == [False, False, True, False]

    similar = {}
    for row in TOOL['rows']('similarity.csv'):
        similar.setdefault((row['seed'], row['choice']), {}).setdefault(int(row['epoch']), []).append(
            float(row['similarity'])
        )
    for seed in '01234':
        assert np.mean(similar[seed, 'UBN'][10]) < np.mean(similar[seed, 'BN'][10])

    shares, losses = {}, []
    for row in TOOL['rows']('closed.csv'):
        if row['sweep'] == 'gate':
            batches, moved = (int(row[key]) for key in TOOL['HEADERS']['closed'][-2:])
            shares.setdefault(row['choice'], []).append((batches - moved) / batches)
    for choice, closed in shares.items():
        if np.mean(closed) > 0.1 and not choice.startswith('the other direction'):
            losses.append(-compare('gate', 'test/accuracy/top1', choice, baseline='no gate')[0])
    assert min(losses) > 0
    low, high = words([min(losses), max(losses)])
    assert f'all of them, by {low} to {high} points' in text
    seen = f"closed for {TOOL['closed_share']('gate', 'input')} of a classifier's batches and layers, and no reading"
    assert seen in ' '.join((ROOT / 'README.md').read_text().split())


def is_above(one, other, epoch, comparisons=1):
    return comparison.difference(one.until(epoch), other.until(epoch), comparisons)[1] > 0


def test_what_is_said_of_learning_rates_is_in_the_raw_data():
    """Where the head start is, and what is left at the end."""
    text = ' '.join(PAGE.read_text().split())
    own = {norm: curve for norm, (_, curve) in TOOL['chosen']('learning-rate').items()}
    for norm in ('RBN', 'BNET', 'UBN'):
        for epoch in (1, 2, 3, 10):
            assert 'not told apart' in comparison.compared(own[norm].until(epoch), own['BN'].until(epoch), 1, 3)
    by_norm = TOOL['of_grid'](curves('learning-rate')['test/accuracy/top1'])
    above = {
        (norm, epoch): [r for r, bn in by_norm['BN'].items() if is_above(by_norm[norm][r], bn, epoch)]
        for norm in ('RBN', 'BNET', 'UBN')
        for epoch in (1, 2, 3, 10)
    }
    assert above['UBN', 1] == above['BNET', 1] == [0.001, 0.002, 0.004]
    assert above['UBN', 2] == above['BNET', 2] == [0.001, 0.002]
    assert (above['UBN', 10], above['BNET', 10]) == ([0.001], [0.004])
    of_five = [
        (norm, r)
        for norm in ('UBN', 'BNET')
        for r, bn in by_norm['BN'].items()
        if is_above(by_norm[norm][r], bn, 10, 5)
    ]
    assert of_five == [('BNET', 0.004)]
    assert TOOL['chosen']('learning-rate')['BN'][0].count(0.002) == 3
    assert own['BN'].values[:, -1].mean() < by_norm['BN'][0.002].values[:, -1].mean()
    assert not any(above['RBN', epoch] for epoch in (1, 2, 3, 10))
    for norm in ('RBN', 'BNET', 'UBN'):  # nor below
        for rate, bn in by_norm['BN'].items():
            assert not any(is_above(bn, by_norm[norm][rate], epoch) for epoch in (1, 2, 3, 10))
    first, second = (
        comparison.difference(by_norm['UBN'][rate].until(2), by_norm['BN'][rate].until(2))[0] for rate in (0.001, 0.002)
    )
    assert f'UBN is {first:.1f} points above BN at 0.001 and {second:.1f} at 0.002' in text


def test_what_is_said_of_mnist_is_in_the_raw_data():
    """BN's rate is at the end of the grid; where the others are above it."""
    chosen = TOOL['chosen']('mnist')
    by_norm = TOOL['of_grid'](curves('mnist')['test/accuracy/top1'])
    bn = by_norm['BN']
    assert set(chosen['BN'][0]) == {max(bn)}
    own = {
        (norm, epoch): comparison.compared(chosen[norm][1].until(epoch), chosen['BN'][1].until(epoch), 1, 2)
        for norm in ('BNET', 'UBN')
        for epoch in (1, 2, 3, 10)
    }
    assert [each for each, said in own.items() if 'not told apart' not in said] == [('BNET', 2)]
    assert own['BNET', 2].endswith(': higher')
    for norm, at_the_end in (('BNET', [0.001]), ('UBN', [0.002])):
        assert [rate for rate in bn if is_above(by_norm[norm][rate], bn[rate], 10)] == at_the_end
        ahead = (by_norm[norm][0.001].values - bn[0.001].values).mean(0)
        assert np.argmax(ahead[[0, 1, 2, 9]]) == 2


def test_what_is_said_of_placements_is_in_the_raw_data():
    """That nothing is told apart at the end, and how large the head start is."""
    text = ' '.join(PAGE.read_text().split())
    accuracy = curves('placement')['test/accuracy/top1']
    bn = accuracy.pop('BN')
    pairs = [(curve, bn) for curve in accuracy.values()]
    pairs += [(accuracy[one], accuracy[other]) for one, other in TOOL['PAIRS']['placement'].values()]
    for one, other in pairs:
        assert not is_above(one, other, 10)
        assert not is_above(other, one, 10)
    assert all(is_above(curve, bn, 1) for curve in accuracy.values())
    early = {label: comparison.difference(curve.until(1), bn.until(1))[0] for label, curve in accuracy.items()}
    low, high = (pick(early, key=early.get) for pick in (min, max))
    assert f'by {early[low]:.1f} (`{low}`) to {early[high]:.1f} points (`{high}`)' in text
    for norm in ('BNET', 'UBN'):
        for where in ('all', 'last of each block'):
            by_kernel = [early[f'{norm}, {k}x{k}, {where}'] for k in (3, 5, 7)]
            assert by_kernel == sorted(by_kernel)
    below = [label for label, curve in accuracy.items() if is_above(bn, curve, 6)]
    assert below == ['BNET, 3x3, last of each block', 'BNET, 3x3, all', 'UBN, 5x5, last of each block']


def test_what_is_said_of_detectors_is_in_the_raw_data():
    """Who is above BN at the end, by which interval, and from which epoch on."""
    text = ' '.join(PAGE.read_text().split())
    box, mask = curves('detectors')['bbox_mAP'], curves('detectors')['segm_mAP']
    assert [norm for norm in box if is_above(box[norm], box['BN'], 8, 3)] == ['UBN']
    assert [norm for norm in box if is_above(box[norm], box['BN'], 8)] == ['UBN', 'BNET']
    assert [norm for norm in mask if is_above(mask[norm], mask['BN'], 8, 3)] == []
    assert [norm for norm in mask if is_above(mask[norm], mask['BN'], 8)] == ['UBN']
    for norm in ('UBN', 'BNET'):
        assert [is_above(box[norm], box['BN'], epoch) for epoch in range(1, 9)] == [False] * 4 + [True] * 4
        assert not any(is_above(box['BN'], box[norm], epoch) for epoch in range(1, 9))
    gained = words(100 * (box[norm].values[:, -1] - box[norm].values[:, -2]).mean() for norm in ('BN', 'UBN'))
    spread = words((100 * (by['UBN'].values - by['BN'].values)[:, -1].std(ddof=1) for by in (box, mask)), 2)
    assert f'larger: {spread[0]} points for box AP and {spread[1]} for mask AP' in text
    first_seen = [row.split(' | ') for row in TOOL['power']().splitlines()[2:]]  # spread; seeds for 1 AP, 2 AP
    assert [float(row[1]) < float(now) for row, now in zip(first_seen, spread, strict=True)] == [True, True]
    assert int(first_seen[0][3]) == len(box['BN'].seeds) + 1
    start = curves('detectors-start')['bbox_mAP']
    assert {int(row[5].strip(' |')) for row in first_seen} == {len(start['UBN from BN'].seeds)}
    assert f'still brings BN {gained[0]} and UBN {gained[1]} box AP' in text
    assert all(box[norm].values[:, 0].mean() < box['BN'].values[:, 0].mean() for norm in box if norm != 'BN')
    assert not all(is_above(mask[norm], mask['BN'], epoch) for norm in ('UBN', 'BNET') for epoch in range(5, 9))
    assert is_above(box['UBN'], box['RBN'], 8, 2)
    assert not is_above(box['UBN'], box['BNET'], 8)
    for name, metric, told in (
        ('detectors-start', 'bbox_mAP', []),
        ('detectors-start', 'segm_mAP', []),
        ('detectors-placement', 'bbox_mAP', []),
        ('detectors-placement', 'segm_mAP', ['UBN as the last norm of each block over UBN as all']),
    ):
        rows = TOOL['pairs'](name, metric).splitlines()[2:]
        assert [row.split(' | ')[0].strip('| ') for row in rows if 'not told apart' not in row] == told
    assert is_above(start['UBN from BN'], start['BN from BN'], 8, 2)
    assert is_above(start['BN from BN'], box['BN'], 8)

    both, last = 'UBN, backbone and neck', 'UBN, last of each block'
    placed = {metric: curves('detectors-placement')[metric] for metric in ('bbox_mAP', 'segm_mAP')}
    bn = 'BN, backbone and neck'
    assert is_above(placed['bbox_mAP'][both], placed['bbox_mAP'][bn], 8)
    assert is_above(box['UBN'], placed['bbox_mAP'][last], 8)
    assert not is_above(box['UBN'], placed['bbox_mAP'][both], 8)
    assert is_above(placed['segm_mAP'][both], placed['segm_mAP'][bn], 8, 2)


def test_what_is_said_in_short_is_in_the_answers():
    text, readme = (' '.join(path.read_text().split()) for path in (PAGE, ROOT / 'README.md'))
    end, *_, norms, _, kernels, _, _, gate = TOOL['answers']().splitlines()
    box, mask = re.findall(r'from scratch: (.+?): higher for box AP, (.+?): not told apart for mask AP', end)[0]
    assert f"ends above BN's, {box} box AP; in mask AP, {mask}, it is not told apart" in readme
    assert f'expect {"{} box AP ({} to {})".format(*re.findall(r"[0-9.]+", box))} more' in text
    assert len(re.findall('not told apart on ', end)) == 2
    assert len(re.findall(': not told apart', kernels)) == 4
    assert re.search(
        r'last norm of each block over UBN as all: .* not told apart in box AP, .* lower in mask AP', norms
    )
    assert 'higher: none' in gate
    for metric, choice in (('bbox_mAP', 'UBN'), ('test/accuracy/top1', 'UBN, 3x3, all')):
        costs = TOOL['placed'](metric)[1]
        training, evaluation = (TOOL['time'](costs, choice, measure) for measure in ('training', 'evaluation'))
        assert f'for {training} of the training and {evaluation} of the evaluation time' in text
    both = comparison.difference(*(curves('detectors')['bbox_mAP'][norm] for norm in ('UBN', 'BN')), 6)
    assert f"UBN's {100 * both[0]:+.1f} has the interval [{100 * both[1]:+.1f}, {100 * both[2]:+.1f}]" in text


def test_what_is_said_of_batch_sizes_is_in_the_raw_data():
    text, top1 = ' '.join(PAGE.read_text().split()), curves('batch-size')['top1']
    for size in (8, 32, 128):
        pair = [top1[f'type={norm}, batch_size={size}'] for norm in ('UBN', 'BN')]
        assert f'{comparison.compared(*pair, 1).partition(":")[0]} at {size}' in text


def test_series_without_our_layers_did_not_move():
    """The runs of PyTorch's norms are those that were made before the C++ kernels, to the last bit."""
    first, second = (curves('norms', folder)['top1'] for folder in (FOLDER / 'torch-operators', FOLDER))
    for label in ('BN', 'IN', 'GN'):
        assert np.array_equal(first[label].values, second[label].values)


# ---- what the tool computes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """In place of docs/results."""
    monkeypatch.setitem(TOOL['curves'].__globals__, 'FOLDER', tmp_path)
    return tmp_path


def test_a_rate_is_chosen_by_val_and_reported_on_test(folder):
    """For each seed by itself: seed 0 by the accuracy at the end, seed 1, whose rates are equal, the lowest."""
    val = {0.001: ([99, 50], [99, 80]), 0.004: ([10, 60], [10, 80]), 0.002: ([0, 55], [0, 70])}
    test = {0.001: ([1, 2], [3, 4]), 0.004: ([5, 6], [7, 8]), 0.002: ([9, 9], [9, 9])}
    lines = [
        [f'type=BN, lr={rate}', seed, f'{part}/accuracy/top1', epoch, value]
        for part, found in (('val', val), ('test', test))
        for rate, seeds in found.items()
        for seed, values in enumerate(seeds)
        for epoch, value in enumerate(values, 1)
    ]
    comparison.write_csv(folder / 'rates.csv', ['choice', 'seed', 'metric', 'epoch', 'value'], lines)
    ((rates, curve),) = TOOL['chosen']('rates').values()
    assert rates == [0.004, 0.001]
    assert curve.values.tolist() == [[5, 6], [3, 4]]


@pytest.mark.parametrize(('effect', 'seeds'), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_that_a_paired_t_test_needs(effect, seeds):
    """Known sample sizes of a paired t-test at 5% with a power of 80%, for effects in standard deviations."""
    assert TOOL['seeds_needed'](effect, 1.0, 0.05) == seeds


def test_closed_batches_are_counted_from_the_checkpoint(tmp_path):
    run = SweepRun('gate', 'input', 3, 'config.py', 1, {})
    torch.save(
        {
            'meta': {'iter': 31},
            'state_dict': {
                f'{name}.{key}': value
                for name, tracked in (('a', 31), ('b', 7))
                for key, value in (
                    ('num_batches_tracked', torch.tensor(tracked)),
                    ('running_similarity', torch.tensor(0.1)),
                )
            }
            | {'c.num_batches_tracked': torch.tensor(31)},
        },
        tmp_path / 'epoch_1.pth',
    )
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    rows = TOOL['closed'](run, tmp_path)
    assert rows == [['gate', 'input', 3, 'a', 31, 31], ['gate', 'input', 3, 'b', 31, 7]]


def test_closed_gates_are_shares_of_all_layers_and_seeds(folder):
    lines = [
        ['gate', 'input', seed, layer, 100, moved]
        for seed, layer, moved in ((0, 'a', 100), (0, 'b', 60), (1, 'a', 100), (1, 'b', 100))
    ]
    comparison.write_csv(folder / 'closed.csv', TOOL['HEADERS']['closed'], [*lines, ['other', 'input', 0, 'a', 100, 0]])
    *_, row = TOOL['closed_gates']('gate').splitlines()
    assert row == '| input | 10.0% | 1 of 4 | 40 |'
