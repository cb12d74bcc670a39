"""The digest of a tree's values, which is that of a checkpoint which holds them."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from m3jax.checkpoints.digest import TensorDigest, digest_checkpoint
from m3jax.checkpoints.protocol import DTYPE_NAMES
from m3jax.errors import M3Error
from m3jax.trees.matching import leaves_of
from m3jax.trees.parts import stored_names


def digest(tree: PyTree) -> str:
    """The digest of a tree's values: what a manifest of a checkpoint with these tensors calls `output.digest`.

    It is of every leaf's name, dtype, shape and bytes, in no order. Names are those that files of the tree have: paths
    joined by dots, with `value` for what is in a box of Flax. So it is one for a checkpoint, whatever its format, for
    what `m3jax.load` makes of it, and for what trainers save of the tree; wherever and however its arrays lie.

    Shards come to the host one after the other, of one array at most at a time, and where the first axis is sharded of
    the shards with the same rows; no device gathers anything. An array that lies on several processes must be whole on
    each.

    Args:
        tree: Any pytree of arrays.

    Returns:
        BLAKE3 of one JSON line per leaf, `[name, dtype, shape, digest]`, sorted by name; hexadecimal.

    Raises:
        M3Error: A leaf is no array, is traced, has a dtype that files do not have, or is not whole in this process; or
            two leaves have one name.

    Example:
        >>> tree = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
        >>> digest(tree) == digest({"dense.kernel": np.ones((2, 3), np.float32), "dense.bias": np.zeros(3, np.float32)})
        True
    """
    leaves = leaves_of(tree)
    told = {}
    for name, stored in stored_names(leaves).items():
        value = leaves[name].value
        dtype = _dtype(name, value)
        told[stored] = (dtype, np.shape(value), _of_array(name, value))
    return digest_checkpoint(told)


def _dtype(name: str, value: Any) -> str:
    """The dtype of a leaf as files call it.

    Raises:
        M3Error: It has none, or its values are not to be had.
    """
    if isinstance(value, jax.core.Tracer):
        raise M3Error(f"{name}: is traced, and has a digest outside of jit only: return it from there first")
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise M3Error(f"{name}: is of type {type(value).__name__}, which formats store each in its way: give an array")
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise M3Error(
            f"{name}: is a random key, which files do not have: leave it out, or give jax.random.key_data of it"
        )
    if value.dtype.name not in DTYPE_NAMES:
        raise M3Error(f"{name}: is of dtype {value.dtype.name}, which files do not have: give one that they have")
    return DTYPE_NAMES[value.dtype.name]


def _of_array(name: str, value: Any) -> str:
    found = TensorDigest()
    for piece in _rows(name, value):
        found.update(np.ascontiguousarray(piece))
    return found.hexdigest()


def _rows(name: str, value: Any) -> Iterator[np.ndarray]:
    """The array's values in row-major order, as many rows at a time as one shard has.

    Raises:
        M3Error: Parts of it are on other processes alone.
    """
    if not isinstance(value, jax.Array) or (value.is_fully_addressable and len(value.sharding.device_set) == 1):
        yield np.asarray(value)
        return
    shards: dict[tuple[tuple[int, int], ...], jax.Array] = {}
    for shard in value.addressable_shards:
        bounds = (axis.indices(size)[:2] for axis, size in zip(shard.index, value.shape, strict=True))
        shards.setdefault(tuple(bounds), shard.data)
    covered = sum(data.size for data in shards.values())
    if covered != value.size:
        raise M3Error(
            f"{name}: lies on several processes, of which this one holds {covered} of {value.size} entries: replicate "
            "it first, or take the digest from the manifest of what is written"
        )
    if value.ndim == 0:
        yield from map(np.asarray, shards.values())
        return
    for start, stop in sorted({box[0] for box in shards}):
        band = np.empty((stop - start, *value.shape[1:]), value.dtype)
        for (rows, *others), data in shards.items():
            if rows == (start, stop):
                band[(slice(None), *(slice(*bounds) for bounds in others))] = np.asarray(data)
        yield band
