"""Where an Orbax checkpoint's arrays are, and which there are.

What Orbax calls an item is a set of zarr arrays, one for each leaf, under the leaf's path of keys joined with ".", in
an OCDBT database or in one directory each. `_METADATA` lists the leaves; early versions kept the tree, and leaves they
thought small, in a msgpack file `checkpoint`. Orbax's own interface (`PyTreeCheckpointHandler.metadata`, `path.step`)
describes neither those early files nor leaves inside msgpack, and it imports JAX, so the files are read here.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3jax import documents
from m3jax.checkpoints.headers import parse_json
from m3jax.checkpoints.key_values import context, files_at, unusable
from m3jax.checkpoints.msgpack import open_msgpack
from m3jax.checkpoints.protocol import Checkpoint, natural_key
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.storage import exists, is_dir, is_file, read_file, unreadable
from m3jax.documents import LARGEST_FILE
from m3jax.errors import M3Error

TREE, MANIFEST, AGGREGATE = "_METADATA", "manifest.ocdbt", "checkpoint"  # the files of an item
STEP, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"  # those beside them that tell of a save
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a directory that is being saved
_PLACEHOLDER = "PLACEHOLDER://"  # stands in the msgpack file for an array that is stored by itself
_DESCRIPTIONS = (MANIFEST, ".zarray", "zarr.json")  # which TensorStore reads whole
STEPS = "checkpoints"  # where MaxText keeps the steps of a run
NO_ARRAYS = ("None", "Dict", "List", "NamedTuple", "Tuple", "string")
_PARAMETERS = ("params", "model_params", "model", "items", "default")  # of several items the one that has the weights
_LONGEST_NUMBER = 18  # digits
_STEP = re.compile("(?:.*[_-])?([0-9]+)")


def part_name(number: int | str) -> str:
    """What Orbax calls the database that a process writes before that of all refers to it."""
    return f"ocdbt.process_{number}"


# --- Finding the arrays ----------------------------------------------------------------------------------


def is_orbax(path: Path) -> bool:
    """Whether a directory looks like Orbax's: an item, a step of items, several steps, or one that was not finished.

    Args:
        path: Any path.
    """
    path = remembered(path)
    if not is_dir(path):
        return False
    below = (_leads_to_items(child) or is_unfinished(child) for child in children(path))
    return is_file(path / STEP) or is_unfinished(path) or is_item(path) or any(below)


def remembered(path: Path) -> Path:
    """A path whose directories are listed once each, where they are remote."""
    return path.remembering() if isinstance(path, RemotePath) and path.memory is None else path


def children(directory: Path) -> list[Path]:
    """The directories in a directory, in natural order."""
    try:
        return sorted((path for path in directory.iterdir() if is_dir(path)), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise unreadable(directory, error) from error


def says_item(directory: Path) -> bool:
    """Whether a file in a directory says that it is an item."""
    return any(is_file(directory / name) for name in (TREE, MANIFEST, AGGREGATE))


def is_item(directory: Path) -> bool:
    """Whether a directory is an item: a set of arrays."""
    return says_item(directory) or any(
        is_file(child / name) for child in children(directory) for name in (".zarray", "zarr.json")
    )


def holds_items(directory: Path) -> bool:
    """Whether a directory is an item, or a step that has some."""
    return is_item(directory) or any(map(is_item, children(directory)))


def step_number(name: str) -> int | None:
    """The number at the end of a step's name; None where it is no step's.

    Example:
        >>> step_number("checkpoint_30"), step_number("0012"), step_number("llama2")
        (30, 12, None)
    """
    found = _STEP.fullmatch(name)
    return None if found is None or len(found[1]) > _LONGEST_NUMBER else int(found[1])


def _leads_to_items(directory: Path) -> bool:
    """Whether a directory has items, or is where a trainer keeps steps."""
    return holds_items(directory) or (directory.name == STEPS and any(map(holds_items, children(directory))))


def is_unfinished(directory: Path) -> bool:
    """Whether the save that made a directory was interrupted."""
    if TEMPORARY in directory.name or TEMPORARY in directory.parent.name:
        return True
    if any(directory.glob(part_name("*"))) and not exists(directory / MANIFEST):
        return True
    if not is_file(directory / STEP) or exists(directory / COMMITTED):
        return False
    try:
        told = documents.parse_json(read_file(directory / STEP))  # its metrics may be NaN
    except ValueError:
        return True
    if not isinstance(told, dict):
        return True
    return bool(told.get("init_timestamp_nsecs")) and told.get("commit_timestamp_nsecs") is None


def has_unfinished(step: Path) -> bool:
    """Whether the save of a step, or of one of its items, was interrupted."""
    if is_unfinished(step) or (not is_item(step) and any(map(is_unfinished, children(step)))):
        return True
    return _commits(step) and not is_file(step / COMMITTED) and holds_items(step)


def _commits(directory: Path) -> bool:
    """Whether Orbax ends its saves there with a file, as it cannot rename."""
    return isinstance(directory, RemotePath) and directory.scheme == "gs"


def _lacks_commit(item: Path) -> bool:
    """Whether an item is where Orbax ends its saves with a file, and neither it nor its step has that."""
    return _commits(item) and not any(is_file(place / COMMITTED) for place in (item, item.parent))


def item_note(name: str, path: Path) -> str | None:
    """Which tree of a step is read, where it has several; None where there is no choice.

    Args:
        name: What the user calls the model.
        path: Its directory.
    """
    path = remembered(path)
    if not is_dir(path) or not is_orbax(path) or is_item(path):
        return None
    item = find_item(path)
    others = [child.name for child in children(item.parent) if child != item and is_item(child)]
    return f"{name}: {item.name} is read, not {', '.join(others)} beside it." if others else None


def find_item(path: Path) -> Path:
    """The directory of arrays that a path means: itself, or one below it.

    Args:
        path: A directory: of arrays, of a step, or of a run, whose last finished step is meant. Of several items of a
            step the one that has the parameters' usual name is meant.

    Returns:
        The item.

    Raises:
        M3Error: There is none, several are there, or the save was interrupted.
    """
    path = remembered(path)
    if not is_dir(path):
        raise M3Error(f"{path} is no directory of an Orbax checkpoint: check the path.")
    if is_unfinished(path.absolute()) or (is_item(path) and _lacks_commit(path)):
        raise M3Error(f"{path} was not saved to its end or has lost files: save it again, or take another one.")
    if is_item(path):
        return path
    below = children(path)
    found = [child for child in below if TEMPORARY not in child.name and _leads_to_items(child)]
    if not found and any(map(is_unfinished, below)):
        raise M3Error(f"{path} holds only saves that did not come to their end: take another, or save again.")
    if not found:
        raise M3Error(f"{path} holds no arrays of Orbax ({TREE}, {MANIFEST}, zarr): give the directory that does.")
    return find_item(found[0] if len(found) == 1 else _choose(path, found))


def _choose(path: Path, found: Sequence[Path]) -> Path:
    """The one of several directories that is meant, where that is plain."""
    names = ", ".join(child.name for child in found[-5:])
    if all(step_number(child.name) is not None for child in found):
        finished = [child for child in found if not has_unfinished(child)]
        return max(finished or found, key=lambda child: step_number(child.name) or 0)
    with_arrays = [child for child in found if is_item(child) and any(read_tree(child)[:2])]
    likely = [child for child in with_arrays if child.name in _PARAMETERS]
    if len(with_arrays) == 1 or len(likely) == 1:
        return (likely or with_arrays)[0]
    raise M3Error(f"{path} holds several trees ({names}): give the path of one, such as {found[0]}.")


# --- Which arrays there are ------------------------------------------------------------------------------


class Tree(NamedTuple):
    """What an item says of itself.

    Attributes:
        stored: The driver of each array that is stored by itself, by name.
        packed: Names of leaves in the msgpack file, and whether each must be an array; numbers may not be.
        complete: Whether every chunk is stored; else those of zeros may be absent.
        metadata: Texts that were saved with the tree.
    """

    stored: dict[str, str]
    packed: dict[str, bool]
    complete: bool
    metadata: dict[str, str]


def read_tree(item: Path) -> Tree:
    """Which arrays an item has.

    Args:
        item: The directory of the arrays.

    Returns:
        What it says of itself.

    Raises:
        M3Error: It is damaged or of an unknown version.
    """
    _check_files(item)
    if is_file(item / TREE):
        return _listed(item / TREE)
    if is_file(item / AGGREGATE):
        with open_aggregate(item) as aggregate:
            texts = aggregate.metadata.values()
            stored = [text.removeprefix(_PLACEHOLDER) for text in texts if text.startswith(_PLACEHOLDER)]
            return Tree(dict.fromkeys(stored, "zarr"), dict.fromkeys(aggregate.tensors, True), False, {})
    drivers = {".zarray": "zarr", "zarr.json": "zarr3"}
    keys = (os.path.split(key) for key in _stored_keys(item))
    return Tree({name: drivers[last] for name, last in keys if last in drivers}, {}, False, {})


def _check_files(item: Path) -> None:
    """Raise M3Error where TensorStore would wait for a pipe, or end the process for want of memory."""
    if isinstance(item, RemotePath):
        return
    try:
        for entry in _entries(item):
            if not entry.is_file() and os.path.exists(entry.path):
                raise M3Error(f"{entry.path} is not a regular file: get the checkpoint again from its source.")
            if entry.name in _DESCRIPTIONS and entry.stat().st_size > LARGEST_FILE:
                raise M3Error(f"{entry.path} has {entry.stat().st_size:,} bytes and is damaged: get it again.")
    except OSError as error:
        raise unreadable(item, error) from error


def _entries(directory: Path | str) -> Iterator["os.DirEntry[str]"]:
    """All that is in a directory and below it but directories."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)
            elif not (entry.is_symlink() and entry.is_dir()):
                yield entry


def _listed(file: Path) -> Tree:
    """The tree that `_METADATA` describes."""
    told = parse_json(read_file(file), str(file))
    try:
        driver = "zarr3" if told.get("use_zarr3") else "zarr"
        stored: dict[str, str] = {}
        packed: dict[str, bool] = {}
        for entry in told["tree_metadata"].values():
            name = joined(key["key"] for key in entry["key_metadata"])
            value = entry["value_metadata"]
            if value["value_type"] in NO_ARRAYS:
                continue
            if name in stored or name in packed:
                raise M3Error(f'{file} has two leaves of the name {name!r}, keys joined with ".": rename one.')
            if not value["skip_deserialize"]:
                stored[name] = driver
            else:
                packed[name] = value["value_type"] != "scalar"
        custom = (told.get("custom_metadata") or {}).items()
    except (KeyError, TypeError, AttributeError) as error:
        raise M3Error(f"{file} is damaged or of a version of Orbax that is not known here: update m3jax.") from error
    metadata = {key: text for key, text in custom if isinstance(text, str)}
    return Tree(stored, packed, bool(told.get("store_array_data_equal_to_fill_value")), metadata)


def joined(keys: Iterable[str]) -> str:
    """The name of a leaf, from the keys that lead to it."""
    return ".".join(keys)


def open_aggregate(item: Path) -> Checkpoint:
    """Opens the msgpack file of an item.

    Args:
        item: A directory that has one.

    Returns:
        The leaves in it; use it as a context manager.

    Raises:
        M3Error: It is damaged, cannot be read or is remote.
    """
    if isinstance(item, RemotePath):
        raise M3Error(f"{item} is of an early version of Orbax, which is read from this disk only: download it first.")
    return open_msgpack(item / AGGREGATE)


def key_value_spec(item: Path, name: str = "") -> dict[str, Any]:
    """Where TensorStore finds an array, or all of them.

    Args:
        item: The directory of the arrays.
        name: The array; all of them if empty.

    Returns:
        A specification of a `tensorstore.KvStore`.

    Raises:
        M3Error: The name leads out of the directory.
    """
    if ".." in name.split("/"):
        raise M3Error(f"{item} places array {name!r} outside of the checkpoint: do not trust it.")
    files = files_at(item)
    below = f"{name}/" if name else ""
    if is_file(item / MANIFEST):
        return {"driver": "ocdbt", "base": files, "path": below}
    return {**files, "path": files["path"] + below}


def _stored_keys(item: Path) -> list[str]:
    """The names of all that is stored."""
    import tensorstore as ts

    try:
        opened = ts.KvStore.open(key_value_spec(item), context=context()).result()
        return [key.decode() for key in opened.list().result()]
    except Exception as error:  # of many types
        raise unusable("the list of arrays", item, error) from error
