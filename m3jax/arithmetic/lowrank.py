"""W + s·L·R in float32 with one meaning on every backend: what low-rank adapters add to weights.

An entry is W + s·(((l₀·r₀) + l₁·r₁) + …), the rank's terms added from the first to the last, each product and each sum
rounded once to float32, and the result once to the dtype of W. So it depends on one row of L, one column of R and one
entry of W: not on the chunk that it is computed in, nor on a library of matrix products.

Before that, a factor is divided by the power of two of its largest entry, which is exact, and what is then below 2⁻⁵⁰
counts as zero. All products are multiples of 2⁻¹⁴⁶ that are zero or at least 2⁻¹⁰⁰, all sums zero or at least 2⁻¹²³: no
subnormal number comes up that a backend might flush.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped
from numpy.typing import DTypeLike

from m3jax.arithmetic import exact

_BIAS = 127  # of float32's exponent
_LEAST = np.float32(2.0**-50)


class Factors(NamedTuple):
    """The factors of what is added to a matrix.

    Attributes:
        left: float32[rows, rank], its largest entry in [1, 4), unless all are zero.
        right: float32[rank, columns], likewise.
        scale: float32[]: what their product is multiplied by.
    """

    left: Float[Any, "rows rank"]
    right: Float[Any, "rank columns"]
    scale: Float[Any, ""]


def _normalised(factor: Shaped[Any, "m n"]) -> tuple[Float[Array, "m n"], Float[Array, ""]]:
    """A factor divided by a power of two, and that power."""
    wide = exact.widen(jnp.asarray(factor))
    exponent = jnp.max(exact.magnitude_bits(wide), initial=np.uint32(0)) >> np.uint32(23)
    exponent = jnp.clip(exponent, 1, 2 * _BIAS - 1)

    def power(field: Array) -> Array:
        return lax.bitcast_convert_type(field << np.uint32(23), jnp.float32)

    # Division by the power itself would leave float32 where the power does.
    scaled = wide * power(np.uint32(2 * _BIAS) - exponent)
    return jnp.where(jnp.abs(scaled) < _LEAST, 0.0, scaled), power(exponent)


def factors(
    left: Shaped[Any, "rows rank"], right: Shaped[Any, "rank columns"], scale: Any, zero: exact.Zero = None
) -> Factors:
    """What `add_product` needs of two factors, once for all of their rows and columns.

    Args:
        left: One factor (float32, bfloat16 or float16).
        right: The other.
        scale: A float32 that their product is multiplied by.
        zero: See `exact.fence`.

    Raises:
        TypeError: A factor has another dtype.
    """
    (left, of_left), (right, of_right) = _normalised(left), _normalised(right)
    scale = exact.multiply(exact.multiply(jnp.asarray(scale, jnp.float32), of_left, zero), of_right, zero)
    return Factors(left, right, scale)


def are_short(*dtypes: DTypeLike) -> bool:
    """Whether products of numbers of two dtypes are exact in float32: of two bfloat16 or float16.

    A fused multiply-add of such rounds as often as its two steps, so that it does not matter what compilers make of
    them.
    """
    return all(jnp.dtype(dtype).name in ("bfloat16", "float16") for dtype in dtypes)


def add_product(
    weights: Shaped[Any, "rows columns"], added: Factors, zero: exact.Zero = None, short: bool = False
) -> Shaped[Array, "rows columns"]:
    """W + s·L·R, as the module says.

    Args:
        weights: W (float32, bfloat16 or float16).
        added: L with as many rows, and R with as many columns.
        zero: See `exact.fence`.
        short: What `are_short` says of the dtypes that the factors had; it changes no bit, but fences cost time.

    Returns:
        Of the dtype of W.

    Raises:
        TypeError: W has another dtype.
    """

    def term(k: int) -> Float[Array, "rows columns"]:
        product = jnp.multiply(added.left[:, k : k + 1], added.right[k : k + 1])
        return product if short else exact.fence(product, zero)

    total = term(0)
    for k in range(1, added.left.shape[1]):
        total = total + term(k)
    wide = exact.widen(jnp.asarray(weights))
    return exact.narrow(exact.add(wide, exact.multiply(added.scale, total, zero)), weights.dtype)


@functools.cache
def _compiled() -> tuple[Any, Any]:
    return jax.jit(factors), jax.jit(add_product, static_argnames="short")


@contextmanager
def _on_host() -> Iterator[None]:
    """The processor rather than an accelerator, where JAX has it: what is read from files is there."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others only
        device = jax.local_devices()[0]
    with jax.default_device(device):
        yield


def host_factors(
    left: Shaped[np.ndarray, "rows rank"], right: Shaped[np.ndarray, "rank columns"], scale: float
) -> Factors:
    """`factors` of numpy arrays, compiled; whatever the device, the bits are the same."""
    with _on_host():
        return Factors(*map(np.asarray, _compiled()[0](left, right, np.float32(scale), np.uint32(0))))


def host_add_product(
    weights: Shaped[np.ndarray, "rows columns"], added: Factors, short: bool
) -> Shaped[np.ndarray, "rows columns"]:
    """`add_product` of numpy arrays, compiled for their shapes."""
    with _on_host():
        return np.asarray(_compiled()[1](weights, added, np.uint32(0), short=short))
