"""In which format an output was written, as its manifest tells, and which of its files are other each time."""

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.checkpoints import Checkpoint, open_orbax, open_safetensors
from m3jax.checkpoints.formats import ORBAX
from m3jax.checkpoints.orbax_tree import COMMITTED, MANIFEST, STEP, part_name
from m3jax.checkpoints.views import renamed


def open_written(directory: Path, told: Mapping[str, Any]) -> Checkpoint:
    """The weights of an output, as far as they are there, under the names of the merge.

    Args:
        directory: The output.
        told: What its manifest says of the output.

    Raises:
        M3Error: It is damaged.
    """
    if told.get("format") != ORBAX.name:
        return open_safetensors(directory)
    checkpoint = open_orbax(directory / str(told.get("item", "")))
    stored = told.get("stored") or {}
    return renamed(checkpoint, {name: own for name, own in stored.items() if own in checkpoint.tensors})


class Varying(NamedTuple):
    """Files whose content is other each time that the same checkpoint is written.

    Attributes:
        names: Theirs.
        directories: How their names begin; all that is in them.
    """

    names: tuple[str, ...]
    directories: tuple[str, ...]

    def matches(self, name: str) -> bool:
        """Whether a file is one of them."""
        return name in self.names or name.startswith(self.directories)


def varying_files(item: str, stored: Iterable[str]) -> Varying:
    """The files of a checkpoint of Orbax that no manifest lists, as they differ each time.

    Args:
        item: What the item is called in its step; empty where it is no step's.
        stored: The names of its arrays.
    """
    prefix = f"{item}/" if item else ""
    names = tuple({STEP, COMMITTED, f"{prefix}{STEP}", f"{prefix}{COMMITTED}", f"{prefix}{MANIFEST}"})
    return Varying(names, (f"{prefix}d/", f"{prefix}{part_name('')}", *(f"{prefix}{name}/" for name in stored)))


def varying_patterns(told: Mapping[str, Any]) -> tuple[str, ...]:
    """Patterns of the files of an output of Orbax that its manifest does not list, as they differ each time.

    Args:
        told: What its manifest says of the output.
    """
    if told.get("format") != ORBAX.name:
        return ()
    stored = told.get("stored") or {}
    found = varying_files(str(told.get("item", "")), [stored.get(name, name) for name in told.get("tensors", ())])
    return (*map(glob.escape, found.names), *(f"{glob.escape(place)}*" for place in found.directories))
