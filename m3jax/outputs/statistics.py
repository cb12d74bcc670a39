"""Statistics of a model, written and read: a checkpoint with the model's names, and what tells of which model they are.

They are told of in m3jax-conversion.json, as what is written from one model is, so that `verify` knows them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m3jax.checkpoints import (
    Checkpoint,
    FileFingerprint,
    ModelDirectory,
    ShardWriter,
    TensorInfo,
    digest_file,
    digest_tensor,
    open_safetensors,
    plan_shards,
    write_index,
)
from m3jax.checkpoints.adapters import open_stored
from m3jax.checkpoints.formats import SAFETENSORS
from m3jax.checkpoints.locate import digest_companions, named_companions
from m3jax.checkpoints.protocol import as_bytes, in_natural_order, without_ctime
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.standing_in import CONVERSION, SHARED, STATISTICS
from m3jax.checkpoints.storage import is_dir, is_file, read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error, saying_what_failed
from m3jax.outputs import mark
from m3jax.outputs.copies import write_copy
from m3jax.outputs.local import Staging
from m3jax.outputs.manifest import InputRecord
from m3jax.outputs.modes import narrow
from m3jax.outputs.places import exactly

INPUTS_FIRST = "inputs_first"
"""What `StatisticsRecord.measured` calls what `inputs_first` is read from; `SHARED` that of `shared`."""

_CONFIG = "config.json"
_TOLD_PER_TENSOR = 2**11  # bytes of headers and indexes, generously


class StatisticsRecord(NamedTuple):
    """What is told of statistics.

    Attributes:
        kind: Which they are: "fisher", "gram".
        model: What they were measured of, as it was named.
        adapter: The digest of the configuration of the adapter that was on it; None without one.
        tensors: Digests of the model's tensors, as they are stored.
        measured: How they were measured: data, examples, settings.
        written: What was written, by name.
        digest: Of what was written.
        shared: Of tensors that have the statistics of another, which is written, that one.
        inputs_first: Of statistics that are matrices, the weights whose inputs lie along their first axes; None where
            nothing tells.
        digests: Of each tensor that was written.
    """

    kind: str
    model: str
    adapter: str | None
    tensors: Mapping[str, str]
    measured: Mapping[str, Any]
    written: Mapping[str, TensorInfo]
    digest: str
    shared: Mapping[str, str] = MappingProxyType({})
    inputs_first: frozenset[str] | None = None
    digests: Mapping[str, str] = MappingProxyType({})


def read_record(place: Path, of_model: bool = False) -> StatisticsRecord | None:
    """What is told of statistics; None where nothing is, as of a model.

    Args:
        place: Their directory, or the file in it.
        of_model: A model is expected there, of which a record that cannot be read tells nothing.

    Raises:
        M3Error: It is damaged or edited.
    """
    directory = place if is_dir(place) else place.parent
    if not is_file(directory / CONVERSION):
        return None
    try:
        told = parse_json(read_file(directory / CONVERSION))
    except FAULTS as error:
        if of_model:
            return None  # of some conversion, which is not asked for here
        raise M3Error(
            f"{directory / CONVERSION}: is damaged ({error}), and tells of which model the statistics beside it are: "
            "restore it, or measure again"
        ) from None
    if not isinstance(told, dict) or STATISTICS not in told:
        return None
    told = mark.read(directory)
    try:
        return _record_in(told)
    except FAULTS as error:
        raise M3Error(
            f"{directory / CONVERSION}: is not what m3jax statistics writes ({error}): measure again"
        ) from None


def _record_in(told: Mapping[str, Any]) -> StatisticsRecord:
    (model,), output, kept = told["inputs"], told["output"], dict(told[STATISTICS])
    kind, adapter = str(kept.pop("kind")), model.get("adapter")
    written = {n: TensorInfo(n, tuple(each["shape"]), each["dtype"]) for n, each in output["tensors"].items()}
    of_adapter = None if adapter is None else str(adapter["config"])
    tensors = {name: str(digest) for name, digest in model["tensors"].items()}
    found = StatisticsRecord(kind, str(model["name"]), of_adapter, tensors, kept, written, str(output["digest"]))
    first = kept.get(INPUTS_FIRST)
    return found._replace(
        shared={str(name): str(other) for name, other in dict(kept.get(SHARED, {})).items()},
        inputs_first=None if first is None else frozenset(map(str, first)),
        digests={name: str(each["digest"]) for name, each in output["tensors"].items()},
    )


def check_no_statistics(name: str, place: Path) -> None:
    """Raise M3Error where a model is asked for, and statistics are there.

    Args:
        name: What the model is called.
        place: Where it is.
    """
    record = None if isinstance(place, RemotePath) else read_record(place, of_model=True)
    if record is not None:
        raise M3Error(
            f"{name}: holds {record.kind} statistics of {record.model}, no model: name the model, and these under "
            "`statistics`"
        )


class ModelBefore(NamedTuple):
    """A model that is measured, as it was before.

    Attributes:
        place: Where it is.
        record: What is told of it.
        files: Its weight files.
        fingerprint: What tells these from others.
        configuration: The config.json that goes with its statistics, if it has one, by name.
        digests: Of that, by its path.
    """

    place: ModelDirectory
    record: InputRecord
    files: tuple[Path, ...]
    fingerprint: Mapping[str, FileFingerprint]
    configuration: Mapping[str, Path]
    digests: Mapping[Path, str]


def measured_of(place: ModelDirectory, name: str) -> ModelBefore:
    """A model that is to be measured; reads all of its weights.

    Args:
        place: Where it is.
        name: What it is called.

    Raises:
        M3Error: It cannot be read.
    """
    configuration = {file: path for file, path in named_companions(place.path).items() if file == _CONFIG}
    digests = digest_companions(place.path)
    digests = {path: digests.get(path) or digest_file(path) for path in configuration.values()}
    stored, adapting = open_stored(place)
    with stored as checkpoint:
        files, fingerprint = checkpoint.files(), checkpoint.fingerprint()
        tensors = {each: (info, digest_tensor(checkpoint, each)) for each, info in checkpoint.tensors.items()}
    adapter = None
    if place.adapter is not None and adapting is not None:
        adapter = {"name": place.adapter.name, "revision": place.adapter.revision, "config": adapting.config_digest}
    record = InputRecord(name, "source", place.revision, tensors, None, adapter)
    return ModelBefore(place, record, files, fingerprint, configuration, digests)


def _check_at_rest(out: Path, model: ModelBefore, checkpoint: Checkpoint) -> None:
    """Raise M3Error if a model is no more what was measured: where only a ctime tells so, its bytes decide."""
    now = checkpoint.fingerprint()
    if now == model.fingerprint:
        return
    told = model.record.tensors.items()
    if without_ctime(now) != without_ctime(model.fingerprint) or any(
        digest_tensor(checkpoint, name) != digest for name, (_, digest) in told
    ):
        raise M3Error(f"{out}: {checkpoint.location} changed while it was measured: measure again once it is at rest")


def measured_before(out: Path, model: InputRecord, kind: str, measured: Mapping[str, Any]) -> StatisticsRecord | None:
    """What a directory tells that holds just these statistics; None where it does not.

    Args:
        out: The directory.
        model: What they are to be of.
        kind: Which they are to be.
        measured: How they are to be measured.

    Raises:
        M3Error: What is told there is damaged or edited.
    """
    told = read_record(out) if is_dir(out) else None
    if told is None:
        return None
    adapter = None if model.adapter is None else model.adapter["config"]
    tensors = {name: digest for name, (_, digest) in model.tensors.items()}
    same = (told.kind, told.adapter, told.tensors, told.measured) == (kind, adapter, tensors, measured)
    return told if same else None


def write_statistics(
    out: Path,
    model: ModelBefore,
    kind: str,
    measured: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[np.float32]],
    max_shard_size: int,
    overwrite: bool = False,
) -> str:
    """Write statistics, which appear whole; returns the digest of their tensors.

    Args:
        out: The directory to make.
        model: As `measured_of` saw it before; its config.json goes with them.
        kind: Which statistics they are.
        measured: How they were measured.
        tensors: By the model's names.
        max_shard_size: Bytes of tensors per file at most.
        overwrite: Replace what is there if m3jax has made it.

    Raises:
        M3Error: The place is at fault, or the model is not as it was.
    """
    infos = list(in_natural_order({n: TensorInfo(n, v.shape, "F32") for n, v in tensors.items()}).values())
    shards = plan_shards(infos, max_shard_size)
    configs = model.configuration
    names = exactly([*(file for file, _ in shards), *configs, SAFETENSORS.index_file or "", CONVERSION])
    size = sum(info.nbytes for info in infos)
    identity = hashlib.sha256(json.dumps([kind, dict(measured)], sort_keys=True).encode()).hexdigest()
    space = size + _TOLD_PER_TENSOR * len(infos)
    with (
        saying_what_failed(out),
        Staging(out, identity, space, overwrite, names=names) as staging,
        open_stored(model.place)[0] as read,
    ):
        for file, own in shards:
            with ShardWriter(staging.path / file, own) as shard:
                for info in own:
                    shard.write(info.name, 0, np.frombuffer(as_bytes(tensors[info.name]), np.uint8))
                shard.finish()
        if len(shards) > 1:
            write_index(staging.path, shards, size)
        for name, path in configs.items():
            write_copy(path, staging.path, name, model.digests[path])
        _check_at_rest(out, model, read)
        with open_safetensors(staging.path) as written:
            digests = {name: (info, digest_tensor(written, name)) for name, info in written.tensors.items()}
        files = {name: digest_file(staging.path / name) for name in staging.files()}
        told = mark.build(SAFETENSORS.name, model.record, digests, files, {"kind": kind, **measured})
        (staging.path / CONVERSION).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        narrow(staging.path, read.files())
        staging.publish()
    return str(told["output"]["digest"])
