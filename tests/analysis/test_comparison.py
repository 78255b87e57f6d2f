"""mmubn.analysis.comparison: differences between runs. tests/tools/test_compare_norms.py has its tables and plots."""

import numpy as np
import pytest
from scipy import stats

from mmubn.analysis.comparison import Curve, difference


def test_the_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = (
        Curve([0, 1, 2, 3], [1, 2], np.stack([rng.normal(size=4), rng.normal(size=4) + shift], 1)) for shift in (0, 1)
    )
    mean, low, high = difference(b, a)
    d = b.values[:, 1] - a.values[:, 1]
    half = stats.t.ppf(0.975, 3) * d.std(ddof=1) / 2
    np.testing.assert_allclose((mean, low, high), (d.mean(), d.mean() - half, d.mean() + half))
    # Only seeds that both have are compared.
    shifted = Curve([2, 3, 4, 5], [1, 2], b.values)
    d = b.values[:2, 1] - a.values[2:, 1]
    assert difference(shifted, a)[0] == pytest.approx(d.mean())
    assert difference(Curve([9], [1], b.values[:1, :1]), a) is None
