"""Which tensors of a checkpoint are which leaves of a caller's tree, and the tree of what was read."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import PyTree

from m3jax.anatomy import MODEL_KINDS, canonical_names
from m3jax.anatomy.kinds import is_training_state
from m3jax.anatomy.layout import find_layout
from m3jax.anatomy.stored import stored_anatomy
from m3jax.checkpoints.protocol import DTYPES, Checkpoint, TensorInfo
from m3jax.checkpoints.remote import as_path
from m3jax.checkpoints.views_stacked import BlockPlace, Stacking, restacked
from m3jax.errors import M3Error
from m3jax.trees.matching import leaves_of
from m3jax.trees.parts import AnatomyOf, ParameterTree, tree_of

Reader = Callable[[Checkpoint, TensorInfo, Sharding | None, np.dtype[Any] | None], jax.Array]
"""(checkpoint, tensor, sharding, dtype of floats) → its values."""


def restored(
    checkpoint: Checkpoint, like: PyTree, anatomy: AnatomyOf, read: Reader, dtype: np.dtype[Any] | None
) -> PyTree:
    """A tree like another with the values of a checkpoint.

    Args:
        checkpoint: Open.
        like: As `m3jax.load` takes it.
        anatomy: What is known of `like`, as for `m3jax.merge`.
        read: What reads a tensor.
        dtype: Of floats, where not that of their leaves.

    Raises:
        M3Error: They do not fit.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(like, nnx.Module):
        graph, state = nnx.split(like)
        return nnx.merge(graph, restored(checkpoint, state, anatomy, read, dtype))
    tree = tree_of(leaves_of(like), anatomy)
    checkpoint = _laid_out(checkpoint, tree)
    found = _matched(checkpoint, tree)
    values = []
    for name, leaf in tree.leaves.items():
        if name not in found:
            values.append(leaf.value)
            continue
        info = checkpoint.tensors[found[name]]
        wanted = _dtype_of(leaf.value)
        _check_leaf(name, info, leaf.value, wanted)
        array = read(checkpoint, info, _sharding_of(leaf.value), wanted if dtype is None else dtype)
        values.append(_as(name, leaf.value, array))
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _laid_out(checkpoint: Checkpoint, tree: ParameterTree) -> Checkpoint:
    """The checkpoint with its blocks stacked as a tree's are, where it stores the same otherwise: a view by range."""
    shapes = {stored: np.shape(tree.leaves[name].value) for name, stored in tree.stored.items()}
    own = {name: info.shape for name, info in checkpoint.tensors.items()}
    if all(own.get(name) == shape for name, shape in shapes.items()):
        return checkpoint
    parts = stored_anatomy(checkpoint, as_path(checkpoint.location), None).parts
    found = find_layout((tree.anatomy.parts, shapes), (parts, own))
    if not found:
        return checkpoint
    used = {block.stored for stacking in found.values() for block in stacking.blocks} | found.keys()
    rest = {name: Stacking((BlockPlace(name),)) for name in own if name not in used}
    return restacked(checkpoint, {**rest, **found})


def _matched(checkpoint: Checkpoint, tree: ParameterTree) -> dict[str, str]:
    """The tensor of each leaf, by name or else by canonical name; what is of training may stay as it is.

    Raises:
        M3Error: A leaf has no tensor, or a tensor no leaf.
    """
    tensors = checkpoint.tensors
    by_canonical = {canonical: stored for stored, canonical in canonical_names(tensors).items()}

    def tensor_of(name: str) -> str | None:
        if jnp.issubdtype(getattr(tree.leaves[name].value, "dtype", np.uint8), jax.dtypes.prng_key):
            return None  # files hold its words, and not of which generator they are
        spellings = (tree.stored[name], name)
        return next((s for s in spellings if s in tensors), by_canonical.get(tree.parts[name].canonical))

    found = {name: own for name in tree.leaves if (own := tensor_of(name)) is not None}
    model = [name for name in tree.leaves if tree.parts[name].kind in MODEL_KINDS]
    taken = set(found.values())
    missing = [name for name in model if name not in found]
    extra = [name for name in tensors if name not in taken and not is_training_state(name)]
    if missing or extra:
        sides = [f"{missing[0]} of like is not in it ({len(missing)} leaves in all)"] if missing else []
        sides += [f"{extra[0]} of it is not in like ({len(extra)} tensors in all)"] if extra else []
        raise M3Error(f"{checkpoint.location}: differs from like: {', and '.join(sides)}: give a tree of its model")
    _check_training(checkpoint, tree, found)
    return found


def _check_training(checkpoint: Checkpoint, tree: ParameterTree, found: Mapping[str, str]) -> None:
    """Raises M3Error where some of a trainer's state is there and some is not, or is nowhere."""
    kinds: dict[str, list[str]] = {}
    for name, part in tree.parts.items():
        if part.kind not in MODEL_KINDS:
            kinds.setdefault(part.kind, []).append(name)
    for kind, names in kinds.items():
        absent = [name for name in names if name not in found]
        held = [name for name in names if name in found]
        if kind == "optimizer" and absent and held:
            raise M3Error(
                f"{checkpoint.location}: has {held[0]} of like's optimizer state but not {absent[0]}: take a like "
                "without optimizer state, or with that of the trainer that wrote it"
            )
        shapes = [name for name in absent if isinstance(tree.leaves[name].value, jax.ShapeDtypeStruct)]
        if shapes:
            raise M3Error(
                f"{shapes[0]}: is of kind {kind}, which {checkpoint.location} does not have, and like has its shape "
                "alone: give its value in like, or a like without it"
            )


def _dtype_of(leaf: Any) -> np.dtype[Any] | None:
    """The dtype of a leaf; None of Python's numbers, which have none of their own."""
    return np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else None


def _check_leaf(name: str, info: TensorInfo, leaf: Any, dtype: np.dtype[Any] | None) -> None:
    """Raises M3Error where a tensor cannot be a leaf's value."""
    if info.shape != np.shape(leaf):
        raise M3Error(f"{name}: has shape {list(np.shape(leaf))} in like, but {list(info.shape)} as {info.name}")
    if dtype is None:
        return
    stored = DTYPES[info.dtype]
    floats = [jnp.issubdtype(each, jnp.floating) for each in (stored, dtype)]
    on_device = jax.dtypes.canonicalize_dtype(stored)
    if floats != [True, True] and on_device != dtype and stored != dtype:
        raise M3Error(
            f"{name}: is of dtype {dtype.name} in like, but {stored.name} as {info.name}: only floats are cast"
        )


def _sharding_of(leaf: Any) -> Sharding | None:
    """Where a leaf's values go: where it is, if someone chose that."""
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == 1 and not getattr(leaf, "committed", True):
        return None
    found: Sharding | None = getattr(leaf, "sharding", None)
    return found


def _as(name: str, leaf: Any, array: jax.Array) -> Any:
    """An array as what the leaf is: of numpy, or a number of Python."""
    if isinstance(leaf, np.ndarray | np.generic):
        held = np.asarray(array)
        return held if jnp.issubdtype(held.dtype, jnp.floating) else held.astype(leaf.dtype)  # which JAX may not have
    if isinstance(leaf, bool | int | float):
        number = np.asarray(array).item()
        if type(leaf)(number) != number:
            raise M3Error(f"{name}: is {number!r} in the checkpoint, but of type {type(leaf).__name__} in like")
        return type(leaf)(number)
    return array
