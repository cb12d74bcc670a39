"""Going through the chunks of a merge: every pass reads ahead, dispatches jitted functions and absorbs or writes."""

import functools
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m3jax.arithmetic import threefry
from m3jax.checkpoints import DTYPES, Checkpoint, as_bytes
from m3jax.checkpoints.digest import TensorDigest, digest_tensor
from m3jax.checkpoints.views import Lending, Stored, stored_at, stored_digests
from m3jax.cluster.processes import Processes
from m3jax.errors import M3Error
from m3jax.methods.leaf import LeafScalars, about, merged_rows, prepared_for, recently_made
from m3jax.progress import Progress
from m3jax.streaming.findings import (
    MERGE,
    Findings,
    Step,
    applies,
    layout_of,
    merge_chunk,
    samples,
    scope_of,
    split,
    start_of,
)
from m3jax.streaming.lanes import LaneStopped, divided, side_by_side
from m3jax.streaming.plan import FLOATS, Matrices, MergePlan, TensorPlan
from m3jax.streaming.reading import ChunkReader, Loaded, Visit, visits
from m3jax.streaming.writing import Shards, Writing

_DISPATCHED = 2  # measurements under way before their counts are fetched


class MeasuredModel(NamedTuple):
    """What statistics tell of an input: of the model that they were measured of, or of themselves.

    Attributes:
        name: What the statistics are called.
        tensors: Digests of the input's tensors, as they were stored then.
        itself: The input is the statistics.
    """

    name: str
    tensors: Mapping[str, str]
    itself: bool = False


class _Prepared(NamedTuple):
    """What a method has prepared of matrices, and their digests as they were read."""

    scalars: LeafScalars
    digests: tuple[str, ...]


class Circumstances(NamedTuple):
    """How a merge is gone about; its bytes do not depend on it.

    Attributes:
        chunk_entries: Entries of the largest chunk.
        mesh: Devices of this process over which every chunk is spread; None for one.
        processes: Who works at it.
        allow_nonfinite: Let NaN and infinities pass.
        progress: Called after every chunk, by one thread at a time.
        lanes: How many tensors are gone through at the same time.
    """

    chunk_entries: int
    mesh: Mesh | None
    processes: Processes
    allow_nonfinite: bool
    progress: Callable[[Progress], None] | None
    lanes: int = 1


class _Tally:
    """How far all lanes of a phase are."""

    def __init__(self, totals: Mapping[str, int], progress: Callable[[Progress], None] | None) -> None:
        self._totals, self._progress = totals, progress
        self._done = dict.fromkeys(totals, 0)
        self._lock = threading.Lock()
        self.bytes_read = 0

    def add(self, label: str, step: int, was_read: bool) -> None:
        """A chunk is done.

        Args:
            label: Of its stage.
            step: Its bytes.
            was_read: They were read for it.
        """
        with self._lock:
            self._done[label] += step
            self.bytes_read += step if was_read else 0
            if self._progress is not None:
                self._progress(Progress(label, self._done[label], self._totals[label]))


class Passes:
    """The passes of one process over its tensors: what was found and what was read so far."""

    def __init__(
        self,
        plan: MergePlan,
        checkpoints: Sequence[Checkpoint],
        seed: int,
        recorded: Mapping[str, Mapping[str, str]] | None,
        how: Circumstances,
        measured: Mapping[int, MeasuredModel] = MappingProxyType({}),
    ) -> None:
        """Begin.

        Args:
            plan: What is to be done.
            checkpoints: The inputs, in the plan's order.
            seed: Of masks.
            recorded: For a replay, the digests of stored tensors as recorded, by location.
            how: The circumstances.
            measured: What statistics of inputs were measured of, by the input's position.
        """
        self.plan, self.how = plan, how
        self.findings = Findings(plan)
        self.digests: dict[str, dict[int, Mapping[str, str]]] = {}
        self._lent: dict[str, dict[Stored, str]] = {}
        self._seen: dict[tuple[int, str], str] = {}
        self.bytes_read = 0
        self._checkpoints = checkpoints
        self._recorded = recorded
        self._measured = measured
        self._root = threefry.root_key(seed)
        self._prepared: dict[Hashable, _Prepared] = {}
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        spec = PartitionSpec("entries")  # type: ignore[no-untyped-call]
        self._spread = None if how.mesh is None else NamedSharding(how.mesh, spec)
        self._multiple = 1 if how.mesh is None else how.mesh.size

    def note_digest(self, position: int, name: str, digest: str) -> None:
        """Record the digest of an input's tensor; refuse one that has changed since a recorded merge or pass."""
        checkpoint = self._checkpoints[position]
        place, found = stored_at(checkpoint, name).location, stored_digests(checkpoint, name, digest)
        self._check_recorded(place, found)
        self._check_measured(position, found)
        if isinstance(checkpoint, Lending):
            self._note_lenders(checkpoint, name)
        with self._lock:
            first = self.digests.setdefault(name, {}).setdefault(position, found)
            seen = self._seen.setdefault((position, name), digest)  # of a view, whose own digests are of its first pass
        if (first, seen) != (found, digest):
            raise M3Error(f"{place}: {name} changed while it was read: merge again once it is at rest")

    def _check_recorded(self, place: str, found: Mapping[str, str]) -> None:
        """Raise M3Error if something that is stored has changed since a recorded merge."""
        recorded = {} if self._recorded is None else self._recorded[place]
        changed = next((stored for stored, own in found.items() if recorded.get(stored, own) != own), None)
        if changed is not None:
            raise M3Error(
                f"{place}: {changed} is not what was merged: its bytes have changed since; "
                "restore the file, or make a new merge with m3jax merge"
            )

    def _check_measured(self, position: int, found: Mapping[str, str]) -> None:
        """Raise M3Error if something that is stored is not what statistics tell of it."""
        measured = self._measured.get(position)
        if measured is None:
            return
        other = next((stored for stored, own in found.items() if measured.tensors.get(stored, own) != own), None)
        if other is not None and measured.itself:
            raise M3Error(
                f"{measured.name}: {other} is not as m3jax statistics wrote it, its bytes have changed since: restore "
                "the file, or measure again"
            )
        if other is not None:
            raise M3Error(
                f"{measured.name}: was measured of another model than {self.plan.inputs[position].name}, as {other} is "
                "other there: measure this model with m3jax statistics"
            )

    def _note_lenders(self, checkpoint: Lending, name: str) -> None:
        """Record the digests of tensors that lend a tensor rows and are not read for it themselves."""
        sources = next((plan.sources for plan in self.plan.tensors if plan.output.name == name), ())
        read = {stored_at(self._checkpoints[position], name) for position in sources}
        for lender, stored in checkpoint.lenders(name):
            place = stored_at(lender, stored)
            with self._lock:
                known = place in read or place in self._lent.get(name, {})
            if known:
                continue
            found = stored_digests(lender, stored, digest_tensor(lender, stored))
            self._check_recorded(place.location, found)
            with self._lock:
                self._lent.setdefault(name, {}).update(
                    {Stored(place.location, own): digest for own, digest in found.items()}
                )

    def lent_digests(self, name: str) -> dict[str, dict[str, str]]:
        """The digests of what lends a tensor rows and is not read for it itself, by location and name."""
        found: dict[str, dict[str, str]] = {}
        with self._lock:
            for place, digest in self._lent.get(name, {}).items():
                found.setdefault(place.location, {})[place.name] = digest
        return found

    def take_digests(self, name: str, digests: Mapping[int, Mapping[str, str]]) -> None:
        """Add digests of what is stored for a tensor, by input and stored name."""
        with self._lock:
            self.digests.setdefault(name, {}).update(digests)

    def input_digests(self, name: str) -> dict[str, Mapping[str, str]]:
        """The digests of what is stored for a tensor in the inputs that have been read, by position."""
        with self._lock:
            return {str(position): digest for position, digest in self.digests.get(name, {}).items()}

    def _schedule(self, phase: Sequence[Step], tensors: Sequence[TensorPlan]) -> Iterator[Visit]:
        """Every chunk of a phase in order."""
        entries, multiple = self.how.chunk_entries, self._multiple
        if phase[0].sampled:
            yield from samples(phase[0], self.plan.tensors, tensors, entries, multiple)
            return
        seen = set(self.digests)
        for tensor in tensors:
            for stage in phase:
                if applies(stage, tensor):
                    first_reading = tensor.output.name not in seen
                    yield from visits(stage, tensor, entries, first_reading, multiple=multiple)
                    seen.add(tensor.output.name)

    def measure(self, phase: Sequence[Step], tensors: Sequence[TensorPlan]) -> None:
        """Do a phase that only measures: this process's tensors; of the whole model, what all processes found.

        Args:
            phase: One stage over the model, or several over each tensor.
            tensors: This process's.
        """
        self._go_through(phase, tensors, None)
        if phase[0].scope == "model":
            self.findings.conclude_model(phase[0], self.how.processes)

    def merge(self, phase: Sequence[Step], tensors: Sequence[TensorPlan], shards: Shards) -> None:
        """Do the last phase, which ends with merging.

        Args:
            phase: Its stages.
            tensors: What this process merges, in the order of writing.
            shards: Where it is written.
        """
        self._go_through(phase, tensors, shards)

    def again(self, visit: Visit) -> bytes:
        """The bytes that one chunk of a tensor merges to, once what is measured of it is known.

        Args:
            visit: Of the merging stage; its digests are not taken.
        """
        checkpoints = {p: self._checkpoints[p] for p in visit.plan.sources}
        with ChunkReader(checkpoints, [visit], self.note_digest, self.how.allow_nonfinite) as reader:
            (loaded,) = map(self._spread_out, reader)
            scalars = self._scalars(visit)
            result = np.asarray(self._merged(loaded, scalars, np.uint32(0)))[: visit.size]
            self.bytes_read += self._bytes_of(visit)
            return bytes(as_bytes(result))

    def _go_through(self, phase: Sequence[Step], tensors: Sequence[TensorPlan], shards: Shards | None) -> None:
        parts = [list(self._schedule(phase, part)) for part in self._parts(phase, tensors)]
        tally = _Tally(self._bytes_by_label([visit for part in parts for visit in part]), self.how.progress)
        try:
            side_by_side([functools.partial(self._lane, part, shards, tally) for part in parts])
        finally:
            self.bytes_read += tally.bytes_read

    def _parts(self, phase: Sequence[Step], tensors: Sequence[TensorPlan]) -> list[list[TensorPlan]]:
        """The tensors of each lane: of one, where a sample is spread over all, or matrices are prepared for many."""
        if phase[0].sampled or any(tensor.matrices for tensor in tensors) or not tensors:
            return [list(tensors)]
        return divided(tensors, [tensor.output.nbytes for tensor in tensors], self.how.lanes)

    def _lane(
        self, plan_visits: Sequence[Visit], shards: Shards | None, tally: _Tally, stopped: threading.Event
    ) -> None:
        positions = sorted({p for v in plan_visits for p in v.plan.sources})
        checkpoints = {p: self._checkpoints[p] for p in positions}
        with ExitStack() as stack:
            reader = ChunkReader(checkpoints, plan_visits, self.note_digest, self.how.allow_nonfinite)
            stack.enter_context(reader)
            writing = stack.enter_context(Writing(shards, reader)) if shards is not None else None
            self._consume(reader, writing, tally, stopped)

    def _consume(self, reader: ChunkReader, writing: Writing | None, tally: _Tally, stopped: threading.Event) -> None:
        zero = np.uint32(0)
        pending: deque[tuple[Loaded, Any]] = deque()
        last: Visit | None = None
        scalars: LeafScalars | None = None

        def drain(limit: int) -> None:
            while len(pending) > limit:
                loaded, measured = pending.popleft()
                self.findings.absorb(loaded.visit, measured)
                reader.release(loaded)

        def conclude() -> None:
            if last is not None and last.stage != MERGE:
                drain(0)
                if last.stage.scope != "model":
                    self.findings.conclude(last)

        for loaded in map(self._spread_out, reader):
            if stopped.is_set():
                raise LaneStopped
            self._check_others()
            visit = loaded.visit
            if last is not None and (last.stage, scope_of(last)) != (visit.stage, scope_of(visit)):
                conclude()
            if last is None or (last.stage, last.block) != (visit.stage, visit.block) or last.plan is not visit.plan:
                scalars = self._scalars(visit)
            last = visit
            if visit.stage != MERGE and scalars is not None:
                pending.append((loaded, self.findings.measure(loaded, scalars, zero)))
                drain(_DISPATCHED)
            elif writing is not None:
                writing.submit(loaded, self._merged(loaded, scalars, zero))
            tally.add(visit.stage.label, self._bytes_of(visit), not loaded.hold.again)
        conclude()

    def _check_others(self) -> None:
        """Raise M3Error if another process has failed; one lane at a time looks."""
        if self._looking.acquire(blocking=False):
            try:
                self.how.processes.check()
            finally:
                self._looking.release()

    def _spread_out(self, loaded: Loaded) -> Loaded:
        """The chunk with its arrays on the mesh, if there is one and the chunk is not just copied."""
        plan = loaded.visit.plan
        if self._spread is None or plan.pipeline is None or plan.matrices is not None:
            return loaded
        return loaded._replace(arrays=tuple(jax.device_put(a, self._spread) for a in loaded.arrays))

    def _bytes_of(self, visit: Visit) -> int:
        infos = [self._checkpoints[p].tensors[visit.plan.output.name] for p in visit.plan.sources]
        return visit.size * sum(DTYPES[info.dtype].itemsize for info in infos)

    def _bytes_by_label(self, plan_visits: Sequence[Visit]) -> dict[str, int]:
        totals: dict[str, int] = {}
        for visit in plan_visits:
            totals[visit.stage.label] = totals.get(visit.stage.label, 0) + self._bytes_of(visit)
        return totals

    def _scalars(self, visit: Visit) -> LeafScalars | None:
        """The scalars of a chunk's block or blocks, with what the method prepares; None of what is copied."""
        tensor = visit.plan
        if tensor.pipeline is None:
            return None
        scalars = self.findings.scalars(tensor, self._root, visit.block)
        if tensor.matrices is None:
            return scalars
        name, positions, block = tensor.output.name, tensor.matrices.positions, visit.block or 0
        settings = tensor.blocks[block].settings
        places = tuple(stored_at(self._checkpoints[position], name) for position in positions)
        key = (places, block, tuple(settings.weights), settings.scale, tuple(settings.method.items()))
        made = recently_made(self._prepared, key, lambda: self._prepare(visit, scalars))
        for position, digest in zip(positions, made.digests, strict=True):
            self.note_digest(position, name, digest)
        return made.scalars

    def _prepare(self, visit: Visit, scalars: LeafScalars) -> _Prepared:
        """What the method prepares for a tensor's block."""
        tensor, block = visit.plan, visit.block or 0
        if tensor.pipeline is None or tensor.matrices is None:
            raise ValueError(f"nothing is prepared for {tensor.output.name}")
        read = [self._matrix(position, tensor, tensor.matrices, block) for position in tensor.matrices.positions]
        with about(tensor.blocks[block].name):
            made = prepared_for(tensor.pipeline, scalars, tensor.blocks[block].settings, [each for each, _ in read])
        return _Prepared(made, tuple(digest for _, digest in read))

    def _matrix(self, position: int, tensor: TensorPlan, matrices: Matrices, block: int) -> tuple[np.ndarray, str]:
        """The matrix of a tensor's block, float32[width, width], and the digest of all that is stored with it."""
        checkpoint, width = self._checkpoints[position], matrices.width
        info = checkpoint.tensors[tensor.output.name]
        stored = np.empty((width, width), DTYPES[info.dtype])
        checkpoint.read_into(info.name, block * stored.nbytes, stored.reshape(-1).view(np.uint8))
        self.bytes_read += stored.nbytes
        digest = TensorDigest()
        digest.update(as_bytes(stored))
        told = digest.hexdigest() if tensor.axis is None else digest_tensor(checkpoint, info.name)
        return stored.astype(np.float32), told

    def _merged(self, loaded: Loaded, scalars: LeafScalars | None, zero: np.uint32) -> Any:
        visit = loaded.visit
        tensor = visit.plan
        if tensor.pipeline is None or scalars is None:
            self._check_equal(loaded)
            return loaded.arrays[0]
        if tensor.matrices is not None:
            flat, (_, width, first) = [array[: visit.size] for array in loaded.arrays], tensor.matrices
            ready: LeafScalars = scalars
            found = merged_rows(tensor.pipeline, flat, lambda: ready, FLOATS[tensor.output.dtype], width, first)
            return np.asarray(found)
        experts, base = split(loaded)
        if tensor.pipeline.rows:
            scalars = self.findings.rows(scalars, visit)
        static = (tensor.pipeline, FLOATS[tensor.output.dtype], layout_of(visit))
        return merge_chunk(*static, experts, base, scalars, start_of(visit), zero)

    def _check_equal(self, loaded: Loaded) -> None:
        visit = loaded.visit
        first = as_bytes(loaded.arrays[0][: visit.size])
        for position, other in zip(visit.plan.sources[1:], loaded.arrays[1:], strict=True):
            if as_bytes(other[: visit.size]) != first:
                names = [self.plan.inputs[p].name for p in (visit.plan.sources[0], position)]
                info = visit.plan.output
                raise M3Error(
                    f"{info.name}: is a buffer of {info.dtype}, which is copied, but differs between {names[0]} and "
                    f"{names[1]}: exclude it to take that of {self.plan.inputs[self.plan.template].name}"
                )
