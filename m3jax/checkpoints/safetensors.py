"""Reading safetensors, byte range by byte range.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). Headers are checked here in full before any byte is read, because a
file may be damaged, half downloaded or made to mislead.
"""

import errno
import json
import os
import re
import stat
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from math import prod
from pathlib import Path, PurePosixPath
from reprlib import repr as brief  # what a file says may be long or deep without end
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self, TypeGuard

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from m3jax.checkpoints.protocol import (
    DTYPES,
    Checkpoint,
    FileFingerprint,
    TensorInfo,
    natural_key,
)
from m3jax.checkpoints.shards import INDEX_FILE, SINGLE_FILE
from m3jax.errors import M3Error

_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_LFS_POINTER = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


# --- Headers ---------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """What one file says of itself."""

    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]  # of each tensor's first byte, from the start of the file
    metadata: dict[str, str]
    identity: tuple[int, int, int]  # inode, size and time: another file under the same name differs


def _damaged(fault: str) -> M3Error:
    """The sentence for a file whose content is at fault."""
    return M3Error(f"{fault}: get the file again from its source.")


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`; a key that appears twice is an error, as either value could be meant."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise _damaged(f"{where} names {twice!r} twice")
        return parsed

    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=unique)
        # Escaped lone surrogates and NaN pass the parser, but the first are no text and the second is no JSON.
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{where} is not valid JSON") from error
    if not isinstance(parsed, dict):
        raise _damaged(f"{where} is not a JSON object")
    return parsed


def _is_counts(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list of integers that could count something on this machine."""
    return isinstance(value, list) and all(type(entry) is int and 0 <= entry < 2**63 for entry in value)


def _can_exist(shape: list[int], dtype: str) -> bool:
    """Whether numpy could make an array of this shape, which it decides zeros aside."""
    return len(shape) <= 64 and prod(size for size in shape if size) * DTYPES[dtype].itemsize < 2**63


def _parse_tensor(name: str, entry: object, path: Path) -> tuple[TensorInfo, int, int]:
    """One entry of a header, checked by itself: the tensor and the first and last offset of its bytes."""
    where = f"tensor {name!r} in {path}"
    if not isinstance(entry, dict):
        raise _damaged(f"{where} is described by no JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if dtype in ("F4", "F6_E2M3", "F6_E3M2"):
            raise M3Error(f"{where} has dtype {dtype}, less than a byte an entry: dequantize the model first.")
        raise M3Error(f"{where} has the unknown dtype {brief(dtype)}: convert it to one of {', '.join(DTYPES)}.")
    if not _is_counts(shape) or not _can_exist(shape, dtype):
        raise _damaged(f"{where} has the impossible shape {brief(shape)}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(f"{where} has the impossible offsets {brief(offsets)}")
    info = TensorInfo(name, tuple(shape), dtype)
    begin, end = offsets
    if end - begin != info.nbytes:
        raise _damaged(f"{where} has {end - begin:,} bytes where {dtype} of shape {shape} needs {info.nbytes:,}")
    return info, begin, end


def _check_layout(spans: Iterable[tuple[int, int, str]], available: int, path: Path) -> None:
    """Checks that the tensors fill the file's data without holes, overlaps or a missing end."""
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            fault = "overlaps the tensor before it" if begin < reached else "follows a hole"
            raise _damaged(f"tensor {name!r} in {path} {fault}")
        reached = end
    if reached > available:
        raise _damaged(f"{path} is cut short: its tensors need {reached:,} bytes and {available:,} are there")
    if reached < available:
        raise _damaged(f"{path} has {available - reached:,} bytes after its last tensor")


def _parse_metadata(entry: object, path: Path) -> dict[str, str]:
    """The `__metadata__` of a header."""
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
        raise _damaged(f"__metadata__ in {path} does not map texts to texts")
    return entry


def _parse_header(raw: bytes, file: os.stat_result, path: Path) -> _Header:
    """Parses and checks the JSON of a header.

    Args:
        raw: The JSON.
        file: What the operating system says of the whole file.
        path: The file, for sentences.

    Raises:
        M3Error: The header is no header, or does not fit the file.
    """
    entries = _parse_json(raw, f"the header of {path}")
    metadata = _parse_metadata(entries.pop("__metadata__", None), path)
    parsed = [_parse_tensor(name, entry, path) for name, entry in entries.items()]
    data_start = 8 + len(raw)
    _check_layout(((begin, end, info.name) for info, begin, end in parsed), file.st_size - data_start, path)
    return _Header(
        tensors={info.name: info for info, _, _ in parsed},
        offsets={info.name: data_start + begin for info, begin, _ in parsed},
        metadata=metadata,
        identity=_identity(file),
    )


# --- Files -----------------------------------------------------------------------------------------------


def _identity(file: os.stat_result) -> tuple[int, int, int]:
    return file.st_ino, file.st_size, file.st_mtime_ns


def _unreadable(path: Path, error: OSError | ValueError) -> M3Error:
    """The sentence for a file that the operating system does not give us."""
    if isinstance(error, FileNotFoundError):
        return M3Error(f"{path} does not exist: check the path.")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return M3Error(f"{path} cannot be opened, too many files are: raise the limit with `ulimit -n`.")
    reason = error.strerror if isinstance(error, OSError) else error
    return M3Error(f"{path} cannot be read: {reason}; check the path, its mode and the disk.")


def _open_file(path: Path) -> int:
    """Opens a regular file for reading."""
    try:
        # Not to wait for the other end of a pipe before we can see that it is one.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise M3Error(f"{path} is not a regular file: give a .safetensors file or a model directory.")
    return descriptor


def _read_exactly(descriptor: int, out: memoryview, offset: int) -> int:
    """Fills `out` from `offset` on, in as many reads as it takes; returns how much came before the end."""
    done = 0
    while done < len(out):
        got = os.preadv(descriptor, [out[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def _read_file(path: Path) -> bytes:
    """The whole of a small file."""
    descriptor = _open_file(path)
    try:
        with os.fdopen(descriptor, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_raw_header(path: Path) -> tuple[bytes, os.stat_result]:
    """The JSON of a file's header, not yet parsed, and what the operating system says of the file."""
    descriptor = _open_file(path)
    try:
        file = os.fstat(descriptor)
        prefix = os.pread(descriptor, len(_LFS_POINTER), 0)
        if prefix == _LFS_POINTER:
            raise M3Error(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` beside it.")
        length = int.from_bytes(prefix[:8], "little")
        if len(prefix) < 8 or length > file.st_size - 8:
            raise _damaged(
                f"{path} is cut short or no safetensors file: its header would take {length:,} bytes"
                f" and the whole file has {file.st_size:,}"
            )
        if length > _MAX_HEADER:
            raise _damaged(f"{path} has a header of {length:,} bytes, over the format's {_MAX_HEADER:,}")
        raw = bytearray(length)
        _read_exactly(descriptor, memoryview(raw), 8)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)
    return bytes(raw), file


def _read_header(path: Path) -> _Header:
    """Reads, parses and checks the header of a file."""
    raw, file = _read_raw_header(path)
    return _parse_header(raw, file, path)


# --- Reading ---------------------------------------------------------------------------------------------


class SafetensorsCheckpoint:
    """One or several safetensors files as one checkpoint; made by `open_safetensors`.

    Attributes:
        location: The path that was opened.
        tensors: Every tensor by name, in natural order.
        metadata: The files' `__metadata__`, the first file first.
    """

    def __init__(self, location: str, root: Path, headers: Mapping[str, _Header]) -> None:
        """Joins files whose headers are known.

        Args:
            location: What the checkpoint is called.
            root: The directory that the files are in.
            headers: Of each file, by its name under `root`; no tensor is in two of them.
        """
        tensors = {name: info for header in headers.values() for name, info in header.tensors.items()}
        metadata = {key: text for header in reversed(list(headers.values())) for key, text in header.metadata.items()}
        self.location = location
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: tensors[name] for name in sorted(tensors, key=natural_key)}
        )
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self._root = root
        self._headers = headers
        self._file_of = {name: file for file, header in headers.items() for name in header.tensors}
        self._descriptors: dict[str, int] = {}
        self._closed = False
        self._lock = threading.Lock()

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the tensor's little-endian bytes from `start` on; see `Checkpoint.read_into`."""
        if name not in self.tensors:
            raise M3Error(f"{self.location} has no tensor {name!r}: check the name.")
        view = out.data if isinstance(out, np.ndarray) else out
        if start < 0 or start + view.nbytes > self.tensors[name].nbytes:
            raise ValueError(f"bytes {start} to {start + view.nbytes} are not all inside {self.tensors[name]}")
        if view.nbytes == 0:
            return
        file = self._file_of[name]
        path = self._root / file
        descriptor = self._descriptor(file)
        try:
            done = _read_exactly(descriptor, view.cast("B"), self._headers[file].offsets[name] + start)
        except OSError as error:
            raise M3Error(f"tensor {name!r} in {path} cannot be read: {error.strerror}; check the disk.") from error
        if done < view.nbytes:
            raise M3Error(
                f"{path} ends inside tensor {name!r}, {view.nbytes - done:,} bytes early: it was cut while"
                " it was open, so get it again from its source."
            )

    def _descriptor(self, file: str) -> int:
        """The open descriptor of a file: opened at first use, kept until `close`."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.location} is closed")
            if file not in self._descriptors:
                path = self._root / file
                descriptor = _open_file(path)
                if _identity(os.fstat(descriptor)) != self._headers[file].identity:
                    os.close(descriptor)
                    raise M3Error(f"{path} has changed since its header was read: start again.")
                self._descriptors[file] = descriptor
            return self._descriptors[file]

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(self._root / file for file in self._headers)

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the files look like now, by name under the checkpoint's directory."""
        fingerprints: dict[str, FileFingerprint] = {}
        for file in self._headers:
            raw, status = _read_raw_header(self._root / file)
            fingerprints[file] = {
                "size": status.st_size,
                "mtime_ns": status.st_mtime_ns,
                "header_blake3": blake3(raw).hexdigest(),
            }
        return fingerprints

    def close(self) -> None:
        """Releases the open files; reading afterwards is an error."""
        with self._lock:
            self._closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_safetensors(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the safetensors weights at a path; reads headers only.

    Args:
        path: A `.safetensors` file, an index, or a model directory, where `model.safetensors` is taken,
            else the files that `model.safetensors.index.json` lists, else all `*.safetensors` files.

    Returns:
        The checkpoint; use it as a context manager.

    Raises:
        M3Error: There are no such weights, or a file is damaged or does not agree with the others.
    """
    source = Path(path)
    index = _find_index(source)
    if index is not None:
        weight_map = _read_index(index)
        root, files = index.parent, sorted(set(weight_map.values()), key=natural_key)
        headers = {file: _read_shard(index, file) for file in files}
        _check_index(index, weight_map, headers)
    else:
        root, files = (source, _list_weights(source)) if os.path.isdir(source) else _lone_file(source)
        headers = {file: _read_header(root / file) for file in files}
        _check_disjoint(root, headers)
    return SafetensorsCheckpoint(str(path), root, headers)


def _find_index(source: Path) -> Path | None:
    """The index to follow, if it is an index that says where the weights are."""
    if source.name.endswith(".index.json"):
        return source
    has_index = os.path.isfile(source / INDEX_FILE) and not os.path.isfile(source / SINGLE_FILE)
    return source / INDEX_FILE if has_index else None


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says."""
    weight_map = _parse_json(_read_file(index), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise M3Error(f"{index} has no weight_map of tensors to files: get it again from its source.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_below(file):
            raise M3Error(f"{index} places {name!r} in {brief(file)}, which is outside the model: do not trust it.")
    return weight_map


def _is_below(file: str) -> bool:
    """Whether a name in an index stays below the index's directory."""
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in file


def _read_shard(index: Path, file: str) -> _Header:
    """The header of a file that an index names."""
    if not os.path.isfile(index.parent / file):
        raise M3Error(f"{index} names {file!r}, which is not there: download the model again.")
    return _read_header(index.parent / file)


def _check_index(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, _Header]) -> None:
    """Checks that files hold the tensors that the index places in them, and no others."""
    holders = {name: file for file, header in headers.items() for name in header.tensors}
    mend = "the two are not of one model, so download it again"
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            found = f"{holders[name]!r} holds it" if name in holders else "none of its files holds it"
            raise M3Error(f"{index} places tensor {name!r} in {file!r}, but {found}: {mend}.")
    for file, header in headers.items():
        for name in header.tensors:
            if weight_map.get(name) != file:
                raise M3Error(f"{index} does not place tensor {name!r} in {file!r}, which holds it: {mend}.")


def _lone_file(path: Path) -> tuple[Path, list[str]]:
    """The directory and the name of a weight file that was named itself."""
    if path.suffix in _PICKLES:
        raise _pickled(path)
    return path.parent, [path.name]


def _list_weights(directory: Path) -> list[str]:
    """The weight files of a directory that has no index to follow."""
    if os.path.isfile(directory / SINGLE_FILE):
        return [SINGLE_FILE]
    try:
        names = sorted(os.listdir(directory), key=natural_key)
    except OSError as error:
        raise _unreadable(directory, error) from error
    # Names that start with a dot are other systems' side files.
    files = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles and not files:
        raise _pickled(directory / pickles[0])
    if not files:
        raise M3Error(f"{directory} holds no .safetensors files: give the directory that does.")
    _check_numbering(directory, files)
    return files


def _pickled(path: Path) -> M3Error:
    """The sentence for weights that only unpickling, which runs code, would open."""
    return M3Error(
        f"{path} is pickled, and pickles are never opened because they run code: load the model once in"
        " transformers and convert it with `model.save_pretrained(directory, safe_serialization=True)`."
    )


def _check_numbering(directory: Path, files: Sequence[str]) -> None:
    """Checks that files called `…-00001-of-00003.safetensors` are all there, as no index tells."""
    sets: dict[tuple[str, str], set[int]] = defaultdict(set)
    for file in files:
        numbered = re.fullmatch(r"(.*)-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors", file)
        if numbered:
            sets[numbered[1], numbered[3]].add(int(numbered[2]))
    for (stem, total), present in sets.items():
        missing = next(number for number in count(1) if number not in present)
        if missing <= int(total):
            name = f"{stem}-{missing:0{len(total)}d}-of-{total}.safetensors"
            raise M3Error(f"{directory} lacks {name}, one of {int(total)} files: download the model again.")


def _check_disjoint(root: Path, headers: Mapping[str, _Header]) -> None:
    """Checks that no tensor is in two files, as no index tells which is meant."""
    holders: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in holders:
                raise M3Error(
                    f"{root} has tensor {name!r} both in {holders[name]!r} and in {file!r}, and no"
                    f" {INDEX_FILE} to choose: give one file's path instead."
                )
            holders[name] = file
