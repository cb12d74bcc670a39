"""RAM: entries that one expert alone has changed are taken whole, those that several have changed are averaged.

References:
    Yuan et al., Behavior knowledge merge in reinforced agentic models, 2026, arXiv 2601.13572.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from m3jax.arithmetic import exact
from m3jax.methods.base import (
    Density,
    Extent,
    Known,
    Measure,
    Method,
    Numbers,
    Round,
    Settings,
    Values,
    Words,
    checked_number,
)
from m3jax.methods.linear import stack
from m3jax.methods.measures import always, on_host


def _fold(options: None, settings: Settings) -> Float[Any, "counts"]:
    """ε, then λ over how many experts have changed an entry; with none there is nothing to divide."""
    counts = range(1, len(settings.comparison) + 1)
    return stack([settings.method["epsilon"][0], 0.0, *(settings.scale / count for count in counts)])


def _changed(values: Values, known: Known) -> tuple[list[Bool[Array, "..."]], Int32[Array, "..."]]:
    """Where each expert has changed an entry by more than ε, and how many have."""
    changed = [jnp.abs(value) > known.scalars[0] for value in values]
    return changed, functools.reduce(jnp.add, [each.astype(jnp.int32) for each in changed])


def _combine(options: None, values: Values, known: Known) -> Float[Array, "..."]:
    changed, count = _changed(values, known)
    factors = known.found.get("factors")
    if factors is not None:  # of what is an expert's alone
        alone = [exact.multiply(factors[i], value, known.zero) for i, value in enumerate(values)]
        values = tuple(jnp.where(count == 1, own, value) for own, value in zip(alone, values, strict=True))
    kept = [jnp.where(each, value, 0.0) for each, value in zip(changed, values, strict=True)]
    mean = jnp.take(known.scalars[1:], count)
    return exact.multiply(mean, functools.reduce(exact.add, kept), known.zero)


# --- RAM+ ---------------------------------------------------------------------------------------------------------


def _count_changed(
    options: None, values: Values, known: Known, state: Words, valid: Bool[Array, "..."] | None
) -> UInt32[Array, "2 n"]:
    """How many entries each expert has changed together with others, and how many alone."""
    changed, count = _changed(values, known)
    if valid is not None:
        changed = [each & valid for each in changed]
    return jnp.stack(
        [jnp.stack([jnp.sum(each & own, dtype=jnp.uint32) for each in changed]) for own in (count > 1, count == 1)]
    )


def _begin(options: None, numbers: Numbers, extent: Extent) -> Words:
    zeros = np.zeros((2, extent.experts), np.uint32)
    return zeros, zeros


def _factors(options: None, state: Words, settings: Settings) -> Float[Any, " n"]:
    """1 + r·clamp(shared/unique, 0, α) of each expert."""
    strength, most = settings.method["r"][0], settings.method["alpha"][0]

    def found(high: np.ndarray, low: np.ndarray) -> list[np.ndarray]:
        shared, alone = high * 2.0**32 + low
        return [(1.0 + strength * np.minimum(shared / np.maximum(alone, 1.0), most)).astype(np.float32)]

    (factors,) = on_host(found, [(len(settings.comparison),)], *state)
    return factors


_FACTORS = Measure(
    name="factors",
    label="counting changes",
    scope="tensor",
    needed=always,
    begin=_begin,
    rounds=lambda place: (Round("changed", _count_changed),),
    advance=lambda options, name, state, totals: totals,
    conclude=_factors,
)


def ram(epsilon: Density = 1e-5, scale: float = 1.0) -> Method:
    """base + the mean of the task vectors of those experts that have changed an entry; takes no weights.

    Args:
        epsilon: ε: an expert has changed an entry where its task vector is larger than this.
        scale: λ, a factor of the task vector.

    Raises:
        M3Error: ε is below 0.

    References:
        Yuan et al., Behavior knowledge merge in reinforced agentic models, 2026, arXiv 2601.13572.
    """
    return Method(
        "ram",
        _fold,
        _combine,
        parameters=(("epsilon", checked_number("ram", "epsilon", epsilon, low=0.0)),),
        uses_base=True,
        scale=scale,
        weighting="none",
        sparsifies=False,
    )


def ramplus_tl(r: Density = 0.1, alpha: Density = 0.2, epsilon: Density = 1e-5, scale: float = 1.0) -> Method:
    """`ram` whose entries of one expert alone are enlarged, the more the more of its entries others have changed too.

    The factor of expert i is 1 + r·clamp(shared/unique, 0, α), where shared and unique count the entries of a tensor
    that it has changed with others and alone.

    Args:
        r: How much they are enlarged.
        alpha: α, the most that shared/unique counts.
        epsilon: As for `ram`.
        scale: λ, a factor of the task vector.

    Raises:
        M3Error: α or ε is below 0.

    References:
        Yuan et al., Behavior knowledge merge in reinforced agentic models, 2026, arXiv 2601.13572.
    """
    return Method(
        "ramplus_tl",
        _fold,
        _combine,
        measures=(_FACTORS,),
        parameters=(
            ("r", checked_number("ramplus_tl", "r", r)),
            ("alpha", checked_number("ramplus_tl", "alpha", alpha, low=0.0)),
            ("epsilon", checked_number("ramplus_tl", "epsilon", epsilon, low=0.0)),
        ),
        uses_base=True,
        scale=scale,
        weighting="none",
        sparsifies=False,
    )
