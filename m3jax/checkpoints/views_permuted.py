"""A checkpoint seen with the entries of its tensors in another order: transposed, split, stacked, interleaved.

A tensor of the view is a box whose axes are walked through stored tensors by strides; some of its axes may choose which
tensor that is. Where a layout also multiplies entries, it is done in float32 and rounded once.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from math import frexp, isfinite, prod
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from m3jax.checkpoints.protocol import DTYPES, Checkpoint, TensorInfo, in_natural_order, room_for
from m3jax.checkpoints.strided import boxes, fill_box, in_order
from m3jax.checkpoints.views import MakingView, Stored, stored_at, stored_digests
from m3jax.errors import M3Error

_SLAB = 2**27  # bytes of a tensor that are made at a time, as whoever turns a matrix must read all of it for a few rows
_KEPT = 2  # slabs that a view keeps, for whoever reads it piece by piece
_FLOATS = ("F32", "BF16", "F16")


class Arithmetic(NamedTuple):
    """What becomes of every entry: one operation in float32, rounded to nearest even, then to the tensor's dtype.

    Attributes:
        operation: "times" and "over" multiply and divide, "plus" adds.
        operand: A number of float32.
    """

    operation: Literal["times", "over", "plus"]
    operand: float

    @property
    def undone(self) -> "Arithmetic":
        """The operation that gives entries back, as far as they were not rounded."""
        if self.operation == "plus":
            return Arithmetic("plus", -self.operand)
        return Arithmetic("over" if self.operation == "times" else "times", self.operand)

    @property
    def rounds(self) -> bool:
        """Whether it rounds ordinary entries: what multiplies by a power of two does not."""
        if self.operation == "plus":
            return False  # which is seen from entries alone
        mantissa, _ = frexp(self.operand)
        return not isfinite(self.operand) or abs(mantissa) != 0.5

    def of(self, entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The entries that come of it, in the same dtype."""
        wide, operand = entries.astype(np.float32), np.float32(self.operand)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.operation == "plus":
                found = wide + operand
            else:
                found = wide * operand if self.operation == "times" else wide / operand
            return found.astype(entries.dtype)


class Permuted(NamedTuple):
    """A tensor made of the entries of stored ones.

    Attributes:
        shape: Its own.
        dtype: Of all of them.
        fine: The same shape, with axes taken apart.
        strides: How many stored entries it is from one to the next along each of these; 0 where an axis chooses.
        places: The stored tensors, and which entry of each is the first; in row-major order of the axes that choose.
        choosing: Which of the fine axes choose among places.
        arithmetic: What becomes of every entry; None if nothing.
    """

    shape: tuple[int, ...]
    dtype: str
    fine: tuple[int, ...]
    strides: tuple[int, ...]
    places: tuple[tuple[str, int], ...]
    choosing: tuple[int, ...] = ()
    arithmetic: Arithmetic | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a byte range of one stored tensor."""
        return not self.choosing and self.arithmetic is None and in_order(self.fine, self.strides)


def permuted(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Permuted],
    *,
    rounded: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Checkpoint:
    """A checkpoint with tensors whose entries are its own in another order.

    Memory holds at most two pieces of 128 MiB beside what is read.

    Args:
        checkpoint: An open checkpoint, which the view closes.
        tensors: Every tensor of the view, by name.
        rounded: Whether entries may be rounded where a layout multiplies or adds to them.
        metadata: The texts of the view; the checkpoint's if None.

    Returns:
        The view; its location is the checkpoint's. Reading an entry that would be rounded is an error, unless it may.

    Raises:
        M3Error: A stored tensor is absent, of another dtype or too small; or a layout rounds, and may not.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from m3jax.checkpoints import ShardWriter, open_safetensors
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with ShardWriter(file, [TensorInfo("kernel", (2, 3), "U8")]) as shard:
        ...     shard.write("kernel", 0, np.uint8([[1, 2, 3], [4, 5, 6]]))
        ...     shard.finish()
        >>> turned, room = Permuted((3, 2), "U8", (3, 2), (1, 3), (("kernel", 0),)), np.empty((3, 2), np.uint8)
        >>> with permuted(open_safetensors(file), {"weight": turned}) as view:
        ...     view.read_into("weight", 0, room)
        ...     print(room.tolist())
        [[1, 4], [2, 5], [3, 6]]
    """
    return _Permuted(checkpoint, tensors, rounded, checkpoint.metadata if metadata is None else metadata)


class _Permuted(MakingView):
    """See `permuted`."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, Permuted], rounded: bool, metadata: Mapping[str, str]
    ) -> None:
        super().__init__(checkpoint)
        self.metadata = metadata
        self._permuted = dict(tensors)
        self._rounded = rounded
        self._slabs: OrderedDict[tuple[str, int], npt.NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()
        for name, tensor in self._permuted.items():
            self._check(name, tensor)
        self.tensors: Mapping[str, TensorInfo] = in_natural_order(
            {name: TensorInfo(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        )

    def _check(self, name: str, tensor: Permuted) -> None:
        stored = self._checkpoint.tensors
        reach = sum((size - 1) * stride for size, stride in zip(tensor.fine, tensor.strides, strict=True))
        for place, first in tensor.places:
            if place not in stored:
                raise M3Error(f"{self.location} has no {place!r}, of which {name!r} is to be made: check the names.")
            if stored[place].dtype != tensor.dtype:
                raise M3Error(
                    f"{self.location}: {place!r} is {stored[place].dtype}, but {name!r}, which is made of it, is to be"
                    f" {tensor.dtype}: convert all of them to one dtype first."
                )
            if prod(tensor.fine) and (first < 0 or first + reach >= stored[place].size):
                raise M3Error(f"{self.location}: {name!r} does not fit into {place!r}, of which it is to be made.")
        if prod(tensor.fine) != prod(tensor.shape) or len(tensor.places) != prod(
            tensor.fine[axis] for axis in tensor.choosing
        ):
            raise M3Error(f"{self.location}: {name!r} is not of as many entries as it is to be made of.")
        if tensor.arithmetic is None:
            return
        if tensor.dtype not in _FLOATS:
            raise M3Error(
                f"{self.location}: {name!r} is {tensor.dtype}, but its layout multiplies entries of"
                f" {', '.join(_FLOATS)} only: convert it to one of these first."
            )
        if tensor.arithmetic.rounds and not self._rounded:
            raise rounding(self.location, tensor.places[0][0], name, tensor.arithmetic)

    @property
    def sequential(self) -> bool:
        """Whether slabs are kept, as they always are; see `Sequential`."""
        return True

    def source_name(self, name: str) -> Stored:
        """Where a tensor's first entry is stored; see `Borrowing.source_name`."""
        if name not in self._permuted:
            raise M3Error(f"{self.location} has no tensor {name!r}: check the name.")
        return stored_at(self._checkpoint, self._permuted[name].places[0][0])

    def source_digests(self, name: str, digest: str) -> dict[str, str]:
        """The digests of the whole tensors that entries are of; see `stored_digests`."""
        tensor = self._permuted[name]
        stored = tensor.places[0][0]
        if tensor.is_plain and prod(tensor.shape) == self._checkpoint.tensors[stored].size:
            return stored_digests(self._checkpoint, stored, digest)
        return self._digests_of(place for place, _ in tensor.places)

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the tensor's little-endian bytes from `start` on; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        tensor = self._permuted[name]
        width = DTYPES[tensor.dtype].itemsize
        if tensor.is_plain:
            stored, first = tensor.places[0]
            if prod(tensor.shape) == self._checkpoint.tensors[stored].size:
                self._checkpoint.read_into(stored, start, view)  # whoever reads it hashes it
            else:
                self._read(stored, view, first * width + start)
            return
        slab, done = _SLAB // width * width, 0
        while done < len(view):
            number, skip = divmod(start + done, slab)
            made = self._slab(name, number)
            piece = made[skip : skip + len(view) - done]
            view[done : done + len(piece)] = piece.data
            done += len(piece)

    def _read(self, stored: str, out: memoryview, start: int) -> None:
        self._checkpoint.read_into(stored, start, out)
        self._passing.take(stored, start, out)

    def _slab(self, name: str, number: int) -> npt.NDArray[np.uint8]:
        """A piece of a tensor, in order; the last ones are kept."""
        with self._lock:
            made = self._slabs.pop((name, number), None)
            if made is None:
                while len(self._slabs) >= _KEPT:
                    self._slabs.popitem(last=False)
                made = self._made(name, number)
            self._slabs[name, number] = made
            return made

    def _made(self, name: str, number: int) -> npt.NDArray[np.uint8]:
        tensor = self._permuted[name]
        dtype = DTYPES[tensor.dtype]
        count = _SLAB // dtype.itemsize
        first = number * count
        last = min(first + count, prod(tensor.fine))
        entries, done = np.empty(last - first, f"u{dtype.itemsize}"), 0
        for origin, box in boxes(tensor.fine, first, last):
            self._fill(tensor, origin, entries[done : done + prod(box)].reshape(box))
            done += prod(box)
        if tensor.arithmetic is not None:
            entries = self._changed(name, entries.view(dtype), tensor.arithmetic)
        return entries.view(np.uint8)

    def _fill(self, tensor: Permuted, origin: tuple[int, ...], box: npt.NDArray[Any]) -> None:
        """Fills a box of a tensor, from its place `origin` on."""
        choosing = tensor.choosing
        walked = [stride for axis, stride in enumerate(tensor.strides) if axis not in choosing]
        inside = sum(place * stride for place, stride in zip(origin, tensor.strides, strict=True))
        for index in np.ndindex(*(box.shape[axis] for axis in choosing)):
            chosen = [origin[axis] + at for axis, at in zip(choosing, index, strict=True)]
            number = 0
            for axis, at in zip(choosing, chosen, strict=True):
                number = number * tensor.fine[axis] + at
            stored, start = tensor.places[number]
            own: list[int | slice] = [slice(None)] * box.ndim
            for axis, at in zip(choosing, index, strict=True):
                own[axis] = at
            fill_box(partial(self._read, stored), box[tuple(own)], tuple(walked), start + inside)

    def _changed(self, name: str, entries: npt.NDArray[Any], arithmetic: Arithmetic) -> npt.NDArray[Any]:
        found = arithmetic.of(entries)
        if not self._rounded:
            kind = np.dtype(f"u{entries.dtype.itemsize}")
            back = arithmetic.undone.of(found).view(kind)
            if not np.array_equal(back, entries.view(kind)):
                raise rounding(self.location, self._permuted[name].places[0][0], name, arithmetic)
        return found


def rounding(location: str, stored: str, name: str, arithmetic: Arithmetic) -> M3Error:
    """The error of a layout that would round entries."""
    said = {"times": "multiplies by", "over": "divides by", "plus": "adds"}[arithmetic.operation]
    return M3Error(
        f"{location}: as {name}, {stored} {said} {arithmetic.operand:.9g}, by which entries are rounded: convert the"
        " model with --rounded to have each rounded once, to nearest even, or keep it as it is stored"
    )
