"""model-index.yml and the metafiles: each model once, and no number that its folder's README does not have."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from modelindex.load_model_index import load

ROOT = Path(__file__).resolve().parent.parent
# _base_ has parts of configs, sweeps what compare_norms.py trains.
CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name not in ('_base_', 'sweeps'))
METAFILES = sorted((ROOT / 'configs').glob('*/metafile.yml'))
MODELS = [(path, model) for path in METAFILES for model in yaml.safe_load(path.read_text())['Models']]


def test_every_config_is_listed_once_and_every_listed_config_exists():
    listed = Counter(model['Config'] for _, model in MODELS)
    assert listed == Counter(str(path.relative_to(ROOT)) for path in CONFIGS)


def test_every_metafile_is_imported_and_every_folder_has_one():
    imported = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    assert imported == [str(path.relative_to(ROOT)) for path in METAFILES]
    assert {path.parent for path in METAFILES} == {path.parent for path in CONFIGS}


def test_openmmlab_s_reader_reads_it():
    """The package through which mim and others read a model index."""
    index = load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert {model.config for model in index.models} == {str(path.relative_to(ROOT)) for path in CONFIGS}
    assert index.check(silent=True) == []


@pytest.mark.parametrize('metafile', METAFILES, ids=lambda path: path.parent.name)
def test_one_collection_per_folder(metafile):
    content = yaml.safe_load(metafile.read_text())
    (collection,) = content['Collections']
    assert collection['README'] == 'README.md'  # OpenMMLab's reader looks for it beside the metafile
    for model in content['Models']:
        assert model['In Collection'] == collection['Name']
        assert Path(model['Config']).stem == model['Name']
        assert (ROOT / model['Config']).parent == metafile.parent
        # `mim download` reads it of each model, and brings the config where the name ends with a slash.
        assert model['Weights'] == 'not released/'


@pytest.mark.parametrize(('metafile', 'model'), MODELS, ids=[model['Name'] for _, model in MODELS])
def test_numbers_are_those_of_the_readme(metafile, model):
    """What the paper reports is under Reported, what was measured under Results, and nothing else is anywhere."""
    rows = readme_rows(metafile, model)
    assert rows
    found = [values(cells) for cells in rows]
    assert any(found) is ('Reported' in model)
    for reported in model.get('Reported', ()):
        assert re.match(r'Table [2-6]\b|BNET, ', reported['Row'])
        assert any(contains(line, list(reported['Metrics'].values())) for line in found), reported['Row']
    measured = measurements(model)
    assert not measured or measured in [numbers(cells[-1]) for cells in rows]
    not_run = any('not run' in cell for cells in rows for cell in cells)
    assert not_run is ('Results' not in model)


def readme_rows(metafile, model):
    """The rows, as lists of cells, that the tables in the folder's README have for the model's config."""
    lines = (metafile.parent / 'README.md').read_text().splitlines()
    return [line.strip('|').split('|') for line in lines if line.startswith('|') and f'[{model["Name"]}.py]' in line]


def values(cells):
    return [float(cell) for cell in cells if re.fullmatch(r'\s*\d+(\.\d+)?\s*', cell)]


def measurements(model):
    return [value for result in model.get('Results', ()) for value in result['Metrics'].values()]


def numbers(cell):
    """Of a cell with words: 'bbox AP 84.7 (AP50 99.8)' has 84.7 and 99.8."""
    return [float(number) for number in re.findall(r'(?<![\w.-])\d+\.\d+', cell)]


def test_the_demo_s_numbers_are_those_of_the_readme():
    """In README.md at the top AP is from 0 to 1, in a metafile in percent."""
    (row,) = [line for line in (ROOT / 'README.md').read_text().splitlines() if line.startswith('| `make demo` |')]
    (model,) = [model for _, model in MODELS if model['Name'] == 'mask-rcnn_r18_fpn_ubn_digits']
    assert [round(100 * number, 1) for number in numbers(''.join(row.split('|')[3:5]))] == measurements(model)


def contains(line, part):
    return any(line[start : start + len(part)] == part for start in range(len(line)))
