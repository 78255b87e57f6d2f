"""Write the tables and answers of docs/results.md from the values in docs/results/, so that it says what they say.

With --from, first take those values from the runs of compare_norms.py: of each sweep that is done, every value after
every epoch, its plots, and what else the page shows of it. What a run took from the machine (cost.csv) is measured by
measure_cost.py.

Example:

    python tools/misc/write_results.py --from work_dirs/digits
    python tools/misc/write_results.py --check  # end with status 1 where the page is out of date
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from mmubn.analysis.comparison import Curve, compared, read_table, summarize, write_csv
from mmubn.analysis.cost import HEADER
from mmubn.analysis.predictions import last_checkpoint
from mmubn.analysis.runs import read_layer_log, read_scalars, training_records
from mmubn.analysis.sweeps import RUN_DONE, Sweep, SweepRun, read_sweeps
from mmubn.cli import UsageError, add_debug_argument, run_tool

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / 'docs' / 'results'
PAGE = ROOT / 'docs' / 'results.md'
BLOCK = re.compile(r'(<!-- written: (.+?) -->\n)(.*?)(<!-- end -->)', re.DOTALL)
EARLY = (1, 2, 3)  # epochs
WITH_GATES = ('gate', 'learning-rate', 'detectors')  # all from scratch: their layers counted no batch before
HEADERS = {
    'similarity': ['sweep', 'choice', 'seed', 'epoch', 'layer', 'similarity', 'running similarity'],
    'closed': ['sweep', 'choice', 'seed', 'layer', 'batches', 'batches that moved the running statistics'],
    'cost': HEADER,
}
Curves = dict[str, Curve]


def sweeps() -> dict[str, Sweep]:
    return {sweep.name: sweep for sweep in read_sweeps(ROOT / 'configs' / 'sweeps' / 'digits.yml')}


def curves(sweep: str, metric: str) -> Curves:
    """Read the curves of one metric of a sweep, by choice."""
    return read_table(FOLDER / f'{sweep}.csv')[metric]


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


def closed_gates(sweep: str) -> str:
    """How many training batches found a gate closed, and in how many layers."""
    lines = []
    own = [row for row in rows('closed.csv') if row['sweep'] == sweep]
    for choice in dict.fromkeys(row['choice'] for row in own):
        of_choice = [row for row in own if row['choice'] == choice]
        batches = np.array([int(row['batches']) for row in of_choice])
        closed = batches - [int(row['batches that moved the running statistics']) for row in of_choice]
        share = 100 * closed.sum() / batches.sum()
        lines.append([choice, f'{share:.1f}%', f'{(closed > 0).sum()} of {len(closed)}', f'{closed.max()}'])
    header = ['', 'closed, of all batches and layers', 'layers and seeds with a closed batch', 'most in one layer']
    return table(header, lines)


# ---- cost


def cost(sweep: str, metric: str) -> str:
    """Each choice's metric beside what it costs, as ratios to the baseline."""
    of_metric, baseline = curves(sweep, metric), sweeps()[sweep].baseline
    costs = {(row['choice'], row['measure']): row for row in rows('cost.csv') if row['sweep'] == sweep}
    scale, digits = (1, 2) if 'top1' in metric else (100, 1)
    lines = []
    for choice, curve in of_metric.items():
        last = scale * curve.values[:, -1]
        cells = [choice, f'{last.mean():.{digits}f} ± {last.std(ddof=1):.{digits}f}']
        for measure in ('training', 'evaluation'):
            row = costs[choice, measure]
            low, mid, high = (float(row[key]) for key in ('ratio, first quartile', 'ratio', 'ratio, third quartile'))
            cells.append(f'{mid:.2f} ({low:.2f} to {high:.2f})')
        cells += [f'{float(costs[choice, measure]["ratio"]):.2f}' for measure in ('saved memory', 'parameters')]
        lines.append(cells)
    name = 'test accuracy (%)' if 'top1' in metric else metric.replace('_mAP', ' AP')
    header = ['', name, f'training time, {baseline} = 1', 'evaluation time', 'saved memory', 'parameters']
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
        needed = [seeds_needed(points / 100, spread, 0.05 / m) for points in (1, 2) for m in (1, 4)]
        lines.append([name, f'{100 * spread:.2f}', *map(str, needed)])
    header = ['', 'standard deviation of a difference, points']
    header += [f'seeds for {p} AP, {m}' for p in ('1', '2') for m in ('one comparison', 'four')]
    return table(header, lines)


def seeds_needed(effect: float, spread: float, level: float, power: float = 0.8) -> int:
    """Return the fewest seeds with which a paired t-test finds ``effect`` with probability ``power``."""
    for n in range(2, 1000):
        t, shift = stats.t.ppf(1 - level / 2, n - 1), effect / spread * n**0.5
        if stats.nct.sf(t, n - 1, shift) + stats.nct.cdf(-t, n - 1, shift) >= power:
            return n
    raise ValueError(f'more than 1,000 seeds for an effect of {effect} with a spread of {spread}')


# ---- the page


def compared_table(sweep: str) -> str:
    """The tables of compare_norms.py."""
    return '\n'.join(summarize(sweeps()[sweep], read_table(FOLDER / f'{sweep}.csv')).splitlines()[2:]).strip()


WRITERS: dict[str, Callable[..., str]] = {
    'tables': compared_table,
    'own-rates': own_rates,
    'rate-curve': rate_curve,
    'closed-gates': closed_gates,
    'cost': cost,
    'power': power,
}


def written(page: str) -> str:
    """The page with every block as the values have it."""

    def block(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        return f'{match[1]}\n{WRITERS[name](*arguments)}\n\n{match[4]}'

    return BLOCK.sub(block, page)


# ---- from the runs


def collect(work_dir: Path) -> None:
    """Take what the page shows from the runs of the sweeps that are done."""
    own: dict[str, list[list]] = {'similarity': [], 'closed': [], 'cost': []}
    for sweep in sweeps().values():
        folder = work_dir / sweep.name
        if not all((run.folder(work_dir) / RUN_DONE).exists() for run in sweep.runs):
            print(f'{sweep.name}: not all runs are done in {work_dir}; what there is of it stays')
            for name, kept in own.items():
                kept += [[*row.values()] for row in rows(f'{name}.csv') if row['sweep'] == sweep.name]
            continue
        shutil.copy(folder / 'runs.csv', FOLDER / f'{sweep.name}.csv')
        shutil.copy(folder / f'{sweep.metrics[0].replace("/", "_")}.png', FOLDER / f'{sweep.name}.png')
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
        write_csv(FOLDER / f'{name}.csv', HEADERS[name], lines)


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
    batches = max(record['iter'] for record in training_records(read_scalars(folder)))
    state = torch.load(last_checkpoint(folder), map_location='cpu')['state_dict']
    layers = [key.removesuffix('.running_similarity') for key in state if key.endswith('.running_similarity')]
    moved = [int(state[f'{layer}.num_batches_tracked']) for layer in layers]
    return [
        [run.sweep, run.label, run.seed, *each] for each in zip(layers, [batches] * len(layers), moved, strict=True)
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--from', dest='work_dir', type=Path, help='folder of the runs of configs/sweeps/digits.yml')
    parser.add_argument('--check', action='store_true', help='write nothing; end with status 1 where it is out of date')
    add_debug_argument(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.work_dir is not None:
        collect(args.work_dir)
    page = PAGE.read_text()
    if args.check and written(page) != page:
        raise UsageError(f'{PAGE} is not what {FOLDER} says: run tools/misc/write_results.py.')
    PAGE.write_text(written(page))


if __name__ == '__main__':
    run_tool(parse_args, main)
