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

from m3jax.checkpoints.orbax_template import (
    StoredArray,
    Template,
    layout_of,
    step_content,
    tree_files,
    tree_of,
    uses_database,
)
from m3jax.checkpoints.orbax_tree import COMMITTED, STEP, TEMPORARY, TREE
from m3jax.checkpoints.protocol import DTYPES, Checkpoint, TensorInfo, natural_key
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


def write_orbax(path: Path, source: Checkpoint, template: Template | None = None) -> None:
    """Writes a checkpoint that Orbax 0.6 and later restore.

    Memory holds a few pieces of 16 MiB, or of the size of the template's chunks, whatever the size of the model. The
    directory appears whole or not at all.

    Args:
        path: The directory to make; its parent exists, and nothing is in it.
        source: Any open checkpoint.
        template: What the tree, the division of arrays and the files beside them are taken from, where `source` has
            its names. Without one, names split at "." make the tree of dicts, of arrays of numpy.

    Raises:
        M3Error: A name is both a tensor's and the beginning of another's or has no place in the template's tree, the
            place is taken, or the operating system fails.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise M3Error(f"{path} is there already: choose another place, or remove it.")
    is_item_of_step = template is not None and bool(template.name)
    if template is not None and template.tree is None:
        template = None  # of an early version, which a tree of dicts restores as well
    if template is None:
        check_tree(source.tensors, source.location)
    tree = _tree_metadata(source) if template is None else tree_of(template, source.tensors)
    temporary = path.with_name(path.name + TEMPORARY)
    begun = time.time_ns()
    try:
        with _saying_what_failed(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        _write_arrays(path, temporary, source, template)
        with _saying_what_failed(path):
            for name, text in tree_files(template, source.tensors) if template is not None else ():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(text, encoding="utf-8")
            _write_json(temporary / TREE, tree)
            if not is_item_of_step:
                _write_json(temporary / STEP, step_content(template, begun, time.time_ns()))
            _commit(temporary, path)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fill_with_orbax(
    directory: Path, source: Checkpoint, max_shard_size: int = 0, template: Template | None = None
) -> None:
    """Writes a checkpoint as `write_orbax` does, into a directory that exists and may hold other files.

    Args:
        directory: What is to be restored from. Where the template is an item of a step this becomes a step, with the
            item below it and what else the template's step has.
        source: Any open checkpoint.
        max_shard_size: Ignored: Orbax divides by itself.
        template: As in `write_orbax`.

    Raises:
        M3Error: As `write_orbax`.
    """
    if template is not None and template.name:
        _fill_step(directory, source, template)
        return
    inner = directory / "orbax"  # what is in it has relative places and may be moved
    write_orbax(inner, source, template)
    for entry in sorted(inner.iterdir()):
        entry.rename(directory / entry.name)
    inner.rmdir()


def _fill_step(step: Path, source: Checkpoint, template: Template) -> None:
    """Writes a step: its item, and what stands beside the template's."""
    begun = time.time_ns()
    write_orbax(step / template.name, source, template)
    with _saying_what_failed(step):
        for path in template.beside:
            if path.is_dir():
                shutil.copytree(path, step / path.name, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(path, step / path.name)
        there = {template.name, *(path.name for path in template.beside)}
        told = step_content(template, begun, time.time_ns())
        handlers = told["item_handlers"]
        if isinstance(handlers, dict):
            told["item_handlers"] = {name: handler for name, handler in handlers.items() if name in there}
        else:
            told["item_handlers"] = {template.name: handlers}
        _write_json(step / STEP, told)
        _commit(step, step)


def _commit(directory: Path, path: Path) -> None:
    """Says in a directory, which will be `path`, that all of it is there."""
    (directory / COMMITTED).write_text(f"Checkpoint commit was successful to {path.name}\n", encoding="utf-8")


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


def _write_arrays(path: Path, directory: Path, source: Checkpoint, template: Template | None) -> None:
    """Writes every array into `directory`, which will be `path`."""
    layouts = {info.name: _layout(info, template) for info in source.tensors.values()}
    database = template is None or uses_database(template)
    with _saying_what_failed(path):
        stores = _create_arrays(directory, source, layouts, database)
    writing: deque[Any] = deque()
    held = 0
    try:
        for name, store in stores.items():
            for box, piece in _boxes_of(source, name, layouts[name].chunk):
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


def _layout(info: TensorInfo, template: Template | None) -> StoredArray:
    """How an array is to be stored."""
    as_there = layout_of(template, info) if template is not None else None
    if as_there is not None:
        return as_there
    chunk = _chunk_shape(info.shape, DTYPES[info.dtype].itemsize)
    if template is not None and template.tree is not None and template.tree.get("use_zarr3"):
        zarr3 = {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}}}
        return StoredArray(info, "zarr3", zarr3, tuple(chunk))
    zarr = {"chunks": chunk, "compressor": {"id": "zstd", "level": 1}}
    return StoredArray(info, "zarr", zarr, tuple(chunk))


def _create_arrays(
    directory: Path, source: Checkpoint, layouts: Mapping[str, StoredArray], database: bool
) -> dict[str, Any]:
    """Handles of new arrays, made all at once because the database commits together what comes together."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    base = {"driver": "file", "path": f"{directory.absolute()}/"}
    opening = {}
    for name, shape, dtype in source.tensors.values():
        ocdbt = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {
            "driver": layouts[name].driver,
            "kvstore": ocdbt if database else {"driver": "file", "path": f"{base['path']}{name}/"},
            "metadata": dict(layouts[name].metadata),
            "store_data_equal_to_fill_value": True,
        }
        opening[name] = ts.open(spec, create=True, dtype=ts.dtype(DTYPES[dtype]), shape=shape, context=context)
    for future in opening.values():
        future.exception()  # waits for all of them, whichever fails
    return {name: future.result() for name, future in opening.items()}


def _boxes_of(source: Checkpoint, name: str, chunk: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The chunks of an array, in the order of their first bytes: where each is and what it holds."""
    shape, dtype = source.tensors[name].shape, DTYPES[source.tensors[name].dtype]
    for origin in product(*(range(0, size, step) for size, step in zip(shape, chunk, strict=True))):
        box = tuple(slice(o, min(o + c, n)) for o, c, n in zip(origin, chunk, shape, strict=True))
        piece = np.empty([s.stop - s.start for s in box], dtype)
        _fill(source, name, box, piece)
        yield box, piece


def _fill(source: Checkpoint, name: str, box: Sequence[slice], piece: np.ndarray) -> None:
    """Reads a box of an array, one run of entries that follow each other after the other."""
    shape, width = source.tensors[name].shape, piece.dtype.itemsize
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # The last axis along which the box is not all of the array: from there on entries follow each other.
    cut = max((axis for axis, s in enumerate(box) if s.stop - s.start < shape[axis]), default=0)
    rows = piece.reshape(-1).view(np.uint8)
    run = piece[(0,) * cut].nbytes if piece.size else 0
    for number, leading in enumerate(product(*(range(s.start, s.stop) for s in box[:cut]))):
        first = sum(index * stride for index, stride in zip(leading, strides, strict=False))
        first += box[cut].start * strides[cut] if box else 0
        source.read_into(name, first * width, rows[number * run : (number + 1) * run])


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


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
