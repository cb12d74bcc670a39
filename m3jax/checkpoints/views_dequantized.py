"""A checkpoint of scaled float8 numbers seen as the numbers that they stand for, by byte range and without copies.

A number is its float8 times its scale, in float32 with one rounding, as the quantisers mean it: of DeepSeek-V3's
`weight_scale_inv` too, which is the inverse of what weights were divided by. Scales are small and held a few at a time.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from math import prod
from typing import Any, NamedTuple, TypeAlias

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

Floats: TypeAlias = npt.NDArray[np.float32]

_AT_ONCE = 2**18  # entries, so that what is made on the way stays in the processor's cache
_SCALES_KEPT = 16  # of tensors that several threads read by turns


class Scaling(NamedTuple):
    """What the numbers of one tensor are to be multiplied by.

    Attributes:
        name: The tensor that holds the scales: floats, or exponents in one byte (F8_E8M0, U8).
        shape: Of the scales, with as many axes as the tensor that they are of.
        block: How many entries share a scale, along each axis.
    """

    name: str
    shape: tuple[int, ...]
    block: tuple[int, ...]


def dequantized(
    checkpoint: Checkpoint, scalings: Mapping[str, Scaling], dropped: Collection[str] = (), dtype: str = "F32"
) -> Checkpoint:
    """A checkpoint whose float8 tensors are seen as numbers, and their scales not at all.

    Args:
        checkpoint: An open checkpoint, which the view closes.
        scalings: What float8 tensors are multiplied by, by their names.
        dropped: Other tensors that are not seen, such as scales of activations.
        dtype: What the numbers are rounded to, nearest even: F32, in which products are exact to one rounding, BF16 or
            F16.

    Returns:
        The view; its location is the checkpoint's.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import ml_dtypes
        >>> from m3jax.checkpoints import ShardWriter, open_safetensors
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> infos = [TensorInfo("w", (2,), "F8_E4M3"), TensorInfo("w_scale", (1,), "F32")]
        >>> with ShardWriter(file, infos) as shard:
        ...     shard.write("w", 0, np.array([1, 448], ml_dtypes.float8_e4m3fn))
        ...     shard.write("w_scale", 0, np.float32([0.5]))
        ...     shard.finish()
        >>> numbers = np.empty(2, np.float32)
        >>> with dequantized(open_safetensors(file), {"w": Scaling("w_scale", (1,), (2,))}) as view:
        ...     view.read_into("w", 0, numbers.view(np.uint8))
        ...     print(view.tensors, numbers)
        {'w': TensorInfo(name='w', shape=(2,), dtype='F32')} [  0.5 224. ]
    """
    return _Dequantized(checkpoint, scalings, dropped, dtype)


class _Dequantized(MakingView):
    """See `dequantized`."""

    def __init__(
        self, checkpoint: Checkpoint, scalings: Mapping[str, Scaling], dropped: Collection[str], dtype: str
    ) -> None:
        super().__init__(checkpoint)
        hidden = {*dropped, *(scaling.name for scaling in scalings.values())}
        self._scalings = dict(scalings)
        self._kept: OrderedDict[str, Floats] = OrderedDict()
        self._lock = threading.Lock()
        self.tensors: Mapping[str, TensorInfo] = in_natural_order(
            {
                name: info._replace(dtype=dtype) if name in scalings else info
                for name, info in checkpoint.tensors.items()
                if name not in hidden
            }
        )

    def source_name(self, name: str) -> Stored:
        """Where the float8 numbers are stored; see `Borrowing.source_name`."""
        if name not in self.tensors:
            raise M3Error(f"{self.location} has no tensor {name!r}: check the name.")
        return stored_at(self._checkpoint, name)

    def source_digests(self, name: str, digest: str) -> dict[str, str]:
        """The digests of float8 numbers and their scales; see `stored_digests`."""
        if name not in self._scalings:
            return stored_digests(self._checkpoint, name, digest)
        return self._digests_of((name, self._scalings[name].name))

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the little-endian bytes of a tensor's numbers; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        if name not in self._scalings:
            self._checkpoint.read_into(name, start, view)
            return
        dtype = DTYPES[self.tensors[name].dtype]
        first, last = start // dtype.itemsize, -(-(start + len(view)) // dtype.itemsize)
        room = np.frombuffer(view, np.uint8)
        for begin in range(first, last, _AT_ONCE):
            end = min(begin + _AT_ONCE, last)
            raw = self._numbers(name, begin, end, dtype).view(np.uint8)
            at = begin * dtype.itemsize - start  # a range may begin and end inside a number
            room[max(at, 0) : at + len(raw)] = raw[max(-at, 0) : len(room) - at]

    def _numbers(self, name: str, begin: int, end: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Entries of a tensor, as `dtype`."""
        info, scaling = self._checkpoint.tensors[name], self._scalings[name]
        stored = np.empty(end - begin, np.uint8)
        self._checkpoint.read_into(name, begin, stored)
        self._passing.take(name, begin, stored)
        table = _values_of(info.dtype)
        numbers = table[stored]
        scales = self._scales(scaling)
        with np.errstate(over="ignore", invalid="ignore"):
            for here, rows, factors in _factors(scales, scaling, info.shape, begin, end):
                part = numbers[here].reshape(rows, -1)
                part *= factors
            rounded = numbers.astype(dtype, copy=False)
        if not np.isfinite(rounded).all() and not np.isfinite(rounded[np.isfinite(table[stored])]).all():
            raise M3Error(
                f"{self.location}: {name} times its scales is beyond {dtype.name}: take a wider dtype, or get the model"
                " again."
            )
        return rounded

    def _scales(self, scaling: Scaling) -> Floats:
        """Scales as rows (float32[rows, columns]), read once as long as they are in use."""
        with self._lock:
            if scaling.name not in self._kept:
                self._kept[scaling.name] = self._read_scales(scaling)
                if len(self._kept) > _SCALES_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(scaling.name)
            return self._kept[scaling.name]

    def _read_scales(self, scaling: Scaling) -> Floats:
        info = self._checkpoint.tensors[scaling.name]
        stored = np.empty(info.nbytes, np.uint8)
        self._checkpoint.read_into(scaling.name, 0, stored)
        self._passing.take(scaling.name, 0, stored)
        exponents = info.dtype in {"U8", "F8_E8M0"}
        scales = stored.view(DTYPES["F8_E8M0" if exponents else info.dtype]).astype(np.float32)
        if not np.isfinite(scales).all():
            raise M3Error(f"{self.location}: {scaling.name} holds scales that are no numbers: get the model again.")
        return scales.reshape(-1, scaling.shape[-1] if scaling.shape else 1)


@cache
def _values_of(dtype: str) -> Floats:
    """What each of the 256 float8 numbers is (float32[256])."""
    return np.arange(256, dtype=np.uint8).view(DTYPES[dtype]).astype(np.float32)


def _factors(
    scales: Floats, scaling: Scaling, shape: tuple[int, ...], begin: int, end: int
) -> Iterator[tuple[slice, int, Floats]]:
    """The scales of entries: for parts of rows and for whole rows, where they are and what they are multiplied by.

    Args:
        scales: float32[rows, columns].
        scaling: How they lie on the tensor.
        shape: The tensor's.
        begin: The first entry.
        end: The one after the last.

    Yields:
        A slice of the entries, counted from `begin`, in how many rows they lie, and factors that spread over these
        rows (float32[rows or 1, columns or 1]).
    """
    width = shape[-1] if shape else 1
    at = begin
    while at < end:
        row, column = divmod(at, width)
        whole = 0 if column else (end - at) // width
        stop = at + whole * width if whole else min(end, (row + 1) * width)
        rows = max(whole, 1)
        which = _rows_of_scales(scaling, shape, row, rows)
        picked = scales[which[:1] if which[0] == which[-1] else which]  # rows of scales come in order
        yield slice(at - begin, stop - begin), rows, _spread(picked, scaling, column, column + min(stop - at, width))
        at = stop


def _rows_of_scales(scaling: Scaling, shape: tuple[int, ...], row: int, count: int) -> npt.NDArray[np.intp]:
    """Which row of scales each of some rows of a tensor has."""
    rows = np.arange(row, row + count)
    found = np.zeros(count, np.intp)
    for axis, length in enumerate(shape[:-1]):
        index = rows // prod(shape[axis + 1 : -1]) % length
        found = found * scaling.shape[axis] + index // scaling.block[axis]
    return found


def _spread(picked: Floats, scaling: Scaling, first: int, last: int) -> Floats:
    """The factors of columns, from the scales of their rows."""
    if picked.shape[1] == 1:
        return picked
    block = scaling.block[-1]
    begun = first // block
    spread = np.repeat(picked[:, begun : -(-last // block)], block, axis=1)
    return spread[:, first - begun * block : last - begun * block]
