"""Write the tables and answers of docs/results.md from the values in docs/results/, so that it says what they say.

With --from, first take those values from the runs of compare_norms.py: of each sweep that is done, every value after
every epoch, its plots, and what else the page shows of it. What a choice costs is measured by measure_cost.py.

Example:

    python tools/misc/write_results.py --from work_dirs/digits
    python tools/misc/write_results.py --check  # an error where the page is out of date
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from mmubn.analysis.comparison import Curve, compared, count_comparisons, difference, read_table, summarize, write_csv
from mmubn.analysis.cost import HEADER
from mmubn.analysis.plots import line_style, plt, save
from mmubn.analysis.predictions import last_checkpoint
from mmubn.analysis.runs import read_layer_log
from mmubn.analysis.sweeps import RUN_DONE, Sweep, SweepRun, read_sweeps
from mmubn.cli import UsageError, add_debug_argument, run_tool

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / 'docs' / 'results'
PAGE = ROOT / 'docs' / 'results.md'
BLOCK = re.compile(r'(<!-- written: (.+?) -->\n)(.*?)(<!-- end -->)', re.DOTALL)
EARLY = (1, 2, 3)  # epochs
# Of each metric, the sweeps whose choices are placements of norms; their costs are measured together.
PLACEMENTS = {'test/accuracy/top1': ['placement'], 'bbox_mAP': ['detectors', 'detectors-placement']}
AXES = {'test/accuracy/top1': 'test accuracy (%)', 'bbox_mAP': 'box AP', 'segm_mAP': 'mask AP'}
# Plots of plot_condensation.py, in the place of that of compare_norms.py.
PLOTS = {'condensation': {'similarity': 'condensation', 'seed0-layers': 'condensation-layers'}}
SHOWN_OTHERWISE = ('learning-rate', 'mnist', 'detectors-no-gate')  # not by the tables and plot of compare_norms.py
WITH_GATES = ('gate', 'learning-rate', 'detectors')  # all from scratch: their layers counted no batch before
# Choices of a sweep that are compared by two, beside its baseline; those of detectors-* also with those of detectors.
PAIRS: dict[str, dict[str, tuple[str, str]]] = {
    'placement': {
        f'{norm} {k}x{k} over 3x3': (f'{norm}, {k}x{k}, all', f'{norm}, 3x3, all')
        for norm in ('BNET', 'UBN')
        for k in (5, 7)
    },
    'fresh-kernel': {f'{norm}, random over the identity': (f'{norm}, random', norm) for norm in ('BNET', 'UBN')},
    'detectors': {'UBN over BNET': ('UBN', 'BNET'), 'UBN over RBN': ('UBN', 'RBN')},
    'detectors-start': {
        'UBN from a BN classifier over UBN from scratch': ('UBN from BN', 'UBN'),
        'UBN from a BN classifier over UBN from a UBN classifier': ('UBN from BN', 'UBN from UBN'),
        'BN from a BN classifier over BN from scratch': ('BN from BN', 'BN'),
    },
    'detectors-placement': {
        'UBN in backbone and neck over UBN in the backbone': ('UBN, backbone and neck', 'UBN'),
        'UBN as the last norm of each block over UBN as all': ('UBN, last of each block', 'UBN'),
    },
}
HEADERS = {
    'similarity': ['sweep', 'choice', 'seed', 'epoch', 'layer', 'similarity', 'running similarity'],
    'closed': ['sweep', 'choice', 'seed', 'layer', 'batches', 'batches that moved the running statistics'],
    'cost': HEADER,
}
APS = ('bbox_mAP', 'segm_mAP')
Curves = dict[str, Curve]


def sweeps() -> dict[str, Sweep]:
    return {sweep.name: sweep for sweep in read_sweeps(ROOT / 'configs' / 'sweeps' / 'digits.yml')}


def curves(sweep: str, metric: str) -> Curves:
    """Read the curves of one metric of a sweep by choice, in points: an AP is from 0 to 1, an accuracy in percent."""
    found = read_table(FOLDER / f'{sweep}.csv')[metric]
    scale = 1 if 'top1' in metric else 100
    return {label: replace(curve, values=scale * curve.values) for label, curve in found.items()}


def rows(name: str) -> list[dict[str, str]]:
    if not (FOLDER / name).exists():
        return []
    with (FOLDER / name).open(newline='') as file:
        return list(csv.DictReader(file))


def table(header: list[str], lines: list[list[str]]) -> str:
    return '\n'.join([f'| {" | ".join(cells)} |' for cells in (header, ['---'] * len(header), *lines)])


# ---- a learning rate for each norm


def of_grid(by_label: Curves) -> dict[str, dict[float, Curve]]:
    """{norm: {learning rate: curve}} of a grid of both."""
    found: dict[str, dict[float, Curve]] = {}
    for label, curve in by_label.items():
        norm, rate = re.fullmatch(r'type=(\w+), lr=(.+)', label).groups()
        found.setdefault(norm, {})[float(rate)] = curve
    return found


def chosen(sweep: str) -> dict[str, tuple[list[float], Curve]]:
    """Of each norm and seed, the rate whose accuracy on val is highest at the end (the lowest such), and test at it."""
    val, test = (of_grid(curves(sweep, f'{part}/accuracy/top1')) for part in ('val', 'test'))
    found = {}
    for norm, by_rate in val.items():
        rates = sorted(by_rate)
        last = np.array([by_rate[rate].values[:, -1] for rate in rates])  # (rates, seeds)
        best = [rates[i] for i in last.argmax(0)]
        first = test[norm][rates[0]]
        values = np.array([test[norm][rate].values[i] for i, rate in enumerate(best)])
        found[norm] = best, Curve(first.seeds, first.epochs, values, 'test/accuracy/top1')
    return found


def at_own_rates(sweep: str) -> Curves:
    return {norm: curve for norm, (_, curve) in chosen(sweep).items()}


def own_rates(sweep: str) -> str:
    """The norms, each at its own rates: accuracy on test, and the difference from BN."""
    own = chosen(sweep)
    baseline = own['BN'][1]
    lines = []
    for norm, (rates, curve) in own.items():
        last = curve.values[:, -1]
        cells = [norm, ', '.join(f'{rate:g}' for rate in rates)]
        cells += [f'{last.mean():.2f} ± {last.std(ddof=1):.2f}']
        for epoch in (*EARLY, curve.epochs[-1]):
            text = compared(curve.until(epoch), baseline.until(epoch), 1, len(own) - 1) if norm != 'BN' else ''
            cells.append(text.replace(': not told apart', ''))
        lines.append(cells)
    epochs = [*(f'after epoch {epoch}' for epoch in EARLY), 'at the end']
    header = [
        '',
        'rates of the seeds',
        'test accuracy at the end (%)',
        *(f'difference from BN {each}' for each in epochs),
    ]
    return table(header, lines)


def rate_curve(sweep: str) -> str:
    """The difference of each norm from BN at one and the same rate."""
    by_norm = of_grid(curves(sweep, 'test/accuracy/top1'))
    lines = []
    for norm in (each for each in by_norm if each != 'BN'):
        for rate, curve in by_norm[norm].items():
            pairs = [(curve.until(e), by_norm['BN'][rate].until(e)) for e in (*EARLY, curve.epochs[-1])]
            lines.append([f'{norm}, {rate:g}', *(compared(*pair, 1).partition(':')[0] for pair in pairs)])
    header = ['norm, rate', *(f'after epoch {epoch}' for epoch in EARLY), 'at the end']
    return table(header, lines)


# ---- the gate


def batches_and_closed(sweep: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each choice, the batches of each layer and seed, and how many of them found its gate closed."""
    found: dict[str, list[list[int]]] = {}
    for row in (row for row in rows('closed.csv') if row['sweep'] == sweep):
        found.setdefault(row['choice'], []).append([int(row[key]) for key in HEADERS['closed'][-2:]])
    counts = {choice: np.transpose(layers) for choice, layers in found.items()}
    return {choice: (batches, batches - moved) for choice, (batches, moved) in counts.items()}


def closed_gates(sweep: str) -> str:
    """How many training batches found a gate closed, and in how many layers."""
    lines = []
    for choice, (batches, closed) in batches_and_closed(sweep).items():
        share = 100 * closed.sum() / batches.sum()
        lines.append([choice, f'{share:.1f}%', f'{(closed > 0).sum()} of {len(closed)}', f'{closed.max()}'])
    header = ['', 'closed, of all batches and layers', 'layers and seeds with a closed batch', 'most in one layer']
    return table(header, lines)


# ---- how alike the features are

CONDENSED = 0.3  # the paper's Appendix A


def similarity() -> str:
    """Mean over the layers, before and after the training; how many layers are condensed; the lowest running one."""
    lines, own = [], rows('similarity.csv')
    for choice in dict.fromkeys(row['choice'] for row in own):
        cells, running = [choice], [float(row['running similarity'] or 'nan') for row in own if row['choice'] == choice]
        by_epoch: dict[int, dict[str, list[float]]] = {}
        for row in (row for row in own if row['choice'] == choice):
            by_epoch.setdefault(int(row['epoch']), {}).setdefault(row['seed'], []).append(float(row['similarity']))
        for epoch in (min(by_epoch), max(by_epoch)):
            cells.append(', '.join(f'{np.nanmean(values):.2f}' for values in by_epoch[epoch].values()))
        last = by_epoch[max(by_epoch)].values()
        cells.append(', '.join(f'{100 * np.mean(np.array(values) > CONDENSED):.0f}%' for values in last))
        cells.append('' if np.isnan(running).all() else f'{np.nanmin(running):.3f}')
        lines.append(cells)
    header = ['', 'before the training, each seed', 'after it', f'layers above {CONDENSED} after it']
    return table([*header, 'lowest running similarity of a layer'], lines)


# ---- rounding

FIRST = FOLDER / 'torch-operators'  # the same runs by torch's operators


def _both() -> Iterator[tuple[str, str, Curves, Curves]]:
    """Sweep, metric, and the curves of both series, of the seeds that both have."""
    for path in sorted(FIRST.glob('*.csv')):
        own = FOLDER / path.name if (FOLDER / path.name).exists() else FOLDER / 'short' / path.name
        for metric, by_label in read_table(path).items():
            found = read_table(own)[metric]
            count = {label: len(curve.seeds) for label, curve in by_label.items()}
            second = {
                label: replace(found[label], seeds=found[label].seeds[:n], values=found[label].values[:n])
                for label, n in count.items()
            }
            yield path.stem, metric, by_label, second


def rounding() -> str:
    """How far the runs of each sweep moved, those that moved at all."""
    lines = []
    for name, metric, first, second in _both():
        apart = [np.abs(curve.values - second[label].values) for label, curve in first.items()]
        moved = (1 if 'top1' in metric else 100) * np.concatenate([each for each in apart if each.any()])
        count = moved.any(axis=1).sum()
        lines.append([f'`{name}`, {metric}', str(count), f'{moved[:, -1].mean():.2f}', f'{moved.max():.1f}'])
    return table(
        ['sweep, metric', 'runs that moved', 'last value, mean distance', 'any epoch, largest distance'], lines
    )


def verdicts() -> str:
    """What both series conclude."""
    lines = []
    for name, metric, *both in _both():
        if metric in ('top1', 'bbox_mAP') and name in ('norms', 'detection-from-scratch', 'detection-handed-over'):
            digits = 2 if metric == 'top1' else 3
            for label in (label for label in both[0] if label not in ('BN', 'IN', 'GN')):
                cells = [compared(series[label], series['BN'], digits) for series in both]
                lines.append([f'`{name}`, {label}', *cells])
    return table(['sweep, norm', "by torch's operators", 'by the C++ kernels'], lines)


# ---- cost


def placed(metric: str) -> tuple[Curves, dict[tuple[str, str], dict[str, str]]]:
    """The curves of all placements, and the rows of what they cost by choice and measure."""
    names = PLACEMENTS[metric]
    by_label = {label: curve for name in names for label, curve in curves(name, metric).items()}
    return by_label, {(row['choice'], row['measure']): row for row in rows('cost.csv') if row['sweep'] in names}


def cost(metric: str) -> str:
    """Each placement's metric beside what it costs, as ratios to the baseline of the first of its sweeps."""
    of_metric, costs = placed(metric)
    digits = 2 if 'top1' in metric else 1
    lines = []
    for choice, curve in of_metric.items():
        last = curve.values[:, -1]
        cells = [choice, f'{last.mean():.{digits}f} ± {last.std(ddof=1):.{digits}f}']
        for measure in ('training', 'evaluation'):
            row = costs[choice, measure]
            low, mid, high = (float(row[key]) for key in ('ratio, first quartile', 'ratio', 'ratio, third quartile'))
            cells.append(f'{mid:.2f} ({low:.2f} to {high:.2f})')
        cells += [f'{float(costs[choice, measure]["ratio"]):.2f}' for measure in ('saved memory', 'parameters')]
        lines.append(cells)
    header = ['', AXES[metric], f'training time, {next(iter(of_metric))} = 1', 'evaluation time']
    header += ['saved memory', 'parameters']
    return table(header, lines)


# ---- how many seeds


def power() -> str:
    """How many seeds a paired t-test needs, by the spread of the first detectors that were trained to the end."""
    with (ROOT / 'docs' / 'padding.csv').open(newline='') as file:
        found = [row for row in csv.DictReader(file) if row['sweep'] == 'trained-unpadded']
    found = [row for row in found if row['evaluation'] == 'unpadded']
    lines = []
    for metric, name in (('bbox_mAP', 'box AP'), ('segm_mAP', 'mask AP')):
        bn, ubn = (
            [float(row['value']) for row in found if (row['choice'], row['metric']) == (norm, metric)]
            for norm in ('BN', 'UBN')
        )
        spread = np.std(np.subtract(ubn, bn), ddof=1)
        needed = [seeds_needed(points / 100, spread, 0.05 / m) for points in (1, 2) for m in (1, 3)]
        lines.append([name, f'{100 * spread:.2f}', *map(str, needed)])
    header = ['', 'standard deviation of a difference, points']
    header += [f'seeds for {p} AP, {m}' for p in ('1', '2') for m in ('one comparison', 'three')]
    return table(header, lines)


def seeds_needed(effect: float, spread: float, level: float, power: float = 0.8) -> int:
    """Return the fewest seeds with which a paired t-test finds ``effect`` with probability ``power``."""
    for n in range(2, 1000):
        t, shift = stats.t.ppf(1 - level / 2, n - 1), effect / spread * n**0.5
        if stats.nct.sf(t, n - 1, shift) >= power:  # on the right side
            return n
    raise ValueError(f'more than 1,000 seeds for an effect of {effect} with a spread of {spread}')


# ---- choices by two


def pairs(sweep: str, metric: str) -> str:
    """Differences between two choices of a sweep, or of it and the sweep detectors, in points."""
    found = of_pairs(sweep, metric)
    lines = []
    for name, (one, other) in found.items():
        count = len({*one.seeds} & {*other.seeds})
        alone, all_at_once = (compared(one, other, 2, m) for m in (1, len(found)))
        lines.append([name, str(count), alone.partition(':')[0], all_at_once.partition(' ')[2]])
    header = [AXES[metric].partition(' (')[0], 'seeds of both', 'difference, 95% interval']
    return table([*header, f'interval of all {len(found)} at once'], lines)


def of_pairs(sweep: str, metric: str) -> dict[str, tuple[Curve, Curve]]:
    """The curves of each pair."""
    by_label = curves(sweep, metric)
    if sweep.startswith('detectors-'):
        by_label = curves('detectors', metric) | by_label
    return {name: (by_label[one], by_label[other]) for name, (one, other) in PAIRS[sweep].items()}


def said_of_pairs(sweep: str, metric: str) -> dict[str, str]:
    """What the interval of all pairs at once says of each."""
    found = of_pairs(sweep, metric)
    return {name: compared(*pair, 1, len(found)) for name, pair in found.items()}


def listed(said: dict[str, str]) -> str:
    return '; '.join(f'{name} {text}' for name, text in said.items())


# ---- the first page


def of(by_label: Curves, choice: str, baseline: str, epoch: int | None = None, comparisons: int | None = None) -> str:
    """A choice's difference from the baseline in points, by the interval of the sweep's table, and what it says."""
    m = comparisons or count_comparisons(by_label, by_label[baseline])
    one, other = by_label[choice], by_label[baseline]
    if epoch is not None:
        one, other = one.until(epoch), other.until(epoch)
    return compared(one, other, 1, m)


def of_both_aps(word: str, say: Callable[[str], str]) -> str:
    return ', '.join(f'{say(metric)} {word} {AXES[metric]}' for metric in APS)


def in_the_end() -> str:
    digits, mnist = (at_own_rates(name) for name in ('learning-rate', 'mnist'))
    scratch = of_both_aps('for', lambda metric: of(curves('detectors', metric), 'UBN', 'BN'))
    start = of_both_aps('for', lambda metric: of(curves('detectors-start', metric), 'UBN from BN', 'BN from BN'))
    return (
        '**Is UBN better than BN at the end of training?** Accuracy, each at its own learning rate: '
        f'{of(digits, "UBN", "BN")} on the digits, {of(mnist, "UBN", "BN")} on MNIST. Mask R-CNN from scratch: '
        f'{scratch}; from a BN classifier: {start}.'
    )


def early() -> str:
    digits, mnist = (at_own_rates(name) for name in ('learning-rate', 'mnist'))
    by_norm = of_grid(curves('learning-rate', 'test/accuracy/top1'))
    both = {rate: [by_norm[norm][rate].until(2) for norm in ('UBN', 'BN')] for rate in by_norm['BN']}
    at = [f'{compared(*pair, 1, len(both))} at {rate:g}' for rate, pair in both.items()]
    return (
        f'**Is it there earlier?** Accuracy after epoch 2, each at its own rate: {of(digits, "UBN", "BN", 2)} on the '
        f'digits, {of(mnist, "UBN", "BN", 2)} on MNIST. At one rate for both, digits: {", ".join(at)}.'
    )


def parts() -> str:
    box = curves('detectors', 'bbox_mAP')
    found = ', '.join(f'{norm} {of(box, norm, "BN")}' for norm in box if norm not in ('BN', 'UBN'))
    return (
        f'**Which of its parts does it?** Box AP over BN: {found}; UBN, which has both and a gate, '
        f'{of(box, "UBN", "BN")}. {listed(said_of_pairs("detectors", "bbox_mAP"))}. The gate was closed for '
        f'{closed_share("detectors", "UBN")} of its batches.'
    )


def closed_share(sweep: str, choice: str) -> str:
    """Of all layers, seeds and batches."""
    batches, closed = batches_and_closed(sweep)[choice]
    return f'{100 * closed.sum() / batches.sum():.1f}%' if closed.any() else 'none'


def rates() -> str:
    own = chosen('learning-rate')
    found = '; '.join(f'{norm} {", ".join(f"{rate:g}" for rate in best)}' for norm, (best, _) in own.items())
    doublings = {norm: replace(curve, values=np.log2(best)[:, None]) for norm, (best, curve) in own.items()}
    return (
        f"**Which learning rate?** Chosen for splits 0 to 4 of the digits: {found}. UBN's over BN's, in doublings: "
        f'{of(doublings, "UBN", "BN", None, 1)}.'
    )


def time(costs: dict[tuple[str, str], dict[str, str]], choice: str, measure: str = 'training') -> str:
    """The time of a placement, as a ratio to the baseline's."""
    return f'{float(costs[choice, measure]["ratio"]):.2f}'


def placement() -> str:
    accuracy, costs = placed('test/accuracy/top1')
    found = [
        f'{choice} {of(accuracy, choice, "BN")}, {time(costs, choice)} and {time(costs, choice, "evaluation")}'
        for choice in (
            'UBN, 3x3, all',
            'UBN, 3x3, last of each block',
            'BNET, 3x3, all',
            'BNET, 3x3, last of each block',
        )
    ]
    pair = 'UBN as the last norm of each block over UBN as all'
    detectors = of_both_aps('in', lambda metric: said_of_pairs('detectors-placement', metric)[pair])
    return (
        f"**Which norms of the backbone?** Accuracy over BN, and training and evaluation in BN's time: "
        f'{"; ".join(found)}. Mask R-CNN, {pair}: {detectors}.'
    )


def neck() -> str:
    sweep, pair = 'detectors-placement', 'UBN in backbone and neck over UBN in the backbone'
    over_ubn = of_both_aps('in', lambda metric: said_of_pairs(sweep, metric)[pair])
    choices = ('UBN, backbone and neck', 'BN, backbone and neck')
    over_bn = of_both_aps('in', lambda metric: of(curves(sweep, metric), *choices))
    return f'**The neck too?** Mask R-CNN, {pair}: {over_ubn}; over BN in both: {over_bn}.'


def kernel() -> str:
    _, costs = placed('test/accuracy/top1')
    times = ', '.join(
        f'{norm} {" / ".join(time(costs, f"{norm}, {k}x{k}, all") for k in (3, 5, 7))}' for norm in ('BNET', 'UBN')
    )
    said = listed(said_of_pairs('placement', 'test/accuracy/top1'))
    return f"**Which kernel?** Accuracy: {said}. Training of 3x3 / 5x5 / 7x7 in BN's time: {times}."


def start() -> str:
    return f'**Which start?** Box AP: {listed(said_of_pairs("detectors-start", "bbox_mAP"))}.'


def fresh_kernel() -> str:
    return (
        "**Does a random kernel at the start, the released code's, do better than the identity?** Accuracy: "
        f'{listed(said_of_pairs("fresh-kernel", "test/accuracy/top1"))}.'
    )


def gate() -> str:
    accuracy = curves('gate', 'test/accuracy/top1')
    better = [choice for choice in accuracy if of(accuracy, choice, 'no gate').endswith(': higher')]
    worse = [choice for choice in accuracy if of(accuracy, choice, 'no gate').endswith(': lower')]
    alone = [choice for choice in accuracy if of(accuracy, choice, 'no gate', None, 1).endswith(': lower')]
    found = {'higher': better, 'lower': worse, 'lower by an interval of its own': [c for c in alone if c not in worse]}
    said = '; '.join(f'{word}: {" / ".join(choices) or "none"}' for word, choices in found.items())
    return (
        f"**Does the gate matter?** At the paper's threshold it was closed for {closed_share('gate', 'input')} of the "
        f"classifier's batches and layers, at a rate of 0.002; accuracy over no gate "
        f'{of(accuracy, "input", "no gate")}. Of {len(accuracy) - 1} readings and rules, that one among them, {said}.'
    )


def answers() -> str:
    lines = (in_the_end, early, parts, rates, placement, neck, kernel, start, fresh_kernel, gate)
    return '\n'.join(f'{i}. {line()}' for i, line in enumerate(lines, 1))


# ---- the page


def compared_table(sweep: str) -> str:
    """The tables of compare_norms.py; of a metric on test and on val, those on test."""
    found = read_table(FOLDER / f'{sweep}.csv')
    shown = {metric: by_label for metric, by_label in found.items() if not metric.startswith('val/')}
    return '\n'.join(line for line in summarize(sweeps()[sweep], shown).splitlines()[2:] if line[:1] in '|').strip()


WRITERS: dict[str, Callable[..., str]] = {
    'answers': answers,
    'tables': compared_table,
    'own-rates': own_rates,
    'rate-curve': rate_curve,
    'closed-gates': closed_gates,
    'cost': cost,
    'power': power,
    'pairs': pairs,
    'similarity': similarity,
    'rounding': rounding,
    'verdicts': verdicts,
}


def written(page: str) -> str:
    """The page with every block as the values have it."""

    def block(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        return f'{match[1]}\n{WRITERS[name](*arguments)}\n\n{match[4]}'

    return BLOCK.sub(block, page)


# ---- pictures


def draw_rates() -> None:
    """Draw the difference of UBN from BN over the learning rate."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axis, name, title in zip(axes, ('learning-rate', 'mnist'), ('digits', 'MNIST'), strict=True):
        by_norm = of_grid(curves(name, 'test/accuracy/top1'))
        for i, epoch in enumerate((*EARLY, by_norm['BN'][min(by_norm['BN'])].epochs[-1])):
            pairs = [(by_norm['UBN'][r].until(epoch), curve.until(epoch)) for r, curve in by_norm['BN'].items()]
            mean, low, high = np.transpose([difference(*pair) for pair in pairs])
            style = line_style(i)
            axis.plot(list(by_norm['BN']), mean, label=f'after epoch {epoch}', **style)
            axis.fill_between(list(by_norm['BN']), low, high, color=style['color'], alpha=0.12, linewidth=0)
        axis.axhline(0, color='black', linewidth=1)
        splits = len(next(iter(by_norm['BN'].values())).seeds)
        axis.set(xscale='log', xlabel='learning rate of both', title=f'{title}, {splits} splits')
        axis.set_xticks(list(by_norm['BN']), [f'{rate:g}' for rate in by_norm['BN']])
        axis.minorticks_off()
    axes[0].set(ylabel='accuracy of UBN minus that of BN, points')
    axes[0].legend(fontsize=8)
    caption = 'Mean over the splits of the data, and the 95% interval of each by itself (paired t).'
    save(figure, FOLDER / 'rate-curve.png', caption)


def draw_cost() -> None:
    """Draw what a placement brings against what it costs."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    for axis, metric in zip(axes, PLACEMENTS, strict=True):
        by_label, costs = placed(metric)
        for i, (label, curve) in enumerate(by_label.items()):
            last, style = curve.values[:, -1], line_style(i) | {'linestyle': ''}
            axis.errorbar(
                float(costs[label, 'training']['ratio']), last.mean(), last.std(ddof=1), label=label, capsize=2, **style
            )
        axis.set(xlabel=f'training time, {next(iter(by_label))} = 1', ylabel=AXES[metric])
        axis.legend(fontsize=7)
    save(figure, FOLDER / 'cost.png', 'Mean and standard deviation over the seeds against the time of an iteration.')


# ---- from the runs


def collect(work_dir: Path) -> None:
    """Take what the page shows from the runs of the sweeps that are done."""
    if not work_dir.is_dir():
        raise UsageError(f'{work_dir} does not exist; give the folder of the runs, which compare_norms.py names.')
    own: dict[str, list[list]] = {'similarity': [], 'closed': [], 'cost': []}  # by the sweep first
    for sweep in sweeps().values():
        folder = work_dir / sweep.name
        if not all((run.folder(work_dir) / RUN_DONE).exists() for run in sweep.runs):
            print(f'{sweep.name}: not all runs are done in {work_dir}; what there is of it stays')
            continue
        shutil.copy(folder / 'runs.csv', FOLDER / f'{sweep.name}.csv')
        if sweep.name not in SHOWN_OTHERWISE:
            for plot, name in PLOTS.get(sweep.name, {sweep.metrics[0].replace('/', '_'): sweep.name}).items():
                shutil.copy(folder / f'{plot}.png', FOLDER / f'{name}.png')
        if (folder / 'cost.csv').exists():
            with (folder / 'cost.csv').open(newline='') as file:
                own['cost'] += [[*row.values()] for row in csv.DictReader(file)]
        for run in sweep.runs:
            found = run.folder(work_dir)
            if sweep.name == 'condensation':
                own['similarity'] += similarities(run, found)
            if sweep.name in WITH_GATES:
                own['closed'] += closed(run, found)
    for name, lines in own.items():
        taken = {line[0] for line in lines}
        kept = [[*row.values()] for row in rows(f'{name}.csv') if row['sweep'] not in taken]
        write_csv(FOLDER / f'{name}.csv', HEADERS[name], [*kept, *lines])


def similarities(run: SweepRun, folder: Path) -> list[list]:
    """What FeatureCondensationHook measured of each layer on the fixed batch, and the running similarity of a UBN."""
    log = read_layer_log(folder, 'feature_condensation.jsonl')
    fixed, running = log['fixed'], log.get('running')
    after = {} if running is None else dict(zip(running.steps.tolist(), running.values.tolist(), strict=True))
    return [
        [run.sweep, run.label, run.seed, epoch, layer, value, '' if step not in after else after[step][i]]
        for step, epoch, values in zip(fixed.steps.tolist(), fixed.epochs.tolist(), fixed.values.tolist(), strict=True)
        for i, (layer, value) in enumerate(zip(fixed.layers, values, strict=True))
    ]


def closed(run: SweepRun, folder: Path) -> list[list]:
    """Of each layer with a gate, the batches it was trained with and those that did not move its running statistics."""
    checkpoint = torch.load(last_checkpoint(folder), map_location='cpu')
    batches, state = checkpoint['meta']['iter'], checkpoint['state_dict']
    layers = [key.removesuffix('.running_similarity') for key in state if key.endswith('.running_similarity')]
    moved = [int(state[f'{layer}.num_batches_tracked']) for layer in layers]
    return [
        [run.sweep, run.label, run.seed, *each] for each in zip(layers, [batches] * len(layers), moved, strict=True)
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--from', dest='work_dir', type=Path, help='folder of the runs of configs/sweeps/digits.yml')
    parser.add_argument('--check', action='store_true', help='write nothing; an error where the page is out of date')
    add_debug_argument(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if not PAGE.is_file():
        raise UsageError(f'{PAGE} does not exist: run write_results.py in a clone of mmubn.')
    if args.work_dir is not None:
        collect(args.work_dir)
        draw_rates()
        draw_cost()
    page = PAGE.read_text()
    if not args.check:
        PAGE.write_text(written(page))
    elif written(page) != page:
        raise UsageError(f'{PAGE} is not what {FOLDER} says: run tools/misc/write_results.py.')


if __name__ == '__main__':
    run_tool(parse_args, main)
