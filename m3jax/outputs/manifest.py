"""What was done: the manifest of a merge, and checking an output directory against it. Needs no JAX."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.arithmetic import SCHEME, SCHEMES
from m3jax.checkpoints import ALGORITHM, TensorInfo, digest_checkpoint, digest_file, digest_tensor, open_safetensors
from m3jax.checkpoints.remote import as_path
from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.outputs import provenance
from m3jax.outputs.local import unfinished
from m3jax.progress import Progress
from m3jax.recipe import Recipe

FILE_NAME = provenance.FILE_NAME
_PACKAGES = ("m3jax", "jax", "jaxlib", "numpy", "scipy", "ml_dtypes")

TensorDigests = Mapping[str, tuple[TensorInfo, str]]
"""By name: what the tensor is, and the digest of its bytes."""


class InputRecord(NamedTuple):
    """One model that was read.

    Attributes:
        name: As the recipe names it.
        role: "expert", "base", or "template" for a base of which only config and tokenizer are used.
        revision: The commit it was resolved to on the hub.
        tensors: What was read of it, as it is stored.
        dequantised: The scheme of its weights where they were read as numbers; None where they were not quantised.
    """

    name: str
    role: str
    revision: str | None
    tensors: TensorDigests
    dequantised: str | None = None


class Verification(NamedTuple):
    """What comparing a directory with its manifest showed.

    Attributes:
        directory: The model directory.
        digest: BLAKE3 of its weights as they are.
        tensors: How many tensors were compared.
        files: How many other files were compared.
        differences: One sentence each; empty when all is as recorded.
    """

    directory: Path
    digest: str
    tensors: int
    files: int
    differences: tuple[str, ...]


def versions(method: str | None = None) -> dict[str, str]:
    """The versions that a merge's bits could depend on if something were wrong.

    Args:
        method: Of the merge: if a package outside brings it, that one's too.
    """
    found = {"python": platform.python_version()}
    origin = catalogue.origin_of(method) if method is not None else None
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found if origin is None else {**found, origin.package: origin.version}


def _whole(tensors: TensorDigests) -> str:
    return digest_checkpoint({name: (info.dtype, info.shape, digest) for name, (info, digest) in tensors.items()})


def build(
    recipe: Recipe,
    weights: Mapping[str, Sequence[float]],
    inputs: Sequence[InputRecord],
    output: TensorDigests,
    files: Mapping[str, str],
    max_shard_size: int,
    scheme: str = SCHEME,
    anatomy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest as plain data; the same merge gives the same manifest, wherever and whenever it is done.

    Args:
        recipe: As resolved.
        weights: What was drawn, by group.
        inputs: What was read.
        output: What was written.
        files: Digests of the other files of the directory.
        max_shard_size: Bytes.
        scheme: How its bits were made.
        anatomy: What was known of the tensors, for people.
    """
    return {
        "m3jax": versions()["m3jax"],
        "bits": scheme,
        "digest_algorithm": ALGORITHM,
        "recipe": recipe.resolved(),
        **provenance.record_of(recipe.merge_method),
        "seed": recipe.seed,
        **({} if anatomy is None else {"anatomy": dict(anatomy)}),
        "weights": {
            group: {"decimal": list(values), "hex": [float(v).hex() for v in values]}
            for group, values in weights.items()
        },
        "inputs": [
            {
                "name": record.name,
                "role": record.role,
                "revision": record.revision,
                **({} if record.dequantised is None else {"dequantised": record.dequantised}),
                "digest": _whole(record.tensors),
                "tensors": {name: digest for name, (_, digest) in record.tensors.items()},
            }
            for record in inputs
        ],
        "output": {
            "digest": _whole(output),
            "max_shard_size": max_shard_size,
            "tensors": {
                name: {"dtype": info.dtype, "shape": list(info.shape), "digest": digest}
                for name, (info, digest) in output.items()
            },
            "files": dict(sorted(files.items())),
        },
        "versions": versions(recipe.merge_method),
    }


def locate(path: str | os.PathLike[str]) -> Path:
    """The manifest file that `path` is or holds.

    Raises:
        M3Error: There is none.
    """
    given = as_path(path)
    found = given / FILE_NAME if given.is_dir() else given
    if not found.is_file():
        if (left := unfinished(given)) is not None:
            raise M3Error(f"{given}: is not there, but {left}")
        raise M3Error(f"{given}: there is no {FILE_NAME}: give a directory that m3jax merge wrote, or the file itself")
    return found


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A manifest from its file or its model directory, checked as far as replay and verify rely on it.

    Raises:
        M3Error: It is missing, damaged or of another scheme.
    """
    file = locate(path)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        _check(manifest)
    except OSError as error:
        raise M3Error(f"{file}: cannot be read: {error.strerror}: check the file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise M3Error(
            f"{file}: is not a manifest of m3jax ({error}): restore the file that m3jax merge wrote"
        ) from None
    if manifest["bits"] not in SCHEMES:
        raise M3Error(
            f"{file}: was made with bits {manifest['bits']!r}, but this version makes {', '.join(SCHEMES)}: use another"
        )
    return manifest


def _check(manifest: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless the fields that are used have their types."""
    str(manifest["bits"])
    provenance.recorded_origin(manifest)
    for key in ("recipe", "weights", "output"):
        _check_object(manifest, key)
    for key in ("tensors", "files"):
        _check_object(manifest["output"], key)
    int(manifest["output"]["max_shard_size"])
    str(manifest["output"]["digest"])
    for values in manifest["weights"].values():
        [float.fromhex(v) for v in values["hex"]]
    for record in manifest["inputs"]:
        _check_object(record, "tensors")
        str(record["name"]), str(record["role"])
    for entry in manifest["output"]["tensors"].values():
        str(entry["digest"]), str(entry["dtype"]), list(entry["shape"])
    told = {name: (e["dtype"], e["shape"], e["digest"]) for name, e in manifest["output"]["tensors"].items()}
    if digest_checkpoint(told) != manifest["output"]["digest"]:
        raise ValueError("its digest is not that of its tensors")


def _check_object(holder: Mapping[str, Any], key: str) -> None:
    if not isinstance(holder[key], dict):
        raise TypeError(f"{key} is not an object")


def drawn_weights(manifest: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The weights that a manifest stores, exactly."""
    return {
        group: tuple(float.fromhex(value) for value in values["hex"]) for group, values in manifest["weights"].items()
    }


def to_json(manifest: Mapping[str, Any]) -> str:
    """A manifest as the text of its file."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def verify(directory: str | os.PathLike[str], progress: Callable[[Progress], None] | None = None) -> Verification:
    """Compare a model directory with the manifest in it, tensor by tensor and file by file.

    Args:
        directory: What `m3jax merge` wrote.
        progress: Called with what is done so far.

    Raises:
        M3Error: There is no manifest or no readable weights.
    """
    place = locate(directory).parent
    recorded = read(directory)["output"]
    differences = []
    with open_safetensors(place) as checkpoint:
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        done, found = 0, {}
        for name, info in checkpoint.tensors.items():
            digest = digest_tensor(checkpoint, name)
            found[name] = (info, digest)
            expected = recorded["tensors"].get(name)
            if expected is None:
                differences.append(f"{name}: is not in the manifest")
            elif (info.dtype, list(info.shape)) != (expected["dtype"], expected["shape"]):
                differences.append(
                    f"{name}: is {info.dtype}{list(info.shape)}, not {expected['dtype']}{expected['shape']}"
                )
            elif digest != expected["digest"]:
                differences.append(f"{name}: its bytes are not those that were written")
            done += info.nbytes
            if progress is not None:
                progress(Progress("verifying", done, total))
    differences += [f"{name}: is missing" for name in recorded["tensors"] if name not in found]
    for name, digest in recorded["files"].items():
        path = place / name
        if not path.is_file():
            differences.append(f"{name}: is missing")
        elif digest_file(path) != digest:
            differences.append(f"{name}: has changed")
    return Verification(place, _whole(found), len(found), len(recorded["files"]), tuple(differences))
