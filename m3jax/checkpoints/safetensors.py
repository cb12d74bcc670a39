"""Reading safetensors, byte range by byte range, from one file or several, here or in remote storage."""

import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path, PurePosixPath
from reprlib import repr as brief  # what a file says may be long or deep without end
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from m3jax.checkpoints.headers import (
    LFS_POINTER,
    Header,
    can_exist,
    damaged,
    parse_json,
    read_file,
    read_header,
    read_raw_header,
)
from m3jax.checkpoints.protocol import (
    Checkpoint,
    FileFingerprint,
    TensorInfo,
    natural_key,
)
from m3jax.checkpoints.remote import RemotePath, as_path, changed
from m3jax.checkpoints.shards import INDEX_FILE, SINGLE_FILE
from m3jax.checkpoints.storage import (
    Source,
    is_dir,
    is_file,
    list_names,
    open_source,
)
from m3jax.errors import M3Error

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HEADERS_AT_ONCE = 16  # of remote files, where each takes a while to come

# Names by which the other readers take these from here.
_LFS_POINTER, _can_exist, _damaged, _parse_json, _read_file = LFS_POINTER, can_exist, damaged, parse_json, read_file


# --- Files -----------------------------------------------------------------------------------------------


class RemoteFingerprint(FileFingerprint):
    """What is cheap to know of a remote file.

    Attributes:
        tag: Its ETag or generation, which tells what a time in whole seconds does not.
    """

    tag: str


def _read_headers(root: Path, files: Sequence[str]) -> dict[str, Header]:
    """The headers of files, by their names under `root`."""
    if not isinstance(root, RemotePath):
        return {file: read_header(root / file) for file in files}
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        return dict(zip(files, pool.map(lambda file: read_header(root / file), files), strict=True))


def _fingerprint(path: Path, header: Header) -> FileFingerprint:
    """What a file looks like now; a remote one that is still the one of the header is not read again."""
    if isinstance(path, RemotePath) and path.identity() == header.identity:
        digest, now = header.blake3, header.identity
    else:
        raw, now = read_raw_header(path)
        digest = blake3(raw).hexdigest()
    found: FileFingerprint = {"size": now.size, "mtime_ns": now.mtime_ns, "header_blake3": digest}
    return RemoteFingerprint(**found, tag=str(now.tag)) if isinstance(path, RemotePath) else found


def _straight_ends(tensors: Iterable[TensorInfo], headers: Mapping[str, Header]) -> dict[str, int]:
    """For each tensor, the offset in its file up to which the tensors after it follow without a gap."""
    ends: dict[str, int] = {}
    after, beyond = ("", 0), 0  # where the next tensor is, and how far straight reading goes from there
    places = {name: (file, offset) for file, header in headers.items() for name, offset in header.offsets.items()}
    for info in reversed(list(tensors)):
        file, begin = places[info.name]
        end = begin + info.nbytes
        beyond = beyond if after == (file, end) else end
        ends[info.name] = beyond
        after = (file, begin)
    return ends


# --- Reading ---------------------------------------------------------------------------------------------


class SafetensorsCheckpoint:
    """One or several safetensors files as one checkpoint; made by `open_safetensors`.

    Attributes:
        location: The path that was opened.
        tensors: Every tensor by name, in natural order.
        metadata: The files' `__metadata__`, the first file first.
    """

    def __init__(self, location: str, root: Path, headers: Mapping[str, Header]) -> None:
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
        self._straight_ends = _straight_ends(self.tensors.values(), headers)
        self._sources: dict[str, Source] = {}
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
        source = self._source(file)
        path = self._root / file
        try:
            offset = self._headers[file].offsets[name] + start
            done = source.read_into(view.cast("B"), offset, self._straight_ends[name])
        except OSError as error:
            raise M3Error(f"tensor {name!r} in {path} cannot be read: {error.strerror}; check the disk.") from error
        if done < view.nbytes:
            raise M3Error(
                f"{path} ends inside tensor {name!r}, {view.nbytes - done:,} bytes early: it was cut while"
                " it was open, so get it again from its source."
            )

    def _source(self, file: str) -> Source:
        """The open source of a file: opened at first use, kept until `close`."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.location} is closed")
            if file not in self._sources:
                path = self._root / file
                source = open_source(path)
                if source.identity != self._headers[file].identity:
                    source.close()
                    raise changed(path)
                self._sources[file] = source
            return self._sources[file]

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(self._root / file for file in self._headers)

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the files look like now, by name under the checkpoint's directory."""
        return {file: _fingerprint(self._root / file, header) for file, header in self._headers.items()}

    def close(self) -> None:
        """Releases the open files; reading afterwards is an error."""
        with self._lock:
            self._closed = True
            while self._sources:
                self._sources.popitem()[1].close()

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
            else the files that `model.safetensors.index.json` lists, else all `*.safetensors` files; here, or as
            `s3://bucket/path` or `gs://bucket/path`.

    Returns:
        The checkpoint; use it as a context manager.

    Raises:
        M3Error: There are no such weights, or a file is damaged or does not agree with the others.
    """
    source = as_path(path)
    index = _find_index(source)
    if index is not None:
        weight_map = _read_index(index)
        root, files = index.parent, sorted(set(weight_map.values()), key=natural_key)
        _check_present(index, files)
        headers = _read_headers(root, files)
        _check_index(index, weight_map, headers)
    else:
        root, files = (source, _list_weights(source)) if is_dir(source) else _lone_file(source)
        headers = _read_headers(root, files)
        _check_disjoint(root, headers)
    return SafetensorsCheckpoint(str(path), root, headers)


def _find_index(source: Path) -> Path | None:
    """The index to follow, if it is an index that says where the weights are."""
    if source.name.endswith(".index.json"):
        return source
    has_index = is_file(source / INDEX_FILE) and not is_file(source / SINGLE_FILE)
    return source / INDEX_FILE if has_index else None


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says."""
    weight_map = parse_json(read_file(index), str(index)).get("weight_map")
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


def _check_present(index: Path, files: Sequence[str]) -> None:
    """Checks that the files that an index names are there."""
    # One listing tells of all the remote files that are directly there.
    listed = set(list_names(index.parent)) if isinstance(index, RemotePath) else set()
    for file in files:
        if file not in listed and not is_file(index.parent / file):
            raise M3Error(f"{index} names {file!r}, which is not there: download the model again.")


def _check_index(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
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
    if is_file(directory / SINGLE_FILE):
        return [SINGLE_FILE]
    names = sorted(list_names(directory), key=natural_key)
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


def _check_disjoint(root: Path, headers: Mapping[str, Header]) -> None:
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
