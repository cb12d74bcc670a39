"""W + s·L·R against numpy, however it is cut and whatever the numbers."""

import jax
import ml_dtypes
import numpy as np
import pytest
from support import compiling, oracle

from m3jax.arithmetic import lowrank

BF16 = ml_dtypes.bfloat16
ZERO = np.uint32(0)


def numbers(seed, dtype, weights=np.float32, spread=0):
    """W, L and R, whose entries differ by powers of two up to `spread` either way."""
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        return rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)

    return drawn(6, 40).astype(weights), drawn(6, 5).astype(dtype), drawn(5, 40).astype(dtype)


@pytest.mark.parametrize(
    ("weights", "dtype", "spread"),
    [(np.float32, np.float32, 0), (BF16, BF16, 4), (np.float16, np.float16, 3), (BF16, np.float32, 60)],
)
def test_the_bits_are_those_of_numpy_and_of_every_part(weights, dtype, spread):
    w, left, right = numbers(0, dtype, weights, spread)
    want = oracle.adapted(w, left, right, 0.3)
    whole = lowrank.factors(left, right, 0.3)
    for short in {False, lowrank.are_short(dtype)}:
        assert np.asarray(lowrank.add_product(w, whole, short=short)).tobytes() == want.tobytes()
        compiled = compiling.jit(lowrank.add_product, static_argnames="short")(w, whole, ZERO, short=short)
        assert np.asarray(compiled).tobytes() == want.tobytes()
    found = lowrank.host_factors(left, right, 0.3)
    for first, last in ((0, 1), (1, 6)):
        rows = lowrank.host_add_product(w[first:last], found._replace(left=found.left[first:last]), False)
        assert rows.tobytes() == want[first:last].tobytes()
    columns = lowrank.host_add_product(w[:, 7:19], found._replace(right=found.right[:, 7:19]), False)
    assert columns.tobytes() == want[:, 7:19].tobytes()


@pytest.mark.parametrize("powers", [(-120, 100), (126, -140), (0, -149), (127, 127)])
def test_factors_may_be_large_and_small(powers):
    w, left, right = numbers(1, np.float32)
    left, right = (
        np.clip(x, -1, 1) * np.float32(2.0 ** (p / 2)) * np.float32(2.0 ** (p - p / 2))
        for x, p in zip((left, right), powers, strict=True)
    )
    left[0, 0] = 0
    want = oracle.adapted(w, left, right, 1.0)
    got = compiling.jit(lambda *x: lowrank.add_product(x[0], lowrank.factors(*x[1:])))(w, left, right, np.float32(1))
    finite = np.isfinite(want)
    assert np.asarray(got)[finite].tobytes() == want[finite].tobytes()
    assert not np.isfinite(np.asarray(got)[~finite]).any()


def test_it_is_what_it_should_be_to_a_few_last_places():
    w, left, right = numbers(2, np.float32)
    exact = w.astype(float) + 0.3 * left.astype(float) @ right.astype(float)
    got = lowrank.host_add_product(w, lowrank.host_factors(left, right, 0.3), False)
    assert np.abs(got - exact).max() < 5 * 2**-24 * np.abs(exact).max()
    none = lowrank.host_factors(np.zeros_like(left), right, 0.3)
    assert lowrank.host_add_product(w, none, False).tobytes() == w.tobytes()


def test_weights_and_factors_have_gradients():
    w, left, right = numbers(3, np.float32)

    def total(w, left, right):
        return lowrank.add_product(w, lowrank.factors(left, right, 0.5)).sum()

    of_w, of_left, of_right = jax.grad(total, (0, 1, 2))(w, left, right)
    assert (np.asarray(of_w) == 1).all()
    np.testing.assert_allclose(of_left, 0.5 * np.ones_like(w) @ right.T, rtol=1e-5)
    np.testing.assert_allclose(of_right, 0.5 * left.T @ np.ones_like(w), rtol=1e-5)
