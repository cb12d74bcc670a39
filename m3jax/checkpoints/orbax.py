"""Orbax checkpoints, read byte range by byte range.

TensorStore reads the arrays, as it does for Orbax. Orbax's own handlers restore whole arrays, or boxes of them onto
devices, and import JAX; here ranges of bytes are read, and `inspect` and `convert` start without JAX.
"""

import os
import resource
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from reprlib import repr as brief
from types import MappingProxyType
from typing import Any, TypeAlias
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from m3jax.checkpoints.headers import damaged
from m3jax.checkpoints.key_values import context, open_array, unusable
from m3jax.checkpoints.orbax_template import Template, has_database
from m3jax.checkpoints.orbax_tree import (
    AGGREGATE,
    MANIFEST,
    TREE,
    Tree,
    find_item,
    is_orbax,
    key_value_spec,
    open_aggregate,
    part_name,
    read_tree,
    remembered,
)
from m3jax.checkpoints.orbax_writer import write_orbax
from m3jax.checkpoints.protocol import (
    DTYPE_NAMES,
    DTYPES,
    Checkpoint,
    Closing,
    FileFingerprint,
    LocalFingerprint,
    RemoteFingerprint,
    TensorInfo,
    as_bytes,
    in_natural_order,
    room_for,
)
from m3jax.checkpoints.remote import Identity, RemotePath
from m3jax.checkpoints.storage import is_dir, is_file, unreadable
from m3jax.errors import M3Error, mend
from m3jax.text import size_text

__all__ = ["OrbaxCheckpoint", "is_orbax", "open_orbax", "write_orbax"]

_CACHE = 64 << 20  # bytes of decoded chunks that all open checkpoints together keep beside those in use
_PIECE = 16 << 20  # bytes asked for at a time
_IN_FLIGHT = 4  # pieces asked for before the first has come
_BANDS = 128 << 20  # bytes of chunks in use that all open checkpoints together hold in memory; beyond, on the disk
_HEAD = 1024  # bytes of a file that its fingerprint looks at

Box: TypeAlias = tuple[slice, ...]


def _open_store(item: Path, tree: Tree, name: str, shared: Any) -> Any:
    """A future of TensorStore's handle of an array."""
    spec = {
        "driver": tree.stored[name],
        "kvstore": key_value_spec(item, name),
        "fill_missing_data_reads": not tree.complete,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }
    return open_array(spec, name, item, shared)


def _check_memory(what: str, size: int) -> None:
    """Raise M3Error where a chunk cannot be in memory: TensorStore ends the process when it finds none."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    most = there if allowed == resource.RLIM_INFINITY else min(there, allowed // 2)  # much of it is taken
    if size > most:
        raise M3Error(f"{what} has chunks of {size_text(size)}, which memory does not hold: save it in smaller ones.")


def _band(shape: Sequence[int], chunk: Sequence[int]) -> int:
    """Entries of the chunks that are in use at a time when an array is read from its first entry to its last."""
    first = _first_axis(chunk)
    return prod(chunk[: first + 1]) * prod(shape[first + 1 :])


def _first_axis(chunk: Sequence[int]) -> int:
    """The first axis along which a chunk has more than one entry."""
    return next((axis for axis, size in enumerate(chunk) if size > 1), len(chunk))


def band_at(shape: Sequence[int], chunk: Sequence[int], entry: int) -> tuple[int, int, Box]:
    """The chunks that are in use when an entry of an array is read: its first entry, the one after its last, its box.

    Args:
        shape: Of the array.
        chunk: The shape of its chunks.
        entry: In row-major order.

    Example:
        >>> start, stop, box = band_at((2, 5, 3), (1, 2, 2), 14)
        >>> (start, stop), [(s.start, s.stop) for s in box]
        ((12, 15), [(0, 1), (4, 5), (0, 3)])
    """
    first = _first_axis(chunk)
    if first == len(chunk):
        places = np.unravel_index(entry, tuple(shape))
        return entry, entry + 1, tuple(slice(int(at), int(at) + 1) for at in places)
    inner = prod(shape[first + 1 :])
    row, inside = divmod(entry, shape[first] * inner)
    begin = inside // (chunk[first] * inner) * chunk[first]
    end = min(begin + chunk[first], shape[first])
    leading = np.unravel_index(row, tuple(shape[:first])) if first else ()
    box = (*(slice(int(at), int(at) + 1) for at in leading), slice(begin, end), *map(slice, shape[first + 1 :]))
    start = row * shape[first] * inner
    return start + begin * inner, start + end * inner, tuple(slice(s.start or 0, s.stop) for s in box)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The few boxes that hold a range of an array's entries in row-major order, in that order.

    TensorStore has no flat view of an array, so that a range has to be cut into boxes here.

    Args:
        shape: Of the array, which has entries.
        start: First entry of the range.
        stop: The one after its last.

    Yields:
        A slice for every axis; a box's entries follow each other in the array.

    Example:
        >>> [[(s.start, s.stop) for s in box] for box in boxes((3, 4), 2, 9)]
        [[(0, 1), (2, 4)], [(1, 2), (0, 4)], [(2, 3), (0, 1)]]
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        whole = 0 if inside else (stop - start) // row
        if whole:
            yield (slice(index, index + whole), *(slice(0, size) for size in shape[1:]))
            start += whole * row
        else:
            end = min(stop, (index + 1) * row)
            for box in boxes(shape[1:], inside, end - index * row):
                yield (slice(index, index + 1), *box)
            start = end


def _of_file(path: Path) -> LocalFingerprint:
    """What a file of this disk looks like now."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            head = blake3(file.read(_HEAD)).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
    return LocalFingerprint(
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        header_blake3=head,
        inode=status.st_ino,
        ctime_ns=status.st_ctime_ns,
    )


def _of_object(told: Identity) -> RemoteFingerprint:
    """What an object looks like now: its tag stands for its first bytes, for which each would have to be asked."""
    tag = str(told.tag)
    return RemoteFingerprint(
        size=told.size, mtime_ns=told.mtime_ns, header_blake3=blake3(tag.encode()).hexdigest(), tag=tag
    )


_DECODING = threading.Lock()  # held by the one checkpoint whose decoded chunks are in memory


class _Spill:
    """The decoded chunks that are in use of a checkpoint, in a file without a name."""

    def __init__(self, item: Path) -> None:
        self._item = item
        self._file = tempfile.TemporaryFile(prefix="m3jax-")  # noqa: SIM115  # closed by `close`
        self._held: tuple[str, int, int] = ("", 0, 0)  # an array, and the first and last of its entries
        self._lock = threading.Lock()

    def pieces(self, store: Any, info: TensorInfo, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes of a range of an array's entries, in order."""
        width = DTYPES[info.dtype].itemsize
        chunk = store.chunk_layout.read_chunk.shape or info.shape
        while start < stop:
            with self._lock:
                name, first, last = self._held
                if name != info.name or not first <= start < last:
                    first, last, box = band_at(info.shape, chunk, start)
                    self._decode(store, box)
                    self._held = info.name, first, last
                count = min(stop, last, start + _PIECE // width) - start
                piece = os.pread(self._file.fileno(), count * width, (start - first) * width)
            yield memoryview(piece)
            start += count

    def _decode(self, store: Any, box: Box) -> None:
        self._held = ("", 0, 0)
        with _DECODING:
            decoded = as_bytes(store[box].read(order="C").result())
            try:
                self._file.seek(0)
                self._file.write(decoded)
                self._file.flush()
            except OSError as error:
                raise M3Error(
                    f"decoded chunks of {self._item} cannot be kept in {tempfile.gettempdir()}: {error.strerror}; "
                    f"{mend(error)}, or set TMPDIR."
                ) from error

    def close(self) -> None:
        self._file.close()


_OPEN: "WeakSet[OrbaxCheckpoint]" = WeakSet()


class OrbaxCheckpoint(Closing):
    """The arrays of one item of Orbax; made by `open_orbax`.

    Memory holds the decoded chunks in use, however small the pieces that are read: what the array with the largest
    chunks needs, and a share of 64 MiB that all open checkpoints have together. By default, Orbax makes a chunk as
    large as a device's shard of an array. Where all open checkpoints together would need more than 128 MiB, as the many
    steps of a run do, decoded chunks wait in a temporary file of each, and memory holds those of one.

    Attributes:
        location: The path that was opened.
        tensors: Every array by its path joined with ".", in natural order.
        metadata: The texts of the tree's custom metadata.
        item: The directory of the arrays.
    """

    def __init__(self, location: str, item: Path) -> None:
        """Opens every array, to learn its shape; reads no values.

        Args:
            location: What the checkpoint is called.
            item: The directory of the arrays.

        Raises:
            M3Error: An array is missing, damaged, or of a dtype that cannot be read here.
        """
        self.location = location
        self.item = item = remembered(item)
        self._tree = read_tree(item)
        self._aggregate = open_aggregate(item) if self._tree.packed else None
        database = is_file(item / MANIFEST)
        self._arrays = frozenset() if database else frozenset(name.split("/")[0] for name in self._tree.stored)
        tensors, self._band = self._describe()
        self.tensors = in_natural_order(tensors)
        self.metadata: Mapping[str, str] = MappingProxyType(self._tree.metadata)
        self._context: Any = None  # made when the first array is read, as by then it is known how many share the cache
        self._spill: _Spill | None = None
        self._stores: dict[str, Any] = {}
        self._closed = False
        self._lock = threading.Lock()
        _OPEN.add(self)

    def _describe(self) -> tuple[dict[str, TensorInfo], int]:
        """Every array's description, and the bytes of the largest chunks that are in use at a time."""
        packed = self._aggregate.tensors if self._aggregate else {}
        missing = [name for name, is_array in self._tree.packed.items() if is_array and name not in packed]
        if missing:
            raise damaged(f"array {missing[0]!r} is not in {self.item / AGGREGATE}, where {TREE} places it")
        tensors = {name: packed[name] for name in self._tree.packed if name in packed}
        shared = context()
        opening = {name: _open_store(self.item, self._tree, name, shared) for name in self._tree.stored}
        largest = 0
        for name, future in opening.items():
            try:
                store = future.result()
            except Exception as error:  # of many types
                raise unusable(f"array {name!r}", self.item, error) from error
            dtype = store.dtype.name
            if dtype not in DTYPE_NAMES:
                raise M3Error(f"array {name!r} in {self.item} has the dtype {brief(dtype)}: convert it first.")
            tensors[name] = TensorInfo(name, tuple(store.shape), DTYPE_NAMES[dtype])
            chunk = store.chunk_layout.read_chunk.shape or ()
            _check_memory(f"array {name!r} in {self.item}", prod(chunk) * DTYPES[tensors[name].dtype].itemsize)
            band = _band(store.shape, chunk)
            largest = max(largest, band * DTYPES[tensors[name].dtype].itemsize)
        return tensors, largest

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the tensor's little-endian bytes from `start` on; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        info, size = self.tensors[name], len(view)
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.location} is closed")
        if not size:
            return
        if self._aggregate is not None and name not in self._tree.stored:
            self._aggregate.read_into(name, start, view)
            return
        width = DTYPES[info.dtype].itemsize
        first = start // width
        at = first * width - start  # where the next entry's bytes go: before `out` if the range splits an entry
        try:
            for raw in self._pieces(info, first, -(-(start + size) // width)):
                wanted = raw[max(0, -at) : size - at]
                view[max(0, at) : max(0, at) + len(wanted)] = wanted
                at += len(raw)
        except M3Error:
            raise
        except Exception as error:  # of many types
            raise unusable(f"array {name!r}", self.item, error) from error

    def _pieces(self, info: TensorInfo, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes of a range of an array's entries, in order."""
        store = self._store(info.name)
        if self._spill is not None:
            yield from self._spill.pieces(store, info, start, stop)
            return
        step = max(1, _PIECE // DTYPES[info.dtype].itemsize)
        reading: deque[Any] = deque()
        for begin in range(start, stop, step):
            for box in boxes(info.shape, begin, min(begin + step, stop)):
                reading.append(store[box].read(order="C"))
                if len(reading) > _IN_FLIGHT:
                    yield as_bytes(reading.popleft().result())
        for future in reading:
            yield as_bytes(future.result())

    def _store(self, name: str) -> Any:
        """The open handle of an array."""
        with self._lock:
            if self._context is None:
                spills = sum(each._band for each in _OPEN) > _BANDS
                self._spill = _Spill(self.item) if spills else None
                self._context = context(0 if spills else self._band + _CACHE // max(1, len(_OPEN)))
            if name not in self._stores:
                self._stores[name] = _open_store(self.item, self._tree, name, self._context).result()
            return self._stores[name]

    @property
    def sequential(self) -> bool:
        """Whether decoded chunks are kept while they are in use, as they always are; see `Sequential`."""
        return True

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        if isinstance(self.item, RemotePath):
            return tuple(self.item / name for name in self._objects())
        found = (path for top in self.item.glob("*") for path in (top.rglob("*") if is_dir(top) else [top]))
        names = (path.relative_to(self.item).as_posix() for path in found if is_file(path))
        return tuple(self.item / name for name in sorted(filter(self._holds_weights, names)))

    def _holds_weights(self, name: str) -> bool:
        """Whether a file of the item, by its name there, is one of those that hold the weights."""
        top = name.partition("/")[0]
        if top in (TREE, MANIFEST, AGGREGATE, "d") or top.startswith("ocdbt"):  # the last two hold a database's data
            return True
        return top in self._arrays

    def _objects(self) -> dict[str, Identity]:
        """The objects that hold the weights, as they are now."""
        assert isinstance(self.item, RemotePath)
        return {name: told for name, told in self.item.objects().items() if self._holds_weights(name)}

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the files look like now, by name under the item's directory; a file's first KB counts as its header."""
        fingerprints: dict[str, FileFingerprint] = (
            {name: _of_object(told) for name, told in self._objects().items()}
            if isinstance(self.item, RemotePath)
            else {path.relative_to(self.item).as_posix(): _of_file(path) for path in self.files()}
        )
        if not fingerprints:
            raise M3Error(f"{self.item} has gone since it was opened: start again.")
        return fingerprints

    def close(self) -> None:
        """Releases the open arrays; reading afterwards is an error."""
        with self._lock:
            self._closed = True
            self._stores.clear()
            _OPEN.discard(self)
            if self._spill is not None:
                self._spill.close()
        if self._aggregate is not None:
            self._aggregate.close()


def open_part(item: Path, number: int, template: Template | None) -> Checkpoint:
    """Opens the arrays of a part of an item that `write_part` wrote, which may be beside those of others.

    Args:
        item: The directory of the item.
        number: Of the part.
        template: Of the item.

    Raises:
        M3Error: It is missing or damaged.
    """
    place = item / part_name(number) if has_database(template) else item
    if not is_dir(place):
        raise M3Error(f"{place} is missing: start again.")
    return OrbaxCheckpoint(str(place), place)


def open_orbax(path: Path) -> Checkpoint:
    """Opens the arrays of an Orbax checkpoint; reads their descriptions only.

    Names are the keys of the tree joined with ".". Numbers that were saved are arrays without dimensions, a PRNG key
    is its raw `uint32`; texts, `None` and empty containers are left out.

    Args:
        path: A directory that `StandardCheckpointer`, `PyTreeCheckpointer`, `orbax.checkpoint.v1` or the Orbax
            backend of `flax.training.checkpoints` wrote; a step of a `CheckpointManager`; or the directory of its
            steps, or of a run that keeps them in `checkpoints`, of which the last finished step is read.

    Returns:
        The checkpoint; use it as a context manager.

    Raises:
        M3Error: There is no such checkpoint, several are there, or it is damaged or not finished.
    """
    return OrbaxCheckpoint(str(path), find_item(path))
