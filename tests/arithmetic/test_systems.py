"""Equations solved on the host: the oracle's bits, whatever adds up the products, and how near the solution is."""

import ml_dtypes
import numpy as np
import pytest
from support import oracle

from m3jax.arithmetic import systems

SIZE = 150  # a block and a rest


def definite(size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2 * size, size)) * np.exp2(rng.integers(-30, 30, size))
    return rows.T @ rows


def test_products_are_exact_in_whatever_order_they_are_added():
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape) * np.exp(4 * rng.standard_normal(shape)) for shape in ((9, 128), (128, 7)))
    got = systems.product(systems.sliced(a, 1), systems.sliced(b, 0))
    order = rng.permutation(128)
    again = systems.product(systems.sliced(a[::-1, order], 1), systems.sliced(b[order][:, ::-1], 0))
    assert again[::-1, ::-1].tobytes() == got.tobytes()
    bound = 128 * np.abs(a).max(1)[:, None] * np.abs(b).max(0)
    assert (np.abs(got - a @ b) < 2.0**-50 * bound).all()
    largest = np.full((1, 128), 1 - 2.0**-22)  # sums of as many and as large integers as can be
    full = systems.product(systems.sliced(largest, 1), systems.sliced(largest.T, 0))
    assert full[0, 0] == 128 * (1 - 2.0**-22) ** 2


def test_solutions_are_the_oracles_and_near_to_lapacks():
    matrix, rng = definite(), np.random.default_rng(2)
    right = rng.standard_normal((5, SIZE)) @ matrix
    factor = systems.factored(matrix.copy())
    got = systems.solved(factor, right.copy())
    want = oracle.divided(right, *oracle.cholesky(matrix))
    assert got.tobytes() == want.tobytes()
    scale = np.sqrt(np.diagonal(matrix))  # rows and columns of many magnitudes, of which no condition number tells
    near = np.linalg.solve(matrix / scale[:, None] / scale, (right / scale).T).T / scale
    assert (np.abs(got - near) * scale).max() < 1e-12 * (np.abs(near) * scale).max()
    rows = rng.standard_normal((6, 5))
    applied = systems.applied(rows, systems.prepared(got))
    assert np.abs(applied - rows @ got).max() < 2.0**-40 * 5 * np.abs(rows).max() * np.abs(got).max()
    assert systems.applied(rows[2:3], systems.prepared(got)).tobytes() == applied[2:3].tobytes()


@pytest.mark.parametrize("pivot", [0.0, -1.0, 2.0**-25])
def test_what_is_singular_or_nearly_so_is_not_solved(pivot):
    matrix = np.eye(SIZE)
    matrix[140:142, 140:142] = [[1.0, 1.0], [1.0, 1.0 + pivot]]
    with pytest.raises(systems.SingularError):
        systems.factored(matrix)


def test_rounding_to_odd_and_then_to_16_bits_rounds_once():
    above, below = 1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40  # float32 takes both for halfway
    values = np.array([above, below, -above, 1 + 2.0**-8, 0.0, 3e38])
    got = systems.rounded_to_odd(values).astype(ml_dtypes.bfloat16).astype(float).tolist()
    assert got[:5] == [1 + 2.0**-7, 1 + 2.0**-7, -1 - 2.0**-7, 1.0, 0.0]
    assert values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(float).tolist()[:2] != got[:2]
