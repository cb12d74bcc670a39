"""What was done: the manifest of a merge, written and read. Needs no JAX.

A manifest tells all of its output: of each tensor the bytes, of each weight file the header, of each other file the
bytes, and in its last entry its own content. It proves no origin: whoever may change the output may write another.
docs/manifest.md describes every key; manifests of earlier versions are read as far as they tell.
"""

import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from reprlib import repr as brief  # what a file says may be long without end
from types import MappingProxyType
from typing import Any, NamedTuple

from blake3 import blake3

from m3jax.arithmetic import SCHEME, SCHEMES
from m3jax.checkpoints import ALGORITHM, TensorInfo, digest_checkpoint
from m3jax.checkpoints.files import is_below
from m3jax.checkpoints.formats import ORBAX
from m3jax.checkpoints.remote import as_path
from m3jax.checkpoints.storage import is_dir, is_file, read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.outputs import provenance
from m3jax.outputs.places import unfinished
from m3jax.outputs.written import SAVES
from m3jax.recipe import Recipe

FILE_NAME = provenance.FILE_NAME
README = "README.md"
EDITABLE = (README,)
SIGNATURE = "model.sig"
"""What the OpenSSF's model-signing tool calls a signature of a directory; it is made after the manifest."""
"""Files of an output that people are to edit: told of, never held against it."""

VERSION = 3
"""Of what a manifest tells: 1 lacked the digests of headers and of itself, 2 findings and the key that says this."""

_OWN_DIGEST = "manifest_digest"
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
        tokens: The digest of its tokens' numbers, empty where they cannot be read; None where they decided nothing.
    """

    name: str
    role: str
    revision: str | None
    tensors: TensorDigests
    dequantised: str | None = None
    adapter: Mapping[str, Any] | None = None
    tokens: str | None = None


def versions(method: str | None = None) -> dict[str, str]:
    """The versions that a merge's bits could depend on if something were wrong.

    Args:
        method: Of the merge: if a package outside brings it, that one's too.
    """
    origin = catalogue.origin_of(method) if method is not None else None
    found = {"python": platform.python_version(), **_packages()}
    return found if origin is None else {**found, origin.package: origin.version}


@functools.cache
def _packages() -> Mapping[str, str]:
    """The versions of the packages that are there; looking takes milliseconds, and they stay what they are."""
    found = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return MappingProxyType(found)


def _whole(tensors: TensorDigests) -> str:
    return digest_checkpoint({name: (info.dtype, info.shape, digest) for name, (info, digest) in tensors.items()})


def told_of_input(record: InputRecord) -> dict[str, Any]:
    """What is told of a model that was read."""
    return {
        "name": record.name,
        "role": record.role,
        "revision": record.revision,
        **({} if record.dequantised is None else {"dequantised": record.dequantised}),
        **({} if record.adapter is None else {"adapter": dict(record.adapter)}),
        **({} if record.tokens is None else {"tokens": record.tokens}),
        "digest": _whole(record.tensors),
        "tensors": {name: digest for name, (_, digest) in record.tensors.items()},
    }


def told_of_tensors(tensors: TensorDigests) -> dict[str, Any]:
    """What is told of weights that were written."""
    return {
        "digest": _whole(tensors),
        "tensors": {
            name: {"dtype": info.dtype, "shape": list(info.shape), "digest": digest}
            for name, (info, digest) in tensors.items()
        },
    }


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
    findings: Sequence[Any] = (),
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
        findings: What was measured of the whole model, from which single tensors can be merged again.
        layout: In which format they are written, and how; None for safetensors.
    """
    return {
        "schema": VERSION,
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
        "findings": list(findings),
        "inputs": list(map(told_of_input, inputs)),
        **({"intermediates": dict(intermediates)} if intermediates else {}),
        "output": {
            **told_of_tensors(output),
            **(layout or {}),
            "max_shard_size": max_shard_size,
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
    saves: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A manifest with the digests of what stands beside the weights, and of itself.

    Args:
        record: As `build` makes it.
        files: Digests of the other files, by name.
        links: Weight files that are there once more, each with the name of what it is.
        weight_files: Digests of the files of the weights, where they were not known before; those of a format without
            headers are of the files that are the same each time.
        saves: Digests of what tells of the save of an output of Orbax, but for its times; see `written.digest_save`.
    """
    more: dict[str, Any] = {"links": dict(sorted(links.items()))} if links else {}
    if weight_files is not None:
        more["weight_files"] = dict(sorted(weight_files.items()))
    if saves is not None:
        more[SAVES] = dict(sorted(saves.items()))
    told = {**record, "output": {**record["output"], "files": dict(sorted(files.items())), **more}}
    return sealed(told)


def sealed(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a file tells, with the digest of it."""
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
    found = given / FILE_NAME if is_dir(given) else given
    if not is_file(found):
        if (left := unfinished(given)) is not None:
            raise M3Error(f"{given}: is not there, but {left}")
        run, at, step = str(given).rpartition("@")
        if at and as_path(run).is_dir():
            raise M3Error(f"{given}: names a step of a run, not a directory: give the step's own, {run}/{step}")
        raise M3Error(f"{given}: there is no {FILE_NAME}: give a directory that m3jax merge wrote, or the file itself")
    return found


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A manifest from its file or its model directory, checked as far as replay and verify rely on it.

    Raises:
        M3Error: It is missing, damaged, edited or of another scheme.
    """
    manifest, intact = read_edited(path)
    if not intact:
        raise M3Error(f"{locate(path)}: was changed after it was written: restore the file that m3jax merge wrote")
    return manifest


def read_edited(path: str | os.PathLike[str]) -> tuple[dict[str, Any], bool]:
    """A manifest, and whether it is as it was written, as far as its version can tell.

    Raises:
        M3Error: It is missing, damaged, or of another scheme.
    """
    file = locate(path)
    manifest = _read(file)
    return manifest, all(map(is_intact, (manifest, *within(manifest))))


def is_intact(told: Mapping[str, Any]) -> bool:
    """Whether what a file tells has the digest that it gives itself; true where it gives none."""
    return bool(told.get(_OWN_DIGEST, own_digest(told)) == own_digest(told))


def version_of(manifest: Mapping[str, Any]) -> int:
    """Which version of manifests one is; see docs/manifest.md."""
    return int(manifest.get("schema", 2 if _OWN_DIGEST in manifest else 1))


def _read(file: Path) -> dict[str, Any]:
    try:
        manifest = parse_json(read_file(file), unique=True)
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        _check(manifest)
    except FAULTS as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise M3Error(f"{file}: is not a manifest of m3jax ({said}): restore the file that m3jax merge wrote") from None
    if version_of(manifest) > VERSION:
        raise M3Error(
            f"{file}: is a manifest of version {version_of(manifest)}, but this m3jax reads up to {VERSION}: use the "
            f"one that wrote it, {brief(manifest.get('m3jax'))}"
        )
    if any(told["bits"] not in SCHEMES for told in (manifest, *within(manifest))):
        raise M3Error(
            f"{file}: was made with bits {manifest['bits']!r}, but this version makes {', '.join(SCHEMES)}: use another"
        )
    return manifest


def _check(manifest: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless the fields that are used have their types."""
    check_texts(manifest, "bits")
    _check_version(manifest)
    provenance.recorded_origin(manifest)
    for key in ("recipe", "weights", "output"):
        _check_object(manifest, key)
    optional = [key for key in ("weight_files", "links", SAVES) if key in manifest["output"]]
    for key in ("tensors", "files", *optional):
        _check_object(manifest["output"], key)
    links = manifest["output"].get("links", {})
    if not all(file in manifest["output"]["weight_files"] for file in links.values()):
        raise ValueError("it names weight files that it does not tell of")
    weights = [*manifest["output"].get("weight_files", ()), *manifest["output"].get(SAVES, ())]
    for name in (*manifest["output"]["files"], *links, *weights):
        if not is_below(name):
            raise ValueError(f"it names the file {brief(name)}, which is outside the model")
    if ("weight_files" in manifest["output"]) != (_OWN_DIGEST in manifest):
        raise ValueError("it has lost a part")
    if not all(name in EDITABLE for name in manifest["output"].get("editable", ())):
        raise ValueError("it lets files be edited that m3jax checks")
    told = manifest["output"]
    if not (told.get("item", "") == "" or is_below(told["item"])) or not isinstance(told.get("stored", {}), dict):
        raise ValueError("it names an item that is outside the model")
    check_texts(told.get("stored", {}), *told.get("stored", {}))
    if "format" in told and (told["format"] != ORBAX.name or "weight_files" not in told):
        raise ValueError(f"it is of the format {brief(told['format'])}, which is not known here")
    int(manifest["output"]["max_shard_size"])
    check_texts(manifest["output"], "digest")
    for key in ("files", *optional):
        check_texts(manifest["output"][key], *manifest["output"][key])
    for values in manifest["weights"].values():
        [float.fromhex(v) for v in values["hex"]]
    for record in manifest["inputs"]:
        _check_object(record, "tensors")
        check_texts(record, "name", "role", "digest", *(["revision"] if record["revision"] is not None else []))
        if "adapter" in record:
            _check_object(record, "adapter")
            check_texts(record["adapter"], "config")
    for entry in manifest["output"]["tensors"].values():
        check_texts(entry, "digest", "dtype")
        if not (isinstance(entry["shape"], list) and all(type(size) is int for size in entry["shape"])):
            raise TypeError(f"{brief(entry['shape'])} is no shape")
    tensors = {name: (e["dtype"], e["shape"], e["digest"]) for name, e in manifest["output"]["tensors"].items()}
    if digest_checkpoint(tensors) != manifest["output"]["digest"]:
        raise ValueError("its digest is not that of its tensors")
    for name, within in manifest.get("intermediates", {}).items():
        if not isinstance(within, dict) or within.get("intermediates"):
            raise ValueError(f"what it records of {brief(name)} is no manifest of one merge")
        _check(within)


def within(manifest: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """The manifests of the merges that one started from."""
    return list(manifest.get("intermediates", {}).values())


def _check_version(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless a manifest says which version it is of as that version says it."""
    version = manifest.get("schema", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError("its version is no number")
    if version >= VERSION and _OWN_DIGEST not in manifest:
        raise ValueError("it has lost a part")
    if not isinstance(manifest.get("findings", []), list):
        raise TypeError("findings is not a list")


def _check_object(holder: Mapping[str, Any], key: str) -> None:
    if not isinstance(holder[key], dict):
        raise TypeError(f"{key} is not an object")


def check_texts(holder: Mapping[str, Any], *keys: str) -> None:
    """Raise KeyError or TypeError unless there are texts under these keys of an object."""
    if not isinstance(holder, dict):
        raise TypeError(f"{brief(holder)} is no object")
    for key in keys:
        if not isinstance(holder[key], str):
            raise TypeError(f"{brief(key)} is no text")


def drawn_weights(manifest: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The weights that a manifest stores, exactly."""
    return {
        group: tuple(float.fromhex(value) for value in values["hex"]) for group, values in manifest["weights"].items()
    }


def other_tokens(record: Mapping[str, Any]) -> str:
    """What to say of an input whose tokens have other numbers than are recorded.

    Args:
        record: Of the input.
    """
    return (
        f"{record['name']}: its tokenizer gives tokens other numbers than when it was merged, by which rows were taken:"
        " restore it, or make a new merge with m3jax merge"
    )


def inputs_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of the models that were read, also by the merges that one started from, whose outputs are none."""
    made = manifest.get("intermediates", {})
    records = [record for told in (manifest, *within(manifest)) for record in told["inputs"]]
    return [record for record in records if record["name"] not in made]


def contradictions(manifest: Mapping[str, Any]) -> list[str]:
    """Where a manifest says one thing here and another there, which none does that m3jax has written.

    Args:
        manifest: As it was read. Of a recipe that this version does not understand nothing is said.

    Returns:
        A sentence each.
    """
    found = [said for name, told in manifest.get("intermediates", {}).items() for said in _contradictions(told, name)]
    return [*_contradictions(manifest), *found]


def _contradictions(told: Mapping[str, Any], name: str = "") -> Iterator[str]:
    try:
        recipe = Recipe.model_validate(told["recipe"])
        sections = recipe.every_section
        experts = {entry.model for section in sections for entry in section.experts}
        bases = {recipe.base_model, *(section.base for section in sections)} - {None}
        known = {(model, "expert") for model in experts} | {(base, recipe.base_role) for base in bases}
        known |= {(entry.statistics, "statistics") for entry in recipe.experts} if recipe.row.statistics else set()
    except (M3Error, *FAULTS):
        return
    of = f"of {name}, " if name else ""
    if told.get("seed", recipe.seed) != recipe.seed:
        yield f"{of}its seed is {brief(told['seed'])}, but that of its recipe {recipe.seed}"
    for record in told["inputs"]:
        if (record["name"], record["role"]) not in known:
            yield f"{of}it has read {brief(record['name'])} as {brief(record['role'])}, which its recipe does not"
        elif record["role"] == "expert" and not record["tensors"]:
            yield f"{of}it has read no tensor of {brief(record['name'])}, of which its recipe makes the output"
    for model in sorted(experts - {record["name"] for record in told["inputs"]}):
        yield f"{of}it has not read {brief(model)}, of which its recipe makes the output"


def check_sources(manifest: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Raise M3Error where a moved model is none that was recorded.

    Args:
        manifest: What was recorded.
        sources: Where models are now, by recorded name.
    """
    named = sorted({str(record["name"]) for record in inputs_of(manifest)})
    for name in sources:
        if name not in named:
            raise M3Error(f"{name}: is not a model of this manifest, which records {', '.join(named)}")


def to_json(manifest: Mapping[str, Any]) -> str:
    """A manifest as the text of its file."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
