"""merge(): parameter trees in, a parameter tree out; pure, under jit, on any sharding."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int32, PyTree, UInt32
from numpy.typing import DTypeLike

from m3jax import bits, exact, pipeline
from m3jax.double import Double
from m3jax.errors import M3Error
from m3jax.methods import linear, magnitude, slerp, ties
from m3jax.methods.types import Method, Scalars, Sparsifier, per_expert
from m3jax.mixing import Mixup, draw_position, draw_weights
from m3jax.naming import block_group
from m3jax.pipeline import LeafSettings, Pipeline

Weights = Mixup | Mapping[str, ArrayLike] | Sequence[ArrayLike] | ArrayLike | None


class _Leaf(NamedTuple):
    """One parameter of all models, and the scalars found for it so far."""

    name: str
    experts: tuple[Array, ...]
    base: Array | None
    settings: LeafSettings
    scalars: Scalars


def leaf_name(path: Sequence[Any]) -> str:
    """A leaf's name: the keys of its path joined by dots.

    Args:
        path: As `jax.tree_util.tree_flatten_with_path` gives it.
    """
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by name, in the tree's order.

    Raises:
        M3Error: Two leaves have one name.
    """
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {leaf_name(path): leaf for path, leaf in pairs}
    if len(named) < len(pairs):
        names = [leaf_name(path) for path, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise M3Error(f"{twice}: is the name of two leaves (a dotted key and a path): rename one")
    return named


# --- jitted pieces, compiled once per (pipeline, shapes, dtypes, shardings) ---------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def _merge_array(pipe: Pipeline, dtype: DTypeLike, experts: Any, base: Any, scalars: Any, zero: exact.Zero) -> Array:
    index = bits.flat_index(experts[0].shape)
    return pipeline.merged_leaf(pipe, experts, base, scalars, index, zero, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _tally(
    pipe: Pipeline, stage: str, shift: int, low: Any, experts: Any, base: Any, scalars: Any, zero: exact.Zero
) -> UInt32[Array, "n 65536"]:
    if stage == "sparsify":
        values = pipeline.ranked_by_sparsifier(pipe, experts, base)
    else:
        index = bits.flat_index(experts[0].shape)
        values = pipeline.ranked_by_trim(pipe, experts, base, scalars, index, zero)
    return magnitude.tally(magnitude.bins(values, low, shift))


@functools.partial(jax.jit, static_argnums=0)
def _sign_counts(pipe: Pipeline, experts: Any, base: Any, scalars: Any, zero: exact.Zero) -> UInt32[Array, "2"]:
    index = bits.flat_index(experts[0].shape)
    values = pipeline.sparse_values(pipe, experts, base, scalars, index, zero)
    return jnp.stack([jnp.sum(where, dtype=jnp.uint32) for where in ties.sign_counts(values, scalars, zero)])


@jax.jit
def _largest(experts: Any, zero: exact.Zero) -> UInt32[Array, "3"]:
    return slerp.largest(tuple(exact.widen(x) for x in experts), zero)


@jax.jit
def _integer_sums(experts: Any, largest: Any, zero: exact.Zero) -> UInt32[Array, "2 3 limbs"]:
    return slerp.integer_sums(tuple(exact.widen(x) for x in experts), largest, zero)


def _at_hand(counts: Array) -> Any:
    """Counts on the host, where small sums need no compilation; traced ones as they are."""
    return counts if _traced(counts) else np.asarray(counts)


# --- scalars that depend on more than one entry -------------------------------------------------------------------


def _check_countable(leaf: _Leaf) -> None:
    if leaf.experts[0].size >= 2**32:
        raise M3Error(f"{leaf.name}: has {leaf.experts[0].size} entries, too many to rank in memory: use m3jax merge")


def _threshold(
    pipe: Pipeline, stage: str, group: list[_Leaf], densities: tuple[float, ...], zero: exact.Zero
) -> UInt32[Any, " n"]:
    """Bits of each expert's smallest kept magnitude over a group of leaves."""
    search = magnitude.start(sum(leaf.experts[0].size for leaf in group), densities)
    for shift in (magnitude.COARSE, magnitude.FINE):
        total: Any = (np.zeros((pipe.num_experts, magnitude.BINS), np.uint32),) * 2
        for leaf in group:
            _check_countable(leaf)
            counts = _tally(pipe, stage, shift, search.low, leaf.experts, leaf.base, leaf.scalars, zero)
            total = magnitude.add_counts(total, _at_hand(counts))
        search, _ = magnitude.advance(search, total, shift)
    return search.low


def _with_thresholds(pipe: Pipeline, leaves: list[_Leaf], zero: exact.Zero) -> list[_Leaf]:
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


def _majority_sign(pipe: Pipeline, leaves: list[_Leaf], zero: exact.Zero) -> Int32[Array, ""]:
    total: Any = (np.zeros(2, np.uint32),) * 2
    for leaf in leaves:
        _check_countable(leaf)
        counts = _sign_counts(pipe, leaf.experts, leaf.base, leaf.scalars, zero)
        total = magnitude.add_counts(total, _at_hand(counts))
    return ties.majority(total)


def _traced(*values: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def _arc_coefficients(leaf: _Leaf, zero: exact.Zero) -> Any:
    """Slerp's two coefficients: on the host, or by a callback to it where values are traced."""
    largest = _largest(leaf.experts, zero)
    sums = _integer_sums(leaf.experts, largest, zero)
    (position,) = leaf.settings.weights
    if isinstance(position, Double):
        return slerp.traced_coefficients(largest, sums, position.high)
    if _traced(largest):
        return slerp.traced_coefficients(largest, sums, jnp.float32(position))
    return slerp.coefficients(np.asarray(largest), np.asarray(sums), position)[0]


# --- the front door -----------------------------------------------------------------------------------------------


def _matched(trees: Sequence[PyTree], names: Sequence[str]) -> list[dict[str, Any]]:
    """The leaves of every tree by name, checked to be the same names and shapes."""
    found = [named_leaves(tree) for tree in trees]
    reference = found[0]
    complaints = []
    for other, label in zip(found[1:], names[1:], strict=True):
        complaints += [f"{n} is missing in {label}" for n in reference if n not in other]
        complaints += [f"{n} is in {label} but not in {names[0]}" for n in other if n not in reference]
        complaints += [
            f"{n} is {list(np.shape(leaf))} in {names[0]} but {list(np.shape(other[n]))} in {label}"
            for n, leaf in reference.items()
            if n in other and np.shape(leaf) != np.shape(other[n])
        ]
    if complaints:
        more = f", and {len(complaints) - 5} more differences" if len(complaints) > 5 else ""
        raise M3Error("the trees to merge differ: " + "; ".join(complaints[:5]) + more)
    return found


def _as_scalars(values: Any, count: int, where: str) -> tuple[Any, ...]:
    """`count` scalars, host floats where they are known and `Double`s where they are traced."""
    if _traced(values):
        stacked = jnp.stack([jnp.asarray(v) for v in values]) if isinstance(values, list | tuple) else values
        if stacked.shape not in [(count,), (1,) * (stacked.ndim == 1), ()][: 1 if count > 1 else 3]:
            raise M3Error(f"{where}: weights of shape {list(stacked.shape)} given for {count} experts")
        return tuple(Double.of(w) for w in stacked.reshape(count))
    flat = np.asarray(values, np.float64).reshape(-1)
    if flat.size != count:
        raise M3Error(f"{where}: {flat.size} weights given where {count} are needed")
    if not np.isfinite(flat).all():
        raise M3Error(f"{where}: weights {flat.tolist()} are not all finite")
    return tuple(float(w) for w in flat)


def _group(weights: Weights, name: str) -> str | None:
    """The leaves that share their weights with leaf `name`; None for all of them."""
    if isinstance(weights, Mapping):
        return name
    if isinstance(weights, Mixup) and weights.granularity != "model":
        return block_group(name, weights.granularity)
    return None


def _group_weights(pipe: Pipeline, weights: Weights, key: Any, group: str | None) -> tuple[Any, ...]:
    count = 1 if pipe.method.interpolates else pipe.num_experts
    if weights is None:
        return (0.5,) if pipe.method.interpolates else (1.0,) * count
    if isinstance(weights, Mixup):
        if key is None:
            raise M3Error("mixup: weights are drawn from a key, but none is given: pass key=jax.random.key(seed)")
        if pipe.method.interpolates:
            return (draw_position(key, weights.alpha, group),)
        return draw_weights(key, weights.alpha, count, group)
    if isinstance(weights, Mapping):
        if group is None or group not in weights:
            raise M3Error(f"weights: none given for {group}")
        return _as_scalars(weights[group], count, str(group))
    return _as_scalars(weights, count, "merge")


def _copied(name: str, leaves: list[Any], labels: Sequence[str]) -> Any:
    """A leaf that is no float parameter: equal in all models, or an error (not checked where it is traced)."""
    for leaf, label in zip(leaves[1:], labels[1:], strict=True):
        if not _traced(leaves[0], leaf) and not np.array_equal(np.asarray(leaves[0]), np.asarray(leaf)):
            raise M3Error(
                f"{name}: is a buffer of {np.asarray(leaf).dtype}, which is copied, but differs between "
                f"{labels[0]} and {label}: leave it out of the trees"
            )
    return leaves[0]


def _is_parameter(leaf: Any) -> bool:
    return jnp.dtype(leaf.dtype).name in exact.FLOAT_DTYPES if hasattr(leaf, "dtype") else False


def merge(
    experts: Sequence[PyTree],
    method: Method | None = None,
    *,
    base: PyTree | None = None,
    weights: Weights = None,
    sparsify: Sparsifier | None = None,
    key: Any = None,
    dtype: DTypeLike | None = None,
) -> PyTree:
    """Merge parameter trees; the bits do not depend on jit, device, mesh or sharding.

    Runs eagerly (each distinct leaf shape is compiled once) or inside the caller's jit, with parameters, weights and
    key traced. Differentiable in the parameters and the weights.

    Args:
        experts: n ≥ 2 trees of float32, bfloat16 or float16 arrays: dicts (nested or flat), Flax states, any pytree.
            Leaves are matched by name, their path joined by dots. Other dtypes (integer buffers) are copied when
            equal.
        method: Of `m3jax.methods`; default `linear()`, the average.
        base: The tree that task vectors are taken from, for methods that use them.
        weights: n numbers for the whole model; a mapping from leaf name to n numbers; `mixup(alpha)` to draw them
            (M³); None for ones. For slerp, one position t instead of n numbers.
        sparsify: `dare(density)` or `magnitude(density)`, applied before the method.
        key: Integer seed or threefry2x32 key for DARE's masks and M³'s draws. Draws need a key known on the host.
        dtype: Of merged leaves; default: each leaf's dtype in the base, or else in the first expert.

    Returns:
        A tree like the base, or else like the first expert, its leaves sharded as there.

    Raises:
        M3Error: The trees differ, or an argument cannot be used; the message says which.

    Example:
        >>> import jax.numpy as jnp
        >>> import m3jax
        >>> a, b = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
        >>> m3jax.merge([a, b], weights=[0.25, 0.75])["w"].tolist()
        [0.75, 0.75]

    References:
        Zhou et al., Mixup Model Merge, arXiv 2502.15434, 2025.
    """
    method = linear.linear() if method is None else method
    pipe = Pipeline(method, sparsify, len(experts))
    pipeline.check_pipeline(pipe, base is not None)
    if sparsify is not None and sparsify.name == "dare" and key is None:
        raise M3Error("dare: masks are drawn from a key, but none is given: pass key=jax.random.key(seed)")
    labels = [f"expert {i}" for i in range(len(experts))]
    trees = list(experts)
    if base is not None:
        trees, labels = [base, *trees], ["the base", *labels]
    by_name = _matched(trees, labels)
    template = by_name[0]
    zero: Any = None if _traced(trees, weights, key) else np.uint32(0)
    root = None if key is None else bits.key_words(key)

    densities = per_expert(sparsify.density if sparsify is not None else 1.0, pipe.num_experts)
    masked = sparsify is not None and sparsify.name == "dare"

    @functools.cache
    def common(group: str | None) -> tuple[LeafSettings, Scalars]:
        """What the leaves of a group share: traced weights are folded once for all of them."""
        shared = _group_weights(pipe, weights, key, group)
        settings = LeafSettings(shared, densities, (1.0,) * pipe.num_experts, method.scale)
        return settings, pipeline.leaf_scalars(pipe, settings, None)

    leaves, merged = [], {}
    for name in template:
        columns = [tree[name] for tree in by_name]
        if not all(_is_parameter(leaf) for leaf in columns):
            merged[name] = _copied(name, columns, labels)
            continue
        settings, scalars = common(_group(weights, name))
        if masked:
            scalars = scalars._replace(mask_keys=bits.pair_keys(root, name, pipe.num_experts))
        own_base = columns[0] if base is not None and pipe.uses_base else None
        leaves.append(_Leaf(name, tuple(columns[len(columns) - pipe.num_experts :]), own_base, settings, scalars))
    leaves = _with_thresholds(pipe, leaves, zero)
    if method.sign_election == "unweighted":
        sign = _majority_sign(pipe, leaves, zero)
        leaves = [leaf._replace(scalars=leaf.scalars._replace(tie_sign=sign)) for leaf in leaves]
    if method.interpolates:
        leaves = [
            leaf._replace(scalars=leaf.scalars._replace(coefficients=_arc_coefficients(leaf, zero))) for leaf in leaves
        ]
    for leaf in leaves:
        out = jnp.dtype(dtype or template[leaf.name].dtype)
        merged[leaf.name] = _merge_array(pipe, out, leaf.experts, leaf.base, leaf.scalars, zero)
    return jax.tree.unflatten(jax.tree.structure(trees[0]), [merged[name] for name in template])
