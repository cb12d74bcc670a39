"""Writing the msgpack files that Flax restores and that transformers 4 loads, in memory that does not grow.

The bytes are those that `flax.serialization.msgpack_serialize` gives for the same tree: keys in order, arrays of more
than 2³⁰ bytes in chunks.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from m3jax.checkpoints.copying import pieces
from m3jax.checkpoints.formats import MSGPACK
from m3jax.checkpoints.msgpack_tree import ARRAY, CHUNKED, MAX_DEPTH, MAX_NAME
from m3jax.checkpoints.protocol import DTYPES, Checkpoint, TensorInfo
from m3jax.checkpoints.shards import appearing, plan_shards
from m3jax.errors import M3Error, mend

_CHUNK = 2**30  # bytes, as in flax.serialization: msgpack's limit is 2³² and was once half of that

Tree: TypeAlias = dict[str, "Tree | TensorInfo"]


class _Span(NamedTuple):
    """Bytes of a tensor that belong at this place of a file."""

    name: str
    start: int
    stop: int


def write_msgpack(path: Path, source: Checkpoint, max_shard_size: int) -> None:
    """Writes a checkpoint as `flax_model.msgpack`, or as several files with an index; every bit stays as it is.

    Names are split at "." into maps inside maps. Texts that the source carries beside its tensors are left out.

    Args:
        path: The directory to write into; it exists.
        source: An open checkpoint.
        max_shard_size: Bytes of tensors that a file may hold; a larger tensor gets a file of its own.

    Raises:
        M3Error: The names do not make a tree, which is found before anything is written; the checkpoint cannot be
            read or the files cannot be written.
    """
    tensors = list(source.tensors.values())
    _nested(tensors)
    shards = _shards(tensors, max_shard_size)
    weight_map = {_index_key(info.name): file for file, infos in shards for info in infos}
    if len(shards) > 1 and len(weight_map) < len(tensors):
        raise M3Error(
            f"{source.location} has names that differ in '/' and '.' only, which are one in an index: rename."
        )
    for file, infos in shards:
        with _written(path / file) as out:
            for segment in _encoded(_nested(infos)):
                if isinstance(segment, bytes):
                    out.write(segment)
                else:
                    for _, piece in pieces(source, *segment):
                        out.write(piece)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(info.nbytes for info in tensors)}, "weight_map": weight_map}
        with _written(path / MSGPACK.index_file) as out:
            out.write(f"{json.dumps(index, indent=2, sort_keys=True)}\n".encode())


def _shards(tensors: list[TensorInfo], max_shard_size: int) -> list[tuple[str, list[TensorInfo]]]:
    """File names, as transformers 4 gave them, with their tensors."""
    shards = plan_shards(tensors, max_shard_size)
    if len(shards) == 1:
        return [(MSGPACK.single_file, tensors)]
    return [(file.replace("model", "flax_model").replace("safetensors", "msgpack"), infos) for file, infos in shards]


def _index_key(name: str) -> str:
    return name.replace(".", "/")


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """See `shards.appearing`; says what failed."""
    try:
        with appearing(path) as file:
            yield file
    except OSError as error:
        raise M3Error(f"{path} cannot be written: {error.strerror}; {mend(error)}.") from error


# --- Names -----------------------------------------------------------------------------------------------


def _nested(tensors: list[TensorInfo]) -> Tree:
    """The tree that names make when they are split at "."."""
    root: Tree = {}
    for info in tensors:
        *above, last = _keys(info.name)
        tree = root
        for depth, key in enumerate(above, start=1):
            below = tree.setdefault(key, {})
            if not isinstance(below, dict):
                raise _both(".".join(above[:depth]), info.name)
            tree = below
        if last in tree:
            raise _both(info.name, f"{info.name}.…")
        tree[last] = info
    return root


def _keys(name: str) -> list[str]:
    keys = name.split(".")
    if len(name) > MAX_NAME or len(keys) > MAX_DEPTH:
        raise M3Error(f"tensor {name[:60]!r}… has a name too long for Flax's maps inside maps: rename it.")
    if CHUNKED in keys:
        raise M3Error(f"tensor {name!r} has a name by which Flax marks something else: rename it.")
    return keys


def _both(name: str, longer: str) -> M3Error:
    return M3Error(
        f"{name!r} is a tensor and also a part of {longer!r}, but a msgpack file of Flax holds maps inside maps, where"
        " a name is one or the other: rename one, or convert to safetensors."
    )


# --- Bytes -----------------------------------------------------------------------------------------------


def _encoded(tree: Mapping[str, "Tree | TensorInfo"]) -> Iterator[bytes | _Span]:
    """A file's content in order: bytes, and tensors to copy."""
    yield _map(len(tree))
    for key in sorted(tree):
        yield _text(key)
        node = tree[key]
        if isinstance(node, dict):
            yield from _encoded(node)
        elif node.nbytes > _CHUNK:
            yield from _in_chunks(node)
        else:
            yield from _array(node, node.shape, 0, node.nbytes)


def _in_chunks(info: TensorInfo) -> Iterator[bytes | _Span]:
    width = DTYPES[info.dtype].itemsize
    step = max(1, _CHUNK // width) * width
    starts = range(0, info.nbytes, step)
    yield _map(3) + _text(CHUNKED) + b"\xc3"  # true
    yield _text("shape") + _map(len(info.shape))
    for axis, size in enumerate(info.shape):
        yield _text(str(axis)) + _number(size)
    yield _text("chunks") + _map(len(starts))
    for index, start in enumerate(starts):
        stop = min(start + step, info.nbytes)
        yield _text(str(index))
        yield from _array(info, ((stop - start) // width,), start, stop)


def _array(info: TensorInfo, shape: tuple[int, ...], start: int, stop: int) -> Iterator[bytes | _Span]:
    """The extension of an array: (shape, dtype, bytes)."""
    sizes = b"".join(map(_number, shape))
    payload = _sized(stop - start, (0xC4, 0xC5, 0xC6))
    inner = b"\x93" + _array_head(len(shape)) + sizes + _text(DTYPES[info.dtype].name) + payload
    yield _extension_head(len(inner) + stop - start) + bytes([ARRAY]) + inner
    yield _Span(info.name, start, stop)


def _sized(count: int, codes: tuple[int, int, int]) -> bytes:
    """A code with a count of one, two or four bytes, the shortest that holds it."""
    power = 0 if count < 1 << 8 else 1 if count < 1 << 16 else 2
    return bytes([codes[power]]) + count.to_bytes(1 << power, "big")


def _map(count: int) -> bytes:
    if count < 16:
        return bytes([0x80 | count])
    return b"\xde" + count.to_bytes(2, "big") if count < 1 << 16 else b"\xdf" + count.to_bytes(4, "big")


def _array_head(count: int) -> bytes:
    return bytes([0x90 | count]) if count < 16 else b"\xdc" + count.to_bytes(2, "big")


def _text(text: str) -> bytes:
    raw = text.encode()
    return (bytes([0xA0 | len(raw)]) if len(raw) < 32 else _sized(len(raw), (0xD9, 0xDA, 0xDB))) + raw


def _number(value: int) -> bytes:
    if value < 0x80:
        return bytes([value])
    return _sized(value, (0xCC, 0xCD, 0xCE)) if value < 1 << 32 else b"\xcf" + value.to_bytes(8, "big")


def _extension_head(count: int) -> bytes:
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
    return bytes([fixed[count]]) if count in fixed else _sized(count, (0xC7, 0xC8, 0xC9))
