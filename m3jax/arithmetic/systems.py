"""Systems of linear equations on the host, in float64, with the same bits on every machine.

Libraries of linear algebra add in an order of their own, which changes with machine, threads and version. Here they
only multiply integers: matrices are cut into slices of 22 bits, of which up to 2⁹ products add up below 2⁵³, so that
every product of slices is exact, in whatever order it is added (Ozaki's error-free transformation). All else is numpy's
arithmetic entry by entry, which IEEE 754 fixes, in an order that is fixed here.

References:
    Ozaki, Ogita, Oishi & Rump, Error-free transformations of matrix multiplication by using fast routines of matrix
    multiplication and its applications, 2012, doi 10.1007/s11075-011-9478-1.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Doubles: TypeAlias = npt.NDArray[np.float64]

BLOCK = 128
"""Rows or columns that are worked on together, and the longest sum of a product of slices."""

SINGULAR = 2.0**-24
"""The smallest pivot, of a matrix whose diagonal lies between 1 and 4, at which equations are solved."""

_BITS = 22  # 2·22 + log₂(4·128) = 53: up to four products of slices are added up in one sum
_WHOLE = 3  # slices that hold a float64
_SMALLEST = -400  # exponent of a line: smaller numbers are cut off, so that no power of two leaves float64


class Slices(NamedTuple):
    """A matrix as a sum of matrices of integers, each of which counts a power of two in each line.

    Attributes:
        digits: Integers of at most 22 bits and a sign, the most significant first.
        exponents: int64, of each line: digits count 2^(exponent − 22), 2^(exponent − 44), …
    """

    digits: tuple[npt.NDArray[Any], ...]
    exponents: npt.NDArray[np.int64]


def _powers(exponents: npt.NDArray[np.int64]) -> Doubles:
    return np.ldexp(1.0, exponents.astype(np.int32))


def sliced(matrix: Doubles, axis: int, count: int = _WHOLE) -> Slices:
    """A matrix cut into slices.

    Args:
        matrix: Finite numbers.
        axis: Along which products add up: each line along it has an exponent of its own.
        count: How many slices; what is smaller than the last one counts is left out.
    """
    largest = np.abs(matrix).max(axis=axis, initial=0.0)
    exponents = np.where(largest > 0, np.frexp(largest)[1], 0).astype(np.int64)
    exponents = np.maximum(exponents, _SMALLEST)
    rest = matrix * np.expand_dims(_powers(_BITS - exponents), axis)
    digits = []
    for number in range(count):
        if number:
            rest = rest * 2.0**_BITS
        whole = np.rint(rest)
        rest = rest - whole
        digits.append(whole)
    return Slices(tuple(digits), exponents)


def product(a: Slices, b: Slices) -> Doubles:
    """A·B, of A sliced along its rows and B along its columns, whose sums have at most `BLOCK` terms.

    Products that count the same power of two are added up exactly; these sums are added, the least significant first.
    What is as small as the product of an integer with what both have left out is left out.
    """
    total: Doubles | None = None
    for level in reversed(range(min(len(a.digits), len(b.digits)))):
        pairs = [(a.digits[i], b.digits[level - i]) for i in range(level + 1)]
        left = np.concatenate([one for one, _ in pairs], axis=1) if level else pairs[0][0]
        right = np.concatenate([other for _, other in pairs], axis=0) if level else pairs[0][1]
        exact = left @ right  # of integers below 2⁵³
        total = exact if total is None else exact + total * 2.0**-_BITS
    assert total is not None
    total *= _powers(a.exponents - _BITS)[:, None]
    total *= _powers(b.exponents - _BITS)[None, :]
    return total


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


class SingularError(ArithmeticError):
    """A matrix is not positive definite, or so nearly singular that float64 does not solve its equations."""


def _factor_block(block: Doubles) -> Doubles:
    """L of a small matrix L·Lᵀ, column by column."""
    rest, size = block.copy(), len(block)
    lower = np.zeros_like(block)
    for k in range(size):
        pivot = rest[k, k]
        if not pivot >= SINGULAR:
            raise SingularError
        lower[k:, k] = rest[k:, k] / np.sqrt(pivot)
        rest[k + 1 :, k + 1 :] -= np.multiply.outer(lower[k + 1 :, k], lower[k + 1 :, k])
    return lower


def _inverse_block(lower: Doubles) -> Doubles:
    """The inverse of a small lower triangular matrix, row by row."""
    inverse = np.eye(len(lower))
    for k in range(len(lower)):
        inverse[k] = inverse[k] / lower[k, k]
        inverse[k + 1 :] -= np.multiply.outer(lower[k + 1 :, k], inverse[k])
    return inverse


class Cholesky(NamedTuple):
    """A symmetric positive definite matrix S, factored: D·S·D = L·Lᵀ with powers of two D.

    Attributes:
        lower: L, with anything above its diagonal.
        inverses: The inverses of L's blocks on the diagonal.
        scaling: D.
    """

    lower: Doubles
    inverses: tuple[Doubles, ...]
    scaling: Doubles


def factored(matrix: Doubles) -> Cholesky:
    """Cholesky's factor of a symmetric matrix with a positive diagonal, which is overwritten.

    Args:
        matrix: Finite numbers.

    Raises:
        SingularError: A pivot is below 2⁻²⁴ where the diagonal lies between 1 and 4.

    Example:
        >>> factor = factored(np.array([[4.0, 2.0], [2.0, 5.0]]))
        >>> solved(factor, np.array([[8.0, 12.0]])).tolist()
        [[1.0, 2.0]]
    """
    exponents = np.frexp(np.diagonal(matrix))[1] - 1
    halves = -(exponents // 2)  # the diagonal then lies between 1 and 4
    scaling = _powers(halves)
    matrix *= scaling[:, None]
    matrix *= scaling[None, :]
    inverses = []
    for own in _blocks(len(matrix)):
        below = slice(own.stop, len(matrix))
        lower = _factor_block(matrix[own, own])
        matrix[own, own] = lower
        inverses.append(_inverse_block(lower))
        if own.stop < len(matrix):
            matrix[below, own] = product(sliced(matrix[below, own], 1), sliced(inverses[-1].T, 0))
            panel = sliced(matrix[below, own], 1)
            for rows in _blocks(len(matrix) - own.stop):  # the lower half alone, row of blocks by row of blocks
                there = slice(own.stop + rows.start, own.stop + rows.stop)
                left = Slices(tuple(each[rows] for each in panel.digits), panel.exponents[rows])
                right = Slices(tuple(each[: rows.stop].T for each in panel.digits), panel.exponents[: rows.stop])
                matrix[there, own.stop : there.stop] -= product(left, right)
    return Cholesky(matrix, tuple(inverses), scaling)


def solved(factor: Cholesky, right: Doubles) -> Doubles:
    """X of X·S = R.

    Args:
        factor: Of S.
        right: R, [rows, size]; it is overwritten by X.
    """
    lower, size = factor.lower, len(factor.lower)
    blocks = list(_blocks(size))
    right *= factor.scaling
    for own, inverse in zip(blocks, factor.inverses, strict=True):
        right[:, own] = product(sliced(right[:, own], 1), sliced(inverse.T, 0))
        if own.stop < size:
            right[:, own.stop :] -= product(sliced(right[:, own], 1), sliced(lower[own.stop :, own].T, 0))
    for own, inverse in zip(reversed(blocks), reversed(factor.inverses), strict=True):
        right[:, own] = product(sliced(right[:, own], 1), sliced(inverse, 0))
        if own.start:
            right[:, : own.start] -= product(sliced(right[:, own], 1), sliced(lower[own, : own.start], 0))
    right *= factor.scaling
    return right


class Applied(NamedTuple):
    """A matrix made ready to be multiplied with rows again and again.

    Attributes:
        parts: Of each block of its rows two slices, whose integers are stored as float32.
        width: How many columns it has.
    """

    parts: tuple[Slices, ...]
    width: int


def prepared(matrix: Doubles) -> Applied:
    """A matrix for `applied`.

    Args:
        matrix: [size, width], finite.
    """

    def part(own: slice) -> Slices:
        digits, exponents = sliced(matrix[own], 0, 2)
        return Slices(tuple(each.astype(np.float32) for each in digits), exponents)

    return Applied(tuple(part(own) for own in _blocks(len(matrix))), matrix.shape[1])


def applied(rows: Doubles, matrix: Applied) -> Doubles:
    """rows·matrix, each block of the matrix's rows with 44 bits of its largest entries; blocks are added in order.

    Args:
        rows: [rows, size], finite.
        matrix: Of `prepared`.
    """
    total = np.zeros((len(rows), matrix.width))
    for own, part in zip(_blocks(rows.shape[1]), matrix.parts, strict=True):
        wide = Slices(tuple(each.astype(np.float64) for each in part.digits), part.exponents)
        total += product(sliced(rows[:, own], 1, 2), wide)
    return total


def rounded_to_odd(values: Doubles) -> npt.NDArray[np.float32]:
    """Float64 as float32 of which the last bit tells of what was cut off, so that rounding it once more rounds once.

    Args:
        values: Finite, of magnitudes below 2¹²⁷.

    References:
        Boldo & Melquiond, Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd, 2008.
    """
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    towards_zero = np.where(np.abs(back) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    odd: Sequence[Any] = towards_zero.view(np.uint32) | (back != values).astype(np.uint32)
    return np.asarray(odd, np.uint32).view(np.float32)
