"""The zip archives that `torch.save` writes: where each entry's bytes are, found without reading them.

An archive ends with a directory of its entries, each of which begins with a header of its own
(https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT). PyTorch stores the bytes of entries as they are, so that
they can be read by range. An archive may be damaged, half downloaded or made to mislead.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from reprlib import repr as brief  # what a file says may be long or deep without end
from typing import NamedTuple

from blake3 import blake3

from m3jax.checkpoints.headers import LFS_POINTER, damaged, not_fetched
from m3jax.checkpoints.storage import ByteSource, LocalSource
from m3jax.errors import M3Error

_LARGEST_DIRECTORY = 2**27  # bytes: more than a million entries
_LARGEST_TEXT = 2**26  # bytes of an entry that is read whole: names and places of more tensors than any model has
_LONGEST_COMMENT = 2**16 - 1
_MOST_ENTRIES = 2**20
_AT_ONCE = 16  # headers of a remote archive, where each takes a while to come
_STORED, _ENCRYPTED, _SIZE_FOLLOWS, _UNKNOWN = 0, 0x1, 0x8, 2**32 - 1

# The records of an archive: the mark that each begins with, and its numbers.
_END, _END_64, _LOCATOR_64 = (b"PK\5\6", "<4H2IH"), (b"PK\6\6", "<Q2H2I4Q"), (b"PK\6\7", "<IQI")
_LISTED, _HEADER = (b"PK\1\2", "<6H3I5H2I"), (b"PK\3\4", "<5H3I2H")

_TAR, _LEGACY = b"ustar", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the magic number of torch.save
_OLD = (
    "is of the format that PyTorch wrote before version 1.6, which is not read: if you trust who made it, load it in"
    " torch and save it again"
)


class Entry(NamedTuple):
    """Where an entry's bytes are: offset from the start of the file, and how many."""

    offset: int
    size: int


class Archive(NamedTuple):
    """What is in an archive.

    Attributes:
        entries: By name below the archive's own directory, such as `data/0`.
        digest: BLAKE3 of its directory and of the places of its entries, hexadecimal.
    """

    entries: Mapping[str, Entry]
    digest: str


class _Listed(NamedTuple):
    """An entry as the directory tells of it; its bytes begin after a header whose length only that header tells."""

    name: str
    header: int
    size: int


def read_archive(source: ByteSource, path: Path) -> Archive:
    """Reads the directory of an archive and the headers of its entries.

    Args:
        source: The open file.
        path: The file, for sentences.

    Raises:
        M3Error: It is no archive that `torch.save` wrote, or is damaged.
        OSError: It cannot be read.
    """
    directory, start, count = _read_directory(source, path)
    listed = sorted(_listed(directory, count, path), key=lambda entry: entry.header)
    entries = _places(source, listed, path)
    if len(entries) < len(listed):
        raise damaged(f"{path} has two entries of one name")
    limits = [*(entry.header for entry in listed), start][1:]
    for (name, place), limit in zip(entries.items(), limits, strict=True):
        if place.offset + place.size > limit:
            raise damaged(f"entry {brief(name)} in {path} reaches into what comes after it")
    digest = blake3(directory)
    digest.update(repr(list(entries.values())).encode())
    return Archive(_below(entries, path), digest.hexdigest())


def read_entry(source: ByteSource, archive: Archive, name: str, path: Path) -> bytes:
    """A whole entry.

    Args:
        source: The open file.
        archive: What is in it.
        name: The entry.
        path: The file, for sentences.

    Raises:
        M3Error: There is no such entry, or it is too large to be read whole.
        OSError: It cannot be read.
    """
    if name not in archive.entries:
        raise damaged(f"{path} has no entry {name!r}")
    place = archive.entries[name]
    if place.size > _LARGEST_TEXT:
        raise damaged(f"entry {name!r} in {path} has {place.size:,} bytes, over {_LARGEST_TEXT:,}")
    return _read(source, place.offset, place.size, path)


def _read(source: ByteSource, offset: int, count: int, path: Path) -> bytes:
    content = bytearray(count)
    if source.read_into(memoryview(content), offset, offset + count) < count:
        raise damaged(f"{path} was cut while it was read")
    return bytes(content)


def _record(record: tuple[bytes, str], raw: bytes, at: int) -> tuple[int, ...] | None:
    """The numbers of a record; None where there is none."""
    mark, layout = record
    if not raw.startswith(mark, at) or at + 4 + struct.calcsize(layout) > len(raw):
        return None
    return struct.unpack_from(layout, raw, at + 4)


def _length(record: tuple[bytes, str]) -> int:
    return 4 + struct.calcsize(record[1])


# --- The directory ---------------------------------------------------------------------------------------


def _read_directory(source: ByteSource, path: Path) -> tuple[bytes, int, int]:
    """The directory, where it begins, and how many entries it should have."""
    size = source.identity.size
    tail_at = max(0, size - _LONGEST_COMMENT - _length(_END) - _length(_LOCATOR_64))
    tail = _read(source, tail_at, size - tail_at, path)
    found = _find_end(tail)
    if found is None:
        raise _no_archive(source, path)
    at, (disk, first_disk, _, count, length, start, _) = found
    locator = _record(_LOCATOR_64, tail, at - _length(_LOCATOR_64)) if at >= _length(_LOCATOR_64) else None
    limit = tail_at + at
    if locator is not None:
        _, limit, _ = locator
        wide = limit + _length(_END_64) <= size and _record(_END_64, _read(source, limit, _length(_END_64), path), 0)
        if not wide:
            raise damaged(f"{path} has no end of its directory where it says")
        *_, disk, first_disk, _, count, length, start = wide
    if disk or first_disk:
        raise damaged(f"{path} is one of several parts of an archive")
    if start + length > limit or length > _LARGEST_DIRECTORY or count > _MOST_ENTRIES:
        raise damaged(f"{path} has a directory of {count:,} entries in {length:,} bytes, which cannot be")
    return _read(source, start, length, path), start, count


def _find_end(tail: bytes) -> tuple[int, tuple[int, ...]] | None:
    """Where the last record begins, whose comment ends with the file, and its numbers."""
    at = len(tail)
    while (at := tail.rfind(_END[0], 0, at)) >= 0:
        end = _record(_END, tail, at)
        if end is not None and at + _length(_END) + end[-1] == len(tail):
            return at, end
    return None


def _no_archive(source: ByteSource, path: Path) -> M3Error:
    """The sentence for a file that does not end as archives do."""
    size = source.identity.size
    head = _read(source, 0, min(size, 512), path)
    if head.startswith(LFS_POINTER):
        return not_fetched(path)
    if head.startswith(_LEGACY) or head[257:].startswith(_TAR):
        return M3Error(f"{path} {_OLD}.")
    if head.startswith(b"\x80"):
        return M3Error(f"{path} is a bare pickle and no zip archive of PyTorch: it is not read, so save tensors.")
    kind = "is cut short" if head.startswith(_HEADER[0]) else "is no zip archive of PyTorch"
    return damaged(f"{path} {kind}: its {size:,} bytes do not end with an archive's directory")


def _listed(directory: bytes, count: int, path: Path) -> Iterator[_Listed]:
    at = 0
    for _ in range(count):
        told = _record(_LISTED, directory, at)
        if told is None:
            raise damaged(f"{path} has a damaged directory")
        _, _, flags, method, *_, packed, size, name_length, extra_length, comment, _, _, _, header = told
        at += _length(_LISTED)
        raw, extra = directory[at : at + name_length], directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment
        name = raw.decode(errors="surrogateescape")
        wide = _wide(extra, [size, packed, header])
        if at > len(directory) or wide is None:
            raise damaged(f"{path} has a damaged directory")
        size, packed, header = wide
        if flags & _ENCRYPTED:
            raise M3Error(f"entry {brief(name)} in {path} is encrypted: get the file as `torch.save` writes it.")
        if method != _STORED or packed != size:
            raise M3Error(
                f"entry {brief(name)} in {path} is compressed, so it cannot be read by range: unpack the file and"
                " pack it again with `zip -0`, or get it as `torch.save` writes it."
            )
        yield _Listed(name, header, size)
    if at < len(directory):
        raise damaged(f"{path} has {len(directory) - at:,} bytes after the last entry of its directory")


def _wide(extra: bytes, numbers: list[int]) -> list[int] | None:
    """Numbers of an entry, those that need more than 32 bits from its extra field; None where it is damaged."""
    at, left = 0, [place for place, number in enumerate(numbers) if number == _UNKNOWN]
    while left and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            if length < 8 * len(left) or at + length > len(extra):
                return None
            found = struct.unpack_from(f"<{len(left)}Q", extra, at)
            return [found[left.index(place)] if place in left else number for place, number in enumerate(numbers)]
        at += length
    return numbers


# --- Entries ---------------------------------------------------------------------------------------------


def _places(source: ByteSource, listed: Sequence[_Listed], path: Path) -> dict[str, Entry]:
    """Where the bytes of entries are, in their order."""

    def place(entry: _Listed) -> Entry:
        return _placed(source, entry, path)

    names = [entry.name for entry in listed]
    if isinstance(source, LocalSource):
        return dict(zip(names, map(place, listed), strict=True))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(place, listed), strict=True))


def _placed(source: ByteSource, entry: _Listed, path: Path) -> Entry:
    """Where an entry's bytes are, behind its own header, which must agree with the directory."""
    fault = f"entry {brief(entry.name)} in {path} does not begin where the directory says"
    if entry.header + _length(_HEADER) > source.identity.size:
        raise damaged(fault)
    name = entry.name.encode(errors="surrogateescape")
    raw = _read(source, entry.header, min(_length(_HEADER) + len(name), source.identity.size - entry.header), path)
    told = _record(_HEADER, raw, 0)
    if told is None:
        raise damaged(fault)
    _, flags, method, *_, size, name_length, extra_length = told
    same_size = flags & _SIZE_FOLLOWS or size in (entry.size, _UNKNOWN)
    if method != _STORED or flags & _ENCRYPTED or not same_size or name_length != len(name):
        raise damaged(f"entry {brief(entry.name)} in {path} is another one by its own header")
    if raw[_length(_HEADER) :] != name:
        raise damaged(f"entry {brief(entry.name)} in {path} has another name by its own header")
    return Entry(entry.header + _length(_HEADER) + name_length + extra_length, entry.size)


def _below(entries: Mapping[str, Entry], path: Path) -> dict[str, Entry]:
    """The entries by their names below the directory that has the pickle."""
    roots = [name.removesuffix("data.pkl") for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise damaged(f"{path} is a zip archive with {len(roots)} pickles of PyTorch where one is expected")
    return {name.removeprefix(roots[0]): place for name, place in entries.items() if name.startswith(roots[0])}
