"""What each leaf of a tree is: its kind, its canonical name, the blocks that it is of or stacks."""

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from m3jax import documents
from m3jax.anatomy import OUTSIDE_BLOCKS, Anatomy, Kind, Overrides, Part, anatomy_of, group_of
from m3jax.anatomy.kinds import kind_of, quantised
from m3jax.anatomy.layout import find_layout
from m3jax.checkpoints.protocol import DTYPE_NAMES, TensorInfo
from m3jax.checkpoints.views_stacked import BlockPlace, Stacking
from m3jax.errors import M3Error
from m3jax.trees.matching import Leaf, leaves_of

_VARIABLES: tuple[tuple[str, str, Kind], ...] = (
    ("flax.nnx", "LoRAParam", "adapter"),
    ("flax.nnx", "Param", "parameter"),
    ("flax.nnx", "BatchStat", "statistics"),
    ("flax.nnx", "RngState", "random"),
    ("flax.nnx", "OptState", "optimizer"),
    ("flax.nnx", "OptArray", "optimizer"),
    ("flax.nnx", "OptVariable", "optimizer"),
    ("flax.nnx", "Cache", "buffer"),
    ("flax.nnx", "Intermediate", "buffer"),
)
# The state of an optax optimizer over an nnx.State holds its moments in nnx.Params.
_OPTIMIZER = re.compile(r"(?:^|\.)opt(?:im(?:izer)?)?(?:_states?)?\.")
_SCRATCH = frozenset({"cache", "intermediates", "losses"})  # collections of linen that no one trains

AnatomyOf = Overrides | Mapping[str, Any] | None
"""What a caller says of a tree: as a recipe's key `anatomy`."""


class ParameterTree(NamedTuple):
    """The leaves of a tree and what they are.

    Attributes:
        leaves: By name, in the tree's order.
        parts: What each is, by the same names.
        anatomy: The tree's, whose own names are those that a file of the tree has.
        stored: The anatomy's name of each leaf.
    """

    leaves: Mapping[str, Leaf]
    parts: Mapping[str, Part]
    anatomy: Anatomy
    stored: Mapping[str, str]

    def group(self, name: str, granularity: str, index: int | None = None) -> str:
        """The group that a leaf shares one draw of weights with, or one block of it, by its index along the axis."""
        part = self.parts[name]
        block = None if index is None else part.blocks[index]
        return group_of(self.anatomy, self.stored[name], granularity, block)


def overrides_of(given: AnatomyOf) -> Overrides:
    """What a caller says of a tree, checked.

    Raises:
        M3Error: A key is none of those of `anatomy`, or a value is of another type.
    """
    if given is None or isinstance(given, Overrides):
        return given or Overrides()
    if not isinstance(given, Mapping):
        raise M3Error(f"anatomy: is of type {type(given).__name__}: give a mapping of {', '.join(Overrides._fields)}")
    for key, value in given.items():
        if key not in Overrides._fields:
            raise M3Error(f"anatomy: has no key {key!r}: its keys are {', '.join(Overrides._fields)}")
        wanted = {"blocks": str | None, "tied": bool | None}.get(key, Mapping)
        if not isinstance(value, wanted):
            raise M3Error(f"anatomy: {key}: {value!r} is of type {type(value).__name__}: see m3jax.anatomy.Overrides")
    return Overrides(**given)


def _info(name: str, leaf: Leaf) -> TensorInfo:
    dtype = getattr(leaf.value, "dtype", None)
    if dtype is None:
        dtype = np.asarray(leaf.value).dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return TensorInfo(name, np.shape(leaf.value), "U32")
    return TensorInfo(name, np.shape(leaf.value), DTYPE_NAMES.get(np.dtype(dtype).name, "U8"))


def _kind(name: str, leaf: Leaf) -> Kind | None:
    """What types say of a leaf, Flax's and its own; None if they say nothing."""
    if jnp.issubdtype(getattr(leaf.value, "dtype", np.uint8), jax.dtypes.prng_key):
        return "random"
    if leaf.top in _SCRATCH and leaf.box is None:
        return "buffer"
    for module, kind_of_variable, kind in _VARIABLES:
        variable = getattr(sys.modules.get(module), kind_of_variable, None)
        if variable is not None and isinstance(leaf.box, variable):
            return None if kind == "parameter" and _OPTIMIZER.search(name) else kind
    return None


def stored_names(leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """The names that files of a tree have, in which a box is a `value`.

    Args:
        leaves: Of `leaves_of`.
    """
    stored = {name: f"{name}.value" if leaf.alone else name for name, leaf in leaves.items()}
    taken = set(leaves)
    return {name: name if name != other and other in taken else other for name, other in stored.items()}


def _exactly(names: Iterable[str]) -> str:
    return "|".join(f"^{re.escape(name)}$" for name in names)


def _of_stored(patterns: Mapping[str, Any], stored: Mapping[str, str]) -> dict[str, Any]:
    """Patterns of leaf names as patterns of the names in files; those that match nothing stay, to be refused."""
    found = {}
    for pattern, value in patterns.items():
        try:
            names = [other for name, other in stored.items() if documents.pattern(pattern).search(name)]
        except ValueError:
            names = []
        found[_exactly(names) if names else pattern] = value
    return found


def tree_of(leaves: Mapping[str, Leaf], anatomy: AnatomyOf = None) -> ParameterTree:
    """What the leaves of a tree are.

    What the caller says outranks the types of Flax's variables, and these names and shapes.

    Args:
        leaves: Of `leaves_of`.
        anatomy: What the caller says; patterns are searched in the leaves' names.

    Raises:
        M3Error: What the caller says cannot be.
    """
    stored = stored_names(leaves)
    infos = {stored[name]: _info(stored[name], leaf) for name, leaf in leaves.items()}
    said = overrides_of(anatomy)
    schemes = quantised(infos)
    told: dict[Kind, list[str]] = {}
    for name, leaf in leaves.items():
        kind = _kind(name, leaf)
        if kind is not None and kind != kind_of(infos[stored[name]], infos, schemes):  # few: names mostly agree
            told.setdefault(kind, []).append(stored[name])
    kinds = {_exactly(names): kind for kind, names in told.items()} | _of_stored(said.kinds, stored)
    found = anatomy_of(infos, overrides=said._replace(stacked=_of_stored(said.stacked, stored), kinds=kinds))
    parts = {name: found.parts[other] for name, other in stored.items()}
    return ParameterTree(leaves, parts, found, stored)


def laid_out_as(tree: ParameterTree, other: dict[str, Leaf], anatomy: AnatomyOf = None) -> dict[str, Leaf]:
    """The leaves of another tree with its blocks stacked as a tree stacks them, where it stores the same otherwise.

    Args:
        tree: The template.
        other: Leaves of a tree that may be block by block where the template is stacked, or the other way round, or
            stacked along another axis.
        anatomy: What the caller says of trees, as far as it fits the other one.

    Returns:
        The leaves; `other` itself where nothing is to be laid out otherwise.
    """
    shapes, own = ({n: np.shape(leaf.value) for n, leaf in leaves.items()} for leaves in (tree.leaves, other))
    stacks = any(part.stack_axis is not None for part in tree.parts.values())
    if not stacks and all(own.get(name) == shape for name, shape in shapes.items()):
        return other
    known = tree_of(other, _fitting(anatomy, other))
    found = find_layout((tree.parts, shapes), (known.parts, own))
    if not found:
        return other

    def tensor(block: BlockPlace) -> Any:
        value = other[block.stored].value
        return value if block.axis is None else value[(slice(None),) * block.axis + (block.at,)]

    def value(stacking: Stacking) -> Any:
        blocks = [tensor(block) for block in stacking.blocks]
        dtypes = sorted({str(getattr(block, "dtype", type(block).__name__)) for block in blocks})
        if len(dtypes) > 1:
            named = ", ".join(dict.fromkeys(block.stored for block in stacking.blocks))
            raise M3Error(f"{named}: are of dtypes {', '.join(dtypes)}, so they cannot be stacked as in the first tree")
        hosted = all(isinstance(block, np.ndarray | np.generic) for block in blocks)
        return blocks[0] if stacking.axis is None else (np if hosted else jnp).stack(blocks, stacking.axis)

    made = {name: tree.leaves[name]._replace(value=value(stacking)) for name, stacking in found.items()}
    used = {block.stored for stacking in found.values() for block in stacking.blocks}
    return {name: leaf for name, leaf in other.items() if name not in used} | made


def _fitting(anatomy: AnatomyOf, leaves: Mapping[str, Leaf]) -> AnatomyOf:
    """What the caller says of trees, without patterns that a tree which is stored otherwise does not have."""
    said = overrides_of(anatomy)

    def there(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {pattern: value for pattern, value in patterns.items() if any(re.search(pattern, n) for n in leaves)}

    return said._replace(stacked=there(said.stacked), kinds=there(said.kinds))


def canonical_leaves(tree: PyTree, anatomy: AnatomyOf = None) -> dict[str, Any]:
    """The leaves of a tree by canonical name, in the tree's order.

    The names by which masks and weights are drawn: the same for dicts (nested or flat), linen's boxed parameters, a
    `flax.nnx.State`, and the files that these are saved in. A leaf that stacks blocks is one leaf here; its blocks are
    named by its `Part`.

    Args:
        tree: Any pytree.
        anatomy: What is known of it beside names, shapes and types: as for `m3jax.merge`.

    Returns:
        The leaves.

    Raises:
        M3Error: Two leaves have one name, or `anatomy` cannot be.

    Example:
        >>> list(canonical_leaves({"params": {"layers_3": {"kernel": 1.0}, "head": {"kernel": 2.0}}}))
        ['head.kernel', 'layers.3.kernel']
    """
    found = tree_of(leaves_of(tree), anatomy)
    return {found.parts[name].canonical: leaf.value for name, leaf in found.leaves.items()}


def layer_groups(tree: PyTree, anatomy: AnatomyOf = None) -> tuple[str, ...]:
    """The groups of a tree's parameters that draw weights together under granularity "layer", in order.

    Tower by tower, each from its first block to its last, and then `OUTSIDE_BLOCKS` if any parameter is in no block:
    the order of the rows of an array of weights that is given to `m3jax.merge`.

    Args:
        tree: Any pytree.
        anatomy: As for `m3jax.merge`.

    Returns:
        The groups' names.

    Example:
        >>> layer_groups({"layers_0": {"kernel": 1.0}, "layers_1": {"kernel": 1.0}, "head": {"kernel": 2.0}})
        ('layers.0', 'layers.1', 'outside blocks')
    """
    return groups_of(tree_of(leaves_of(tree), anatomy))


def groups_of(tree: ParameterTree) -> tuple[str, ...]:
    """`layer_groups` of a tree that is known."""
    towers = list(tree.anatomy.towers)
    found: dict[str, tuple[int, int]] = {}
    outside = False
    for name, part in tree.parts.items():
        if part.kind != "parameter":
            continue
        numbers = part.blocks if part.stack_axis is not None else (part.block,) * len(part.groups)
        outside |= not part.groups
        for index, number in enumerate(numbers):
            group = tree.group(name, "layer", index if part.stack_axis is not None else None)
            found.setdefault(group, (towers.index(part.tower) if part.tower in towers else 0, number or 0))
    return (*sorted(found, key=lambda group: found[group]), *((OUTSIDE_BLOCKS,) if outside else ()))


def check_blocks(tree: ParameterTree, names: Iterable[str], wanted: str) -> None:
    """Raises M3Error where weights by block are wanted, but blocks cannot be told.

    Args:
        tree: The template.
        names: Of the leaves that are merged.
        wanted: What needs blocks, for the sentence.
    """
    for name in names:
        doubt = tree.parts[name].doubt
        if doubt is not None:
            raise M3Error(f"{wanted}: {doubt}")
    if not tree.anatomy.towers:
        raise M3Error(
            f"{wanted}: no blocks are found in the names of the tree: say which there are by "
            "anatomy={'blocks': PATTERN}, whose group 1 is a block's number, or by anatomy={'stacked': {PATTERN: AXIS}}"
        )
