"""Headers of safetensors files, read and checked in full before any tensor is.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). A file may be damaged, half downloaded or made to mislead.
"""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from reprlib import repr as brief  # what a file says may be long or deep without end
from typing import Any, NamedTuple, TypeGuard

from blake3 import blake3

from m3jax import documents
from m3jax.checkpoints.protocol import DTYPES, TensorInfo
from m3jax.checkpoints.remote import Identity
from m3jax.checkpoints.storage import open_source, unreadable
from m3jax.errors import M3Error

LFS_POINTER = b"version https://git-lfs"
_TEXTS = (".json", ".yaml", ".yml", ".txt", ".md")  # what people give in a model's place
_MAX_HEADER = 100_000_000  # the limit of the reference implementation


class Header(NamedTuple):
    """What one file says of itself."""

    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]  # of each tensor's first byte, from the start of the file
    metadata: dict[str, str]
    identity: Identity
    blake3: str  # of its JSON


def damaged(fault: str) -> M3Error:
    """The sentence for a file whose content is at fault."""
    return M3Error(f"{fault}: get the file again from its source.")


def not_fetched(path: Path) -> M3Error:
    """The sentence for a file that begins with `LFS_POINTER`."""
    return M3Error(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` beside it.")


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`; a key that appears twice is an error, as either value could be meant."""
    try:
        parsed = documents.parse_json(raw.decode(), unique=True)
        json.dumps(parsed, allow_nan=False)  # NaN passes the parser, but is no JSON
    except ValueError as error:
        raise damaged(f"{where} is not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise damaged(f"{where} is not a JSON object")
    return parsed


def _is_counts(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list of integers that could count something on this machine."""
    return isinstance(value, list) and all(type(entry) is int and 0 <= entry < 2**63 for entry in value)


def can_exist(shape: list[int], dtype: str) -> bool:
    """Whether numpy could make an array of this shape, which it decides zeros aside."""
    return len(shape) <= 64 and prod(size for size in shape if size) * DTYPES[dtype].itemsize < 2**63


def _parse_tensor(name: str, entry: object, path: Path) -> tuple[TensorInfo, int, int]:
    """One entry of a header, checked by itself: the tensor and the first and last offset of its bytes."""
    where = f"tensor {name!r} in {path}"
    if not isinstance(entry, dict):
        raise damaged(f"{where} is described by no JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if dtype in ("F4", "F6_E2M3", "F6_E3M2"):
            raise M3Error(f"{where} has dtype {dtype}, less than a byte an entry: dequantize the model first.")
        raise M3Error(f"{where} has the unknown dtype {brief(dtype)}: convert it to one of {', '.join(DTYPES)}.")
    if not _is_counts(shape) or not can_exist(shape, dtype):
        raise damaged(f"{where} has the impossible shape {brief(shape)}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"{where} has the impossible offsets {brief(offsets)}")
    info = TensorInfo(name, tuple(shape), dtype)
    begin, end = offsets
    if end - begin != info.nbytes:
        raise damaged(f"{where} has {end - begin:,} bytes where {dtype} of shape {shape} needs {info.nbytes:,}")
    return info, begin, end


def _check_layout(spans: Iterable[tuple[int, int, str]], available: int, path: Path) -> None:
    """Checks that the tensors fill the file's data without holes, overlaps or a missing end."""
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            fault = "overlaps the tensor before it" if begin < reached else "follows a hole"
            raise damaged(f"tensor {name!r} in {path} {fault}")
        reached = end
    if reached > available:
        raise damaged(f"{path} is cut short: its tensors need {reached:,} bytes and {available:,} are there")
    if reached < available:
        raise damaged(f"{path} has {available - reached:,} bytes after its last tensor")


def _parse_metadata(entry: object, path: Path) -> dict[str, str]:
    """The `__metadata__` of a header."""
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
        raise damaged(f"__metadata__ in {path} does not map texts to texts")
    return entry


def _parse_header(raw: bytes, file: Identity, path: Path) -> Header:
    """Parses and checks the JSON of a header.

    Args:
        raw: The JSON.
        file: What tells the file from others.
        path: The file, for sentences.

    Raises:
        M3Error: The header is no header, or does not fit the file.
    """
    entries = parse_json(raw, f"the header of {path}")
    metadata = _parse_metadata(entries.pop("__metadata__", None), path)
    parsed = [_parse_tensor(name, entry, path) for name, entry in entries.items()]
    data_start = 8 + len(raw)
    _check_layout(((begin, end, info.name) for info, begin, end in parsed), file.size - data_start, path)
    return Header(
        tensors={info.name: info for info, _, _ in parsed},
        offsets={info.name: data_start + begin for info, begin, _ in parsed},
        metadata=metadata,
        identity=file,
        blake3=blake3(raw).hexdigest(),
    )


# --- Files -----------------------------------------------------------------------------------------------


def read_raw_header(path: Path) -> tuple[bytes, Identity]:
    """The JSON of a file's header, not yet parsed, and what tells the file from others."""
    source = open_source(path)
    size = source.identity.size
    try:
        prefix = bytearray(len(LFS_POINTER))
        got = source.read_into(memoryview(prefix), 0, size)
        if prefix == LFS_POINTER:
            raise not_fetched(path)
        length = int.from_bytes(prefix[: min(got, 8)], "little")
        if got < 8 or length > size - 8:
            if path.suffix in _TEXTS:
                raise M3Error(f"{path} holds no weights: give a model's directory, or a file such as model.safetensors")
            raise damaged(
                f"{path} is cut short or no safetensors file: its header would take {length:,} bytes"
                f" and the whole file has {size:,}"
            )
        if length > _MAX_HEADER:
            raise damaged(f"{path} has a header of {length:,} bytes, over the format's {_MAX_HEADER:,}")
        raw = bytearray(length)
        source.read_into(memoryview(raw), 8, 8 + length)
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        source.close()
    return bytes(raw), source.identity


def read_header(path: Path) -> Header:
    """Reads, parses and checks the header of a file."""
    raw, file = read_raw_header(path)
    return _parse_header(raw, file, path)
