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

from m3jax.checkpoints.key_values import files_at
from m3jax.checkpoints.orbax_beside import close_as, copy_beside
from m3jax.checkpoints.orbax_names import LOCKED, NODES, VALUES
from m3jax.checkpoints.orbax_template import (
    INNER,
    StoredArray,
    Template,
    has_database,
    layout_of,
    step_content,
    tree_files,
    tree_of,
)
from m3jax.checkpoints.orbax_tree import COMMITTED, MANIFEST, STEP, TEMPORARY, TREE, part_name
from m3jax.checkpoints.protocol import DTYPES, Checkpoint, TensorInfo, natural_key
from m3jax.checkpoints.storage import is_file
from m3jax.errors import M3Error, mend

_CHUNK = 16 << 20  # bytes of a chunk: what a reader of any small piece has to decode
_HELD = 64 << 20  # bytes being compressed and written
_IN_FLIGHT = 256  # chunks, however small
_SAID = "Checkpoint commit was successful\n"  # not where to, as Orbax has it: it is the same wherever it is written


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
    tree = _tree(source.tensors, source.metadata, template, source.location)
    temporary = path.with_name(path.name + TEMPORARY)
    begun = time.time_ns()
    try:
        with _saying_what_failed(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        _write_arrays(path, temporary, source, template)
        with _saying_what_failed(path):
            _describe(temporary, tree, source.tensors, source.metadata, template, begun)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tree(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], template: Template | None, where: object
) -> dict[str, Any]:
    """The content of `_METADATA`; raises M3Error where names make no tree."""
    if template is not None and template.tree is not None:
        return tree_of(template, tensors)
    check_tree(tensors, where)  # also of an early version, which a tree of dicts restores as well
    return _tree_metadata(tensors, metadata)


def small_files(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], template: Template | None, where: object
) -> dict[str, str]:
    """The texts of the files of a checkpoint that hold no values and are not copied, by name.

    They are the same each time but for `_CHECKPOINT_METADATA`, which has the times of its save; here these are 0.

    Args:
        tensors: What is written, by name.
        metadata: Texts that are kept with a tree that is not the template's.
        template: As in `write_orbax`.
        where: What holds them, for the sentence.

    Raises:
        M3Error: Names make no tree, or a file of the template's is damaged or not its own.
    """
    name = "" if template is None else template.name
    item = {**_item_texts(_tree(tensors, metadata, template, where), tensors, template), COMMITTED: _SAID}
    within = {f"{name}/{file}" if name else file: text for file, text in item.items()}
    step = _told_of_step(template, 0, 0) if template is not None and name else _told_of_item(template, 0, 0, metadata)
    return {**within, STEP: json.dumps(step), COMMITTED: _SAID}


def _item_texts(
    tree: Mapping[str, Any], tensors: Mapping[str, TensorInfo], template: Template | None
) -> dict[str, str]:
    """The texts of the files of an item that tell of its arrays."""
    taken = dict(tree_files(template, tensors)) if template is not None and template.tree is not None else {}
    return {**taken, TREE: json.dumps(tree)}


def _told_of_item(template: Template | None, begun: int, ended: int, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What an item tells of its save that is no step's."""
    return step_content(None if template is None or template.tree is None else template, begun, ended, metadata)


def _told_of_step(template: Template, begun: int, ended: int) -> dict[str, Any]:
    """What a step tells of its save and its items."""
    there = {template.name, *(path.name for path in template.beside)}
    told = step_content(template, begun, ended)
    handlers = told["item_handlers"]
    if isinstance(handlers, dict):
        return told | {"item_handlers": {name: handler for name, handler in handlers.items() if name in there}}
    return told | {"item_handlers": {template.name: handlers}}


def _describe(
    directory: Path,
    tree: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    template: Template | None,
    begun: int,
) -> None:
    """Writes all of an item but its arrays; the last file says that it is whole."""
    for name, text in _item_texts(tree, tensors, template).items():
        (directory / name).parent.mkdir(exist_ok=True)
        _write(directory / name, text, None if template is None else template.item / name)
    if template is None or not template.name:  # else its step tells
        told = _told_of_item(template, begun, time.time_ns(), metadata)
        _write(directory / STEP, json.dumps(told), None if template is None else template.item / STEP)
    _write(directory / COMMITTED, _SAID)


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
    inner = directory / INNER  # what is in it has relative places and may be moved
    write_orbax(inner, source, template)
    for entry in sorted(inner.iterdir()):
        entry.rename(directory / entry.name)
    inner.rmdir()


def _fill_step(step: Path, source: Checkpoint, template: Template) -> None:
    """Writes a step: its item, and what stands beside the template's."""
    begun = time.time_ns()
    write_orbax(step / template.name, source, template)
    _describe_step(step, template, begun)


def _describe_step(step: Path, template: Template, begun: int) -> None:
    """Writes all of a step but its item; the last file says that it is whole."""
    with _saying_what_failed(step):
        copy_beside(template.beside, step)
        told = _told_of_step(template, begun, time.time_ns())
        _write(step / STEP, json.dumps(told), template.item.parent / STEP)
        _write(step / COMMITTED, _SAID)


# --- Items that are written in parts --------------------------------------------------------------------------


def write_part(item: Path, number: int, source: Checkpoint, template: Template | None) -> list[str]:
    """Writes some of the arrays of an item beside others, which may be written elsewhere at the same time.

    They are a database of their own, as Orbax has one of each process, which `finish_item` puts together; or where
    the template has none, a directory each.

    Args:
        item: The directory of the item, made if it is not there.
        number: Of this part, which no other has. What an earlier attempt at it has left is removed.
        source: The arrays.
        template: Of the whole item, as in `write_orbax`.

    Returns:
        The names of the files that hold them, under the item's directory.

    Raises:
        M3Error: The operating system fails.
    """
    places = [part_name(number)] if has_database(template) else list(source.tensors)
    with _saying_what_failed(item):
        item.mkdir(parents=True, exist_ok=True)
        for place in places:
            shutil.rmtree(item / place, ignore_errors=True)
    _write_arrays(item, item, source, template, number)
    found = (path for place in places for path in (item / place).rglob("*") if path.is_file())
    return sorted(path.relative_to(item).as_posix() for path in found)


def finish_item(
    item: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], template: Template | None
) -> None:
    """Makes an item of the parts in its directory, and a step of the directory above where the template is one's.

    Args:
        item: The directory of the parts. Of a database only what `is_node` knows has to be there.
        tensors: What they hold, by name.
        metadata: Texts that are kept with a tree that is not the template's.
        template: As in `write_orbax`.

    Raises:
        M3Error: A part is missing or damaged, names make no tree, or the operating system fails.
    """
    begun = time.time_ns()
    tree = _tree(tensors, metadata, template, item)
    if has_database(template):
        _merge_parts(item)
    with _saying_what_failed(item):
        _describe(item, tree, tensors, metadata, template, begun)
    if template is not None and template.name:
        _describe_step(item.parent, template, begun)


def is_node(name: str) -> bool:
    """Whether a file of a part tells where values are, and holds none.

    Args:
        name: With the part's directory, and perhaps others above.
    """
    *_, above, last = ["", *name.split("/")]
    return last == MANIFEST or above == NODES


def _merge_parts(item: Path) -> None:
    """One database of those of the parts, to whose files it refers, as Orbax makes one of those of all processes.

    Orbax's own function for it is not public, and imports JAX.
    """
    import tensorstore as ts

    with _saying_what_failed(item):
        for name in (MANIFEST, f"{MANIFEST}{LOCKED}"):  # of an attempt before
            (item / name).unlink(missing_ok=True)
        shutil.rmtree(item / VALUES, ignore_errors=True)
        shared, base = ts.Context(), files_at(item)  # references are copied within one context alone
        whole = ts.KvStore.open({"driver": "ocdbt", "base": base}, context=shared).result()
        together = ts.Transaction(atomic=True)
        keys: set[bytes] = set()
        for part in sorted(item.glob(part_name("*"))):
            below = {**base, "path": f"{base['path']}{part.name}/"}
            own = ts.KvStore.open({"driver": "ocdbt", "base": below}, context=shared).result()
            keys |= set(own.list().result())
            own.experimental_copy_range_to(whole.with_transaction(together)).result()
        together.commit_sync()
        found = set(whole.list().result())
    if found != keys:
        raise M3Error(f"{item} does not hold what its parts hold: check the disk, and start again.")


def _write(file: Path, text: str, origin: Path | None = None) -> None:
    """Writes a small file, as closed as the one that it is taken from, where that is there."""
    file.write_text(text, encoding="utf-8")
    if origin is not None and is_file(origin):
        close_as(origin, file)


@contextmanager
def _saying_what_failed(path: Path) -> Iterator[None]:
    try:
        yield
    except M3Error:
        raise
    except Exception as error:  # TensorStore's are of many types
        if isinstance(error, OSError):
            raise M3Error(f"{path} cannot be written: {error.strerror or error}; {mend(error)}.") from error
        full = str(error).startswith("RESOURCE_EXHAUSTED")  # TensorStore's word for a disk that is full
        reason = "the disk is full; free space or choose another place" if full else "check the place and the disk"
        raise M3Error(f"{path} cannot be written: {reason}.") from error


def _write_arrays(
    path: Path, directory: Path, source: Checkpoint, template: Template | None, part: int | None = None
) -> None:
    """Writes every array into `directory`, which will be `path`, or into a part of it."""
    template = None if template is None or template.tree is None else template
    layouts = {info.name: _layout(info, template) for info in source.tensors.values()}
    with _saying_what_failed(path):
        stores = _create_arrays(directory, source, layouts, has_database(template), part)
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
    directory: Path, source: Checkpoint, layouts: Mapping[str, StoredArray], database: bool, part: int | None
) -> dict[str, Any]:
    """Handles of new arrays, made all at once because the database commits together what comes together."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    base = files_at(directory)
    opening = {}
    for name, shape, dtype in source.tensors.values():
        spec = {
            "driver": layouts[name].driver,
            "kvstore": _in_database(base, name, part) if database else {**base, "path": f"{base['path']}{name}/"},
            "metadata": dict(layouts[name].metadata),
            "store_data_equal_to_fill_value": True,
        }
        opening[name] = ts.open(spec, create=True, dtype=ts.dtype(DTYPES[dtype]), shape=shape, context=context)
    for future in opening.values():
        future.exception()  # waits for all of them, whichever fails
    return {name: future.result() for name, future in opening.items()}


def _in_database(base: Mapping[str, Any], name: str, part: int | None) -> dict[str, Any]:
    """Where an array is in a database; those of parts keep apart what tells where values are, and the values."""
    if part is None:
        return {"driver": "ocdbt", "base": dict(base), "path": f"{name}/"}
    return {
        "driver": "ocdbt",
        "base": {**base, "path": f"{base['path']}{part_name(part)}/"},
        "path": f"{name}/",
        "value_data_prefix": f"{VALUES}/",
        "btree_node_data_prefix": f"{NODES}/",
        "version_tree_node_data_prefix": f"{NODES}/",
    }


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


def _tree_metadata(tensors: Iterable[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The content of `_METADATA`, as Orbax lays it out."""
    paths = [tuple(name.split(".")) for name in tensors]
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    return {
        "tree_metadata": {
            str(keys): {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": value}
            for keys in paths
        },
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": dict(metadata) or None,
    }
