"""PCB-Merging: entries compete within each expert and between experts, and the best of each are averaged.

References:
    Du et al., Parameter competition balancing for model merging, 2024, arXiv 2410.02396; its constants are those of
    the code that the authors published with it.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from m3jax.arithmetic import exact, functions
from m3jax.arithmetic.ranking import Search
from m3jax.errors import M3Error
from m3jax.methods.base import (
    SCOPES,
    Density,
    Known,
    Method,
    Numbers,
    Settings,
    Values,
    checked_share,
)
from m3jax.methods.linear import fold_weights, stack
from m3jax.methods.measures import always, on_host, rank_magnitudes, thresholds

MAX_EXPERTS = 64  # e⁶⁴ is a float32
_OUTLIERS = 0.0001  # the share of the smallest and of the largest magnitudes that are clamped


class Competition(NamedTuple):
    """What a leaf's numbers fold into.

    Attributes:
        weights: What each expert is multiplied with.
        divisors: What its score counts in the divisor.
    """

    weights: Float[Any, " n"]
    divisors: Float[Any, " n"]


# --- the range of magnitudes --------------------------------------------------------------------------------------


def _range_ranks(options: bool, numbers: Numbers, size: int) -> list[tuple[int, int]]:
    smallest = int(size * _OUTLIERS) + 1
    return [(smallest, max(int(size * (1.0 - _OUTLIERS) - 1.0), 0) + 1) for _ in numbers["density"]]


def _spans(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Smallest, largest and one over what lies between, 0 where nothing does, of each expert: float32[n, 3]."""
    width = high.astype(np.float64) - low.astype(np.float64)
    inverse = np.where(width > 0, 1.0 / np.where(width > 0, width, 1.0), 0.0)
    inverse = np.where(inverse < 2.0**120, inverse, 0.0)  # what is so narrow that no float32 divides by it has no width
    return np.stack([low, high, inverse.astype(np.float32)], axis=-1)


def _conclude_range(options: bool, state: Search, settings: Settings) -> Float[Any, "n 3"]:
    count = len(settings.comparison)

    def found(bits: np.ndarray) -> list[np.ndarray]:
        magnitudes = bits.reshape(count, 2).view(np.float32)
        return [_spans(magnitudes[:, 0], magnitudes[:, 1])]

    (spans,) = on_host(found, [(count, 3)], thresholds(state))
    return spans


# --- scores -------------------------------------------------------------------------------------------------------


def _of_experts(found: Array, like: Array) -> Array:
    """A number for each expert, as factors of arrays that are stacked."""
    return found.reshape(-1, *(1 for _ in like.shape[1:]))


def _competing(values: Values, known: Known) -> tuple[Array, Array]:
    """Clamped magnitudes and scores exp(n·norm(|δᵢ|)²)·tanh(δᵢ·Σδⱼ), those of the experts stacked.

    Of two neighbouring numbers scores are the smaller one, so that 31 bits order them, and the one that a rank finds is
    the one that an entry has: its share is exactly 0 or 1.

    One expert after another in a loop, because a program that has these functions once is compiled much faster than one
    that has them n times; and because a compiler computes them anew wherever they are used if they do not end a loop.
    """
    zero, together = known.zero, functools.reduce(exact.add, values)

    def of_expert(given: tuple[Array, Array]) -> tuple[Array, Array]:
        value, (low, high, inverse) = given
        size = jnp.clip(jnp.abs(value), low, high)
        share = exact.multiply(exact.subtract(size, low), inverse, zero)
        power = exact.multiply(exact.multiply(share, share, zero), jnp.float32(len(values)), zero)
        pull = exact.multiply(value, together, zero)
        return size, _evened(exact.multiply(functions.exp(power, zero), functions.tanh(pull, zero), zero))

    found: tuple[Array, Array] = lax.map(of_expert, (jnp.stack(values), jnp.asarray(known.found["range"])))
    return found


def _evened(score: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of each two neighbouring numbers the smaller one."""
    bits = exact.as_bits(jnp.where(score == 0, 0.0, score))
    smaller = jnp.where(bits >> np.uint32(31) == 1, bits | np.uint32(1), bits & np.uint32(0xFFFFFFFE))
    return lax.bitcast_convert_type(smaller, jnp.float32)


def _ordered(score: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Numbers below 2³¹ that are ordered as scores are."""
    bits = exact.as_bits(score)
    negative = bits >> np.uint32(31) == 1
    return jnp.where(negative, ~bits, bits | np.uint32(0x80000000)) >> np.uint32(1)


def _score_of(order: np.ndarray) -> np.ndarray:
    """The scores that have these numbers."""
    doubled = (order.astype(np.uint64) << np.uint64(1)).astype(np.uint32)
    negative = doubled < np.uint32(0x80000000)
    scores: np.ndarray = (
        np.where(negative, ~doubled, doubled & np.uint32(0x7FFFFFFF)).astype(np.uint32).view(np.float32)
    )
    return scores


def _orders(values: Values, known: Known) -> Values:
    """Orders of scores as the magnitudes that are ranked."""
    _, scores = _competing(values, known)
    return tuple(lax.bitcast_convert_type(_ordered(scores), jnp.float32))


def _score_ranks(options: bool, numbers: Numbers, size: int) -> list[tuple[int, int]]:
    return [(min(int(size * (1.0 - density)) + 1, size), size) for density in numbers["density"]]


def _conclude_scores(options: bool, state: Search, settings: Settings) -> Float[Any, "n 3"]:
    count = len(settings.comparison)

    def found(bits: np.ndarray) -> list[np.ndarray]:
        scores = _score_of(bits.reshape(count, 2))
        return [_spans(scores[:, 0], scores[:, 1])]

    (spans,) = on_host(found, [(count, 3)], thresholds(state))
    return spans


_RANGE = {
    scope: rank_magnitudes("range", scope, _range_ranks, always, uniform=())._replace(conclude=_conclude_range)
    for scope in SCOPES
}
_SCORES = {
    scope: rank_magnitudes("scores", scope, _score_ranks, always, prepare=_orders)._replace(
        label="ranking scores", conclude=_conclude_scores
    )
    for scope in SCOPES
}


# --- the merge ----------------------------------------------------------------------------------------------------


def _fold(options: bool, settings: Settings) -> Competition:
    experts = tuple(range(len(settings.weights)))
    divisors = list(settings.weights) if options else [1.0] * len(experts)
    return Competition(stack(fold_weights(settings, experts, normalize=False)), stack(divisors))


def _combine(options: bool, values: Values, known: Known) -> Float[Array, "..."]:
    zero, (size, scores) = known.zero, _competing(values, known)
    low, _, inverse = (_of_experts(known.found["scores"][:, i], size) for i in range(3))
    share = exact.multiply(jnp.maximum(exact.subtract(scores, low), 0.0), inverse, zero)
    every = jnp.stack(values)
    signed = jnp.where(every > 0, size, jnp.where(every < 0, -size, 0.0))
    weights, divisors = (_of_experts(factors, size) for factors in known.scalars)
    terms = list(exact.multiply(weights, exact.multiply(share, signed, zero), zero))
    shares = list(exact.multiply(divisors, share, zero))
    total = functools.reduce(exact.add, shares)
    quotient = functions.reciprocal(jnp.where(total == 0, 1.0, total), zero)
    return exact.multiply(functools.reduce(exact.add, terms), quotient, zero)


def pcb(density: Density = 0.1, normalize: bool = False, trim_scope: str = "tensor", scale: float = 1.0) -> Method:
    """base + λ·Σ sᵢwᵢδᵢ / Σ sᵢ, where sᵢ is how well an entry of expert i competes.

    Within an expert entries compete by size, between experts by whether they pull where all of them do: the score is
    exp(n·norm(|δᵢ|)²)·tanh(δᵢ·Σδⱼ), where norm goes from 0 to 1 over the magnitudes, of which one in 10,000 at either
    end is clamped. sᵢ goes from 0 at the score that ⌊(1 − d)·N⌋ entries lie below, and for all of these, to 1 at the
    largest.

    Args:
        density: d, the share of entries that count; one number or one per expert.
        normalize: Divide by Σ sᵢwᵢ, so that merged entries lie between those of the experts, whatever the weights.
        trim_scope: Rank each "tensor", or the whole "model" as in the paper.
        scale: λ.

    Raises:
        M3Error: An argument is out of range.

    References:
        Du et al., Parameter competition balancing for model merging, 2024, arXiv 2410.02396.
    """
    if trim_scope not in SCOPES:
        raise M3Error(f"pcb: trim_scope is {trim_scope!r}, but must be 'model' or 'tensor'")
    return Method(
        "pcb",
        _fold,
        _combine,
        measures=(_RANGE[trim_scope], _SCORES[trim_scope]),
        options=normalize,
        parameters=(("density", checked_share("pcb", "density", density)),),
        uses_base=True,
        scale=scale,
        experts=(1, MAX_EXPERTS),
        sparsifies=False,
    )
