"""One leaf's way through a merge: widen, subtract the base, sparsify, combine, add the base, narrow.

Pure functions that all drivers share: whole arrays in memory (`trees`), chunks out of core (`streaming`), and experts
that stay in memory while many merges are tried (`exploration`).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32
from numpy.typing import DTypeLike

from m3jax.arithmetic import exact
from m3jax.arithmetic.exact import Zero
from m3jax.errors import M3Error
from m3jax.methods.base import (
    Extent,
    Index,
    Known,
    Measure,
    Method,
    Numbers,
    Place,
    Round,
    Settings,
    Sparsifier,
    Values,
    per_expert,
)
from m3jax.methods.linear import linear
from m3jax.methods.measures import on_host

_Made = TypeVar("_Made")


class Pipeline(NamedTuple):
    """What is done to every leaf: hashable, so a jitted function is compiled once for it.

    Attributes:
        method: How experts are combined.
        sparsifier: What is dropped before, if anything.
        num_experts: n ≥ 1.
    """

    method: Method
    sparsifier: Sparsifier | None
    num_experts: int

    @property
    def uses_base(self) -> bool:
        """Whether experts become task vectors: for the method, or because the sparsifier works on them."""
        return self.method.uses_base or (self.sparsifier is not None and self.sparsifier.target == "delta")

    @property
    def rows(self) -> bool:
        """Whether entries must come in whole rows."""
        measured = any(stage.measure.scope == "row" for stage in self.stages) or self.columns
        return measured or self.method.rows or (self.sparsifier is not None and self.sparsifier.rows)

    @property
    def columns(self) -> bool:
        """Whether leaves are seen as matrices, whose columns differ in the first axis alone."""
        return any(stage.measure.scope == "column" for stage in self.stages)

    def laid_out(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which a leaf is worked on, its entries in the same order; rows lie along the last axis."""
        if self.columns:
            return math.prod(shape[:1]), math.prod(shape[1:])
        return shape or (1,) if self.rows else shape

    @property
    def num_arrays(self) -> int:
        """How many arrays a leaf is made of beside the base's: one per expert, and its statistics where it has some."""
        return self.num_experts * (2 if self.method.statistics and self.method.preparation is None else 1)

    @property
    def random(self) -> bool:
        """Whether masks are drawn, for which a key is needed."""
        return self.sparsifier is not None and self.sparsifier.random

    @property
    def transparent(self) -> bool:
        """Whether the result is NaN or infinite wherever an input is."""
        return self.method.transparent and self.sparsifier is None

    @property
    def num_weights(self) -> int:
        """How many weights a leaf takes."""
        return {"each": self.num_experts, "position": 1, "none": 0}[self.method.weighting]

    @property
    def stages(self) -> tuple["Stage", ...]:
        """The measures in the order in which they are concluded: the sparsifier's, then the method's."""
        return _stages(() if self.sparsifier is None else self.sparsifier.measures, self.method.measures)

    def stage(self, key: str) -> "Stage":
        """The measure of a key."""
        return next(stage for stage in self.stages if stage.key == key)


class Stage(NamedTuple):
    """A measure of a pipeline.

    Attributes:
        owner: Whose it is, "sparsifier" or "method".
        number: Which of the owner's measures.
        measure: The measure.
    """

    owner: str
    number: int
    measure: Measure

    @property
    def key(self) -> str:
        """What tells it from the pipeline's other measures."""
        return f"{self.owner}.{self.measure.name}"

    def numbers(self, settings: Settings) -> Numbers:
        """The owner's parameters of a leaf."""
        return settings.sparsifier if self.owner == "sparsifier" else settings.method

    def options(self, pipeline: Pipeline) -> Any:
        """The owner's options."""
        owner = pipeline.sparsifier if self.owner == "sparsifier" else pipeline.method
        return None if owner is None else owner.options

    def needed(self, pipeline: Pipeline, settings: Settings) -> bool:
        """Whether a leaf needs it."""
        return self.measure.needed(self.options(pipeline), self.numbers(settings))

    def begin(self, pipeline: Pipeline, settings: Settings, extent: Extent) -> Any:
        """The state before the first round."""
        return self.measure.begin(self.options(pipeline), self.numbers(settings), extent)

    def round(self, place: Place, name: str) -> Round:
        """One of its rounds."""
        return next(each for each in self.measure.rounds(place) if each.name == name)


@functools.cache
def _stages(of_sparsifier: tuple[Measure, ...], of_method: tuple[Measure, ...]) -> tuple[Stage, ...]:
    owned = (("sparsifier", of_sparsifier), ("method", of_method))
    return tuple(Stage(owner, number, measure) for owner, own in owned for number, measure in enumerate(own))


class LeafScalars(NamedTuple):
    """The run-time scalars of one leaf.

    Attributes:
        sparsifier: What the sparsifier folded.
        method: What the method folded.
        found: What was concluded so far, by owner and measure.
        mask_keys: Threefry keys of the leaf's mask streams, or None.
        enlarge: 1/density of each expert where it cannot be folded into a coefficient (sparsified raw weights).
        prepared: What the method has prepared on the host, which is given to no compiled program.
    """

    sparsifier: Any
    method: Any
    found: Mapping[str, Mapping[str, Any]]
    mask_keys: UInt32[Any, "pairs 2"] | None
    enlarge: Float[Any, " n"] | None
    prepared: Any = None


def check_pipeline(pipeline: Pipeline, has_base: bool) -> None:
    """Raise M3Error where a merge cannot be what was asked for."""
    method, sparsifier, n = pipeline
    fewest, most = method.experts
    if n < fewest or (most is not None and n > most):
        wanted = f"{fewest}" if fewest == most else f"at least {fewest}" if n < fewest else f"at most {most}"
        raise M3Error(f"{method.name}: merges {wanted} experts, but there {'is' if n == 1 else 'are'} {n}")
    if sparsifier is not None and not method.sparsifies:
        raise M3Error(f"{method.name}: cannot be combined with {sparsifier.name}: take linear or task_arithmetic")
    by_row = method.rows or any(stage.measure.scope == "row" for stage in pipeline.stages)
    if pipeline.columns and (by_row or (sparsifier is not None and sparsifier.rows)):
        raise M3Error(f"{method.name}: works on columns, so nothing beside it can work on rows: leave that out")
    if pipeline.uses_base and not has_base:
        reason = method.name if method.uses_base else f"{sparsifier.name if sparsifier else ''} on task vectors"
        raise M3Error(f"{reason}: needs a base model to take task vectors from, but none is given")


# --- the numbers of a leaf ----------------------------------------------------------------------------------------


def numbers_of(owner: Method | Sparsifier | None, num_experts: int) -> dict[str, tuple[float, ...]]:
    """The parameters that an owner was made with, one number per expert."""
    parameters = () if owner is None else owner.parameters
    return {name: per_expert(name, value, num_experts) for name, value in parameters}


def settings_of(
    pipeline: Pipeline,
    weights: Sequence[Any],
    scale: Any,
    sparsifier: Numbers | None = None,
    method: Numbers | None = None,
) -> Settings:
    """The numbers of one leaf, checked.

    Args:
        pipeline: What is done.
        weights: `pipeline.num_weights` of them.
        scale: λ.
        sparsifier: Parameters of the sparsifier in place of those that it was made with.
        method: Parameters of the method, likewise.

    Raises:
        M3Error: A parameter is out of range.
    """
    n = pipeline.num_experts
    own = {**numbers_of(pipeline.sparsifier, n), **(sparsifier or {})}
    others = {**numbers_of(pipeline.method, n), **(method or {})}
    for owner, numbers in ((pipeline.sparsifier, own), (pipeline.method, others)):
        if owner is not None and owner.check is not None:
            owner.check(owner.options, numbers)
    folded = pipeline.sparsifier is not None and pipeline.sparsifier.rescale and pipeline.sparsifier.target == "delta"
    ones = (1.0,) * n
    return Settings(weights, scale, own, others, ones, own["density"] if folded else ones)


def keeps_all(settings: Settings) -> bool:
    """Whether the sparsifier drops nothing of a leaf."""
    return all(density >= 1.0 for density in settings.sparsifier.get("density", (0.0,)))


def without_idle_sparsifier(pipeline: Pipeline, settings: Settings) -> Pipeline:
    """The pipeline of a leaf of which everything is kept; the base stays if the sparsifier wanted it."""
    idle = keeps_all(settings) and pipeline.uses_base == pipeline.method.uses_base
    return pipeline._replace(sparsifier=None) if pipeline.sparsifier is not None and idle else pipeline


def comparable(pipeline: Pipeline, leaves: Sequence[Settings]) -> list[Settings]:
    """Settings with the factors that make magnitudes comparable over the model, where that is what is measured.

    Magnitudes are ranked before what is kept is divided by its density; where densities differ between leaves, each
    expert's are scaled so that they compare as the divided ones would.
    """
    spans = any(stage.owner == "method" and stage.measure.scope == "model" for stage in pipeline.stages)
    if not spans or all(divisor == 1.0 for settings in leaves for divisor in settings.divisors):
        return list(leaves)
    experts = range(pipeline.num_experts)
    largest = [max((1.0 / s.divisors[i] for s in leaves if s.divisors[i]), default=1.0) for i in experts]

    def factors(settings: Settings) -> tuple[float, ...]:
        return tuple(1.0 / d / most if d else 1.0 for d, most in zip(settings.divisors, largest, strict=True))

    return [settings._replace(comparison=factors(settings)) for settings in leaves]


def leaf_scalars(
    pipeline: Pipeline, settings: Settings, shape: tuple[int, ...], mask_keys: UInt32[Any, "pairs 2"] | None
) -> LeafScalars:
    """The scalars of a leaf before anything is measured.

    Args:
        pipeline: What is done.
        settings: The leaf's numbers.
        shape: Of the whole leaf.
        mask_keys: What `threefry.pair_keys` gave for the leaf, where masks are drawn.
    """
    return scalars_from(pipeline, settings, shape, mask_keys, pipeline.method.fold(pipeline.method.options, settings))


def scalars_from(
    pipeline: Pipeline, settings: Settings, shape: tuple[int, ...], mask_keys: Any, folded: Any
) -> LeafScalars:
    """`leaf_scalars` with what the method has folded for this leaf and others of the same settings."""
    sparsifier = pipeline.sparsifier
    own, enlarge = None, None
    if sparsifier is not None:
        own = sparsifier.fold(sparsifier.options, settings.sparsifier, shape)
        if sparsifier.rescale and sparsifier.target == "weights":
            enlarge = np.array([1.0 / d if d else 1.0 for d in settings.sparsifier["density"]], np.float32)
    return LeafScalars(own, folded, {"sparsifier": {}, "method": {}}, mask_keys, enlarge)


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Puts a tensor's name before what is wrong with what was measured of it."""
    try:
        yield
    except M3Error as error:
        raise M3Error(f"{name}: {error}") from error


def with_found(pipeline: Pipeline, scalars: LeafScalars, stage: Stage, state: Any, settings: Settings) -> LeafScalars:
    """The scalars with what a measure concludes from its last state."""
    concluded = stage.measure.conclude(stage.options(pipeline), state, settings)
    own = {**scalars.found[stage.owner], stage.measure.name: concluded}
    return scalars._replace(found={**scalars.found, stage.owner: own})


# --- the entries of a leaf ----------------------------------------------------------------------------------------


def _known(owner: str, scalars: LeafScalars, index: Index, zero: Zero, statistics: Sequence[Array] = ()) -> Known:
    folded = scalars.sparsifier if owner == "sparsifier" else scalars.method
    wide = tuple(exact.widen(x) for x in statistics) if owner == "method" else ()
    return Known(folded, scalars.found[owner], index, scalars.mask_keys, zero, wide)


def _task_vectors(pipeline: Pipeline, experts: Values, base: Array | None) -> Values:
    if not pipeline.uses_base or base is None:
        return experts
    return tuple(exact.subtract(expert, base) for expert in experts)


def _given_values(pipeline: Pipeline, experts: Sequence[Array], base: Array | None) -> Values:
    """What the sparsifier gets, in float32."""
    wide = tuple(exact.widen(x) for x in experts)
    if pipeline.sparsifier is not None and pipeline.sparsifier.target == "weights":
        return wide
    return _task_vectors(pipeline, wide, None if base is None else exact.widen(base))


def _sparse_values(
    pipeline: Pipeline, experts: Sequence[Array], base: Array | None, scalars: LeafScalars, index: Index, zero: Zero
) -> Values:
    """What the method combines: δ̃ of every expert, in float32."""
    values, sparsifier = _given_values(pipeline, experts, base), pipeline.sparsifier
    if sparsifier is None:
        return values
    kept = sparsifier.apply(sparsifier.options, values, _known("sparsifier", scalars, index, zero))
    if sparsifier.target == "delta":
        return kept
    if scalars.enlarge is not None:
        factors = scalars.enlarge
        kept = tuple(exact.multiply(factors[i], v, zero) for i, v in enumerate(kept))
    return _task_vectors(pipeline, kept, None if base is None else exact.widen(base))


def counted(
    pipeline: Pipeline,
    stage: Stage,
    step: Round,
    experts: Sequence[Array],
    base: Array | None,
    scalars: LeafScalars,
    state: Any,
    index: Index,
    zero: Zero,
    valid: Bool[Array, "..."] | None = None,
) -> Any:
    """What a round of a measure counts of a leaf or a chunk.

    Args:
        pipeline: What is done.
        stage: The measure.
        step: Its round.
        experts: As for `merged_leaf`.
        base: The base's array, where it is used.
        scalars: With what was concluded before.
        state: The measure's.
        index: As for `merged_leaf`.
        zero: As for `merged_leaf`.
        valid: Which entries count; all when None.
    """
    experts, statistics = experts[: pipeline.num_experts], experts[pipeline.num_experts :]
    given = stage.measure.values == "given"
    values = (
        _given_values(pipeline, experts, base)
        if given
        else _sparse_values(pipeline, experts, base, scalars, index, zero)
    )
    known = _known(stage.owner, scalars, index, zero, statistics)
    return step.counts(stage.options(pipeline), values, known, state, valid)


def merged_leaf(
    pipeline: Pipeline,
    experts: Sequence[Array],
    base: Array | None,
    scalars: LeafScalars,
    index: Index,
    zero: Zero,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """The merged leaf, rounded once to `dtype`.

    Args:
        pipeline: What is done.
        experts: One array per expert, and then the statistics of each where the method asks for some: float32,
            bfloat16 or float16, of one shape; rows along the last axis, where the pipeline needs rows.
        base: The base's array, for methods and sparsifiers that take task vectors.
        scalars: With everything concluded.
        index: Flat index of each entry in its tensor.
        zero: A run-time zero, see `exact.fence`.
        dtype: Of the result.
    """
    method = pipeline.method
    experts, statistics = experts[: pipeline.num_experts], experts[pipeline.num_experts :]
    values = _sparse_values(pipeline, experts, base, scalars, index, zero)
    merged = method.combine(method.options, values, _known("method", scalars, index, zero, statistics))
    if pipeline.uses_base and base is not None:
        merged = exact.add(merged, exact.widen(base))
    return exact.narrow(jnp.asarray(merged), dtype)


_KEPT = 2  # of what is prepared: between key and query stands, by name, the output of attention


def recently_made(kept: dict[Hashable, _Made], key: Hashable, make: Callable[[], _Made]) -> _Made:
    """What was made for a key, where it is one of the last two, else made now: leaves that share statistics share it.

    Args:
        kept: What was made last.
        key: All that it depends on.
        make: Makes it; what was made longest ago is given up before.
    """
    if key in kept:
        kept[key] = kept.pop(key)
        return kept[key]
    while len(kept) >= _KEPT:
        kept.pop(next(iter(kept)))
    kept[key] = make()
    return kept[key]


def prepared_for(
    pipeline: Pipeline, scalars: LeafScalars, settings: Settings, statistics: Sequence[np.ndarray]
) -> LeafScalars:
    """The scalars of a tensor with what the method prepares for it.

    Args:
        pipeline: What is done.
        scalars: Of the tensor.
        settings: Its numbers.
        statistics: A matrix for each expert.

    Raises:
        M3Error: They are no such statistics.
    """
    method = pipeline.method
    if method.preparation is None:
        raise ValueError(f"{method.name} prepares nothing")
    return scalars._replace(prepared=method.preparation.make(method.options, settings, statistics))


def merged_rows(
    pipeline: Pipeline,
    experts: Sequence[Any],
    prepare: Callable[..., LeafScalars],
    dtype: DTypeLike,
    width: int,
    first: bool,
    traced: Sequence[Any] = (),
) -> Array:
    """A merged tensor for which the method has prepared something, or rows of it, rounded once to `dtype`.

    Not for `jax.jit`, which is given nothing that is prepared; in a caller's trace the method calls back to the host.

    Args:
        pipeline: What is done.
        experts: Of each expert an array of float32, bfloat16 or float16, all of one shape, of numpy or JAX.
        prepare: What is traced → scalars with what is prepared.
        dtype: Of the result.
        width: How many inputs there are.
        first: Whether these lie along the first axes, which then are whole, and not along the last one.
        traced: Matrices of which something is prepared only when the program runs.
    """
    method, shape = pipeline.method, experts[0].shape
    rows = [x.reshape(width, -1).T if first else x.reshape(-1, width) for x in experts]
    values = tuple(exact.widen(jnp.asarray(x)) for x in rows)

    def combined(values: Sequence[Any], matrices: Sequence[Any]) -> list[Any]:
        scalars = prepare(*matrices)
        nowhere: Any = (np.zeros((), np.uint32),) * 2
        known = Known(scalars.method, {}, nowhere, None, None, prepared=scalars.prepared, dtype=dtype)
        return [method.combine(method.options, tuple(values), known)]

    if traced:
        (found,) = on_host(combined, [values[0].shape], values, tuple(traced))
    else:
        (found,) = combined(values, ())
    merged = exact.narrow(jnp.asarray(found), dtype)
    return (merged.T if first else merged).reshape(shape)


# --- running statistics -------------------------------------------------------------------------------------------


def statistics_pipeline(num_experts: int) -> Pipeline:
    """What is done to means and variances of batch normalisation, whatever is done to parameters: their mean."""
    return Pipeline(linear(), None, num_experts)


def statistics_weights(pipeline: Pipeline, weights: Sequence[Any]) -> tuple[Any, ...]:
    """The weights of running statistics: those of the parameters where each expert has one, else equal ones.

    Args:
        pipeline: What is done to parameters.
        weights: Those of a parameter; weights that sum to 0 have no mean, and count as equal.
    """
    known = all(isinstance(weight, float) for weight in weights)
    if pipeline.method.weighting != "each" or (known and sum(weights) == 0.0):
        return (1.0,) * pipeline.num_experts
    return tuple(weights)


# --- leaves that stack blocks -------------------------------------------------------------------------------------


def with_conclusion(scalars: LeafScalars, stage: Stage, concluded: Any) -> LeafScalars:
    """The scalars with what a measure has concluded: of many blocks, stacked along a first axis."""
    own = {**scalars.found[stage.owner], stage.measure.name: concluded}
    return scalars._replace(found={**scalars.found, stage.owner: own})


def joined(pieces: Sequence[Any]) -> Any:
    """Pytrees of blocks stacked along axis 0, on the host where they are there.

    Args:
        pieces: Alike, but that a factor which is None in some, as it changes nothing, may be an array in others.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(pieces))
    xp: Any = jnp if traced else np

    def join(*leaves: Any) -> Any:
        like = next((leaf for leaf in leaves if leaf is not None), None)
        if like is None:
            return None
        ones = np.ones(np.shape(like), like.dtype)
        return xp.stack([xp.asarray(ones if leaf is None else leaf) for leaf in leaves])

    return jax.tree.map(join, *pieces, is_leaf=lambda leaf: leaf is None)
