"""What a msgpack file of Flax holds: its tree, with each array's place in the file instead of its values.

`flax.serialization` writes nested maps (https://github.com/msgpack/msgpack/blob/master/spec.md) whose arrays are
extensions that hold (shape, dtype, bytes); one of more than 2³⁰ bytes becomes a map of flat chunks. The walk reads
headers and seeks over payloads, which the msgpack library can only read; it trusts nothing, because a file may be
damaged, cut or made to mislead.
"""

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from reprlib import repr as brief
from typing import NamedTuple, TypeAlias

from blake3 import blake3

from m3jax.checkpoints.headers import LFS_POINTER, can_exist, damaged, not_fetched
from m3jax.checkpoints.protocol import DTYPE_NAMES, DTYPES
from m3jax.checkpoints.remote import Identity
from m3jax.checkpoints.storage import ByteSource, open_source, unreadable
from m3jax.errors import M3Error

CHUNKED = "__msgpack_chunked_array__"
ARRAY, COMPLEX, SCALAR = 1, 2, 3  # Flax's extension types
MAX_DEPTH = 100  # of maps inside maps: far more than a model has, far less than Python's stack
MAX_NAME = 1024  # characters: names repeat their prefixes, so longer ones could fill the memory
_MAX_ENTRIES = 2**20
_MAX_TEXT = 1024  # bytes of a text worth keeping
_WINDOW = 2048  # bytes read at a time: the header of an array and a few small entries
_ELSEWHERE = "//GDAPlaceholder:"  # stands for an array that a run on several hosts kept in a directory beside

# What a first byte announces, and the bytes of the length that follows it.
_SIZED = {
    **{0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4)},
    **{0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4)},
    **{0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4)},
    **{0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)},
}
_NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class ArrayPlace(NamedTuple):
    """An array's description and where its bytes are.

    Attributes:
        dtype: Its safetensors dtype name.
        shape: Its dimensions.
        spans: First offset in the file and number of bytes of every chunk, in order.
    """

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Plain(NamedTuple):
    """A leaf that is no array: its value, or `None` for one not worth keeping."""

    value: int | float | str | None


Tree: TypeAlias = dict[str, "Node"]
Node: TypeAlias = Tree | ArrayPlace | Plain
Keys: TypeAlias = tuple[str, ...]


class Structure(NamedTuple):
    """What one file says of itself.

    Attributes:
        arrays: Every array by its path of keys.
        metadata: Numbers and short texts that stand among the arrays, by name.
        identity: What differs when another file takes the name.
        digest: BLAKE3 of what the walk read: all but the arrays' values, and the first of those; hexadecimal.
    """

    arrays: dict[Keys, ArrayPlace]
    metadata: dict[str, str]
    identity: Identity
    digest: str


def read_structure(path: Path) -> Structure:
    """Walks through a file and reads everything but the arrays' values.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        M3Error: It is no msgpack file of Flax, is damaged, or cannot be read.
    """
    source = open_source(path)
    try:
        cursor = _Cursor(source, path)
        tree = _Walk(cursor, path).whole()
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        source.close()
    arrays, metadata = {}, {}
    for at, leaf in _leaves(tree, ()):
        if isinstance(leaf, ArrayPlace):
            arrays[at] = leaf
        elif leaf.value is not None:
            metadata[".".join(at)] = leaf.value if isinstance(leaf.value, str) else json.dumps(leaf.value)
    return Structure(arrays, metadata, source.identity, cursor.digest.hexdigest())


def _leaves(tree: Tree, above: Keys) -> Iterator[tuple[Keys, ArrayPlace | Plain]]:
    for key, node in tree.items():
        if isinstance(node, dict):
            yield from _leaves(node, (*above, key))
        else:
            yield (*above, key), node


class _Cursor:
    """A position in a file, from which small pieces are read by way of a window."""

    def __init__(self, source: ByteSource, path: Path) -> None:
        self.at = 0
        self.digest = blake3()
        self._source, self._size, self._path = source, source.identity.size, path
        self._window, self._window_start = b"", 0

    @property
    def left(self) -> int:
        """Bytes up to the end of the file."""
        return self._size - self.at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        begin = self.at - self._window_start
        if begin + count > len(self._window):
            self._check(count)
            window = bytearray(min(max(count, _WINDOW), self.left))
            if self._source.read_into(memoryview(window), self.at, self.at + len(window)) < len(window):
                raise damaged(f"{self._path} was cut while it was read")
            self.digest.update(window)
            self._window, self._window_start, begin = bytes(window), self.at, 0
        self.at += count
        return self._window[begin : begin + count]

    def shown(self, beginning: bytes) -> bool:
        """Whether what was read last begins so."""
        return self._window.startswith(beginning)

    def skip(self, count: int) -> None:
        """Passes over bytes without reading them."""
        self._check(count)
        self.at += count

    def number(self, width: int) -> int:
        """The next bytes as an unsigned number."""
        return int.from_bytes(self.take(width), "big")

    def _check(self, count: int) -> None:
        if count > self.left:
            raise damaged(
                f"{self._path} is cut short or no msgpack file: at byte {self.at:,} it needs {count:,} more"
                f" and has {self.left:,}"
            )


class _Walk:
    """One pass over a file's structure."""

    def __init__(self, cursor: _Cursor, path: Path) -> None:
        self._cursor, self._file = cursor, path
        self._entries = 0

    def whole(self) -> Tree:
        """The tree that fills the file."""
        if not self._cursor.left:
            raise damaged(f"{self._file} is empty")
        kind, count = self._head()
        if self._cursor.shown(LFS_POINTER):
            raise not_fetched(self._file)
        if kind not in ("map", "array"):
            raise damaged(f"{self._file} does not begin with a map of names, so it is no checkpoint of Flax")
        tree = self._map(count, ()) if kind == "map" else self._list(count, ())
        if not isinstance(tree, dict):
            raise damaged(f"{self._file} holds one array without a name")
        if self._cursor.left:
            raise damaged(f"{self._file} has {self._cursor.left:,} bytes after its end")
        return tree

    def _head(self) -> tuple[str, int]:
        """What comes next, and its length or, for numbers and constants, its first byte."""
        first = self._cursor.number(1)
        if first < 0x80 or first >= 0xE0 or first in _NUMBERS or first in _CONSTANTS:
            return "plain", first
        if first < 0x90:
            return "map", first & 0x0F
        if first < 0xA0:
            return "array", first & 0x0F
        if first < 0xC0:
            return "str", first & 0x1F
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first not in _SIZED:
            raise damaged(f"{self._file} has the byte 0x{first:02x}, which means nothing, at {self._cursor.at - 1:,}")
        kind, width = _SIZED[first]
        return kind, self._cursor.number(width)

    def _node(self, at: Keys) -> Node:
        self._entries += 1
        if self._entries > _MAX_ENTRIES:
            raise damaged(f"{self._file} has over {_MAX_ENTRIES:,} entries, more than any model")
        kind, count = self._head()
        match kind:
            case "map":
                return self._map(count, at)
            case "array":
                return self._list(count, at)
            case "ext":
                return self._extension(count, at)
            case "plain":
                return Plain(self._plain(count))
            case "str" if count <= _MAX_TEXT:
                return self._told(self._text(count), at)
        self._cursor.skip(count)
        return Plain(None)

    def _plain(self, first: int) -> float | None:
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            layout = _NUMBERS[first]
            number: float = struct.unpack(layout, self._cursor.take(struct.calcsize(layout)))[0]
            return number
        return first if first < 0x80 else first - 0x100

    def _text(self, count: int) -> str:
        try:
            return self._cursor.take(count).decode()
        except UnicodeDecodeError as error:
            raise damaged(f"{self._file} has a text that is not UTF-8 before byte {self._cursor.at:,}") from error

    def _told(self, text: str, at: Keys) -> Plain:
        if text.startswith(_ELSEWHERE):
            raise M3Error(
                f"{self._where(at)} is kept outside of the file, by a run on several hosts: restore it with"
                " flax.training.checkpoints and save it on one host."
            )
        return Plain(text)

    def _where(self, at: Keys) -> str:
        return f"tensor {'.'.join(at)!r} in {self._file}"

    def _deeper(self, at: Keys, key: str) -> Keys:
        """The path of an entry, if it is one that a model could have."""
        if len(at) >= MAX_DEPTH:
            raise damaged(f"{self._file} has more than {MAX_DEPTH} maps inside each other")
        if sum(map(len, at)) + len(at) + len(key) > MAX_NAME:
            raise damaged(f"{self._file} has a name of over {MAX_NAME:,} characters")
        return (*at, key)

    def _map(self, count: int, at: Keys) -> Tree | ArrayPlace:
        tree: Tree = {}
        for _ in range(count):
            kind, length = self._head()
            if kind != "str":
                raise damaged(f"{self._file} has a key that is no text before byte {self._cursor.at:,}")
            if length > 4 * MAX_NAME:
                raise damaged(f"{self._file} has a name of over {MAX_NAME:,} characters")
            key = self._text(length)
            if key in tree:
                raise damaged(f"{self._file} names {'.'.join((*at, key))!r} twice")
            tree[key] = self._node(self._deeper(at, key))
        return self._joined(tree, at) if CHUNKED in tree else tree

    def _list(self, count: int, at: Keys) -> Tree:
        # Flax itself turns lists into such maps before it writes them.
        return {str(index): self._node(self._deeper(at, str(index))) for index in range(count)}

    def _extension(self, count: int, at: Keys) -> ArrayPlace | Plain:
        code = self._cursor.number(1)
        if code not in (ARRAY, SCALAR, COMPLEX):
            raise damaged(f"{self._where(at)} is of the extension type {code}, which Flax does not write")
        end = self._cursor.at + count
        if code == COMPLEX:
            self._cursor.skip(count)
            return Plain(None)
        place = self._array(at)
        if self._cursor.at != end:
            raise damaged(f"{self._where(at)} does not end where it says")
        if code == SCALAR and place.shape:
            raise damaged(f"{self._where(at)} is a scalar with the shape {list(place.shape)}")
        return place

    def _array(self, at: Keys) -> ArrayPlace:
        """The header of an array; leaves the cursor behind its bytes."""
        self._expect("array", 3, at)
        shape = [self._dimension(at) for _ in range(self._expect("array", 64, at, at_most=True))]
        name = self._text(self._expect("str", 64, at, at_most=True))
        if name not in DTYPE_NAMES:
            if name == "object":
                raise M3Error(f"{self._where(at)} holds Python objects, which are never opened: save arrays.")
            raise M3Error(
                f"{self._where(at)} has the unknown dtype {brief(name)}: convert it to one of {', '.join(DTYPE_NAMES)}."
            )
        dtype = DTYPE_NAMES[name]
        kind, size = self._head()
        needed = prod(shape) * DTYPES[dtype].itemsize
        if not can_exist(shape, dtype):
            raise damaged(f"{self._where(at)} has the impossible shape {brief(shape)}")
        if kind != "bin" or size != needed:
            raise damaged(f"{self._where(at)} has {size:,} bytes where {name} of shape {shape} needs {needed:,}")
        start = self._cursor.at
        self._cursor.skip(size)
        return ArrayPlace(dtype, tuple(shape), ((start, size),))

    def _expect(self, kind: str, count: int, at: Keys, at_most: bool = False) -> int:
        found, length = self._head()
        if found != kind or length > count or (length < count and not at_most):
            raise damaged(f"{self._where(at)} is not described as Flax describes arrays")
        return length

    def _dimension(self, at: Keys) -> int:
        kind, first = self._head()
        value = self._plain(first) if kind == "plain" else None
        if type(value) is not int or not 0 <= value < 2**63:
            raise damaged(f"{self._where(at)} has an impossible shape")
        return value

    def _joined(self, tree: Tree, at: Keys) -> ArrayPlace:
        """The array that a map of chunks stands for."""
        shape, chunks = self._numbered(tree.get("shape"), at), self._numbered(tree.get("chunks"), at)
        values = [node.value for node in shape if isinstance(node, Plain)]
        sizes = [value for value in values if type(value) is int and 0 <= value < 2**63]
        places = [node for node in chunks if isinstance(node, ArrayPlace) and len(node.shape) == 1]
        if len(tree) != 3 or len(sizes) < len(shape) or len(places) < len(chunks) or not places:
            raise self._unlike_flax(at)
        dtype = places[0].dtype
        spans = tuple(span for place in places for span in place.spans)
        total = sum(size for _, size in spans)
        fits = can_exist(sizes, dtype) and prod(sizes) * DTYPES[dtype].itemsize == total
        if not fits or any(place.dtype != dtype for place in places):
            raise damaged(f"{self._where(at)} has chunks that do not make {dtype} of shape {brief(sizes)}")
        return ArrayPlace(dtype, tuple(sizes), spans)

    def _numbered(self, node: Node | None, at: Keys) -> list[Node]:
        """The values of a map whose keys are "0", "1", …."""
        if not isinstance(node, dict) or any(str(index) not in node for index in range(len(node))):
            raise self._unlike_flax(at)
        return [node[str(index)] for index in range(len(node))]

    def _unlike_flax(self, at: Keys) -> M3Error:
        return damaged(f"{self._where(at)} is not chunked as Flax chunks arrays")
