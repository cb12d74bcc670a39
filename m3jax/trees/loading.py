"""From a checkpoint of any format onto devices: every process reads what its own shards hold, and no more."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from m3jax.checkpoints.adapters import open_model
from m3jax.checkpoints.locate import locate_model
from m3jax.checkpoints.orbax_writer import check_tree
from m3jax.checkpoints.protocol import DTYPES, Checkpoint, TensorInfo, check_unchanged
from m3jax.checkpoints.standing_in import standing_in
from m3jax.checkpoints.views import renamed
from m3jax.errors import M3Error
from m3jax.trees.matching import named_leaves
from m3jax.trees.parts import AnatomyOf
from m3jax.trees.restoring import restored

_BLOCK = 16 << 20  # bytes of whole rows read at a time where shards hold parts of rows
_RUN = 64 << 10  # bytes: shorter parts of rows cost more to read one by one than the rows that they are in

Box: TypeAlias = tuple[tuple[int, int], ...]
Array: TypeAlias = npt.NDArray[Any]
Placement: TypeAlias = Callable[[str, tuple[int, ...]], Sharding | None]


def load(
    path: str | os.PathLike[str],
    sharding: Sharding | Placement | PyTree = None,
    *,
    dtype: DTypeLike | None = None,
    flat: bool = False,
    like: PyTree = None,
    anatomy: AnatomyOf = None,
) -> PyTree:
    """Loads a checkpoint's tensors as JAX arrays, straight into their shardings.

    Tensors are read one after the other. Host memory holds one process's part of one tensor at most, and where the
    first axis is sharded one shard. Where later axes are, whole rows are read if their parts are short.

    Args:
        path: A checkpoint of any format, as `open_checkpoint` takes it, or a hub id; or `model+adapter`. Of statistics,
            what is stored once for several weights is one array under each of their names.
        sharding: Where tensors go: the default device if None; one `jax.sharding.Sharding` for all of them; a function
            (name, shape) -> sharding; or a tree of shardings, or of anything that has one, such as arrays or
            `jax.ShapeDtypeStruct`, nested or by name, that has every tensor.
        dtype: What floats become, rounded to nearest even; by default all keep their dtypes, or get those of `like`.
        flat: Return a flat dict by name, which is what names that are no paths need.
        like: A tree of the caller's own, of arrays or `jax.ShapeDtypeStruct`s: a `flax.nnx.State` or module, a train
            state, any pytree. Its leaves are matched with tensors by name, or else by canonical name, as trees are
            that are merged: without boxes (`value`) and wrappers (`params`), blocks stacked as in `like`. Floats get
            their leaf's dtype, all get its sharding; integers must be of its dtype. What is of training (optimizer and
            random states, steps) comes from the checkpoint where it is there, else stays as it is in `like`; random
            keys always stay.
        anatomy: What is known of `like` beside names, shapes and types: as for `m3jax.merge`.

    Returns:
        Nested dicts, names split at ".", or a flat dict; or a tree of `like`'s type.

    Raises:
        M3Error: The checkpoint cannot be read, or changes meanwhile; a sharding is missing or does not divide a tensor;
            a 64-bit tensor has values that need `jax_enable_x64`; `like` differs, of which the first path on both sides
            is named, or has only shapes of a trainer's state that the checkpoint lacks.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> directory = tempfile.mkdtemp()
        >>> save_file({"dense.kernel": np.ones((2, 3), np.float32)}, f"{directory}/model.safetensors")
        >>> load(directory, dtype="bfloat16")["dense"]["kernel"].dtype
        dtype(bfloat16)
        >>> like = {"params": {"dense": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}}
        >>> load(directory, like=like)["params"]["dense"]["kernel"].shape
        (2, 3)
    """
    wanted = None if dtype is None else _checked(np.dtype(dtype))
    if like is not None and (flat or sharding is not None):
        raise M3Error("load: like gives names and shardings, so flat and sharding are not given beside it: give one.")
    place = _as_function(sharding)
    found = locate_model(os.fspath(path))
    told = standing_in(found)
    with open_model(found) as checkpoint:
        others = {name: other for name, other in told.items() if name not in checkpoint.tensors}
        lost = next((other for other in others.values() if other not in checkpoint.tensors), None)
        if lost is not None:
            raise M3Error(f"{checkpoint.location}: {lost} stands for other tensors, but is not there: measure again")
        if like is not None:

            def read(
                seen: Checkpoint, info: TensorInfo, sharding: Sharding | None, dtype: np.dtype[Any] | None
            ) -> jax.Array:
                is_float = dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.floating)
                return _load(seen, info, sharding, _checked(dtype) if is_float and dtype is not None else None)

            every, before = {name: name for name in checkpoint.tensors}, checkpoint.fingerprint()
            seen = renamed(checkpoint, {**every, **others}) if others else checkpoint
            tree = restored(seen, like, anatomy, read, wanted)
            check_unchanged(checkpoint, before, "loaded: load")
            return tree
        if not flat:
            check_tree(checkpoint.tensors, f"{checkpoint.location}, which flat=True loads,")
        arrays = _load_all(checkpoint, checkpoint.tensors, place, wanted)
    arrays |= {name: arrays[other] for name, other in others.items()}
    return arrays if flat else _nested(arrays)


def load_checkpoint(checkpoint: Checkpoint, names: Iterable[str], sharding: Any = None) -> dict[str, jax.Array]:
    """Tensors of an opened checkpoint, or of a view of one, as `load` with flat=True gives those of a path.

    Args:
        checkpoint: Open.
        names: Which.
        sharding: As for `load`.

    Raises:
        M3Error: As `load`.
    """
    return _load_all(checkpoint, names, _as_function(sharding), None)


def _load_all(
    checkpoint: Checkpoint, names: Iterable[str], place: Placement, dtype: np.dtype[Any] | None
) -> dict[str, jax.Array]:
    infos, before = [checkpoint.tensors[name] for name in names], checkpoint.fingerprint()
    arrays = {info.name: _load(checkpoint, info, place(info.name, info.shape), dtype) for info in infos}
    check_unchanged(checkpoint, before, "loaded: load")
    return arrays


def _checked(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A dtype to cast to, if it is one of floats that JAX has now."""
    if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        raise M3Error(f"dtype is {dtype}, but only floats are cast: give one such as bfloat16.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise M3Error(f"dtype is {dtype}, which needs jax_enable_x64: set it, or give one such as float32.")
    return dtype


def _as_function(sharding: Any) -> Placement:
    """Where each tensor goes, from all that `load` takes."""
    if sharding is None or isinstance(sharding, Sharding):
        return lambda name, shape: sharding
    if callable(sharding):
        place: Placement = sharding
        return place
    leaves = named_leaves(sharding)

    def of_leaf(name: str, shape: tuple[int, ...]) -> Sharding | None:
        if name not in leaves:
            raise M3Error(f"the shardings have none for {name!r}: add one.")
        found: Sharding | None = getattr(leaves[name], "sharding", leaves[name])
        return found

    return of_leaf


def _nested(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = name.split(".")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = array
    return tree


# --- One tensor ------------------------------------------------------------------------------------------


def _load(
    checkpoint: Checkpoint, info: TensorInfo, sharding: Sharding | None, dtype: np.dtype[Any] | None
) -> jax.Array:
    cast = _caster(info, dtype)
    if sharding is None:
        (whole,) = _read(checkpoint, info, [tuple((0, size) for size in info.shape)])
        loaded: jax.Array = jax.device_put(cast(whole))
        return loaded
    try:
        sharding.shard_shape(info.shape)
        indices = sharding.addressable_devices_indices_map(info.shape)
    except ValueError as error:
        raise M3Error(
            f"{info.name} of shape {list(info.shape)} cannot be divided by {sharding}: give another."
        ) from error
    box_of = {device: _as_box(index or (), info.shape) for device, index in indices.items()}
    shards: dict[jax.Device, jax.Array] = {}
    for boxes in _bands(set(box_of.values())):
        for box, values in zip(boxes, _read(checkpoint, info, boxes), strict=True):
            held = cast(values)
            for device in (device for device, own in box_of.items() if own == box):
                shards[device] = jax.device_put(held, SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
        for shard in shards.values():
            shard.block_until_ready()  # so that the host's copy can go before the next is made
    return jax.make_array_from_single_device_arrays(
        info.shape, sharding, [shards[device] for device in box_of], dtype=_dtype_on_device(info, dtype)
    )


def _as_box(index: Sequence[slice], shape: tuple[int, ...]) -> Box:
    bounds = (axis.indices(size) for axis, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)


def _bands(boxes: set[Box]) -> list[list[Box]]:
    """The boxes by the rows that they are in, so that what shares rows is read together."""
    bands: dict[Box, list[Box]] = {}
    for box in sorted(boxes):
        bands.setdefault(box[:1], []).append(box)
    return list(bands.values())


def _dtype_on_device(info: TensorInfo, wanted: np.dtype[Any] | None) -> np.dtype[Any]:
    stored = DTYPES[info.dtype]
    is_float = jax.numpy.issubdtype(stored, jax.numpy.floating)
    return wanted if wanted is not None and is_float else jax.dtypes.canonicalize_dtype(stored)


def _caster(info: TensorInfo, wanted: np.dtype[Any] | None) -> Callable[[Array], Array]:
    """What makes a tensor's values those that go to a device; only a dtype that was wanted may change them."""
    target = _dtype_on_device(info, wanted)

    def cast(values: Array) -> Array:
        if values.dtype == target:
            return values
        with np.errstate(over="ignore", invalid="ignore"):
            changed = values.astype(target)
        is_float = values.dtype.kind == "f"
        if target != wanted and not np.array_equal(changed.astype(values.dtype), values, equal_nan=is_float):
            mend = "set jax_enable_x64, or give a dtype" if is_float else "set jax_enable_x64"
            raise M3Error(f"{info.name} has {info.dtype} values that {target} does not hold: {mend}.")
        return changed

    return cast


# --- Reading boxes ---------------------------------------------------------------------------------------


def _read(checkpoint: Checkpoint, info: TensorInfo, boxes: Sequence[Box]) -> list[Array]:
    """The values of boxes of a tensor; every byte is read once."""
    dtype = DTYPES[info.dtype]
    # As integers, because numpy copies parts of rows of bfloat16 one entry at a time.
    words = [np.empty([stop - start for start, stop in box], f"u{dtype.itemsize}") for box in boxes]
    if info.size:
        _fill(checkpoint, info, 0, info.shape, list(zip(boxes, words, strict=True)))
    return [values.view(dtype) for values in words]


def _fill(
    checkpoint: Checkpoint, info: TensorInfo, origin: int, shape: tuple[int, ...], parts: Sequence[tuple[Box, Array]]
) -> None:
    """Fills boxes of the part of a tensor that has this shape and begins at entry `origin`."""
    width = DTYPES[info.dtype].itemsize
    row = prod(shape[1:])

    def read(start: int, out: Array) -> None:
        checkpoint.read_into(info.name, (origin + start) * width, out.reshape(-1).view(np.uint8))

    if all(box[1:] == tuple((0, size) for size in shape[1:]) for box, _ in parts):
        for box, out in parts:
            read(box[0][0] * row if box else 0, out)
        return
    first, last = min(box[0][0] for box, _ in parts), max(box[0][1] for box, _ in parts)
    columns = max(box[1][1] for box, _ in parts) - min(box[1][0] for box, _ in parts)
    run = columns * prod(shape[2:]) * width
    if row * width > _BLOCK or _RUN <= run < row * width:
        for index in range(first, last):
            inside = [(box, out) for box, out in parts if box[0][0] <= index < box[0][1]]
            below = [(box[1:], out[index - box[0][0]]) for box, out in inside]
            _fill(checkpoint, info, origin + index * row, shape[1:], below)
        return
    step = max(1, _BLOCK // (row * width))
    block = np.empty((min(step, last - first), *shape[1:]), f"u{width}")
    for index in range(first, last, step):
        rows = block[: last - index]
        read(index * row, rows)
        for ((start, stop), *later), out in parts:
            low, high = max(index, start), min(index + len(rows), stop)
            if low < high:
                out[low - start : high - start] = rows[
                    (slice(low - index, high - index), *(slice(*ax) for ax in later))
                ]
