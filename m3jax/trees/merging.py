"""merge(): parameter trees in, a parameter tree out; pure, under jit, on any sharding."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, PyTree
from numpy.typing import DTypeLike

from m3jax.arithmetic import threefry
from m3jax.arithmetic.double import Double
from m3jax.errors import M3Error
from m3jax.methods import linear
from m3jax.methods.base import Method, Settings, Sparsifier
from m3jax.methods.leaf import LeafScalars, Pipeline, check_pipeline, scalars_from, settings_of
from m3jax.methods.mixup import Mixup, draw
from m3jax.naming import block_group
from m3jax.trees import arrays, matching
from m3jax.trees.arrays import Column
from m3jax.trees.matching import is_traced
from m3jax.trees.matching import leaf_name as leaf_name
from m3jax.trees.matching import named_leaves as named_leaves

Weights = Mixup | Mapping[str, ArrayLike] | Sequence[ArrayLike] | ArrayLike | None


def _as_scalars(values: Any, count: int, where: str) -> tuple[Any, ...]:
    """`count` scalars, host floats where they are known and `Double`s where they are traced."""
    if is_traced(values):
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
    method, count = pipe.method, pipe.num_weights
    if weights is not None and not count:
        raise M3Error(f"{method.name}: takes no weights, but some are given: leave them out")
    if weights is None:
        return (0.5,) if method.weighting == "position" else (1.0,) * count
    if isinstance(weights, Mixup):
        if key is None:
            raise M3Error("mixup: weights are drawn from a key, but none is given: pass key=jax.random.key(seed)")
        if is_traced(key):
            raise M3Error(
                "mixup: weights are drawn on the host, but the key is traced: before jit or vmap, draw them with "
                "weights = numpy.array([m3jax.draw_weights(k, alpha) for k in keys]), and map merge over weights"
            )
        return draw(method.weighting, key, weights.alpha, count, group)
    if isinstance(weights, Mapping):
        if group is None or group not in weights:
            raise M3Error(f"weights: none given for {group}")
        return _as_scalars(weights[group], count, str(group))
    return _as_scalars(weights, count, "merge")


def _columns_to_merge(
    pipe: Pipeline, columns: Mapping[str, list[Any]], has_base: bool, weights: Weights, key: Any
) -> list[Column]:
    """The parameters, with the scalars that are known before any entry is looked at."""
    root = None if key is None else threefry.key_words(key)

    @functools.cache
    def shared(group: str | None) -> tuple[Settings, Any]:
        """What the leaves of a group share: traced weights are folded once for all of them."""
        settings = settings_of(pipe, _group_weights(pipe, weights, key, group), pipe.method.scale)
        return settings, pipe.method.fold(pipe.method.options, settings)

    @functools.cache
    def scalars_of(group: str | None, shape: tuple[int, ...]) -> LeafScalars:
        settings, folded = shared(group)
        return scalars_from(pipe, settings, shape, None, folded)

    leaves = []
    for name, column in columns.items():
        group, experts = _group(weights, name), tuple(column[-pipe.num_experts :])
        scalars = scalars_of(group, np.shape(experts[0]))
        if pipe.random:
            scalars = scalars._replace(mask_keys=threefry.pair_keys(root, name, pipe.num_experts))
        own_base = column[0] if has_base and pipe.uses_base else None
        leaves.append(Column(name, experts, own_base, column[0], shared(group)[0], scalars))
    return leaves


def _last_uses(leaves: list[Column], kept: Sequence[Any]) -> list[list[jax.Array]]:
    """For each leaf, the experts' arrays that no later leaf and nothing of `kept` needs."""
    seen = {id(array) for array in kept}
    uses: list[list[jax.Array]] = []
    for leaf in reversed(leaves):
        last = {id(x): x for x in leaf.experts if isinstance(x, jax.Array) and id(x) not in seen}
        seen |= set(last)
        uses.append(list(last.values()))
    return uses[::-1]


def merge(
    experts: Sequence[PyTree],
    method: Method | None = None,
    *,
    base: PyTree | None = None,
    weights: Weights = None,
    sparsify: Sparsifier | None = None,
    key: Any = None,
    dtype: DTypeLike | None = None,
    only: matching.Only = None,
    donate: bool = False,
) -> PyTree:
    """Merge parameter trees; the bits do not depend on jit, device, mesh or sharding.

    Runs eagerly (each distinct leaf shape is compiled once) or inside the caller's jit, with parameters, weights and
    key traced, on meshes with Auto or Explicit axes. Differentiable in the parameters and the weights, and `vmap` over
    weights and keys gives a batch of merges. Slerp in a trace calls back to the host for its angles.

    Args:
        experts: n ≥ 1 trees of float32, bfloat16 or float16 arrays: dicts (nested or flat), linen variables, Flax
            states and modules, dataclasses, any pytree. Leaves are matched by name, their path joined by dots. Other
            dtypes (integer buffers) are copied when equal.
        method: Of `m3jax.methods`; default `linear()`, the average.
        base: The tree that task vectors are taken from, for methods that use them.
        weights: n numbers for the whole model; a mapping from leaf name to n numbers; `mixup(alpha)` to draw them
            (M³); None for ones. For slerp, one position t instead of n numbers.
        sparsify: `dare(density)` or `magnitude(density)`, applied before the method.
        key: Integer seed or threefry2x32 key for DARE's masks and M³'s draws. Draws need a key known on the host.
        dtype: Of merged leaves; default: each leaf's dtype in the base, or else in the first expert.
        only: What is merged; the other leaves come from the base, or else from the first expert, as they are, and
            need not be equal in the other trees or even be there. A collection or several: "params" of linen variables
            or of a train state (the first key of a path), and of `nnx.State` what is `nnx.Param`. Or a type of
            `nnx.Variable`, or a predicate on leaf names. Default: every leaf.
        donate: Free each array of the experts once it is merged, so that no more than inputs and one leaf are in
            memory; the base's arrays are kept. In a trace this has no effect: there the caller's `donate_argnums` has.

    Returns:
        A tree like the base, or else like the first expert, of the same type, its leaves sharded as there.

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
    check_pipeline(pipe, base is not None)
    if sparsify is not None and sparsify.random and key is None:
        raise M3Error(f"{sparsify.name}: masks are drawn from a key, but none is given: pass key=jax.random.key(seed)")
    models, labels = list(experts), [f"expert {i}" for i in range(len(experts))]
    if base is not None:
        models, labels = [base, *models], ["the base", *labels]
    by_name, chosen = matching.match(models, labels, only)
    template = by_name[0]
    merged_names = [name for name in template if name in chosen and matching.is_parameter(template[name])]
    if method.copies and method.scale == 1.0 and dtype is None:
        merged_names = []  # the template is the one expert
    columns = {name: [tree[name] for tree in by_name] for name in merged_names}
    # Under a jit whose arguments are none of the merge's, a zero would be a constant of the program, and no fence.
    in_trace = is_traced(columns, weights, key, jnp.zeros((), jnp.uint32))
    zero: Any = None if in_trace else np.uint32(0)

    leaves = arrays.measured(pipe, _columns_to_merge(pipe, columns, base is not None, weights, key), zero)
    kept = [leaf for name, leaf in template.items() if base is not None or name not in columns]
    doomed = _last_uses(leaves, kept) if donate and not in_trace else [[]] * len(leaves)
    merged = dict(template)
    for leaf, free in zip(leaves, doomed, strict=True):
        out, home = jnp.dtype(dtype or leaf.template.dtype), arrays.home_of(leaf)
        array = arrays.merge_array(pipe, out, home, *arrays.brought(leaf), leaf.scalars, zero)
        merged[leaf.name] = arrays.settled(array, home)
        for used in free:
            used.delete()
    return jax.tree.unflatten(jax.tree.structure(models[0]), list(merged.values()))
