"""A parameter of all models in memory: where it lies, what is measured of it, and its merge.

The jitted functions here see whole arrays, on one device or on many, under meshes with Auto or Explicit axes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, UInt32
from numpy.typing import DTypeLike

from m3jax.arithmetic import exact, threefry
from m3jax.arithmetic.double import Double
from m3jax.errors import M3Error
from m3jax.methods import leaf as pipeline
from m3jax.methods import magnitude, slerp, ties
from m3jax.methods.base import Scalars, per_expert
from m3jax.methods.leaf import LeafSettings, Pipeline
from m3jax.trees.matching import is_traced

_EVERYWHERE = PartitionSpec()  # type: ignore[no-untyped-call]
_AHEAD = 4  # counts dispatched before the first is waited for


class Leaf(NamedTuple):
    """One parameter of all models, and the scalars found for it so far.

    Attributes:
        name: Its path joined by dots.
        experts: One array per expert.
        base: The base's array, where task vectors are taken from it.
        template: The array whose dtype and sharding the merged one gets: the base's, or else the first expert's.
        settings: Its weights and densities.
        scalars: What they fold into, and what was measured.
    """

    name: str
    experts: tuple[Array, ...]
    base: Array | None
    template: Array
    settings: LeafSettings
    scalars: Scalars


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


def home_of(leaf: Leaf) -> Any:
    """The sharding that the leaf's merged array gets: the template's, or else the first that someone chose.

    Args:
        leaf: A parameter.

    Returns:
        A `jax.sharding.Sharding`; None where it is left to JAX: nothing is placed, or a trace knows only Auto axes.
    """
    arrays = [leaf.template, *leaf.experts]
    if is_traced(leaf.template, leaf.experts, leaf.base):
        return next((sharding for x in arrays if (sharding := _explicit(x)) is not None), None)
    placed = [x for x in arrays if isinstance(x, jax.Array)]
    chosen = [x for x in placed if len(x.sharding.device_set) > 1 or getattr(x, "committed", True)]
    return chosen[0].sharding if chosen else None


def brought(leaf: Leaf) -> tuple[tuple[Array, ...], Array | None]:
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def merge_array(
    pipe: Pipeline, dtype: DTypeLike, home: Any, experts: Any, base: Any, scalars: Any, zero: exact.Zero
) -> Array:
    """The merged parameter.

    Args:
        pipe: What is done.
        dtype: Of the result.
        home: The result's sharding, of `home_of`.
        experts: One array per expert.
        base: The base's array, where it is used.
        scalars: Of the leaf, with what `measured` found.
        zero: A run-time zero, or None inside a trace; see `exact.fence`.

    Returns:
        The array, rounded once.
    """

    def merged(experts: Any, base: Any, scalars: Any, zero: Any) -> Array:
        index = threefry.flat_index(experts[0].shape)
        return pipeline.merged_leaf(pipe, experts, base, scalars, index, zero, dtype)

    if not isinstance(home, NamedSharding):
        return merged(experts, base, scalars, zero)
    if AxisType.Explicit in home.mesh.axis_types:
        return _on_any_mesh(merged, _explicit_part(home), experts, base, scalars, zero)
    placed: Array = lax.with_sharding_constraint(merged(experts, base, scalars, zero), home)  # type: ignore[no-untyped-call]
    return placed


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


def _ranked(pipe: Pipeline, stage: str, experts: Any, base: Any, scalars: Any, zero: exact.Zero) -> tuple[Array, ...]:
    """The values whose magnitudes a stage ranks."""
    if stage == "sparsify":
        return pipeline.ranked_by_sparsifier(pipe, experts, base)
    index = threefry.flat_index(experts[0].shape)
    return pipeline.ranked_by_trim(pipe, experts, base, scalars, index, zero)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _tally(
    pipe: Pipeline, stage: str, shift: int, low: Any, experts: Any, base: Any, scalars: Any, zero: exact.Zero
) -> UInt32[Array, "n 65536"]:
    def tallied(low: Any, *operands: Any) -> Array:
        return magnitude.tally(magnitude.bins(_ranked(pipe, stage, *operands), low, shift))

    return _on_any_mesh(tallied, _EVERYWHERE, low, experts, base, scalars, zero)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_below(
    pipe: Pipeline, stage: str, shift: Any, low: Any, experts: Any, base: Any, scalars: Any, zero: exact.Zero
) -> UInt32[Array, "n 7"]:
    def counted(low: Any, shift: Any, *operands: Any) -> Array:
        return magnitude.count_below(_ranked(pipe, stage, *operands), low, shift)

    return _on_any_mesh(counted, _EVERYWHERE, low, shift, experts, base, scalars, zero)


@functools.partial(jax.jit, static_argnums=0)
def _sign_counts(pipe: Pipeline, experts: Any, base: Any, scalars: Any, zero: exact.Zero) -> UInt32[Array, "2"]:
    def counted(experts: Any, base: Any, scalars: Any, zero: Any) -> Array:
        index = threefry.flat_index(experts[0].shape)
        values = pipeline.sparse_values(pipe, experts, base, scalars, index, zero)
        return jnp.stack([jnp.sum(where, dtype=jnp.uint32) for where in ties.sign_counts(values, scalars, zero)])

    return _on_any_mesh(counted, _EVERYWHERE, experts, base, scalars, zero)


@jax.jit
def _largest(experts: Any, zero: exact.Zero) -> UInt32[Array, "3"]:
    def found(experts: Any, zero: Any) -> Array:
        return slerp.largest(tuple(exact.widen(x) for x in experts), zero)

    return _on_any_mesh(found, _EVERYWHERE, experts, zero)


@jax.jit
def _integer_sums(experts: Any, largest: Any, zero: exact.Zero) -> UInt32[Array, "2 3 limbs"]:
    def summed(experts: Any, largest: Any, zero: Any) -> Array:
        return slerp.integer_sums(tuple(exact.widen(x) for x in experts), largest, zero)

    return _on_any_mesh(summed, _EVERYWHERE, experts, largest, zero)


def _at_hand(counts: Array) -> Any:
    """Counts on the host, where small sums need no compilation; traced ones as they are."""
    return counts if is_traced(counts) else np.asarray(counts)


# --- scalars that depend on more than one entry -------------------------------------------------------------------


def _check_countable(leaf: Leaf) -> None:
    if leaf.experts[0].size >= 2**32:
        raise M3Error(f"{leaf.name}: has {leaf.experts[0].size} entries, too many to rank in memory: use m3jax merge")


def _counted(group: list[Leaf], empty: tuple[int, ...], count: Callable[..., Array]) -> magnitude.Count:
    """Counts of every leaf of a group, added up; a few are under way at a time, so that a device need not wait."""
    total: Any = (np.zeros(empty, np.uint32),) * 2
    under_way: list[Array] = []
    for leaf in group:
        _check_countable(leaf)
        experts, base = brought(leaf)
        under_way.append(count(experts, base, leaf.scalars))
        if len(under_way) > _AHEAD:
            total = magnitude.add_counts(total, _at_hand(under_way.pop(0)))
    for counts in under_way:
        total = magnitude.add_counts(total, _at_hand(counts))
    return total  # type: ignore[no-any-return]


def _counts_by_scatter(array: Any) -> bool:
    """Whether magnitudes are tallied into bins: two readings with a scatter, good on CPUs, or else eleven without."""
    if isinstance(array, jax.Array) and not is_traced(array):
        return all(device.platform == "cpu" for device in array.devices())
    return jax.default_backend() == "cpu"


def _threshold(
    pipe: Pipeline, stage: str, group: list[Leaf], densities: tuple[float, ...], zero: exact.Zero
) -> UInt32[Any, " n"]:
    """Bits of each expert's smallest kept magnitude over a group of leaves."""
    search = magnitude.start(sum(leaf.experts[0].size for leaf in group), densities)
    if not _counts_by_scatter(group[0].experts[0]):
        return _threshold_by_counting(pipe, stage, group, search, zero)
    for shift in (magnitude.COARSE, magnitude.FINE):
        tally = functools.partial(_tally, pipe, stage, shift, search.low)
        total = _counted(group, (pipe.num_experts, magnitude.BINS), functools.partial(tally, zero=zero))
        search, _ = magnitude.advance(search, total, shift)
    return search.low


def _threshold_by_counting(
    pipe: Pipeline, stage: str, group: list[Leaf], search: magnitude.Search, zero: exact.Zero
) -> UInt32[Any, " n"]:
    def narrow(step: Any, search: magnitude.Search) -> magnitude.Search:
        shift = magnitude.digit_shift(step)
        count = functools.partial(_count_below, pipe, stage, shift, search.low, zero=zero)
        return magnitude.advance_digit(search, _counted(group, (pipe.num_experts, 7), count), shift)

    if zero is None:  # traced: one loop keeps the program as small as one step
        return lax.fori_loop(0, magnitude.STEPS, narrow, jax.tree.map(jnp.asarray, search)).low
    for step in range(magnitude.STEPS):
        search = narrow(step, search)
    return search.low


def _with_thresholds(pipe: Pipeline, leaves: list[Leaf], zero: exact.Zero) -> list[Leaf]:
    """Leaves with the thresholds of the magnitude sparsifier and of TIES's trim."""
    stages: list[tuple[str, str, str, float | tuple[float, ...]]] = []
    if pipe.sparsifier is not None and pipe.sparsifier.name == "magnitude":
        stages.append(("sparsify", "drop_below", pipe.sparsifier.scope, pipe.sparsifier.density))
    if pipe.method.density is not None:
        stages.append(("trim", "trim_below", pipe.method.trim_scope, pipe.method.density))
    for stage, field, scope, density in stages:
        densities = per_expert(density, pipe.num_experts)
        groups = [leaves] if scope == "model" else [[leaf] for leaf in leaves]
        found = []
        for group in groups:
            below = _threshold(pipe, stage, group, densities, zero)
            found += [leaf._replace(scalars=leaf.scalars._replace(**{field: below})) for leaf in group]
        leaves = found
    return leaves


def _majority_sign(pipe: Pipeline, leaves: list[Leaf], zero: exact.Zero) -> Int32[Array, ""]:
    return ties.majority(_counted(leaves, (2,), functools.partial(_sign_counts, pipe, zero=zero)))


def _arc_coefficients(leaf: Leaf, zero: exact.Zero) -> Any:
    """Slerp's two coefficients: on the host, or by a callback to it where values are traced."""
    experts, _ = brought(leaf)
    largest = _largest(experts, zero)
    sums = _integer_sums(experts, largest, zero)
    (position,) = leaf.settings.weights
    if isinstance(position, Double):
        return slerp.traced_coefficients(largest, sums, position.high)
    if is_traced(largest):
        return slerp.traced_coefficients(largest, sums, jnp.float32(position))
    return slerp.coefficients(np.asarray(largest), np.asarray(sums), position)[0]


def measured(pipe: Pipeline, leaves: list[Leaf], zero: exact.Zero) -> list[Leaf]:
    """Leaves with the scalars that depend on their entries.

    Args:
        pipe: What is done.
        leaves: All parameters that are merged.
        zero: A run-time zero, or None inside a trace.

    Returns:
        The leaves with thresholds, the majority's sign and slerp's coefficients, as far as the method needs them.

    Raises:
        M3Error: A leaf has too many entries to be counted in 32 bits.
    """
    leaves = _with_thresholds(pipe, leaves, zero)
    if pipe.method.sign_election == "unweighted":
        sign = _majority_sign(pipe, leaves, zero)
        leaves = [leaf._replace(scalars=leaf.scalars._replace(tie_sign=sign)) for leaf in leaves]
    if pipe.method.interpolates:
        leaves = [
            leaf._replace(scalars=leaf.scalars._replace(coefficients=_arc_coefficients(leaf, zero))) for leaf in leaves
        ]
    return leaves
