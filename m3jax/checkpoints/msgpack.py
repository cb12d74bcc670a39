"""The msgpack checkpoints of Flax, read byte range by byte range.

Files are those of `flax.serialization` (`to_bytes`, `msgpack_serialize`), of `flax.training.checkpoints`
(`checkpoint_123`), and `flax_model.msgpack` as transformers 4 wrote it, in one file or in several with an index.
"""

import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from m3jax.checkpoints.msgpack_tree import Place, Structure, read_structure
from m3jax.checkpoints.msgpack_writer import INDEX_FILE, SINGLE_FILE, write_msgpack
from m3jax.checkpoints.protocol import Checkpoint, FileFingerprint, TensorInfo, natural_key
from m3jax.checkpoints.remote import RemotePath, as_path, changed
from m3jax.checkpoints.safetensors import RemoteFingerprint, _read_index
from m3jax.checkpoints.storage import Source, is_dir, is_file, list_names, open_source
from m3jax.errors import M3Error

__all__ = ["MsgpackCheckpoint", "open_msgpack", "write_msgpack"]


class MsgpackCheckpoint:
    """One or several msgpack files of Flax as one checkpoint; made by `open_msgpack`.

    Attributes:
        location: The path that was opened.
        tensors: Every array by its path joined with ".", in natural order.
        metadata: Numbers and short texts among the arrays, such as a step count, the first file first.
    """

    def __init__(self, location: str, root: Path, structures: Mapping[str, Structure]) -> None:
        """Joins files whose structure is known.

        Args:
            location: What the checkpoint is called.
            root: The directory that the files are in.
            structures: Of each file, by its name under `root`.

        Raises:
            M3Error: Two arrays have one name.
        """
        self._places: dict[str, tuple[str, Place]] = {}
        for file, structure in structures.items():
            for keys, place in structure.arrays.items():
                name = ".".join(keys)
                if name in self._places:
                    raise M3Error(
                        f"{root / file} has a second tensor of the name {name!r}: rename one, as names are"
                        ' the keys joined by ".".'
                    )
                self._places[name] = file, place
        self.location = location
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: _info(name, self._places[name][1]) for name in sorted(self._places, key=natural_key)}
        )
        told = [structure.metadata for structure in reversed(list(structures.values()))]
        self.metadata: Mapping[str, str] = MappingProxyType({key: text for one in told for key, text in one.items()})
        self._root = root
        self._structures = structures
        self._sources: dict[str, Source] = {}
        self._closed = False
        self._lock = threading.Lock()

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the tensor's little-endian bytes from `start` on; see `Checkpoint.read_into`."""
        if name not in self.tensors:
            raise M3Error(f"{self.location} has no tensor {name!r}: check the name.")
        view = (out.data if isinstance(out, np.ndarray) else out).cast("B") if out.nbytes else memoryview(b"")
        if start < 0 or start + len(view) > self.tensors[name].nbytes:
            raise ValueError(f"bytes {start} to {start + len(view)} are not all inside {self.tensors[name]}")
        file, place = self._places[name]
        for offset, size in place.spans:
            if not len(view):
                return
            wanted = view[: max(0, size - start)]
            self._read(file, name, offset + start, wanted, offset + size)
            start = max(0, start - size)
            view = view[len(wanted) :]

    def _read(self, file: str, name: str, offset: int, view: memoryview, until: int) -> None:
        if not len(view):
            return
        path = self._root / file
        source = self._source(file)
        try:
            done = source.read_into(view, offset, until)
        except OSError as error:
            raise M3Error(f"tensor {name!r} in {path} cannot be read: {error.strerror}; check the disk.") from error
        if done < len(view):
            raise M3Error(
                f"{path} ends inside tensor {name!r}, {len(view) - done:,} bytes early: it was cut while"
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
                if source.identity != self._structures[file].identity:
                    source.close()
                    raise changed(path)
                self._sources[file] = source
            return self._sources[file]

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(self._root / file for file in self._structures)

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the files look like now, by name; everything but the arrays' values counts as header."""
        return {file: _fingerprint(self._root / file, found) for file, found in self._structures.items()}

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


def _info(name: str, place: Place) -> TensorInfo:
    return TensorInfo(name, place.shape, place.dtype)


def _fingerprint(path: Path, known: Structure) -> FileFingerprint:
    """What a file looks like now; a remote one that is still the one that was opened is not read again."""
    remote = isinstance(path, RemotePath)
    now = known if isinstance(path, RemotePath) and path.identity() == known.identity else read_structure(path)
    tag, size, mtime_ns = now.identity
    found: FileFingerprint = {"size": size, "mtime_ns": mtime_ns, "header_blake3": now.digest}
    return RemoteFingerprint(**found, tag=str(tag)) if remote else found


def open_msgpack(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the msgpack weights of Flax at a path; reads their structure only.

    Arrays and numpy scalars are tensors, named by their keys joined with "." (entries of lists count as keys "0",
    "1", …). Numbers, truth values and short texts are found in `metadata`; other leaves are left out.

    Args:
        path: A msgpack file of any name, an index, or a directory, where `flax_model.msgpack` is taken, else the
            files that `flax_model.msgpack.index.json` lists, else the only `*.msgpack` file, else the
            `checkpoint_…` file with the highest number.

    Returns:
        The checkpoint; use it as a context manager.

    Raises:
        M3Error: There are no such weights, or a file is damaged or does not agree with the index.

    Example:
        >>> import tempfile
        >>> from flax.serialization import to_bytes
        >>> path = Path(tempfile.mkdtemp()) / "flax_model.msgpack"
        >>> _ = path.write_bytes(to_bytes({"dense": {"kernel": np.ones((2, 3), np.float32)}, "step": 7}))
        >>> with open_msgpack(path) as checkpoint:
        ...     print(checkpoint.tensors["dense.kernel"], dict(checkpoint.metadata))
        TensorInfo(name='dense.kernel', shape=(2, 3), dtype='F32') {'step': '7'}
    """
    source = as_path(path)
    index = _find_index(source)
    if index is None:
        root, file = (source, _choose(source)) if is_dir(source) else (source.parent, source.name)
        return MsgpackCheckpoint(str(path), root, {file: read_structure(root / file)})
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()), key=natural_key)
    for file in files:
        if not is_file(index.parent / file):
            raise M3Error(f"{index} names {file!r}, which is not there: download the model again.")
    structures = {file: read_structure(index.parent / file) for file in files}
    _check_index(index, weight_map, structures)
    return MsgpackCheckpoint(str(path), index.parent, structures)


def _find_index(source: Path) -> Path | None:
    """The index to follow, if it is an index that says where the weights are."""
    if source.name.endswith(".index.json"):
        return source
    has_index = is_file(source / INDEX_FILE) and not is_file(source / SINGLE_FILE)
    return source / INDEX_FILE if has_index else None


def _check_index(index: Path, weight_map: Mapping[str, str], structures: Mapping[str, Structure]) -> None:
    """Checks that files hold the arrays that the index places in them, and no others."""
    holders = {"/".join(keys): file for file, structure in structures.items() for keys in structure.arrays}
    for name in sorted(holders.keys() | weight_map.keys(), key=natural_key):
        if holders.get(name) != weight_map.get(name):
            placed, found = (repr(where.get(name, "no file")) for where in (weight_map, holders))
            raise M3Error(
                f"{index} places tensor {name!r} in {placed}, but it is in {found}: the two are not of one"
                " model, so download it again."
            )


def _choose(directory: Path) -> str:
    """The file of a directory that has no index to follow."""
    names = sorted((name for name in list_names(directory) if not name.startswith(".")), key=natural_key)
    if SINGLE_FILE in names:
        return SINGLE_FILE
    files = [name for name in names if name.endswith(".msgpack")]
    if len(files) > 1:
        raise M3Error(
            f"{directory} holds {len(files)} .msgpack files and no {INDEX_FILE} that joins them: give one file's path"
            " or download the index."
        )
    return files[0] if files else _latest(directory, names)


def _latest(directory: Path, names: Sequence[str]) -> str:
    """The last checkpoint of `flax.training.checkpoints`; those that are directories are Orbax's."""
    steps = [name for name in names if re.fullmatch(r"checkpoint_[0-9.]+", name) and is_file(directory / name)]
    if not steps:
        raise M3Error(f"{directory} holds no {SINGLE_FILE} and no checkpoint_… file of Flax: give the one that does.")
    return steps[-1]
