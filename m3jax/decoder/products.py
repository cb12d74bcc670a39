"""Products of weights and activations, added up in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# XLA's fast CPU kernel for bfloat16 products wants more than one row; padding costs nothing elsewhere.
_MIN_ROWS = 4
# Above so many, repacking weights costs less than turning the result.
_FEW_ROWS = 64
# That kernel takes sixteen rows of weights and of activations at a time, whether there are as many or not.
_TILE = 16
# Rows of weights that many bytes apart, or a multiple, share one set of a processor's first cache.
_CACHE_STRIDE = 4096


def project(
    weight: Float[Array, "out in"], x: Float[Array, "*lead in"], dtype: DTypeLike | None = None
) -> Float[Array, "*lead out"]:
    """x·weightᵀ, added up in float32.

    Args:
        weight: As stored, outputs first.
        x: Activations, of the weight's dtype.
        dtype: Of the result; that of `x` by default.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > _FEW_ROWS:
        product = dot(rows, weight, (((1,), (1,)), ((), ())))
    elif (pieces := _pieces(weight, len(rows))) > 1:
        product = _product_by_pieces(weight, rows, pieces)
    else:
        product = _turned_product(weight, rows)
    return product.astype(dtype or x.dtype).reshape(*x.shape[:-1], -1)


def dot(a: Array, b: Array, dimensions: Any) -> Array:
    """`lax.dot_general`, added up in float32; float32 factors are not rounded first, as accelerators would.

    Args:
        a: One factor.
        b: The other.
        dimensions: As `lax.dot_general` takes them.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    product: Array = lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
    return product


def _turned_product(weight: Float[Array, "out in"], rows: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
    # Weights on the left: on a CPU they are then read where they lie instead of being repacked for each
    # product. The barrier keeps XLA from turning the product around again.
    padded = jnp.pad(rows, ((0, max(0, _MIN_ROWS - len(rows))), (0, 0)))
    turned: Array = lax.optimization_barrier(  # type: ignore[no-untyped-call]
        dot(weight, padded, (((1,), (1,)), ((), ())))
    )
    return turned.T[: len(rows)]


def _pieces(weight: Float[Array, "out in"], rows: int) -> int:
    """Into how many pieces rows of weights are cut, so that those beside each other lie in different sets of the cache.

    On several devices a row may be divided among them, and would be gathered to be cut.
    """
    if weight.dtype != jnp.bfloat16 or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    width = weight.shape[1] * weight.dtype.itemsize
    pieces = 1
    while width and width // pieces % _CACHE_STRIDE == 0:
        pieces *= 2
    return pieces if rows * pieces <= _TILE else 1


def _product_by_pieces(
    weight: Float[Array, "out in"], rows: Float[Array, "rows in"], pieces: int
) -> Float[Array, "rows out"]:
    """Each piece of a row of weights by all pieces of activations, of which its own is taken: the others cost nothing.

    Args:
        weight: As stored.
        rows: Of activations.
        pieces: How many a row has; divides its width.
    """
    width = weight.shape[1] // pieces
    products = _turned_product(weight.reshape(-1, width), rows.reshape(-1, width))
    each = products.reshape(len(rows), pieces, -1, pieces)  # [rows, piece of activations, out, piece of weights]
    return sum((each[:, piece, :, piece] for piece in range(1, pieces)), each[:, 0, :, 0])
