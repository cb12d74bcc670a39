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
from m3jax.checkpoints import (
    Checkpoint,
    FileFingerprint,
    TensorDigest,
    TensorInfo,
    digest_checkpoint,
    locate_model,
    parse_size,
)
from m3jax.checkpoints.adapters import check_no_adapter, open_stored, seen_adapted, tokenizer_note
from m3jax.checkpoints.copying import pieces
from m3jax.checkpoints.digest import Passing
from m3jax.checkpoints.formats import ORBAX, SAFETENSORS, Format, written
from m3jax.checkpoints.locate import named_companions, read_config, step_named
from m3jax.checkpoints.opening import recognise
from m3jax.checkpoints.orbax_template import Template, file_patterns, read_template
from m3jax.checkpoints.orbax_writer import fill_with_orbax
from m3jax.checkpoints.protocol import Closing
from m3jax.checkpoints.remote import is_url
from m3jax.checkpoints.runs import last_note
from m3jax.checkpoints.storage import is_dir
from m3jax.checkpoints.trust import remarks
from m3jax.errors import M3Error, saying_what_failed
from m3jax.outputs.copies import Edit, write_copy
from m3jax.outputs.local import CONVERSION, Staging, check_free, exactly, replaced_with
from m3jax.outputs.manifest import versions
from m3jax.outputs.modes import narrow
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
    progress: Report | None = None,
) -> ConvertResult:
    """Write a checkpoint in another format, with the same names, dtypes, shapes and bits.

    Bits are others where it is dequantised, or where an adapter is added: `base+adapter` writes the merged model.

    Everything written is read back and compared before the output appears, whole, by a rename. Names and the layout
    of weights stay as they are: a model of PyTorch does not become one of Flax by it.

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
    if is_url(os.fspath(dst)):
        raise M3Error(f"{os.fspath(dst)!r} is not on this disk: convert to a local directory, then upload it.")
    check_free(out, overwrite)
    found = locate_model(os.fspath(src))
    check_no_adapter(found)
    place = found.path
    if any(replaced_with(out, each.path) is not None for each in (found, found.adapter) if each is not None):
        raise M3Error(f"{out} is the model to convert, or holds it: choose another output.")
    with saying_what_failed(out), ExitStack() as stack:
        stored, adapting = open_stored(found)
        stack.enter_context(stored)
        source = _dequantized(stored, place, os.fspath(src)) if dequantize else stored
        source = source if adapting is None else seen_adapted(source, adapting)
        edit = _edited if dequantize else None
        template = read_template(place) if format == recognise(place) == ORBAX else None
        total, digest, files = _convert(
            source, named_companions(place), out, format, template, size, overwrite, edit, progress
        )
        named, beside = step_named(os.fspath(src)), tokenizer_note(found)
        notes = (*remarks(named, place, source), *([beside] if beside is not None else []))
        tensors = len(source.tensors)
    if named != os.fspath(src):
        notes = (last_note(os.fspath(src), named), *notes)
    return ConvertResult(out, format.name, tensors, total, digest, files, time.perf_counter() - begun, notes)


def _dequantized(stored: Checkpoint, place: Path, name: str) -> Checkpoint:
    """A checkpoint with numbers in place of float8 weights and scales."""
    config = read_config(place if is_dir(place) else place.parent)
    found = find_dequantisation(stored.tensors, config, name)
    if found is not None:
        return seen_dequantized(stored, found, found.dtype)
    scheme = anatomy_of(stored.tensors, config, stored.metadata).quantisation
    if scheme is None:
        raise M3Error(f"{name} has no float8 weights: convert it without dequantising.")
    raise M3Error(f"{name} is quantised ({scheme}), which cannot be undone here: {mend_of(scheme)}.")


def _edited(name: str, entries: dict[str, Any]) -> dict[str, Any]:
    """A file beside weights that are quantised no more."""
    return without_quantisation(entries) if name == "config.json" else entries


def _convert(
    source: Checkpoint,
    beside: Mapping[str, Path],
    out: Path,
    to: Format,
    template: Template | None,
    max_shard_size: int,
    overwrite: bool,
    edit: Edit | None,
    progress: Report | None,
) -> tuple[int, str, tuple[str, ...]]:
    """The work between opening and closing; returns bytes, digest and the names of the files carried over."""
    before = source.fingerprint()
    total = sum(info.nbytes for info in source.tensors.values())
    small = sum(file.stat().st_size for file in beside.values()) + _TOLD_PER_TENSOR * len(source.tensors)
    told = [to.name, max_shard_size, source.location, before, sorted(beside)]
    identity = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    with Staging(out, identity, total + small, overwrite, names=_names(to, source, template, beside)) as staging:
        narrow(staging.path, source.files())  # before there is anything in it
        watched = _Watched(source, _Stage("converting", total, progress))
        if template is not None:
            fill_with_orbax(staging.path, watched, template=template)
        else:
            assert to.write is not None  # `written` gives no other
            to.write(staging.path, watched, max_shard_size)
        for name, file in beside.items():
            write_copy(file, staging.path, name, edit)
        digest = _verify(staging.path, to, watched, _Stage("verifying", total, progress))
        if source.fingerprint() != before:
            raise M3Error(f"{source.location} changed while it was being converted: convert again once it is at rest.")
        mark = {"m3jax": versions()["m3jax"], "format": to.name, "digest": digest, "files": staging.files()}
        (staging.path / CONVERSION).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
        narrow(staging.path, source.files())
        staging.publish()
    return total, digest, tuple(beside)


def _names(to: Format, source: Checkpoint, template: Template | None, beside: Mapping[str, Path]) -> tuple[str, ...]:
    """Patterns of the files of a conversion."""
    if template is not None:
        return (*file_patterns(template, source.tensors), *exactly([*beside, CONVERSION]))
    weights = [f"*{ending}" for ending in to.endings] + ([to.index_file] if to.index_file else [])
    return (*weights, *to.patterns, *exactly([*beside, CONVERSION]))


# --- Verifying -------------------------------------------------------------------------------------------


def _verify(directory: Path, to: Format, source: "_Watched", stage: "_Stage") -> str:
    """Read back what was written; returns its digest, which is the source's too."""
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
            digests[name] = info.dtype, info.shape, digest.hexdigest()
            if digest.hexdigest() != source.digest(name):
                raise _differs(source, directory, name)
    return digest_checkpoint(digests)


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
