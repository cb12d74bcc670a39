"""From any checkpoint to safetensors files, piece by piece."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from m3jax.checkpoints.protocol import Checkpoint
from m3jax.checkpoints.shards import ShardWriter, plan_shards, write_index
from m3jax.errors import M3Error

_PIECE = 1 << 22  # bytes: many enough for the disk, few enough for the caches


def pieces(
    source: Checkpoint, name: str, start: int, stop: int, size: int | None = None
) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a tensor in order, a few megabytes at a time.

    Args:
        source: An open checkpoint.
        name: One of its tensors.
        start: The first byte wanted.
        stop: The one after the last.
        size: Bytes of a piece; as many as suit the disk and the caches if None.

    Yields:
        Where a piece starts in the tensor, and its bytes, which are good until the next piece.
    """
    size = _PIECE if size is None else size
    buffer = np.empty(min(size, stop - start), np.uint8)
    for at in range(start, stop, size):
        piece = buffer[: stop - at]
        source.read_into(name, at, piece)
        yield at, piece.data


def write_safetensors(path: Path, source: Checkpoint, max_shard_size: int) -> None:
    """Writes a checkpoint as `model.safetensors`, or as several files with an index; every bit stays as it is.

    Args:
        path: The directory to write into; it exists.
        source: An open checkpoint.
        max_shard_size: Bytes of tensors that a file may hold; a larger tensor gets a file of its own.

    Raises:
        M3Error: A tensor has a name that the format cannot hold, or the checkpoint cannot be read, or the files cannot
            be written.
    """
    if "__metadata__" in source.tensors:
        raise M3Error(f"{source.location} has a tensor '__metadata__', a name that safetensors uses itself: rename it.")
    tensors = list(source.tensors.values())
    shards = plan_shards(tensors, max_shard_size)
    metadata = {"format": "pt", **source.metadata}
    for file, infos in shards:
        with ShardWriter(path / file, infos, metadata) as shard:
            for info in infos:
                for start, piece in pieces(source, info.name, 0, info.nbytes):
                    shard.write(info.name, start, piece)
            shard.finish()
    if len(shards) > 1:
        write_index(path, shards, sum(info.nbytes for info in tensors))
