"""What a conversion tells of itself, in m3jax-conversion.json: what was read, what was written. Needs no JAX."""

import os
from collections.abc import Mapping
from typing import Any

from m3jax.checkpoints import ALGORITHM, TensorInfo, digest_checkpoint
from m3jax.checkpoints.files import is_below
from m3jax.checkpoints.remote import as_path
from m3jax.checkpoints.standing_in import CONVERSION, STATISTICS
from m3jax.checkpoints.storage import read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.outputs import manifest

VERSION = 2
"""Of what is told: 1 had the names of files and one digest."""


def build(
    to: str,
    source: manifest.InputRecord,
    tensors: manifest.TensorDigests,
    files: Mapping[str, str],
    statistics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a conversion tells, as plain data; the same conversion tells the same.

    Args:
        to: The format that was written.
        source: What was read.
        tensors: What was written.
        files: The digest of each file that was written.
        statistics: Their kind, and how they were measured, where it is not the model's weights that were written.
    """
    told = {
        "schema": VERSION,
        "m3jax": manifest.versions()["m3jax"],
        "format": to,
        "digest_algorithm": ALGORITHM,
        **({} if statistics is None else {STATISTICS: dict(statistics)}),
        "inputs": [manifest.told_of_input(source)],
        "output": {**manifest.told_of_tensors(tensors), "files": dict(sorted(files.items()))},
        "versions": manifest.versions(),
    }
    return manifest.sealed(told)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a conversion has told, checked as far as `verify` relies on it.

    Raises:
        M3Error: It is damaged, edited, or of a version that told too little.
    """
    given = as_path(path)
    file = given if given.name == CONVERSION else given / CONVERSION
    mend = "convert again"
    try:
        told = parse_json(read_file(file), unique=True)
        if not isinstance(told, dict):
            raise ValueError("not an object")
        if told.get("format") == "peft":
            raise M3Error(f"{file}: is of an adapter, of which no digests of tensors are recorded: extract it again")
        if "schema" not in told:
            raise M3Error(f"{file}: is of a version that recorded no digests to compare with: {mend}")
        if int(told["schema"]) > VERSION:
            raise M3Error(f"{file}: is of version {int(told['schema'])}, but this m3jax reads up to {VERSION}: {mend}")
        _check(told)
    except FAULTS as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise M3Error(f"{file}: is not what m3jax convert writes ({said}): {mend}") from None
    return told


def _check(told: Mapping[str, Any]) -> None:
    """Raise what `FAULTS` has unless all that is used has its type, and is as it was written."""
    if "manifest_digest" not in told or not manifest.is_intact(told):
        raise ValueError("it was changed after it was written")
    output, (record,) = told["output"], told["inputs"]
    manifest.check_texts(told, "format")
    manifest.check_texts(record, "name", "digest")
    dict(record["tensors"])
    if STATISTICS in told:
        manifest.check_texts(told[STATISTICS], "kind")
    manifest.check_texts(output["files"], *output["files"])
    for name in output["files"]:
        if not is_below(name):
            raise ValueError("it names a file outside the model")
    for entry in output["tensors"].values():
        manifest.check_texts(entry, "digest", "dtype")
    tensors = {
        name: (TensorInfo(name, tuple(entry["shape"]), entry["dtype"]), entry["digest"])
        for name, entry in output["tensors"].items()
    }
    if digest_checkpoint({n: (i.dtype, i.shape, d) for n, (i, d) in tensors.items()}) != output["digest"]:
        raise ValueError("its digest is not that of its tensors")
