"""Means that are rounded once: exact sums of floats, whatever their order, and quotients to nearest even. No JAX.

A float32 is a whole number of 2⁻¹⁵⁰. Sums are kept as whole numbers in parts of 16 powers of two, so that terms add up
in any order and nothing is lost; the quotient is rounded to the dtype that is wanted, and to no other on the way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_WIDTH, _PARTS = 16, 22  # bits of a part, and how many there are: a float32 has 278 bits, a sum some more
_SPREAD = 4  # parts over which a sum of 63 bits is spread
_LEAST = -150  # the power of two that sums are whole numbers of
_DIGITS = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}  # and the power of the smallest number


class AxisSums:
    """Exact sums along one axis of an array that comes in pieces.

    Example:
        >>> sums = AxisSums((1, 2))
        >>> sums.add(np.float32([[[1e30, 1]], ]).reshape(1, 1, 2))
        >>> sums.add(np.float32([[[-1e30, 2], [3, 6]]]))
        >>> sums.means("float32").tolist()
        [[1.0, 3.0]]
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        """Nothing has been added.

        Args:
            shape: What is left of the array: `[outer, inner]`.
        """
        self._parts = np.zeros((_PARTS, *shape), np.int64)
        self._counts = np.zeros(shape[0], np.int64)

    def add(self, values: npt.NDArray[Any], first: int = 0) -> None:
        """Takes in a piece.

        Args:
            values: `[outer, terms, inner]` of float32, bfloat16 or float16.
            first: The first of its outer places.

        Raises:
            ValueError: A value is not finite.
        """
        wide, terms, last = values.astype(np.float32), values.shape[1], first + len(values)
        top = np.abs(wide).max(initial=0)
        if not np.isfinite(top):
            raise ValueError("not finite")
        # As whole numbers of so many bits that this many of them have room in 63.
        bits = 62 - terms.bit_length()
        part = max(-(-(int(np.frexp(top)[1]) - _LEAST - bits) // _WIDTH), 0)
        scaled = wide.astype(np.float64) * 2.0 ** -(_WIDTH * part + _LEAST)
        whole = np.rint(scaled)
        small = whole != scaled  # which few are that are so much smaller than the largest
        whole[small] = 0
        sums = whole.astype(np.int64).sum(axis=1)
        for place in range(_SPREAD - 1):
            self._parts[part + place, first:last] += sums & (2**_WIDTH - 1)
            sums >>= _WIDTH
        self._parts[part + _SPREAD - 1, first:last] += sums
        if small.any():
            self._add_small(wide, small, first)
        self._counts[first:last] += values.shape[1]

    def _add_small(self, wide: npt.NDArray[np.float32], small: npt.NDArray[np.bool_], first: int) -> None:
        """Takes in some of the terms of a piece, each by its own exponent."""
        outer, _, inner = np.nonzero(small)
        fractions, exponents = np.frexp(wide[small].astype(np.float64))
        shifts = np.maximum(exponents - 24 - _LEAST, 0)  # below 2⁻¹²⁶ all numbers have one unit
        digits = np.ldexp(fractions, exponents - _LEAST - shifts).astype(np.int64) << (shifts % _WIDTH)
        np.add.at(self._parts, (shifts // _WIDTH, outer + first, inner), digits)

    def means(self, dtype: str) -> npt.NDArray[Any]:
        """The mean of the terms of each place, `[outer, inner]`, rounded once; zero where there is no term.

        Args:
            dtype: "float32", "bfloat16" or "float16".
        """
        totals = np.zeros(self._parts.shape[1:], object)
        for part in range(_PARTS):
            totals += self._parts[part].astype(object) << (_WIDTH * part)
        found = np.zeros(totals.shape, np.float64)
        for place in np.ndindex(found.shape):
            found[place] = _quotient(int(totals[place]), max(int(self._counts[place[0]]), 1), dtype)
        return found.astype(_numpy_of(dtype))


def _quotient(total: int, count: int, dtype: str) -> float:
    """total · 2⁻¹⁵⁰ / count, rounded to nearest even."""
    digits, least = _DIGITS[dtype]
    size = abs(total)
    if size == 0:
        return 0.0
    top = size.bit_length() - count.bit_length()  # the quotient is below 2^(top + 1)
    if (size >> top if top >= 0 else size << -top) < count:
        top -= 1
    unit = max(top - (digits - 1), least - _LEAST)
    numerator, denominator = (size, count << unit) if unit >= 0 else (size << -unit, count)
    whole, rest = divmod(numerator, denominator)
    whole += rest * 2 > denominator or (rest * 2 == denominator and whole & 1)
    return float(np.copysign(np.ldexp(float(whole), unit + _LEAST), total))


def mean_of(values: Sequence[npt.NDArray[Any]], dtype: str) -> npt.NDArray[Any]:
    """The mean of arrays of one shape, entry by entry, rounded once: of one array, its numbers.

    Args:
        values: Of float32, bfloat16 or float16, which may differ.
        dtype: What is wanted.

    Raises:
        ValueError: Of several arrays, one holds what is not finite.

    Example:
        >>> mean_of([np.float32([1, 2]), np.float16([2, 4])], "float32").tolist()
        [1.5, 3.0]
    """
    if len(values) == 1:
        with np.errstate(over="ignore"):
            return values[0].astype(np.float32).astype(_numpy_of(dtype))
    sums = AxisSums((1, values[0].size))
    total, exact = np.zeros(values[0].size, np.float64), np.ones(values[0].size, np.bool_)
    with np.errstate(invalid="ignore"):
        for each in values:
            term = each.astype(np.float64).reshape(-1)
            before, total = total, total + term
            kept = total - before
            exact &= (before - (total - kept)) + (term - kept) == 0  # what the sum has lost (Knuth)
    if not np.isfinite(total).all():
        raise ValueError("not finite")
    found = _divided(total, len(values), dtype)
    if not exact.all():
        lost = ~exact
        sums = AxisSums((1, int(lost.sum())))
        sums.add(np.stack([each.reshape(-1)[lost].astype(np.float32) for each in values])[None])
        found[lost] = sums.means(dtype)[0]
    return found.reshape(values[0].shape)


def _divided(total: npt.NDArray[np.float64], count: int, dtype: str) -> npt.NDArray[Any]:
    """Exact sums divided by a small number, rounded once."""
    quotient = total / count
    high = (quotient.view(np.uint64) & np.uint64(2**64 - 2**27)).view(np.float64)  # so that products are exact
    rest = (total - high * count) - (quotient - high) * count
    # Rounded to odd first: what is cut off still says on which side of two neighbours a quotient is.
    even = quotient.view(np.uint64) & np.uint64(1) == 0
    away = np.sign(rest) * np.sign(quotient)
    words = quotient.view(np.int64) + np.where(even & (rest != 0), away, 0).astype(np.int64)
    quotient = words.view(np.float64)
    digits, least = _DIGITS[dtype]
    _, exponents = np.frexp(quotient)
    units = np.maximum(exponents - digits, least)
    rounded: npt.NDArray[Any] = np.ldexp(np.rint(np.ldexp(quotient, -units)), units).astype(_numpy_of(dtype))
    return rounded


def _numpy_of(dtype: str) -> np.dtype[Any]:
    import ml_dtypes  # which numpy then knows by name

    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
