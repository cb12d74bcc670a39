"""Fisher merging: every entry is the mean of the experts', weighed by how much each expert's data says of it.

References:
    Matena & Raffel, Merging models with Fisher-weighted averaging, 2021, arXiv 2111.09832.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from m3jax.arithmetic import exact
from m3jax.errors import M3Error
from m3jax.methods.base import Density, Known, Method, Settings, Values, checked_number
from m3jax.methods.linear import check_normalizer, fold_weights, stack, weighted_sum

KIND = "fisher"
"""What its statistics are called where they are recorded."""


class Shares(NamedTuple):
    """What the numbers of a leaf fold into.

    Attributes:
        weights: float32[n], wᵢ / Σ wᵢ.
        floor: float32[1], what a Fisher information counts at least.
    """

    weights: Float[Any, " n"]
    floor: Float[Any, "1"]


def _fold(options: None, settings: Settings) -> Shares:
    weights = settings.weights
    check_normalizer(weights, None)
    lowest = min((weight for weight in weights if isinstance(weight, float)), default=0.0)
    if lowest < 0.0:
        raise M3Error(f"fisher: a weight is {lowest:g}, but shares are not negative: give weights from 0 on")
    shares = stack(fold_weights(settings, tuple(range(len(weights))), normalize=True))
    return Shares(shares, stack([settings.method["epsilon"][0]]))


def _combine(options: None, values: Values, known: Known) -> Float[Array, "..."]:
    shares, zero = known.scalars, known.zero
    floor = shares.floor[0]
    informed = [jnp.where(each < floor, floor, each) for each in known.statistics]
    parts = [exact.multiply(shares.weights[i], each, zero) for i, each in enumerate(informed)]
    total = functools.reduce(exact.add, parts)
    nothing = total == 0
    divisor = jnp.where(nothing, 1.0, total)  # whose quotients have derivatives, also where they are not used
    coefficients = [jnp.where(nothing, shares.weights[i], exact.divide(each, divisor)) for i, each in enumerate(parts)]
    return weighted_sum(coefficients, values, zero)


def fisher(epsilon: Density = 0.0) -> Method:
    """Σ wᵢ·Fᵢ·xᵢ / Σ wᵢ·Fᵢ of each entry, Fᵢ the diagonal of the expert's Fisher information.

    Where no expert's data says anything of an entry (Σ wᵢ·Fᵢ = 0) it is the weighted mean. Weights are not negative.

    Args:
        epsilon: What each Fᵢ counts at least; from 0.

    Raises:
        M3Error: epsilon is below 0.

    References:
        Matena & Raffel, Merging models with Fisher-weighted averaging, 2021, arXiv 2111.09832.
    """
    return Method(
        "fisher",
        _fold,
        _combine,
        parameters=(("epsilon", checked_number("fisher", "epsilon", epsilon, low=0.0)),),
        sparsifies=False,
        statistics=KIND,
    )
