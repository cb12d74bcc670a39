"""A checkpoint seen with its blocks stacked otherwise: one by one, or along an axis of one tensor."""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m3jax.checkpoints.protocol import (
    DTYPES,
    Checkpoint,
    TensorInfo,
    in_natural_order,
    room_for,
)
from m3jax.checkpoints.views import MakingView, Stored, stored_at, stored_digests
from m3jax.errors import M3Error

_FAR = 2**14  # bytes: runs of a block that are shorter are read with what lies between them
_MOST = 2**22  # bytes read at once with what lies between


class BlockPlace(NamedTuple):
    """A tensor of one block.

    Attributes:
        stored: The tensor that it is, or that stacks it.
        axis: Along which it is stacked there; None if it is a tensor of its own.
        at: Which entry of that axis it is.
    """

    stored: str
    axis: int | None = None
    at: int = 0


class Stacking(NamedTuple):
    """A tensor made of blocks.

    Attributes:
        blocks: Those that it stacks; or the one that it is.
        axis: Along which it stacks them; None if it is one.
    """

    blocks: tuple[BlockPlace, ...]
    axis: int | None = None


def restacked(checkpoint: Checkpoint, stackings: Mapping[str, Stacking]) -> Checkpoint:
    """A checkpoint with its blocks one by one where it stacks them, stacked where it has them one by one, or both.

    Args:
        checkpoint: An open checkpoint, which the view closes.
        stackings: Every tensor of the view, by name.

    Returns:
        The view; its location is the checkpoint's.

    Raises:
        M3Error: A block is absent, or those that one tensor is to stack differ in shape or dtype.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from m3jax.checkpoints import ShardWriter, open_safetensors
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with ShardWriter(file, [TensorInfo("layers.w", (2, 3), "U8")]) as shard:
        ...     shard.write("layers.w", 0, np.uint8([[1, 2, 3], [4, 5, 6]]))
        ...     shard.finish()
        >>> room = np.empty(2, np.uint8)
        >>> with restacked(open_safetensors(file), {"layers.2.w": Stacking((BlockPlace("layers.w", 1, 2),))}) as view:
        ...     view.read_into("layers.2.w", 0, room)
        ...     print(room.tolist())
        [3, 6]
    """
    return _Restacked(checkpoint, stackings)


class _Restacked(MakingView):
    """See `restacked`."""

    def __init__(self, checkpoint: Checkpoint, stackings: Mapping[str, Stacking]) -> None:
        super().__init__(checkpoint)
        self._stackings = dict(stackings)
        self.tensors: Mapping[str, TensorInfo] = in_natural_order(
            {name: self._info(name, stacking) for name, stacking in stackings.items()}
        )

    def _info(self, name: str, stacking: Stacking) -> TensorInfo:
        stored = self._checkpoint.tensors
        absent = next((block for block in stacking.blocks if block.stored not in stored), None)
        if absent is not None:
            raise M3Error(
                f"{self.location} has no {absent.stored!r}, of which {name!r} is to be made: check the names."
            )
        kinds = {(self._shape(block), stored[block.stored].dtype) for block in stacking.blocks}
        if len(kinds) > 1:
            said = " and ".join(f"{dtype} {list(shape)}" for shape, dtype in sorted(kinds))
            raise M3Error(
                f"{self.location}: the blocks of {name!r} are {said}: only blocks that are alike are stacked."
            )
        ((shape, dtype),) = kinds
        if stacking.axis is not None:
            shape = (*shape[: stacking.axis], len(stacking.blocks), *shape[stacking.axis :])
        return TensorInfo(name, shape, dtype)

    def _shape(self, block: BlockPlace) -> tuple[int, ...]:
        shape = self._checkpoint.tensors[block.stored].shape
        return shape if block.axis is None else (*shape[: block.axis], *shape[block.axis + 1 :])

    def source_name(self, name: str) -> Stored:
        """Where the first block of a tensor is stored; see `Borrowing.source_name`."""
        if name not in self._stackings:
            raise M3Error(f"{self.location} has no tensor {name!r}: check the name.")
        return stored_at(self._checkpoint, self._stackings[name].blocks[0].stored)

    def source_digests(self, name: str, digest: str) -> dict[str, str]:
        """The digests of the whole tensors that blocks are of; see `stored_digests`."""
        stacking = self._stackings[name]
        if stacking.axis is None and stacking.blocks[0].axis is None:
            return stored_digests(self._checkpoint, stacking.blocks[0].stored, digest)
        return self._digests_of(block.stored for block in stacking.blocks)

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with bytes of blocks, as they lie in the tensor; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        stacking, info = self._stackings[name], self.tensors[name]
        if stacking.axis is None and stacking.blocks[0].axis is None:
            self._checkpoint.read_into(stacking.blocks[0].stored, start, view)  # whoever reads it hashes it
            return
        if stacking.axis is None:
            self._read_block(stacking.blocks[0], start, view)
            return
        inside = prod(info.shape[stacking.axis + 1 :]) * DTYPES[info.dtype].itemsize
        if inside:
            self._read_stack(stacking, inside, start, view)

    def _read_stack(self, stacking: Stacking, inside: int, start: int, out: memoryview) -> None:
        """Reads of a stack whose blocks have `inside` bytes together."""
        count, done = len(stacking.blocks), 0
        slice_bytes = inside * count
        while done < len(out):
            outer, rest = divmod(start + done, slice_bytes)
            whole = min((len(out) - done) // slice_bytes, max(_MOST // slice_bytes, 1))
            if rest or not whole or inside >= _FAR:
                number, skip = divmod(rest, inside)
                room = out[done : done + inside - skip]
                self._read_block(stacking.blocks[number], outer * inside + skip, room)
                done += len(room)
                continue
            # Many short runs: of each block what several slices need, then side by side.
            beside = np.frombuffer(out[done : done + whole * slice_bytes], np.uint8).reshape(whole, count, inside)
            held = np.empty(whole * inside, np.uint8)
            for number, block in enumerate(stacking.blocks):
                self._read_block(block, outer * inside, held.data)
                beside[:, number] = held.reshape(whole, inside)
            done += whole * slice_bytes

    def _read_block(self, block: BlockPlace, start: int, out: memoryview) -> None:
        """Reads bytes of one block, wherever it is."""
        info = self._checkpoint.tensors[block.stored]
        if block.axis is None:
            self._checkpoint.read_into(block.stored, start, out)
            self._passing.take(block.stored, start, out)
            return
        inside = prod(info.shape[block.axis + 1 :]) * DTYPES[info.dtype].itemsize
        apart, done = inside * info.shape[block.axis], 0
        while done < len(out):
            outer, skip = divmod(start + done, inside)
            whole = min((len(out) - done) // inside, max(_MOST // apart, 1))
            if skip or not whole or inside >= _FAR:
                room = out[done : done + inside - skip]
                self._checkpoint.read_into(block.stored, outer * apart + block.at * inside + skip, room)
                done += len(room)
                continue
            held, first = np.empty(whole * apart, np.uint8), block.at * inside
            self._checkpoint.read_into(block.stored, outer * apart, held)
            room = out[done : done + whole * inside]
            np.frombuffer(room, np.uint8).reshape(whole, inside)[:] = held.reshape(whole, apart)[:, first:][:, :inside]
            done += whole * inside
