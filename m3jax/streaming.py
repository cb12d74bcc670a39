"""merge_checkpoint(): model directories in, a model directory out, in memory that does not grow with the model.

Reading, computing and writing overlap: one thread per input reads ahead (`chunks`), this one dispatches jitted
functions of flat chunks, one writes. The functions are those of the in-memory path (`pipeline`, `methods`).
"""

import functools
import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from m3jax import bits, manifest, modelcard, pipeline
from m3jax.checkpoints import (
    DTYPES,
    Checkpoint,
    ModelDirectory,
    TensorInfo,
    as_bytes,
    digest_file,
    locate_model,
    open_safetensors,
    parse_size,
    plan_shards,
    write_index,
)
from m3jax.chunks import ChunkReader, Loaded, Visit, default_chunk_entries, visits
from m3jax.errors import M3Error
from m3jax.measuring import MERGE, Findings, Stage, applies, phases_of, samples, scope_of, split
from m3jax.methods.types import Scalars
from m3jax.pipeline import Pipeline
from m3jax.planning import FLOATS, DrawnWeights, Input, Plan, TensorPlan, make_plan
from m3jax.progress import Progress
from m3jax.publishing import Staging, check_free, partial_directory
from m3jax.recipe import Recipe, load_recipe
from m3jax.writing import Shards

DEFAULT_SHARD_SIZE = "5GB"
_TOLD_PER_TENSOR = 2**11  # bytes of journal and manifest, generously
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def merge_chunk(
    pipe: Pipeline, dtype: str, experts: Any, base: Any, scalars: Scalars, start: Any, zero: Any
) -> jax.Array:
    """The merged chunk; `start` is its first entry's flat index as two uint32."""
    index = bits.range_index(start[0], start[1], experts[0].shape[0])
    return pipeline.merged_leaf(pipe, experts, base, scalars, index, zero, dtype)


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


def _identity(recipe: Recipe, plan: Plan, models: Sequence[_Model], circumstances: Any) -> str:
    """Digest of everything that the output's bytes depend on."""
    told = {
        "bits": manifest.SCHEME,
        "versions": manifest.versions(),
        "recipe": recipe.resolved(),
        "weights": {group: [w.hex() for w in map(float, ws)] for group, ws in plan.weights.items()},
        "inputs": [[m.input.name, str(m.place.path), m.checkpoint.fingerprint()] for m in models],
        "circumstances": circumstances,
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
        self.digests: dict[str, dict[int, str]] = {}
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
        self.take_digests(name, {position: digest})

    def take_digests(self, name: str, digests: Mapping[int, str]) -> None:
        """Add digests of a tensor, by input."""
        with self._lock:
            self.digests.setdefault(name, {}).update(digests)

    def input_digests(self, name: str) -> dict[str, str]:
        """The digests of a tensor in the inputs that have been read, by position."""
        with self._lock:
            return {str(position): digest for position, digest in self.digests.get(name, {}).items()}

    def schedule(self, phase: Sequence[Stage], tensors: Sequence[TensorPlan]) -> Iterator[Visit]:
        """Every chunk of a phase in order."""
        if phase[0].step == "sample":
            yield from samples(phase[0], tensors, self.chunk_entries)
            return
        seen = set(self.digests)
        for tensor in tensors:
            for stage in phase:
                if applies(stage, tensor):
                    yield from visits(stage, tensor, self.chunk_entries, tensor.output.name not in seen)
                    seen.add(tensor.output.name)

    def run(
        self,
        phase: Sequence[Stage],
        tensors: Sequence[TensorPlan],
        write: Callable[[Callable[[Loaded], None]], Shards] | None = None,
    ) -> int:
        """Go through a phase; `write` makes the writer of one that merges. Returns the bytes written."""
        plan_visits = list(self.schedule(phase, tensors))
        positions = sorted({p for v in plan_visits for p in v.plan.sources})
        checkpoints = {p: self.models[p].checkpoint for p in positions}
        with ExitStack() as stack:
            reader = ChunkReader(checkpoints, plan_visits, self.note_digest, self.allow_nonfinite)
            stack.enter_context(reader)
            shards = stack.enter_context(write(reader.release)) if write is not None else None
            self._consume(reader, shards, plan_visits)
        return shards.bytes_written if shards is not None else 0

    def _consume(self, reader: ChunkReader, shards: Shards | None, plan_visits: Sequence[Visit]) -> None:
        zero = np.uint32(0)
        pending: deque[tuple[Loaded, Any]] = deque()
        totals = self._bytes_by_label(plan_visits)
        done = dict.fromkeys(totals, 0)
        last: Visit | None = None
        scalars: Scalars | None = None

        def drain(limit: int) -> None:
            while len(pending) > limit:
                loaded, measured = pending.popleft()
                self.findings.absorb(loaded.visit, measured)
                reader.release(loaded)

        def conclude() -> None:
            if last is not None and last.stage != MERGE:
                drain(0)
                self.findings.conclude(last)

        for loaded in reader:
            visit = loaded.visit
            if last is not None and (last.stage, scope_of(last)) != (visit.stage, scope_of(visit)):
                conclude()
            if last is None or last.stage != visit.stage or last.plan is not visit.plan:
                scalars = self.findings.scalars(visit.plan, self.root) if visit.plan.pipeline is not None else None
            last = visit
            start = np.array([visit.start >> 32, visit.start & 0xFFFFFFFF], np.uint32)
            if visit.stage != MERGE and scalars is not None:
                pending.append((loaded, self.findings.measure(loaded, scalars, start, zero)))
                drain(_DISPATCHED)
            elif shards is not None:
                shards.submit(loaded, self._merged(loaded, scalars, start, zero))
            step = self._bytes_of(visit)
            self.bytes_read += step
            done[visit.stage.label] += step
            if self.progress is not None:
                self.progress(Progress(visit.stage.label, done[visit.stage.label], totals[visit.stage.label]))
        conclude()

    def _bytes_of(self, visit: Visit) -> int:
        infos = [self.models[p].checkpoint.tensors[visit.plan.output.name] for p in visit.plan.sources]
        return visit.size * sum(DTYPES[info.dtype].itemsize for info in infos)

    def _bytes_by_label(self, plan_visits: Sequence[Visit]) -> dict[str, int]:
        totals: dict[str, int] = {}
        for visit in plan_visits:
            totals[visit.stage.label] = totals.get(visit.stage.label, 0) + self._bytes_of(visit)
        return totals

    def _merged(self, loaded: Loaded, scalars: Scalars | None, start: np.ndarray, zero: np.uint32) -> Any:
        visit = loaded.visit
        tensor = visit.plan
        if tensor.pipeline is None or scalars is None:
            self._check_equal(loaded)
            return loaded.arrays[0]
        experts, base = split(loaded)
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


@contextmanager
def _saying_what_failed(out: Path) -> Iterator[None]:
    """Turns what the operating system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        place = error.filename if error.filename is not None else out
        raise M3Error(f"{place}: {error.strerror or error}: check the place and the space on its disk") from error


def _merge(
    recipe: Recipe,
    out: Path,
    overwrite: bool,
    max_shard_size: int,
    allow_nonfinite: bool,
    chunk_entries: int | None,
    progress: Callable[[Progress], None] | None,
    recorded: Mapping[str, Any] | None = None,
    sources: Mapping[str, str] | None = None,
) -> MergeResult:
    begun = time.perf_counter()
    with _saying_what_failed(out), ExitStack() as stack:
        check_free(out, overwrite)
        models = _open_models(recipe, sources or {}, stack)
        _check_apart(out, models)
        drawn: DrawnWeights | None = manifest.drawn_weights(recorded) if recorded is not None else None
        base = models[-1].input if models[-1].role != "expert" else None
        plan = make_plan(recipe, [m.input for m in models if m.role == "expert"], base, drawn)
        companions = modelcard.gather(recipe, [m.place for m in models], plan.template)
        shards = plan_shards([t.output for t in plan.tensors], max_shard_size)
        expected = {n: e["digest"] for n, e in recorded["output"]["tensors"].items()} if recorded is not None else {}
        _check_recorded(recorded, plan, models)
        before = [m.checkpoint.fingerprint() for m in models]
        beside = {name: digest_file(path) for name, path in companions.items()}
        identity = _identity(recipe, plan, models, [shards, expected, beside, allow_nonfinite])
        total = sum(t.output.nbytes for t in plan.tensors)
        small = sum(path.stat().st_size for path in companions.values()) + _TOLD_PER_TENSOR * len(plan.tensors)
        staging = stack.enter_context(Staging(out, identity, total + small))
        chunk = _chunk_size(chunk_entries, plan, models)
        run = _Merge(recipe, plan, models, chunk, recorded, allow_nonfinite, progress)
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
            run.take_digests(name, {int(p): digest for p, digest in tensor["inputs"].items()})
    by_name = {t.output.name: t for t in run.plan.tensors}
    left = [(file, infos) for file, infos in shards if file not in finished]
    tensors = [by_name[info.name] for _, infos in left for info in infos]
    if not tensors:
        return 0, 0
    *measured, merged = phases_of(run.plan)
    found = next((entry for entry in staging.finished if "findings" in entry), None)
    if found is not None:
        run.findings.from_json(found["findings"])
        for name, digests in found["digests"].items():
            run.take_digests(name, {int(p): digest for p, digest in digests.items()})
    elif measured:
        for phase in measured:
            if not run.findings.settled(phase[0]):
                run.run(phase, run.plan.tensors)
        staging.record({"findings": run.findings.to_json(), "digests": run.digests})

    def writer(release: Callable[[Loaded], None]) -> Shards:
        return Shards(staging, left, release, run.input_digests, expected, run.allow_nonfinite)

    return run.run(merged, tensors, writer), len(left)


def _check_apart(out: Path, models: Sequence[_Model]) -> None:
    """Refuse to replace a directory that a model is read from."""
    for target in (out.resolve(), partial_directory(out).resolve()):
        for model in models:
            place = model.place.path.resolve()
            if target == place or target in place.parents:
                raise M3Error(f"{target}: is one of the models, or holds {model.input.name}: choose another output")


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
    read = {name: run.digests.get(name, {}).get(position) for name in infos}
    return {name: (infos[name], digest) for name, digest in read.items() if digest is not None}


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
        chunk_entries: Entries per chunk, a power of two of at least 65,536; memory grows with it, the bits do not
            depend on it. By default as many as keep the buffers of all inputs within 160 MB, at most 2²¹.
        progress: Called after every chunk.

    Returns:
        What was done.

    Raises:
        M3Error: The recipe, an input or the output place is at fault; the message says what and how to mend it.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    size = parse_size(max_shard_size)
    return _merge(loaded, Path(out), overwrite, size, allow_nonfinite, chunk_entries, progress)


def _chunk_size(entries: int | None, plan: Plan, models: Sequence[_Model]) -> int:
    if entries is None:
        merged = [t for t in plan.tensors if t.pipeline is not None]
        infos = [models[p].checkpoint.tensors[t.output.name] for t in merged for p in t.sources]
        return default_chunk_entries(len(models), max((DTYPES[i.dtype].itemsize for i in infos), default=2))
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
    named = {record["name"] for record in recorded["inputs"]}
    for name in sources or {}:
        if name not in named:
            raise M3Error(f"{name}: is not a model of this manifest, which records {', '.join(sorted(named))}")
    return _merge(recipe, Path(out), overwrite, size, nonfinite, chunk_entries, progress, recorded, sources)
