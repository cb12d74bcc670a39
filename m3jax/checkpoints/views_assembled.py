"""A checkpoint seen with tensors that are made of others' byte ranges: renamed, put together, taken apart."""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m3jax.checkpoints.protocol import Checkpoint, TensorInfo, in_natural_order, room_for
from m3jax.checkpoints.views import MakingView, Stored, stored_at, stored_digests
from m3jax.errors import M3Error


class Piece(NamedTuple):
    """A byte range of a tensor.

    Attributes:
        stored: The tensor.
        start: Its first byte.
        nbytes: How many.
    """

    stored: str
    start: int
    nbytes: int


class Assembly(NamedTuple):
    """A tensor made of others.

    Attributes:
        shape: Its own.
        dtype: Of all of them.
        pieces: What its bytes are, one after the other.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]


def assembled(checkpoint: Checkpoint, assemblies: Mapping[str, Assembly]) -> Checkpoint:
    """A checkpoint with tensors made of pieces of its own.

    Args:
        checkpoint: An open checkpoint, which the view closes.
        assemblies: Every tensor of the view, by name.

    Returns:
        The view; its location is the checkpoint's.

    Raises:
        M3Error: The pieces of a tensor are absent, or not as many bytes as it has.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from m3jax.checkpoints import ShardWriter, open_safetensors
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with ShardWriter(file, [TensorInfo("a", (2,), "U8"), TensorInfo("b", (2,), "U8")]) as shard:
        ...     shard.write("a", 0, np.uint8([1, 2]))
        ...     shard.write("b", 0, np.uint8([3, 4]))
        ...     shard.finish()
        >>> both, room = Assembly((2, 2), "U8", (Piece("b", 0, 2), Piece("a", 0, 2))), np.empty((2, 2), np.uint8)
        >>> with assembled(open_safetensors(file), {"both": both}) as view:
        ...     view.read_into("both", 0, room)
        ...     print(room.tolist())
        [[3, 4], [1, 2]]
    """
    return _Assembled(checkpoint, assemblies)


class _Assembled(MakingView):
    """See `assembled`."""

    def __init__(self, checkpoint: Checkpoint, assemblies: Mapping[str, Assembly]) -> None:
        super().__init__(checkpoint)
        self._pieces = {name: assembly.pieces for name, assembly in assemblies.items()}
        self.tensors: Mapping[str, TensorInfo] = in_natural_order(
            {name: TensorInfo(name, assembly.shape, assembly.dtype) for name, assembly in assemblies.items()}
        )
        for name, info in self.tensors.items():
            absent = next((piece for piece in self._pieces[name] if not self._has(piece)), None)
            if absent is not None:
                raise M3Error(f"{self.location} has no {absent}, of which {name!r} is to be made: check the names.")
            if sum(piece.nbytes for piece in self._pieces[name]) != info.nbytes:
                raise M3Error(f"{self.location}: the pieces of {name!r} are not its {info.nbytes} bytes: check shapes.")

    def source_name(self, name: str) -> Stored:
        """Where the first bytes of a tensor are stored; see `Borrowing.source_name`."""
        if name not in self.tensors:
            raise M3Error(f"{self.location} has no tensor {name!r}: check the name.")
        pieces = self._pieces[name]
        return stored_at(self._checkpoint, pieces[0].stored) if pieces else Stored(self.location, name)

    def source_digests(self, name: str, digest: str) -> dict[str, str]:
        """The digests of the whole tensors that pieces are of; see `stored_digests`."""
        pieces = self._pieces[name]
        if len(pieces) == 1 and pieces[0].nbytes == self._checkpoint.tensors[pieces[0].stored].nbytes:
            return stored_digests(self._checkpoint, pieces[0].stored, digest)
        return self._digests_of(piece.stored for piece in pieces)

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with bytes of pieces, one after the other; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        pieces = self._pieces[name]
        ends = self._ends(name)
        done = 0
        while done < len(view):
            number = bisect_right(ends, start + done)
            piece = pieces[number]
            inside = start + done - (ends[number] - piece.nbytes)
            room = view[done : done + piece.nbytes - inside]
            self._checkpoint.read_into(piece.stored, piece.start + inside, room)
            if len(pieces) > 1 or piece.nbytes != self._checkpoint.tensors[piece.stored].nbytes:
                self._passing.take(piece.stored, piece.start + inside, room)
            done += len(room)

    def _has(self, piece: Piece) -> bool:
        info = self._checkpoint.tensors.get(piece.stored)
        return info is not None and piece.start >= 0 and piece.start + piece.nbytes <= info.nbytes

    def _ends(self, name: str) -> list[int]:
        """After which byte of a tensor each of its pieces ends."""
        return list(accumulate(piece.nbytes for piece in self._pieces[name]))
