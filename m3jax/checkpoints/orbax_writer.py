"""Writing Orbax checkpoints, piece by piece.

TensorStore, by which Orbax writes too, makes the arrays; the three small files beside them are laid out as Orbax lays
them out. Its own handlers cannot do it: they take whole arrays, hold a copy of all at once, refuse those that are
empty, and import JAX, without which `convert` runs. The tests restore what is written here with them.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from m3jax.checkpoints.orbax_tree import COMMITTED, STEP, TEMPORARY, TREE
from m3jax.checkpoints.protocol import DTYPES, Checkpoint, natural_key
from m3jax.errors import M3Error, mend

_CHUNK = 16 << 20  # bytes of a chunk: what a reader of any small piece has to decode
_HELD = 64 << 20  # bytes being compressed and written
_IN_FLIGHT = 256  # chunks, however small


def check_tree(names: Iterable[str], where: object) -> None:
    """Checks that names split at "." make a tree.

    Args:
        names: Of all tensors.
        where: What holds them, for the sentence.

    Raises:
        M3Error: A name is both a tensor's and the beginning of another's.
    """
    known = set(names)
    for name in sorted(known, key=natural_key):
        parts = name.split(".")
        above = next((p for p in (".".join(parts[:k]) for k in range(1, len(parts))) if p in known), None)
        if above is not None:
            raise M3Error(
                f"{where} has tensors {above!r} and {name!r}, but in a tree a name holds either a tensor or others:"
                " rename one."
            )


def write_orbax(path: Path, source: Checkpoint) -> None:
    """Writes a checkpoint that Orbax 0.6 and later restore, as arrays of numpy.

    Names split at "." make the tree of dicts. Memory holds a few pieces of 16 MiB, whatever the size of the model.
    The directory appears whole or not at all.

    Args:
        path: The directory to make; its parent exists, and nothing is in it.
        source: Any open checkpoint.

    Raises:
        M3Error: A name is both a tensor's and the beginning of another's, the place is taken, or the operating
            system fails.
    """
    check_tree(source.tensors, source.location)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise M3Error(f"{path} is there already: choose another place, or remove it.")
    temporary = path.with_name(path.name + TEMPORARY)
    begun = time.time_ns()
    try:
        with _saying_what_failed(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        _write_arrays(path, temporary, source)
        with _saying_what_failed(path):
            _write_json(temporary / TREE, _tree_metadata(source))
            _write_json(temporary / STEP, _step_metadata(begun))
            (temporary / COMMITTED).write_text(f"Checkpoint commit was successful to {path}\n")
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fill_with_orbax(directory: Path, source: Checkpoint, max_shard_size: int) -> None:
    """Writes a checkpoint as `write_orbax` does, into a directory that exists and may hold other files.

    Args:
        directory: What is to be restored from.
        source: Any open checkpoint.
        max_shard_size: Ignored: Orbax divides by itself.

    Raises:
        M3Error: As `write_orbax`.
    """
    inner = directory / "orbax"  # what is in it has relative places and may be moved
    write_orbax(inner, source)
    for entry in sorted(inner.iterdir()):
        entry.rename(directory / entry.name)
    inner.rmdir()


@contextmanager
def _saying_what_failed(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TensorStore's are of many types
        if isinstance(error, OSError):
            raise M3Error(f"{path} cannot be written: {error.strerror}; {mend(error)}.") from error
        full = str(error).startswith("RESOURCE_EXHAUSTED")  # TensorStore's word for a disk that is full
        reason = "the disk is full; free space or choose another place" if full else "check the place and the disk"
        raise M3Error(f"{path} cannot be written: {reason}.") from error


def _write_arrays(path: Path, directory: Path, source: Checkpoint) -> None:
    """Writes every array into the database in `directory`, which will be `path`."""
    chunks = {name: _chunk_shape(info.shape, DTYPES[info.dtype].itemsize) for name, info in source.tensors.items()}
    with _saying_what_failed(path):
        stores = _create_arrays(directory, source, chunks)
    writing: deque[Any] = deque()
    held = 0
    try:
        for name, store in stores.items():
            for box, piece in _boxes_of(source, name, chunks[name]):
                with _saying_what_failed(path):
                    while len(writing) > _IN_FLIGHT or (writing and held + piece.nbytes > _HELD):
                        size, future = writing.popleft()
                        future.result()
                        held -= size
                    writing.append((piece.nbytes, store[box].write(piece)))
                    held += piece.nbytes
        with _saying_what_failed(path):
            for _, future in writing:
                future.result()
    finally:
        for _, future in writing:
            future.exception()  # waits: nothing may still be written when the directory is removed


def _create_arrays(directory: Path, source: Checkpoint, chunks: Mapping[str, list[int]]) -> dict[str, Any]:
    """Handles of new arrays, made all at once because the database commits together what comes together."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    base = {"driver": "file", "path": f"{directory.absolute()}/"}
    opening = {}
    for name, shape, dtype in source.tensors.values():
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
            "metadata": {"chunks": chunks[name], "compressor": {"id": "zstd", "level": 1}},
            "store_data_equal_to_fill_value": True,
        }
        opening[name] = ts.open(spec, create=True, dtype=ts.dtype(DTYPES[dtype]), shape=shape, context=context)
    for future in opening.values():
        future.exception()  # waits for all of them, whichever fails
    return {name: future.result() for name, future in opening.items()}


def _boxes_of(source: Checkpoint, name: str, chunk: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The chunks of an array, in the order of its bytes: where each is and what it holds."""
    shape, dtype = source.tensors[name].shape, DTYPES[source.tensors[name].dtype]
    for origin in product(*(range(0, size, step) for size, step in zip(shape, chunk, strict=True))):
        box = tuple(slice(o, min(o + c, n)) for o, c, n in zip(origin, chunk, shape, strict=True))
        piece = np.empty([s.stop - s.start for s in box], dtype)
        start = sum(o * prod(shape[axis + 1 :]) for axis, o in enumerate(origin)) * dtype.itemsize
        source.read_into(name, start, piece.reshape(-1).view(np.uint8))
        yield box, piece


def _chunk_shape(shape: Sequence[int], width: int) -> list[int]:
    """The largest box of at most 16 MiB whose entries follow each other in the array.

    What TensorStore itself chooses for so many entries is as square as can be, of which no row can be read alone.
    """
    chunk = [max(size, 1) for size in shape]
    for axis, size in enumerate(chunk):
        row = prod(chunk[axis + 1 :]) * width
        chunk[axis] = min(size, max(1, _CHUNK // row))
        if row <= _CHUNK:
            break
    return chunk


def _tree_metadata(source: Checkpoint) -> dict[str, Any]:
    """The content of `_METADATA`, as Orbax lays it out."""
    paths = [tuple(name.split(".")) for name in source.tensors]
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    return {
        "tree_metadata": {
            str(keys): {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": value}
            for keys in paths
        },
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": dict(source.metadata) or None,
    }


def _step_metadata(begun: int) -> dict[str, Any]:
    """The content of `_CHECKPOINT_METADATA`, as Orbax lays it out."""
    return {
        "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": begun,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
