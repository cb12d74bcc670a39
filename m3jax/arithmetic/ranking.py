"""Finding the magnitude of a rank, exactly.

|x| of float32 as an integer orders like |x|, so the k-th smallest magnitude is found from histograms of integers: one
of coarse bins, then one of single values inside the bin that holds it. A sample can suggest where to look first, but
only counts of everything decide. Counts add up in any order, over chunks, devices and hosts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int64, UInt16, UInt32

from m3jax.arithmetic import exact

Values = Sequence[Float[Array, "..."]]
"""Float32 arrays, one for each rank that is searched."""

COARSE, FINE = 15, 0
"""Shifts of the two rounds that find any threshold: 2¹⁶ bins of 2¹⁵ values, then single values inside one bin."""

STEPS = 11
"""Steps of three bits that find any threshold by counting: ten for the upper 30 bits, one for the last."""

BINS = 2**16
_DIGITS = 8
_IN_BRACKET = BINS - 2  # the first bin counts what is below the bracket, the last what is above

Count = tuple[UInt32[Any, "..."], UInt32[Any, "..."]]
"""High and low word of counts that may pass 2³²."""


class Search(NamedTuple):
    """A search for the magnitudes of k ranks.

    Attributes:
        low: uint32[k], the smallest magnitude of the bracket that is searched next; at the end, the threshold.
        rank: The ranks as two uint32[k] words; 0 keeps all.
        size: How many magnitudes are ranked, as two uint32 words.
        step: uint32, of a search by counting: how many steps it has gone.
        found: Whether `low` is the threshold.
    """

    low: UInt32[Any, " k"]
    rank: Count
    size: Count
    step: Any
    found: Any


def _words(numbers: Sequence[int] | int) -> Count:
    wide = np.array(numbers, np.uint64)
    return (wide >> np.uint64(32)).astype(np.uint32), (wide & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def start(size: int, ranks: Sequence[int]) -> Search:
    """A search for the rank-th smallest of `size` magnitudes, for every one of some ranks; rank 0 finds 0."""
    return Search(np.zeros(len(ranks), np.uint32), _words(ranks), _words(size), np.uint32(0), np.bool_(False))


def bins(values: Values, low: UInt32[Array, " n"], shift: int) -> list[UInt16[Array, "..."]]:
    """The bin of every magnitude: 0 below the bracket, 1, 2, … inside it, 65535 above.

    Args:
        values: One float32 array for each rank.
        low: Where the bracket of each begins.
        shift: A bin holds 2^shift magnitudes.
    """
    found = []
    for expert, value in enumerate(values):
        bits = exact.magnitude_bits(value)
        inside = jnp.minimum((bits - low[expert]) >> np.uint32(shift), np.uint32(_IN_BRACKET)) + np.uint32(1)
        found.append(jnp.where(bits < low[expert], np.uint32(0), inside).astype(jnp.uint16))
    return found


def tally(binned: Sequence[UInt16[Array, "..."]], valid: Bool[Array, "..."] | None = None) -> UInt32[Array, "n 65536"]:
    """How many magnitudes fall into each bin, for arrays of fewer than 2³² entries.

    Args:
        binned: What `bins` gave.
        valid: Which entries count; all when None.
    """
    rows = []
    for row in binned:
        bucket = row.astype(jnp.int32)
        bucket = bucket if valid is None else jnp.where(valid, bucket, BINS)
        # Not ravelled: a scatter of a whole array is counted where its parts lie, whatever axis is sharded.
        rows.append(jnp.zeros(BINS, jnp.uint32).at[bucket].add(np.uint32(1), mode="drop"))
    return jnp.stack(rows)


def tally_sparse(binned: Sequence[np.ndarray]) -> np.ndarray:
    """`tally` on the host, fast where few magnitudes fall inside the bracket."""
    counts = np.zeros((len(binned), BINS), np.uint32)
    for row, bucket in zip(counts, binned, strict=True):
        inside = bucket[(bucket - np.uint16(1)) < _IN_BRACKET]
        row += np.bincount(inside, minlength=BINS).astype(np.uint32)
        row[0] = np.count_nonzero(bucket == 0)
        row[-1] = bucket.size - inside.size - row[0]
    return counts


def _bins_before(counts: Count, rank: Count) -> UInt32[Any, " n"]:
    """For each expert, how many bins end before the rank-th magnitude."""
    if isinstance(counts[0], np.ndarray):
        totals = (counts[0].astype(np.uint64) << np.uint64(32)) + counts[1]
        ranks = (np.asarray(rank[0]).astype(np.uint64) << np.uint64(32)) + rank[1]
        return (np.cumsum(totals, axis=-1) < ranks[:, None]).sum(-1, dtype=np.uint32)
    half, sixteen = np.uint32(0xFFFF), np.uint32(16)
    pieces = jnp.stack([counts[1] & half, counts[1] >> sixteen, counts[0]])  # sums of 2¹⁶ of them fit 32 bits
    place = jnp.arange(BINS, dtype=jnp.uint32)

    def halve(step: Array, found: Array) -> Array:
        middle = found + (np.uint32(BINS // 2) >> step.astype(jnp.uint32))
        low, carry, high = jnp.sum(
            jnp.where(place[None, None, :] < middle[None, :, None], pieces, 0), axis=-1, dtype=jnp.uint32
        )
        carry = carry + (low >> sixteen)
        high, low = high + (carry >> sixteen), (carry << sixteen) | (low & half)
        before = (high < rank[0]) | ((high == rank[0]) & (low < rank[1]))
        return jnp.where(before, middle, found)

    return jax.lax.fori_loop(0, 16, halve, jnp.zeros(counts[0].shape[0], jnp.uint32))


def advance(search: Search, counts: Count, shift: int) -> tuple[Search, Bool[Any, " n"]]:
    """The search narrowed to the bin that holds the rank-th magnitude; on the host if the counts are there.

    Args:
        search: The search before.
        counts: Tallies over everything searched, two words of uint32[n, 65536].
        shift: That of the bins.

    Returns:
        The search with `low` at the bin's first magnitude, and for which experts the rank lay inside the bracket.
    """
    xp: Any = np if isinstance(counts[0], np.ndarray) else jnp
    found = _bins_before(counts, search.rank)
    keeps_all = (search.rank[0] | search.rank[1]) == 0
    narrowed = search.low + ((found - np.uint32(1)) << np.uint32(shift))
    inside = keeps_all | ((found > 0) & (found <= _IN_BRACKET))
    return search._replace(low=xp.where(keeps_all, np.uint32(0), narrowed)), inside


def count_below(
    values: Values, low: UInt32[Array, " n"], shift: UInt32[Any, ""], valid: Bool[Array, "..."] | None = None
) -> UInt32[Array, "n 7"]:
    """How many magnitudes lie below low + j·2^shift for j = 1 … 7, for arrays of fewer than 2³² entries.

    Seven sums that fuse with whatever makes the values: on accelerators these cost one reading of the inputs, where
    a tally's scatter waits for its most frequent bin.

    Args:
        values: One float32 array for each rank.
        low: Where the bracket of each begins.
        shift: log₂ of the distance between bounds.
        valid: Which entries count; all when None.
    """
    rows = []
    for expert, value in enumerate(values):
        bits = exact.magnitude_bits(value)
        bounds = [low[expert] + (np.uint32(j) << shift) for j in range(1, _DIGITS)]
        rows.append(jnp.stack([jnp.sum(_among(bits < bound, valid), dtype=jnp.uint32) for bound in bounds]))
    return jnp.stack(rows)


def _among(counted: Bool[Array, "..."], valid: Bool[Array, "..."] | None) -> Bool[Array, "..."]:
    return counted if valid is None else counted & valid


def digit_shift(step: Any) -> Any:
    """The shift of a step of a search by `count_below`: 28, 25, …, 1, 0."""
    xp: Any = np if isinstance(step, np.generic | np.ndarray) else jnp
    return xp.maximum(28 - 3 * step.astype(np.int32), np.int32(0)).astype(np.uint32)


def advance_digit(search: Search, counts: Count) -> Search:
    """The search narrowed to the eighth of its bracket that holds the rank-th magnitude; `low` ends as the threshold.

    Args:
        search: The search before.
        counts: Sums of `count_below` over everything searched, two words of uint32[k, 7].
    """
    shift = digit_shift(search.step)
    high, low = (word[:, None] for word in search.rank)
    before = (counts[0] < high) | ((counts[0] == high) & (counts[1] < low))
    narrowed = search.low + (before.sum(-1).astype(np.uint32) << shift)
    step = search.step + np.uint32(1)
    return search._replace(low=narrowed, step=step, found=step == np.uint32(STEPS))


def suggest(search: Search, samples: Sequence[np.ndarray]) -> UInt32[np.ndarray, " k"]:
    """The thresholds that samples suggest; a guess costs time if wrong, never bits.

    Args:
        search: The search.
        samples: Magnitudes (uint32) of some entries, for each rank.
    """
    found = np.zeros(len(samples), np.uint32)
    size = (int(search.size[0]) << 32) + int(search.size[1])
    for number, (high, low, sample) in enumerate(zip(*search.rank, samples, strict=True)):
        if sample.size:
            place = min(((int(high) << 32) + int(low)) * sample.size // max(size, 1), sample.size - 1)
            found[number] = np.partition(sample, place)[place]
    return found


def bracket(search: Search, suggested: UInt32[np.ndarray, " k"]) -> Search:
    """The search with brackets around suggested thresholds."""
    half = np.uint32(_IN_BRACKET // 2)
    return search._replace(low=np.maximum(suggested, half) - half)


def count_between(
    counts: Int64[np.ndarray, "k 65536"], search: Search, found: Search, suggested: UInt32[np.ndarray, " k"]
) -> Int64[np.ndarray, " k"]:
    """How many magnitudes lie between the thresholds that were suggested and those that were found.

    Args:
        counts: Tallies of single magnitudes.
        search: As it was bracketed.
        found: As it ended, inside the brackets.
        suggested: What the brackets were made of.
    """
    keeps_all = (search.rank[0] | search.rank[1]) == 0
    below = np.cumsum(counts, axis=-1)
    ends = [np.where(keeps_all, search.low, each) - search.low for each in (found.low, suggested)]
    found_below, suggested_below = (np.take_along_axis(below, end[:, None].astype(np.int64), 1)[:, 0] for end in ends)
    between: np.ndarray = np.abs(found_below - suggested_below)
    return between


def add_counts(total: Count, counts: UInt32[Any, "..."]) -> Count:
    """`total` with uint32 counts added, with carry."""
    low = total[1] + counts
    return total[0] + (low < counts).astype(np.uint32), low
