"""DARE: drop entries at random and rescale the rest.

References:
    Yu et al., Language models are super Mario: Absorbing abilities from homologous models as a free lunch, 2024.
"""

import jax.numpy as jnp

from m3jax.arithmetic import threefry
from m3jax.errors import M3Error
from m3jax.methods.base import TARGETS, Index, Scalars, Sparsifier, Values, plain_density


def _apply(values: Values, scalars: Scalars, index: Index) -> Values:
    words = threefry.mask_words(scalars.mask_keys, index, len(values))
    return tuple(
        jnp.where((word < scalars.keep_below[i]) | scalars.keep_all[i], value, 0.0)
        for i, (word, value) in enumerate(zip(words, values, strict=True))
    )


def dare(density: float | tuple[float, ...], target: str = "delta", rescale: bool = True) -> Sparsifier:
    """Drop each entry with probability 1 − density, and divide the rest by the density.

    Args:
        density: Probability to keep an entry, in [0, 1]; one number or one per expert.
        target: Sparsify the "delta" (task vector) or the raw "weights".
        rescale: Divide what is kept by the density, so that the expectation stays.

    Raises:
        M3Error: The density or the target is out of range.

    Example:
        >>> dare(0.2).density
        0.2

    References:
        Yu et al., Language models are super Mario, 2024.
    """
    if target not in TARGETS:
        raise M3Error(f"dare: target is {target!r}, but must be 'delta' or 'weights'")
    return Sparsifier("dare", _apply, plain_density("dare", density), target, rescale)
