"""Parameter trees: the names of their leaves, which of them are merged, and how several trees differ."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from m3jax.arithmetic import exact
from m3jax.errors import M3Error

Only = str | Sequence[str] | type | Callable[[str], bool] | None
"""Which leaves are merged: collections by name, a type of `flax.nnx.Variable`, or a predicate on names; None: all."""

_SHOWN = 10  # names listed of each kind of difference


class Leaf(NamedTuple):
    """A leaf of a tree.

    Attributes:
        value: An array.
        top: The first key of its path.
        box: The Flax variable or metadata box around it, if any.
    """

    value: Any
    top: str
    box: Any = None


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
            yield leaf_name((*path, *inner[1:])), Leaf(value, leaf_name(path[:1]), box)


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


def _selected(leaves: dict[str, Leaf], only: Only) -> set[str]:
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


def _equal(one: Any, other: Any) -> bool:
    """Whether two buffers are equal; taken to be where they are traced."""
    if one is other or is_traced(one, other):
        return True
    if any(isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in (one, other)):
        return _kind(one) == _kind(other) and _equal(jax.random.key_data(one), jax.random.key_data(other))
    return np.array_equal(np.asarray(one), np.asarray(other))


def _differences(one: dict[str, Leaf], other: dict[str, Leaf], label: str, other_label: str) -> list[str]:
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
        elif not is_parameter(a) and not _equal(a, b):
            buffers.append(f"{name} ({_kind(a)})")
    pair = f"{label} and {other_label}"
    clauses = [f"shapes in {pair} differ: {_listed(shapes)}"] if shapes else []
    clauses += [f"dtypes in {pair} cannot be merged: {_listed(kinds)}"] if kinds else []
    copied = f"only {', '.join(exact.FLOAT_DTYPES)} are merged, and what is copied must be equal, but in {pair} differ"
    return clauses + ([f"{copied}: {_listed(buffers)}"] if buffers else [])


def match(trees: Sequence[PyTree], labels: Sequence[str], only: Only) -> tuple[list[dict[str, Any]], set[str]]:
    """The leaves of every tree by name, checked to fit together.

    Args:
        trees: The template, and the trees that must have the leaves of it that are merged.
        labels: What each is called in messages.
        only: What is merged.

    Returns:
        The leaves of each tree, and the names of those that are merged.

    Raises:
        M3Error: `only` selects nothing, or the trees differ; every difference is in the message.
    """
    first, *others = (leaves_of(tree) for tree in trees)
    chosen = _selected(first, only)
    if not chosen and only is not None:
        there = sorted(
            {leaf.top for leaf in first.values()} | {k for v in first.values() for k in _variable_names(v.box)}
        )
        raise M3Error(f"only: selects no leaf of {labels[0]}: its collections are {_listed(there)}")
    reference = {name: leaf for name, leaf in first.items() if name in chosen}
    clauses = []
    for other, label in zip(others, labels[1:], strict=True):
        missing = [name for name in reference if name not in other]
        selected = _selected(other, only)
        extra = [name for name in other if name in selected and name not in reference]
        clauses += [f"missing in {label}: {_listed(missing)}"] if missing else []
        clauses += [f"in {label} but not in {labels[0]}: {_listed(extra)}"] if extra else []
        clauses += _differences(reference, other, labels[0], label)
    if clauses:
        raise M3Error("the trees to merge differ: " + "; ".join(clauses))
    return [{name: leaf.value for name, leaf in tree.items()} for tree in (first, *others)], chosen
