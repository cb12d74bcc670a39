"""Float32 arithmetic with one meaning on every backend.

Compilers contract a multiply and an add into one FMA, flush subnormal numbers or keep them, and quieten NaNs as
they please; each of these changes bits. The functions here leave them no choice:

- a product is *fenced* before it can feed a sum: its bits are xored with a zero known only at run time;
- every operand and every result smaller than 2⁻¹²⁵ becomes a zero of its sign. The limit is one octave above the
  smallest normal number because hardware that flushes decides "tiny" before or after rounding, which differs for
  results just below 2⁻¹²⁶; above 2⁻¹²⁵ all of them agree;
- bfloat16 is widened and narrowed with integer operations, and NaNs get one pattern.

Each function is an identity (or the plain operation) to automatic differentiation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt32
from numpy.typing import DTypeLike

_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT_ABOVE_ONE = np.uint32(0x7F000000)  # exponent field minus its last bit: zero below 2**-125
_INFINITY = np.uint32(0x7F800000)

Zero = UInt32[Any, ""] | None
"""A zero known only at run time, of the host or of a device, or None where none can be passed in: see `fence`."""

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def as_bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """The bit patterns of float32 `x`; constant to differentiation."""
    return lax.bitcast_convert_type(lax.stop_gradient(x), jnp.uint32)


def magnitude_bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """|x| of float32 as integers that order like the magnitudes."""
    return as_bits(x) & _MAGNITUDE


def _from_bits(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_jvp
def flush(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` (float32) with magnitudes below 2⁻¹²⁵ made zeros of the same sign."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where((bits & _EXPONENT_ABOVE_ONE) == 0, _from_bits(bits & _SIGN), x)


@flush.defjvp
def _flush_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    return flush(*primals), tangents[0]


def _opaque_zero(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """n·(n+1) is even: true of every bit pattern, and not a rule that compilers know."""
    return (bits * (bits + np.uint32(1))) & np.uint32(1)


@jax.custom_jvp
def fence(product: Float[Array, "..."], zero: Zero) -> Float[Array, "..."]:
    """`product` (float32) unchanged, in a form that no compiler can contract into a following sum.

    Args:
        product: Any float32 values.
        zero: A uint32 zero that the compiler cannot know to be zero: an argument of the jitted function. None where
            there is none to pass (inside a caller's jit): then zeros are made of the bits of the product.
    """
    bits = lax.bitcast_convert_type(product, jnp.uint32)
    return _from_bits(bits ^ (_opaque_zero(bits) if zero is None else zero))


@fence.defjvp
def _fence_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    return fence(*primals), tangents[0]


def multiply(a: Float[Array, "..."], b: Float[Array, "..."], zero: Zero) -> Float[Array, "..."]:
    """a·b in float32, rounded once, fenced and flushed."""
    return flush(fence(a * b, zero))


def add(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """a + b in float32, rounded once and flushed."""
    return flush(a + b)


def subtract(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """a − b in float32, rounded once and flushed."""
    return flush(a - b)


_FRACTION = np.uint32(0x007FFFFF)
_LEADING = np.uint32(0x00800000)
_NAN = np.uint32(0x7FC00000)
_DIGITS = 24  # of a float32, the leading one included


def _quotient_bits(a: UInt32[Array, "..."], b: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Bits of |a| / |b|, of float32s whose magnitudes have these bits: zeros, infinities, NaNs, numbers from 2⁻¹²⁵.

    Long division: the 24 binary digits of the quotient one by one, then the remainder says whether to round up. No
    quotient lies halfway between two float32s: 2q + 1 with 24 digits of q is odd and has 25, so times b it is no
    24-digit number times a power of two.
    """
    one = np.uint32(1)
    rest, divisor = (a & _FRACTION) | _LEADING, (b & _FRACTION) | _LEADING
    short = (rest < divisor).astype(jnp.uint32)  # then the first digit is one place further right
    rest, digits = rest << short, jnp.zeros_like(rest)
    for _ in range(_DIGITS):
        digit = rest >= divisor
        rest = jnp.where(digit, rest - divisor, rest) << one
        digits = (digits << one) | digit.astype(jnp.uint32)
    exponent = (a >> np.uint32(23)).astype(jnp.int32) - (b >> np.uint32(23)).astype(jnp.int32)
    exponent = exponent + np.int32(127) - short.astype(jnp.int32)
    fraction = (digits & _FRACTION) + (rest > divisor).astype(jnp.uint32)  # a carry goes into the exponent
    bits = (jnp.clip(exponent, 0, 255).astype(jnp.uint32) << np.uint32(23)) + fraction
    tiny, huge = (exponent <= 0) | (bits & _EXPONENT_ABOVE_ONE == 0), bits >= _INFINITY
    bits = jnp.where(tiny, np.uint32(0), jnp.where(huge, _INFINITY, bits))
    bits = jnp.where((a == 0) | (b == _INFINITY), np.uint32(0), bits)
    bits = jnp.where((a == _INFINITY) | (b == 0), _INFINITY, bits)
    undefined = ((a == b) & ((a == 0) | (a == _INFINITY))) | (a > _INFINITY) | (b > _INFINITY)
    return jnp.where(undefined, _NAN, bits)


@jax.custom_jvp
def divide(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """a / b of flushed float32s, rounded once, to nearest even, and flushed; by integers alone, as devices divide
    float32s each in its own way.

    Args:
        a: What is divided; below 2⁻¹²⁵ only zeros.
        b: What it is divided by, of the same shape; likewise. Zeros, infinities and NaNs as in IEEE 754.
    """
    magnitude = _quotient_bits(magnitude_bits(a), magnitude_bits(b))
    return _from_bits(jnp.where(magnitude > _INFINITY, magnitude, magnitude | ((as_bits(a) ^ as_bits(b)) & _SIGN)))


@divide.defjvp
def _divide_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    (a, b), (a_dot, b_dot) = primals, tangents
    quotient = divide(a, b)
    return quotient, (a_dot - quotient * b_dot) / b


@jax.custom_jvp
def _bfloat16_to_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return _from_bits(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << np.uint32(16))


@_bfloat16_to_float32.defjvp
def _bfloat16_to_float32_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    return _bfloat16_to_float32(*primals), tangents[0].astype(jnp.float32)


@jax.custom_jvp
def _float32_to_bfloat16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    narrowed = ((bits + to_even) >> np.uint32(16)).astype(jnp.uint16)
    is_nan = (bits & _MAGNITUDE) > _INFINITY
    return lax.bitcast_convert_type(jnp.where(is_nan, np.uint16(0x7FC0), narrowed), jnp.bfloat16)


@_float32_to_bfloat16.defjvp
def _float32_to_bfloat16_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    return _float32_to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def widen(x: Shaped[Any, "..."]) -> Float[Array, "..."]:
    """`x` (float32, bfloat16 or float16) as flushed float32, without rounding.

    Raises:
        TypeError: `x` has another dtype.
    """
    dtype = jnp.dtype(x.dtype)
    if dtype.name not in FLOAT_DTYPES:
        raise TypeError(f"parameters to merge must be {', '.join(FLOAT_DTYPES)}, not {dtype.name}")
    if dtype == jnp.bfloat16:
        x = _bfloat16_to_float32(x)
    return flush(x.astype(jnp.float32))


def narrow(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Float32 `x` rounded once, to nearest even, to `dtype` (float32, bfloat16 or float16).

    Raises:
        TypeError: `dtype` is another one.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in FLOAT_DTYPES:
        raise TypeError(f"merged parameters can be {', '.join(FLOAT_DTYPES)}, not {dtype.name}")
    if dtype == jnp.bfloat16:
        return _float32_to_bfloat16(x)
    return jnp.where(jnp.isnan(x), jnp.nan, x).astype(dtype)
