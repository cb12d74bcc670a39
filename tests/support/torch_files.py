"""Files as `torch.save` makes them, written by hand: archives, and pickles put together from their parts."""

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3jax.checkpoints.protocol import DTYPE_NAMES, as_bytes, natural_key

# --- Archives ---------------------------------------------------------------------------------------------------

_SIZE_FOLLOWS = 0x8
_LARGE = 2**32 - 1


class Entry(NamedTuple):
    """One entry of an archive.

    Attributes:
        name: Its name below the archive's directory.
        content: Its bytes; a number for a hole of so many zeros.
        method: How it says that it is packed.
        flags: What else it says.
    """

    name: str
    content: bytes | int
    method: int = 0
    flags: int = _SIZE_FOLLOWS


def write_archive(path: Path, entries: Iterable[Entry], root: str = "archive", wide: bool = False) -> Path:
    """An archive with each entry's bytes at a multiple of 64, as PyTorch places them.

    Args:
        path: The file.
        entries: What is in it.
        root: The archive's directory.
        wide: Whether all numbers are written with 64 bits; those that need it are in any case.
    """
    listed = []
    with open(path, "wb") as file:
        for entry in entries:
            name, start = f"{root}/{entry.name}".encode(), file.tell()
            pad = -(start + 34 + len(name)) % 64
            extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
            file.write(
                b"PK\3\4" + struct.pack("<5H3I2H", 0, entry.flags, entry.method, 0, 0, 0, 0, 0, len(name), 4 + pad)
            )
            file.write(name + extra)
            size = entry.content if isinstance(entry.content, int) else len(entry.content)
            check = 0 if isinstance(entry.content, int) else zlib.crc32(entry.content)
            if isinstance(entry.content, int):
                file.seek(size, 1)
            else:
                file.write(entry.content)
            large = wide or size >= _LARGE
            file.write(b"PK\7\x08" + struct.pack("<IQQ" if large else "<III", check, size, size))
            listed.append((entry, name, start, size, check))
        at = file.tell()
        for entry, name, start, size, check in listed:
            large = wide or max(size, start) >= _LARGE
            extra = struct.pack("<2H3Q", 1, 24, size, size, start) if large else b""
            told = [_LARGE] * 3 if large else [size, size, start]
            numbers = [
                0,
                0,
                entry.flags,
                entry.method,
                0,
                0,
                check,
                *told[:2],
                len(name),
                len(extra),
                0,
                0,
                0,
                0,
                told[2],
            ]
            file.write(b"PK\1\2" + struct.pack("<6H3I5H2I", *numbers) + name + extra)
        length, count = file.tell() - at, len(listed)
        if wide or at >= _LARGE:
            file.write(b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, count, count, length, at))
            file.write(b"PK\6\7" + struct.pack("<IQI", 0, at + length, 1))
            length = at = _LARGE
        file.write(b"PK\5\6" + struct.pack("<4H2IH", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), length, at, 0))
    return path


# --- Pickles ----------------------------------------------------------------------------------------------------

STORAGES = {
    **{"F32": "FloatStorage", "F64": "DoubleStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"},
    **{"I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage"},
    **{"BOOL": "BoolStorage", "C64": "ComplexFloatStorage"},
}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def several(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def numbers(values: Iterable[int]) -> bytes:
    return several(*map(number, values))


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def called(dotted: str, *values: bytes) -> bytes:
    return name(dotted) + several(*values) + b"R"


ORDERED = called("collections.OrderedDict")


def mapping(entries: Mapping[str, bytes], empty: bytes = ORDERED) -> bytes:
    return empty + b"(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def storage(key: str, kind: str, count: int) -> bytes:
    return several(text("storage"), name(kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(held: bytes, offset: int, shape: Iterable[int], strides: Iterable[int], *more: bytes) -> bytes:
    values = (held, number(offset), numbers(shape), numbers(strides), b"\x89", ORDERED, *more)
    return called("torch._utils._rebuild_tensor_v2", *values)


def parameter(inner: bytes) -> bytes:
    return called("torch._utils._rebuild_parameter", inner, b"\x89", ORDERED)


def pickle(value: bytes) -> bytes:
    return b"\x80\2" + value + b"."


def stored(key: str, dtype: np.dtype, count: int, offset: int, shape: Iterable[int], strides: Iterable[int]) -> bytes:
    """A tensor of any dtype; PyTorch has storages of the older ones only, others lie in bytes."""
    kind = STORAGES.get(DTYPE_NAMES[dtype.name])
    if kind:
        return tensor(storage(key, f"torch.{kind}", count), offset, shape, strides)
    held = storage(key, "torch.storage.UntypedStorage", count * dtype.itemsize)
    values = (held, number(offset), numbers(shape), numbers(strides), b"\x89", ORDERED, name(f"torch.{dtype.name}"))
    return called("torch._utils._rebuild_tensor_v3", *values)


# --- Checkpoints ------------------------------------------------------------------------------------------------


def write_pickle(
    path: Path, value: bytes, storages: Iterable[bytes | int] = (), *more: Entry, wide: bool = False
) -> Path:
    """An archive of a pickle's value and of storages, which are called 0, 1, …."""
    entries = [Entry(f"data/{key}", content) for key, content in enumerate(storages)]
    return write_archive(path, [Entry("data.pkl", pickle(value)), *more, *entries, Entry("version", b"3\n")], wide=wide)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :], dtype=int)) for axis in range(len(shape)))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], strided: bool = False, wide: bool = False) -> Path:
    """A state dict of arrays.

    Args:
        path: The file.
        arrays: By name.
        strided: Whether arrays lie transposed, with a gap after each entry, behind three others of their storage; every
            second one is a parameter.
        wide: As in `write_archive`.
    """
    told, storages = {}, []
    for key, (named, array) in enumerate(arrays.items()):
        if strided:
            turned = np.zeros((3 + 2 * array.size,), array.dtype)
            turned[3::2] = array.T.reshape(-1)
            steps = tuple(2 * stride for stride in _strides(array.shape[::-1])[::-1])
            value = stored(str(key), array.dtype, turned.size, 3, array.shape, steps)
            told[named] = parameter(value) if key % 2 else value
            storages.append(bytes(as_bytes(turned)))
        else:
            told[named] = stored(str(key), array.dtype, array.size, 0, array.shape, _strides(array.shape))
            storages.append(bytes(as_bytes(array)))
    return write_pickle(path, mapping(told), storages, Entry("byteorder", b"little"), wide=wide)


def write_shards(directory: Path, arrays: Mapping[str, np.ndarray], count: int) -> None:
    """`pytorch_model-….bin` files and their index."""
    names = sorted(arrays, key=natural_key)
    placed = {}
    for shard in range(count):
        file = f"pytorch_model-{shard + 1:05d}-of-{count:05d}.bin"
        part = names[shard * len(names) // count : (shard + 1) * len(names) // count]
        write_arrays(directory / file, {named: arrays[named] for named in part})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())}, "weight_map": placed}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
