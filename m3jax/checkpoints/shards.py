"""Writing safetensors files of known layout, whose bytes come in any order; dividing tensors among files."""

import errno
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Self

from blake3 import blake3

from m3jax.checkpoints.formats import SAFETENSORS
from m3jax.checkpoints.protocol import DTYPES, BytesLike, TensorInfo, as_bytes
from m3jax.errors import M3Error, mend

WEIGHTS_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""The texts of weight files, where nothing else is asked for."""

_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def _encode_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of the header of a file that holds `tensors` in this order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, shape, dtype in tensors:
        end = begin + TensorInfo(name, shape, dtype).nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _layout(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Tensors in the order of their file, widest entries first: sizes are multiples of every later width, so that all
    are aligned."""
    return sorted(tensors, key=lambda info: -DTYPES[info.dtype].itemsize)


def header_digest(tensors: Sequence[TensorInfo]) -> str:
    """BLAKE3 of the header that `ShardWriter` gives a file, as fingerprints have it.

    With the digests of its tensors it tells all of a file, in which nothing else is.

    Args:
        tensors: What the file holds.
    """
    return blake3(_encode_header(_layout(tensors), WEIGHTS_METADATA)[8:]).hexdigest()


def write_outline(path: Path, tensors: Sequence[TensorInfo]) -> None:
    """A file with the header that `ShardWriter` would give it, and holes in place of tensors.

    Args:
        path: Where.
        tensors: What the file is to hold.
    """
    with open(path, "wb") as file:
        written = file.write(_encode_header(_layout(tensors), WEIGHTS_METADATA))
        file.truncate(written + sum(info.nbytes for info in tensors))


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand and whose bytes come in any order.

    The bytes go to `path` + ".tmp"; `finish` makes them `path`. Leaving the context without `finish` deletes
    them. Several threads may write at once.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with ShardWriter(path, [TensorInfo("bias", (2,), "F32")]) as shard:
        ...     shard.write("bias", 4, np.float32([2]))
        ...     shard.write("bias", 0, np.float32([1]))
        ...     shard.finish()
        >>> path.read_bytes()[-8:] == np.float32([1, 2]).tobytes()
        True
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[TensorInfo],
        metadata: Mapping[str, str] = WEIGHTS_METADATA,
    ) -> None:
        """Creates the file at its full size, so that a disk too small shows before any work is done.

        Args:
            path: The file to make; its directory exists.
            tensors: What it will hold, names all different.
            metadata: Texts for its `__metadata__`; `format: pt` is what other tools look for.

        Raises:
            M3Error: The file cannot be created or the disk is too small for it.
            ValueError: Two tensors have one name.
        """
        layout = _layout(tensors)
        self._tensors = {info.name: info for info in layout}
        if len(self._tensors) < len(layout):
            raise ValueError(f"two tensors for {path} have one name")
        header = _encode_header(layout, metadata)
        self._offsets: dict[str, int] = {}
        self._total = len(header)
        for info in layout:
            self._offsets[info.name] = self._total
            self._total += info.nbytes
        self._missing = {info.name: info.nbytes for info in layout}
        self._lock = threading.Lock()
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._descriptor: int | None = None
        self._create(header)

    def _create(self, header: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(self._temporary, flags, 0o644)
            _reserve(self._descriptor, self._total)
            write_exactly(self._descriptor, memoryview(header), 0)
        except OSError as error:
            self.abort()
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> M3Error:
        """The sentence for a file that the operating system does not let us write."""
        return M3Error(f"{self._path} cannot be written, {self._total:,} bytes: {error.strerror}; {mend(error)}.")

    def write(self, name: str, start: int, data: BytesLike) -> None:
        """Writes a piece of a tensor; every byte is to be written once.

        Args:
            name: The tensor.
            start: Where the piece goes, in bytes from the tensor's first.
            data: An array (its little-endian bytes in row-major order count) or contiguous memory.

        Raises:
            M3Error: The operating system fails.
            KeyError: The file has no such tensor.
            ValueError: The piece is not inside the tensor, or the file is finished or aborted.
        """
        piece = as_bytes(data)
        if start < 0 or start + len(piece) > self._tensors[name].nbytes:
            raise ValueError(f"bytes {start} to {start + len(piece)} are not all inside {self._tensors[name]}")
        if self._descriptor is None:
            raise ValueError(f"{self._path} is finished or aborted")
        try:
            write_exactly(self._descriptor, piece, self._offsets[name] + start)
        except OSError as error:
            raise self._unwritable(error) from error
        with self._lock:
            self._missing[name] -= len(piece)

    def finish(self) -> None:
        """Makes the file appear under its name, safely on the disk.

        Raises:
            M3Error: The operating system fails.
            ValueError: Some tensor was not written in full, or the file is finished or aborted.
        """
        if self._descriptor is None:
            raise ValueError(f"{self._path} is finished or aborted")
        for name, missing in self._missing.items():
            if missing > 0:
                raise ValueError(f"tensor {name!r} of {self._path} lacks {missing:,} bytes")
        try:
            os.fsync(self._descriptor)
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)
            os.replace(self._temporary, self._path)
            sync(self._path.parent)
        except OSError as error:
            _discard(self._temporary)
            raise self._unwritable(error) from error

    def abort(self) -> None:
        """Deletes what was written; does nothing to a file that is finished. No `write` may be under way."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)
            _discard(self._temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()


def _reserve(descriptor: int, size: int) -> None:
    """Gives an open file its full size, with room on the disk where the file system can promise it."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(descriptor, size)


def write_exactly(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, in as many writes as it takes."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _discard(temporary: Path) -> None:
    """Deletes a half-written file where that is possible; the failure that led here is the one to report."""
    with suppress(OSError):
        temporary.unlink()


def sync(path: Path) -> None:
    """Makes the bytes of a file, or the names in a directory, survive a power cut, on file systems that can.

    Raises:
        OSError: The operating system fails; it names the path.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when it is whole and safely on the disk, or not at all.

    Args:
        path: The file to make; its directory exists.

    Yields:
        The file, open for writing.

    Raises:
        OSError: The operating system fails.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        _discard(temporary)
        raise


def plan_shards(tensors: Sequence[TensorInfo], max_shard_size: int) -> list[tuple[str, list[TensorInfo]]]:
    """Divides tensors among files, in the order given, under Hugging Face's names.

    Args:
        tensors: What is to be written.
        max_shard_size: Bytes of tensors that a file may hold; a larger tensor gets a file of its own.

    Returns:
        File names with their tensors; one file is `model.safetensors`.

    Raises:
        M3Error: The limit is not positive.

    Example:
        >>> a, b = TensorInfo("a", (3,), "U8"), TensorInfo("b", (2,), "U8")
        >>> [name for name, _ in plan_shards([a, b], max_shard_size=4)]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if max_shard_size < 1:
        raise M3Error(f"the shard size {max_shard_size} is not positive: give one such as 5GB.")
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in tensors:
        if shards[-1] and filled + info.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    if len(shards) == 1:
        return [(SAFETENSORS.single_file, shards[0])]
    total = len(shards)
    return [(f"model-{k:05d}-of-{total:05d}.safetensors", shard) for k, shard in enumerate(shards, start=1)]


def write_index(directory: Path, shards: Sequence[tuple[str, Sequence[TensorInfo]]], total_size: int) -> None:
    """Writes `model.safetensors.index.json`, whole or not at all.

    Args:
        directory: The model directory.
        shards: File names with their tensors, as `plan_shards` returns them.
        total_size: Bytes of all tensors together.

    Raises:
        M3Error: The operating system fails.
    """
    weight_map = {info.name: file for file, infos in shards for info in infos}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    path = directory / SAFETENSORS.index_file
    try:
        with appearing(path) as file:
            file.write(f"{json.dumps(index, indent=2, sort_keys=True)}\n".encode())
    except OSError as error:
        raise M3Error(f"{path} cannot be written: {error.strerror}; check the place and the disk.") from error


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": base**power
    for infix, base in (("", 1000), ("I", 1024))
    for power, prefix in enumerate("KMGTP", start=1)
}


def parse_size(text: str | int) -> int:
    """Reads a number of bytes as people write it.

    Args:
        text: Such as `5GB` (decimal), `5GiB` (binary), `1.5 TB` or a plain number.

    Returns:
        Whole bytes, at least one.

    Raises:
        M3Error: The text is no such size.

    Example:
        >>> parse_size("5GB"), parse_size("2KiB"), parse_size(42)
        (5000000000, 2048, 42)
    """
    parts = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", str(text))
    size = Fraction(parts[1]) * _UNITS.get(parts[2].upper(), 0) if parts else 0
    if size < 1:
        raise M3Error(f"{text!r} is no size: write a number of bytes, or one such as 5GB, 500MB or 5GiB.")
    return int(size)
