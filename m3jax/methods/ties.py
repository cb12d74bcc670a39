"""TIES: trim small entries, elect a sign, merge those that agree.

References:
    Yadav et al., TIES-Merging: Resolving interference when merging models, 2023.
"""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from m3jax.arithmetic import exact
from m3jax.arithmetic.exact import Zero
from m3jax.errors import M3Error
from m3jax.methods import linear
from m3jax.methods.base import Fold, Method, Scalars, Values, plain_density

MAX_EXPERTS = 16
_SELECTED_UP_TO = 4  # beyond this a gather from the table beats a tree of selects


def _fold(method: Method, fold: Fold) -> Float[Any, "..."]:
    n = len(fold.weights)
    if not method.normalize:
        return linear.stack(linear.fold_weights(fold, tuple(range(n)), False))
    if n > MAX_EXPERTS:
        raise M3Error(f"ties: normalised over {n} experts, but at most {MAX_EXPERTS} can be: set normalize: false")
    subsets = [tuple(i for i in range(n) if mask >> i & 1) for mask in range(2**n)]
    rows = [linear.fold_weights(fold, subset, bool(subset)) for subset in subsets]
    return linear.stack(list(itertools.chain.from_iterable(rows))).reshape(2**n, n)


def _lookup(table: Float[Array, "subsets n"], agree: list[Bool[Array, "..."]]) -> list[Float[Array, "..."]]:
    """For each entry, the row of `table` for the experts that agree there, one array per column."""
    if len(agree) > _SELECTED_UP_TO:
        row = functools.reduce(lambda a, b: a | b, [a.astype(jnp.int32) << i for i, a in enumerate(agree)])
        return [jnp.take(table[:, i], row) for i in range(len(agree))]
    columns = []
    for expert in range(len(agree)):
        level = [table[mask, expert] for mask in range(table.shape[0])]
        for bit in agree:
            level = [jnp.where(bit, on, off) for off, on in zip(level[::2], level[1::2], strict=True)]
        columns.append(level[0])
    return columns


def trim(values: Values, scalars: Scalars, zero: Zero) -> Values:
    """Values whose comparable magnitude reaches the expert's threshold; zero elsewhere."""
    return tuple(
        jnp.where(exact.magnitude_bits(v) >= scalars.trim_below[i], value, 0.0)
        for i, (value, v) in enumerate(zip(values, comparable(values, scalars, zero), strict=True))
    )


def comparable(values: Values, scalars: Scalars, zero: Zero) -> Values:
    """Values whose magnitudes may be ranked over more than one tensor."""
    return _scaled(values, scalars.comparison, zero)


def _scaled(values: Values, factors: Float[Array, " n"] | None, zero: Zero) -> Values:
    if factors is None:
        return values
    return tuple(exact.multiply(factors[i], v, zero) for i, v in enumerate(values))


def _sign(x: Float[Array, "..."]) -> Int32[Array, "..."]:
    return (x > 0).astype(jnp.int32) - (x < 0).astype(jnp.int32)


def _votes(trimmed: Values, scalars: Scalars, zero: Zero) -> tuple[Values, Float[Array, "..."]]:
    votes = _scaled(trimmed, scalars.election, zero)
    return votes, functools.reduce(exact.add, votes)


def sign_counts(values: Values, scalars: Scalars, zero: Zero) -> tuple[Bool[Array, "..."], ...]:
    """Where the elected sum of the trimmed values is positive, and where negative."""
    _, total = _votes(trim(values, scalars, zero), scalars, zero)
    return total > 0, total < 0


def majority(counts: tuple[UInt32[Array, "2"], UInt32[Array, "2"]]) -> Int32[Array, ""]:
    """The sign that more entries elected: −1, 0 or 1.

    Args:
        counts: High and low words of how many elected + and how many −.
    """
    high, low = counts
    more = (high[0] > high[1]) | ((high[0] == high[1]) & (low[0] > low[1]))
    fewer = (high[0] < high[1]) | ((high[0] == high[1]) & (low[0] < low[1]))
    return more.astype(np.int32) - fewer.astype(np.int32)


def _combine(method: Method, values: Values, scalars: Scalars, zero: Zero) -> Float[Array, "..."]:
    trimmed = values if method.density is None else trim(values, scalars, zero)
    votes, total = _votes(trimmed, scalars, zero)
    elected = jnp.where(total == 0, scalars.tie_sign, _sign(total))
    agree = [(_sign(vote) == elected) & (vote != 0) for vote in votes]
    if method.normalize:
        coefficients = _lookup(scalars.coefficients, agree)
    else:
        coefficients = [scalars.coefficients[i] for i in range(len(values))]
    terms = [
        jnp.where(a, exact.multiply(c, v, zero), 0.0) for a, c, v in zip(agree, coefficients, trimmed, strict=True)
    ]
    return functools.reduce(exact.add, terms)


def ties(
    density: float | tuple[float, ...] | None = 0.5,
    scale: float = 1.0,
    normalize: bool = True,
    trim_scope: str = "tensor",
    sign_election: str = "weighted",
) -> Method:
    """TIES-Merging. The defaults are mergekit's; the paper's are trim_scope="model", sign_election="unweighted".

    Args:
        density: Share of each task vector's entries that trimming keeps, the largest; None trims nothing.
        scale: λ, applied after the weighted mean.
        normalize: Divide by the sum of the weights of the experts that agree.
        trim_scope: Rank magnitudes over the whole "model" or within each "tensor".
        sign_election: Elect the sign of the "weighted" or the "unweighted" sum. Where that sum is exactly 0,
            "unweighted" takes the sign of the majority of the model's entries, "weighted" takes +.

    Raises:
        M3Error: An argument is out of range.

    References:
        Yadav et al., TIES-Merging, 2023.
    """
    if trim_scope not in ("model", "tensor"):
        raise M3Error(f"ties: trim_scope is {trim_scope!r}, but must be 'model' or 'tensor'")
    if sign_election not in ("weighted", "unweighted"):
        raise M3Error(f"ties: sign_election is {sign_election!r}, but must be 'weighted' or 'unweighted'")
    return Method(
        "ties",
        _fold,
        _combine,
        uses_base=True,
        normalize=normalize,
        scale=scale,
        density=None if density is None else plain_density("ties", density),
        trim_scope=trim_scope,
        sign_election=sign_election,
    )
