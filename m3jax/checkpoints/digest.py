"""Digests of tensors and of whole checkpoints: the same weights, the same digest, however they are filed."""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from m3jax.checkpoints.copying import pieces
from m3jax.checkpoints.protocol import BytesLike, Checkpoint, as_bytes
from m3jax.checkpoints.storage import open_source
from m3jax.errors import M3Error

ALGORITHM = "blake3"
_BLOCK = 1 << 24  # bytes in memory at a time


class TensorDigest:
    """Digest of one tensor's bytes, fed piece by piece in row-major order.

    Example:
        >>> import numpy as np
        >>> digest = TensorDigest()
        >>> digest.update(np.zeros(3, np.float32))
        >>> digest.update(np.zeros(5, np.float32))
        >>> whole = TensorDigest()
        >>> whole.update(np.zeros((2, 4), np.float32))
        >>> digest.hexdigest() == whole.hexdigest()
        True
    """

    def __init__(self) -> None:
        self._state = blake3()

    def update(self, data: BytesLike) -> None:
        """Takes in the next bytes of the tensor.

        Args:
            data: An array (its little-endian bytes count) or contiguous memory.
        """
        self._state.update(as_bytes(data))

    def hexdigest(self) -> str:
        """The digest of all bytes so far: 64 hexadecimal digits."""
        return self._state.hexdigest()


def digest_tensor(checkpoint: Checkpoint, name: str, block: int = 1 << 24) -> str:
    """Digest of one tensor of a checkpoint, read block by block.

    Args:
        checkpoint: An open checkpoint.
        name: One of its tensors.
        block: Bytes held in memory at a time; the digest does not depend on it.

    Returns:
        BLAKE3 of the tensor's bytes, hexadecimal.

    Raises:
        M3Error: The bytes cannot be read.
    """
    digest = TensorDigest()
    for _, piece in pieces(checkpoint, name, 0, checkpoint.tensors[name].nbytes, block):
        digest.update(piece)
    return digest.hexdigest()


class _Running:
    """The digest of a tensor as far as it was read in order."""

    def __init__(self) -> None:
        self.digest = TensorDigest()
        self.reached = 0
        self.lock = threading.Lock()


class Passing:
    """Digests of tensors from what passes by as they are read; one that was not read in order is read again."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Nothing has been read yet.

        Args:
            checkpoint: What is read from.
        """
        self._checkpoint = checkpoint
        self._running: dict[str, _Running] = {}
        self._done: dict[str, str] = {}
        self._again: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def take(self, name: str, start: int, data: BytesLike) -> None:
        """Takes in what was read of a tensor.

        Args:
            name: The tensor.
            start: The first byte, counted from the tensor's own.
            data: The bytes.
        """
        with self._lock:
            if name in self._done:
                return
            running = self._running.setdefault(name, _Running())
        raw = as_bytes(data)
        with running.lock:
            if start != running.reached:
                return
            running.digest.update(raw)
            running.reached += len(raw)
            whole = running.reached == self._checkpoint.tensors[name].nbytes
        if whole:
            self._finish(name, running.digest.hexdigest())

    def digest(self, name: str) -> str:
        """The digest of a tensor.

        Raises:
            M3Error: It was not read in order, and cannot be read again.
        """
        with self._lock:
            again = self._again.setdefault(name, threading.Lock())
        with again:  # lanes that have each read a part of it read it again once, not each of them
            if name not in self._done:
                self._finish(name, digest_tensor(self._checkpoint, name))
        return self._done[name]

    def _finish(self, name: str, digest: str) -> None:
        with self._lock:
            self._running.pop(name, None)  # a model has many tensors
            self._done[name] = digest


def digest_file(path: Path) -> str:
    """BLAKE3 of a whole file, hexadecimal.

    Raises:
        M3Error: The file cannot be read.
    """
    source = open_source(path)
    state, block = blake3(), memoryview(bytearray(min(_BLOCK, max(source.identity.size, 1))))
    try:
        for start in range(0, source.identity.size, len(block)):
            state.update(block[: source.read_into(block, start, source.identity.size)])
    except OSError as error:
        raise M3Error(f"{path}: cannot be read: {error.strerror}; check the file.") from error
    finally:
        source.close()
    return state.hexdigest()


def digest_checkpoint(digests: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """One digest for a whole checkpoint, whatever the order of its tensors and their files.

    Args:
        digests: Of every tensor, by name: dtype (safetensors' name), shape and digest of its bytes.

    Returns:
        BLAKE3 of one JSON line per tensor, `[name, dtype, shape, digest]`, sorted by name; hexadecimal.

    Example:
        >>> a, b = ("F32", (2,), "aa"), ("BF16", (), "bb")
        >>> digest_checkpoint({"a": a, "b": b}) == digest_checkpoint({"b": b, "a": a})
        True
    """
    state = blake3()
    for name, (dtype, shape, digest) in sorted(digests.items()):
        # JSON quotes and counts for us: no two sets of tensors give the same lines.
        line = json.dumps([name, dtype, list(shape), digest], separators=(",", ":"))
        state.update(line.encode() + b"\n")
    return state.hexdigest()
