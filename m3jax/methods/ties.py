"""TIES: trim small entries, elect a sign, merge those that agree.

References:
    Yadav et al., TIES-Merging: Resolving interference when merging models, 2023.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from m3jax.arithmetic import exact, ranking
from m3jax.arithmetic.ranking import Search
from m3jax.errors import M3Error
from m3jax.methods import linear
from m3jax.methods.base import (
    SCOPES,
    Density,
    Extent,
    Known,
    Measure,
    Method,
    Numbers,
    Place,
    Round,
    Scalar,
    Settings,
    Values,
    Words,
    plain_density,
)
from m3jax.methods.magnitude import dropped_below, drops_some
from m3jax.methods.measures import always, rank_magnitudes, thresholds, within

MAX_EXPERTS = 16
_SELECTED_UP_TO = 4  # beyond this a gather from the table beats a tree of selects


class Election(NamedTuple):
    """Options of an election.

    Attributes:
        normalize: Divide by the sum of the weights of those that agree.
        weighted: Elect by the weighted sum.
    """

    normalize: bool
    weighted: bool


class Coefficients(NamedTuple):
    """What a leaf's numbers fold into.

    Attributes:
        table: What each expert is multiplied with: [n], or [2ⁿ, n] indexed by which experts agree.
        votes: Factor of each expert in the election; None for ones.
        comparison: Factor that makes an expert's magnitudes comparable between tensors; None for ones.
    """

    table: Float[Any, "..."]
    votes: Float[Any, " n"] | None
    comparison: Float[Any, " n"] | None


def _unless_ones(factors: list[Scalar]) -> Float[Any, " n"] | None:
    """Factors as float32, or None where multiplying by them would change nothing."""
    if all(isinstance(f, float) and f == 1.0 for f in factors):
        return None
    return linear.stack(factors)


def _fold_table(options: Election, settings: Settings) -> Float[Any, "..."]:
    n = len(settings.weights)
    if not options.normalize:
        return linear.stack(linear.fold_weights(settings, tuple(range(n)), False))
    if n > MAX_EXPERTS:
        raise M3Error(f"ties: normalised over {n} experts, but at most {MAX_EXPERTS} can be: set normalize: false")
    subsets = [tuple(i for i in range(n) if mask >> i & 1) for mask in range(2**n)]
    rows = [linear.fold_weights(settings, subset, bool(subset)) for subset in subsets]
    return linear.stack(list(itertools.chain.from_iterable(rows))).reshape(2**n, n)


def fold_election(options: Election, settings: Settings) -> Coefficients:
    """The coefficients of a leaf whose experts elect a sign.

    Raises:
        M3Error: There are too many experts for a table, or a coefficient is beyond float32.
    """
    inverse = [1.0 / d if d else 0.0 for d in settings.divisors]
    largest = max(inverse) or 1.0
    votes = settings.weights if options.weighted else (1.0,) * len(inverse)
    return Coefficients(
        _fold_table(options, settings),
        _unless_ones([v * (i / largest) for v, i in zip(votes, inverse, strict=True)]),
        _unless_ones(list(settings.comparison)),
    )


def looked_up(table: Float[Array, "subsets n"], agree: list[Bool[Array, "..."]]) -> list[Float[Array, "..."]]:
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


def _scaled(values: Values, factors: Float[Array, " n"] | None, zero: exact.Zero) -> Values:
    if factors is None:
        return values
    return tuple(exact.multiply(factors[i], v, zero) for i, v in enumerate(values))


def _comparable(values: Values, known: Known) -> Values:
    """Values whose magnitudes may be ranked over more than one tensor."""
    return _scaled(values, known.scalars.comparison, known.zero)


class Elected(NamedTuple):
    """What is known of a model whose entries were ranked and have elected signs.

    Attributes:
        trim: uint32[n, 1], the bits of the smallest magnitude of each expert that is kept.
        majority: The sign that more entries elected: −1, 0 or 1.
    """

    trim: UInt32[Any, "n 1"]
    majority: Int32[Any, ""]


def _found(known: Known) -> tuple[UInt32[Any, "n 1"] | None, Int32[Any, ""]]:
    """Thresholds, if there are any, and the sign that counts where experts cancel each other."""
    elected = known.found.get("elected")
    if elected is not None:
        return elected.trim, elected.majority
    return known.found.get("trim"), known.found.get("majority", np.int32(1))


def _trim(values: Values, known: Known, threshold: UInt32[Any, "n 1"] | None) -> Values:
    """Values whose comparable magnitude reaches the expert's threshold; zero elsewhere."""
    if threshold is None:
        return values
    return tuple(
        jnp.where(exact.magnitude_bits(v) >= threshold[i, 0], value, 0.0)
        for i, (value, v) in enumerate(zip(values, _comparable(values, known), strict=True))
    )


def _sign(x: Float[Array, "..."]) -> Int32[Array, "..."]:
    return (x > 0).astype(jnp.int32) - (x < 0).astype(jnp.int32)


def _votes(trimmed: Values, known: Known) -> tuple[Values, Float[Array, "..."]]:
    votes = _scaled(trimmed, known.scalars.votes, known.zero)
    return votes, functools.reduce(exact.add, votes)


def combine_election(options: Election, values: Values, known: Known) -> Float[Array, "..."]:
    """The weighted sum of the trimmed values that have the elected sign."""
    threshold, majority = _found(known)
    trimmed = _trim(values, known, threshold)
    votes, total = _votes(trimmed, known)
    elected = jnp.where(total == 0, majority, _sign(total))
    agree = [(_sign(vote) == elected) & (vote != 0) for vote in votes]
    table = known.scalars.table
    coefficients = looked_up(table, agree) if options.normalize else [table[i] for i in range(len(values))]
    terms = [
        jnp.where(a, exact.multiply(c, v, known.zero), 0.0)
        for a, c, v in zip(agree, coefficients, trimmed, strict=True)
    ]
    return functools.reduce(exact.add, terms)


# --- the majority's sign ------------------------------------------------------------------------------------------


def _counted(
    values: Values, known: Known, threshold: UInt32[Any, "n 1"] | None, valid: Bool[Array, "..."] | None
) -> UInt32[Array, "2"]:
    """How many entries elect + and how many −."""
    _, total = _votes(_trim(values, known, threshold), known)
    signs = (total > 0, total < 0)
    return jnp.stack([jnp.sum(s if valid is None else s & valid, dtype=jnp.uint32) for s in signs])


def _count_signs(
    options: Election, values: Values, known: Known, state: Words, valid: Bool[Array, "..."] | None
) -> UInt32[Array, "2"]:
    return _counted(values, known, known.found.get("trim"), valid)


def _majority(options: Election, state: Words, settings: Settings) -> Int32[Any, ""]:
    """The sign that more entries elected: −1, 0 or 1."""
    high, low = state
    more = (high[0] > high[1]) | ((high[0] == high[1]) & (low[0] > low[1]))
    fewer = (high[0] < high[1]) | ((high[0] == high[1]) & (low[0] < low[1]))
    sign: Int32[Any, ""] = more.astype(np.int32) - fewer.astype(np.int32)
    return sign


def _begin_majority(options: Election, numbers: Numbers, extent: Extent) -> Words:
    return np.zeros(2, np.uint32), np.zeros(2, np.uint32)


def _majority_rounds(place: Place) -> tuple[Round, ...]:
    return (Round("signs", _count_signs),)


def _keep_totals(options: Election, name: str, state: Words, totals: Words) -> Words:
    return totals


_MAJORITY = Measure(
    "majority", "counting signs", "model", always, _begin_majority, _majority_rounds, _keep_totals, _majority
)
_TRIM = {scope: rank_magnitudes("trim", scope, dropped_below, drops_some, prepare=_comparable) for scope in SCOPES}


# --- thresholds of the model and its majority's sign in one reading ------------------------------------------------


class Trimming(NamedTuple):
    """The search for a model's thresholds, and the signs that its entries elect by the thresholds that are expected.

    Attributes:
        search: For the thresholds.
        expected: uint32[n], the thresholds that a sample suggested.
        signs: How many entries elect + and how many −, two words of uint32[2].
        decided: Whether the majority's sign is that of these counts.
    """

    search: Search
    expected: UInt32[Any, " n"]
    signs: Words
    decided: Any


def _begin_trimming(options: Election, numbers: Numbers, extent: Extent) -> Trimming:
    search = _TRIM["model"].begin(options, numbers, extent)
    return Trimming(search, np.zeros_like(search.low), _begin_majority(options, numbers, extent), np.bool_(False))


def _by_search(search: Search) -> UInt32[Any, "n 1"]:
    return thresholds(search)[:, None]


def _expected(state: Trimming) -> UInt32[Any, "n 1"]:
    """The thresholds that are expected; what keeps all and what keeps nothing needs no sample."""
    keeps_all = (state.search.rank[0] | state.search.rank[1]) == 0
    return _by_search(state.search._replace(low=jnp.where(keeps_all, np.uint32(0), state.expected)))


def _tally_expected(
    options: Election, values: Values, known: Known, state: Trimming, valid: Bool[Array, "..."] | None
) -> UInt32[Array, "rows 65536"]:
    """The tallies of magnitudes, and in a last row how many entries elect + and −."""
    tallies = ranking.tally(ranking.bins(_comparable(values, known), state.search.low, ranking.FINE), valid)
    signs = _counted(values, known, _expected(state), valid)
    return jnp.concatenate([tallies, jnp.zeros((1, ranking.BINS), jnp.uint32).at[0, :2].set(signs)])


def _bin_expected(
    options: Election, values: Values, known: Known, state: Trimming, valid: Bool[Array, "..."] | None
) -> list[Array]:
    """The bins of magnitudes, and the sign that each entry elects."""
    _, total = _votes(_trim(values, known, _expected(state)), known)
    signs = _sign(total).astype(jnp.int8)
    return [*ranking.bins(_comparable(values, known), state.search.low, ranking.FINE), signs]


def _tally_on_host(binned: Sequence[np.ndarray]) -> np.ndarray:
    *bins, signs = binned
    row = np.zeros((1, ranking.BINS), np.uint32)
    row[0, :2] = np.count_nonzero(signs == 1), np.count_nonzero(signs == -1)
    return np.concatenate([ranking.tally_sparse(bins), row])


def _trimming_rounds(place: Place) -> tuple[Round, ...]:
    rounds, expects = [], False
    for step in within(_TRIM["model"].rounds(place)):
        if step.name == "guess":
            expects = True
            on_host = step.finish is not None
            step = step._replace(
                counts=_bin_expected if on_host else _tally_expected, finish=_tally_on_host if on_host else None
            )
        rounds.append(step)
    return *rounds, Round("signs", _count_elected, fallback=expects)


def _count_elected(
    options: Election, values: Values, known: Known, state: Trimming, valid: Bool[Array, "..."] | None
) -> UInt32[Array, "2"]:
    return _counted(values, known, _by_search(state.search), valid)


def _advance_trimming(options: Election, name: str, state: Trimming, totals: Any) -> Trimming:
    if name == "signs":
        return state._replace(signs=totals, decided=np.bool_(True))
    if name == "sample":
        expected = ranking.suggest(state.search, list(totals))
        return state._replace(search=ranking.bracket(state.search, expected), expected=expected)
    if name != "guess":
        return state._replace(search=_TRIM["model"].advance(options, name, state.search, totals))
    tallies: Words = (totals[0][:-1], totals[1][:-1])
    signs: Words = (totals[0][-1, :2], totals[1][-1, :2])
    search = _TRIM["model"].advance(options, name, state.search, tallies)
    if not search.found:
        return state._replace(search=search)
    counts, (plus, minus) = ((high.astype(np.int64) << 32) + low for high, low in (tallies, signs))
    # An entry that was kept and is not, or was not and is, elects + where it elected −, at most.
    between = ranking.count_between(counts, state.search, search, state.expected)
    margin = 2 * int(between.sum())
    decided = margin == 0 or abs(int(plus) - int(minus)) > margin
    return state._replace(search=search, signs=signs, decided=np.bool_(decided))


def _trimming_settled(options: Election, name: str, state: Trimming) -> bool:
    return bool(state.decided if name == "signs" else state.search.found)


def _elected(options: Election, state: Trimming, settings: Settings) -> Elected:
    return Elected(_by_search(state.search), _majority(options, state.signs, settings))


_ELECTED = Measure(
    "elected",
    "ranking magnitudes",
    "model",
    always,
    _begin_trimming,
    _trimming_rounds,
    _advance_trimming,
    _elected,
    _trimming_settled,
    uniform=("density",),
)


def _measures(trim_scope: str, weighted: bool) -> tuple[Measure, ...]:
    """What an election needs: thresholds, and the majority's sign where no weights decide."""
    if weighted:
        return (_TRIM[trim_scope],)
    return (_ELECTED,) if trim_scope == "model" else (_TRIM[trim_scope], _MAJORITY)


def ties(
    density: Density | None = 0.5,
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
    if trim_scope not in SCOPES:
        raise M3Error(f"ties: trim_scope is {trim_scope!r}, but must be 'model' or 'tensor'")
    if sign_election not in ("weighted", "unweighted"):
        raise M3Error(f"ties: sign_election is {sign_election!r}, but must be 'weighted' or 'unweighted'")
    weighted = sign_election == "weighted"
    return Method(
        "ties",
        fold_election,
        combine_election,
        measures=_measures(trim_scope, weighted),
        options=Election(normalize, weighted),
        parameters=(("density", 1.0 if density is None else plain_density("ties", density)),),
        uses_base=True,
        scale=scale,
    )
