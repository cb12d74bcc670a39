"""Whose weights each tensor of a tree gets: of the model, a name, a block, or a row of an array by block."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from m3jax.anatomy import OUTSIDE_BLOCKS
from m3jax.arithmetic.double import Double
from m3jax.errors import M3Error
from m3jax.methods.leaf import Pipeline
from m3jax.methods.mixup import Mixup
from m3jax.trees.matching import is_traced
from m3jax.trees.parts import ParameterTree, check_blocks, groups_of

Weights = Mixup | Mapping[str, ArrayLike] | Sequence[ArrayLike] | ArrayLike | None


def _as_scalars(values: Any, count: int, where: str) -> tuple[Any, ...]:
    """`count` scalars, host floats where they are known and `Double`s where they are traced; one stands for all."""
    if is_traced(values):
        stacked = jnp.stack([jnp.asarray(v) for v in values]) if isinstance(values, list | tuple) else values
        if stacked.shape not in ((count,), ()):
            raise M3Error(f"{where}: weights of shape {list(stacked.shape)} given for {count} experts")
        return tuple(Double.of(w) for w in jnp.broadcast_to(stacked, (count,)))
    try:
        given = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise M3Error(f"{where}: weights {values!r} are no numbers: give {count} of them") from error
    flat = np.broadcast_to(given, (count,)) if given.ndim == 0 else given.reshape(-1)
    if flat.size != count:
        raise M3Error(f"{where}: {flat.size} weights given where {count} are needed")
    if not np.isfinite(flat).all():
        raise M3Error(f"{where}: weights {flat.tolist()} are not all finite")
    return tuple(float(w) for w in flat)


# --- whose weights ------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """One tensor of the merge: a leaf, or a block of one that stacks several.

    Attributes:
        name: Its canonical name.
        spelled: What the tree calls its leaf.
        layer: The group that it shares a draw per layer with.
        tower: The tower of its block; None outside blocks.
        block: Its block's number there.
    """

    name: str
    spelled: str
    layer: str
    tower: str | None = None
    block: int | None = None


def tensors_of(tree: ParameterTree, name: str) -> list[Tensor]:
    """The tensors that a leaf is or stacks."""
    part = tree.parts[name]
    if part.stack_axis is None:
        inside = () if part.block is None else (part.tower, part.block)
        return [Tensor(part.canonical, name, tree.group(name, "layer"), *inside)]
    blocks = zip(part.block_names, part.groups, part.blocks, strict=True)
    return [Tensor(own, name, group, part.tower, block) for own, group, block in blocks]


def _is_prefix(key: str, name: str) -> bool:
    return not key or name == key or name.startswith(f"{key}.")


def _goes_by(key: str, tensor: Tensor, by_block: bool) -> bool:
    """Whether a key of a mapping means a tensor; one whose weights are by block means tensors in blocks alone."""
    if by_block and tensor.tower is None:
        return False
    named = any(_is_prefix(key, name) for name in (tensor.name, tensor.spelled))
    return named or (key == tensor.tower if by_block else key == tensor.layer)


def _key_of(weights: Mapping[str, ArrayLike], tensor: Tensor) -> str | None:
    """The key of a mapping whose weights a tensor gets: the longest that it goes by."""
    fitting = [key for key, own in weights.items() if _goes_by(key, tensor, len(_shape_of(own)) == 2)]
    return max(fitting, key=len, default=None)


class TreeWeights(NamedTuple):
    """Where each tensor's weights come from.

    Attributes:
        given: What the caller gave.
        rows: The row of each block, or layer, of an array of weights by block; of a mapping, by key.
    """

    given: Weights
    rows: Mapping[str, Mapping[str, int]]

    def group(self, tensor: Tensor) -> Any:
        """The tensors that share their weights with one: what tells them from others; None for all of them."""
        if isinstance(self.given, Mapping):
            found = _key_of(self.given, tensor)
            if found is None:
                raise M3Error(f"weights: none given for {tensor.name}: name it, its block or a prefix of its name")
            return (found, tensor.layer) if found in self.rows else found
        if isinstance(self.given, Mixup):
            by_layer = {"model": None, "tensor": tensor.name, "layer": tensor.layer}
            return by_layer[self.given.granularity]
        return ("", tensor.layer) if self.rows else None


def weights_of(weights: Weights, tree: ParameterTree, names: Sequence[str]) -> TreeWeights:
    """Weights that fit a tree.

    Args:
        weights: As `m3jax.merge` takes them.
        tree: The template.
        names: Of the leaves that are merged.

    Raises:
        M3Error: They are by block, but blocks cannot be told; they name no tensor; or there is not a row for each.
    """
    if isinstance(weights, Mixup) and weights.granularity == "layer":
        check_blocks(tree, names, 'mixup: granularity is "layer"')
    if isinstance(weights, Mapping):
        return TreeWeights(weights, _rows_by_key(weights, tree, names))
    if isinstance(weights, Mixup | None) or len(_shape_of(weights)) < 2:
        return TreeWeights(weights, {})
    shape = _shape_of(weights)
    check_blocks(tree, names, f"weights of shape {list(shape)} are by block")
    groups = groups_of(tree)
    if len(shape) != 2 or shape[0] != len(groups):
        outside = groups[-1] == OUTSIDE_BLOCKS
        blocks = len(groups) - outside
        what = f"{blocks} blocks ({groups[0]} to {groups[blocks - 1]})" + (
            " and a group outside them" if outside else ""
        )
        raise M3Error(
            f"weights: are of shape {list(shape)}, but there are {what}: give one row for each, in the order of "
            "m3jax.trees.parts.layer_groups, or a mapping of towers or prefixes of names to rows of their blocks"
        )
    return TreeWeights(weights, {"": {group: row for row, group in enumerate(groups)}})


def _rows_by_key(
    weights: Mapping[str, ArrayLike], tree: ParameterTree, names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """The row of each block, by the keys whose weights are by block.

    Raises:
        M3Error: A key means no tensor, or its weights are by block and fit none.
    """
    known = [tensor for name in tree.leaves for tensor in tensors_of(tree, name)]
    found: dict[str, dict[str, int]] = {}
    for key, own in weights.items():
        shape = _shape_of(own)
        if len(shape) > 2:
            raise M3Error(f"weights: {key!r} has shape {list(shape)}: give n numbers, or rows of n for its blocks")
        by_block = len(shape) == 2
        if by_block:
            check_blocks(tree, names, f"weights: {key!r} has shape {list(shape)}, which is by block")
        meant = [tensor for tensor in known if _goes_by(key, tensor, by_block)]
        if not meant:
            towers = {str(tensor.tower) for tensor in known if tensor.tower is not None} if by_block else set()
            near = difflib.get_close_matches(
                key, sorted({text for t in known for text in (t.name, t.layer)} | towers), 1
            )
            hint = f": did you mean {near[0]!r}?" if near else ": give a leaf's name, a block's, or a prefix"
            raise M3Error(f"weights: {key!r} is no name of the tree{' with blocks' if by_block else ''}{hint}")
        if by_block:
            found[key] = _rows_of(key, shape, meant)
    return found


def _rows_of(key: str, shape: tuple[int, ...], meant: Sequence[Tensor]) -> dict[str, int]:
    """The row of each block of one tower."""
    towers = list(dict.fromkeys(str(tensor.tower) for tensor in meant))
    if len(towers) > 1:
        raise M3Error(
            f"weights: {key!r} has rows for blocks, but means those of {len(towers)} towers: give each its own, as "
            f"{', '.join(map(repr, towers))}"
        )
    blocks = {tensor.layer: tensor.block or 0 for tensor in meant}
    layers = sorted(blocks, key=blocks.__getitem__)
    if shape[0] != len(layers):
        raise M3Error(
            f"weights: {key!r} has {shape[0]} rows, but there are {len(layers)} blocks, {layers[0]} to {layers[-1]}: "
            "give one row for each"
        )
    return {layer: row for row, layer in enumerate(layers)}


def _shape_of(weights: Any) -> tuple[int, ...]:
    if hasattr(weights, "shape") or not is_traced(weights):
        try:
            return np.shape(weights)
        except ValueError as error:
            raise M3Error(f"weights: {weights!r} are rows of different lengths: give every block as many") from error
    return len(weights), *_shape_of(weights[0])


def group_weights(pipe: Pipeline, weights: TreeWeights, group: Any) -> tuple[Any, ...]:
    """The weights of a group, where they are not drawn: host floats, or `Double`s where they are traced.

    Args:
        pipe: What is done.
        weights: Those of the tree.
        group: Of `TreeWeights.group`.

    Raises:
        M3Error: There are not as many as are needed, or one is not finite.
    """
    method, count = pipe.method, pipe.num_weights
    given: Any = weights.given
    if given is None:
        return (0.5,) if method.weighting == "position" else (1.0,) * count
    if group is None:
        return _as_scalars(given, count, "merge")
    if isinstance(group, str):
        return _as_scalars(given[group], count, group)
    key, layer = group
    rows = given[key] if isinstance(given, Mapping) else given
    return _as_scalars(rows[weights.rows[key][layer]], count, layer)
