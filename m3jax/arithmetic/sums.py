"""Inner products that do not depend on the order of their terms.

All terms are rounded to multiples of one unit, 2⁻²⁹ of the power of two at or below the largest of them, and become
integers, which add up in any order: over chunks, devices and hosts.

References:
    Demmel & Nguyen, Parallel reproducible summation, 2015.
"""

from collections.abc import Callable, Sequence
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
_HALF_BITS = 16
_HALVES_LIMIT = 2 ** (32 - _HALF_BITS)  # entries along an axis whose lower halves add up in 32 bits
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


def _in_rows(terms: Sequence[Array], valid: Bool[Array, "..."] | None, by_row: bool) -> list[Array]:
    """Terms with zeros for what does not count; flat ones as rows, of which the last is filled up."""
    counted = [term if valid is None else jnp.where(valid, term, jnp.zeros_like(term)) for term in terms]
    if by_row or counted[0].ndim > 1:
        return counted
    rows = -(-counted[0].size // _ROW)
    return [jnp.pad(term, (0, rows * _ROW - term.size)).reshape(rows, _ROW) for term in map(jnp.ravel, counted)]


def _reduced(operands: Sequence[Array], function: Callable[[Any, Any], Any]) -> list[Array]:
    """All operands reduced along the last axis in one loop, which reads what they are made of once."""
    zeros = tuple(np.zeros((), operand.dtype) for operand in operands)

    def together(one: Sequence[Array], other: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(map(function, one, other))

    return list(lax.reduce(tuple(operands), zeros, together, (operands[0].ndim - 1,)))


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
    bits = _in_rows([exact.magnitude_bits(term) for term in _terms(values, zero)], valid, by_row)
    found = jnp.stack(_reduced(bits, jnp.maximum), axis=-1)
    return found if by_row else jnp.max(found, axis=tuple(range(found.ndim - 1)), initial=np.uint32(0))


def _power_of_two(exponent: Array) -> Float[Array, "..."]:
    return lax.bitcast_convert_type((exponent + 127).astype(jnp.uint32) << np.uint32(23), jnp.float32)


def _carried(limbs: Sequence[Array]) -> list[Array]:
    """Limbs of 11 bits, from ones that may have more."""
    carried, carry = [], jnp.zeros_like(limbs[0])
    for limb in limbs:
        total = limb + carry
        carried.append(total & np.uint32(2**_LIMB_BITS - 1))
        carry = total >> np.uint32(_LIMB_BITS)
    return carried


def _spread(number: UInt32[Array, "..."], place: int) -> list[UInt32[Array, "..."]]:
    """The limbs of number · 2^place."""
    first, shift = divmod(place, _LIMB_BITS)
    mask = np.uint32(2**_LIMB_BITS - 1)
    rest = number >> np.uint32(_LIMB_BITS - shift)
    own = [(number << np.uint32(shift)) & mask] + [(rest >> np.uint32(_LIMB_BITS * i)) & mask for i in range(3)]
    limbs = [jnp.zeros_like(number)] * first + own
    return (limbs + [jnp.zeros_like(number)] * LIMBS)[:LIMBS]


def _add_up(units: Sequence[Integer[Array, "..."]], by_row: bool) -> UInt32[Array, "*rows 2 pairs limbs"]:
    """Sums of int32 numbers within ±2³⁰, each as the difference of two numbers in limbs of 11 bits, lowest first."""
    length = units[0].shape[-1]
    longest = length if by_row else max(units[0].shape)
    if longest > _AXIS_LIMIT:
        raise ValueError(f"an axis of {longest} entries is over {_AXIS_LIMIT}")
    places = (0, _HALF_BITS) if length <= _HALVES_LIMIT else (0, _LIMB_BITS, 2 * _LIMB_BITS)
    digits = [
        unit >> np.int32(place) if place == places[-1] else (unit >> np.int32(place)) & np.int32(2 ** places[1] - 1)
        for place in places
        for unit in units
    ]
    sums = _reduced(digits, jnp.add)
    *lower, top = (
        jnp.stack(sums[i * len(units) : (i + 1) * len(units)], axis=-1).astype(jnp.uint32) for i in range(len(places))
    )
    negative = top >> np.uint32(31) == 1  # the highest digit alone has a sign
    none = jnp.zeros_like(top)
    either = [jnp.stack([number, none], axis=-2) for number in lower]
    either += [jnp.stack([jnp.where(negative, none, top), jnp.where(negative, none - top, none)], axis=-2)]
    limbs = [jnp.zeros_like(either[0])] * LIMBS
    for number, place in zip(either, places, strict=True):
        limbs = _carried([limb + own for limb, own in zip(limbs, _spread(number, place), strict=True)])
    for _ in range(0 if by_row else units[0].ndim - 1):
        limbs = _carried([jnp.sum(limb, axis=0, dtype=jnp.uint32) for limb in limbs])
    return jnp.stack(limbs, axis=-1)


def integer_sums(
    values: Values,
    largest_bits: UInt32[Array, "*rows pairs"],
    zero: Zero,
    valid: Bool[Array, "..."] | None = None,
    by_row: bool = False,
) -> UInt32[Array, "*rows 2 pairs limbs"]:
    """Sums of the terms of each inner product, in its unit, as limbs of two numbers whose difference they are.

    Args:
        values: The vectors, float32 arrays of one shape.
        largest_bits: What `largest` gave over everything that is added up.
        zero: A run-time zero.
        valid: Which entries count; all when None.
        by_row: As for `largest`.
    """
    units = []
    for product, term in enumerate(_terms(values, zero)):
        top = largest_bits[..., product, None] if by_row else largest_bits[product]
        exponent = (top >> np.uint32(23)).astype(jnp.int32) - 127
        shift = _TERM_BITS - 1 - exponent  # in two factors: one power of two could overflow
        scaled = term * _power_of_two(shift // 2) * _power_of_two(shift - shift // 2)
        units.append(lax.round(scaled, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32))
    return _add_up(_in_rows(units, valid, by_row), by_row)


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
