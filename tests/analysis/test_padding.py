"""The measurement of padding: its difference, its table, docs/padding.md, and the tool on what was measured before."""

import csv
import json
from pathlib import Path

import pytest
import torch
from cli import call
from mmengine.config import Config

from mmubn.analysis import padding
from mmubn.analysis.padding import CHANGE, EVALUATIONS, difference, measure, table
from mmubn.analysis.sweeps import RUN_DONE, SweepRun, read_sweeps

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = ROOT / 'configs' / 'sweeps' / 'padding.yml'
PAGE = ROOT / 'docs' / 'padding.md'


def test_the_difference_is_of_the_part_that_is_image():
    unpadded = [[torch.ones(2, 3, 4), torch.zeros(2, 1, 1)], [torch.full((2, 3, 4), 2.0), torch.ones(2, 1, 1)]]
    padded = [[torch.full((2, 6, 8), 9.0) for _ in image] for image in unpadded]
    for image, own in zip(padded, unpadded, strict=True):
        for wide, level in zip(image, own, strict=True):
            wide[:, : level.shape[1], : level.shape[2]] = level
    assert difference(padded, unpadded) == 0
    padded[0][0][0, 0, 0] += 3  # ||.|| of the image is sqrt(24)
    assert difference(padded, unpadded) == pytest.approx(3 / 24**0.5 / 2)


def rows():
    """Two seeds of a choice: 0.8 and 0.9 unpadded, 0.7 and 0.6 padded, and in between with the hook."""
    values = {0: (0.8, 0.7, 0.75), 1: (0.9, 0.6, 0.85)}
    for seed, of_seed in values.items():
        for i, (evaluation, value) in enumerate(zip(EVALUATIONS, of_seed, strict=True)):
            yield ('sweep', 'UBN', seed, evaluation, 'bbox_mAP', value)
            yield ('sweep', 'UBN', seed, evaluation, CHANGE, 0.1 * i)
            yield ('other', 'UBN', seed, evaluation, 'bbox_mAP', 0.0)


def test_table():
    assert table(list(rows()), 'sweep').splitlines()[2:] == [
        '| UBN | unpadded | 2 | 0.850 ± 0.071 |  |  |',
        '| UBN | padded | 2 | 0.650 ± 0.071 | 0.200 ± 0.141 | 0.100 ± 0.000 |',
        '| UBN | padded, PaddingAwareHook | 2 | 0.800 ± 0.071 | 0.050 ± 0.000 | 0.200 ± 0.000 |',
    ]


def test_the_page_has_the_tables_of_its_raw_data():
    with (ROOT / 'docs' / 'padding.csv').open() as file:
        raw = [(*row[:2], int(row[2]), *row[3:5], float(row[5])) for row in list(csv.reader(file))[1:]]
    sweeps = {row[0] for row in raw}
    assert sweeps
    for name in sweeps:
        assert table(raw, name) in PAGE.read_text(), f'the table of {name}'


def test_the_sweeps_differ_in_what_they_pad(monkeypatch):
    monkeypatch.chdir(ROOT)
    unpadded, padded = read_sweeps(SWEEPS)
    one, other = unpadded.runs[0].load(), padded.runs[0].load()
    resize = other.train_dataloader.dataset.pipeline[2]
    assert resize.pop('ratio_range') == [0.5, 1.0]
    assert resize.type == 'RandomResize'
    resize.type = 'Resize'
    assert one.to_dict() == other.to_dict()


@pytest.fixture
def done(tmp_path, monkeypatch):
    """A work dir in which one run is done and was measured before."""
    monkeypatch.chdir(ROOT)
    run = read_sweeps(SWEEPS)[0].runs[0]
    folder = run.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / 'epoch_8.pth').touch()
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_8.pth'))
    (folder / RUN_DONE).touch()
    values = {each: {'bbox_mAP': 0.5, 'segm_mAP': 0.25, CHANGE: 0.125} for each in EVALUATIONS}
    (folder / 'padding-256.json').write_text(json.dumps(dict(checkpoint='epoch_8.pth', values=values)))
    return tmp_path


def test_what_was_measured_is_not_measured_again(done, monkeypatch, capsys):
    monkeypatch.setattr(padding, '_evaluate', lambda *_: pytest.fail('it is measured'))
    arguments = [SWEEPS, '--pad', '256', '--work-dir', done]
    assert call(monkeypatch, 'analysis_tools/measure_padding.py', *arguments) == 0
    out = capsys.readouterr().out
    assert '| BN | padded | 1 | 0.500 | 0.000 | 0.250 | 0.000 | 0.125 |' in out
    assert 'Nothing yet of: trained-unpadded: BN, seed 1; ' in out
    with (done / 'padding.csv').open() as file:
        assert len(file.readlines()) == 1 + 3 * 3


def test_another_padding_is_measured(done, monkeypatch):
    """Padded as asked for, by the data preprocessor; with the hook in the third evaluation alone."""
    configs = []
    monkeypatch.setattr(padding, 'trained_runner', lambda cfg, *_: configs.append(cfg) or runner())

    def runner():
        model = torch.nn.Module()
        model.neck = torch.nn.Identity()
        metrics = {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.7}

        def test():
            model.neck((torch.ones(4, 2, 3, 3) * len(configs),))
            return metrics

        return type('Runner', (), dict(model=model, test=staticmethod(test)))

    run = read_sweeps(SWEEPS)[0].runs[0]
    found = measure(run, run.folder(done), 512)
    assert [row[3:] for row in found if row[4] == CHANGE] == [(each, CHANGE, i) for i, each in enumerate(EVALUATIONS)]
    assert [cfg.model.data_preprocessor.pad_size_divisor for cfg in configs] == [32, 512, 512]
    assert ['PaddingAwareHook' in str(cfg.get('custom_hooks')) for cfg in configs] == [False, False, True]
    assert measure(run, run.folder(done), 512) == found
    assert len(configs) == 3


def test_nothing_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert call(monkeypatch, 'analysis_tools/measure_padding.py', SWEEPS, '--pad', '8', '--work-dir', tmp_path) == 2
    assert 'no run of' in capsys.readouterr().err


@pytest.mark.slow
def test_a_detector_of_one_iteration(tmp_path, monkeypatch):
    """The whole way, on a few images: a run of a sweep, evaluated three times."""
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, 'dataset_converters/digits_to_coco.py', 'data/digits', '--num-train', '8') == 0
    cfg = Config.fromfile(ROOT / 'configs' / 'digits' / 'mask-rcnn_r18_fpn_ubn_digits.py')
    cfg.dump('config.py')
    options = {
        'train_cfg.max_epochs': 1,
        'train_dataloader.batch_size': 8,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'model.test_cfg.rcnn.score_thr': 0.0,
        'model.test_cfg.rcnn.max_per_img': 2,
    }
    run = SweepRun('sweep', 'UBN', 0, 'config.py', 1, options)
    folder = run.folder(Path('work_dirs'))
    run.load().dump('run.py')
    assert call(monkeypatch, 'train.py', 'run.py', '--work-dir', folder) == 0
    found = {(row[3], row[4]): row[5] for row in measure(run, folder, 256)}
    assert found['unpadded', CHANGE] == 0
    assert found['padded', CHANGE] > found['padded, PaddingAwareHook', CHANGE] > 0
