"""mmubn.analysis.classification_demo: what it makes of the logs of runs."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from run_logs import write_log

from mmubn.analysis import classification_demo

# Of three seeds each, in percent after each of four epochs.
CURVES = {
    'BN': [[20, 60, 80, 90], [30, 70, 85, 94], [10, 50, 90, 92]],
    'UBN': [[40, 80, 95, 97], [50, 60, 96, 95], [45, 75, 88, 98.5]],
}


@pytest.fixture
def results(tmp_path):
    """What is read from logs of runs with the accuracies above."""
    for norm, curves in CURVES.items():
        for seed, values in enumerate(curves):
            records = [{'loss': 1.0, 'step': 43}, *({'accuracy/top1': v, 'step': i} for i, v in enumerate(values, 1))]
            write_log(tmp_path / norm / str(seed), records)
    return {
        norm: classification_demo.read_accuracies([tmp_path / norm / str(seed) for seed in range(3)]) for norm in CURVES
    }


def test_table(results, tmp_path):
    """Means of 92, and of 290.5 / 3; one of 5 validation digits is 20 points."""
    for split, count in (('train', 6), ('val', 5)):
        for i in range(count):
            path = tmp_path / 'digits' / split / str(i % 2) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    text = classification_demo.table(results, {'BN': 12.4, 'UBN': 15.6}, tmp_path / 'digits')
    assert '| BN | 3 | 4 | 92.00 | 90.00 to 94.00 | 12 |\n| UBN | 3 | 4 | 96.83 | 95.00 to 98.50 | 16 |\n' in text
    assert 'trained on 6 handwritten digits' in text
    assert 'on 5 other digits; one digit is 20.00 points' in text


def test_plot(results, tmp_path, monkeypatch):
    monkeypatch.setattr(plt, 'close', lambda figure: None)
    classification_demo.plot(results, tmp_path / 'accuracy.png')
    monkeypatch.undo()
    axes = plt.gcf().axes
    plt.close()
    for axis, first in zip(axes, (0, 2), strict=True):
        assert axis.get_xlabel() == 'epoch'
        assert axis.get_ylabel().endswith('(%)')
        lines = []
        for container, (norm, curves) in zip(axis.containers, CURVES.items(), strict=True):
            line, _, (bars,) = container
            values = np.array(curves)[:, first:]
            np.testing.assert_allclose(line.get_xdata(), np.arange(first + 1, 5), atol=0.1)
            np.testing.assert_allclose(line.get_ydata(), values.mean(0))
            ends = np.array(bars.get_segments())[:, :, 1]
            np.testing.assert_allclose(ends, np.stack([values.min(0), values.max(0)], axis=1))
            assert container.get_label() == f'{norm}, mean and range of 3 seeds'
            lines.append(line)
        assert len(axis.get_legend().get_texts()) == 2
        for style in (plt.Line2D.get_linestyle, plt.Line2D.get_marker):
            assert style(lines[0]) != style(lines[1]), 'the norms must stay apart in black and white'
