"""In which format an output was written, as its manifest tells, and which of its files are other each time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from m3jax.checkpoints import Checkpoint, open_orbax, open_safetensors
from m3jax.checkpoints.formats import ORBAX
from m3jax.checkpoints.orbax_names import array_patterns, below, database_patterns
from m3jax.checkpoints.orbax_tree import COMMITTED, STEP
from m3jax.checkpoints.storage import read_file
from m3jax.checkpoints.views import renamed
from m3jax.documents import FAULTS, parse_json

SAVES = "saves"
"""The key under which a manifest tells of the saves of an output of Orbax."""

_TIMES = ("init_timestamp_nsecs", "commit_timestamp_nsecs")


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


def varying_patterns(told: Mapping[str, Any]) -> tuple[str, ...]:
    """Patterns of the files of an output of Orbax of which its manifest has no digest, as they differ each time.

    Args:
        told: What its manifest, whoever wrote it, says of the output.
    """
    if told.get("format") != ORBAX.name:
        return ()
    item, stored, tensors = (told.get(key) for key in ("item", "stored", "tensors"))
    names = stored if isinstance(stored, dict) else {}
    entries = tensors if isinstance(tensors, dict) else {}
    arrays = (
        pattern
        for name, entry in entries.items()
        for pattern in array_patterns(str(names.get(name, name)), _rank(entry))
    )
    values = below(str(item or ""), (*database_patterns(), *arrays))
    # Without what is told of its save it is of a version that told nothing of these.
    untold = () if isinstance(told.get(SAVES), dict) else (COMMITTED, *below(str(item or ""), (COMMITTED, STEP)))
    return tuple(dict.fromkeys((STEP, *values, *untold)))


def _rank(entry: Any) -> int:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return len(shape) if isinstance(shape, list) else 0


def digest_save(file: Path) -> str:
    """The digest of a `_CHECKPOINT_METADATA` with its two times as 0; where it is not as m3jax writes it, of all of it.

    Args:
        file: A local or remote file.

    Raises:
        M3Error: It cannot be read.
    """
    content = read_file(file)
    try:
        told = parse_json(content, unique=True)
        if json.dumps(told).encode() != content or any(type(told[time]) is not int for time in _TIMES):
            raise ValueError("another form")
    except FAULTS:
        return blake3(content).hexdigest()
    return digest_text(json.dumps(told | dict.fromkeys(_TIMES, 0)))


def digest_text(text: str) -> str:
    """The digest of a file with a text."""
    return blake3(text.encode()).hexdigest()
