"""The measures that methods are built from: magnitudes of ranks, inner products, and squares.

Each is a factory of `Measure`s. What differs between methods is given as functions that take the owner's options.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32
from numpy.typing import DTypeLike

from m3jax.arithmetic import exact, ranking, sums
from m3jax.arithmetic.ranking import Search
from m3jax.errors import M3Error
from m3jax.methods.base import Extent, Known, Measure, Numbers, Place, Round, Settings, Values, Words

_WORTH_SAMPLING = 2**24  # entries from which a sample's cost is small against the pass that it saves
_MOST_COLUMNS = 2**20  # of each, some hundred bytes are kept
NOTHING = 0xFFFFFFFF
"""A threshold above every magnitude."""

Ranks = Callable[[Any, Numbers, int], Sequence[Sequence[int]]]
"""(options, numbers, size) → for each expert the same number of ranks; the smallest magnitude has rank 1."""


# --- magnitudes of ranks ------------------------------------------------------------------------------------------


def _ranked(prepare: Any, values: Values, known: Known, state: Search) -> list[Array]:
    """One array of values for each rank that is searched: each expert's as often as it has ranks."""
    prepared = values if prepare is None else prepare(values, known)
    copies = state.low.shape[0] // len(prepared)
    return [value for value in prepared for _ in range(copies)]


def _tally(prepare: Any, shift: int, options: Any, values: Values, known: Known, state: Search, valid: Any) -> Array:
    if shift == ranking.FINE:
        return ranking.tally(ranking.bins(_ranked(prepare, values, known, state), state.low, shift), valid)
    # Every search begins at 0, so that all ranks of an expert are searched in one tally.
    prepared = values if prepare is None else prepare(values, known)
    copies = state.low.shape[0] // len(prepared)
    return jnp.repeat(ranking.tally(ranking.bins(prepared, state.low[::copies], shift), valid), copies, axis=0)


def _bins(
    prepare: Any, shift: int, options: Any, values: Values, known: Known, state: Search, valid: Any
) -> list[Array]:
    return list(ranking.bins(_ranked(prepare, values, known, state), state.low, shift))


def _below(prepare: Any, options: Any, values: Values, known: Known, state: Search, valid: Any) -> Array:
    return ranking.count_below(
        _ranked(prepare, values, known, state), state.low, ranking.digit_shift(state.step), valid
    )


def _magnitudes(prepare: Any, options: Any, values: Values, known: Known, state: Search, valid: Any) -> list[Array]:
    return [exact.magnitude_bits(value) for value in _ranked(prepare, values, known, state)]


def _ranking_rounds(prepare: Any, place: Place) -> tuple[Round, ...]:
    bound = functools.partial
    on_cpu = place.platform == "cpu"
    if not place.streamed and not on_cpu:  # counting costs eleven readings of memory, and no scatter
        return (Round("digit", bound(_below, prepare), repeats=ranking.STEPS),)
    coarse = Round("coarse", bound(_tally, prepare, ranking.COARSE))
    fine = Round("fine", bound(_tally, prepare, ranking.FINE))
    if place.streamed and on_cpu:  # numpy counts faster where few magnitudes are inside the bracket
        fine = Round("fine", bound(_bins, prepare, ranking.FINE), finish=ranking.tally_sparse)
    if not place.streamed or place.entries < _WORTH_SAMPLING:
        return coarse, fine
    return (
        Round("sample", bound(_magnitudes, prepare), "gather", sampled=True),
        fine._replace(name="guess"),
        coarse._replace(fallback=True),
        fine._replace(fallback=True),
    )


def _advance_ranking(options: Any, name: str, state: Search, totals: Any) -> Search:
    if name == "digit":
        return ranking.advance_digit(state, totals)
    if name == "sample":
        return ranking.bracket(state, ranking.suggest(state, list(totals)))
    shift = ranking.COARSE if name == "coarse" else ranking.FINE
    narrowed, inside = ranking.advance(state, totals, shift)
    if name == "guess" and not np.all(inside):
        return state._replace(low=np.zeros_like(state.low))  # the bracket missed: coarse and fine begin anew
    return narrowed._replace(found=np.bool_(name != "coarse"))


def _ranking_settled(options: Any, name: str, state: Search) -> bool:
    return bool(state.found)


def _begin_ranking(ranks: "Ranks", options: Any, numbers: Numbers, extent: Extent) -> Search:
    wanted = ranks(options, numbers, extent.entries)
    return ranking.start(extent.entries, [rank for own in wanted for rank in own])


def thresholds(state: Search) -> UInt32[Any, " ranks"]:
    """What was found, with ranks beyond the last one above every magnitude."""
    xp: Any = np if isinstance(state.low, np.ndarray) else jnp
    (high, low), (size_high, size_low) = state.rank, state.size
    beyond = (high > size_high) | ((high == size_high) & (low > size_low))
    found: Array = xp.where(beyond, np.uint32(NOTHING), state.low)
    return found


class Searching(Protocol):
    """The state of a measure that searches for a rank among other things."""

    search: Search


def _of_search(counts: Any, options: Any, values: Values, known: Known, state: Searching, valid: Any) -> Any:
    return counts(options, values, known, state.search, valid)


def within(rounds: Sequence[Round]) -> tuple[Round, ...]:
    """The rounds of a ranking, for a state that holds its search as `search`."""
    return tuple(step._replace(counts=functools.partial(_of_search, step.counts)) for step in rounds)


def _thresholds(options: Any, state: Search, settings: Settings) -> UInt32[Any, "n ranks"]:
    return thresholds(state).reshape(len(settings.comparison), -1)


def rank_magnitudes(
    name: str,
    scope: str,
    ranks: Ranks,
    needed: Callable[[Any, Numbers], bool],
    values: str = "sparse",
    prepare: Callable[[Values, Known], Values] | None = None,
    uniform: tuple[str, ...] = ("density",),
) -> Measure:
    """The magnitudes that have certain ranks among all of a tensor or of the model, exactly.

    Args:
        name: What `Known.found` calls it: uint32[n, ranks], bits of magnitudes.
        scope: "tensor" or "model".
        ranks: Which; rank 0 gives a threshold below every magnitude, one above the size a threshold above all.
        needed: As `Measure.needed`.
        values: As `Measure.values`.
        prepare: What is done to the values before their magnitudes are ranked.
        uniform: The parameters that the ranks depend on.
    """
    return Measure(
        name=name,
        label="ranking magnitudes",
        scope=scope,
        needed=needed,
        begin=functools.partial(_begin_ranking, ranks),
        rounds=functools.partial(_ranking_rounds, prepare),
        advance=_advance_ranking,
        conclude=_thresholds,
        settled=_ranking_settled,
        values=values,
        uniform=uniform,
    )


# --- inner products -----------------------------------------------------------------------------------------------


def always(options: Any, numbers: Numbers) -> bool:
    """A measure that every leaf needs."""
    return True


class Products(NamedTuple):
    """Inner products as they are counted.

    Attributes:
        largest: uint32[*rows, pairs], see `sums.largest`.
        sums: Words of [*rows, 2, pairs, limbs], see `sums.integer_sums`.
    """

    largest: UInt32[Any, "*rows pairs"]
    sums: Words


def _begin_products(scope: str, options: Any, numbers: Numbers, extent: Extent) -> Products:
    if scope == "column" and extent.rows[0] > _MOST_COLUMNS:
        raise M3Error(
            f"has {extent.rows[0]} columns, but angles are told of at most {_MOST_COLUMNS}: take whole tensors"
        )
    pairs = len(sums.pairs_of(extent.experts))
    limbs = np.zeros((*extent.rows, 2, pairs, sums.LIMBS), np.uint32)
    return Products(np.zeros((*extent.rows, pairs), np.uint32), (limbs, limbs))


def _in_lines(scope: str, values: Values, valid: Bool[Array, "..."] | None) -> tuple[Any, Any, bool]:
    """Values and which of them count, with what is multiplied along the last axis; and whether only along that."""
    if scope == "column":
        values, valid = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), (values, valid))
    return values, valid, scope in ("row", "column")


def _largest(
    scope: str, options: Any, values: Values, known: Known, state: Any, valid: Bool[Array, "..."] | None
) -> Array:
    lines, counting, by_line = _in_lines(scope, values, valid)
    return sums.largest(lines, known.zero, counting, by_line)


def _integer_sums(
    scope: str, options: Any, values: Values, known: Known, state: Any, valid: Bool[Array, "..."] | None
) -> Array:
    lines, counting, by_line = _in_lines(scope, values, valid)
    return sums.integer_sums(lines, state.largest, known.zero, counting, by_line)


def _product_rounds(scope: str, place: Place) -> tuple[Round, ...]:
    bound = functools.partial
    return Round("largest", bound(_largest, scope), "max"), Round("sums", bound(_integer_sums, scope))


def _advance_products(options: Any, name: str, state: Products, totals: Any) -> Products:
    return state._replace(largest=totals) if name == "largest" else state._replace(sums=totals)


def _widened(totals: Words) -> np.ndarray:
    """Two words as one integer."""
    return (np.asarray(totals[0]).astype(np.int64) << 32) + np.asarray(totals[1]).astype(np.int64)


def products_of(state: Products) -> np.ndarray:
    """Inner products of a state that is known on the host.

    Returns:
        float64[*rows, pairs], as `sums.inner_products`.
    """
    return sums.inner_products(np.asarray(state.largest), _widened(state.sums))


def measure_products(
    name: str, scope: str, conclude: Callable[[Any, Any, Settings], Any], values: str = "sparse"
) -> Measure:
    """The inner products of all experts' vectors, exact and independent of order.

    Args:
        name: What `Known.found` calls what is concluded.
        scope: "tensor", or "row" or "column" for those of each of these.
        conclude: (options, state, settings) → scalars. On the host `products_of(state)` gives the products; in a
            trace `on_host` calls it back.
        values: As `Measure.values`.
    """
    return Measure(
        name=name,
        label="measuring angles",
        scope=scope,
        needed=always,
        begin=functools.partial(_begin_products, scope),
        rounds=functools.partial(_product_rounds, scope),
        advance=_advance_products,
        conclude=conclude,
        values=values,
    )


# --- squares ------------------------------------------------------------------------------------------------------

_Prepare = Callable[[Values, Known], Values]


def _begin_squares(options: Any, numbers: Numbers, extent: Extent) -> Products:
    limbs = np.zeros((2, extent.experts, sums.LIMBS), np.uint32)
    return Products(np.zeros(extent.experts, np.uint32), (limbs, limbs))


def _largest_squares(
    prepare: _Prepare, options: Any, values: Values, known: Known, state: Any, valid: Bool[Array, "..."] | None
) -> Array:
    return jnp.concatenate([sums.largest((v,), known.zero, valid) for v in prepare(values, known)])


def _sums_of_squares(
    prepare: _Prepare, options: Any, values: Values, known: Known, state: Any, valid: Bool[Array, "..."] | None
) -> Array:
    prepared = enumerate(prepare(values, known))
    own = [sums.integer_sums((v,), state.largest[i : i + 1], known.zero, valid) for i, v in prepared]
    return jnp.concatenate(own, axis=1)


def _square_rounds(prepare: _Prepare, place: Place) -> tuple[Round, ...]:
    bound = functools.partial
    return Round("largest", bound(_largest_squares, prepare), "max"), Round("sums", bound(_sums_of_squares, prepare))


def measure_squares(name: str, conclude: Callable[[Any, Any, Settings], Any], prepare: _Prepare) -> Measure:
    """The sum of squares of each expert's values in a tensor, exact and independent of order.

    Args:
        name: What `Known.found` calls what is concluded.
        conclude: As for `measure_products`; `products_of(state)` gives float64[n].
        prepare: What is done to the values before they are squared.
    """
    return Measure(
        name=name,
        label="measuring lengths",
        scope="tensor",
        needed=always,
        begin=_begin_squares,
        rounds=functools.partial(_square_rounds, prepare),
        advance=_advance_products,
        conclude=conclude,
    )


# --- functions of the host ----------------------------------------------------------------------------------------


def on_host(
    function: Callable[..., Any],
    shapes: Sequence[tuple[int, ...]],
    *operands: Any,
    dtype: DTypeLike = np.float32,
    batched: bool = False,
) -> Any:
    """`function(*operands)` in numpy: at once where the operands are known, else by a callback from the program.

    Args:
        function: From numpy arrays to a list of arrays.
        shapes: Of each of them.
        operands: Pytrees of arrays.
        dtype: Of each of the results.
        batched: Whether the function takes operands with leading axes, and gives results that have them too; where
            not, `vmap` calls it once for each entry of the batch.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(operands)):
        return function(*jax.tree.map(np.asarray, operands))

    def called(*given: Any) -> Any:
        return function(*jax.tree.map(np.asarray, given))

    result = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]  # type: ignore[no-untyped-call]
    return jax.pure_callback(called, result, *operands, vmap_method="broadcast_all" if batched else "sequential")
