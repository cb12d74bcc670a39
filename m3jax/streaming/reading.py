"""Reading ahead: the chunks of several checkpoints, in a given order, hashed and checked on the way."""

import functools
import itertools
import math
import queue
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from m3jax.checkpoints import DTYPES, Checkpoint, TensorDigest, TensorInfo
from m3jax.errors import M3Error
from m3jax.streaming.lanes import start_threads
from m3jax.streaming.plan import MergePlan, TensorPlan, row_size

_AHEAD = 2  # chunks that each input may be read ahead
_IN_FLIGHT = 4  # chunks that may be computed or written while their buffers are still in use
_MOST_SPARE = 2  # chunks of buffers that are kept beside one of a size that was not there yet
_ALIGNMENT = 64  # bytes: below this alignment XLA copies host arrays
_POLL_SECONDS = 0.2
_BUFFER_BYTES = 160_000_000
_LONGEST_SLICE = 4  # in chunks: longer slices through all blocks are read block by block
CACHED_BYTES = 2**20
"""A piece that is read or written, hashed and checked while it is in the processor's cache."""

HELD_BYTES = 96 * 2**20
"""What is kept in memory of a tensor while it is gone over several times, so that it is read once."""

# By dtype: an unsigned and a signed word, and the bits of infinity. NaN and infinity are the largest of their sign: as
# signed words the positive ones, as unsigned words the negative ones.
_WORDS = {
    "BF16": (np.uint16, np.int16, 0x7F80),
    "F16": (np.uint16, np.int16, 0x7C00),
    "F32": (np.uint32, np.int32, 0x7F800000),
}


class Visit(NamedTuple):
    """One chunk at one stage of a merge.

    Attributes:
        stage: Any label; the consumer knows what to do there.
        plan: The tensor.
        start: First entry.
        size: Number of entries.
        padded: Entries of the arrays handed out, at least `size`; what is beyond `size` is arbitrary.
        first_reading: Whether the tensor is read for the first time, and so checked.
        whole: Whether the stage reads all of the tensor, and so hashes it.
        last: Whether it is the tensor's last chunk at this stage.
        block: Which block of the tensor the chunk is of; None if it has entries of all that the tensor stacks.
    """

    stage: Any
    plan: TensorPlan
    start: int
    size: int
    padded: int
    first_reading: bool
    whole: bool
    last: bool
    block: int | None = 0


def padded_size(size: int, chunk_entries: int, multiple: int = 1) -> int:
    """The smallest of few sizes that holds `size` entries, so that few shapes are compiled.

    Args:
        size: At most `chunk_entries`.
        chunk_entries: The largest of the sizes.
        multiple: What the sizes are rounded up to multiples of, so that as many devices can share a chunk.
    """
    sizes = (2**12, 2**16, chunk_entries // 4, chunk_entries // 2, chunk_entries)
    return -(-min(s for s in sizes if size <= s <= chunk_entries) // multiple) * multiple


def padded_rows(rows: int, most: int, multiple: int = 1) -> int:
    """`padded_size` in rows: a power of two, or as many as a chunk has.

    Args:
        rows: At most `most`.
        most: Of a chunk.
        multiple: What they are rounded up to a multiple of.
    """
    return -(-min(1 << max(rows - 1, 0).bit_length(), most) // multiple) * multiple


def slice_of(plan: TensorPlan) -> int:
    """Entries of a slice through all blocks that a tensor stacks along a later axis than the first."""
    return math.prod(plan.output.shape[plan.axis :])


def inside_of(plan: TensorPlan) -> int:
    """Entries of one block that lie together in a tensor that stacks blocks: behind the axis of blocks."""
    return math.prod(plan.output.shape[(plan.axis or 0) + 1 :])


def _in_slices(plan: TensorPlan, chunk_entries: int) -> bool:
    """Whether a tensor is read in slices through all blocks that it stacks: on a later axis, and not too far apart."""
    return bool(plan.axis) and plan.pipeline is not None and slice_of(plan) <= _LONGEST_SLICE * chunk_entries


def unit_of(plan: TensorPlan, chunk_entries: int) -> int:
    """Entries that a chunk of a tensor must have together: one, a row, or slices through all blocks that it stacks.

    Args:
        plan: The tensor.
        chunk_entries: Of the largest chunk.
    """
    if plan.pipeline is None:
        return 1
    if plan.matrices is not None and plan.matrices.first:  # a row of what is worked on has entries of all of it
        return math.prod(plan.block_shape)
    row = row_size(plan) if plan.pipeline.rows else 1
    if not _in_slices(plan, chunk_entries):
        return row
    return slice_of(plan) * (row // math.gcd(row, max(inside_of(plan), 1)))


def _stretches(plan: TensorPlan, start: int, stop: int, chunk_entries: int) -> Iterator[tuple[int, int, int | None]]:
    """Runs of entries that chunks do not leave, each with its block; None where they have entries of all blocks."""
    if plan.axis is None or plan.pipeline is None or _in_slices(plan, chunk_entries):
        yield start, stop, None if plan.axis and plan.pipeline is not None else 0
        return
    size = max(inside_of(plan), 1)
    for run in range(start // size, -(-stop // size)):
        yield max(start, run * size), min(stop, (run + 1) * size), run % len(plan.blocks)


def visits(
    stage: Any,
    plan: TensorPlan,
    chunk_entries: int,
    first_reading: bool,
    start: int = 0,
    stop: int | None = None,
    multiple: int = 1,
) -> Iterator[Visit]:
    """The chunks of one tensor (or of a part of it) at one stage; a tensor without entries has one empty chunk."""
    whole = stop is None
    stop = plan.output.size if stop is None else stop
    if plan.pipeline is None:  # copied: wide entries take no more memory than bfloat16's
        chunk_entries = chunk_entries * 2 // max(2, DTYPES[plan.output.dtype].itemsize)
    unit = max(unit_of(plan, chunk_entries), 1)
    chunk = max(chunk_entries // unit, 1) * unit  # whole units, however long they are
    for first, end, block in _stretches(plan, start, stop, chunk_entries) if stop > start else ((start, stop, 0),):
        for begin in range(first, max(end, first + 1), chunk):
            size = min(chunk, end - begin)
            if plan.pipeline is None:
                padded = size
            elif unit > 1:
                padded = padded_rows(size // unit, chunk // unit, multiple) * unit
            else:
                padded = padded_size(size, chunk_entries, multiple)
            yield Visit(stage, plan, begin, size, padded, first_reading, whole, begin + size == stop, block)


def _aligned_empty(nbytes: int) -> np.ndarray:
    whole = np.empty(nbytes + _ALIGNMENT, np.uint8)
    skip = -whole.ctypes.data % _ALIGNMENT
    return whole[skip : skip + nbytes]


def check_finite(raw: np.ndarray, dtype: str, say: Callable[[], str]) -> None:
    """Raise M3Error with the sentence `say` makes if little-endian floats (uint8[bytes]) hold a NaN or an infinity."""
    if dtype not in _WORDS or not raw.size:
        return
    unsigned, signed, infinity = _WORDS[dtype]
    sign = 1 << (8 * np.dtype(unsigned).itemsize - 1)
    for start in range(0, raw.size, CACHED_BYTES):
        piece = raw[start : start + CACHED_BYTES]
        if piece.view(signed).max() >= infinity or piece.view(unsigned).max() >= sign | infinity:
            raise M3Error(say())


def check_statistics(raw: np.ndarray, dtype: str, say: Callable[[], str]) -> None:
    """Raise M3Error with the sentence `say` makes if little-endian floats (uint8[bytes]) are not finite and from 0."""
    if not raw.size:
        return
    unsigned, signed, infinity = _WORDS[dtype]
    sign = 1 << (8 * np.dtype(unsigned).itemsize - 1)  # alone it is a zero
    if raw.view(signed).max() >= infinity or raw.view(unsigned).max() > sign:
        raise M3Error(say())


class Hold(NamedTuple):
    """What is kept of a chunk between the stages of its tensor, so that it is read once.

    Attributes:
        kept: A later visit needs its buffers.
        again: An earlier visit has filled them.
        all: The whole tensor is kept, and so hashed once; else each stage hashes all of it, to see whether it changed.
    """

    kept: bool = False
    again: bool = False
    all: bool = False


class Loaded(NamedTuple):
    """A visit with what was read for it.

    Attributes:
        visit: The visit.
        arrays: For each source of the visit's plan a flat array of `padded` entries in the tensor's dtype there, in
            `buffers` or on devices.
        buffers: The memory that the arrays were read into.
        hold: What is kept of it.
    """

    visit: Visit
    arrays: tuple[Any, ...]
    buffers: tuple[np.ndarray, ...]
    hold: Hold = Hold()


def held_chunks(chunks: Sequence[Visit], entry_bytes: int) -> int:
    """How many of a tensor's chunks, the first ones, are kept while it is gone over several times.

    Args:
        chunks: All, of one stage.
        entry_bytes: Of an entry in all sources.
    """
    sizes = itertools.accumulate(chunk.padded * entry_bytes for chunk in chunks)
    return sum(size <= HELD_BYTES for size in sizes)


def holds_of(schedule: Sequence[Visit], entry_bytes: Callable[[TensorPlan], int]) -> list[Hold]:
    """For each visit what is kept of its chunk.

    Args:
        schedule: Visits in order.
        entry_bytes: Of an entry of a tensor in all its sources.
    """
    holds: list[Hold] = []
    for _, group in itertools.groupby(schedule, key=lambda visit: id(visit.plan)):
        own = list(group)
        stages = [list(visits) for _, visits in itertools.groupby(own, key=lambda visit: visit.stage)]
        alone = len(stages) == 1 or not all(visit.whole for visit in own)
        count = 0 if alone else held_chunks(stages[0], entry_bytes(own[0].plan))
        for number, chunks in enumerate(stages):
            held = Hold(number + 1 < len(stages), number > 0, count == len(chunks))
            holds += [held if place < count else Hold() for place in range(len(chunks))]
    return holds


def default_chunk_entries(inputs: int, width: int) -> int:
    """The largest chunk, up to 2²¹ entries, whose buffers for all inputs stay within 160 MB.

    Args:
        inputs: How many are read.
        width: Bytes of an entry of the widest tensor that is merged.
    """
    entries = 2**21
    while entries > 2**16 and inputs * width * entries * (_AHEAD + _IN_FLIGHT) > _BUFFER_BYTES:
        entries //= 2
    return entries


def chunk_size(entries: int | None, plan: MergePlan, checkpoints: Sequence[Checkpoint], lanes: int = 1) -> int:
    """Entries of the largest chunk: as asked for, or as many as keep buffers small.

    Args:
        entries: As asked for.
        plan: Of the merge.
        checkpoints: The inputs, in the plan's order.
        lanes: How often there are such buffers.

    Raises:
        M3Error: What is asked for is no such number.
    """
    if entries is None:
        return default_chunk_entries(len(checkpoints) * lanes, widest_entry(plan, checkpoints))
    return checked_chunk_entries(entries)


def checked_chunk_entries(entries: int) -> int:
    """Entries of the largest chunk, as asked for.

    Raises:
        M3Error: They are no power of two, or too few.
    """
    if not isinstance(entries, int) or entries < 2**16 or entries & (entries - 1):
        raise M3Error(f"chunk entries are {entries!r}, but must be a power of two of at least 65536")
    return entries


def widest_entry(plan: MergePlan, checkpoints: Sequence[Checkpoint]) -> int:
    """Bytes of an entry of the widest tensor that is merged."""
    merged = [(tensor, p) for tensor in plan.tensors if tensor.pipeline is not None for p in tensor.sources]
    infos = [checkpoints[position].tensors[tensor.output.name] for tensor, position in merged]
    return max((DTYPES[info.dtype].itemsize for info in infos), default=2)


def held_bytes(plan: TensorPlan, checkpoints: Sequence[Checkpoint], chunk_entries: int) -> int:
    """Bytes of a tensor's sources that are read once however often the tensor is gone over."""
    chunks = list(visits(None, plan, chunk_entries, False))
    width = _entry_bytes(checkpoints, plan)
    return width * sum(chunk.size for chunk in chunks[: held_chunks(chunks, width)])


def _entry_bytes(checkpoints: Mapping[int, Checkpoint] | Sequence[Checkpoint], plan: TensorPlan) -> int:
    """Bytes of an entry of a tensor in all its sources."""
    return sum(DTYPES[checkpoints[p].tensors[plan.output.name].dtype].itemsize for p in plan.sources)


class _Lane:
    """One input's thread, its queue of read chunks and its pool of buffers."""

    def __init__(self, checkpoint: Checkpoint, chunk_bytes: int, most_held: int) -> None:
        self.checkpoint = checkpoint
        self.ready: queue.Queue[np.ndarray | BaseException] = queue.Queue(_AHEAD)
        self.free: queue.Queue[None] = queue.Queue()  # one for each chunk that may be read
        self._spare: defaultdict[int, list[np.ndarray]] = defaultdict(list)  # by size, the last used at the end
        self._lock = threading.Lock()
        self.chunk_bytes = chunk_bytes
        self.held: deque[np.ndarray] = deque()  # in the order of chunks, which every stage goes through
        for _ in range(_AHEAD + _IN_FLIGHT + most_held):
            self.free.put(None)

    def buffer(self, size: int) -> np.ndarray:
        """A buffer of so many bytes, which another chunk was in if there is one."""
        with self._lock:
            if self._spare[size]:
                return self._spare[size].pop()
            if sum(own * len(buffers) for own, buffers in self._spare.items()) > _MOST_SPARE * self.chunk_bytes:
                self._spare.clear()  # of other sizes, which may not come again
        return _aligned_empty(size)

    def give_back(self, buffer: np.ndarray) -> None:
        """Keep a buffer for another chunk, which may be read now."""
        with self._lock:
            self._spare[buffer.size].append(buffer)
        self.free.put(None)


class ChunkReader:
    """Reads the chunks of a schedule with one thread per input, a few chunks ahead of its consumer.

    Iterating gives `Loaded` chunks; the consumer calls `release` with each once nothing uses its arrays any more.
    """

    def __init__(
        self,
        checkpoints: Mapping[int, Checkpoint],
        schedule: Sequence[Visit],
        on_digest: Callable[[int, str, str], None],
        allow_nonfinite: bool,
    ) -> None:
        """Prepares the threads; entering the context starts them.

        Args:
            checkpoints: The inputs by position.
            schedule: What to read, in order.
            on_digest: Called with (input, tensor name, digest) whenever all of a tensor was read; may be called from
                any thread and may raise.
            allow_nonfinite: Let NaN and infinities pass.
        """
        sizes = dict.fromkeys(checkpoints, 1)
        for visit in schedule:
            for position in visit.plan.sources:
                info = checkpoints[position].tensors[visit.plan.output.name]
                sizes[position] = max(sizes[position], visit.padded * DTYPES[info.dtype].itemsize)
        self._holds = holds_of(schedule, functools.partial(_entry_bytes, checkpoints))
        firsts = Counter(id(v.plan) for v, h in zip(schedule, self._holds, strict=True) if h.kept and not h.again)
        most_held = max(firsts.values(), default=0)
        self._lanes = {position: _Lane(c, sizes[position], most_held) for position, c in checkpoints.items()}
        self._schedule = schedule
        self._on_digest = on_digest
        self._allow_nonfinite = allow_nonfinite
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(position,), name=f"reader-{position}", daemon=True)
            for position in self._lanes
        ]

    def __enter__(self) -> Self:
        try:
            start_threads(self._threads)
        except BaseException:
            self._stop.set()  # those that have begun end
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def __iter__(self) -> Iterator[Loaded]:
        for visit, hold in zip(self._schedule, self._holds, strict=True):
            buffers = tuple(self._take(self._lanes[position].ready) for position in visit.plan.sources)
            for buffer in buffers:
                if isinstance(buffer, BaseException):
                    raise buffer
            sources = zip(visit.plan.sources, buffers, strict=True)
            arrays = tuple(self._typed(visit, position, buffer) for position, buffer in sources)
            yield Loaded(visit, arrays, buffers, hold)

    def release(self, loaded: Loaded) -> None:
        """Give the buffers of a chunk back to be read into again, unless a later visit needs what is in them."""
        if loaded.hold.kept:
            return
        for position, buffer in zip(loaded.visit.plan.sources, loaded.buffers, strict=True):
            self._lanes[position].give_back(buffer)

    def _typed(self, visit: Visit, position: int, buffer: Any) -> np.ndarray:
        info = self._lanes[position].checkpoint.tensors[visit.plan.output.name]
        dtype = DTYPES[info.dtype]
        typed: np.ndarray = buffer[: visit.padded * dtype.itemsize].view(dtype)
        return typed

    def _take(self, source: queue.Queue[Any]) -> Any:
        while not self._stop.is_set():
            try:
                return source.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        raise _Stopped

    def _put(self, target: queue.Queue[Any], item: Any) -> None:
        while not self._stop.is_set():
            try:
                return target.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
        raise _Stopped

    def _run(self, position: int) -> None:
        lane = self._lanes[position]
        try:
            digest = TensorDigest()
            for visit, hold in zip(self._schedule, self._holds, strict=True):
                if position not in visit.plan.sources:
                    continue
                buffer = lane.held.popleft() if hold.again else self._buffer(position, visit, hold)
                if not (hold.again and hold.all):
                    self._read(position, visit, buffer, digest, hold.again)
                if hold.kept:
                    lane.held.append(buffer)
                if visit.whole and visit.last and not (hold.again and hold.all):
                    self._on_digest(position, visit.plan.output.name, digest.hexdigest())
                    digest = TensorDigest()
                self._put(lane.ready, buffer)
        except _Stopped:
            return
        except BaseException as error:  # handed to the consumer, who raises it in its own thread
            try:
                self._put(lane.ready, error)
            except _Stopped:
                return

    def _buffer(self, position: int, visit: Visit, hold: Hold) -> np.ndarray:
        """A buffer for a chunk; one that is kept is no larger than the chunk, of which there may be many."""
        lane = self._lanes[position]
        self._take(lane.free)
        width = DTYPES[lane.checkpoint.tensors[visit.plan.output.name].dtype].itemsize
        size = visit.padded * width if hold.kept else lane.chunk_bytes
        return lane.buffer(size)

    def _read(self, position: int, visit: Visit, buffer: np.ndarray, digest: TensorDigest, filled: bool) -> None:
        """Read, hash and check a chunk; what an earlier stage has filled is hashed alone."""
        checkpoint = self._lanes[position].checkpoint
        info = checkpoint.tensors[visit.plan.output.name]
        width = DTYPES[info.dtype].itemsize
        raw = buffer[: visit.size * width]
        for start in range(0, raw.size, CACHED_BYTES):
            piece = raw[start : start + CACHED_BYTES]
            if not filled:
                checkpoint.read_into(info.name, visit.start * width + start, piece)
            if visit.whole:
                digest.update(piece)
            if visit.first_reading and position in visit.plan.statistics:
                check_statistics(
                    piece,
                    info.dtype,
                    lambda: (
                        f"{info.name} of {checkpoint.location}: holds negative or infinite numbers or NaN, and "
                        "statistics are finite and from 0 on: measure them again"
                    ),
                )
            elif visit.first_reading and self._looks_at(visit):
                self._check_finite(piece, position, info)

    def _looks_at(self, visit: Visit) -> bool:
        """Whether NaN and infinities are looked for in a chunk: not where they would show in what is merged."""
        pipeline = visit.plan.pipeline
        return pipeline is not None and not self._allow_nonfinite and not pipeline.transparent

    def _check_finite(self, raw: np.ndarray, position: int, info: TensorInfo) -> None:
        check_finite(
            raw,
            info.dtype,
            lambda: (
                f"{info.name} of {self._lanes[position].checkpoint.location}: holds NaN or infinite entries: "
                "mend the model, or merge them as they are with --allow-nonfinite"
            ),
        )

    def check_inputs(self, loaded: Loaded) -> None:
        """Raise M3Error if an input of a chunk, whose buffers still hold it, is NaN or infinite somewhere."""
        for position, buffer in zip(loaded.visit.plan.sources, loaded.buffers, strict=True):
            info = self._lanes[position].checkpoint.tensors[loaded.visit.plan.output.name]
            self._check_finite(buffer[: loaded.visit.size * DTYPES[info.dtype].itemsize], position, info)


class _Stopped(Exception):  # noqa: N818
    """The reader was left; its threads end."""
