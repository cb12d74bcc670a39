"""A parameter of all models in memory: where it lies, what is measured of it, and its merge.

The jitted functions here see whole arrays, on one device or on many, under meshes with Auto or Explicit axes.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array
from numpy.typing import DTypeLike

from m3jax.arithmetic import exact, threefry
from m3jax.arithmetic.ranking import add_counts
from m3jax.errors import M3Error
from m3jax.methods.base import Extent, Place, Round, Settings, Words
from m3jax.methods.leaf import (
    LeafScalars,
    Pipeline,
    Stage,
    about,
    counted,
    joined,
    merged_leaf,
    merged_rows,
    prepared_for,
    recently_made,
    with_conclusion,
    with_found,
)
from m3jax.trees.matching import is_traced

_EVERYWHERE = PartitionSpec()  # type: ignore[no-untyped-call]
_AHEAD = 4  # counts dispatched before the first is waited for


class Stacked(NamedTuple):
    """How a leaf stacks blocks, each of which is a tensor of its own; hashable, as jitted functions are told it.

    Attributes:
        axis: Along which axis of its arrays.
        varied: Whether blocks have settings of their own, so that what they fold into is stacked along axis 0.
        found: The measures whose conclusions are stacked along axis 0, by `Stage.key`.
    """

    axis: int
    varied: bool
    found: frozenset[str] = frozenset()

    def axes_of(self, scalars: LeafScalars) -> LeafScalars:
        """Which of a leaf's scalars are stacked, as `jax.vmap` takes it; keys of masks always are."""
        own = 0 if self.varied else None
        found = {
            owner: {name: 0 if f"{owner}.{name}" in self.found else None for name in concluded}
            for owner, concluded in scalars.found.items()
        }
        return LeafScalars(own, own, found, 0, own)


class Column(NamedTuple):
    """One parameter of all models, and the scalars found for it so far.

    Attributes:
        name: What the tree calls it.
        experts: One array per expert.
        base: The base's array, where task vectors are taken from it.
        template: The array whose dtype and sharding the merged one gets: the base's, or else the first expert's.
        settings: Its weights and densities; of each of its blocks, where it stacks some.
        scalars: What they fold into, and what was measured.
        stacked: How it stacks blocks, if it does.
        matrices: A matrix of each expert, for methods that prepare something of them; of each block along axis 0.
        inputs_first: Whether its inputs lie along its first axes, where there are matrices.
    """

    name: str
    experts: tuple[Array, ...]
    base: Array | None
    template: Array
    settings: tuple[Settings, ...]
    scalars: LeafScalars
    stacked: Stacked | None = None
    matrices: tuple[np.ndarray, ...] = ()
    inputs_first: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one tensor: of the leaf, or of each of its blocks."""
        return tensor_shape(np.shape(self.experts[0]), None if self.stacked is None else self.stacked.axis)


def tensor_shape(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """The shape of a leaf, or of each of its blocks if it stacks them along an axis."""
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


# --- shardings ----------------------------------------------------------------------------------------------------


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in pairs if kind == AxisType.Explicit)


def _explicit(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x`, where its mesh has Explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _explicit_part(sharding: NamedSharding) -> PartitionSpec:
    """The spec of a sharding without its Auto axes, which no type can hold."""
    axes = _explicit_axes(sharding.mesh)
    parts = [(part,) if isinstance(part, str) else part or () for part in sharding.spec]
    kept = [tuple(name for name in part if name in axes) for part in parts]
    return PartitionSpec(*(part or None for part in kept))  # type: ignore[no-untyped-call]


def _on_any_mesh(function: Callable[..., Array], spec: PartitionSpec, *operands: Any) -> Array:
    """`function(*operands)` with Explicit axes handed to the compiler: it knows how to rank and add up over them."""
    found = [sharding for x in jax.tree.leaves(operands) if (sharding := _explicit(x)) is not None]
    if not found:
        return function(*operands)
    mesh = found[0].mesh
    axes = _explicit_axes(mesh)
    result: Array = jax.sharding.auto_axes(function, axes=axes, out_sharding=NamedSharding(mesh, spec))(*operands)
    return result


def is_manual(x: Any) -> bool:
    """Whether an array is a shard that `jax.shard_map` made of a larger one."""
    if not isinstance(x, jax.core.Tracer):
        return False
    return AxisType.Manual in jax.typeof(x).sharding.mesh.axis_types


def home_of(leaf: Column) -> Any:
    """The sharding that the leaf's merged array gets: the template's, or else the first that someone chose.

    Args:
        leaf: A parameter.

    Returns:
        A `jax.sharding.Sharding`; None where it is left to JAX: nothing is placed, or a trace knows only Auto axes.
    """
    return home_of_arrays([leaf.template, *leaf.experts], is_traced(leaf.template, leaf.experts, leaf.base))


def home_of_arrays(arrays: Sequence[Any], traced: bool) -> Any:
    """`home_of` of the template and the experts' arrays."""
    if traced:
        return next((sharding for x in arrays if (sharding := _explicit(x)) is not None), None)
    placed = [x for x in arrays if isinstance(x, jax.Array)]
    chosen = [x for x in placed if len(x.sharding.device_set) > 1 or getattr(x, "committed", True)]
    return chosen[0].sharding if chosen else None


def brought(leaf: Column) -> tuple[tuple[Array, ...], Array | None]:
    """The leaf's arrays on the mesh of its merged array; those that are there stay as they lie.

    Args:
        leaf: A parameter.

    Returns:
        The experts' arrays and the base's.
    """
    home = home_of(leaf)

    def bring(x: Any) -> Any:
        if home is None or not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
            return x
        there = getattr(x.sharding, "mesh", x.sharding) == getattr(home, "mesh", home)
        return x if there else jax.device_put(x, home)

    return tuple(bring(x) for x in leaf.experts), None if leaf.base is None else bring(leaf.base)


# --- jitted pieces, compiled once per (pipeline, shapes, dtypes, shardings) ---------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def merge_array(
    pipe: Pipeline,
    dtype: DTypeLike,
    home: Any,
    stacked: Stacked | None,
    experts: Any,
    base: Any,
    scalars: Any,
    zero: exact.Zero,
) -> Array:
    """The merged parameter.

    Args:
        pipe: What is done.
        dtype: Of the result.
        home: The result's sharding, of `home_of`.
        stacked: How the arrays stack blocks, if they do.
        experts: One array per expert.
        base: The base's array, where it is used.
        scalars: Of the leaf, with what `measured` found.
        zero: A run-time zero, or None inside a trace; see `exact.fence`.

    Returns:
        The array, rounded once.
    """

    def merged(experts: Any, base: Any, scalars: Any, zero: Any) -> Array:
        def tensor(experts: Any, base: Any, scalars: Any) -> Array:
            shape = experts[0].shape
            experts, base = _in_rows(pipe, experts), None if base is None else _in_rows(pipe, base)
            index = threefry.flat_index(experts[0].shape)
            return merged_leaf(pipe, experts, base, scalars, index, zero, dtype).reshape(shape)

        if stacked is None:
            return tensor(experts, base, scalars)
        axes = (stacked.axis, stacked.axis, stacked.axes_of(scalars))
        whole: Array = jax.vmap(tensor, in_axes=axes, out_axes=stacked.axis)(experts, base, scalars)
        return whole

    if not isinstance(home, NamedSharding):
        return merged(experts, base, scalars, zero)
    if AxisType.Explicit in home.mesh.axis_types:
        return _on_any_mesh(merged, _explicit_part(home), experts, base, scalars, zero)
    placed: Array = lax.with_sharding_constraint(merged(experts, base, scalars, zero), home)  # type: ignore[no-untyped-call]
    return placed


def merge_prepared(
    pipe: Pipeline, dtype: DTypeLike, home: Any, leaf: Column, kept: dict[Hashable, LeafScalars]
) -> Array:
    """The merged parameter, of a method that prepares something of matrices; on the host, or by calls back to it.

    Args:
        pipe: What is done.
        dtype: Of the result.
        home: As for `merge_array`.
        leaf: The parameter.
        kept: What was prepared last.

    Returns:
        The array, rounded once; it may have to be `settled`.
    """
    width, axis = leaf.matrices[0].shape[-1], None if leaf.stacked is None else leaf.stacked.axis
    if not all(isinstance(weight, float) for own in leaf.settings for weight in own.weights):
        raise M3Error(
            f"{leaf.name}: weights are traced, but {pipe.method.name} solves its equations with them on the host: give "
            "numbers"
        )

    def prepared(block: int | None, *matrices: Any) -> LeafScalars:
        settings = leaf.settings[block or 0]
        of_block = block is not None and leaf.stacked is not None and leaf.stacked.varied
        scalars = _piece(leaf.scalars, block or 0) if of_block else leaf.scalars
        with about(leaf.name):
            return prepared_for(pipe, scalars, settings, [np.asarray(each, np.float32) for each in matrices])

    def of_block(experts: Sequence[Any], matrices: Sequence[Any], block: int | None) -> Array:
        prepare = functools.partial(prepared, block)
        if not is_traced(matrices):
            settings = leaf.settings[block or 0]
            numbers = (tuple(settings.weights), settings.scale, tuple(settings.method.items()))
            key = (tuple(map(id, leaf.matrices)), block, *numbers)
            ready = recently_made(kept, key, lambda: prepare(*matrices))
            return merged_rows(pipe, experts, lambda: ready, dtype, width, leaf.inputs_first)
        return merged_rows(pipe, experts, prepare, dtype, width, leaf.inputs_first, matrices)

    def merged(experts: Sequence[Any], matrices: Sequence[Any]) -> Array:
        if axis is None:
            return of_block(experts, matrices, None)
        blocks = range(len(leaf.settings))
        pieces = [[x[(slice(None),) * axis + (block,)] for x in experts] for block in blocks]
        return jnp.stack([of_block(pieces[block], [m[block] for m in matrices], block) for block in blocks], axis)

    if not is_traced(leaf.experts, leaf.matrices):
        away = next((x for x in leaf.experts if isinstance(x, jax.Array) and not x.is_fully_addressable), None)
        if away is not None:
            raise M3Error(
                f"{leaf.name}: lies on several processes, but {pipe.method.name} needs it on one: use m3jax merge"
            )
        return merged([np.asarray(x) for x in leaf.experts], leaf.matrices)
    spec = _explicit_part(home) if isinstance(home, NamedSharding) else _EVERYWHERE
    if is_traced(leaf.matrices):
        return _on_any_mesh(merged, spec, leaf.experts, leaf.matrices)
    return _on_any_mesh(lambda experts: merged(experts, leaf.matrices), spec, leaf.experts)


def settled(array: Array, home: Any) -> Array:
    """A merged array moved to its sharding, where the compiler chose another: over Auto axes beside Explicit ones.

    Args:
        array: Of `merge_array`.
        home: Its sharding, of `home_of`.
    """
    if home is None or is_traced(array) or array.sharding.is_equivalent_to(home, array.ndim):
        return array
    moved: Array = jax.device_put(array, home)
    return moved


def _in_rows(pipe: Pipeline, arrays: Any) -> Any:
    """Arrays in the shape in which the pipeline works on them."""
    return jax.tree.map(lambda x: x.reshape(pipe.laid_out(x.shape)), arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _count(
    pipe: Pipeline,
    key: str,
    name: str,
    place: Place,
    stacked: Stacked | None,
    experts: Any,
    base: Any,
    scalars: Any,
    state: Any,
    zero: exact.Zero,
) -> Any:
    """What a round of a measure counts of a whole array, or of each block that it stacks, along axis 0."""
    stage = pipe.stage(key)
    step = stage.round(place, name)

    def counts(experts: Any, base: Any, scalars: Any, state: Any, zero: Any) -> Any:
        def of_tensor(experts: Any, base: Any, scalars: Any, state: Any) -> Any:
            experts, base = _in_rows(pipe, experts), None if base is None else _in_rows(pipe, base)
            index = threefry.flat_index(experts[0].shape)
            return counted(pipe, stage, step, experts, base, scalars, state, index, zero)

        if stacked is None:
            return of_tensor(experts, base, scalars, state)
        own_state = None if stage.measure.scope == "model" else 0
        axes = (stacked.axis, stacked.axis, stacked.axes_of(scalars), own_state)
        return jax.vmap(of_tensor, in_axes=axes)(experts, base, scalars, state)

    return _on_any_mesh(counts, _EVERYWHERE, experts, base, scalars, state, zero)


# --- scalars that depend on more than one entry -------------------------------------------------------------------


def _check_countable(leaf: Column) -> None:
    size = math.prod(leaf.shape)
    if size >= 2**32:
        raise M3Error(f"{leaf.name}: has {size} entries, too many to count in memory: use m3jax merge")


def _at_hand(counts: Array) -> Any:
    """Counts on the host, where small sums need no compilation; traced ones as they are."""
    return counts if is_traced(counts) else np.asarray(counts)


def _added(total: Words | None, counts: Any) -> Words:
    zeros = np.zeros(counts.shape, np.uint32)
    return add_counts((zeros, zeros) if total is None else total, counts)


def _added_blocks(total: Words | None, counts: Any) -> Words:
    """Counts of all blocks of a leaf added up: half words first, whose sums have room for 2¹⁶ blocks."""
    xp: Any = jnp if is_traced(counts) else np
    half = np.uint32(16)
    low = xp.sum(counts & np.uint32(0xFFFF), axis=0, dtype=np.uint32)
    high = xp.sum(counts >> half, axis=0, dtype=np.uint32)
    words = _added(_added(total, low), high << half)
    return words[0] + (high >> half), words[1]


def _largest(total: Any, counts: Any) -> Any:
    return counts if total is None else (jnp if is_traced(total, counts) else np).maximum(total, counts)


def _largest_blocks(total: Any, counts: Any) -> Any:
    return _largest(total, counts.max(axis=0))


def _ahead(group: list[Column], count: Callable[[Column], Any]) -> Iterator[tuple[Column, Any]]:
    """Counts of every leaf of a group in order; a few are under way at a time, so that a device need not wait."""
    under_way: list[tuple[Column, Any]] = []
    for leaf in group:
        _check_countable(leaf)
        under_way.append((leaf, count(leaf)))
        if len(under_way) > _AHEAD:
            done, counts = under_way.pop(0)
            yield done, _at_hand(counts)
    for done, counts in under_way:
        yield done, _at_hand(counts)


def _totals(pipe: Pipeline, stage: Stage, step: Round, place: Place, group: list[Column], state: Any, zero: Any) -> Any:
    def count(leaf: Column) -> Any:
        experts, base = brought(leaf)
        return _count(pipe, stage.key, step.name, place, leaf.stacked, experts, base, leaf.scalars, state, zero)

    together = stage.measure.scope == "model"
    reductions = (_largest, _largest_blocks) if step.reduction == "max" else (_added, _added_blocks)
    total: Any = None
    for leaf, counts in _ahead(group, count):
        total = reductions[together and leaf.stacked is not None](total, counts)
    return total


def _platform_of(array: Any) -> str:
    if isinstance(array, jax.Array) and not is_traced(array):
        platforms = {device.platform for device in array.devices()}
        return "cpu" if platforms == {"cpu"} else (platforms - {"cpu"}).pop()
    return jax.default_backend()


def _piece(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], stacked)


def _state(pipe: Pipeline, stage: Stage, group: list[Column], zero: exact.Zero) -> Any:
    """The last state of a measure over a group of leaves; over a leaf that stacks blocks, each block's own."""
    leaf, options = group[0], stage.options(pipe)
    together = stage.measure.scope == "model"
    by_block = leaf.stacked is not None and not together
    lines = {"row": leaf.shape[:-1], "column": pipe.laid_out(leaf.shape)[-1:]}
    entries = sum(each.experts[0].size for each in group) if together else math.prod(leaf.shape)
    extent = Extent(entries, lines.get(stage.measure.scope, ()), pipe.num_experts)
    place = Place(False, _platform_of(leaf.experts[0]), 0)
    with about(leaf.name):
        begun = [stage.begin(pipe, own, extent) for own in (leaf.settings if by_block else leaf.settings[:1])]
    state = joined(begun) if by_block else begun[0]
    for step in stage.measure.rounds(place):

        def advance(state: Any, totals: Any, step: Round = step) -> Any:
            return stage.measure.advance(options, step.name, state, totals)

        def go(state: Any, step: Round = step, advance: Callable[..., Any] = advance) -> Any:
            totals = _totals(pipe, stage, step, place, group, state, zero)
            if not by_block:
                return advance(state, totals)
            if is_traced(state, totals):
                return jax.vmap(advance)(state, totals)
            return joined([advance(_piece(state, i), _piece(totals, i)) for i in range(len(leaf.settings))])

        if step.repeats > 1 and zero is None:  # traced: one loop keeps the program as small as one step
            state = lax.fori_loop(0, step.repeats, lambda _, now: go(now), jax.tree.map(jnp.asarray, state))
            continue
        for _ in range(step.repeats):
            state = go(state)
    return state


def _concluded(pipe: Pipeline, stage: Stage, leaf: Column, state: Any) -> Column:
    """A leaf with what a measure concludes from its last state."""
    options, conclude = stage.options(pipe), stage.measure.conclude
    alike = leaf.stacked is None or not leaf.stacked.varied
    if leaf.stacked is None or (stage.measure.scope == "model" and alike):
        return leaf._replace(scalars=with_found(pipe, leaf.scalars, stage, state, leaf.settings[0]))
    if stage.measure.scope == "model":
        found = joined([conclude(options, state, own) for own in leaf.settings])
    elif alike and is_traced(state, leaf.settings):
        found = jax.vmap(lambda own: conclude(options, own, leaf.settings[0]))(state)
    else:
        found = joined([conclude(options, _piece(state, i), own) for i, own in enumerate(leaf.settings)])
    return leaf._replace(
        scalars=with_conclusion(leaf.scalars, stage, found),
        stacked=leaf.stacked._replace(found=leaf.stacked.found | {stage.key}),
    )


def measured(pipe: Pipeline, leaves: list[Column], zero: exact.Zero) -> list[Column]:
    """Leaves with the scalars that depend on their entries.

    Args:
        pipe: What is done.
        leaves: All parameters that are merged.
        zero: A run-time zero, or None inside a trace.

    Returns:
        The leaves with everything concluded that the sparsifier and the method measure.

    Raises:
        M3Error: A leaf has too many entries to be counted in 32 bits.
    """
    for stage in pipe.stages:
        needed = [leaf for leaf in leaves if stage.needed(pipe, leaf.settings[0])]
        together = needed and stage.measure.scope == "model"
        concluded: dict[int, Column] = {}
        for group in [leaves] if together else [[leaf] for leaf in needed]:
            state = _state(pipe, stage, group, zero)
            for leaf in group:
                with about(leaf.name):
                    concluded[id(leaf)] = _concluded(pipe, stage, leaf, state)
        leaves = [concluded.get(id(leaf), leaf) for leaf in leaves]
    return leaves
