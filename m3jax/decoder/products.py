"""Products of weights and activations, added up in float32."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Above so many rows of activations, repacking weights costs less than turning the result.
_FEW_ROWS = 64
# XLA's fast CPU kernel for bfloat16 products wants more than one row.
_MIN_ROWS = 4
# It takes sixteen rows of weights and of activations at a time, whether there are as many or not.
_TILE = 16
# Rows of weights that many bytes apart, or a multiple, share one set of a processor's first cache.
_CACHE_STRIDE = 4096
# Rows of float16 weights that are widened at a time, which a processor's caches hold.
_WIDENED_ROWS = 256


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
        product = _product(weight, rows)
    else:
        product = lax.platform_dependent(weight, rows, cpu=_product_on_cpu, default=_product)
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


def _product(weight: Float[Array, "out in"], rows: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
    return dot(rows, weight, (((1,), (1,)), ((), ())))


def _product_on_cpu(weight: Float[Array, "out in"], rows: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
    """Of few rows: weights are read where they lie, instead of being repacked for each product."""
    if weight.dtype == jnp.float16:
        return _widened_product(weight, rows)
    pieces = _pieces(weight, len(rows))
    return _turned_product(weight, rows) if pieces == 1 else _product_by_pieces(weight, rows, pieces)


def _turned_product(weight: Float[Array, "out in"], rows: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
    """Weights on the left."""
    padded = jnp.pad(rows, ((0, max(0, _MIN_ROWS - len(rows))), (0, 0)))
    # The barrier keeps XLA from turning the product around again.
    turned: Array = lax.optimization_barrier(  # type: ignore[no-untyped-call]
        dot(weight, padded, (((1,), (1,)), ((), ())))
    )
    return turned.T[: len(rows)]


def _pieces(weight: Float[Array, "out in"], rows: int) -> int:
    """Into how many pieces weights are cut, so that rows beside each other lie in different sets of the cache."""
    width = weight.shape[1] * weight.dtype.itemsize
    pieces = 1
    while width and width // pieces % _CACHE_STRIDE == 0:
        pieces *= 2
    return pieces if weight.dtype == jnp.bfloat16 and rows * pieces <= _TILE else 1


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


def _widened_product(weight: Float[Array, "out in"], rows: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
    """In float32, as XLA has it on a CPU, but some rows of weights after others, so that they stay in its caches."""
    wide, count = rows.astype(jnp.float32), weight.shape[0]
    size = min(_WIDENED_ROWS, count)

    def of_block(start: Array) -> Float[Array, "size rows"]:
        block = lax.dynamic_slice_in_dim(weight, start, size).astype(jnp.float32)
        widened: Array = lax.optimization_barrier(block)  # type: ignore[no-untyped-call]
        return dot(widened, wide, (((1,), (1,)), ((), ())))

    # The last block begins before the one ahead of it ends, where they do not divide the rows.
    products = lax.map(of_block, np.minimum(np.arange(0, count, size), count - size))
    left = count - (len(products) - 1) * size
    return jnp.concatenate([products[:-1].reshape(-1, len(rows)), products[-1, size - left :]]).T
