"""Parameter trees: the names of their leaves, which of them are merged, and how several trees differ."""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from m3jax.anatomy import MODEL_KINDS, Kind, Part, canonical_names
from m3jax.anatomy.kinds import state_kind
from m3jax.arithmetic import exact
from m3jax.errors import M3Error

Only = str | Sequence[str] | type | Callable[[str], bool] | None
"""Which leaves are merged: collections by name, a type of `flax.nnx.Variable`, or a predicate on names; None: all."""

TRAINING_VARIABLES = ("RngState", "OptState", "OptArray", "OptVariable")
"""Types of `flax.nnx` whose variables are of training and not of the model."""

_SHOWN = 10  # names listed of each kind of difference


class Leaf(NamedTuple):
    """A leaf of a tree.

    Attributes:
        value: An array.
        top: The first key of its path.
        box: The Flax variable or metadata box around it, if any.
        alone: Whether it is all that the box holds.
    """

    value: Any
    top: str
    box: Any = None
    alone: bool = False


def is_traced(*values: Any) -> bool:
    """Whether any leaf of `values` is known only to a trace (jit, grad, vmap)."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf is an array of a dtype that is merged."""
    return getattr(getattr(leaf, "dtype", None), "name", None) in exact.FLOAT_DTYPES


def leaf_name(path: Sequence[Any]) -> str:
    """A leaf's name: the keys of its path joined by dots.

    Args:
        path: As `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
        The name.

    Example:
        >>> paths = [path for path, _ in jax.tree_util.tree_flatten_with_path({"layers": [{"w": 0.0}]})[0]]
        >>> leaf_name(paths[0])
        'layers.0.w'
    """
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _is_box(node: Any) -> bool:
    """Whether a node is one of Flax's boxes around an array; a tree that holds one has imported Flax."""
    homes = (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata"))
    types = [getattr(sys.modules.get(module), name, None) for module, name in homes]
    return isinstance(node, tuple(t for t in types if t is not None))


def _flatten(tree: PyTree) -> Iterator[tuple[str, Leaf]]:
    """Names and leaves in the tree's order; the attribute inside a box is no part of a name."""
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]:
        box = node if _is_box(node) else None
        inside = [((None,), node)] if box is None else jax.tree_util.tree_flatten_with_path(node)[0]
        for inner, value in inside:
            alone = box is not None and len(inner) == 1
            yield leaf_name((*path, *inner[1:])), Leaf(value, leaf_name(path[:1]), box, alone)


def leaves_of(tree: PyTree) -> dict[str, Leaf]:
    """The leaves of a tree by name, in the tree's order, with what selects them.

    Raises:
        M3Error: Two leaves have one name.
    """
    pairs = list(_flatten(tree))
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise M3Error(f"{twice}: is the name of two leaves (a dotted key and a path): rename one")
    return named


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by name, in the tree's order.

    Names are paths joined by dots, so that a nested dict, the flat dict of its dotted names and a `flax.nnx.State` of
    the same parameters agree.

    Args:
        tree: Any pytree.

    Returns:
        The leaves.

    Raises:
        M3Error: Two leaves have one name.

    Example:
        >>> named_leaves({"a": {"b": 1.0}, "c": 2.0})
        {'a.b': 1.0, 'c': 2.0}
    """
    return {name: leaf.value for name, leaf in leaves_of(tree).items()}


def _variable_names(box: Any) -> set[str]:
    """The collections a `flax.nnx.Variable` belongs to, as Flax names them: "params" for nnx.Param."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(box, nnx.Variable):
        return set()
    kinds = [kind for kind in type(box).__mro__ if issubclass(kind, nnx.Variable) and kind is not nnx.Variable]
    return {nnx.variable_name_from_type(kind, allow_register=True) for kind in kinds}


def is_training_state(leaves: Mapping[str, Leaf], name: str) -> bool:
    """Whether a leaf is of training and not of the model, by its name or by its variable's type."""
    nnx = sys.modules.get("flax.nnx")
    types = () if nnx is None else tuple(getattr(nnx, kind) for kind in TRAINING_VARIABLES if hasattr(nnx, kind))
    return state_kind(name) is not None or isinstance(leaves[name].box, types)


def _selected(leaves: Mapping[str, Leaf], only: Only) -> set[str]:
    """The names of the leaves that `only` means in one tree."""
    if only is None:
        return set(leaves)
    if isinstance(only, type):
        return {name for name, leaf in leaves.items() if isinstance(leaf.box, only)}
    if callable(only):
        return {name for name in leaves if only(name)}
    wanted = {only} if isinstance(only, str) else set(only)
    by_key = {name for name, leaf in leaves.items() if leaf.top in wanted}
    return by_key or {name for name, leaf in leaves.items() if _variable_names(leaf.box) & wanted}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _kind(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return type(leaf).__name__ if dtype is None else str(dtype)


def equal_arrays(one: Any, other: Any) -> bool:
    """Whether two arrays are equal, as far as this process holds them; taken to be where they are traced.

    Args:
        one: An array of any kind.
        other: Another of its shape.
    """
    if one is other or is_traced(one, other):
        return True
    if any(isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in (one, other)):
        return _kind(one) == _kind(other) and equal_arrays(jax.random.key_data(one), jax.random.key_data(other))
    sharded = [x for x in (one, other) if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1]
    if not sharded:
        return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=is_parameter(one))
    whole = next((x for x in (one, other) if all(x is not y for y in sharded)), None)
    if whole is None and not sharded[0].sharding.is_equivalent_to(sharded[1].sharding, sharded[0].ndim):
        sharded[1] = jax.device_put(sharded[1], sharded[0].sharding)

    def part_of_other(number: int, index: Any) -> Any:
        return sharded[1].addressable_shards[number].data if whole is None else np.asarray(whole)[index]

    return all(
        np.array_equal(np.asarray(shard.data), np.asarray(part_of_other(i, shard.index)), equal_nan=is_parameter(one))
        for i, shard in enumerate(sharded[0].addressable_shards)
    )


def _differences(
    one: Mapping[str, Leaf], other: Mapping[str, Leaf], merged: Collection[str], label: str, other_label: str
) -> list[str]:
    """How the common leaves of two trees differ, one clause for each kind of difference."""
    shapes, kinds, buffers = [], [], []
    for name in one:
        if name not in other:
            continue
        a, b = one[name].value, other[name].value
        if np.shape(a) != np.shape(b):
            shapes.append(f"{name} ({list(np.shape(a))} and {list(np.shape(b))})")
        elif is_parameter(a) != is_parameter(b):
            kinds.append(f"{name} ({_kind(a)} and {_kind(b)})")
        elif name not in merged and not equal_arrays(a, b):
            buffers.append(f"{name} ({_kind(a)})")
    pair = f"{label} and {other_label}"
    clauses = [f"shapes in {pair} differ: {_listed(shapes)}"] if shapes else []
    clauses += [f"dtypes in {pair} cannot be merged: {_listed(kinds)}"] if kinds else []
    floats = ", ".join(exact.FLOAT_DTYPES)
    copied = f"only parameters of {floats} are merged; what is copied must be equal, but in {pair} differ"
    return clauses + ([f"{copied}: {_listed(buffers)}"] if buffers else [])


def found_in(tree: Mapping[str, Leaf], reference: Iterable[str], parts: Mapping[str, Part]) -> dict[str, str]:
    """What a tree calls the leaves of another: by its name, or else by its canonical name.

    Args:
        tree: Its leaves.
        reference: The names of the other's.
        parts: What the other's leaves are.

    Returns:
        Its names by those of the other; leaves that it lacks are absent.
    """
    found = {name: name for name in reference if name in tree}
    missing = [name for name in reference if name not in found]
    if missing:
        by_canonical = {canonical: name for name, canonical in canonical_names(tree).items() if name not in found}
        found |= {name: by_canonical[c] for name in missing if (c := parts[name].canonical) in by_canonical}
    return found


def match(
    trees: Sequence[Mapping[str, Leaf]], parts: Mapping[str, Part], labels: Sequence[str], only: Only
) -> tuple[list[dict[str, Any]], dict[str, Kind]]:
    """The leaves of every tree by the template's names, checked to fit together.

    Optimizer states, steps and random states are the template's: they need not be equal, or even be there.

    Args:
        trees: The leaves of the template, and of the trees that must have those of it that are merged.
        parts: What the template's leaves are.
        labels: What each tree is called in messages.
        only: What is merged.

    Returns:
        The leaves of each tree, and the kinds of those that are merged: "parameter" or "statistics".

    Raises:
        M3Error: `only` selects nothing that is merged, or the trees differ; every difference is in the message.
    """
    first, *others = trees
    chosen = _selected(first, only)
    if not chosen and only is not None:
        there = sorted(
            {leaf.top for leaf in first.values()} | {k for v in first.values() for k in _variable_names(v.box)}
        )
        raise M3Error(f"only: selects no leaf of {labels[0]}: its collections are {_listed(there)}")
    reference = {name: leaf for name, leaf in first.items() if name in chosen and parts[name].kind in MODEL_KINDS}
    if chosen and not reference and only is not None:
        kinds = sorted({parts[name].kind for name in chosen})
        raise M3Error(
            f"only: all that it selects is of kind {', '.join(kinds)}, which is never merged: select parameters, or "
            "say what the leaves are by anatomy={'kinds': {PATTERN: 'parameter'}}"
        )
    _check_mergeable(reference, parts)
    merged = {
        name: parts[name].kind
        for name, leaf in reference.items()
        if parts[name].kind in {"parameter", "statistics"} and is_parameter(leaf.value)
    }
    clauses, matched = [], [{name: leaf.value for name, leaf in first.items()}]
    for other, label in zip(others, labels[1:], strict=True):
        found = found_in(other, reference, parts)
        own = {name: other[stored] for name, stored in found.items()}
        missing = [name for name in reference if name not in own]
        known = {*found.values(), *reference, *(n for n in first if parts[n].kind not in MODEL_KINDS)}
        selected = _selected(other, only)
        extra = [n for n in other if n in selected and n not in known and not is_training_state(other, n)]
        clauses += [f"missing in {label}: {_listed(missing)}"] if missing else []
        clauses += [f"in {label} but not in {labels[0]}: {_listed(extra)}"] if extra else []
        clauses += _differences(reference, own, merged, labels[0], label)
        matched.append({name: leaf.value for name, leaf in own.items()})
    if clauses:
        raise M3Error("the trees to merge differ: " + "; ".join(clauses))
    return matched, merged


def _check_mergeable(reference: Mapping[str, Leaf], parts: Mapping[str, Part]) -> None:
    """Refuses leaves whose averages mean nothing."""
    for name in reference:
        if parts[name].kind == "adapter":
            raise M3Error(
                f"{name}: is a factor of an adapter, and merging factors is not merging their products: merge these by "
                "lora=SCALE (alpha / rank), or average factors all the same by anatomy={'kinds': {PATTERN: "
                "'parameter'}}"
            )
        if parts[name].kind == "quantised":
            raise M3Error(f"{name}: is of a quantised weight, whose integers cannot be merged: dequantise it first")
