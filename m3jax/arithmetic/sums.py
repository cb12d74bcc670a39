"""Inner products that do not depend on the order of their terms.

All terms are rounded to multiples of one unit, 2⁻²⁹ of the power of two at or below the largest of them, and become
integers, which add up in any order: over chunks, devices and hosts.

References:
    Demmel & Nguyen, Parallel reproducible summation, 2015.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, UInt32

from m3jax.arithmetic import exact
from m3jax.arithmetic.exact import Zero

Values = Sequence[Float[Array, "..."]]

_LIMB_BITS = 11
LIMBS = 7  # 31-bit terms of up to 2**46 entries
_AXIS_LIMIT = 2 ** (32 - _LIMB_BITS)
_ROW = 4096
_TERM_BITS = 30


def pairs_of(count: int) -> list[tuple[int, int]]:
    """Which inner products there are of so many vectors: the squares first, then each pair once.

    Example:
        >>> pairs_of(2)
        [(0, 0), (1, 1), (0, 1)]
    """
    return [(i, i) for i in range(count)] + [(i, j) for i in range(count) for j in range(i + 1, count)]


def _terms(values: Values, zero: Zero) -> list[Float[Array, "..."]]:
    return [exact.multiply(values[i], values[j], zero) for i, j in pairs_of(len(values))]


def largest(
    values: Values, zero: Zero, valid: Bool[Array, "..."] | None = None, by_row: bool = False
) -> UInt32[Array, "*rows pairs"]:
    """Bits of the largest magnitude among the terms of each inner product; a maximum, so any order gives it.

    Args:
        values: The vectors, float32 arrays of one shape.
        zero: A run-time zero, see `exact.fence`.
        valid: Which entries count; all when None.
        by_row: One product for each row, along the last axis, instead of one for all.
    """
    bits = [exact.magnitude_bits(term) for term in _terms(values, zero)]
    if valid is not None:
        bits = [jnp.where(valid, b, 0) for b in bits]
    axis = -1 if by_row else None
    return jnp.stack([jnp.max(b, axis=axis, initial=np.uint32(0)) for b in bits], axis=-1)


def _power_of_two(exponent: Array) -> Float[Array, "..."]:
    return lax.bitcast_convert_type((exponent + 127).astype(jnp.uint32) << np.uint32(23), jnp.float32)


def _add_up(terms: UInt32[Array, "..."], by_row: bool) -> UInt32[Array, "*rows limbs"]:
    """The sum of uint32 numbers below 2³¹ as limbs of 11 bits, lowest first."""
    if terms.ndim < 2 and not by_row:
        rows = -(-terms.size // _ROW)
        terms = jnp.pad(terms.ravel(), (0, rows * _ROW - terms.size)).reshape(rows, _ROW)
    base, mask = np.uint32(_LIMB_BITS), np.uint32(2**_LIMB_BITS - 1)
    limbs = [(terms >> np.uint32(_LIMB_BITS * i)) & mask for i in range(3)]
    for axis in range(terms.ndim - 1, terms.ndim - 2 if by_row else -1, -1):
        if terms.shape[axis] > _AXIS_LIMIT:
            raise ValueError(f"an axis of {terms.shape[axis]} entries is over {_AXIS_LIMIT}")
        sums = [jnp.sum(limb, axis=axis, dtype=jnp.uint32) for limb in limbs]
        sums += [jnp.zeros_like(sums[0])] * (min(LIMBS, len(sums) + 2) - len(sums))
        limbs, carry = [], jnp.zeros_like(sums[0])
        for total in sums:
            total = total + carry
            limbs.append(total & mask)
            carry = total >> base
    limbs += [jnp.zeros_like(limbs[0])] * (LIMBS - len(limbs))
    return jnp.stack(limbs, axis=-1)


def integer_sums(
    values: Values,
    largest_bits: UInt32[Array, "*rows pairs"],
    zero: Zero,
    valid: Bool[Array, "..."] | None = None,
    by_row: bool = False,
) -> UInt32[Array, "*rows 2 pairs limbs"]:
    """Sums of the positive and of the negated negative terms of each inner product, in its unit, as limbs.

    Args:
        values: The vectors, float32 arrays of one shape.
        largest_bits: What `largest` gave over everything that is added up.
        zero: A run-time zero.
        valid: Which entries count; all when None.
        by_row: As for `largest`.
    """
    positive, negative = [], []
    for product, term in enumerate(_terms(values, zero)):
        top = largest_bits[..., product, None] if by_row else largest_bits[product]
        exponent = (top >> np.uint32(23)).astype(jnp.int32) - 127
        shift = _TERM_BITS - 1 - exponent  # in two factors: one power of two could overflow
        scaled = term * _power_of_two(shift // 2) * _power_of_two(shift - shift // 2)
        units = lax.round(jnp.abs(scaled), lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.uint32)
        if valid is not None:
            units = jnp.where(valid, units, 0)
        positive.append(_add_up(jnp.where(term > 0, units, 0), by_row))
        negative.append(_add_up(jnp.where(term < 0, units, 0), by_row))
    return jnp.stack([jnp.stack(positive, axis=-2), jnp.stack(negative, axis=-2)], axis=-3)


def _to_integers(limbs: np.ndarray) -> np.ndarray:
    """Limbs (last axis, of any size) as integers: uint64 where they fit, else Python's."""
    if not limbs[..., 5:].any() and limbs.max(initial=0) < 2**_LIMB_BITS:
        shifts = np.arange(5, dtype=np.uint64) * np.uint64(_LIMB_BITS)
        small: np.ndarray = (limbs[..., :5].astype(np.uint64) << shifts).sum(-1, dtype=np.uint64).astype(np.int64)
        return small
    weights = np.array([1 << (_LIMB_BITS * i) for i in range(LIMBS)], object)
    total: np.ndarray = (limbs.astype(object) * weights).sum(-1)
    return total


def inner_products(largest_bits: Integer[Any, "*rows pairs"], limbs: Integer[Any, "*rows 2 pairs limbs"]) -> np.ndarray:
    """Inner products from what was counted over everything, on the host.

    Args:
        largest_bits: Of `largest`, reduced.
        limbs: Of `integer_sums`, added up; limbs may exceed their 11 bits.

    Returns:
        float64[*rows, pairs], in the order of `pairs_of`, each rounded once; NaN where a term is not finite.
    """
    exponents = (np.asarray(largest_bits).astype(np.int64) >> 23) - 127
    totals = _to_integers(np.asarray(limbs).astype(np.int64))
    signed = totals[..., 0, :] - totals[..., 1, :]
    products = np.ldexp(signed.astype(np.float64), exponents - (_TERM_BITS - 1))
    finite: np.ndarray = np.where(exponents < 128, products, np.nan)
    return finite


def matrix_of(products: np.ndarray, count: int) -> np.ndarray:
    """The symmetric matrix of inner products.

    Args:
        products: float64[*rows, pairs].
        count: How many vectors there are.

    Returns:
        float64[*rows, count, count].

    Example:
        >>> matrix_of(np.array([1.0, 4.0, 2.0]), 2).tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    matrix = np.zeros((*products.shape[:-1], count, count))
    for k, (i, j) in enumerate(pairs_of(count)):
        matrix[..., i, j] = matrix[..., j, i] = products[..., k]
    return matrix
