"""Scalars of about 48 bits in pairs of float32, for folding traced weights where there is no float64.

On the host, coefficients are folded in float64 and rounded once to float32. Inside jit there is no float64 (TPUs have
none), so a traced scalar is carried as an unevaluated sum of two float32. Rounded to float32, the two agree except
where float64 falls within 2⁻²⁰ of the middle between two float32.

References:
    Dekker, A floating-point technique for extending the available precision, 1971.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from m3jax.arithmetic import exact
from m3jax.errors import M3Error

_TOP_TWELVE = np.uint32(0xFFFFF000)


def _two_sum(a: Float[Array, "..."], b: Float[Array, "..."]) -> tuple[Array, Array]:
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _halves(a: Float[Array, "..."]) -> tuple[Array, Array]:
    top = lax.bitcast_convert_type(exact.as_bits(a) & _TOP_TWELVE, jnp.float32)
    return top, a - top


def _fenced(a: Float[Array, "..."], b: Float[Array, "..."]) -> Array:
    return exact.fence(a * b, None)


def _two_product(a: Float[Array, "..."], b: Float[Array, "..."]) -> tuple[Array, Array]:
    product = _fenced(a, b)
    (a1, a0), (b1, b0) = (
        _halves(a),
        _halves(b),
    )  # products of halves are exact, so contraction cannot change them
    return product, ((a1 * b1 - product) + a1 * b0 + a0 * b1) + a0 * b0


@dataclass(frozen=True)
class Double:
    """high + low, two float32 arrays of one shape.

    `rest` is what they do not hold of a float64 that came from the host, where that is known; arithmetic drops it.
    """

    high: Float[Array, "..."]
    low: Float[Array, "..."]
    rest: Float[Array, "..."] | None = None

    @classmethod
    def of(cls, value: "Double | float | Float[Array, '...']") -> "Double":
        """A traced float32, or a host number split into two float32."""
        if isinstance(value, Double):
            return value
        if isinstance(value, int | float):
            high = np.float32(value)
            return cls(jnp.float32(high), jnp.float32(value - float(high)))
        value = jnp.asarray(value, jnp.float32)
        return cls(value, jnp.zeros_like(value))

    def __add__(self, other: "Double | float") -> "Double":
        other = Double.of(other)
        total, error = _two_sum(self.high, other.high)
        return Double(*_two_sum(total, error + (self.low + other.low)))

    __radd__ = __add__

    def __neg__(self) -> "Double":
        return Double(-self.high, -self.low)

    def __mul__(self, other: "Double | float") -> "Double":
        other = Double.of(other)
        product, error = _two_product(self.high, other.high)
        crossed = _fenced(self.high, other.low) + _fenced(self.low, other.high)
        return Double(*_two_sum(product, error + crossed))

    __rmul__ = __mul__

    def __truediv__(self, other: "Double | float") -> "Double":
        other = Double.of(other)
        quotient = Double.of(self.high / other.high)
        for _ in range(2):  # each step adds the quotient's error to first order, whatever the hardware's division does
            rest = self + -(quotient * other)
            quotient = quotient + Double.of(rest.high / other.high)
        return quotient

    def __rtruediv__(self, other: float) -> "Double":
        return Double.of(other) / self


def thirds(values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "... 3"]:
    """Numbers of float64 as three float32 each, whose sum in float64 they are: the largest first.

    Parts that are subnormal are zeros where the thread flushes them, as those of XLA do.

    Example:
        >>> float(thirds(np.array([1 / 3])).astype(np.float64).sum()) == 1 / 3
        True
    """
    parts, rest = [], np.asarray(values, np.float64)
    for _ in range(3):
        parts.append(rest.astype(np.float32))
        rest = rest - parts[-1].astype(np.float64)
    return np.stack(parts, axis=-1)


def or_one(value: Double | float) -> Double | float:
    """`value`, or 1 where it is exactly 0."""
    if isinstance(value, Double):
        is_zero = (value.high == 0) & (value.low == 0)
        return Double(jnp.where(is_zero, 1.0, value.high), jnp.where(is_zero, 0.0, value.low))
    return value or 1.0


def to_float32(value: Double | float) -> Float[Array, "..."] | np.float32:
    """The nearest float32, flushed as `exact.flush` does; a host number stays on the host."""
    if isinstance(value, Double):
        return exact.flush(value.high)
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    if not np.isfinite(rounded):
        raise M3Error(f"a coefficient of {value:g} is beyond float32: take smaller weights or a larger density")
    return np.float32(np.copysign(0.0, rounded)) if abs(rounded) < 2.0**-125 else rounded
