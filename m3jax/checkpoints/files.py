"""The weight files of a checkpoint: which there are, their bytes, and what tells that one has changed."""

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path, PurePosixPath
from reprlib import repr as brief  # what a file says may be long or deep without end
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from m3jax.checkpoints.formats import INDEX_ENDING, Format
from m3jax.checkpoints.headers import parse_json
from m3jax.checkpoints.protocol import FileFingerprint, LocalFingerprint, RemoteFingerprint, natural_key
from m3jax.checkpoints.remote import Identity, RemotePath, changed
from m3jax.checkpoints.storage import ByteSource, is_dir, is_file, list_names, open_source, read_file
from m3jax.errors import M3Error

_LONGEST_PATH = 4096 // 4  # characters, of up to four bytes
_HEADERS_AT_ONCE = 16  # of remote files, where each takes a while to come


class _Told(Protocol):
    """What a file says of itself."""

    @property
    def tensors(self) -> Mapping[str, object]: ...


_Header = TypeVar("_Header", bound=_Told)


# --- Indexes ---------------------------------------------------------------------------------------------


def find_index(source: Path, format: Format) -> Path | None:
    """The index to follow, if it is an index that says where the weights are.

    Args:
        source: An index, or a model directory or a weight file.
        format: Whose names a directory's files have.

    Returns:
        The index; None where there is none. A single file beside one is not read: `trust.remarks` says so.
    """
    if source.name.endswith(INDEX_ENDING):
        return source
    index = source / format.index_file
    return index if is_file(index) else None


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says.

    Args:
        index: The index.

    Returns:
        Names of files that are below the index's directory, and there, by the names of tensors.

    Raises:
        M3Error: The index is damaged or made to mislead, or a file that it names is absent.
    """
    weight_map = parse_json(read_file(index), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise M3Error(f"{index} has no weight_map of tensors to files: get it again from its source.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_below(file):
            raise M3Error(f"{index} places {name!r} in {brief(file)}, which is outside the model: do not trust it.")
    _check_present(index, set(weight_map.values()))
    return weight_map


def is_below(file: str) -> bool:
    """Whether a name that a file gives is one of a file below the model's directory, and can be one.

    Example:
        >>> is_below("a/b.json"), is_below("../b.json"), is_below("/proc/self/environ"), is_below("a" * 300)
        (True, False, False, False)
    """
    path = PurePosixPath(file)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in file:
        return False
    return len(file) < _LONGEST_PATH and all(len(part.encode("utf-8", "replace")) < 256 for part in path.parts)


def _check_present(index: Path, files: Iterable[str]) -> None:
    # One listing tells of all the remote files that are directly there.
    listed = set(list_names(index.parent)) if isinstance(index, RemotePath) else set()
    for file in sorted(files, key=natural_key):
        if file not in listed and not is_file(index.parent / file):
            single = index.parent / index.name.removesuffix(INDEX_ENDING)
            other = f", or remove the index if {single.name} has all weights" if is_file(single) else ""
            raise M3Error(f"{index} names {file!r}, which is not there: download the model again{other}.")


def _check_index(index: Path, weight_map: Mapping[str, str], held: Mapping[str, Collection[str]]) -> None:
    """Checks that files hold the tensors that an index places in them, and no others.

    Args:
        index: The index, for sentences.
        weight_map: What it says.
        held: The names of the tensors in each file.

    Raises:
        M3Error: They do not.
    """
    holders = {name: file for file, names in held.items() for name in names}
    mend = "the two are not of one model, so download it again"
    for name, file in weight_map.items():
        if name not in held[file]:
            found = f"{holders[name]!r} holds it" if name in holders else "none of its files holds it"
            raise M3Error(f"{index} places tensor {name!r} in {file!r}, but {found}: {mend}.")
    for file, names in held.items():
        for name in names:
            if name in weight_map and weight_map[name] != file:
                raise M3Error(
                    f"{index} places tensor {name!r} in {weight_map[name]!r}, but {file!r} holds it too, and software"
                    " differs in which it reads: download the model again."
                )
            if name not in weight_map:
                raise M3Error(f"{index} does not place tensor {name!r} in {file!r}, which holds it: {mend}.")


# --- Files without an index ------------------------------------------------------------------------------


def check_numbering(directory: Path, files: Sequence[str]) -> None:
    """Checks that files called `…-00001-of-00003.safetensors`, say, are all there, as no index tells.

    Raises:
        M3Error: One is not.
    """
    sets: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for file in files:
        numbered = re.fullmatch(r"(.*)-([0-9]{1,9})-of-([0-9]{1,9})(\.[a-z]+)", file)
        if numbered:
            sets[numbered[1], numbered[3], numbered[4]].add(int(numbered[2]))
    for (stem, total, ending), present in sets.items():
        missing = next(number for number in count(1) if number not in present)
        if missing <= int(total):
            name = f"{stem}-{missing:0{len(total)}d}-of-{total}{ending}"
            raise M3Error(f"{directory} lacks {name}, one of {int(total)} files: download the model again.")


def _check_disjoint(root: Path, held: Mapping[str, Collection[str]], format: Format) -> None:
    """Checks that no tensor is in two files, as no index tells which is meant.

    Args:
        root: The directory that the files are in, for sentences.
        held: The names of the tensors in each file.
        format: The files' format.

    Raises:
        M3Error: One is.
    """
    holders: dict[str, str] = {}
    for file, names in held.items():
        for name in names:
            if name in holders:
                raise M3Error(
                    f"{root} has tensor {name!r} both in {holders[name]!r} and in {file!r}, and no"
                    f" {format.index_file} to choose: give one file's path instead."
                )
            holders[name] = file


# --- Headers ---------------------------------------------------------------------------------------------


def read_files(
    source: Path, format: Format, choose: Callable[[Path], Sequence[str]], read: Callable[[Path], _Header]
) -> tuple[Path, dict[str, _Header]]:
    """What the files of a checkpoint say of themselves, whether an index names them or not.

    Args:
        source: A file, an index, or a directory.
        format: Its format.
        choose: The files of a directory that has no index to follow.
        read: Reads what one file says; the tensors in it are its `tensors`.

    Returns:
        The directory that the files are in, and what each says, by its name there.

    Raises:
        M3Error: There are none, one is damaged, or they do not agree with each other or the index.
    """
    index = find_index(source, format)
    if index is not None:
        weight_map = read_index(index)
        told = _read_of_each(read, index.parent, sorted(set(weight_map.values()), key=natural_key))
        _check_index(index, weight_map, {file: each.tensors for file, each in told.items()})
        return index.parent, told
    root, files = (source, choose(source)) if is_dir(source) else (source.parent, [source.name])
    told = _read_of_each(read, root, files)
    _check_disjoint(root, {file: each.tensors for file, each in told.items()}, format)
    return root, told


def _read_of_each(read: Callable[[Path], _Header], root: Path, files: Sequence[str]) -> dict[str, _Header]:
    """What files say of themselves, by their names, several at a time where they are remote.

    Args:
        read: Reads one.
        root: The directory that they are in.
        files: Their names under it.
    """
    if not isinstance(root, RemotePath):
        return {file: read(root / file) for file in files}
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        return dict(zip(files, pool.map(lambda file: read(root / file), files), strict=True))


def joined_metadata(of_files: Iterable[Mapping[str, str]]) -> Mapping[str, str]:
    """The texts that several files carry, for reading only.

    Args:
        of_files: Of each file; where two tell different things, the first is believed.

    Returns:
        All of them.
    """
    return MappingProxyType({key: text for told in reversed(list(of_files)) for key, text in told.items()})


# --- Bytes and fingerprints ------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What was seen of a file when its header was read.

    Attributes:
        identity: What differs when another file takes the name.
        digest: BLAKE3 of the header, hexadecimal.
    """

    identity: Identity
    digest: str


class WeightFiles:
    """The files of one checkpoint, each opened when it is first read and kept open until `close`.

    Several threads may read at once. A file that is no longer the one that was seen is not read.
    """

    def __init__(self, location: str, root: Path, seen: Mapping[str, Seen], look: Callable[[Path], Seen]) -> None:
        """Opens nothing yet.

        Args:
            location: What the checkpoint is called.
            root: The directory that the files are in.
            seen: What was seen of each file, by its name under `root`.
            look: Sees a file again.
        """
        self._location = location
        self._root = root
        self._seen = seen
        self._look = look
        self._sources: dict[str, ByteSource] = {}
        self._closed = False
        self._lock = threading.Lock()

    def read(self, file: str, tensor: str, view: memoryview, offset: int, until: int) -> None:
        """Fills `view` with bytes of a tensor.

        Args:
            file: The file's name.
            tensor: The tensor's name, for sentences.
            view: Writable flat bytes.
            offset: The first byte wanted, from the start of the file.
            until: Where reading in order may go on to; see `ByteSource.read_into`.

        Raises:
            M3Error: The file has changed or ends early, or the operating system fails.
            ValueError: The checkpoint is closed.
        """
        if not len(view):
            return
        path = self._root / file
        source = self._source(file)
        try:
            done = source.read_into(view, offset, until)
        except OSError as error:
            raise M3Error(f"tensor {tensor!r} in {path} cannot be read: {error.strerror}; check the disk.") from error
        if done < len(view):
            raise M3Error(
                f"{path} ends inside tensor {tensor!r}, {len(view) - done:,} bytes early: it was cut while"
                " it was open, so get it again from its source."
            )

    def _source(self, file: str) -> ByteSource:
        with self._lock:
            if self._closed:
                raise ValueError(f"{self._location} is closed")
            if file not in self._sources:
                path = self._root / file
                source = open_source(path)
                if source.identity != self._seen[file].identity:
                    source.close()
                    raise changed(path)
                self._sources[file] = source
            return self._sources[file]

    @property
    def sequential(self) -> bool:
        """Whether they are asked for ahead of reading; see `Sequential`."""
        return isinstance(self._root, RemotePath)

    def paths(self) -> tuple[Path, ...]:
        """The files, in the order given."""
        return tuple(self._root / file for file in self._seen)

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the files look like now, by name.

        Raises:
            M3Error: A file is gone or cannot be read.
        """
        return {file: self._fingerprint_of(file) for file in self._seen}

    def _fingerprint_of(self, file: str) -> FileFingerprint:
        path, seen = self._root / file, self._seen[file]
        if not isinstance(path, RemotePath):
            (inode, size, mtime_ns, ctime_ns), digest = self._look(path)
            return LocalFingerprint(
                size=size, mtime_ns=mtime_ns, header_blake3=digest, inode=int(inode), ctime_ns=ctime_ns
            )
        # A remote one that is still the one that was seen is not read again.
        (tag, size, mtime_ns, _), digest = seen if path.identity() == seen.identity else self._look(path)
        return RemoteFingerprint(size=size, mtime_ns=mtime_ns, header_blake3=digest, tag=str(tag))

    def close(self) -> None:
        """Releases the open files; reading afterwards is an error."""
        with self._lock:
            self._closed = True
            while self._sources:
                self._sources.popitem()[1].close()
