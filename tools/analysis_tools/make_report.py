"""Turn the work dir of a run, or of several, into one HTML page that needs nothing else: no network, no other file.

It shows what the runs logged, what FeatureCondensationHook and CovariateShiftHook measured, predictions, config and
environment. Predictions are those that tools/test.py --show-dir left in the work dir. Where there are none, the last
checkpoint of a single run predicts the first validation images; start this in the folder in which the run was started,
so that the paths in its config hold.

Example:

    python tools/analysis_tools/make_report.py work_dirs/demo
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import io
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import jinja2
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from mmengine.config import Config
from PIL import Image, ImageOps

import mmubn  # noqa: F401 - registers UBN for configs that do not import it
from mmubn.analysis.condensation import (
    FILE,
    Log,
    draw_layers,
    draw_means,
    heat_map,
    heat_map_height,
    heat_map_width,
    read_log,
)
from mmubn.analysis.curves import Panel, draw_panel, learning_rate_panels, loss_panels, metric_panels
from mmubn.analysis.metrics import PERCENT, unit_of
from mmubn.analysis.plots import check_output, plt, write
from mmubn.analysis.predictions import draw_predictions, last_checkpoint, name_halves
from mmubn.analysis.runs import (
    check_run,
    group_runs,
    metric_names,
    read_layer_log,
    read_scalars,
    series,
    training_records,
    validation_records,
    validation_unit,
)
from mmubn.checkpoints import CheckpointError
from mmubn.cli import UsageError, add_debug_argument, add_trust_argument, run_tool

SHIFT_FILE = 'covariate_shift.jsonl'
MAIN_METRICS = ('bbox_mAP', 'segm_mAP', 'top1')
NUM_EXAMPLES = 6
# How MMEngine names the folder of a start, and begins a line and the list of what is installed in its log.
START = re.compile(r'\d{8}_\d{6}')
LINE = re.compile(r'^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) - ', re.MULTILINE)
ENVIRONMENT = re.compile(r'^-{60}\n(System environment:\n.*?)\n-{60}$', re.MULTILINE | re.DOTALL)

T = TypeVar('T')


def parse_args() -> argparse.Namespace:
    summary, details, _ = __doc__.split('\n\n', 2)
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument('work_dir', type=Path, help='work dir of a run, or a folder that has those of several')
    parser.add_argument('--out', type=Path, help='default: WORK_DIR/report.html')
    add_trust_argument(parser)
    add_debug_argument(parser)
    return parser.parse_args()


# ---- what a page is made of


class Picture(NamedTuple):
    uri: str  # data:..., the image itself
    alt: str
    caption: str


@dataclass
class Section:
    heading: str
    lines: list[str] = field(default_factory=list)
    table: list[list[object]] = field(default_factory=list)  # the first row is the header
    pictures: list[Picture] = field(default_factory=list)
    size: str = 'large'  # of the pictures; small ones stand side by side
    text: str = ''  # shown on demand


def drawn(figure: Figure, alt: str, caption: str) -> Picture:
    file = io.BytesIO()
    figure.savefig(file, format='svg', dpi=110, bbox_inches='tight', pad_inches=0.1, metadata={'Date': None})
    plt.close(figure)
    return Picture(_uri('svg+xml', file), alt, caption)


def photo(path: Path, halves: bool = False) -> Picture:
    """Read an image file, no larger than a page needs it.

    Args:
        path: The file.
        halves: Whether it has the annotations left and the predictions right, and does not say so.
    """
    file = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((1000, 1000))
        image = image.convert('RGB')
        if halves:
            if image.width < 500:  # too small for words
                image = ImageOps.scale(image, 1000 // image.width, Image.Resampling.NEAREST)
            image = Image.fromarray(name_halves(np.asarray(image)))
        image.save(file, 'JPEG', quality=90)
    return Picture(_uri('jpeg', file), f'Predictions for the image {path.stem}', path.stem)


def _uri(kind: str, file: io.BytesIO) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}'


# ---- reading


@dataclass
class Run:
    """What a run left in its work dir; None or empty for what it has not."""

    path: Path
    name: str
    starts: list[Path]
    records: list[dict]
    condensation: Log | None
    shift: Log | None
    config: str  # of the last start
    logs: list[str]  # of each start

    @property
    def metrics(self) -> list[str]:
        return metric_names(self.records)

    @property
    def main_metrics(self) -> list[str]:
        return [tag for tag in self.metrics if tag.split('/')[-1] in MAIN_METRICS] or self.metrics

    @property
    def unit(self) -> str:
        """Return what the steps of validations count."""
        return validation_unit(self.records)


def find_runs(work_dir: Path) -> list[Path]:
    """Find the folders of all runs in ``work_dir``, itself included. Report those that logged nothing.

    Raises:
        UsageError: There is none with a log.
    """
    check_run(work_dir)
    runs = {log.parent.parent.parent for log in work_dir.glob('**/vis_data/scalars.json')}
    starts = [path for path in work_dir.glob('**/*') if START.fullmatch(path.name) and path.is_dir()]
    tested = {start.parent for start in starts if (start / f'{start.name}.json').exists()}
    for run in sorted({start.parent for start in starts} - runs - tested):
        print(f'{run}: a run that has logged nothing (no file matches {run}/*/vis_data/scalars.json)')
    if not runs:
        raise UsageError(
            f'{work_dir} has no run with a log (*/vis_data/scalars.json); give a work dir of tools/train.py.'
        )
    return sorted(runs)


def read_run(path: Path, work_dir: Path) -> Run:
    starts = sorted(log.parent.parent for log in path.glob('*/vis_data/scalars.json'))
    return Run(
        path,
        name=path.resolve().name if path == work_dir else str(path.relative_to(work_dir)),
        starts=starts,
        records=attempt(read_scalars, path) or [],
        condensation=hook_log(path, FILE, read_log),
        shift=hook_log(path, SHIFT_FILE, lambda run: read_layer_log(run, SHIFT_FILE)),
        config=read_text(starts[-1] / 'vis_data' / 'config.py'),
        logs=[read_text(start / f'{start.name}.log') for start in starts],
    )


def attempt(read: Callable[[Path], T], path: Path) -> T | None:
    """Return what ``read`` makes of ``path``. Report an error, and return None."""
    try:
        return read(path)
    except UsageError as error:
        print(error)
        return None


def hook_log(run: Path, file_name: str, read: Callable[[Path], Log]) -> Log | None:
    """Read what a hook measured; None also where the run did without the hook."""
    return attempt(read, run) if any(run.glob(f'*/{file_name}')) else None


def read_text(path: Path) -> str:
    """Read a text file. Report one that cannot be read, and return an empty text."""
    try:
        return path.read_text(errors='replace')
    except OSError as error:
        print(f'{path}: cannot be read: {error.strerror}')
        return ''


@contextlib.contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Print what is printed meanwhile, and add its lines to ``notes``."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            yield
    finally:
        notes += output.getvalue().splitlines()
        print(output.getvalue(), end='')


# ---- the sections


def summary(runs: list[Run]) -> Section:
    table = [['metric', 'last', 'highest']]
    lines = [
        'Metrics are those on the validation data, as they were logged: APs from 0 to 1, accuracies in %. An AP of -1, '
        'by which COCO says that there are no objects of a size, is left out. Time is that from the first to the last '
        'line of the logs, validation included.'
    ]
    if len(runs) > 1:
        table[0] = ['run', *table[0], 'iterations', 'epochs', 'time (h:mm:ss)']
    for run in runs:
        last = next(reversed(training_records(run.records)), {})
        iterations, epochs, time = last.get('iter', 0), last.get('epoch', ''), wall_time(run)
        if len(runs) == 1:
            done = f'{iterations} iterations, {epochs} epochs' if epochs else f'{iterations} iterations'
            lines.insert(0, f'Trained for {done} in {time} (h:mm:ss).')
            table += [[tag, *last_and_highest(run, tag)] for tag in run.metrics]
            continue
        for i, tag in enumerate(run.main_metrics or ['']):
            about = ('', '', '') if i else (iterations, epochs, time)
            table.append(['' if i else run.name, tag, *last_and_highest(run, tag), *about])
    return Section('Summary', lines, table if len(table) > 1 else [])


def wall_time(run: Run) -> datetime.timedelta:
    """Return the time from the first to the last line of the log, summed over the starts."""
    taken = datetime.timedelta()
    for log in run.logs:
        if lines := LINE.findall(log):
            first, last = (datetime.datetime.strptime(line, '%Y/%m/%d %H:%M:%S') for line in (lines[0], lines[-1]))
            taken += last - first
    return taken


def last_and_highest(run: Run, tag: str) -> list[str]:
    steps, values = series(validation_records(run.records), tag)
    unit = '%' if unit_of(tag) == PERCENT else ''
    best = int(np.nanargmax(values)) if np.isfinite(values).any() else -1
    return [f'{values[i]:.4g}{unit} ({run.unit} {steps[i]})' for i in (-1, best)] if steps else ['', '']


def curves(runs: list[Run]) -> Section:
    """Plot loss, learning rate and the main metrics; runs that differ in their seed alone are averaged."""
    by_path = {run.path: run.records for run in runs}
    groups = {label: {path: by_path[path] for path in paths} for label, paths in group_runs(by_path).items()}
    metrics = dict.fromkeys(tag for run in runs for tag in run.main_metrics)
    section = Section('Curves', size='small')
    losses = loss_panels(groups)
    section.pictures = [_curve(panel, len(groups), logarithmic=True) for panel in losses]
    panels = [*learning_rate_panels(groups), *(panel for tag in metrics for panel in metric_panels(groups, tag))]
    section.pictures += [_curve(panel, len(groups)) for panel in panels]
    if len(losses) > 1:
        section.lines = ['Training losses on other axes have other parts and cannot be compared.']
    if len(groups) < len(runs):
        section.lines += ['Lines of several seeds are their mean, bands one standard deviation (n - 1) to each side.']
    return section


def _curve(panel: Panel, groups: int, logarithmic: bool = False) -> Picture:
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    remarks = draw_panel(axis, panel, logarithmic, legend=False)
    if groups > 1:
        # A row for each run: names may be long.
        figure.legend(loc='outside lower center', ncols=1, fontsize=8)
        figure.set_figheight(3.2 + 0.18 * len(axis.lines))
    what = f'{panel.ylabel} by {panel.xlabel}'
    return drawn(figure, f'{what} of {", ".join(panel.curves)}', f'{what}.{remarks}')


def condensation(runs: list[Run]) -> Section:
    """Plot the mean over the layers, of all runs."""
    logs = {run.path: run.condensation for run in runs if run.condensation}
    section = Section('Feature condensation')
    if logs:
        figure, caption = draw_means(logs, {}, metrics=[])
        section.pictures = [drawn(figure, 'Mean similarity and share of condensed layers against iterations', caption)]
    if missing := [run.name for run in runs if not run.condensation]:
        where = f' in {", ".join(missing)}' if len(runs) > 1 else ''
        section.lines = [
            f'No measurement{where}. FeatureCondensationHook measures in training how similar the samples are at every '
            "norm layer: custom_hooks=[dict(type='FeatureCondensationHook')] in the config."
        ]
    return section


def run_sections(run: Run, alone: bool) -> list[Section]:
    sections = []
    if run.condensation:
        figure, caption = draw_layers({run.path: run.condensation})
        alt = 'Heat map of the similarity, layers against iterations'
        sections.append(Section('Feature condensation, layer by layer', pictures=[drawn(figure, alt, caption)]))
    return [*sections, covariate_shift(run), examples(run, alone), *config_and_environment(run)]


def covariate_shift(run: Run) -> Section:
    section = Section('Covariate shift')
    if not run.shift:
        section.lines = [
            'No measurement. CovariateShiftHook measures in training how far an update moves what the norm layers '
            "give: custom_hooks=[dict(type='CovariateShiftHook')] in the config."
        ]
        return section
    first = next(iter(run.shift.values()))
    size = (heat_map_width(len(run.shift), first), heat_map_height(first) + 0.7)
    figure, (axes,) = plt.subplots(1, len(run.shift), figsize=size, sharey=True, squeeze=False)
    values = np.concatenate([each.values.ravel() for each in run.shift.values()])
    positive = values[values > 0]
    scale = LogNorm(*(positive.min(), positive.max()) if len(positive) else (None, None))
    for axis, (quantity, layers) in zip(axes, run.shift.items(), strict=True):
        mesh = heat_map(axis, layers, scale)
        axis.set_title(quantity, fontsize=9)
    figure.colorbar(mesh, ax=axes, location='top', aspect=40, shrink=0.7, label='Earth-Mover distance')
    caption = (
        "Earth-Mover distance between a norm layer's outputs on the fixed batch before and after an update, in the "
        'unit of the outputs. channel: mean over the channels; joint: sliced distance of all channels together. White: '
        'zero or no value.'
    )
    section.pictures = [drawn(figure, 'Heat maps of the distance, layers against iterations', caption)]
    return section


def examples(run: Run, alone: bool) -> Section:
    """Show images that the run left or, on a page of this run alone, that its last checkpoint makes."""
    section = Section('Example predictions', size='small')
    if paths := left_images(run.path):
        section.lines = [f'The first images of {paths[0].parent}.']
        section.pictures = photos(paths, halves=has_halves(paths[0], run.path))
    elif alone:
        try:
            section.lines, section.pictures = predicted(run)
        # Whatever there may be with the user's config, checkpoint or data, the rest of the page is shown.
        except Exception as error:
            reason = (
                str(error) if isinstance(error, (UsageError, CheckpointError)) else f'{type(error).__name__}: {error}'
            )
            print(f'{run.path}: no example predictions: {reason}')
            section.lines = [
                f'None: {reason}',
                f'Those that tools/test.py --work-dir {run.path} --show-dir NAME leaves would be shown here.',
            ]
    else:
        section.lines = [f'None in {run.path}. A report of this run alone makes some.']
    return section


def left_images(run: Path) -> list[Path]:
    """Find the first images that the last start with images left, as tools/test.py --show-dir does."""
    images: dict[str, list[Path]] = {}
    for path in sorted(run.rglob('*')):
        start = next(filter(START.fullmatch, path.relative_to(run).parts), None)
        if start and path.suffix in ('.png', '.jpg', '.jpeg'):
            images.setdefault(start, []).append(path)
    return images[max(images)][:NUM_EXAMPLES] if images else []


def has_halves(image: Path, run: Path) -> bool:
    """Tell whether MMDetection's hook drew an image: annotated left, predicted right, as the config beside it says."""
    folders = [folder for folder in image.parents if folder.is_relative_to(run)]
    configs = [folder / 'vis_data' / 'config.py' for folder in folders]
    return any('DetVisualizationHook' in path.read_text(errors='replace') for path in configs if path.is_file())


def photos(paths: list[Path], halves: bool = False) -> list[Picture]:
    pictures = []
    for path in paths:
        try:
            pictures.append(photo(path, halves))
        except OSError as error:
            print(f'{path}: cannot be shown: {error}')
    return pictures


def predicted(run: Run) -> tuple[list[str], list[Picture]]:
    """Draw what the last checkpoint predicts for the first validation images."""
    cfg = Config.fromfile(run.starts[-1] / 'vis_data' / 'config.py')
    checkpoint = last_checkpoint(run.path)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        draw_predictions(cfg, checkpoint, Path(folder), NUM_EXAMPLES)
        pictures = photos(sorted(Path(folder).iterdir()))
    name = checkpoint.name if checkpoint.parent == run.path else checkpoint
    return [f'{name} on the first validation images.'], pictures


def config_and_environment(run: Run) -> list[Section]:
    """Show config and environment of the last start."""
    environment = ENVIRONMENT.search(run.logs[-1])
    texts = {'Config': run.config, 'Environment': environment[1] if environment else ''}
    return [
        Section(heading, [f'Of the last start, {run.starts[-1].name}.' if text else 'Not in the work dir.'], text=text)
        for heading, text in texts.items()
    ]


# ---- the page


def render(title: str, sections: list[Section], runs: list[tuple[str, list[Section]]]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template('report.html.j2').render(title=title, sections=sections, runs=runs)


def main(args: argparse.Namespace) -> None:
    out = args.out or args.work_dir / 'report.html'
    check_run(args.work_dir)
    check_output(out, ('.html', '.htm'))
    notes: list[str] = []
    with noted(notes):
        runs = [read_run(path, args.work_dir) for path in find_runs(args.work_dir)]
        sections = [summary(runs), curves(runs), condensation(runs)]
        parts = [(run.name, run_sections(run, alone=len(runs) == 1)) for run in runs]
    if len(runs) == 1:
        sections += parts.pop()[1]
    if notes:
        sections.insert(0, Section('What could not be read', notes))
    title = str(args.work_dir) if args.work_dir.name else args.work_dir.resolve().name
    write({out: render(title, sections, parts).encode()})


if __name__ == '__main__':
    run_tool(parse_args, main)
