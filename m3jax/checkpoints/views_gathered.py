"""A checkpoint seen with other rows along an axis of its tensors: its own in another order, and rows that others lend.

Rows are read by byte range where they are long, and whole lines of an axis that comes last where they are not. Means
are exact sums rounded once (`arithmetic.means`): of few rows as they are read, of all rows of a tensor at first use.
"""

import threading
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from m3jax.arithmetic.means import AxisSums, mean_of
from m3jax.checkpoints.protocol import DTYPES, Checkpoint, TensorInfo, in_natural_order, room_for
from m3jax.checkpoints.views import MakingView, Stored, stored_at, stored_digests
from m3jax.errors import M3Error

Rows: TypeAlias = npt.NDArray[np.int64]
Entries: TypeAlias = npt.NDArray[Any]

_AT_ONCE = 2**18  # entries, so that what is made on the way stays in the processor's cache
_LONG = 2**9  # bytes of a row that is worth a read of its own
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class RowsOf(NamedTuple):
    """Rows of a tensor, wherever it is.

    Attributes:
        checkpoint: Which has it, open as long as the view is read.
        name: The tensor.
        axis: Along which it has rows.
        rows: Which of them; None for the mean of all rows, as often as it is wanted.
    """

    checkpoint: Checkpoint
    name: str
    axis: int
    rows: Rows | None


class Lent(NamedTuple):
    """Rows of a view that are not the tensor's own.

    Attributes:
        at: Which they are, ascending.
        sources: What they are: of several the mean, of none zeros.
    """

    at: Rows
    sources: tuple[RowsOf, ...]


class Gathering(NamedTuple):
    """The rows of one tensor of a view.

    Attributes:
        axis: Along which there are rows.
        rows: For each, which of the tensor's own it is; -1 where it is lent.
        lent: Those that are, each once.
    """

    axis: int
    rows: Rows
    lent: tuple[Lent, ...] = ()


def gathered(checkpoint: Checkpoint, gatherings: Mapping[str, Gathering]) -> Checkpoint:
    """A checkpoint some of whose tensors have other rows.

    Args:
        checkpoint: An open checkpoint, which the view closes; those of lenders it does not close.
        gatherings: The rows of tensors, by name; all others stay as they are.

    Returns:
        The view; its location is the checkpoint's.

    Raises:
        M3Error: A tensor or a row is absent, rows differ in length, or such numbers have no mean.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from m3jax.checkpoints import ShardWriter, open_safetensors
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with ShardWriter(file, [TensorInfo("w", (2, 2), "F32")]) as shard:
        ...     shard.write("w", 0, np.float32([[1, 2], [3, 6]]))
        ...     shard.finish()
        >>> stored, room = open_safetensors(file), np.empty((3, 2), np.float32)
        >>> mean = Lent(np.array([1]), (RowsOf(stored, "w", 0, None),))
        >>> with gathered(stored, {"w": Gathering(0, np.array([1, -1, 0]), (mean,))}) as view:
        ...     view.read_into("w", 0, room.reshape(-1).view(np.uint8))
        ...     print(room.tolist())
        [[3.0, 6.0], [2.0, 4.0], [1.0, 2.0]]
    """
    return _Gathered(checkpoint, gatherings)


class _Gathered(MakingView):
    """See `gathered`."""

    def __init__(self, checkpoint: Checkpoint, gatherings: Mapping[str, Gathering]) -> None:
        super().__init__(checkpoint)
        self._gatherings = dict(gatherings)
        self._means: dict[tuple[int, str], Entries] = {}
        self._lock = threading.Lock()
        for name, gathering in gatherings.items():
            _check(checkpoint, name, gathering)
        self.tensors: Mapping[str, TensorInfo] = in_natural_order(
            {
                name: _with_rows(info, gatherings[name]) if name in gatherings else info
                for name, info in checkpoint.tensors.items()
            }
        )

    def source_name(self, name: str) -> Stored:
        """Where the tensor's own rows are stored; see `Borrowing.source_name`."""
        if name not in self.tensors:
            raise M3Error(f"{self.location} has no tensor {name!r}: check the name.")
        return stored_at(self._checkpoint, name)

    def source_digests(self, name: str, digest: str) -> dict[str, str]:
        """The digests of the whole tensors that the tensor's own rows are of; see `stored_digests`."""
        if name not in self._gatherings:
            return stored_digests(self._checkpoint, name, digest)
        return self._digests_of((name,))

    def lenders(self, name: str) -> tuple[tuple[Checkpoint, str], ...]:
        """See `Lending.lenders`."""
        gathering = self._gatherings.get(name)
        sources = (source for lent in gathering.lent for source in lent.sources) if gathering is not None else ()
        found = {(id(source.checkpoint), source.name): (source.checkpoint, source.name) for source in sources}
        return tuple(found.values())

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with bytes of rows, one after the other; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        if name not in self._gatherings:
            self._checkpoint.read_into(name, start, view)
            return
        width = DTYPES[self.tensors[name].dtype].itemsize
        first, last = start // width, -(-(start + len(view)) // width)
        room = np.frombuffer(view, np.uint8)
        for begin, entries in self._pieces(name, first, last):
            raw = np.ascontiguousarray(entries).reshape(-1).view(np.uint8)
            at = begin * width - start  # a range may begin and end inside a number
            room[max(at, 0) : at + len(raw)] = raw[max(-at, 0) : len(room) - at]

    def _pieces(self, name: str, first: int, last: int) -> Iterator[tuple[int, Entries]]:
        """Runs of a tensor's entries, each with the first of it."""
        gathering, info = self._gatherings[name], self.tensors[name]
        inner = max(prod(info.shape[gathering.axis + 1 :]), 1)
        line = len(gathering.rows) * inner
        longest = max(line, self._checkpoint.tensors[name].shape[gathering.axis] * inner)
        at = first
        while at < last:
            outer, inside = divmod(at, line)
            whole = 0 if inside else min((last - at) // line, _AT_ONCE // longest)
            if whole:
                yield at, self._block(name, outer, outer + whole, 0, len(gathering.rows))
                at += whole * line
                continue
            row = inside // inner
            stop = min(last - outer * line, line, row * inner + max(_AT_ONCE, inner))
            rows = self._block(name, outer, outer + 1, row, -(-stop // inner)).reshape(-1)
            yield at, rows[inside - row * inner : stop - row * inner]
            at = outer * line + stop

    def _block(self, name: str, outer: int, end: int, first: int, last: int) -> Entries:
        """Rows `first` to `last` of the lines `outer` to `end`: `[lines, rows, inner]`."""
        gathering, info = self._gatherings[name], self._checkpoint.tensors[name]
        rows = gathering.rows[first:last]
        own = rows >= 0
        source = RowsOf(self._checkpoint, name, gathering.axis, rows[own])
        read = _read_rows(source, outer, end, self._passing.take)
        if own.all():
            return read
        block = np.empty((end - outer, len(rows), read.shape[2]), read.dtype)
        places = np.flatnonzero(own)
        for begin, stop in _runs(places):
            block[:, places[begin] : places[begin] + stop - begin] = read[:, begin:stop]
        for lent in gathering.lent:
            begin, stop = np.searchsorted(lent.at, (first, last))
            if begin < stop:
                block[:, lent.at[begin:stop] - first] = self._lent(lent, info, slice(begin, stop), slice(outer, end))
        return block

    def _lent(self, lent: Lent, info: TensorInfo, which: slice, lines: slice) -> Entries:
        """Some rows that others lend: `[lines, rows, inner]`."""
        dtype = DTYPES[info.dtype]
        if not lent.sources:
            return np.zeros((1, 1, 1), dtype)
        if lent.sources[0].rows is None:
            return self._mean(lent.sources[0], info)[lines, None]
        read = [
            _read_rows(each._replace(rows=each.rows[which]), lines.start, lines.stop)
            for each in lent.sources
            if each.rows is not None
        ]
        if len(read) == 1 and read[0].dtype == dtype:
            return read[0]
        try:
            return mean_of(read, _FLOATS[info.dtype])
        except ValueError:
            raise M3Error(
                f"{self.location}: rows of {info.name} that other models lend hold NaN or infinite entries, which have"
                " no mean: mend the models, or say where the rows come from by `tokenizer: {tokens: …}`."
            ) from None

    def _mean(self, source: RowsOf, info: TensorInfo) -> Entries:
        """The mean of all rows of a tensor, `[outer, inner]`, which is made once."""
        key = id(source.checkpoint), source.name
        with self._lock:
            if key not in self._means:
                self._means[key] = _mean_of_all(source, _FLOATS[info.dtype])
            return self._means[key]


def _with_rows(info: TensorInfo, gathering: Gathering) -> TensorInfo:
    """What a tensor is with other rows."""
    axis = gathering.axis
    return info._replace(shape=(*info.shape[:axis], len(gathering.rows), *info.shape[axis + 1 :]))


def _check(checkpoint: Checkpoint, name: str, gathering: Gathering) -> None:
    """Raise M3Error if rows cannot be gathered as asked for."""
    info = checkpoint.tensors.get(name)
    if info is None:
        raise M3Error(f"{checkpoint.location} has no tensor {name!r}: check the name.")
    lent = np.sort(np.concatenate([np.empty(0, np.int64), *(each.at for each in gathering.lent)]))
    if not np.array_equal(lent, np.flatnonzero(gathering.rows < 0)):
        raise ValueError(f"the rows of {name} that are not its own are not each lent once")
    own = RowsOf(checkpoint, name, gathering.axis, gathering.rows[gathering.rows >= 0])
    for source in (own, *(source for each in gathering.lent for source in each.sources)):
        other = source.checkpoint.tensors.get(source.name)
        if other is None:
            raise M3Error(f"{source.checkpoint.location} has no tensor {source.name!r}: check the name.")
        if _around(other, source.axis) != _around(info, gathering.axis):
            raise M3Error(
                f"{name}: is {list(info.shape)} in {checkpoint.location} but {list(other.shape)} in"
                f" {source.checkpoint.location}, so that neither can lend the other a row: take models of one width."
            )
        if source.rows is not None and source.rows.max(initial=-1) >= other.shape[source.axis]:
            raise M3Error(
                f"{source.checkpoint.location}: {source.name} has no row {source.rows.max()}: check the model."
            )
    if gathering.lent and info.dtype not in _FLOATS:
        raise M3Error(
            f"{checkpoint.location}: {name} is {info.dtype}, to which no row can be added: take it as floats."
        )


def _around(info: TensorInfo, axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A tensor's shape before and behind an axis."""
    return info.shape[:axis], info.shape[axis + 1 :]


def _ignore(name: str, start: int, data: Entries) -> None:
    """What becomes of bytes that need no digest."""


def _read_rows(source: RowsOf, outer: int, end: int, take: Any = _ignore) -> Entries:
    """Rows of some lines of a stored tensor: `[lines, rows, inner]`.

    Args:
        source: The rows.
        outer: The first line.
        end: The one after the last.
        take: Is shown what is read.
    """
    assert source.rows is not None
    info = source.checkpoint.tensors[source.name]
    count, inner = info.shape[source.axis], prod(info.shape[source.axis + 1 :])
    dtype = DTYPES[info.dtype]

    def read(line: int, row: int, out: Entries) -> None:
        start = (line * count + row) * inner * dtype.itemsize
        raw = out.reshape(-1).view(np.uint8)
        source.checkpoint.read_into(source.name, start, raw)
        take(source.name, start, raw)

    found = np.empty((end - outer, len(source.rows), inner), dtype)
    if not found.size:
        return found
    low, high = int(source.rows.min()), int(source.rows.max()) + 1
    if inner * dtype.itemsize >= _LONG:
        for begin, stop in _runs(source.rows):
            for line in range(outer, end):
                read(line, int(source.rows[begin]), found[line - outer, begin:stop])
        return found
    if end - outer > 1:  # short lines, one after the other
        lines = np.empty((end - outer, count, inner), dtype)
        read(outer, 0, lines)
        return _picked(lines, source.rows)
    return _from_line(source.rows, low, high, _AT_ONCE // inner, lambda row, out: read(outer, row, out), found)


def _from_line(rows: Rows, low: int, high: int, most: int, read: Any, found: Entries) -> Entries:
    """Short rows of one line, from stretches of it that are read one after the other."""
    for begin in range(low, high, most):
        stop = min(begin + most, high)
        inside = (rows >= begin) & (rows < stop)
        if inside.any():
            stretch = np.empty((1, stop - begin, found.shape[2]), found.dtype)
            read(begin, stretch)
            picked = _picked(stretch, rows[inside] - begin)
            if len(picked[0]) == len(rows):
                return picked
            found[:, inside] = picked
    return found


def _picked(lines: Entries, rows: Rows) -> Entries:
    """Rows of lines that are in memory; a run of them is no copy."""
    first = int(rows[0])
    if rows[-1] - first == len(rows) - 1 and (np.diff(rows) == 1).all():
        return lines[:, first : first + len(rows)]
    return lines.take(rows, axis=1)


def _runs(numbers: Rows) -> Iterator[tuple[int, int]]:
    """Where numbers rise by one: each run's place and the one after it."""
    breaks = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    if len(numbers):
        yield from zip([0, *breaks], [*breaks, len(numbers)], strict=True)


def _mean_of_all(source: RowsOf, dtype: str) -> Entries:
    """The mean of all rows of a tensor, `[outer, inner]`."""
    info, axis = source.checkpoint.tensors[source.name], source.axis
    outer, count, inner = prod(info.shape[:axis]), info.shape[axis], prod(info.shape[axis + 1 :])
    sums = AxisSums((outer, inner))
    lines, rows = max(_AT_ONCE // max(count * inner, 1), 1), max(_AT_ONCE // max(inner, 1), 1)
    try:
        for line in range(0, outer, lines):
            end = min(line + lines, outer)
            for row in range(0, count, rows if lines == 1 else count):
                some = np.arange(row, min(row + rows, count) if lines == 1 else count)
                sums.add(_read_rows(source._replace(rows=some), line, end), line)
    except ValueError:
        raise M3Error(
            f"{source.checkpoint.location}: {source.name} holds NaN or infinite entries, so that a token which no model"
            " has cannot be given the mean of all: mend the model, or say by `tokenizer: {tokens: …}` where its row is."
        ) from None
    return sums.means(dtype)
