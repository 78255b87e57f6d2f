"""Evaluate the detectors of a sweep with padded batches and without, and with PaddingAwareHook.

The trainings are those of compare_norms.py, in the same --work-dir. Each that is done is evaluated on its test data,
once: started again, the command evaluates what is new. WORK_DIR/padding.csv has every value, WORK_DIR/padding.md a
table of each sweep: mean and standard deviation over the seeds, the loss from unpadded to padded batches, and how far
padding changes the maps of the neck.

Example:

    python tools/analysis_tools/measure_padding.py configs/sweeps/padding.yml --pad 256
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmubn.analysis.comparison import write_csv
from mmubn.analysis.padding import measure, table
from mmubn.analysis.plots import check_output
from mmubn.analysis.sweeps import RUN_DONE, read_sweeps
from mmubn.cli import UsageError, add_debug_argument, run_tool


def parse_args() -> argparse.Namespace:
    summary, *details, _ = __doc__.split('\n\n')
    parser = argparse.ArgumentParser(
        description=summary, epilog='\n\n'.join(details), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('sweeps_file', type=Path, metavar='SWEEPS.yml', help='the sweep file')
    parser.add_argument('--pad', type=int, required=True, help='padded batches are multiples of so many pixels')
    parser.add_argument('--work-dir', type=Path, help='of compare_norms.py; default: work_dirs/NAME_OF_THE_FILE')
    add_debug_argument(parser)
    args = parser.parse_args()
    if args.pad < 1:
        parser.error(f'--pad must be positive, got {args.pad}')
    if args.work_dir is None:
        args.work_dir = Path('work_dirs') / args.sweeps_file.stem
    return args


def main(args: argparse.Namespace) -> None:
    check_output(args.work_dir / 'padding.md')
    sweeps = read_sweeps(args.sweeps_file)
    rows, missing = [], []
    for run in [run for sweep in sweeps for run in sweep.runs]:
        if (run.folder(args.work_dir) / RUN_DONE).exists():
            rows += measure(run, run.folder(args.work_dir), args.pad)
        else:
            missing.append(str(run))
    if not rows:
        raise UsageError(f'no run of {args.sweeps_file} is done in {args.work_dir}: train them with compare_norms.py.')
    write_csv(args.work_dir / 'padding.csv', ['sweep', 'choice', 'seed', 'evaluation', 'metric', 'value'], rows)
    done = dict.fromkeys(row[0] for row in rows)
    text = '\n\n'.join(f'## {name}\n\n{table(rows, name)}' for name in done) + '\n'
    if missing:
        text += f'\nNothing yet of: {"; ".join(missing)}.\n'
    (args.work_dir / 'padding.md').write_text(text)
    print(text)


if __name__ == '__main__':
    run_tool(parse_args, main)
