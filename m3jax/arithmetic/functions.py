"""Functions of entries beside sums and products, of exact operations, so that their bits are the same everywhere.

Libraries and devices compute `exp`, `tanh` and quotients each in their way. Here every step is one rounded float32
operation of `exact`. What comes out is within a few units of the last place of the function, as each says.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from m3jax.arithmetic import exact
from m3jax.arithmetic.exact import Zero

LARGEST_POWER = 80.0
"""Beyond it `exp` is what it is there."""

_LOG2_E = np.float32(1.44269504)
_LN_2 = (np.float32(0.693359375), np.float32(-2.12194440e-4))  # the first has ten bits, so that multiples are exact
_EXP = tuple(np.float32(1 / factorial) for factorial in (5040, 720, 120, 24, 6, 2, 1, 1))
_TANH = tuple(np.float32(c) for c in (62 / 2835, -17 / 315, 2 / 15, -1 / 3))
_SMALL, _SATURATED = np.float32(0.25), np.float32(10.0)
_GUESS = np.uint32(0x7EF311C7)  # minus the bits of a number, these are the bits of about its reciprocal
_NEWTON_STEPS = 4


def _polynomial(coefficients: tuple[np.float32, ...], x: Float[Array, "..."], zero: Zero) -> Float[Array, "..."]:
    """Horner's rule, the highest power first."""
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = exact.add(exact.multiply(total, x, zero), jnp.asarray(coefficient))
    return total


def exp(x: Float[Array, "..."], zero: Zero) -> Float[Array, "..."]:
    """e^x of x (float32) in [0, 80], within 2 units of the last place; x outside counts as the nearest inside.

    x = k·ln 2 + r, and e^r is the Taylor polynomial of degree 7.
    """
    x = jnp.clip(x, 0.0, LARGEST_POWER)
    k = lax.round(exact.multiply(x, jnp.asarray(_LOG2_E), zero), lax.RoundingMethod.TO_NEAREST_EVEN)
    high, low = (exact.multiply(k, jnp.asarray(part), zero) for part in _LN_2)
    rest = exact.subtract(exact.subtract(x, high), low)
    power = lax.bitcast_convert_type((k.astype(jnp.int32) + 127) << 23, jnp.float32)
    return exact.multiply(_polynomial(_EXP, rest, zero), power, zero)


def reciprocal(x: Float[Array, "..."], zero: Zero) -> Float[Array, "..."]:
    """1/x of x (float32) of a magnitude from 2⁻¹²⁰ to 2¹⁰⁰, within 2 units of the last place, by Newton's iteration."""
    sign = exact.as_bits(x) & np.uint32(0x80000000)
    size = jnp.abs(x)
    found = lax.bitcast_convert_type(_GUESS - exact.magnitude_bits(x), jnp.float32)
    for _ in range(_NEWTON_STEPS):
        error = exact.subtract(jnp.ones_like(size), exact.multiply(size, found, zero))
        found = exact.add(found, exact.multiply(found, error, zero))
    return lax.bitcast_convert_type(exact.as_bits(found) | sign, jnp.float32)


def tanh(x: Float[Array, "..."], zero: Zero) -> Float[Array, "..."]:
    """The hyperbolic tangent of float32, within 6 units of the last place.

    For small x its Taylor polynomial of degree 9, for others 1 − 2/(e²ˣ + 1).
    """
    size = jnp.minimum(jnp.abs(x), _SATURATED)
    square = exact.multiply(size, size, zero)
    cubic = exact.multiply(exact.multiply(_polynomial(_TANH, square, zero), square, zero), size, zero)
    near = exact.add(size, cubic)
    one = jnp.ones_like(size)
    half = reciprocal(exact.add(exp(size + size, zero), one), zero)
    far = exact.subtract(one, half + half)
    return jnp.where(x < 0, -1.0, 1.0) * jnp.where(size < _SMALL, near, far)
