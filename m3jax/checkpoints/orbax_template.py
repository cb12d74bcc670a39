"""What a checkpoint of Orbax is besides its values, so that another can be written to be restored as it is.

The tree (kinds of keys, lists, `None` and empty states), what was saved with it, how its arrays are divided and
compressed, their shardings, and for an item of a step its name and what stands beside it.
"""

import base64
import glob
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from m3jax import documents
from m3jax.checkpoints.headers import parse_json
from m3jax.checkpoints.key_values import context, open_array, unusable
from m3jax.checkpoints.orbax_names import (
    ARRAYS,
    SHARDINGS,
    STRINGS,
    array_patterns,
    below,
    database_patterns,
    description_patterns,
)
from m3jax.checkpoints.orbax_tree import (
    COMMITTED,
    MANIFEST,
    NO_ARRAYS,
    STEP,
    TEMPORARY,
    TREE,
    children,
    find_item,
    is_item,
    joined,
    key_value_spec,
    read_tree,
    remembered,
    step_number,
)
from m3jax.checkpoints.protocol import DTYPE_NAMES, TensorInfo
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.storage import is_dir, is_file, read_file
from m3jax.checkpoints.trust import check_companion, check_size
from m3jax.errors import M3Error

INNER = "orbax"  # what an item is called as it is written into a directory that it is to fill
_ARRAYS_OF = re.compile("process_[0-9]+")  # a process: what tells of its arrays
_SEQUENCE = 1  # the `key_type` of what is in a list or tuple
_STEP_FILES = ("orbax.checkpoint",)  # marks a step of the newest layout
DEFAULT_ITEM = "default"  # what a CheckpointManager calls the only item of a step
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


class StoredArray(NamedTuple):
    """How an array is stored.

    Attributes:
        info: What it is.
        driver: Of TensorStore.
        metadata: What the driver takes to make another.
        chunk: The shape of what is written at a time.
    """

    info: TensorInfo
    driver: str
    metadata: Mapping[str, Any]
    chunk: tuple[int, ...]


class Template(NamedTuple):
    """What a checkpoint is besides its values.

    Attributes:
        item: The directory of its arrays.
        name: What the item is called in its step; empty where it is a checkpoint by itself.
        tree: The content of `_METADATA`; None where an early version wrote none.
        step: The content of the `_CHECKPOINT_METADATA` of the item or of its step.
        beside: The other items of its step, and files that are no item's.
        layouts: How each array is stored, by name.
    """

    item: Path
    name: str
    tree: Mapping[str, Any] | None
    step: Mapping[str, Any]
    beside: tuple[Path, ...]
    layouts: Mapping[str, "StoredArray"] = MappingProxyType({})


def read_template(path: Path) -> Template:
    """What a checkpoint is besides its values.

    Args:
        path: A directory, as `find_item` takes it.

    Raises:
        M3Error: As `find_item`; or what it says of itself is damaged, or in files that are not its own.
    """
    path = remembered(path)
    item = find_item(path)
    file = _own(item, TREE)
    tree = parse_json(read_file(file), str(file)) if file is not None else None
    step, layouts = item.parent, _layouts(item)
    is_step = step_number(item.name) is not None and not is_file(step / STEP)  # of a run whose steps have no items
    if item == path or is_step:
        return Template(item, "", tree, _told(_own(item, STEP)), (), layouts)
    others = tuple(child for child in children(step) if child != item and _is_saved(child))
    files = tuple(file for name in _STEP_FILES if (file := _own(step, name)) is not None)
    return Template(item, item.name, tree, _told(_own(step, STEP)), (*others, *files), layouts)


def _own(directory: Path, name: str) -> Path | None:
    """A small file of a directory's own, which is read whole; None where it is not there."""
    file = directory / name
    if isinstance(file, RemotePath):
        if not file.is_file():
            return None
        check_size(file, file.stat().st_size)
    elif not os.path.lexists(file):
        return None
    else:
        check_companion(file, directory)
    return file


def _layouts(item: Path) -> dict[str, StoredArray]:
    """How the arrays of an item are stored that are stored by themselves."""
    tree, shared = read_tree(item), context()
    opening = {
        name: open_array({"driver": driver, "kvstore": key_value_spec(item, name)}, name, item, shared)
        for name, driver in tree.stored.items()
    }
    found = {}
    for name, future in opening.items():
        try:
            store = future.result()
        except Exception as error:  # of many types
            raise unusable(f"array {name!r}", item, error) from error
        told = store.spec(retain_context=False).to_json()["metadata"]
        chunk = tuple(int(size or 1) for size in store.chunk_layout.write_chunk.shape or store.shape)
        info = TensorInfo(name, tuple(store.shape), DTYPE_NAMES.get(store.dtype.name, store.dtype.name))
        found[name] = StoredArray(info, tree.stored[name], told, chunk)
    return found


def _is_saved(directory: Path) -> bool:
    """Whether a directory in a step is one of its items, of arrays or of anything else."""
    return is_item(directory) or any(is_file(directory / name) for name in (COMMITTED, "metadata"))


def _told(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    with _reading(file):
        told = documents.parse_json(read_file(file))  # its metrics may be NaN
    return told if isinstance(told, dict) else {}


def without_state(template: Template) -> Template:
    """A template without the other trees of its step, which hold the state of a training."""
    return template._replace(beside=tuple(path for path in template.beside if not is_dir(path) or not is_item(path)))


def has_database(template: Template | None) -> bool:
    """Whether arrays that are written after a template are in a database (OCDBT), not in a directory each."""
    return template is None or template.tree is None or is_file(template.item / MANIFEST)


def file_patterns(
    template: Template | None, tensors: Iterable[TensorInfo], beside: Iterable[str] = (), whole: bool = False
) -> tuple[str, ...]:
    """Patterns of all files of a checkpoint that is written after a template, and of no others.

    Args:
        template: Which; None where there is none.
        tensors: Its arrays.
        beside: The names of what is copied from the template's step.
        whole: Whether the item is written as `write_orbax` does, under other names at first.
    """
    name = template.name if template is not None else ""
    arrays = (pattern for info in tensors for pattern in array_patterns(info.name, len(info.shape)))
    item = (*description_patterns(), *(database_patterns() if has_database(template) else arrays))
    places = [name, *([f"{name or INNER}{TEMPORARY}", *([] if name else [INNER])] if whole else [])]
    within = [pattern for place in places for pattern in below(place, (*item, *(() if name else (STEP,))))]
    return (STEP, COMMITTED, *within, *map(glob.escape, beside))


# --- The tree ----------------------------------------------------------------------------------------------


def tree_of(template: Template, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The content of `_METADATA` of a checkpoint that has these arrays of the template's.

    Args:
        template: With a tree.
        tensors: By the names that they have there. What holds none of them any more (`None`, empty states and texts
            of a part of the tree that is left out) is left out with it.

    Raises:
        M3Error: An array has no place in the tree, a list would have a hole, or the tree is damaged.
    """
    assert template.tree is not None
    with _reading(template.item / TREE):
        return _tree_of(template, template.tree, tensors)


def _tree_of(template: Template, tree: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    entries: Mapping[str, Any] = tree["tree_metadata"]
    paths = {key: tuple(part["key"] for part in entry["key_metadata"]) for key, entry in entries.items()}
    arrays = {
        path: joined(path)
        for key, path in paths.items()
        if entries[key]["value_metadata"]["value_type"] not in NO_ARRAYS
    }
    lost = next((name for name in tensors if name not in set(arrays.values())), None)
    if lost is not None:
        raise M3Error(
            f"{lost!r} has no place in the tree of {template.item}: write safetensors, or take a base that has it."
        )
    kept = {path for path, name in arrays.items() if name in tensors}
    found = {}
    for key, path in paths.items():
        if path in arrays and path not in kept:
            continue
        if path not in arrays and not _still_holds(path, arrays, kept):
            continue
        found[key] = _entry(entries[key], tensors.get(arrays.get(path, "")), template)
    _check_lists(entries, paths, found, template)
    rest = {key: value for key, value in tree.items() if key not in ("tree_metadata", "value_metadata_tree")}
    whole = found.keys() == entries.keys()
    rich = tree.get("value_metadata_tree")  # which cannot be cut
    typed = {"value_metadata_tree": rich} if whole and rich is not None else {}
    return {"tree_metadata": found, **rest, **typed, "store_array_data_equal_to_fill_value": True}


def _still_holds(path: tuple[str, ...], arrays: Collection[tuple[str, ...]], kept: Collection[tuple[str, ...]]) -> bool:
    """Whether the nearest part of a tree around a leaf that had arrays still has one."""
    for depth in range(len(path) - 1, -1, -1):
        if any(array[:depth] == path[:depth] for array in arrays):
            return any(array[:depth] == path[:depth] for array in kept)
    return True


def _entry(entry: Mapping[str, Any], info: TensorInfo | None, template: Template) -> dict[str, Any]:
    """An entry of the tree, of an array as it will be stored."""
    told = dict(entry["value_metadata"])
    if info is None:
        return dict(entry)
    if told.get("skip_deserialize"):  # it was in the msgpack file of an early version
        told = {"value_type": "np.ndarray", "skip_deserialize": False}
    if told.get("write_shape") is not None and not _is_as_stored(template, info):
        told["write_shape"] = list(info.shape)
    return {**entry, "value_metadata": told}


def _is_as_stored(template: Template, info: TensorInfo) -> bool:
    """Whether an array has the shape that it has in the template, so that it is divided in the same way."""
    return info.name in template.layouts and template.layouts[info.name].info.shape == info.shape


def _check_lists(
    entries: Mapping[str, Any],
    paths: Mapping[str, tuple[str, ...]],
    found: Collection[str],
    template: Template,
) -> None:
    """Raise M3Error if a list loses an element and keeps a later one."""
    numbers: dict[tuple[str, ...], set[int]] = {}
    for key in found:
        for depth, part in enumerate(entries[key]["key_metadata"]):
            if part["key_type"] == _SEQUENCE:
                numbers.setdefault(paths[key][:depth], set()).add(int(part["key"]))
    for place, there in numbers.items():
        if len(there) <= max(there) and len(found) < len(entries):
            raise M3Error(
                f"a list in the tree of {template.item} ({joined(place)}) would lose some of its elements: write "
                "safetensors, or keep them (keep_state: first)."
            )


# --- The arrays --------------------------------------------------------------------------------------------


def layout_of(template: Template, info: TensorInfo) -> StoredArray | None:
    """How an array is to be stored: as the template's, divided and compressed in the same way.

    Returns:
        The layout; None where the template's array has another shape, or is not stored by itself.
    """
    if not _is_as_stored(template, info):
        return None
    layout = template.layouts[info.name]
    if layout.info.dtype == info.dtype:
        return layout
    dtypes = ("dtype", "data_type", "fill_value")
    return layout._replace(metadata={key: value for key, value in layout.metadata.items() if key not in dtypes})


# --- The files beside the tree -----------------------------------------------------------------------------


def tree_files(template: Template, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """The small files of an item that restoring reads: their names and texts.

    Args:
        template: What they are taken from.
        tensors: The arrays that the item will have.

    Raises:
        M3Error: One of the template's is damaged, or not its own.
    """
    if (file := _own(template.item, SHARDINGS)) is not None:
        told = _told(file)
        kept = {key: value for key, value in told.items() if _decoded(key) in tensors}
        yield SHARDINGS, json.dumps(kept)
    if (file := _own(template.item, STRINGS)) is not None:
        with _reading(file):
            strings = read_file(file).decode()
        yield STRINGS, strings
    for name in sorted(file.name for file in (template.item / ARRAYS).glob("*")):
        file = _own(template.item, f"{ARRAYS}/{name}") if _ARRAYS_OF.fullmatch(name) is not None else None
        if file is None:
            continue
        with _reading(file):
            entries = [
                _array_entry(template, entry, tensors)
                for entry in _told(file).get("array_metadatas", ())
                if entry["array_metadata"]["param_name"] in tensors
            ]
        yield f"{ARRAYS}/{file.name}", json.dumps({"array_metadatas": entries})


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except documents.FAULTS as error:
        raise M3Error(f"{file} is damaged: get the checkpoint again from its source.") from error


def _decoded(key: str) -> str:
    try:
        return base64.b64decode(key).decode()
    except ValueError:
        return ""


def _array_entry(template: Template, entry: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    told = entry["array_metadata"]
    info = tensors[told["param_name"]]
    if _is_as_stored(template, info):
        return dict(entry)
    shape = list(info.shape)
    return {"array_metadata": {**told, "write_shape": shape, "chunk_shape": shape}}


def step_content(
    template: Template | None, begun: int, ended: int, metadata: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The content of `_CHECKPOINT_METADATA`: the template's but for what tells of its own save and training.

    Args:
        template: What it is taken from; None for a checkpoint of numpy arrays.
        begun: When writing began, in nanoseconds.
        ended: When it ended.
        metadata: The texts of what is written; what is true or false there, as MaxText's `scan_layers`, is said where
            the template says nothing.
    """
    truths = {key: text == "true" for key, text in metadata.items() if text in ("true", "false")}
    told = {} if template is None else template.step
    handlers = told.get("item_handlers") or _HANDLER
    return {
        "item_handlers": handlers,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": begun,
        "commit_timestamp_nsecs": ended,
        "custom_metadata": told.get("custom_metadata") or truths,
    }
