"""SCE: select the entries that differ most between experts, calculate weights of their energy, erase minorities.

References:
    Wan et al., FuseChat: Knowledge fusion of chat models, 2024, arXiv 2408.07990.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from m3jax.arithmetic import exact
from m3jax.arithmetic.ranking import Search
from m3jax.errors import M3Error
from m3jax.methods.base import (
    Density,
    Extent,
    Known,
    Measure,
    Method,
    Numbers,
    Place,
    Round,
    Settings,
    Values,
    checked_share,
)
from m3jax.methods.measures import (
    Products,
    measure_squares,
    on_host,
    products_of,
    rank_magnitudes,
    thresholds,
    within,
)
from m3jax.methods.ties import MAX_EXPERTS, looked_up

# --- select -------------------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """The search for the smallest variance that is kept.

    Attributes:
        share: uint32[2], the bits of τ in float64, which a program could not carry.
        search: For its rank, once it is known how many variances are not zero.
    """

    share: UInt32[Any, "2"]
    search: Search


def _variances(values: Values, known: Known) -> Values:
    """n² times each entry's variance: the sum over pairs, which is 0 exactly where all experts agree."""
    gaps = [exact.subtract(a, b) for a, b in itertools.combinations(values, 2)]
    return (functools.reduce(exact.add, [exact.multiply(gap, gap, known.zero) for gap in gaps]),)


def _selects(options: None, numbers: Numbers) -> bool:
    return numbers["select_topk"][0] < 1.0


_RANK = rank_magnitudes("kept", "tensor", lambda options, numbers, size: [(0,)], _selects, prepare=_variances)


def _begin(options: None, numbers: Numbers, extent: Extent) -> Selection:
    share = np.array([numbers["select_topk"][0]]).view(np.uint32)
    return Selection(share, _RANK.begin(options, numbers, extent))


def _count_varied(
    options: None, values: Values, known: Known, state: Selection, valid: Bool[Array, "..."] | None
) -> UInt32[Array, "1"]:
    (variance,) = _variances(values, known)
    varied = variance > 0
    return jnp.sum(varied if valid is None else varied & valid, dtype=jnp.uint32).reshape(1)


def _rounds(place: Place) -> tuple[Round, ...]:
    return Round("varied", _count_varied), *within(_RANK.rounds(place))


def _rank(share: np.ndarray, size: tuple[Any, Any], varied: tuple[Any, Any]) -> list[np.ndarray]:
    """The rank of the smallest variance that is kept, as high and low word: the size and one where none is."""
    (of_all, of_varied) = ((int(np.ravel(high)[0]) << 32) + int(np.ravel(low)[0]) for high, low in (size, varied))
    rank = of_all + 1 - int(float(share.view(np.float64)[0]) * of_varied)
    return [np.array([rank >> 32], np.uint32), np.array([rank & 0xFFFFFFFF], np.uint32)]


def _advance(options: None, name: str, state: Selection, totals: Any) -> Selection:
    if name != "varied":
        return state._replace(search=_RANK.advance(options, name, state.search, totals))
    high, low = on_host(_rank, [(1,), (1,)], state.share, state.search.size, totals, dtype=np.uint32)
    return state._replace(search=state.search._replace(rank=(high, low)))


_SELECT = Measure(
    name="kept",
    label="ranking variances",
    scope="tensor",
    needed=_selects,
    begin=_begin,
    rounds=_rounds,
    advance=_advance,
    conclude=lambda options, state, settings: thresholds(state.search),
)


def _selected(values: Values, known: Known) -> Values:
    kept = known.found.get("kept")
    if kept is None:
        return values
    (variance,) = _variances(values, known)
    keep = exact.magnitude_bits(variance) >= kept[0]
    return tuple(jnp.where(keep, value, 0.0) for value in values)


# --- calculate, erase ---------------------------------------------------------------------------------------------


def shares(energies: np.ndarray) -> np.ndarray:
    """For every subset of experts, each one's share of the energy that they have together; 0 where that is 0.

    Args:
        energies: float64[n].

    Returns:
        float64[2ⁿ, n], indexed by the bits of who is a member.

    Example:
        >>> shares(np.array([1.0, 3.0]))[3].tolist()
        [0.25, 0.75]
    """
    members = np.arange(2 ** len(energies))[:, None] >> np.arange(len(energies)) & 1
    total = np.zeros(len(members))
    for member, energy in zip(members.T, energies, strict=True):
        total = total + member * energy
    table: np.ndarray = members * energies / np.where(total > 0, total, 1.0)[:, None]
    return table


def _conclude(options: None, state: Products, settings: Settings) -> Float[Any, "subsets n"]:
    count = len(settings.comparison)

    def found(state: Products) -> list[np.ndarray]:
        return [(settings.scale * shares(products_of(state))).astype(np.float32)]

    (table,) = on_host(found, [(2**count, count)], state)
    return table


_WEIGH = measure_squares("shares", _conclude, _selected)


def _fold(options: None, settings: Settings) -> None:
    return None  # the weights come from the task vectors


def _combine(options: None, values: Values, known: Known) -> Float[Array, "..."]:
    chosen = _selected(values, known)
    positive = functools.reduce(exact.add, chosen) >= 0
    agree = [(value != 0) & ((value > 0) == positive) for value in chosen]
    columns = looked_up(known.found["shares"], agree)
    terms = [
        jnp.where(a, exact.multiply(c, value, known.zero), 0.0)
        for a, c, value in zip(agree, columns, chosen, strict=True)
    ]
    return functools.reduce(exact.add, terms)


def _check(options: None, numbers: Numbers) -> None:
    if len(numbers["select_topk"]) == 1 and numbers["select_topk"][0] < 1.0:
        raise M3Error(
            f"sce: select_topk is {numbers['select_topk'][0]:g}, but the entries of one expert do not vary between "
            "experts: add another expert or set select_topk: 1"
        )


def sce(select_topk: Density = 1.0, scale: float = 1.0) -> Method:
    """base + the mean of task vectors that have the elected sign, weighed by their energy; takes no weights.

    Of each tensor the ⌊τ·(nonzero variances)⌋ entries whose variance over experts is largest are kept, and all that
    tie with the last of these; the weight of an expert is its share of the sum of squares of what is kept.

    Args:
        select_topk: τ, in [0, 1]; 1 keeps every entry.
        scale: λ, a factor of the task vector.

    Raises:
        M3Error: τ is out of range, or below 1 for a single expert.

    References:
        Wan et al., FuseChat, 2024, arXiv 2408.07990.
    """
    return Method(
        "sce",
        _fold,
        _combine,
        measures=(_SELECT, _WEIGH),
        parameters=(("select_topk", checked_share("sce", "select_topk", select_topk)),),
        uses_base=True,
        scale=scale,
        weighting="none",
        experts=(1, MAX_EXPERTS),
        sparsifies=False,
        check=_check,
    )
