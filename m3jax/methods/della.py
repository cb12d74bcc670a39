"""DELLA: drop entries at random, the smaller ones of a row more likely than the larger ones.

References:
    Deep et al., DELLA-Merging: Reducing interference in model merging through magnitude-based sampling, 2024,
    arXiv 2406.11617.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from m3jax.arithmetic import exact, threefry
from m3jax.errors import M3Error
from m3jax.methods.base import (
    Density,
    Known,
    Numbers,
    Sparsifier,
    Values,
    checked_share,
    checked_target,
    plain_density,
)


class Chances(NamedTuple):
    """What becomes of an entry by its rank in its row, counted in halves: 2·(row − 1) is the largest entry's.

    Attributes:
        below: A word below this one keeps it.
        factor: What it is multiplied with then.
        everything: The expert keeps all its entries.
    """

    below: UInt32[Any, "n ranks"]
    factor: Float[Any, "n ranks"]
    everything: Bool[Any, " n"]


def _bounds(density: float, epsilon: float) -> tuple[float, float]:
    """The probabilities to keep the smallest and the largest entry of a row."""
    return density - epsilon, density + epsilon


def _check(options: bool, numbers: Numbers) -> None:
    for density, epsilon in zip(numbers["density"], numbers["epsilon"], strict=True):
        low, high = _bounds(density, epsilon)
        if 0.0 < density < 1.0 and not (low > 0.0 and high < 1.0):
            raise M3Error(
                f"della: density {density:g} with epsilon {epsilon:g} keeps entries with probabilities from {low:g} to "
                f"{high:g}, which must lie between 0 and 1: take an epsilon below {min(density, 1.0 - density):g}"
            )


def _fold(rescale: bool, numbers: Numbers, shape: tuple[int, ...]) -> Chances:
    """The table of a row, in float64, each factor rounded once."""
    last = 2 * (max(shape[-1], 1) - 1) if shape else 0
    below, factor, everything = [], [], []
    for density, epsilon in zip(numbers["density"], numbers["epsilon"], strict=True):
        low, high = _bounds(density, epsilon)
        chances = low + (high - low) * np.arange(last + 1) / last if last else np.array([density])
        inside = 0.0 < density < 1.0
        chances = chances if inside else np.full(last + 1, float(density >= 1.0))
        below.append(np.floor(chances * 2.0**32).clip(max=2**32 - 1).astype(np.uint32))
        factor.append((1.0 / chances if inside and rescale else np.ones(last + 1)).astype(np.float32))
        everything.append(density >= 1.0)
    return Chances(np.stack(below), np.stack(factor), np.array(everything))


def _last_of_ties(ordered: UInt32[Array, "*rows row"]) -> Int32[Array, "*rows row"]:
    """For every entry of ordered rows, the place of the last one that equals it."""
    axis = ordered.ndim - 1
    place = lax.broadcasted_iota(jnp.int32, ordered.shape, axis)
    changes = ordered[..., 1:] != ordered[..., :-1]
    edge = jnp.ones((*ordered.shape[:-1], 1), bool)
    last = jnp.where(jnp.concatenate([changes, edge], -1), place, np.int32(ordered.shape[-1]))
    return lax.cummin(last, axis, reverse=True)


def ranks_by_sorting(magnitudes: UInt32[Array, "*rows row"]) -> Int32[Array, "*rows row"]:
    """`_ranks` by two sorts with a payload, which accelerators are good at."""
    axis = magnitudes.ndim - 1
    place = lax.broadcasted_iota(jnp.int32, magnitudes.shape, axis)
    ordered, came_from = lax.sort((magnitudes, place), dimension=axis, num_keys=1)
    edge = jnp.ones((*magnitudes.shape[:-1], 1), bool)
    first = jnp.where(jnp.concatenate([edge, ordered[..., 1:] != ordered[..., :-1]], -1), place, 0)
    sums = lax.cummax(first, axis) + _last_of_ties(ordered)
    _, ranks = lax.sort((came_from, sums), dimension=axis, num_keys=1)
    return ranks


def ranks_by_searching(magnitudes: UInt32[Array, "*rows row"]) -> Int32[Array, "*rows row"]:
    """`_ranks` by a sort of bare magnitudes and a binary search for each: on CPUs an eighth of two sorts' time."""
    row = magnitudes.shape[-1]
    steps = (row - 1).bit_length()
    ordered = lax.sort(magnitudes, dimension=magnitudes.ndim - 1)

    def at(entries: Array, places: Array) -> Array:
        return entries.at[places].get(mode="promise_in_bounds")

    for _ in magnitudes.shape[:-1]:
        at = jax.vmap(at)

    def halve(step: Array, below: Array) -> Array:
        stride = np.int32(1 << steps) >> (step + 1)
        asked = below + stride - 1
        smaller = (at(ordered, jnp.minimum(asked, np.int32(row - 1))) < magnitudes) & (asked < row)
        return below + jnp.where(smaller, stride, 0)

    first: Array = lax.fori_loop(0, steps, halve, jnp.zeros(magnitudes.shape, jnp.int32))
    return first + at(_last_of_ties(ordered), first)


def _ranks(magnitudes: UInt32[Array, "*rows row"]) -> Int32[Array, "*rows row"]:
    """Twice the rank of every entry in its row, from 0; equal magnitudes share the mean of their ranks."""
    if magnitudes.size == 0:
        return jnp.zeros(magnitudes.shape, jnp.int32)
    ranks: Array = lax.platform_dependent(magnitudes, cpu=ranks_by_searching, default=ranks_by_sorting)
    return ranks


def _apply(rescale: bool, values: Values, known: Known) -> Values:
    assert known.mask_keys is not None  # a random sparsifier has them
    words = threefry.mask_words(known.mask_keys, known.entries, len(values))
    chances, kept = known.scalars, []
    for i, (word, value) in enumerate(zip(words, values, strict=True)):
        ranks = _ranks(exact.magnitude_bits(value))
        keeps = (word < jnp.take(chances.below[i], ranks)) | chances.everything[i]
        scaled = exact.multiply(jnp.take(chances.factor[i], ranks), value, known.zero) if rescale else value
        kept.append(jnp.where(keeps, scaled, 0.0))
    return tuple(kept)


def della(density: Density, epsilon: Density = 0.15, target: str = "delta", rescale: bool = True) -> Sparsifier:
    """Keep each entry with a probability that grows with its rank in its row, and divide what is kept by it.

    In each row (the last axis; a vector is one row) the probability goes linearly from d − ε for the smallest
    magnitude to d + ε for the largest. d ≥ 1 keeps all, d ≤ 0 nothing.

    Args:
        density: d, the mean probability, in [0, 1]; one number or one per expert.
        epsilon: ε; one number or one per expert.
        target: Sparsify the "delta" (task vector) or the raw "weights".
        rescale: Divide what is kept by its probability, so that the expectation stays.

    Raises:
        M3Error: An argument is out of range, or d − ε and d + ε are not both between 0 and 1.

    Example:
        >>> della(0.7).rows
        True

    References:
        Deep et al., DELLA-Merging, 2024, arXiv 2406.11617.
    """
    return Sparsifier(
        "della",
        _apply,
        _fold,
        options=rescale,
        parameters=(
            ("density", plain_density("della", density)),
            ("epsilon", checked_share("della", "epsilon", epsilon)),
        ),
        target=checked_target("della", target),
        random=True,
        rows=True,
        check=_check,
    )
