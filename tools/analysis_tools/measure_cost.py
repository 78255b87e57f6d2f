"""Measure what the choices of sweeps cost: training, evaluation, memory, parameters.

The networks are those that compare_norms.py trained with the first seed, in the same --work-dir. A training iteration
and the evaluation of a batch are timed in turns, in an order drawn anew, on real data; ratios to the baseline of the
first sweep are taken within a turn: what slows the machine down slows all of them. WORK_DIR/FIRST_SWEEP/cost.csv has
medians and quartiles, the bytes that a training forward keeps for its backward, and the number of parameters. Give it
cores without other work.

Example:

    OMP_NUM_THREADS=1 python tools/analysis_tools/measure_cost.py configs/sweeps/digits.yml --sweeps placement
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mmubn.analysis.comparison import write_csv
from mmubn.analysis.cost import HEADER, first_runs, measure_costs
from mmubn.analysis.plots import check_output
from mmubn.analysis.sweeps import read_sweeps
from mmubn.cli import add_debug_argument, run_tool


def parse_args() -> argparse.Namespace:
    summary, *details, _ = __doc__.split('\n\n')
    parser = argparse.ArgumentParser(
        description=summary, epilog='\n\n'.join(details), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('sweeps_file', type=Path, metavar='SWEEPS.yml', help='the sweep file')
    parser.add_argument('--sweeps', nargs='+', required=True, metavar='NAME', help='which of the file, together')
    parser.add_argument('--work-dir', type=Path, help='of compare_norms.py; default: work_dirs/NAME_OF_THE_FILE')
    parser.add_argument('--repeats', type=int, default=15, help='turns that count (default: 15)')
    parser.add_argument('--warmup', type=int, default=2, help='turns before them (default: 2)')
    add_debug_argument(parser)
    args = parser.parse_args()
    if args.repeats < 1 or args.warmup < 0:
        parser.error(f'--repeats must be positive and --warmup not negative, got {args.repeats} and {args.warmup}')
    if args.work_dir is None:
        args.work_dir = Path('work_dirs') / args.sweeps_file.stem
    return args


def main(args: argparse.Namespace) -> None:
    sweeps = read_sweeps(args.sweeps_file, args.sweeps)
    path = args.work_dir / sweeps[0].name / 'cost.csv'
    labels = list(first_runs(sweeps, args.work_dir))
    check_output(path)
    with tqdm(total=len(labels) + args.warmup + args.repeats, desc=', '.join(args.sweeps)) as bar:
        rows = measure_costs(sweeps, args.work_dir, args.repeats, args.warmup, bar.update)
    write_csv(path, HEADER, [list(row) for row in rows])
    table = Table(title=f'median (ratio to {sweeps[0].baseline})')
    measures = list(dict.fromkeys(row[2] for row in rows))
    table.add_column('')
    for measure in measures:
        unit = next(row[3] for row in rows if row[2] == measure)
        table.add_column(f'{measure} ({unit})' if unit else measure, justify='right')
    for label in labels:
        own = {row[2]: row for row in rows if row[1] == label}
        table.add_row(label, *(f'{own[m][5]:.{1 if own[m][3] else 0}f} ({own[m][8]:.2f})' for m in measures))
    Console().print(table)
    print(f'values: {path}')


if __name__ == '__main__':
    run_tool(parse_args, main)
