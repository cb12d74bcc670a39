"""Spherical interpolation: along the arc between two parameter vectors, tensor by tensor.

The arc's angle needs three sums over all entries. They are made independent of order by pre-rounding: all terms are
rounded to multiples of one unit, 2⁻³⁰ of a power of two above the largest, and integers add up in any order.

References:
    Shoemake, Animating rotation with quaternion curves, 1985.
    Demmel & Nguyen, Parallel reproducible summation, 2015.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from m3jax.arithmetic import exact
from m3jax.arithmetic.exact import Zero
from m3jax.methods.base import Fold, Method, Scalars, Values
from m3jax.methods.linear import stack, weighted_sum

NEARLY_PARALLEL = 0.9995  # as in mergekit: beyond this cosine the arc is a line to float32
_LIMB_BITS = 11
_LIMBS = 7  # 31-bit terms of up to 2**46 entries
_AXIS_LIMIT = 2 ** (32 - _LIMB_BITS)
_ROW = 4096
_TERM_BITS = 30
_PRODUCTS = ((0, 0), (1, 1), (0, 1))


class InnerProducts(NamedTuple):
    """⟨a,a⟩, ⟨b,b⟩ and ⟨a,b⟩ as host float64."""

    aa: float
    bb: float
    ab: float


def _terms(values: Values, zero: Zero) -> list[Float[Array, "..."]]:
    return [exact.multiply(values[i], values[j], zero) for i, j in _PRODUCTS]


def largest(values: Values, zero: Zero, valid: Bool[Array, "..."] | None = None) -> UInt32[Array, "3"]:
    """Bits of the largest magnitude among the terms of each inner product; a maximum, so any order gives it."""
    bits = [exact.magnitude_bits(term) for term in _terms(values, zero)]
    if valid is not None:
        bits = [jnp.where(valid, b, 0) for b in bits]
    return jnp.stack([jnp.max(b, initial=np.uint32(0)) for b in bits])


def _power_of_two(exponent: Array) -> Float[Array, "..."]:
    return lax.bitcast_convert_type((exponent + 127).astype(jnp.uint32) << np.uint32(23), jnp.float32)


def _add_up(terms: UInt32[Array, "..."]) -> UInt32[Array, " limbs"]:
    """The sum of uint32 numbers below 2³¹ as limbs of 11 bits, lowest first."""
    if terms.ndim < 2:
        rows = -(-terms.size // _ROW)
        terms = jnp.pad(terms.ravel(), (0, rows * _ROW - terms.size)).reshape(rows, _ROW)
    base, mask = np.uint32(_LIMB_BITS), np.uint32(2**_LIMB_BITS - 1)
    limbs = [(terms >> np.uint32(_LIMB_BITS * i)) & mask for i in range(3)]
    for axis in range(terms.ndim - 1, -1, -1):
        if terms.shape[axis] > _AXIS_LIMIT:
            raise ValueError(f"slerp: an axis of {terms.shape[axis]} entries is over {_AXIS_LIMIT}")
        sums = [jnp.sum(limb, axis=axis, dtype=jnp.uint32) for limb in limbs]
        sums += [jnp.zeros_like(sums[0])] * (min(_LIMBS, len(sums) + 2) - len(sums))
        limbs, carry = [], jnp.zeros_like(sums[0])
        for total in sums:
            total = total + carry
            limbs.append(total & mask)
            carry = total >> base
    limbs += [jnp.zeros((), jnp.uint32)] * (_LIMBS - len(limbs))
    return jnp.stack(limbs)


def integer_sums(
    values: Values,
    largest_bits: UInt32[Array, "3"],
    zero: Zero,
    valid: Bool[Array, "..."] | None = None,
) -> UInt32[Array, "2 3 limbs"]:
    """Sums of the positive and of the negated negative terms of each inner product, in its unit, as limbs.

    Args:
        values: Two float32 arrays.
        largest_bits: What `largest` gave over all of the tensor.
        zero: A run-time zero.
        valid: Which entries count; all when None.
    """
    positive, negative = [], []
    for product, term in enumerate(_terms(values, zero)):
        exponent = (largest_bits[product] >> np.uint32(23)).astype(jnp.int32) - 127
        shift = _TERM_BITS - 1 - exponent  # in two factors: one power of two could overflow
        scaled = term * _power_of_two(shift // 2) * _power_of_two(shift - shift // 2)
        units = lax.round(jnp.abs(scaled), lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.uint32)
        if valid is not None:
            units = jnp.where(valid, units, 0)
        positive.append(_add_up(jnp.where(term > 0, units, 0)))
        negative.append(_add_up(jnp.where(term < 0, units, 0)))
    return jnp.stack([jnp.stack(positive), jnp.stack(negative)])


def to_integers(limbs: np.ndarray) -> np.ndarray:
    """Limbs (last axis) as Python integers."""
    weights = np.array([1 << (_LIMB_BITS * i) for i in range(_LIMBS)], object)
    total: np.ndarray = (limbs.astype(object) * weights).sum(-1)
    return total


def inner_products(largest_bits: np.ndarray, sums: np.ndarray) -> InnerProducts:
    """Inner products from the integers summed over a whole tensor.

    Args:
        largest_bits: uint32[3] on the host.
        sums: Python integers [2, 3]: positive and negative units.
    """
    exponents = [(int(bits) >> 23) - 127 for bits in largest_bits]
    totals = [int(sums[0][k]) - int(sums[1][k]) for k in range(3)]
    return InnerProducts(*(math.ldexp(t, e - (_TERM_BITS - 1)) for t, e in zip(totals, exponents, strict=True)))


def arc_weights(products: InnerProducts, t: float) -> tuple[float, float]:
    """Weights of the two ends at position t of the arc, in host float64; of the line where there is no arc."""
    norms = math.sqrt(products.aa) * math.sqrt(products.bb)
    cosine = min(1.0, max(-1.0, products.ab / norms)) if norms > 0 else 1.0
    if abs(cosine) > NEARLY_PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def arc_coefficients(products: InnerProducts, t: float) -> Float[Any, "2"]:
    """`arc_weights` rounded to float32."""
    return stack(list(arc_weights(products, t)))


def coefficients(largest_bits: np.ndarray, limbs: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """The two float32 coefficients of a tensor and their derivatives in t, on the host.

    Args:
        largest_bits: What `largest` gave for the whole tensor.
        limbs: What `integer_sums` gave for the whole tensor.
        t: Position in [0, 1].
    """
    products = inner_products(largest_bits, to_integers(np.asarray(limbs)))
    step = 1e-4  # central difference: the weights are smooth, and a derivative needs no last bit
    ahead, behind = arc_weights(products, t + step), arc_weights(products, t - step)
    slope = [(x - y) / (2 * step) for x, y in zip(ahead, behind, strict=True)]
    return np.asarray(arc_coefficients(products, t)), np.array(slope, np.float32)


@jax.custom_jvp
def traced_coefficients(
    largest_bits: UInt32[Array, "3"], limbs: UInt32[Array, "2 3 limbs"], t: Float[Array, ""]
) -> Float[Array, "2"]:
    """`coefficients` inside jit: the host is called back, so that the bits are the host's."""
    value: Array = _call_back(largest_bits, limbs, t)[0]
    return value


def _call_back(largest_bits: Array, limbs: Array, t: Array) -> Any:
    pair = jax.eval_shape(lambda: jnp.zeros(2, jnp.float32))

    def on_host(bits: Any, sums: Any, position: Any) -> tuple[np.ndarray, np.ndarray]:
        return coefficients(np.asarray(bits), np.asarray(sums), float(position))

    return jax.pure_callback(on_host, (pair, pair), largest_bits, limbs, t, vmap_method="sequential")


@traced_coefficients.defjvp
def _traced_coefficients_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    value, slope = _call_back(*primals)
    return value, slope * tangents[2]


def _fold(method: Method, fold: Fold) -> Float[Array, " n"]:
    return np.zeros(2, np.float32)  # type: ignore[return-value]  # the arc's weights come from the inner products


def _combine(method: Method, values: Values, scalars: Scalars, zero: Zero) -> Float[Array, "..."]:
    return weighted_sum(scalars.coefficients, values, zero)


def slerp() -> Method:
    """Spherical linear interpolation between exactly two experts, per tensor; `weights` is the position t in [0, 1].

    t = 0 is the first expert. Tensors that are nearly parallel (|cos| > 0.9995) are interpolated linearly, and so are
    those whose entries are all so small (below 10⁻¹⁹) that their squares are flushed.

    References:
        Shoemake, Animating rotation with quaternion curves, 1985.
    """
    return Method("slerp", _fold, _combine, interpolates=True)
