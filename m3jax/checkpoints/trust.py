"""What is not taken from a model directory as it comes: links that lead out of it, what is no file, and code."""

import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from m3jax.checkpoints import formats
from m3jax.checkpoints.orbax_tree import item_note
from m3jax.checkpoints.protocol import Checkpoint
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.storage import is_dir, list_names, open_file, read_exactly, read_file, unreadable
from m3jax.documents import LARGEST_FILE, parse_json
from m3jax.errors import M3Error

_CODE_KEYS = ("auto_map", "custom_pipelines")  # whose values name classes in Python files, which loaders may import
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "*processor_config.json")
_NAMED = 3  # files that a sentence names


def check_companion(path: Path, directory: Path) -> None:
    """Checks that a file beside the weights is the model's own, before it is opened.

    Args:
        path: A local file under `directory`.
        directory: The model directory.

    Raises:
        M3Error: It is a link that leads out of the model and out of the hub cache's copy of it, no regular file, or
            larger than any such file is.
    """
    check_size(path, own_file(path, directory).st_size)


def read_companion(path: Path, directory: Path) -> bytes:
    """The whole of a file beside the weights, which is the model's own: also where a link takes its place meanwhile.

    Args:
        path: A local file under `directory`.
        directory: The model directory.

    Raises:
        M3Error: As `check_companion`, or it cannot be read.
    """
    check_companion(path, directory)
    descriptor = open_file(path)
    try:
        told = os.fstat(descriptor)
        if not os.path.samestat(told, own_file(path, directory)):
            raise M3Error(f"{path} became another file while it was opened: start again once it is at rest.")
        check_size(path, told.st_size)
        content = bytearray(told.st_size)
        return bytes(content[: read_exactly(descriptor, memoryview(content), 0)])
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)


def check_tokenizer_files(directory: Path) -> None:
    """Checks all that a tokenizer's class, which a model names as it likes, may open in or below a model directory.

    What such a file is called only its class says. Weights, and the indexes of them, no tokenizer reads.

    Raises:
        M3Error: A link leads out of the model, to nothing, or to what is no file; a file is none; or a directory cannot
            be listed.
    """
    list_names(directory)
    for place, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]  # of other tools
        for name in directories:
            if (path := Path(place, name)).is_symlink():
                _check_inside(path, directory)
        for name in files:
            if not any(format.names(name) for format in formats.FORMATS):
                own_file(Path(place, name), directory)


def own_file(path: Path, directory: Path) -> os.stat_result:
    """What the operating system says of a regular file of the model's own.

    Args:
        path: A local file under `directory`.
        directory: The model directory.

    Raises:
        M3Error: As `check_companion`, whatever its size.
    """
    told = _check_inside(path, directory)
    if not stat.S_ISREG(told.st_mode):
        raise M3Error(f"{path} is not a regular file: remove it from the model.")
    return told


def _check_inside(path: Path, directory: Path) -> os.stat_result:
    """What the operating system says of what a path leads to, which is of the model itself."""
    try:
        real = path.resolve(strict=True)
        told = real.lstat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise M3Error(f"{path} is a link to what is not there, or cannot be seen: remove it or mend it.") from error
    if not any(real.is_relative_to(root) for root in _own_places(directory.resolve())):
        raise M3Error(
            f"{path} leads out of the model, to {real}: put a copy there in place of the link, if it is meant."
        )
    return told


def check_size(path: Path, size: int) -> None:
    """Raise M3Error if a file beside the weights is too large to be one."""
    if size > LARGEST_FILE:
        raise M3Error(
            f"{path} has {size:,} bytes, more than any tokenizer or configuration ({LARGEST_FILE:,}): remove it."
        )


def _own_places(root: Path) -> Iterator[Path]:
    """Where the files of a model are: its directory, and the blobs that links in a hub cache's snapshot lead to."""
    yield root
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            yield parent.parent / "blobs"


# --- Code ------------------------------------------------------------------------------------------------


def is_code(name: str) -> bool:
    """Whether a file's name is that of code, which is not copied.

    Example:
        >>> is_code("modeling.py"), is_code("config.json")
        (True, False)
    """
    return name.endswith(".py")


def is_config(name: str) -> bool:
    """Whether a companion is one whose keys may ask a loader to run code.

    Example:
        >>> is_config("preprocessor_config.json"), is_config("tokenizer.json")
        (True, False)
    """
    return any(fnmatchcase(name, pattern) for pattern in _CONFIGS)


def without_code(entries: Any) -> Any:
    """The content of a configuration without the keys that name code, at any depth.

    Example:
        >>> without_code({"model_type": "x", "auto_map": {"AutoConfig": "my.Config"}, "text_config": {"auto_map": []}})
        {'model_type': 'x', 'text_config': {}}
    """
    if isinstance(entries, dict):
        return {key: without_code(entry) for key, entry in entries.items() if key not in _CODE_KEYS}
    return [without_code(entry) for entry in entries] if isinstance(entries, list) else entries


def code_keys(entries: Any) -> set[str]:
    """The keys that name code, at any depth."""
    if isinstance(entries, dict):
        return (entries.keys() & set(_CODE_KEYS)).union(*map(code_keys, entries.values()))
    return set().union(*map(code_keys, entries)) if isinstance(entries, list) else set()


def _code_beside(directory: Path, names: Sequence[str]) -> list[str]:
    """The Python files of a directory, and the keys in its configurations that name code, in words."""
    told = sorted(filter(is_code, names))
    for name in sorted(filter(is_config, names)):
        try:
            remote = isinstance(directory, RemotePath)
            content = read_file(directory / name) if remote else read_companion(directory / name, directory)
            keys = code_keys(parse_json(content, halves=True))
            told += [f"{key} in {name}" for key in _CODE_KEYS if key in keys]
        except (M3Error, ValueError):  # whoever needs the file says what is wrong with it
            continue
    return told


# --- What a user should know -----------------------------------------------------------------------------


def code_note(name: str, path: Path) -> str | None:
    """What to say of a model that brings code; None of one that does not.

    Args:
        name: What the user calls the model.
        path: Its directory, or a weight file in it.

    Raises:
        M3Error: The directory cannot be listed.
    """
    directory = path if is_dir(path) else path.parent
    return said_of_code(name, _code_beside(directory, list_names(directory)))


def said_of_code(name: str, found: Sequence[str]) -> str | None:
    """What to say of a model by the code that was found; None where none was.

    Args:
        name: What the user calls the model.
        found: Files of Python, and keys of configurations, in words.
    """
    if not found:
        return None
    files, keys = list(filter(is_code, found)), [told for told in found if not is_code(told)]
    told = files[:_NAMED] + ([f"{len(files) - _NAMED} more .py files"] if len(files) > _NAMED else []) + keys
    return f"{name} brings Python code ({', '.join(told)}): it is never run, and neither files nor keys are copied."


def remarks(name: str, path: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a user should know of how a model was read: weights and trees that were left alone, and code.

    Args:
        name: What the user calls it.
        path: Its directory, or a weight file in it.
        checkpoint: What was opened there.

    Raises:
        M3Error: The directory cannot be listed.
    """
    said = []
    if is_dir(path):
        names, read = set(list_names(path)), {file.name for file in checkpoint.files()}
        for format in formats.FORMATS:
            single, index = format.single_file, format.index_file
            if {single, index} <= names and single not in read and any(map(format.names, read)):
                said.append(
                    f"{name}: {single} is not read, as {index} beside it says where the weights are: remove one of the"
                    f" two, because some software reads {single}."
                )
    notes = (item_note(name, path), code_note(name, path))
    return (*said, *(note for note in notes if note is not None))
