"""Low-rank adapters in parameter trees: W + scale·A·B for the layouts in which JAX libraries train them."""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from m3jax import documents
from m3jax.arithmetic import exact, lowrank
from m3jax.errors import M3Error
from m3jax.trees.matching import Leaf, is_parameter, is_traced, leaves_of
from m3jax.trees.parts import AnatomyOf, tree_of

# How a factor is called, and what of its name is that of the weight; of the last one the weight has one of the names.
_NAMES = (
    re.compile(r"(?P<weight>.+)_lora_(?P<which>[ab])"),  # qwix, and so Tunix
    re.compile(r"(?P<module>(?:.*\.)?)lora_(?P<which>[ab])\.(?P<rest>kernel)"),  # MaxText
    re.compile(r"(?P<module>(?:.*?\.)??)(?:lora\.)?lora_(?P<which>[ab])"),  # flax.nnx.LoRA
    re.compile(r"(?P<module>(?:.*\.)?)lora\.(?P<which>[ab])"),  # Gemma's library
)
_WEIGHTS = ("kernel", "w", "weight", "embedding", "base_module.kernel")  # the last within flax.nnx.LoRA
_BOX = ".value"  # at the end of names in what is read of a file of boxes


class _Pair(NamedTuple):
    """The factors of one weight."""

    a: Any
    b: Any


class _Place(NamedTuple):
    """How factors lie on a weight: which of its axes are A's, and the axis of all three that stacks blocks."""

    axes: tuple[int, ...]
    stacked: int | None


def with_lora(
    params: PyTree,
    a: PyTree = None,
    b: PyTree = None,
    *,
    scale: Any = 1.0,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    anatomy: AnatomyOf = None,
) -> PyTree:
    """Adds low-rank adapters to the weights of a tree: each W becomes W + scale·A·B.

    Factors are matched with weights by name: `X_lora_a` is of `X` (qwix and Tunix: `w_lora_a`), `X.lora_a.kernel` of
    `X.kernel` (MaxText), `X.lora.lora_a` or `X.lora_a` of the kernel of X (`flax.nnx.LoRA`), `X.lora.a` of the weight
    of X (Gemma's library), and in `a` and `b` also `X` itself. A has the axes of W that are summed over, then the rank;
    B the rank, then the other axes; several axes may be one in a factor. Where W stacks blocks, so do both, along the
    same axis. Of a matrix A has the first axis.

    The function is pure: eager, under `jit`, and differentiable. Its bits are those that `m3jax.load("base+adapter")`
    has of the same factors: float32, rank by rank, rounded once to the dtype of W.

    Args:
        params: Weights, and the factors too where `a` and `b` are not given: nested or flat dicts, linen's
            parameters, a `flax.nnx.State`.
        a: The factors A, in a tree of their own.
        b: The factors B.
        scale: alpha / rank, one number for all or a mapping from patterns, searched in weights' names, to numbers.
        axes: Which axes of a weight are A's, by pattern, where shapes leave it open; the stacked axis does not count.
        anatomy: What is known of `params` beside names and shapes, as for `m3jax.merge`: which weights stack blocks.

    Returns:
        A tree like `params`, without the factors that were in it.

    Raises:
        M3Error: There are no factors, one is alone or of no weight, they do not fit its shape or fit it in several
            ways, or a weight is not of float32, bfloat16 or float16.

    Example:
        >>> import numpy as np
        >>> w, a, b = np.zeros((2, 2), np.float32), np.float32([[1], [2]]), np.float32([[3, 4]])
        >>> with_lora({"q": {"w": w, "w_lora_a": a, "w_lora_b": b}}, scale=0.5)["q"]["w"].tolist()
        [[1.5, 2.0], [3.0, 4.0]]

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, 2021.
    """
    leaves = leaves_of(params)
    inside = a is None and b is None
    if not inside and (a is None or b is None):
        raise M3Error("with_lora: one of a and b is given without the other: give both, or none where params has them")
    found = _factors_in(leaves, leaves) if inside else _factors_in(leaves_of(a), leaves, "a")
    other = found if inside else _factors_in(leaves_of(b), leaves, "b")
    pairs = _paired(found, other)
    tree = tree_of(leaves, anatomy)
    zero: Any = None if is_traced(params, a, b, scale, jnp.zeros((), jnp.uint32)) else np.uint32(0)
    values = {name: leaf.value for name, leaf in leaves.items()}
    for name, pair in pairs.items():
        if not is_parameter(values[name]):
            raise M3Error(
                f"{name}: is no float32, bfloat16 or float16, to which alone adapters are added: widen it first"
            )
        place = _place(name, np.shape(values[name]), pair, tree.parts[name].stack_axis, _said(axes, name))
        short = lowrank.are_short(pair.a.dtype, pair.b.dtype)
        factor = _said(scale, name) if isinstance(scale, Mapping) else scale
        if factor is None:
            raise M3Error(f"{name}: has a factor but no scale: add a pattern that is found in its name, such as '.'")
        if not _is_scale(factor):
            raise M3Error(f"{name}: the scale of its factors is {factor!r}, but must be one finite number")
        values[name] = _added(values[name], pair.a, pair.b, jnp.asarray(factor, jnp.float32), zero, place, short)
    added = jax.tree.unflatten(jax.tree.structure(params), list(values.values()))
    return _without(added, {name for name in leaves if inside and _weight_of(name, leaves) is not None})


def with_products(experts: Sequence[PyTree], base: PyTree, scale: Any) -> tuple[list[PyTree], PyTree]:
    """Trees with the products of their factors added, so that they can be merged.

    Args:
        experts: Of which some have factors, beside their weights, or alone, when they are added to the base's.
        base: The base, if there is one, with or without factors of its own.
        scale: As for `with_lora`.

    Raises:
        M3Error: No tree has factors, or as `with_lora`.
    """
    known = [leaves_of(tree) for tree in experts]
    named = [[name for name in leaves if _told_of(name) is not None] for leaves in known]
    own = base is not None and any(_told_of(name) is not None for name in leaves_of(base))
    if not own and not any(named):
        raise M3Error("lora: no tree has factors, which are called as w_lora_a and w_lora_b beside w: leave it out")
    whole = with_lora(base, scale=scale) if own else base

    def added(number: int) -> PyTree:
        if not named[number]:
            return experts[number]
        if len(named[number]) < len(known[number]):
            return with_lora(experts[number], scale=scale)
        if base is None:
            raise M3Error(f"lora: expert {number} has factors alone: give base=, the weights that they were trained on")
        if own:
            raise M3Error(
                f"lora: expert {number} has factors alone, and so has the base some: take those of the base out"
            )
        return with_lora(base, experts[number], experts[number], scale=scale)

    return [added(number) for number in range(len(experts))], whole


# --- Names -----------------------------------------------------------------------------------------------


def _told_of(name: str) -> dict[str, str] | None:
    """What the name of a factor tells of its weight; None of a leaf that is called like none."""
    stem = name.removesuffix(_BOX)
    match = next((found for pattern in _NAMES if (found := pattern.fullmatch(stem))), None)
    return None if match is None else match.groupdict()


def _weight_of(name: str, leaves: Mapping[str, Leaf]) -> tuple[str, str] | None:
    """The weight that a leaf is a factor of, and which factor; None of a leaf that is called like none."""
    told = _told_of(name)
    if told is None:
        return None
    rests = [told["rest"]] if "rest" in told else _WEIGHTS
    stems = [told["weight"]] if "weight" in told else [told["module"] + rest for rest in rests]
    weight = next((weight for stem in stems for weight in (stem, stem + _BOX) if weight in leaves), None)
    if weight is None:
        raise M3Error(f"{name}: is a factor of no weight of the tree, which has no {stems[0]!r}: give its weights")
    return weight, told["which"]


def _factors_in(
    tree: Mapping[str, Leaf], weights: Mapping[str, Leaf], which: str | None = None
) -> dict[tuple[str, str], Any]:
    """The factors of a tree by weight and letter: those that are called so, or of a tree of one letter all."""
    found = {}
    for name, leaf in tree.items():
        key = _weight_of(name, weights)
        if key is None and which is not None:
            if name not in weights:
                raise M3Error(f"{name}: is a leaf of {which} but of no weight in params: give factors alone")
            key = (name, which)
        if key is not None and which in (None, key[1]):
            found[key] = leaf.value
    return found


def _paired(some: Mapping[tuple[str, str], Any], others: Mapping[tuple[str, str], Any]) -> dict[str, _Pair]:
    """The factors of each weight."""
    known = {**some, **others}
    names = dict.fromkeys(weight for weight, _ in known)
    if not names:
        raise M3Error("with_lora: there are no factors: leaves are to be called as w_lora_a and w_lora_b beside w")
    for name in names:
        missing = next((which for which in "ab" if (name, which) not in known), None)
        if missing is not None:
            raise M3Error(f"{name}: has one factor, but no {missing.upper()}: give both")
    return {name: _Pair(known[name, "a"], known[name, "b"]) for name in names}


def _is_scale(scale: Any) -> bool:
    """Whether something is one number, which is finite as far as it is known."""
    kinds = int | float | np.number | np.ndarray | jax.Array
    return isinstance(scale, kinds) and np.ndim(scale) == 0 and (is_traced(scale) or bool(np.isfinite(scale)))


def _said(patterns: Mapping[str, Any] | None, name: str) -> Any:
    """What is said of a weight by the first pattern that is found in its name."""
    try:
        return next((told for text, told in (patterns or {}).items() if documents.pattern(text).search(name)), None)
    except ValueError as error:
        raise M3Error(f"with_lora: a pattern is no regular expression ({error}): correct it") from None


def _without(tree: PyTree, names: set[str], above: str = "") -> PyTree:
    """A tree of mappings without some leaves, and without what is empty then."""
    if not names:
        return tree
    if not isinstance(tree, Mapping):
        raise M3Error("with_lora: factors are taken out of nested mappings only: give nnx.state(model), or a dict")
    kept = {}
    for key, value in tree.items():
        name = f"{above}{key}"
        below = {other for other in names if other.startswith(f"{name}.")}
        inner = _without(value, below, f"{name}.") if below else value
        if name not in names and not (below and not inner):
            kept[key] = inner
    return kept if type(tree) is dict else type(tree)(kept)  # type: ignore[call-arg]


# --- Shapes ----------------------------------------------------------------------------------------------


def _place(name: str, shape: tuple[int, ...], pair: _Pair, stacked: int | None, said: tuple[int, ...] | None) -> _Place:
    """How factors lie on a weight.

    Raises:
        M3Error: They do not, or in several ways.
    """
    shapes = (shape, np.shape(pair.a), np.shape(pair.b))
    for axis in (stacked, None, 0):  # a factor may be shared by all blocks, and some weights have an axis of experts
        if axis is not None and (min(map(len, shapes)) <= axis or len({each[axis] for each in shapes}) > 1):
            continue
        own, of_a, of_b = (each if axis is None else (*each[:axis], *each[axis + 1 :]) for each in shapes)
        fits = [fit for fit in _fits(own, of_a, of_b) if said is None or fit == tuple(said)]
        if len(fits) > 1 and len(own) > 2:
            ways = " or ".join(map(str, fits))
            raise M3Error(f"{name}: A may have its axes {ways}: say which by axes={{PATTERN: {fits[0]}}}")
        if fits:
            return _Place(fits[0], axis)
    told = ", ".join(str(list(each)) for each in shapes)
    raise M3Error(f"{name}: weight, A and B have the shapes {told}, which do not fit: A is [in, rank], B [rank, out]")


def _fits(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The axes of a weight that may be A's, when the others are B's."""
    if len(a) < 2 or len(b) < 2 or not a[-1] or a[-1] != b[0]:
        return
    for count in range(1, len(shape)):
        for axes in combinations(range(len(shape)), count):
            of_a = tuple(shape[axis] for axis in axes)
            of_b = tuple(size for axis, size in enumerate(shape) if axis not in axes)
            flat = axes == tuple(range(count)) and (len(a), len(b)) == (2, 2)
            if (of_a, of_b) == (a[:-1], b[1:]) or (flat and (math.prod(of_a), math.prod(of_b)) == (a[0], b[1])):
                yield axes


@functools.partial(jax.jit, static_argnames=("place", "short"))
def _added(weight: Any, a: Any, b: Any, scale: Any, zero: exact.Zero, place: _Place, short: bool) -> jax.Array:
    """A weight with the product of its factors added."""

    def one(weight: Any, a: Any, b: Any) -> jax.Array:
        rest = tuple(axis for axis in range(weight.ndim) if axis not in place.axes)
        turned = jnp.transpose(weight, (*place.axes, *rest))
        rows = math.prod(weight.shape[axis] for axis in place.axes)
        matrix = turned.reshape(rows, weight.size // rows)
        factors = lowrank.factors(a.reshape(rows, a.shape[-1]), b.reshape(b.shape[0], matrix.shape[1]), scale, zero)
        added = lowrank.add_product(matrix, factors, zero, short)
        return jnp.transpose(added.reshape(turned.shape), tuple(np.argsort((*place.axes, *rest)).tolist()))

    if place.stacked is None:
        return one(weight, a, b)
    stacked: jax.Array = jax.vmap(one, place.stacked, place.stacked)(weight, a, b)
    return stacked
