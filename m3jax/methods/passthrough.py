"""The tensor of one model as it is, or times a factor."""

import numpy as np
from jaxtyping import Array, Float

from m3jax.arithmetic import exact
from m3jax.methods.base import Known, Method, Settings, Values
from m3jax.methods.linear import stack


def _fold(options: None, settings: Settings) -> Float[np.ndarray, "1"]:
    scale: Float[np.ndarray, 1] = stack([settings.scale])
    return scale


def _combine(options: None, values: Values, known: Known) -> Float[Array, "..."]:
    return exact.multiply(known.scalars[0], values[0], known.zero)


def passthrough(scale: float = 1.0) -> Method:
    """The one expert, times `scale`; at scale 1 its tensors are copied bit for bit.

    Args:
        scale: The factor.

    Example:
        >>> passthrough().experts
        (1, 1)
    """
    return Method(
        "passthrough",
        _fold,
        _combine,
        scale=scale,
        weighting="none",
        experts=(1, 1),
        sparsifies=False,
        copies=True,
    )
