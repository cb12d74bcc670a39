"""Copies of the files beside weights, as an output has them; no JAX."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3

from m3jax.checkpoints import digest_file
from m3jax.checkpoints.storage import is_file, read_file
from m3jax.checkpoints.trust import is_config, without_code
from m3jax.documents import TooDeepError, parse_json
from m3jax.errors import M3Error
from m3jax.outputs.modes import copy_mode

Edit: TypeAlias = Callable[[str, dict[str, Any]], dict[str, Any]]
"""From a file's name and the object in it to the object that an output has."""

CHAT_TEMPLATE_JSON = "chat_template.json"
"""Where processors had their chat template before chat_template.jinja."""


def read_entries(path: Path) -> Any:
    """What a JSON file says; None where it is no JSON.

    Raises:
        M3Error: It is nested without end, so that what it holds cannot be looked through.
    """
    return _entries(path, path.read_bytes())


def _entries(path: Path, content: bytes) -> Any:
    try:
        return parse_json(content, halves=True)
    except TooDeepError as error:
        raise M3Error(f"{path}: {error}: restore the file") from None
    except ValueError:
        return None


def check_documents(files: Mapping[str, Path]) -> None:
    """Raise M3Error for a file that an output would have, and nobody could read.

    Args:
        files: By name.
    """
    for name, path in files.items():
        if name.endswith(".json") and read_entries(path) is None:
            raise M3Error(f"{path}: is no JSON, and the output would be as unreadable: restore it")


def write_copy(path: Path, directory: Path, name: str, digest: str, edit: Edit | None = None) -> None:
    """Writes a file as an output has it, open to nobody who may not read the input's.

    Args:
        path: The input's file.
        directory: The output.
        name: What the file is called in a model directory; keys of configurations that name Python code are left out.
        digest: Of the bytes that the output was planned from.
        edit: What else becomes of a configuration's content, by its name; where nothing changes, bytes stay.

    Raises:
        M3Error: The file has other bytes by now, or is damaged in a way that could hide something.
        OSError: The operating system fails.
    """
    content = read_file(path)  # once: what is looked at is what is written
    if blake3(content).hexdigest() != digest:
        raise other_file(path)
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_content(path, content, name, edit))
    copy_mode(path, target)


def other_file(path: Path) -> M3Error:
    """The sentence for a file beside the weights that is not what an output was planned from."""
    return M3Error(f"{path} has changed since the output was planned from it: start again once it is at rest")


def check_files(digests: Mapping[Path, str]) -> None:
    """Raise M3Error if one of some files is not what an output was planned from.

    Args:
        digests: Of the files then, by their paths.
    """
    for path, digest in digests.items():
        if not is_file(path) or digest_file(path) != digest:
            raise other_file(path)


def _content(path: Path, content: bytes, name: str, edit: Edit | None) -> bytes:
    """A file as an output has it: the same bytes, unless something in it does not hold of the output."""
    last = name.rpartition("/")[2]
    entries = _entries(path, content) if is_config(last) or last == CHAT_TEMPLATE_JSON else None
    if not isinstance(entries, dict):
        return content
    told = without_code(entries)
    if edit is not None:
        told = edit(name, told)
    if told == entries:
        return content
    try:
        return (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can only have escaped
        return (json.dumps(told, indent=2) + "\n").encode()
