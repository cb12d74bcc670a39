"""Whose files are: what m3jax has written itself it may replace, and nothing else."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from m3jax.documents import FAULTS, LARGEST_FILE, parse_json
from m3jax.errors import M3Error

PART = ".m3jax-part"
"""Ends the name of a file that is being written; a kill may leave one, which the next writing replaces."""

PICTURES: Mapping[str, Mapping[str, str]] = {
    "png": {"Software": "m3jax"},
    "svg": {"Creator": "m3jax"},
    "pdf": {"Creator": "m3jax"},
}
"""By format, the metadata that a picture has and by which it is known again."""

_MARKS = (b"tEXtSoftware\0m3jax", b"<dc:title>m3jax</dc:title>", b"/Creator (m3jax)")


def check_entries(path: Path, keys: Collection[str]) -> None:
    """Raise M3Error where a file would be replaced that somebody else wrote.

    Args:
        path: The file: JSON, or a JSON object in each line. None need be there.
        keys: What each object has of those that m3jax writes there.
    """
    content = _content(path)
    if content and not _has_entries(content, keys):
        raise M3Error(f"{path} is none that m3jax has written, and would be replaced: move it, or give another place")


def check_unmade(path: Path) -> None:
    """Raise M3Error where a picture would replace a file that is none of m3jax's pictures.

    Args:
        path: Where it is to be.
    """
    content = _content(path)
    if content and not any(mark in content for mark in _MARKS):
        raise M3Error(f"{path} is no picture of m3jax's, and would be replaced: move it, or choose another name")


def _content(path: Path) -> bytes:
    """What is there to lose: nothing where no file is or an empty one; a word, where nobody can tell whose it is."""
    try:
        if path.is_file():
            return path.read_bytes() if path.stat().st_size <= LARGEST_FILE else b"large"
        return b"other" if path.is_symlink() or path.exists() else b""
    except OSError:
        return b"unread"


def _has_entries(content: bytes, keys: Collection[str]) -> bool:
    try:
        told: Any = parse_json(content, halves=True)
    except FAULTS:
        try:
            told = [parse_json(line, halves=True) for line in content.splitlines()]
        except FAULTS:
            return False
    entries = told if isinstance(told, list) else [told]
    return all(isinstance(entry, dict) and entry.keys() >= set(keys) for entry in entries)
