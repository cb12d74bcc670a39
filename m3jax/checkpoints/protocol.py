"""What every checkpoint reader offers: named tensors, read by byte range."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, TypedDict, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from m3jax.errors import M3Error

BytesLike: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[Any]

# Sub-byte types (F4, F6_E2M3, F6_E3M2) are absent: their entries have no byte address of their own.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "I16": np.dtype(np.int16),
        "U16": np.dtype(np.uint16),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "I32": np.dtype(np.int32),
        "U32": np.dtype(np.uint32),
        "F32": np.dtype(np.float32),
        "C64": np.dtype(np.complex64),
        "F64": np.dtype(np.float64),
        "I64": np.dtype(np.int64),
        "U64": np.dtype(np.uint64),
    }
)
"""The numpy dtype of each safetensors dtype name."""

DTYPE_NAMES: Mapping[str, str] = MappingProxyType({dtype.name: name for name, dtype in DTYPES.items()})
"""The safetensors dtype name of each numpy dtype's name."""


class TensorInfo(NamedTuple):
    """What a checkpoint says of one tensor, without its values.

    Attributes:
        name: The tensor's name, its key in the checkpoint.
        shape: Its dimensions; `()` is a scalar.
        dtype: Its safetensors dtype name, a key of `DTYPES`.

    Example:
        >>> TensorInfo("lm_head.weight", (32000, 4096), "BF16").nbytes
        262144000
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes that the entries take."""
        return self.size * DTYPES[self.dtype].itemsize


class FileFingerprint(TypedDict):
    """What is cheap to know of a weight file and changes when the file does.

    Attributes:
        size: Bytes in the file.
        mtime_ns: Time of last modification, in nanoseconds.
        header_blake3: BLAKE3 of the file's header, hexadecimal.
    """

    size: int
    mtime_ns: int
    header_blake3: str


class LocalFingerprint(FileFingerprint):
    """What is cheap to know of a file on this disk.

    Attributes:
        inode: Its number, which tells a file from another that took its name.
        ctime_ns: Time of the last change of content, name or mode, in nanoseconds, which nobody can set back.
    """

    inode: int
    ctime_ns: int


class RemoteFingerprint(FileFingerprint):
    """What is cheap to know of a remote file.

    Attributes:
        tag: Its ETag or generation, which tells what a time in whole seconds does not.
    """

    tag: str


def without_ctime(told: Mapping[str, FileFingerprint]) -> dict[str, dict[str, Any]]:
    """What tells files from what they are once their bytes have changed: all but ctime, which links and modes change.

    Args:
        told: Of `Checkpoint.fingerprint`.
    """
    return {file: {key: value for key, value in seen.items() if key != "ctime_ns"} for file, seen in told.items()}


@runtime_checkable
class Checkpoint(Protocol):
    """Named tensors that can be read by byte range, from several threads at once."""

    @property
    def location(self) -> str:
        """Where the checkpoint is, as a person would name it."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, in the natural order of names (`layers.2` before `layers.10`)."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts that the files carry beside their tensors."""

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the tensor's little-endian bytes from `start` on.

        Args:
            name: The tensor.
            start: First byte wanted, counted from the tensor's own first byte.
            out: Writable contiguous memory; its length says how many bytes are wanted.

        Raises:
            M3Error: The tensor is absent, its file ends early, or the operating system fails.
            ValueError: The range is not inside the tensor, or the checkpoint is closed.
        """

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the weight files look like now, by file name: compare two to notice a change.

        Raises:
            M3Error: A file is gone or cannot be read.
        """

    def close(self) -> None:
        """Releases the open files; reading afterwards is an error."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def check_unchanged(checkpoint: Checkpoint, before: Mapping[str, FileFingerprint], again: str) -> None:
    """Raise M3Error if weight files are not what they were; a link or a mode may have changed.

    Args:
        checkpoint: What was read.
        before: What `Checkpoint.fingerprint` told when reading began.
        again: What was done, and is to be done again: "compared: compare".
    """
    if without_ctime(checkpoint.fingerprint()) != without_ctime(before):
        raise M3Error(f"{checkpoint.location}: changed while it was {again} again once it is at rest")


@runtime_checkable
class Sequential(Protocol):
    """What a checkpoint offers that is best read from one end to the other."""

    @property
    def sequential(self) -> bool:
        """Whether it keeps much that it has made, or asks ahead for much, which tensors read by turns cost anew."""


def is_sequential(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is best read from one end to the other, and not in several places by turns.

    Args:
        checkpoint: A view, or a checkpoint that is none.
    """
    return isinstance(checkpoint, Sequential) and checkpoint.sequential


class Closing(ABC):
    """What closes itself when its `with` block is left."""

    @abstractmethod
    def close(self) -> None:
        """Releases what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def room_for(checkpoint: Checkpoint, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> memoryview:
    """The memory that `Checkpoint.read_into` fills, once it is known that there is what is wanted.

    Args:
        checkpoint: What is read from.
        name: The tensor.
        start: First byte wanted, counted from the tensor's own first byte.
        out: Writable contiguous memory.

    Returns:
        The same memory as flat bytes.

    Raises:
        M3Error: There is no such tensor.
        ValueError: The range is not inside it.
    """
    if name not in checkpoint.tensors:
        raise M3Error(f"{checkpoint.location} has no tensor {name!r}: check the name.")
    info, stop = checkpoint.tensors[name], start + out.nbytes
    if start < 0 or stop > info.nbytes:
        raise ValueError(f"bytes {start} to {stop} are not all inside {info}")
    return _flat(out.data if isinstance(out, np.ndarray) else out)


def in_natural_order(tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The same tensors as `Checkpoint.tensors` has them, for reading only."""
    return MappingProxyType({name: tensors[name] for name in sorted(tensors, key=natural_key)})


def natural_key(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """Sort key under which numbers inside names count as numbers.

    Args:
        name: Any text.

    Returns:
        A key that orders `layers.2` before `layers.10`, and tells every two names apart.

    Example:
        >>> sorted(["layers.10", "layers.2", "embed"], key=natural_key)
        ['embed', 'layers.2', 'layers.10']
    """
    parts = re.split("([0-9]+)", name)
    # (length, digits) orders like the number without converting it, so that no run of digits is too long.
    numbers = [part.lstrip("0") for part in parts[1::2]]
    key = [(0, part) for part in parts]
    key[1::2] = [(len(number), number) for number in numbers]
    return tuple(key), name


def as_bytes(data: BytesLike) -> memoryview:
    """The little-endian bytes of `data` in row-major order, copied only where they must be.

    Args:
        data: An array of any dtype, layout and byte order, or contiguous memory.

    Returns:
        A flat view of unsigned bytes.

    Example:
        >>> bytes(as_bytes(np.array([[1, 2], [3, 4]], ">u2").T))
        b'\\x01\\x00\\x03\\x00\\x02\\x00\\x04\\x00'
    """
    if isinstance(data, np.ndarray):
        rows = np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("<"))
        return rows.reshape(-1).view(np.uint8).data
    return _flat(memoryview(data))


def _flat(view: memoryview) -> memoryview:
    # `cast` refuses memory with a zero in its shape.
    return view.cast("B") if view.nbytes else memoryview(b"")
