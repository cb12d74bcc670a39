"""NearSwap: the base moved towards one expert, by no more than t in any entry.

References:
    alchemonaut, QuartetAnemoi-70B-t0.0001, 2024, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from m3jax.methods.base import Density, Known, Method, Settings, Values, checked_number
from m3jax.methods.linear import stack


def _fold(options: None, settings: Settings) -> Float[Any, "1"]:
    return stack([settings.method["t"][0]])


def _combine(options: None, values: Values, known: Known) -> Float[Array, "..."]:
    # clamp(t/|δ|, 0, 1)·δ without the quotient: δ where it is no longer than t, else t with its sign.
    reach = known.scalars[0]
    return jnp.clip(values[0], -reach, reach)


def nearswap(t: Density) -> Method:
    """base + clamp(t/|δ|, 0, 1)·δ: entries that are near each other become the expert's, others move by t.

    Args:
        t: How far an entry moves at most; from 0.

    Raises:
        M3Error: t is below 0.
    """
    return Method(
        "nearswap",
        _fold,
        _combine,
        parameters=(("t", checked_number("nearswap", "t", t, low=0.0)),),
        uses_base=True,
        weighting="none",
        experts=(1, 1),
        sparsifies=False,
    )
