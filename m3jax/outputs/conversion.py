"""convert(): the same tensors in another format, bit for bit, in memory that does not grow with the model."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from m3jax.anatomy import anatomy_of
from m3jax.anatomy.float8 import find_dequantisation, seen_dequantized, without_quantisation
from m3jax.anatomy.kinds import mend_of
from m3jax.anatomy.libraries import MAXTEXT, NAMES, BlockLayout, WantedLayout, seen_as
from m3jax.anatomy.stored import find_home, step_metadata
from m3jax.checkpoints import (
    Checkpoint,
    FileFingerprint,
    ModelDirectory,
    TensorDigest,
    TensorInfo,
    digest_file,
    locate_model,
    parse_size,
)
from m3jax.checkpoints.adapters import Adapting, check_no_adapter, open_stored, seen_adapted, tokenizer_note
from m3jax.checkpoints.copying import pieces
from m3jax.checkpoints.digest import Passing
from m3jax.checkpoints.formats import ORBAX, SAFETENSORS, Format, written
from m3jax.checkpoints.locate import CONFIG, digest_companions, named_companions, read_config, step_named
from m3jax.checkpoints.opening import recognise
from m3jax.checkpoints.orbax_beside import find_beside
from m3jax.checkpoints.orbax_template import Template, file_patterns, read_template
from m3jax.checkpoints.orbax_writer import fill_with_orbax
from m3jax.checkpoints.protocol import Closing
from m3jax.checkpoints.remote import is_url
from m3jax.checkpoints.runs import last_note
from m3jax.checkpoints.standing_in import CONVERSION
from m3jax.checkpoints.storage import is_dir
from m3jax.checkpoints.trust import remarks
from m3jax.checkpoints.views import stored_digests
from m3jax.errors import M3Error, saying_what_failed
from m3jax.outputs import mark
from m3jax.outputs.copies import check_documents, write_copy
from m3jax.outputs.local import Staging
from m3jax.outputs.manifest import InputRecord, TensorDigests
from m3jax.outputs.modes import narrow
from m3jax.outputs.places import check_apart, check_free, exactly
from m3jax.outputs.statistics import check_no_statistics
from m3jax.progress import Progress

Report: TypeAlias = Callable[[Progress], None]

_TOLD_PER_TENSOR = 2**11  # bytes of headers and indexes, generously


class ConvertResult(NamedTuple):
    """What a conversion did.

    Attributes:
        directory: Where the converted checkpoint is.
        format: Its format.
        tensors: Number of tensors.
        bytes: Bytes of tensors.
        digest: BLAKE3 of all tensors, whatever their format and files; as `m3jax.json` records for a merge.
        files: Names of the other files that were carried over.
        seconds: Wall time.
        notes: What a user should know of how the source was read.
    """

    directory: Path
    format: str
    tensors: int
    bytes: int
    digest: str
    files: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str = SAFETENSORS.name,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    dequantize: bool = False,
    names: str | None = None,
    config: str | os.PathLike[str] | None = None,
    scanned: bool = True,
    rounded: bool = False,
    progress: Report | None = None,
) -> ConvertResult:
    """Write a checkpoint in another format, with the same names, dtypes, shapes and bits.

    Bits are others where it is dequantised, or where an adapter is added: `base+adapter` writes the merged model.

    Everything written is read back and compared before the output appears, whole, by a rename. Names and the layout
    of weights stay as they are, unless `names` asks for another library's: then entries are moved, each to its place
    there, and what is no parameter is left out (docs/families.md).

    Args:
        src: A model directory, a weight file or a hub id, in any format; or `model+adapter`.
        dst: The directory to make; its parent exists. An Orbax checkpoint is this directory itself, as
            `StandardCheckpointer().restore(dst)` expects it; made of an item of a step, it is a step, with the item's
            name and with what else the step has. Made of Orbax, it has the same tree and is divided in the same way.
        to: The name of the format to write, one of `formats.WRITTEN`: safetensors, orbax or msgpack.
        max_shard_size: Bytes of tensors per file at most, as a number or as in "5GB"; Orbax divides by itself.
        overwrite: Replace `dst` if it is a directory that m3jax has made: `m3jax-conversion.json` marks a conversion.
        dequantize: Write float8 weights as the numbers that they stand for, rounded to the dtype that config.json
            gives the model, without their scales and without `quantization_config`.
        names: Whose names and layout the weights are to have, one of `libraries.NAMES`: huggingface, maxtext, gemma,
            tunix or bonsai; their own if None.
        config: Hugging Face's config.json of the model, which decides its layout, or the directory that has it; the
            one beside the weights, or of their run, if None.
        scanned: Whether MaxText's blocks are to be stacked, along axis 1.
        rounded: Let entries be rounded, each once, where one of the layouts multiplies or adds to them; else that is
            an error.
        progress: Called after every few megabytes.

    Returns:
        What was done. Configuration and tokenizer files beside the weights are carried over.

    Raises:
        M3Error: The source, the place or the disk is at fault, or the format cannot hold the tensors; the message
            says what and how to mend it.

    Example:
        >>> import tempfile
        >>> from m3jax.checkpoints import ShardWriter
        >>> place = Path(tempfile.mkdtemp())
        >>> with ShardWriter(place / "model.safetensors", [TensorInfo("w", (2,), "F32")]) as shard:
        ...     shard.write("w", 0, np.float32([1, 2]))
        ...     shard.finish()
        >>> result = convert(place / "model.safetensors", place / "flax", to="msgpack")
        >>> result.tensors, result.bytes, sorted(path.name for path in result.directory.iterdir())
        (1, 8, ['flax_model.msgpack', 'm3jax-conversion.json'])
    """
    begun = time.perf_counter()
    out, size = Path(dst), parse_size(max_shard_size)
    format = written(to)
    _check_idle(names, config is not None, scanned, rounded)
    if is_url(os.fspath(dst)):
        raise M3Error(f"{os.fspath(dst)!r} is not on this disk: convert to a local directory, then upload it.")
    check_free(out, overwrite)
    found = locate_model(os.fspath(src))
    check_no_adapter(found)
    check_no_statistics(found.name, found.path)
    place = found.path
    with saying_what_failed(out), ExitStack() as stack:
        digests = digest_companions(place)  # before anything is made of them
        stored, adapting = open_stored(found)
        stack.enter_context(stored)
        check_apart(out, found, stored.files())
        source = _dequantized(stored, place, os.fspath(src)) if dequantize else stored
        source = source if adapting is None else seen_adapted(source, adapting)
        scheme = _scheme_of(stored, place) if dequantize else None
        adapter = None if found.adapter is None or adapting is None else _told_of(found.adapter, adapting)
        named, beside = step_named(os.fspath(src)), named_companions(place)
        told: tuple[str, ...] = ()
        if names is not None:
            home = find_home(place, None if config is None else Path(config))
            own = source
            wanted = WantedLayout(_library(names), BlockLayout(scanned) if names == MAXTEXT.name else BlockLayout())
            metadata = {**source.metadata, **step_metadata(place)}
            source, told = seen_as(source, wanted, home.config, metadata, named, rounded=rounded)
            beside = {**named_companions(home.directory), **beside}
            beside |= {} if home.file is None else {CONFIG: home.file}
            digests = {**digest_companions(home.directory), **digests}
        digests |= {path: digest_file(path) for path in beside.values() if path not in digests}
        check_documents(beside)
        as_stored = names is None or source is own
        template = read_template(place) if as_stored and format == recognise(place) == ORBAX else None
        model = found._replace(name=named)
        small = beside, digests
        job = _Job(model, stored, source, *small, out, format, template, size, overwrite, scheme, progress, adapter)
        total, digest = _convert(job)
        note = tokenizer_note(found)
        code = find_beside(template.beside).note(named) if template is not None else None
        notes = (*told, *remarks(named, place, source), *(each for each in (code, note) if each is not None))
        tensors, files = len(source.tensors), tuple(job.beside)
    if named != os.fspath(src):
        notes = (last_note(os.fspath(src), named), *notes)
    return ConvertResult(out, format.name, tensors, total, digest, files, time.perf_counter() - begun, notes)


def _check_idle(names: str | None, has_config: bool, scanned: bool, rounded: bool) -> None:
    """Raise M3Error for what has no meaning with the names that are asked for."""
    if names is None and (has_config or rounded):
        raise M3Error("config and rounded are for other names: say whose by names (--names), or leave them out.")
    if not scanned and names != MAXTEXT.name:
        raise M3Error("only MaxText's blocks are kept apart on request: write --names maxtext, or leave it out.")


def _library(names: str) -> str:
    if names not in NAMES:
        raise M3Error(f"{names!r} is no library whose names are known: use {', '.join(NAMES)}.")
    return names


def _scheme_of(stored: Checkpoint, place: Path) -> str | None:
    """How a checkpoint's weights are quantised."""
    config = read_config(place if is_dir(place) else place.parent)
    return anatomy_of(stored.tensors, config, stored.metadata).quantisation


def _dequantized(stored: Checkpoint, place: Path, name: str) -> Checkpoint:
    """A checkpoint with numbers in place of float8 weights and scales."""
    config = read_config(place if is_dir(place) else place.parent)
    found = find_dequantisation(stored.tensors, config, name)
    if found is not None:
        return seen_dequantized(stored, found, found.dtype)
    scheme = _scheme_of(stored, place)
    if scheme is None:
        raise M3Error(f"{name} has no float8 weights: convert it without dequantising.")
    raise M3Error(f"{name} is quantised ({scheme}), which cannot be undone here: {mend_of(scheme)}.")


def _edited(name: str, entries: dict[str, Any]) -> dict[str, Any]:
    """A file beside weights that are quantised no more."""
    return without_quantisation(entries) if name == "config.json" else entries


class _Job(NamedTuple):
    """A conversion between opening and closing.

    Attributes:
        model: What is converted.
        stored: Its tensors as they are in files.
        source: Its tensors as they are to be written.
        beside: The files that are carried over, by name.
        digests: Of them, by their paths.
        out: Where the output is to appear.
        to: The format to write.
        template: What the tree of Orbax is taken from; None where it is made anew, or there is none.
        max_shard_size: Bytes of tensors per file at most.
        overwrite: Replace what is there.
        dequantised: The scheme of the weights that are read as numbers; None where they are written as they are.
        progress: Called after every few megabytes.
        adapter: What is told of the adapter that is added; None where there is none.
    """

    model: ModelDirectory
    stored: Checkpoint
    source: Checkpoint
    beside: Mapping[str, Path]
    digests: Mapping[Path, str]
    out: Path
    to: Format
    template: Template | None
    max_shard_size: int
    overwrite: bool
    dequantised: str | None
    progress: Report | None
    adapter: Mapping[str, Any] | None = None


def _told_of(place: ModelDirectory, adapting: Adapting) -> dict[str, Any]:
    """What is told of an adapter, as a merge's manifest does."""
    return {"name": place.name, "revision": place.revision, "config": adapting.config_digest}


def _convert(job: _Job) -> tuple[int, str]:
    """Write, read back and publish; returns bytes and digest."""
    source, to, beside = job.source, job.to, job.beside
    if not source.tensors:
        raise M3Error(f"{job.model.name}: holds no tensors to convert: give a model that has weights")
    before = source.fingerprint()
    total = sum(info.nbytes for info in source.tensors.values())
    small = sum(file.stat().st_size for file in beside.values()) + _TOLD_PER_TENSOR * len(source.tensors)
    shapes = [(info.name, info.shape) for info in source.tensors.values()]
    told = [to.name, job.max_shard_size, source.location, before, sorted(beside), shapes]
    identity = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    with Staging(job.out, identity, total + small, job.overwrite, names=_names(job)) as staging:
        watched = _Watched(source, _Stage("converting", total, job.progress))
        if job.template is not None:
            fill_with_orbax(staging.path, watched, template=job.template)
        else:
            assert to.write is not None  # `written` gives no other
            to.write(staging.path, watched, job.max_shard_size)
        for name, file in beside.items():
            write_copy(file, staging.path, name, job.digests[file], _edited if job.dequantised else None)
        digests = _verify(staging.path, to, watched, _Stage("verifying", total, job.progress))
        if source.fingerprint() != before:
            raise M3Error(f"{source.location} changed while it was being converted: convert again once it is at rest.")
        files = {name: digest_file(staging.path / name) for name in staging.files()}
        record = mark.build(to.name, _record(job, digests), digests, files)
        (staging.path / CONVERSION).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        narrow(staging.path, source.files())
        staging.publish()
    return total, str(record["output"]["digest"])


def _record(job: _Job, digests: TensorDigests) -> InputRecord:
    """What was read, as it is stored."""
    read = {}
    for name, (_, digest) in digests.items():
        for stored, own in stored_digests(job.source, name, digest).items():
            read[stored] = job.stored.tensors[stored], own
    return InputRecord(job.model.name, "source", job.model.revision, read, job.dequantised, job.adapter)


def _names(job: _Job) -> tuple[str, ...]:
    """Patterns of the files of a conversion."""
    to, beside = job.to, job.beside
    if to.name == ORBAX.name:
        copied = () if job.template is None else find_beside(job.template.beside).files
        tree = file_patterns(job.template, job.source.tensors.values(), copied, whole=True)
        return (*tree, *exactly([*beside, CONVERSION]))
    weights = [f"*{ending}" for ending in to.endings] + ([to.index_file] if to.index_file else [])
    return (*weights, *exactly([*beside, CONVERSION]))


# --- Verifying -------------------------------------------------------------------------------------------


def _verify(directory: Path, to: Format, source: "_Watched", stage: "_Stage") -> TensorDigests:
    """Read back what was written; returns the digest of each tensor, which is the source's too."""
    digests = {}
    with to.open(directory) as copy:
        for name in source.tensors.keys() | copy.tensors.keys():
            if source.tensors.get(name) != copy.tensors.get(name):
                raise _differs(source, directory, name)
        for name, info in source.tensors.items():
            digest = TensorDigest()
            for _, piece in pieces(copy, name, 0, info.nbytes):
                digest.update(piece)
                stage.add(len(piece))
            digests[name] = info, digest.hexdigest()
            if digest.hexdigest() != source.digest(name):
                raise _differs(source, directory, name)
    return digests


def _differs(source: Checkpoint, directory: Path, name: str) -> M3Error:
    return M3Error(
        f"tensor {name!r} of {source.location} reads back otherwise from {directory}, so nothing was kept: check the"
        " disk and the memory, and convert again."
    )


# --- Watching what is read -------------------------------------------------------------------------------


class _Stage:
    """Counts bytes and tells of them, from any thread."""

    def __init__(self, name: str, total: int, report: Report | None) -> None:
        self._name, self._total, self._report = name, total, report
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done = min(self._done + count, self._total)
            done = self._done
        if self._report is not None:
            self._report(Progress(self._name, done, self._total))


class _Watched(Closing):
    """A checkpoint that tells how much is read and digests on the way what is read in order."""

    def __init__(self, checkpoint: Checkpoint, stage: _Stage) -> None:
        self._checkpoint, self._stage = checkpoint, stage
        self._passing = Passing(checkpoint)
        self.location = checkpoint.location
        self.tensors: Mapping[str, TensorInfo] = checkpoint.tensors
        self.metadata: Mapping[str, str] = checkpoint.metadata

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        self._checkpoint.read_into(name, start, out)
        self._passing.take(name, start, out)
        self._stage.add(out.nbytes)

    def digest(self, name: str) -> str:
        """The digest of a tensor; reads it again if it was not read in order."""
        return self._passing.digest(name)

    def files(self) -> tuple[Path, ...]:
        return self._checkpoint.files()

    def fingerprint(self) -> dict[str, FileFingerprint]:
        return self._checkpoint.fingerprint()

    def close(self) -> None:
        self._checkpoint.close()
