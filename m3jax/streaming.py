"""merge_checkpoint(): model directories in, a model directory out, in memory that does not grow with the model.

Reading, computing and writing overlap: one thread per input reads ahead (`chunks`), this one dispatches jitted
functions of flat chunks, one writes. The functions are those of the in-memory path (`pipeline`, `methods`).
"""

import functools
import hashlib
import json
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from m3jax import bits, exact, manifest, modelcard, pipeline
from m3jax.checkpoints import (
    DTYPES,
    Checkpoint,
    ModelDirectory,
    ShardWriter,
    TensorDigest,
    TensorInfo,
    as_bytes,
    locate_model,
    open_safetensors,
    parse_size,
    plan_shards,
    write_index,
)
from m3jax.chunks import ChunkReader, Loaded, Visit, check_finite, visits
from m3jax.errors import M3Error
from m3jax.methods import magnitude, slerp, ties
from m3jax.methods.types import Scalars
from m3jax.pipeline import Pipeline
from m3jax.planning import FLOATS, DrawnWeights, Input, Plan, TensorPlan, make_plan, total_entries
from m3jax.progress import Progress
from m3jax.publishing import Staging, check_free
from m3jax.recipe import Recipe, load_recipe

DEFAULT_SHARD_SIZE = "5GB"
CHUNK_ENTRIES = 2**21
_DISPATCHED = 2  # measurements under way before their counts are fetched


class MergeResult(NamedTuple):
    """What a merge did.

    Attributes:
        directory: Where the merged model is.
        digest: BLAKE3 of its weights, whatever their division into files.
        manifest: The content of its m3jax.json.
        seconds: Wall time.
        bytes_read: Of weights, every pass counted.
        bytes_written: Of weights.
        resumed_shards: How many shards an earlier, interrupted run had finished.
        notes: Sentences that a reader of the recipe should know.
    """

    directory: Path
    digest: str
    manifest: dict[str, Any]
    seconds: float
    bytes_read: int
    bytes_written: int
    resumed_shards: int
    notes: tuple[str, ...]


class Stage(NamedTuple):
    """A pass over a tensor or over the model.

    Attributes:
        kind: "sparsify", "trim" (rankings), "signs", "largest", "sums" (slerp), or "merge".
        scope: "tensor" or "model": over what its result holds.
        digit: Of a ranking.
    """

    kind: str
    scope: str = "tensor"
    digit: int = 0


_LABELS = {
    "sparsify": "ranking magnitudes",
    "trim": "ranking magnitudes",
    "signs": "counting signs",
    "largest": "measuring angles",
    "sums": "measuring angles",
    "merge": "merging",
}
MERGE = Stage("merge")

# --- jitted functions of chunks -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def merge_chunk(
    pipe: Pipeline, dtype: str, experts: Any, base: Any, scalars: Scalars, start: Any, zero: Any
) -> jax.Array:
    """The merged chunk; `start` is its first entry's flat index as two uint32."""
    index = bits.range_index(start[0], start[1], experts[0].shape[0])
    return pipeline.merged_leaf(pipe, experts, base, scalars, index, zero, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def histogram_chunk(
    pipe: Pipeline,
    stage: Stage,
    experts: Any,
    base: Any,
    scalars: Scalars,
    start: Any,
    size: Any,
    prefix: Any,
    zero: Any,
) -> jax.Array:
    """Counts of one digit of the magnitudes in a chunk, of which the first `size` entries count."""
    padded = experts[0].shape[0]
    if stage.kind == "sparsify":
        values = pipeline.ranked_by_sparsifier(pipe, experts, base)
    else:
        index = bits.range_index(start[0], start[1], padded)
        values = pipeline.ranked_by_trim(pipe, experts, base, scalars, index, zero)
    return magnitude.histogram(values, prefix, stage.digit, lax.iota(jnp.uint32, padded) < size)


@functools.partial(jax.jit, static_argnums=0)
def signs_chunk(
    pipe: Pipeline, experts: Any, base: Any, scalars: Scalars, start: Any, size: Any, zero: Any
) -> jax.Array:
    """How many entries of a chunk elect + and how many −, as uint32[2]."""
    padded = experts[0].shape[0]
    index = bits.range_index(start[0], start[1], padded)
    values = pipeline.sparse_values(pipe, experts, base, scalars, index, zero)
    valid = lax.iota(jnp.uint32, padded) < size
    return jnp.stack([jnp.sum(w & valid, dtype=jnp.uint32) for w in ties.sign_counts(values, scalars, zero)])


@jax.jit
def largest_chunk(experts: Any, size: Any, zero: Any) -> jax.Array:
    """`slerp.largest` of a chunk."""
    valid = lax.iota(jnp.uint32, experts[0].shape[0]) < size
    return slerp.largest(tuple(exact.widen(x) for x in experts), zero, valid)


@jax.jit
def sums_chunk(experts: Any, largest: Any, size: Any, zero: Any) -> jax.Array:
    """`slerp.integer_sums` of a chunk."""
    valid = lax.iota(jnp.uint32, experts[0].shape[0]) < size
    return slerp.integer_sums(tuple(exact.widen(x) for x in experts), largest, zero, valid)


# --- what depends on more than one entry --------------------------------------------------------------------------


def _phases(plan: Plan) -> list[list[Stage]]:
    """The passes: each phase goes over all tensors before the next; the last one ends with the merge."""
    pipe, merged = plan.pipeline, [t for t in plan.tensors if t.settings is not None]
    stages: list[Stage] = []
    digits = range(len(magnitude.DIGITS))
    sparsifier = pipe.sparsifier
    if sparsifier is not None and sparsifier.name == "magnitude":
        stages += [Stage("sparsify", sparsifier.scope, d) for d in digits]
    if any(t.trim and min(t.trim) < 1 for t in merged):
        stages += [Stage("trim", pipe.method.trim_scope, d) for d in digits]
    if pipe.method.sign_election == "unweighted":
        stages.append(Stage("signs", "model"))
    if pipe.method.interpolates:
        stages += [Stage("largest"), Stage("sums")]
    phases: list[list[Stage]] = []
    for stage in [*stages, MERGE]:
        if stage.scope == "model" or not phases or phases[-1][-1].scope == "model":
            phases.append([stage])
        else:
            phases[-1].append(stage)
    return phases


class Findings:
    """Thresholds, signs and angles found so far, by stage and tensor (None: of the whole model)."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._seed_words: Any = None
        self.thresholds: dict[tuple[str, str | None], np.ndarray] = {}
        self.tie_sign = 1
        self._totals: dict[tuple[Stage, str | None], Any] = {}
        self._searches: dict[tuple[str, str | None], magnitude.Search] = {}
        self._largest: dict[str, np.ndarray] = {}
        self._arcs: dict[str, np.ndarray] = {}

    def scalars(self, tensor: TensorPlan, root: np.ndarray) -> Scalars:
        """The scalars of a tensor as far as they are known."""
        if tensor.pipeline is None or tensor.settings is None:
            raise ValueError(f"{tensor.output.name} is copied and has no scalars")
        name, pipe = tensor.output.name, tensor.pipeline
        masked = pipe.sparsifier is not None and pipe.sparsifier.name == "dare"
        keys = bits.pair_keys(root, name, pipe.num_experts) if masked else None
        scalars = pipeline.leaf_scalars(pipe, tensor.settings, keys)
        for kind, field in (("sparsify", "drop_below"), ("trim", "trim_below")):
            found = self.thresholds.get((kind, None), self.thresholds.get((kind, name)))
            if found is not None:
                scalars = scalars._replace(**{field: found})
        if name in self._arcs:
            scalars = scalars._replace(coefficients=self._arcs[name])  # type: ignore[arg-type]
        return scalars._replace(tie_sign=np.int32(self.tie_sign))  # type: ignore[arg-type]

    def measure(self, loaded: Loaded, scalars: Scalars, start: np.ndarray, zero: np.uint32) -> jax.Array:
        """Dispatch the measurement of a chunk."""
        visit = loaded.visit
        stage, tensor = visit.stage, visit.plan
        experts, base = _split(loaded)
        if tensor.pipeline is None:
            raise ValueError(f"{tensor.output.name} is copied and not measured")
        size = np.uint32(visit.size)
        if stage.kind == "signs":
            return signs_chunk(tensor.pipeline, experts, base, scalars, start, size, zero)
        if stage.kind == "largest":
            return largest_chunk(experts, size, zero)
        if stage.kind == "sums":
            return sums_chunk(experts, self._largest[tensor.output.name], size, zero)
        prefix = self._search(stage, tensor).prefix
        return histogram_chunk(tensor.pipeline, stage, experts, base, scalars, start, size, prefix, zero)

    def absorb(self, visit: Visit, counts: np.ndarray) -> None:
        """Add a chunk's measurement to the totals of its scope."""
        stage, scope = visit.stage, _scope(visit)
        before = self._totals.get((stage, scope))
        if stage.kind == "largest":
            total: Any = counts if before is None else np.maximum(before, counts)
        elif stage.kind == "sums":
            total = slerp.to_integers(counts) + (0 if before is None else before)
        else:
            total = counts.astype(np.uint64) + (0 if before is None else before)
        self._totals[stage, scope] = total

    def conclude(self, stage: Stage, tensor: TensorPlan, scope: str | None) -> None:
        """Draw the conclusion from a scope's totals."""
        total = self._totals.pop((stage, scope))
        name = tensor.output.name
        if stage.kind == "signs":
            self.tie_sign = int(ties.majority(_words(total)))
        elif stage.kind == "largest":
            self._largest[name] = total
        elif stage.kind == "sums":
            products = slerp.inner_products(self._largest.pop(name), total)
            (position,) = tensor.settings.weights if tensor.settings else (0.5,)
            self._arcs[name] = np.asarray(slerp.arc_coefficients(products, position))
        else:
            search = magnitude.advance(self._search(stage, tensor), _words(total), stage.digit)
            self._searches[stage.kind, scope] = search
            if stage.digit == len(magnitude.DIGITS) - 1:
                self.thresholds[stage.kind, scope] = np.asarray(self._searches.pop((stage.kind, scope)).prefix)

    def _search(self, stage: Stage, tensor: TensorPlan) -> magnitude.Search:
        scope = None if stage.scope == "model" else tensor.output.name
        if (stage.kind, scope) not in self._searches:
            sized = self._plan.tensors if scope is None else [tensor]
            kept = tensor.trim if stage.kind == "trim" else tensor.settings.densities if tensor.settings else ()
            self._searches[stage.kind, scope] = magnitude.start(total_entries(sized), tuple(kept))
        return self._searches[stage.kind, scope]

    def to_json(self) -> dict[str, Any]:
        """What the merging phase needs of the phases before it."""
        found = [[kind, scope, value.tolist()] for (kind, scope), value in self.thresholds.items()]
        return {"thresholds": found, "tie_sign": self.tie_sign}

    def from_json(self, found: Mapping[str, Any]) -> None:
        """Take over what `to_json` gave in an earlier run."""
        for kind, scope, value in found["thresholds"]:
            self.thresholds[kind, scope] = np.array(value, np.uint32)
        self.tie_sign = int(found["tie_sign"])


def _words(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (total >> np.uint64(32)).astype(np.uint32), (total & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _scope(visit: Visit) -> str | None:
    return None if visit.stage.scope == "model" else visit.plan.output.name


def _split(loaded: Loaded) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    if loaded.visit.plan.has_base:
        return loaded.arrays[1:], loaded.arrays[0]
    return loaded.arrays, None


# --- writing ------------------------------------------------------------------------------------------------------


class _Shards:
    """The thread that writes merged chunks, finishes shards and keeps the journal."""

    def __init__(
        self,
        staging: Staging,
        shards: Sequence[tuple[str, Sequence[TensorInfo]]],
        release: Callable[[Loaded], None],
        input_digests: Callable[[str], dict[str, str]],
        expected: Mapping[str, str],
        allow_nonfinite: bool,
    ) -> None:
        self._staging = staging
        self._release = release
        self._input_digests = input_digests
        self._expected = expected
        self._allow_nonfinite = allow_nonfinite
        self._shard_of = {info.name: file for file, infos in shards for info in infos}
        self._contents = {file: list(infos) for file, infos in shards}
        self._left = {file: len(infos) for file, infos in shards}
        self._digests: dict[str, tuple[TensorInfo, str]] = {}
        self._writer: ShardWriter | None = None
        self._digest = TensorDigest()
        self._queue: queue.Queue[tuple[Loaded, Any] | None] = queue.Queue(2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self.bytes_written = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._error is None:
            self._error = error
        self._queue.put(None)
        self._thread.join()
        if self._writer is not None:
            self._writer.abort()
        if error is None and self._error is not None:
            raise self._error

    def submit(self, loaded: Loaded, result: Any) -> None:
        """Hand over a chunk; raises what went wrong with an earlier one."""
        if self._error is not None:
            raise self._error
        self._queue.put((loaded, result))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue
            try:
                self._write(*item)
            except BaseException as error:  # raised again in the thread that submits
                self._error = error

    def _write(self, loaded: Loaded, result: Any) -> None:
        visit = loaded.visit
        info = visit.plan.output
        file = self._shard_of[info.name]
        if self._writer is None:
            self._writer = ShardWriter(self._staging.path / file, self._contents[file])
        merged = np.asarray(result)[: visit.size]
        raw = as_bytes(merged)
        if not self._allow_nonfinite and visit.plan.pipeline is not None:
            check_finite(
                np.frombuffer(raw, np.uint8),
                info.dtype,
                lambda: (
                    f"{info.name}: merged entries overflow {FLOATS[info.dtype]}: take a wider dtype or smaller weights"
                ),
            )
        self._writer.write(info.name, visit.start * DTYPES[info.dtype].itemsize, raw)
        self._digest.update(raw)
        self.bytes_written += len(raw)
        del merged, raw
        self._release(loaded)
        if visit.last:
            self._finish_tensor(info, file)

    def _finish_tensor(self, info: TensorInfo, file: str) -> None:
        digest = self._digest.hexdigest()
        if self._expected.get(info.name, digest) != digest:
            raise M3Error(
                f"{info.name}: the replay gives other bytes than the manifest records: "
                "run it with the versions that the manifest names"
            )
        self._digests[info.name] = (info, digest)
        self._digest = TensorDigest()
        self._left[file] -= 1
        if self._left[file] == 0 and self._writer is not None:
            self._writer.finish()
            self._writer = None
            tensors = {
                i.name: {"digest": self._digests[i.name][1], "inputs": self._input_digests(i.name)}
                for i in self._contents[file]
            }
            self._staging.record({"shard": file, "tensors": tensors})


# --- the merge ----------------------------------------------------------------------------------------------------


class _Model(NamedTuple):
    """One opened input."""

    role: str
    place: ModelDirectory
    checkpoint: Checkpoint
    input: Input


def _open_model(name: str, role: str, sources: Mapping[str, str], stack: ExitStack) -> _Model:
    place = locate_model(sources.get(name, name))
    checkpoint = stack.enter_context(open_safetensors(place.path))
    config = modelcard.read_config(place.path)
    tied = config.get("tie_word_embeddings") if config else None
    return _Model(role, place._replace(name=name), checkpoint, Input(name, checkpoint.tensors, tied))


def _open_models(recipe: Recipe, sources: Mapping[str, str], stack: ExitStack) -> list[_Model]:
    models = [_open_model(entry.model, "expert", sources, stack) for entry in recipe.experts]
    if recipe.base_model is not None and recipe.merge_method != "slerp":
        role = "base" if recipe.uses_base else "template"
        models.append(_open_model(recipe.base_model, role, sources, stack))
    return models


def _identity(recipe: Recipe, plan: Plan, models: Sequence[_Model], layout: Any, expected: Any) -> str:
    """Digest of everything that the output's bytes depend on."""
    told = {
        "bits": manifest.SCHEME,
        "versions": manifest.versions(),
        "recipe": recipe.resolved(),
        "weights": {group: [w.hex() for w in map(float, ws)] for group, ws in plan.weights.items()},
        "inputs": [[m.input.name, str(m.place.path), m.checkpoint.fingerprint()] for m in models],
        "layout": layout,
        "expected": expected,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class _Merge:
    """The state of one run: what is planned, what was found, what was read."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        models: Sequence[_Model],
        chunk_entries: int,
        recorded: Mapping[str, Any] | None,
        allow_nonfinite: bool,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.plan, self.models, self.chunk_entries = plan, models, chunk_entries
        self.allow_nonfinite, self.progress = allow_nonfinite, progress
        self.root = bits.root_key(recipe.seed)
        self.recorded = recorded
        self.findings = Findings(plan)
        self.digests: dict[tuple[int, str], str] = {}
        self.bytes_read = 0
        self._lock = threading.Lock()

    def note_digest(self, position: int, name: str, digest: str) -> None:
        """Record the digest of an input's tensor; refuse a replay whose input has changed."""
        model = self.models[position]
        if self.recorded is not None:
            record = self.recorded["inputs"][position]
            if record["tensors"].get(name, digest) != digest:
                raise M3Error(
                    f"{model.checkpoint.location}: {name} is not what was merged: its bytes have changed since; "
                    "restore the file, or make a new merge with m3jax merge"
                )
        with self._lock:
            self.digests[position, name] = digest

    def input_digests(self, name: str) -> dict[str, str]:
        """The digests of a tensor in the inputs that have been read, by position."""
        with self._lock:
            return {str(p): digest for (p, n), digest in self.digests.items() if n == name}

    def schedule(self, phases: Sequence[list[Stage]], tensors: Sequence[TensorPlan]) -> Iterator[Visit]:
        """Every chunk of every phase in order; the last phase merges `tensors`, the earlier ones measure all."""
        seen = {name for _, name in self.digests}
        for phase in phases:
            for tensor in tensors if MERGE in phase else self.plan.tensors:
                for stage in phase:
                    if not _applies(stage, tensor):
                        continue
                    name = tensor.output.name
                    yield from visits(stage, tensor, self.chunk_entries, name not in seen)
                    seen.add(name)

    def run(
        self, phases: Sequence[list[Stage]], tensors: Sequence[TensorPlan], write: Callable[..., _Shards] | None
    ) -> int:
        """Go through phases; `write` makes the writer of the last one. Returns the bytes written."""
        plan_visits = list(self.schedule(phases, tensors))
        positions = sorted({p for v in plan_visits for p in v.plan.sources})
        checkpoints = {p: self.models[p].checkpoint for p in positions}
        with ExitStack() as stack:
            reader = ChunkReader(checkpoints, plan_visits, self.chunk_entries, self.note_digest, self.allow_nonfinite)
            stack.enter_context(reader)
            shards = stack.enter_context(write(reader.release)) if write is not None else None
            self._consume(reader, shards, plan_visits)
        return shards.bytes_written if shards is not None else 0

    def _consume(self, reader: ChunkReader, shards: _Shards | None, plan_visits: Sequence[Visit]) -> None:
        zero = np.uint32(0)
        pending: deque[tuple[Loaded, jax.Array]] = deque()
        totals = _bytes_by_label(plan_visits)
        done = dict.fromkeys(totals, 0)
        current: tuple[Stage, str | None, TensorPlan] | None = None
        scalars: Scalars | None = None

        def drain(limit: int) -> None:
            while len(pending) > limit:
                loaded, counts = pending.popleft()
                self.findings.absorb(loaded.visit, np.asarray(counts))
                reader.release(loaded)

        for loaded in reader:
            visit = loaded.visit
            here = (visit.stage, _scope(visit), visit.plan)
            if current is not None and current[:2] != here[:2] and current[0] != MERGE:
                drain(0)
                self.findings.conclude(current[0], current[2], current[1])
            if current is None or current[0] != here[0] or current[2] is not here[2]:
                scalars = self.findings.scalars(visit.plan, self.root) if visit.plan.pipeline is not None else None
            current = here
            start = np.array([visit.start >> 32, visit.start & 0xFFFFFFFF], np.uint32)
            if visit.stage != MERGE and scalars is not None:
                pending.append((loaded, self.findings.measure(loaded, scalars, start, zero)))
                drain(_DISPATCHED)
            elif shards is not None:
                shards.submit(loaded, self._merged(loaded, scalars, start, zero))
            step = _bytes_of(visit)
            self.bytes_read += step
            label = _LABELS[visit.stage.kind]
            done[label] += step
            if self.progress is not None:
                self.progress(Progress(label, done[label], totals[label]))
        drain(0)
        if current is not None and current[0] != MERGE:
            self.findings.conclude(current[0], current[2], current[1])

    def _merged(self, loaded: Loaded, scalars: Scalars | None, start: np.ndarray, zero: np.uint32) -> Any:
        visit = loaded.visit
        tensor = visit.plan
        if tensor.pipeline is None or scalars is None:
            self._check_equal(loaded)
            return loaded.arrays[0]
        experts, base = _split(loaded)
        return merge_chunk(tensor.pipeline, FLOATS[tensor.output.dtype], experts, base, scalars, start, zero)

    def _check_equal(self, loaded: Loaded) -> None:
        visit = loaded.visit
        first = as_bytes(loaded.arrays[0][: visit.size])
        for position, other in zip(visit.plan.sources[1:], loaded.arrays[1:], strict=True):
            if as_bytes(other[: visit.size]) != first:
                names = [self.models[p].input.name for p in (visit.plan.sources[0], position)]
                info = visit.plan.output
                raise M3Error(
                    f"{info.name}: is a buffer of {info.dtype}, which is copied, but differs between {names[0]} and "
                    f"{names[1]}: exclude it to take that of {self.models[self.plan.template].input.name}"
                )


def _applies(stage: Stage, tensor: TensorPlan) -> bool:
    if stage == MERGE:
        return True
    if tensor.settings is None or (stage.kind == "trim" and min(tensor.trim, default=1.0) == 1.0):
        return False
    return stage.kind != "sparsify" or stage.scope == "model" or min(tensor.settings.densities) < 1.0


def _bytes_of(visit: Visit) -> int:
    return len(visit.plan.sources) * visit.size * DTYPES[visit.plan.output.dtype].itemsize


def _bytes_by_label(plan_visits: Sequence[Visit]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for visit in plan_visits:
        label = _LABELS[visit.stage.kind]
        totals[label] = totals.get(label, 0) + _bytes_of(visit)
    return totals


def _merge(
    recipe: Recipe,
    out: Path,
    overwrite: bool,
    max_shard_size: int,
    allow_nonfinite: bool,
    chunk_entries: int,
    progress: Callable[[Progress], None] | None,
    recorded: Mapping[str, Any] | None = None,
    sources: Mapping[str, str] | None = None,
) -> MergeResult:
    begun = time.perf_counter()
    check_free(out, overwrite)
    with ExitStack() as stack:
        models = _open_models(recipe, sources or {}, stack)
        drawn: DrawnWeights | None = manifest.drawn_weights(recorded) if recorded is not None else None
        base = models[-1].input if models[-1].role != "expert" else None
        plan = make_plan(recipe, [m.input for m in models if m.role == "expert"], base, drawn)
        companions = modelcard.gather(recipe, [m.place for m in models], plan.template)
        shards = plan_shards([t.output for t in plan.tensors], max_shard_size)
        expected = {n: e["digest"] for n, e in recorded["output"]["tensors"].items()} if recorded is not None else {}
        _check_recorded(recorded, plan, models)
        before = [m.checkpoint.fingerprint() for m in models]
        identity = _identity(recipe, plan, models, shards, expected)
        total = sum(t.output.nbytes for t in plan.tensors)
        staging = stack.enter_context(Staging(out, identity, total + 2**20))
        run = _Merge(recipe, plan, models, chunk_entries, recorded, allow_nonfinite, progress)
        written = _produce(run, staging, shards, expected)
        if before != [m.checkpoint.fingerprint() for m in models]:
            raise M3Error(f"{out}: an input changed while it was being merged: merge again once it is at rest")

        output = _output_digests(staging, plan)
        records = [
            manifest.InputRecord(m.input.name, m.role, m.place.revision, _read_tensors(run, p, m))
            for p, m in enumerate(models)
        ]
        if len(shards) > 1:
            write_index(staging.path, shards, total)
        files = modelcard.write_companions(staging.path, companions, recipe, plan.weights)
        record = manifest.build(recipe, plan.weights, records, output, files, max_shard_size)
        staging.write_text(manifest.FILE_NAME, manifest.to_json(record))
        resumed = len(shards) - written[1]
        staging.publish(overwrite)
    return MergeResult(
        out,
        record["output"]["digest"],
        record,
        time.perf_counter() - begun,
        run.bytes_read,
        written[0],
        resumed,
        recipe.notes(),
    )


def _produce(
    run: _Merge, staging: Staging, shards: Sequence[tuple[str, Sequence[TensorInfo]]], expected: Mapping[str, str]
) -> tuple[int, int]:
    """Measure and merge what the journal does not already hold; returns bytes and shards written."""
    entries = {entry["shard"]: entry for entry in staging.finished if "shard" in entry}
    finished = {file for file, _ in shards if file in entries and (staging.path / file).is_file()}
    for file in finished:
        for name, tensor in entries[file]["tensors"].items():
            run.digests.update({(int(p), name): digest for p, digest in tensor["inputs"].items()})
    phases = _phases(run.plan)
    by_name = {t.output.name: t for t in run.plan.tensors}
    left = [(file, infos) for file, infos in shards if file not in finished]
    tensors = [by_name[info.name] for _, infos in left for info in infos]
    found = next((entry for entry in staging.finished if "findings" in entry), None)
    if len(phases) > 1 and tensors:
        if found is None:
            run.run(phases[:-1], (), None)
            told = [[p, name, digest] for (p, name), digest in run.digests.items()]
            staging.record({"findings": run.findings.to_json(), "digests": told})
        else:
            run.findings.from_json(found["findings"])
            run.digests.update({(p, name): digest for p, name, digest in found["digests"]})

    def writer(release: Callable[[Loaded], None]) -> _Shards:
        return _Shards(staging, left, release, run.input_digests, expected, run.allow_nonfinite)

    return (run.run(phases[-1:], tensors, writer) if tensors else 0), len(left)


def _check_recorded(recorded: Mapping[str, Any] | None, plan: Plan, models: Sequence[_Model]) -> None:
    """Refuse early what a replay cannot reproduce: tensors that came, went or changed their shape."""
    if recorded is None:
        return
    planned = {t.output.name: [t.output.dtype, list(t.output.shape)] for t in plan.tensors}
    told = {name: [e["dtype"], e["shape"]] for name, e in recorded["output"]["tensors"].items()}
    if len(recorded["inputs"]) != len(models) or planned != told:
        name = next((n for n in {**planned, **told} if planned.get(n) != told.get(n)), "the list of models")
        raise M3Error(f"{models[0].checkpoint.location}: {name} is not as the manifest records: restore the models")


def _output_digests(staging: Staging, plan: Plan) -> dict[str, tuple[TensorInfo, str]]:
    found = {
        name: tensor["digest"]
        for entry in staging.finished
        if "shard" in entry
        for name, tensor in entry["tensors"].items()
    }
    return {t.output.name: (t.output, found[t.output.name]) for t in plan.tensors}


def _read_tensors(run: _Merge, position: int, model: _Model) -> dict[str, tuple[TensorInfo, str]]:
    infos = model.checkpoint.tensors
    return {n: (infos[n], run.digests[position, n]) for n in infos if (position, n) in run.digests}


def merge_checkpoint(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    allow_nonfinite: bool = False,
    chunk_entries: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> MergeResult:
    """Merge model directories into a model directory, out of core.

    The output appears whole, by a rename, or not at all. It is made in `OUT.partial`, from which an interrupted merge
    resumes when the same call is made again.

    Args:
        recipe: A `Recipe`, its YAML file, or its content as a mapping.
        out: The directory to make; its parent exists.
        overwrite: Replace `out` if it exists.
        max_shard_size: Bytes of tensors per file at most, as a number or as in "5GB".
        allow_nonfinite: Merge inputs that hold NaN or infinities.
        chunk_entries: Entries per chunk, a power of two of at least 65,536 (default 2,097,152); memory grows with
            it, the bits do not depend on it.
        progress: Called after every chunk.

    Returns:
        What was done.

    Raises:
        M3Error: The recipe, an input or the output place is at fault; the message says what and how to mend it.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    size = parse_size(max_shard_size)
    return _merge(loaded, Path(out), overwrite, size, allow_nonfinite, _chunk_size(chunk_entries), progress)


def _chunk_size(entries: int | None) -> int:
    entries = CHUNK_ENTRIES if entries is None else entries
    if entries < 2**16 or entries & (entries - 1):
        raise M3Error(f"chunk entries are {entries}, but must be a power of two of at least 65536")
    return entries


def replay(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sources: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    chunk_entries: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> MergeResult:
    """Make a recorded merge again, with the weights that were drawn then, and check that the bytes are the same.

    Args:
        source: A manifest, or the model directory that holds one.
        out: The directory to make.
        sources: Where models are now, by the names that the manifest records.
        overwrite: Replace `out` if it exists.
        max_shard_size: Bytes per file at most; as recorded if None.
        chunk_entries: As in `merge_checkpoint`.
        progress: Called after every chunk.

    Raises:
        M3Error: The manifest is damaged, an input has changed since (the message names its file), or, on a machine
            that computes something else, the bytes differ.
    """
    recorded = manifest.read(source)
    recipe = Recipe.model_validate(recorded["recipe"])
    recorded_size = recorded["output"]["max_shard_size"]
    size = parse_size(recorded_size if max_shard_size is None else max_shard_size)
    nonfinite = True  # the inputs' digests are checked, so they hold what was accepted then
    chunk = _chunk_size(chunk_entries)
    return _merge(recipe, Path(out), overwrite, size, nonfinite, chunk, progress, recorded, sources)
