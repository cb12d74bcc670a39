"""Means: exact sums of any numbers in any order, rounded once."""

import math
from collections.abc import Iterable
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from m3jax.arithmetic.means import AxisSums, mean_of

DIGITS = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}


def mean(values: Iterable[float], dtype: str) -> float:
    """The exact mean, rounded to nearest even by Python's fractions."""
    numbers = [Fraction(float(value)) for value in values]
    exact = sum(numbers, Fraction(0)) / len(numbers)
    if not exact:
        return 0.0
    digits, least = DIGITS[dtype]
    top = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    top -= Fraction(2) ** top > abs(exact)
    unit = Fraction(2) ** max(top - digits + 1, least)
    return float(round(exact / unit) * unit)


@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_means_are_rounded_once(dtype: str, count: int) -> None:
    rng = np.random.default_rng(count)
    kind = np.float16 if dtype == "float16" else np.float32
    spread = 2.0 ** rng.integers(-40, 8, 200)
    values = [(rng.standard_normal(200) * spread).astype(kind) for _ in range(count)]
    values[0][:5] = [0, 1e-40, 3e38 if kind is np.float32 else 6e4, -1e-45, 7]
    values[1][5:100] = -values[0][5:100]  # what cancels
    want = [mean(column, dtype) for column in np.stack(values).T]
    assert mean_of(values, dtype).astype(np.float64).tolist() == want
    for order in (1, -1):  # whatever the order, and in pieces
        sums = AxisSums((1, 200))
        for value in values[::order]:
            sums.add(value.reshape(1, 1, 200))
        assert sums.means(dtype)[0].astype(np.float64).tolist() == want


def test_sums_lose_nothing_however_far_numbers_are_apart() -> None:
    numbers = np.float32([3e38, -3e38, 3e38, 1e-45, -1.5, 2.0**-126, 1e-39] * 9)
    sums = AxisSums((2, 1))
    sums.add(numbers.reshape(1, -1, 1), first=1)
    assert sums.means("float32")[1, 0] == mean(numbers, "float32")
    sums.add(-numbers[::-1].reshape(1, -1, 1), first=1)
    assert sums.means("float32").tolist() == [[0.0], [0.0]]
    with pytest.raises(ValueError, match="not finite"):
        sums.add(np.full((1, 1, 1), math.inf, ml_dtypes.bfloat16))
