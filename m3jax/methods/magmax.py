"""MagMax: of every entry the task vector of the expert that has changed it most.

References:
    Marczak et al., MagMax: Leveraging model merging for seamless continual learning, 2024, arXiv 2407.06322.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from m3jax.arithmetic import exact
from m3jax.methods.base import Known, Method, Settings, Values
from m3jax.methods.linear import stack


def _fold(options: None, settings: Settings) -> Float[Any, "factors"]:
    """λ·(a − b)/(a + b), where a experts tie for the largest magnitude with a plus and b with a minus, at a·(n+1) + b.

    Where all of them have one sign, this is ±λ.
    """
    counts = range(len(settings.comparison) + 1)
    return stack([settings.scale * ((a - b) / max(a + b, 1)) for a in counts for b in counts])


def _combine(options: None, values: Values, known: Known) -> Float[Array, "..."]:
    largest = functools.reduce(jnp.maximum, [jnp.abs(value) for value in values])
    ahead = functools.reduce(jnp.add, [(value == largest).astype(jnp.int32) for value in values])
    behind = functools.reduce(jnp.add, [(value == -largest).astype(jnp.int32) for value in values])
    factor = jnp.take(known.scalars, ahead * (len(values) + 1) + behind)
    return exact.multiply(factor, largest, known.zero)


def magmax(scale: float = 1.0) -> Method:
    """base + λ·(of every entry, the task vector of largest magnitude); takes no weights.

    Experts that tie for the largest magnitude count alike: of opposite signs, their mean is taken.

    Args:
        scale: λ.

    Example:
        >>> magmax().weighting
        'none'

    References:
        Marczak et al., MagMax, 2024, arXiv 2407.06322.
    """
    return Method(
        "magmax",
        _fold,
        _combine,
        uses_base=True,
        scale=scale,
        weighting="none",
        sparsifies=False,
    )
