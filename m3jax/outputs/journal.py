"""What the places in which an output is made have in common, here and in remote storage.

A journal tells which weight files are finished and what was measured, so that an interrupted merge goes on where it
was; it is a merge's own by the identity that it begins with. Loaders take a directory for a model by a few small files,
which appear last.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from m3jax.checkpoints.formats import FORMATS, SAFETENSORS
from m3jax.checkpoints.orbax_tree import COMMITTED
from m3jax.checkpoints.storage import read_file
from m3jax.documents import parse_json
from m3jax.errors import M3Error

Entry: TypeAlias = dict[str, Any]
"""What is finished: a weight file, named by the key `shard`, or something else."""

_LITERAL = re.compile(r"(?:[^*?[]|\[[*?[]\])*")  # the beginning of a pattern that matches itself alone
_WEIGHTS = {f"*{ending}" for format in FORMATS for ending in format.endings}
_LAST = ("m3jax.json", SAFETENSORS.index_file, "config.json")


class Journal(NamedTuple):
    """What one process has told.

    Attributes:
        identity: Digest of everything that the output's bytes depend on; empty where the journal is damaged.
        entries: What it has finished.
        names: Patterns of the files that the merge makes, as far as it has told them.
    """

    identity: str
    entries: list[Entry]
    names: tuple[str, ...] = ()


def finished_in(journals: Iterable[Journal], identity: str) -> list[Entry]:
    """What all journals of a merge tell, whatever lies there of others."""
    return [entry for journal in journals if journal.identity == identity for entry in journal.entries]


def weights_in(entries: Iterable[Entry]) -> dict[str, Entry]:
    """The entries of weight files, by the files' names."""
    return {entry["shard"]: entry for entry in entries if "shard" in entry}


def files_of(entry: Mapping[str, Any]) -> list[str]:
    """The files that hold what an entry's weight file held: itself, or what was made of it."""
    return list(entry.get("files") or [entry["shard"]])


def is_weights(name: str) -> bool:
    """Whether a file's name is that of weights, which are safely stored as soon as they are finished."""
    return name.endswith(SAFETENSORS.endings)


def makes_a_model(name: str) -> bool:
    """Whether loaders take a place for a model by a file of this name."""
    return name in _LAST or _commits(name)


def _commits(name: str) -> bool:
    """Whether a file says of the directory that it is in that all is there, as Orbax has it in remote storage."""
    return name.rpartition("/")[2] == COMMITTED


def in_order(names: Collection[str]) -> list[str]:
    """Names of small files in the order in which they are to appear.

    Example:
        >>> in_order(["config.json", "tokenizer.json", "m3jax.json", "README.md"])
        ['README.md', 'tokenizer.json', 'm3jax.json', 'config.json']
        >>> in_order(["commit_success.txt", "m3jax.json", "items/commit_success.txt", "items/_METADATA"])
        ['items/_METADATA', 'm3jax.json', 'items/commit_success.txt', 'commit_success.txt']
    """
    return sorted(names, key=lambda name: (_turn(name), -name.count("/"), name))


def _turn(name: str) -> int:
    if _commits(name):
        return 1 + len(_LAST)
    return 1 + _LAST.index(name) if name in _LAST else 0


class Journalled(ABC):
    """Where one of the processes that make an output works.

    Attributes:
        path: A directory here, in which files are made.
        finished: What is done, by this process and by those before it.
    """

    def __init__(self, path: Path, finished: Sequence[Mapping[str, Any]]) -> None:
        """Begins where others have left off.

        Args:
            path: The directory.
            finished: What was done before.
        """
        self.path = path
        self.finished: list[Entry] = [dict(entry) for entry in finished]

    @abstractmethod
    def holds(self, file: str) -> bool:
        """Whether a finished weight file, or what was made of it, is still there."""

    def record(self, entry: Mapping[str, Any]) -> None:
        """Adds an entry to the journal; what it tells of is safely stored before this returns."""
        self.finished.append(self._store(dict(entry)))

    @abstractmethod
    def _store(self, entry: Entry) -> Entry:
        """Stores an entry, and before it the weight file that it tells of; returns what is to be known of it."""


# --- Journals in files -------------------------------------------------------------------------------------------


def line_of(told: Mapping[str, Any]) -> str:
    """A line of a journal, with a sum that tells whether it is as it was written."""
    text = json.dumps(told)
    return f"{_sum(text)} {text}\n"


def _sum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _whole_lines(journal: Path) -> Iterator[dict[str, Any] | None]:
    """What each line tells; None for one that a crash cut or a disk changed."""
    with suppress(M3Error):
        for line in read_file(journal).decode(errors="replace").split("\n")[:-1]:
            said, _, text = line.partition(" ")
            with suppress(ValueError):
                told = parse_json(text) if said == _sum(text) else None
                yield told if isinstance(told, dict) else None


def read_journal(journal: Path) -> Journal:
    """What a journal's whole lines tell, the first its identity."""
    first, *others = list(_whole_lines(journal)) or [None]
    names: Any = [] if first is None else first.get("names", [])
    if first is None or not are_patterns(names):
        return Journal("", [])
    told = [line for line in others if line is not None and is_entry(line)]
    return Journal(str(first.get("identity", "")), told, tuple(names))


def is_entry(told: Any) -> bool:
    """Whether an entry has the form that is relied on, whoever has written it."""
    if not isinstance(told, dict):
        return False
    tensors, digests, sent = told.get("tensors", {}), told.get("digests", {}), told.get("sent", {})
    inputs: list[Any] = [tensor.get("inputs") for tensor in tensors.values()] if _holds_objects(tensors) else [None]
    inputs += digests.values() if isinstance(digests, dict) else [None]
    return (
        all(_are_inside(told.get(key, [])) for key in ("files", "ours"))
        and _are_inside([told.get("shard", "weights")])
        and isinstance(sent, dict)
        and _are_inside(list(sent))
        and _holds_objects(tensors)
        and all(isinstance(tensor.get("digest"), str) for tensor in tensors.values())
        and all(_holds_objects(each) and all(map(str.isdecimal, each)) for each in inputs)
        and all(_holds_objects(tensor.get("lent", {})) for tensor in tensors.values())
    )


def _are_inside(names: Any) -> bool:
    """Whether it is a list of names of files in or below a directory: none leads out of it."""
    if not are_texts(names):
        return False
    paths = map(PurePosixPath, names)
    return not any(path.is_absolute() or ".." in path.parts or not path.parts or "\0" in str(path) for path in paths)


def _holds_objects(told: Any) -> bool:
    return isinstance(told, dict) and all(isinstance(each, dict) for each in told.values())


def are_texts(told: object) -> bool:
    """Whether it is a list of texts."""
    return isinstance(told, list) and all(isinstance(each, str) for each in told)


def are_patterns(told: Any) -> bool:
    """Whether it is a list of patterns of files as writers announce them: none is of whatever somebody may have there.

    Example:
        >>> are_patterns(["config.json", "model[*].json", "d/*", "*.safetensors"]), are_patterns(["*"])
        (True, False)
    """
    return are_texts(told) and all(map(_is_announced, told))


def _is_announced(pattern: str) -> bool:
    literal = _LITERAL.match(pattern)
    assert literal is not None  # it may be empty
    return literal[0] == pattern or literal[0].endswith(("/", ".", "_")) or pattern in _WEIGHTS


def append(journal: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to a journal, safely stored before this returns."""
    with open(journal, "a", encoding="utf-8") as file:
        file.write(line_of(entry))
        file.flush()
        os.fsync(file.fileno())
