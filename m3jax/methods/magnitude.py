"""Dropping the smallest entries, and finding the threshold below which they lie, exactly.

|x| of float32 as an integer orders like |x|, so the k-th smallest magnitude is found digit by digit from histograms
of integers. Counts add up in any order, over chunks, devices and hosts; nothing is sampled or sorted.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from m3jax import exact
from m3jax.errors import M3Error
from m3jax.methods.types import SCOPES, TARGETS, Index, Scalars, Sparsifier, Values, check_density

DIGITS = ((16, 15), (0, 16))
"""(shift, width) of the digits of a magnitude, most significant first."""

Count = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]
"""High and low word of counts that may pass 2³²."""


class Search(NamedTuple):
    """A search for the rank-th smallest magnitude of each expert.

    Attributes:
        prefix: uint32[n], the digits found so far.
        rank: What is still to be counted inside the prefix, as two uint32[n] words; 0 keeps all.
    """

    prefix: UInt32[Array, " n"]
    rank: Count


def start(sizes: int, densities: tuple[float, ...]) -> Search:
    """A search for the threshold that keeps `density` of `sizes` entries, per expert: rank ⌊N·(1 − density)⌋."""
    ranks = [int(sizes * (1.0 - density)) for density in densities]
    high = np.array([rank >> 32 for rank in ranks], np.uint32)
    low = np.array([rank & 0xFFFFFFFF for rank in ranks], np.uint32)
    return Search(np.zeros(len(ranks), np.uint32), (high, low))  # type: ignore[arg-type]


def histogram(
    values: Values, prefix: UInt32[Array, " n"], digit: int, valid: Bool[Array, "..."] | None = None
) -> UInt32[Array, "n bins"]:
    """How many magnitudes with the found prefix have each value of the next digit.

    Args:
        values: One float32 array per expert, each of fewer than 2³² entries.
        prefix: As in `Search`.
        digit: Index into `DIGITS`.
        valid: Which entries count; all when None.
    """
    shift, width = DIGITS[digit]
    bins = 2**width
    rows = []
    for expert, value in enumerate(values):
        bits = exact.magnitude_bits(value)
        counted = (bits >> np.uint32(shift + width)) == (prefix[expert] >> np.uint32(shift + width))
        if valid is not None:
            counted &= valid
        bucket = (bits >> np.uint32(shift)) & np.uint32(bins - 1)
        bucket = jnp.where(counted, bucket, np.uint32(bins)).ravel().astype(jnp.int32)
        rows.append(jnp.zeros(bins, jnp.uint32).at[bucket].add(np.uint32(1), mode="drop"))
    return jnp.stack(rows)


def _cumulative(xp: Any, counts: Count) -> Count:
    """Running totals over the last axis (at most 2¹⁶ bins) of counts below 2⁴⁸."""
    half, sixteen = np.uint32(0xFFFF), np.uint32(16)
    high, low = counts
    pieces = (low & half, low >> sixteen, high)
    sums = [xp.cumsum(piece, axis=-1, dtype=np.uint32) for piece in pieces]
    middle = sums[1] + (sums[0] >> sixteen)  # at most 65536·65535 + 65535 = 2³² − 1
    return sums[2] + (middle >> sixteen), (middle << sixteen) | (sums[0] & half)


def advance(search: Search, counts: Count, digit: int) -> Search:
    """The search with one more digit found; on the host if the counts are there.

    Args:
        search: The search before.
        counts: Histogram totals over everything searched, two words of uint32[n, bins].
        digit: Which digit was counted.
    """
    xp: Any = np if isinstance(counts[0], np.ndarray) else jnp
    high, low = _cumulative(xp, counts)
    rank_high, rank_low = search.rank[0][:, None], search.rank[1][:, None]
    before = (high < rank_high) | ((high == rank_high) & (low < rank_low))
    found = xp.sum(before, axis=-1, dtype=np.uint32)
    last = (xp.maximum(found, np.uint32(1)) - np.uint32(1))[:, None].astype(np.int32)
    below = [xp.where(found > 0, xp.take_along_axis(word, last, axis=-1)[:, 0], np.uint32(0)) for word in (high, low)]
    keeps_all = (search.rank[0] | search.rank[1]) == 0
    left_low = search.rank[1] - below[1]
    left_high = search.rank[0] - below[0] - (search.rank[1] < below[1]).astype(np.uint32)
    prefix = xp.where(keeps_all, np.uint32(0), search.prefix | (found << np.uint32(DIGITS[digit][0])))
    return Search(prefix, (left_high, left_low))


def add_counts(total: Count, counts: UInt32[Array, "..."]) -> Count:
    """`total` with uint32 counts added, with carry."""
    low = total[1] + counts
    return total[0] + (low < counts).astype(np.uint32), low


def _apply(values: Values, scalars: Scalars, index: Index) -> Values:
    return tuple(
        jnp.where(exact.magnitude_bits(value) >= scalars.drop_below[i], value, 0.0) for i, value in enumerate(values)
    )


def magnitude(
    density: float | tuple[float, ...], target: str = "delta", rescale: bool = False, scope: str = "tensor"
) -> Sparsifier:
    """Keep the entries of largest magnitude: those not below the ⌊N·(1 − density)⌋-th smallest.

    Args:
        density: Share of entries to keep, in [0, 1]; one number or one per expert.
        target: Sparsify the "delta" (task vector) or the raw "weights".
        rescale: Divide what is kept by the density.
        scope: N counts one "tensor" or the whole "model".

    Raises:
        M3Error: An argument is out of range.

    Example:
        >>> magnitude(0.5, scope="model").scope
        'model'
    """
    check_density("magnitude", density)
    if target not in TARGETS:
        raise M3Error(f"magnitude: target is {target!r}, but must be 'delta' or 'weights'")
    if scope not in SCOPES:
        raise M3Error(f"magnitude: scope is {scope!r}, but must be 'tensor' or 'model'")
    return Sparsifier("magnitude", _apply, density, target, rescale, scope)
