"""DARE: drop entries at random and rescale the rest.

References:
    Yu et al., Language models are super Mario: Absorbing abilities from homologous models as a free lunch, 2024.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt32

from m3jax.arithmetic import threefry
from m3jax.methods.base import Density, Known, Numbers, Sparsifier, Values, checked_target, plain_density


class Keep(NamedTuple):
    """Which words of a mask's stream keep an entry.

    Attributes:
        below: A word below this one does.
        everything: Every word does.
    """

    below: UInt32[Any, " n"]
    everything: Bool[Any, " n"]


def _fold(options: None, numbers: Numbers, shape: tuple[int, ...]) -> Keep:
    keep = [threefry.keep_threshold(density) for density in numbers["density"]]
    return Keep(np.array([k & 0xFFFFFFFF for k in keep], np.uint32), np.array([k == 2**32 for k in keep]))


def _apply(options: None, values: Values, known: Known) -> Values:
    assert known.mask_keys is not None  # a random sparsifier has them
    words = threefry.mask_words(known.mask_keys, known.entries, len(values))
    return tuple(
        jnp.where((word < known.scalars.below[i]) | known.scalars.everything[i], value, 0.0)
        for i, (word, value) in enumerate(zip(words, values, strict=True))
    )


def dare(density: Density, target: str = "delta", rescale: bool = True) -> Sparsifier:
    """Drop each entry with probability 1 − density, and divide the rest by the density.

    Args:
        density: Probability to keep an entry, in [0, 1]; one number or one per expert.
        target: Sparsify the "delta" (task vector) or the raw "weights".
        rescale: Divide what is kept by the density, so that the expectation stays.

    Raises:
        M3Error: The density or the target is out of range.

    Example:
        >>> dare(0.2).parameters
        (('density', 0.2),)

    References:
        Yu et al., Language models are super Mario, 2024.
    """
    return Sparsifier(
        "dare",
        _apply,
        _fold,
        parameters=(("density", plain_density("dare", density)),),
        target=checked_target("dare", target),
        rescale=rescale,
        random=True,
    )
