"""Sums of segments: the same in any order, and right."""

import math

import numpy as np

from m3jax.arithmetic import segments


def test_sums_do_not_depend_on_order_and_are_right():
    rng = np.random.default_rng(0)
    spread = 2.0 ** rng.integers(-60, 60, (6, segments.SEGMENT))  # of which most terms are far below the largest
    x, y = (rng.standard_normal(spread.shape).astype(np.float32) * spread for _ in range(2))
    x[0], y[1, 1:] = 0.0, 0.0
    bounds = segments.largest(x * y)
    found = segments.sums_of(x * y)
    for order in (slice(None, None, -1), rng.permutation(segments.SEGMENT)):
        assert np.array_equal(segments.sums_of((x * y)[:, order].copy()), found)
    exact = np.array([math.fsum(row) for row in (x * y).tolist()])
    assert np.all(np.abs(found - exact) <= segments.SEGMENT * bounds * 2.0**-41)
    assert found[0] == 0.0
    assert found[1] == exact[1] == x[1, 0] * y[1, 0]
