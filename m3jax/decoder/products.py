"""Products of weights and activations, added up in float32."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# XLA's fast CPU kernel for bfloat16 products wants more than one row; padding costs nothing elsewhere.
_MIN_ROWS = 4
# Above so many, repacking weights costs less than turning the result.
_FEW_ROWS = 64


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
    else:
        # Weights on the left: on a CPU they are then read where they lie instead of being repacked for each
        # product. The barrier keeps XLA from turning the product around again.
        padded = jnp.pad(rows, ((0, max(0, _MIN_ROWS - len(rows))), (0, 0)))
        turned: Array = lax.optimization_barrier(  # type: ignore[no-untyped-call]
            dot(weight, padded, (((1,), (1,)), ((), ())))
        )
        product = turned.T[: len(rows)]
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
