"""What was done: the manifest of a merge, and checking an output directory against it. Needs no JAX.

A manifest tells all of its output: of each tensor the bytes, of each weight file the header, of each other file the
bytes, and in its last entry its own content. It proves no origin: whoever may change the output may write another.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from reprlib import repr as brief  # what a file says may be long without end
from types import MappingProxyType
from typing import Any, NamedTuple

from blake3 import blake3

from m3jax.arithmetic import SCHEME, SCHEMES
from m3jax.checkpoints import (
    ALGORITHM,
    Checkpoint,
    TensorInfo,
    digest_checkpoint,
    digest_file,
    digest_tensor,
)
from m3jax.checkpoints.files import is_below
from m3jax.checkpoints.formats import ORBAX
from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.checkpoints.storage import is_dir, list_names, read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.outputs import provenance
from m3jax.outputs.local import is_own, unfinished
from m3jax.outputs.written import open_written, varying_patterns
from m3jax.progress import Progress
from m3jax.recipe import Recipe

FILE_NAME = provenance.FILE_NAME
README = "README.md"
EDITABLE = (README,)
"""Files of an output that people are to edit: told of, never held against it."""

_OWN_DIGEST = "manifest_digest"
_TOOLS = (".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store")  # which no loader of models reads
_DEEPEST = 8  # directories in directories that are looked through
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
        adapter: What was added to it: its name, its revision and the digest of its configuration; its tensors are
            among `tensors`.
    """

    name: str
    role: str
    revision: str | None
    tensors: TensorDigests
    dequantised: str | None = None
    adapter: Mapping[str, Any] | None = None


class Verification(NamedTuple):
    """What comparing a directory with its manifest showed.

    Attributes:
        directory: The model directory.
        digest: BLAKE3 of its weights as they are.
        tensors: How many tensors were compared.
        files: How many other files were compared.
        differences: One sentence each; empty when all is as recorded.
        notes: What was not held against the directory, or could not be checked, one sentence each.
    """

    directory: Path
    digest: str
    tensors: int
    files: int
    differences: tuple[str, ...]
    notes: tuple[str, ...] = ()


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
    weight_files: Mapping[str, str],
    max_shard_size: int,
    scheme: str = SCHEME,
    anatomy: Mapping[str, Any] | None = None,
    intermediates: Mapping[str, Any] = MappingProxyType({}),
    layout: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest as plain data; the same merge gives the same manifest, wherever and whenever it is done.

    It is complete when `completed` has seen the other files of the output.

    Args:
        recipe: As resolved.
        weights: What was drawn, by group.
        inputs: What was read.
        output: What was written.
        weight_files: Digests of the headers of the files with weights.
        max_shard_size: Bytes.
        scheme: How its bits were made.
        anatomy: What was known of the tensors, for people.
        intermediates: The manifests of merges that were made to be inputs, by name.
        layout: In which format they are written, and how; None for safetensors.
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
                **({} if record.adapter is None else {"adapter": dict(record.adapter)}),
                "digest": _whole(record.tensors),
                "tensors": {name: digest for name, (_, digest) in record.tensors.items()},
            }
            for record in inputs
        ],
        **({"intermediates": dict(intermediates)} if intermediates else {}),
        "output": {
            "digest": _whole(output),
            **(layout or {}),
            "max_shard_size": max_shard_size,
            "tensors": {
                name: {"dtype": info.dtype, "shape": list(info.shape), "digest": digest}
                for name, (info, digest) in output.items()
            },
            "files": {},
            "weight_files": dict(sorted(weight_files.items())),
            "editable": list(EDITABLE),
        },
        "versions": versions(recipe.merge_method),
    }


def completed(
    record: Mapping[str, Any],
    files: Mapping[str, str],
    links: Mapping[str, str] | None = None,
    weight_files: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A manifest with the digests of what stands beside the weights, and of itself.

    Args:
        record: As `build` makes it.
        files: Digests of the other files, by name.
        links: Weight files that are there once more, each with the name of what it is.
        weight_files: Digests of the files of the weights, where they were not known before; those of a format without
            headers are of the files that are the same each time.
    """
    more: dict[str, Any] = {"links": dict(sorted(links.items()))} if links else {}
    if weight_files is not None:
        more["weight_files"] = dict(sorted(weight_files.items()))
    told = {**record, "output": {**record["output"], "files": dict(sorted(files.items())), **more}}
    return {**told, _OWN_DIGEST: own_digest(told)}


def own_digest(manifest: Mapping[str, Any]) -> str:
    """BLAKE3 of all that a manifest says but this, as JSON with sorted keys and without spaces; hexadecimal."""
    told = {key: entry for key, entry in manifest.items() if key != _OWN_DIGEST}
    return blake3(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
        M3Error: It is missing, damaged, edited or of another scheme.
    """
    file = locate(path)
    manifest = _read(file)
    if any(told.get(_OWN_DIGEST, own_digest(told)) != own_digest(told) for told in (manifest, *_within(manifest))):
        raise M3Error(f"{file}: was changed after it was written: restore the file that m3jax merge wrote")
    return manifest


def _read(file: Path) -> dict[str, Any]:
    """A manifest whose own digest may be another."""
    try:
        manifest = parse_json(read_file(file), unique=True)
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        _check(manifest)
    except FAULTS as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise M3Error(f"{file}: is not a manifest of m3jax ({said}): restore the file that m3jax merge wrote") from None
    if any(told["bits"] not in SCHEMES for told in (manifest, *_within(manifest))):
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
    optional = [key for key in ("weight_files", "links") if key in manifest["output"]]
    for key in ("tensors", "files", *optional):
        _check_object(manifest["output"], key)
    links = manifest["output"].get("links", {})
    if not all(file in manifest["output"]["weight_files"] for file in links.values()):
        raise ValueError("it names weight files that it does not tell of")
    for name in (*manifest["output"]["files"], *links, *manifest["output"].get("weight_files", ())):
        if not is_below(name):
            raise ValueError(f"it names the file {brief(name)}, which is outside the model")
    if ("weight_files" in manifest["output"]) != (_OWN_DIGEST in manifest):
        raise ValueError("it has lost a part")
    if not all(name in EDITABLE for name in manifest["output"].get("editable", ())):
        raise ValueError("it lets files be edited that m3jax checks")
    told = manifest["output"]
    if not (told.get("item", "") == "" or is_below(told["item"])) or not isinstance(told.get("stored", {}), dict):
        raise ValueError("it names an item that is outside the model")
    if "format" in told and (told["format"] != ORBAX.name or "weight_files" not in told):
        raise ValueError(f"it is of the format {brief(told['format'])}, which is not known here")
    int(manifest["output"]["max_shard_size"])
    str(manifest["output"]["digest"])
    for values in manifest["weights"].values():
        [float.fromhex(v) for v in values["hex"]]
    for record in manifest["inputs"]:
        _check_object(record, "tensors")
        str(record["name"]), str(record["role"])
        if "adapter" in record:
            _check_object(record, "adapter")
            str(record["adapter"]["config"])
    for entry in manifest["output"]["tensors"].values():
        str(entry["digest"]), str(entry["dtype"]), list(entry["shape"])
    tensors = {name: (e["dtype"], e["shape"], e["digest"]) for name, e in manifest["output"]["tensors"].items()}
    if digest_checkpoint(tensors) != manifest["output"]["digest"]:
        raise ValueError("its digest is not that of its tensors")
    for name, within in manifest.get("intermediates", {}).items():
        if not isinstance(within, dict) or within.get("intermediates"):
            raise ValueError(f"what it records of {brief(name)} is no manifest of one merge")
        _check(within)


def _within(manifest: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """The manifests of the merges that one started from."""
    return list(manifest.get("intermediates", {}).values())


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
    """Compare a model directory with the manifest in it: every tensor, every file, and what is there besides.

    A manifest of a version that recorded less is checked as far as it goes; notes say what it does not tell.

    Args:
        directory: What `m3jax merge` wrote.
        progress: Called with what is done so far.

    Raises:
        M3Error: There is no manifest or no readable weights.
    """
    file = locate(directory)
    place, manifest = file.parent, _read(file)
    recorded = manifest["output"]
    differences, notes = [], []
    if _OWN_DIGEST not in manifest:
        notes.append(f"{file.name}: is of a version that recorded no digest of it: edits of it are not seen")
    elif manifest[_OWN_DIGEST] != own_digest(manifest):
        differences.append(f"{file.name}: was changed after it was written")
    with open_written(place, recorded) as checkpoint:
        found = _digests(checkpoint, progress)
        headers = _headers(checkpoint, place, recorded)
    differences += _differing_tensors(found, recorded["tensors"])
    if "weight_files" in recorded:
        differences += _differing_headers(headers, recorded["weight_files"])
        links = recorded.get("links", {})
        differences += _differing_links(place, links)
        known = {*recorded["files"], *recorded["weight_files"], *links, file.name}
        varying = varying_patterns(recorded)
        beside = [name for name in _added(place, known) if not any(fnmatchcase(name, each) for each in varying)]
        notes += [f"{name}: is none of the model's, and not looked into" for name in beside if name in _TOOLS]
        notes += [
            f"{name}: is left of a merge that was stopped as it ended, and may go" for name in beside if is_own(name)
        ]
        differences += [f"{n}: is not in the manifest" for n in beside if n not in _TOOLS and not is_own(n)]
    else:
        notes.append(f"{file.name}: is of a version that did not list all files: added ones and metadata are not seen")
    for name, digest in sorted(recorded["files"].items()):
        fault = _fault_of_file(place / name, digest)
        if fault is not None and name in EDITABLE:
            notes.append(f"{name}: {fault}, as people may edit it")
        elif fault is not None:
            differences.append(f"{name}: {fault}")
    return Verification(place, _whole(found), len(found), len(recorded["files"]), tuple(differences), tuple(notes))


def _digests(checkpoint: Checkpoint, progress: Callable[[Progress], None] | None) -> dict[str, tuple[TensorInfo, str]]:
    """The tensors of a checkpoint with the digests of their bytes."""
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    done, found = 0, {}
    for name, info in checkpoint.tensors.items():
        found[name] = (info, digest_tensor(checkpoint, name))
        done += info.nbytes
        if progress is not None:
            progress(Progress("verifying", done, total))
    return found


def _headers(checkpoint: Checkpoint, place: Path, recorded: Mapping[str, Any]) -> dict[str, str]:
    """The digests of the files of weights as they are: of headers, or of whole small files where there are none."""
    if "format" not in recorded:
        return {name: told["header_blake3"] for name, told in checkpoint.fingerprint().items()}
    return {name: digest_file(place / name) for name in recorded["weight_files"] if (place / name).is_file()}


def _differing_tensors(found: TensorDigests, recorded: Mapping[str, Any]) -> Iterator[str]:
    for name, (info, digest) in found.items():
        expected = recorded.get(name)
        if expected is None:
            yield f"{name}: is not in the manifest"
        elif (info.dtype, list(info.shape)) != (expected["dtype"], expected["shape"]):
            yield f"{name}: is {info.dtype}{list(info.shape)}, not {expected['dtype']}{expected['shape']}"
        elif digest != expected["digest"]:
            yield f"{name}: its bytes are not those that were written"
    yield from (f"{name}: is missing" for name in recorded if name not in found)


def _differing_headers(found: Mapping[str, str], recorded: Mapping[str, Any]) -> Iterator[str]:
    for name, digest in found.items():
        if name in recorded and recorded[name] != digest:
            yield f"{name}: its header is not the one that was written: its metadata, or the order of its tensors"
    yield from (f"{name}: is missing, or not read as a file of the model" for name in recorded if name not in found)


def _differing_links(place: Path, links: Mapping[str, str]) -> Iterator[str]:
    """What is said of weight files that are there once more: a link is the same, a copy has the same bytes."""
    for name, file in links.items():
        if not (place / name).is_file():
            yield f"{name}: is missing"
        elif (place / file).is_file() and not _are_same(place / name, place / file):
            yield f"{name}: is not the same as {file}"


def _are_same(one: Path, other: Path) -> bool:
    if not isinstance(one, RemotePath) and one.samefile(other):
        return True
    return digest_file(one) == digest_file(other)


def _fault_of_file(path: Path, digest: str) -> str | None:
    """What is wrong with a file beside the weights; None where it is as recorded."""
    if not path.is_file():
        return "is missing"
    return None if digest_file(path) == digest else "has changed"


def _added(place: Path, known: Container[str], above: str = "", depth: int = 0) -> Iterator[str]:
    """The names of files that are not known, also in directories; links and what other tools put there stay closed."""
    for name in sorted(list_names(place)):
        path, full = place / name, f"{above}{name}"
        if full in known:
            continue
        link = not isinstance(path, RemotePath) and os.path.islink(path)
        if full in _TOOLS or link or not is_dir(path):
            yield full
        elif depth == _DEEPEST:
            yield f"{full}/"
        else:
            yield from _added(path, known, f"{full}/", depth + 1)
