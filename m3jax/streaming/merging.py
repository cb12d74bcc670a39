"""merge_checkpoint(): model directories in, a model directory out, in memory that does not grow with the model.

Reading, computing and writing overlap: one thread per input reads ahead (`chunks`), this one dispatches jitted
functions of flat chunks, one writes. The functions are those of the in-memory path (`pipeline`, `methods`).
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import AxisType, Mesh

from m3jax.anatomy import summarise
from m3jax.checkpoints import (
    TensorInfo,
    digest_tensor,
    header_digest,
    parse_size,
    write_index,
)
from m3jax.checkpoints.formats import ORBAX, SAFETENSORS
from m3jax.checkpoints.locate import scratch
from m3jax.checkpoints.orbax_tree import COMMITTED, STEP
from m3jax.checkpoints.orbax_writer import is_node
from m3jax.checkpoints.protocol import without_ctime
from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.checkpoints.views import stored_at
from m3jax.cluster.processes import ALONE, Cluster, Processes, gather, share
from m3jax.documents import FAULTS
from m3jax.errors import M3Error, saying_what_failed
from m3jax.outputs import companions as modelcard
from m3jax.outputs import manifest, provenance
from m3jax.outputs.journal import weights_in
from m3jax.outputs.local import Staging, Workplace, holds_tensors
from m3jax.outputs.modes import narrow
from m3jax.outputs.orbax import finish_orbax, foreseen_files, holds_part, keep_part, step_directory
from m3jax.outputs.patterns import matcher
from m3jax.outputs.places import exactly
from m3jax.outputs.remote import RemoteStaging, RemoteWorkplace
from m3jax.outputs.written import SAVES
from m3jax.progress import Progress
from m3jax.recipe import Recipe, load_recipe
from m3jax.streaming.findings import Step, phases_of
from m3jax.streaming.intermediates import with_intermediates
from m3jax.streaming.jobs import (
    DEFAULT_SHARD_SIZE,
    MergeJob,
    Ready,
    as_recorded,
    check_beside,
    prepare,
    recorded_digests,
    written_format,
)
from m3jax.streaming.lanes import lane_count, lanes_over
from m3jax.streaming.opening import OpenedModel
from m3jax.streaming.passes import Circumstances, Passes
from m3jax.streaming.plan import DrawnWeights, MergePlan, TensorPlan, divide
from m3jax.streaming.reading import chunk_size
from m3jax.streaming.statistics import ROLE as STATISTICS
from m3jax.streaming.steps import with_steps
from m3jax.streaming.writing import OtherBytesError, Shards
from m3jax.text import count_text, html_table, size_text, time_text

AnyWorkplace: TypeAlias = Workplace | RemoteWorkplace
_TOLD_PER_TENSOR = 2**11  # bytes of journal and manifest, generously


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
        process_reads: What each process has read of `bytes_read`.
    """

    directory: Path
    digest: str
    manifest: dict[str, Any]
    seconds: float
    bytes_read: int
    bytes_written: int
    resumed_shards: int
    notes: tuple[str, ...]
    process_reads: tuple[int, ...]

    @property
    def weights(self) -> dict[str, tuple[float, ...]]:
        """The weights that were drawn, by group ("model", blocks or tensors); empty where the recipe gives them."""
        drawn = self.manifest.get("weights", {})
        return {group: tuple(map(float.fromhex, told["hex"])) for group, told in drawn.items()}

    def __repr__(self) -> str:
        method, count = self.manifest["recipe"]["merge_method"], len(self.manifest["output"]["tensors"])
        drawn = [f"{group}: {' '.join(f'{w:.4f}' for w in own)}" for group, own in self.weights.items()]
        told = f", drawn {drawn[0]}{f' and {len(drawn) - 1} more' if drawn[1:] else ''}" if drawn else ""
        return (
            f"MergeResult({method} in {self.directory}: {count_text(count, 'tensor')}, {size_text(self.bytes_written)},"
            f" digest {self.digest[:12]}…{told})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = [
            ["directory", str(self.directory)],
            ["method", str(self.manifest["recipe"]["merge_method"])],
            [
                "written",
                f"{count_text(len(self.manifest['output']['tensors']), 'tensor')}, {size_text(self.bytes_written)}",
            ],
            ["digest", self.digest],
            *([f"weights, {group}", "  ".join(f"{w:.6f}" for w in own)] for group, own in self.weights.items()),
            *(["note", note] for note in self.notes),
        ]
        return html_table(["merge", time_text(self.seconds)], rows)


def _open_workplace(
    job: MergeJob, ready: Ready, processes: Processes, stack: ExitStack
) -> tuple[AnyWorkplace, list[str]]:
    """The place to fill, which process 0 makes and the others join, and notes on what is no longer as it was left."""
    if processes.index:
        identity, finished = share(processes, None)
        if isinstance(job.out, RemotePath):
            there = RemoteWorkplace(job.out, identity, finished, processes.index, ready.orbax is not None)
            return stack.enter_context(there), []
        return Workplace(job.out, identity, finished, processes.index), []
    damaged: list[str] = []
    staging: Staging | RemoteStaging
    possible = modelcard.possible_names(ready.companions)
    names = exactly([*(file for file, _ in ready.shards), *possible, *_links(ready), manifest.FILE_NAME])
    names += ready.orbax.patterns if ready.orbax is not None else ()
    if isinstance(job.out, RemotePath):
        space = _largest(ready) if ready.orbax is None else 2 * _largest(ready) + ready.orbax.beside.size
        aside = ready.orbax is not None
        staging = stack.enter_context(RemoteStaging(job.out, ready.identity, space, job.overwrite, aside, names))
    else:
        weights = sum(t.output.nbytes for t in ready.plan.tensors)
        small = sum(path.stat().st_size for path in ready.companions.values())
        space = weights + small + _TOLD_PER_TENSOR * len(ready.plan.tensors)
        space += 0 if ready.orbax is None else _largest(ready) + ready.orbax.beside.size  # one file stands there twice
        shared = processes.count > 1
        staging = stack.enter_context(Staging(job.out, ready.identity, space, job.overwrite, shared, names))
        damaged = _damaged(staging, ready, job.progress)
        staging.finished = [entry for entry in staging.finished if entry.get("shard") not in damaged]
    share(processes, [ready.identity, staging.finished])
    return staging, [f"{staging.path / file} was not as it had been finished, and was made again" for file in damaged]


def _largest(ready: Ready) -> int:
    """Bytes of the largest weight file."""
    return max((sum(info.nbytes for info in infos) for _, infos in ready.shards), default=0)


def _damaged(staging: Staging, ready: Ready, progress: Callable[[Progress], None] | None) -> list[str]:
    """Those of the shards that an earlier run has finished that are not as it has told."""
    told = weights_in(staging.finished)
    damaged, done = [], 0
    resumed = [(number, file, infos) for number, (file, infos) in enumerate(ready.shards) if file in told]
    total = sum(info.nbytes for _, _, infos in resumed for info in infos)
    for number, file, infos in resumed:
        digests = {name: tensor["digest"] for name, tensor in told[file].get("tensors", {}).items()}
        if ready.orbax is None:
            whole = holds_tensors(staging.path / file, infos, digests)
        else:
            whole = staging.holds(file) and holds_part(staging.path, ready.orbax, number, digests)
        if not whole:
            damaged.append(file)
        done += sum(info.nbytes for info in infos)
        if progress is not None:
            progress(Progress("checking what is finished", done, total))
    return damaged


def _merge(job: MergeJob, processes: Processes) -> MergeResult:
    """A merge, and before it those that it starts from."""
    lane_count(job.lanes)  # what is wrong with it shows before anything is made
    if not job.recipe.needed:
        return _merge_one(job, processes)
    with saying_what_failed(job.out):
        found = with_intermediates(job, processes, _merge_one)
        return _as_it_is(job.out, processes.count) if found is None else found


def _as_it_is(out: Path, count: int) -> MergeResult:
    """What the same command did that was stopped when its output was there."""
    record = manifest.read(out)
    said = f"{out} was there already: the same command was stopped as it ended, and what it had left was removed"
    shards = len(record["output"]["weight_files"])
    return MergeResult(out, record["output"]["digest"], record, 0.0, 0, 0, shards, (said,), (0,) * count)


def _merge_one(job: MergeJob, processes: Processes) -> MergeResult:
    begun = time.perf_counter()
    with saying_what_failed(job.out), ExitStack() as stack:
        ready = prepare(job, processes, stack)
        other_files = check_companions(job, ready) if processes.index == 0 else None
        workplace, mended = _open_workplace(job, ready, processes, stack)
        checkpoints = [m.checkpoint for m in ready.models]
        mesh = _local_mesh(job.mesh)
        # Here is room for one file that is to be sent.
        lanes = lanes_over(job.lanes, checkpoints, mesh is not None or isinstance(job.out, RemotePath))
        entries = chunk_size(job.chunk_entries, ready.plan, checkpoints, lanes)
        how = Circumstances(entries, mesh, processes, job.allow_nonfinite, job.progress, lanes)
        told = ready.statistics.measured(len(ready.models) - len(ready.statistics.models))
        passes = Passes(ready.plan, checkpoints, job.recipe.seed, recorded_digests(ready, job.recorded), how, told)
        finished = _finished(workplace, ready.shards)
        written = _produce(passes, workplace, ready, finished, job.expected)
        _check_at_rest(job, ready, passes)
        done = gather(processes, [_own_shards(workplace, finished), passes.bytes_read, written])
        made = {file: entry for shards, _, _ in done for file, entry in shards.items()}
        tensors = finished | {file: entry["tensors"] for file, entry in made.items()}
        with _reading_journal(workplace):
            record = _record(job, ready, tensors, passes.findings.of_model())
        if isinstance(workplace, Staging | RemoteStaging):
            workplace.finished = [entry for entry in workplace.finished if entry.get("shard") not in made]
            workplace.finished += made.values()
            record = _publish(job, ready, workplace, record)
        record = share(processes, record)  # which waits until the output is there
    return MergeResult(
        job.out,
        record["output"]["digest"],
        record,
        time.perf_counter() - begun,
        sum(read for _, read, _ in done),
        sum(wrote for _, _, wrote in done),
        len(finished),
        (*_notes(job, ready, finished, processes.count), *mended, *([other_files] if other_files else [])),
        tuple(read for _, read, _ in done),
    )


def _check_at_rest(job: MergeJob, ready: Ready, passes: Passes) -> None:
    """Raise M3Error if an input has changed since it was opened.

    A link or a mode changes a file's ctime, and so does whoever sets its mtime back: then the bytes decide.
    """
    check_beside(job, ready)
    files = {source.checkpoint.location: source.checkpoint for source in ready.sources}
    for position, (model, before) in enumerate(zip(ready.models, ready.fingerprints, strict=True)):
        checkpoint = model.checkpoint
        now = checkpoint.fingerprint()
        if now == before:
            continue
        read = {name: told[position] for name, told in passes.digests.items() if position in told}
        if without_ctime(now) != without_ctime(before) or any(
            digest_tensor(files[stored_at(checkpoint, name).location], stored) != digest
            for name, told in read.items()
            for stored, digest in told.items()
        ):
            raise M3Error(
                f"{job.out}: {checkpoint.location} changed while it was being merged: merge again once it is at rest"
            )


def _local_mesh(mesh: Mesh | None) -> Mesh | None:
    """This process's devices on one axis, of a mesh or of all; None for one device."""
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    if len(devices) == 1 and devices[0] == jax.local_devices()[0]:
        return None
    return jax.make_mesh((len(devices),), ("entries",), axis_types=(AxisType.Auto,), devices=devices)


@contextmanager
def together(distributed: bool) -> Iterator[Processes]:
    """The processes that take part: all of JAX's, or this one.

    Args:
        distributed: Whether all of JAX's do.
    """
    if not distributed:
        yield ALONE
        return
    with Cluster() as cluster:
        yield cluster


def _finished(workplace: AnyWorkplace, shards: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """What an earlier run has told of the shards that it finished, by file."""
    entries = {entry["shard"]: entry["tensors"] for entry in workplace.finished if {"shard", "tensors"} <= entry.keys()}
    return {file: entries[file] for file, _ in shards if file in entries and workplace.holds(file)}


def _own_shards(workplace: AnyWorkplace, finished: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the shards that this process has finished, by file."""
    entries = [entry for entry in workplace.finished if "shard" in entry]
    return {entry["shard"]: entry for entry in entries if entry["shard"] not in finished}


def _own(shards: Sequence[tuple[str, list[TensorInfo]]], processes: Processes) -> list[tuple[str, list[TensorInfo]]]:
    """This process's share of some shards."""
    owners = divide([sum(info.nbytes for info in infos) for _, infos in shards], processes.count)
    return [shard for shard, owner in zip(shards, owners, strict=True) if owner == processes.index]


def _notes(job: MergeJob, ready: Ready, finished: Mapping[str, Any], count: int) -> Iterator[str]:
    """What a reader of the recipe should know."""
    yield from job.recipe.notes()
    yield from ready.plan.notes
    yield from ready.notes
    yield from _idle(ready.shards, finished, count)
    yield from _bare(ready.companions)


def _idle(shards: Sequence[tuple[str, Any]], finished: Mapping[str, Any], count: int) -> Iterator[str]:
    left = len(shards) - len(finished)
    if not finished and left < count:
        yield f"{count} processes shared {left} weight files: a smaller --max-shard-size gives all of them work"


def _bare(companions: Mapping[str, Path]) -> Iterator[str]:
    if "config.json" not in companions:
        yield "the models have no config.json, so neither has the output: loaders of model directories want one"


@contextmanager
def _reading_journal(workplace: AnyWorkplace) -> Iterator[None]:
    """Says in a sentence that a journal, whoever has written it, does not tell of this merge."""
    resumed = bool(workplace.finished)
    try:
        yield
    except FAULTS as error:
        if not resumed:
            raise
        raise M3Error(
            f"{workplace.out}: the journal of the interrupted merge tells what is not of it: remove what it has left"
            f"{'' if isinstance(workplace.out, RemotePath) else f' ({workplace.path})'}, then start again"
        ) from error


def _produce(
    passes: Passes,
    workplace: AnyWorkplace,
    ready: Ready,
    finished: Mapping[str, Any],
    expected: Mapping[str, str],
) -> int:
    """Measure and merge this process's share of what is not finished; returns the bytes written."""
    shards = ready.shards
    found = next((entry for entry in workplace.finished if "findings" in entry), None)
    with _reading_journal(workplace):
        for tensors in finished.values():
            for name, tensor in tensors.items():
                passes.take_digests(name, {int(p): digest for p, digest in tensor["inputs"].items()})
        if found is not None:
            passes.findings.from_json(found["findings"])
            for name, digests in found.get("digests", {}).items():
                passes.take_digests(name, {int(p): digest for p, digest in digests.items()})
    left = [(file, infos) for file, infos in shards if file not in finished]
    if not left:
        return 0
    processes = passes.how.processes
    *measured, merging = phases_of(passes.plan)
    if found is None:
        _measure(passes, workplace, measured, _own(shards, processes))
    own = _own(left, processes)
    if not own:
        return 0

    digests = passes.input_digests, passes.lent_digests
    keep = _keeper(workplace, ready)
    with Shards(workplace, own, *digests, expected, passes.how.allow_nonfinite, keep) as filled:
        passes.merge(merging, _tensors(passes.plan, own), filled)
        return filled.bytes_written


def _keeper(workplace: AnyWorkplace, ready: Ready) -> Callable[[str, Mapping[str, str]], list[str]] | None:
    """What becomes of a finished weight file of which the digests are known; None where it stays as it is."""
    output = ready.orbax
    if output is None:
        return None
    numbers = {file: number for number, (file, _) in enumerate(ready.shards)}

    def keep(file: str, digests: Mapping[str, str]) -> list[str]:
        return keep_part(workplace.path, output, numbers[file], file, digests)

    return keep


def _measure(
    passes: Passes,
    workplace: AnyWorkplace,
    phases: Sequence[Sequence[Step]],
    own: Sequence[tuple[str, list[TensorInfo]]],
) -> None:
    """Measure what comes before merging, and journal it."""
    for phase in phases:
        if not passes.findings.settled(phase[0]):
            passes.measure(phase, _tensors(passes.plan, own))
    if phases:
        # Whoever merges a tensor, now or after an interruption, needs what was found of it.
        for found_there in gather(passes.how.processes, passes.findings.to_json()):
            passes.findings.from_json(found_there)
        workplace.record({"findings": passes.findings.to_json(), "digests": passes.digests})


def _tensors(plan: MergePlan, shards: Sequence[tuple[str, list[TensorInfo]]]) -> list[TensorPlan]:
    by_name = {t.output.name: t for t in plan.tensors}
    return [by_name[info.name] for _, infos in shards for info in infos]


def _record(job: MergeJob, ready: Ready, entries: Mapping[str, Any], findings: Sequence[Any]) -> dict[str, Any]:
    """The manifest, but for the digests of the small files."""
    told = {name: tensor for tensors in entries.values() for name, tensor in tensors.items()}
    output = {t.output.name: (t.output, told[t.output.name]["digest"]) for t in ready.plan.tensors}
    read: list[dict[str, Any]] = [{} for _ in ready.sources]
    for position, model in enumerate(ready.models):
        for name in model.checkpoint.tensors:
            digests = told[name]["inputs"].get(str(position), {}) if name in told else {}
            source = _source_at(ready, position, stored_at(model.checkpoint, name).location)
            for stored, digest in digests.items():
                read[source][stored] = ready.sources[source].checkpoint.tensors[stored], digest
    for name in output:  # in an order that does not tell which file was finished first
        for location, digests in sorted(told[name].get("lent", {}).items()):
            source = _source_at(ready, -1, location)
            for stored, digest in sorted(digests.items()):
                read[source][stored] = ready.sources[source].checkpoint.tensors[stored], digest
    records = [
        manifest.InputRecord(
            source.input.name,
            source.role,
            source.place.revision,
            digests,
            None if source.dequantised is None else source.input.anatomy.quantisation,
            _adapter_of(source),
            ready.tokens[position] if ready.tokens else None,
        )
        for position, (source, digests) in enumerate(zip(ready.sources, read, strict=True))
    ]
    model = ready.models[ready.plan.template]
    told_anatomy = summarise(model.input.anatomy, model.checkpoint.tensors).to_json()
    size, weights = job.max_shard_size, ready.plan.weights
    layout = None if ready.orbax is None else ready.orbax.to_json()
    headers = {file: header_digest(infos) for file, infos in ready.shards} if layout is None else {}
    made = {str(recipe.name): job.made[str(recipe.name)] for recipe in job.recipe.needed}
    shown = told_anatomy, made, findings, layout
    return manifest.build(job.recipe, weights, records, output, headers, size, job.scheme, *shown)


def _adapter_of(source: OpenedModel) -> dict[str, Any] | None:
    """What a manifest says of the adapter that was added to a model."""
    place, adapting = source.place.adapter, source.adapting
    if place is None or adapting is None:
        return None
    return {"name": place.name, "revision": place.revision, "config": adapting.config_digest}


def _source_at(ready: Ready, position: int, location: str) -> int:
    """Which of the models that are read is at a location; that of an input's own position, if two are there."""
    there = [i for i, source in enumerate(ready.sources) if source.checkpoint.location == location]
    return position if position in there else there[0]


def _weight_files(ready: Ready) -> list[Path]:
    """The files of all inputs, whose permissions bound the output's."""
    return [file for model in ready.models for file in model.checkpoint.files()]


def _publish(job: MergeJob, ready: Ready, staging: Staging | RemoteStaging, record: dict[str, Any]) -> dict[str, Any]:
    """Write what stands beside the weights and the manifest, which is returned, and let the output appear."""
    weight_files = saves = None
    if ready.orbax is not None:
        if isinstance(staging, RemoteStaging):
            staging.bring(is_node)
        for name in (*modelcard.possible_names(ready.companions), manifest.FILE_NAME):
            (staging.path / name).unlink(missing_ok=True)  # of an earlier run, which else would be told of as weights
        weight_files, saves = finish_orbax(staging.path, ready.orbax)
    elif len(ready.shards) > 1:
        write_index(staging.path, ready.shards, sum(t.output.nbytes for t in ready.plan.tensors))
    files = _write_companions(job, ready, staging.path)
    links = _links(ready) if ready.orbax is None else {}
    modelcard.link_weights(staging.path, links)
    record = manifest.completed(record, files, links, weight_files, saves)
    (staging.path / manifest.FILE_NAME).write_text(manifest.to_json(record), encoding="utf-8")
    if isinstance(staging, Staging):
        narrow(staging.path, _weight_files(ready))
        weights = [file for file, _ in ready.shards]
        if ready.orbax is not None:
            weights = list(filter(matcher(ready.orbax.patterns), staging.files()))
        staging.publish([*weights, *files, *links, manifest.FILE_NAME], spent=bool(job.recipe.needed))
    else:
        staging.publish()
    return record


def _links(ready: Ready) -> dict[str, str]:
    """The weight files that stand once more beside the tokenizers of others."""
    return modelcard.linked_weights(ready.companions, [file for file, _ in ready.shards])


def _write_companions(job: MergeJob, ready: Ready, directory: Path) -> dict[str, str]:
    """Write what stands beside the weights; returns the digest of each file."""
    published = list(_published(job, ready))
    return modelcard.write_companions(
        directory,
        ready.companions,
        ready.digests,
        job.recipe,
        ready.plan.weights,
        published,
        ready.picked,
        ready.unties,
    )


def _published(job: MergeJob, ready: Ready) -> Iterator[str]:
    """What came from the hub, now or when a replayed merge was made: models and adapters, as the recipe names them."""
    if job.recorded is not None:
        models = [entry for entry in job.recorded["inputs"] if entry["role"] != STATISTICS]
        told = [(entry["name"], entry["revision"], entry.get("adapter")) for entry in models]
    else:
        sources = [source for source in ready.sources if source.role != STATISTICS]
        told = [(source.place.name, source.place.revision, _adapter_of(source)) for source in sources]
    for name, revision, adapter in told:
        if revision is not None:
            yield name if adapter is None else name.removesuffix(f"+{adapter['name']}")
        if adapter is not None and adapter["revision"] is not None:
            yield adapter["name"]


def check_companions(job: MergeJob, ready: Ready) -> str | None:
    """What a replay would write beside the weights, held against what was written then.

    The index of shards is left out, as it follows their size, and so is what people may edit.

    Args:
        job: The replay.
        ready: The same, prepared.

    Returns:
        A sentence on the files that would be others, if that is allowed; None where none would.

    Raises:
        M3Error: It is not allowed.
    """
    then = dict(job.recorded["output"]["files"]) if job.recorded is not None else {}
    if job.recorded is None or not then:
        return None
    with tempfile.TemporaryDirectory(dir=scratch()) as place:
        now = _write_companions(job, ready, Path(place))
    left_out = {*manifest.EDITABLE, SAFETENSORS.index_file}
    names = (name for name in {**then, **now} if name.rpartition("/")[2] not in left_out)
    other = sorted(name for name in names if then.get(name) != now.get(name))
    other += _differing_orbax(job.recorded["output"], ready)
    if not other:
        return None
    beside = {} if ready.orbax is None else ready.orbax.beside.files
    from_ = ready.companions.get(other[0], beside.get(other[0]))
    said = (
        f"{', '.join(other)} would not be as then"
        f"{'' if from_ is None else f': {from_} has changed since, or this version writes it otherwise'}"
    )
    if not job.other_files:
        raise M3Error(
            f"{said}: restore what stood beside the models' weights, or allow it (--allow-other-files): the weights are"
            " the same in any case"
        )
    return said


def _differing_orbax(recorded: Mapping[str, Any], ready: Ready) -> list[str]:
    """The files of an output of Orbax that hold no values of the merge and would not be as then."""
    if ready.orbax is None or recorded.get("format") != ORBAX.name:
        return []
    then, now = {**recorded["weight_files"], **recorded.get(SAVES, {})}, foreseen_files(ready.orbax)
    if SAVES not in recorded:  # of a version that told nothing of these
        untold = (STEP, COMMITTED, f"{ready.orbax.item}/{COMMITTED}")
        now = {name: digest for name, digest in now.items() if name not in untold}
    return sorted(name for name in {**then, **now} if then.get(name) != now.get(name))


def merge_checkpoint(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    allow_nonfinite: bool = False,
    chunk_entries: int | None = None,
    mesh: Mesh | None = None,
    lanes: int | None = None,
    distributed: bool = False,
    progress: Callable[[Progress], None] | None = None,
    weights: Mapping[str, Sequence[float]] | None = None,
    format: str | None = None,
    step: int | None = None,
) -> MergeResult:
    """Merge model directories into a model directory, out of core.

    The output appears whole, by a rename, or not at all. It is made in `OUT.partial`, from which an interrupted merge
    resumes when the same call is made again. The bytes of the weights do not depend on any of the keyword arguments but
    `weights`.

    Args:
        recipe: A `Recipe`, its YAML file, or its content as a mapping. A model may be a run of training, or some of its
            steps.
        out: The directory to make; its parent exists.
        overwrite: Replace `out` if it is a directory that m3jax has made.
        max_shard_size: Bytes of tensors per file at most, as a number or as in "5GB".
        allow_nonfinite: Merge inputs that hold NaN or infinities.
        chunk_entries: Entries per chunk, a power of two of at least 65,536; memory grows with it, the bits do not
            depend on it. By default as many as keep the buffers of all inputs within 160 MB, at most 2²¹.
        mesh: Over whose local devices every chunk is spread; over all local devices by default.
        lanes: How many tensors are merged at the same time, each from reading to writing; one for every four cores by
            default, at most eight. Memory grows with it. There is one where chunks are spread over several devices,
            where an input is best read in order (of Orbax, of another library's layout, in remote storage), and where
            the output goes to remote storage.
        distributed: Share the work with the other processes of `jax.distributed`, all of which make this call. `out`
            is on storage that they share.
        progress: Called after every chunk, by whichever thread has done it, one at a time.
        weights: Merging weights to use where the recipe's `mixup` would draw them, by group: "model", the blocks, or
            the tensors. The manifest records them, so that a replay needs nothing else.
        format: "safetensors", "orbax", or "same": that of the base, or else the first model, if it is one of the two;
            as the recipe says if None, and where it says nothing the same. A tree of Orbax keeps the kinds of its keys,
            its empty states, shardings, division into chunks and item.
        step: Write `OUT/<step>`, a step of the run OUT, which is made where it is not there; the steps that it has
            stay as they are. Where OUT has `checkpoints`, as the run of a base in such a directory has, the step is
            there.

    Returns:
        What was done.

    Raises:
        M3Error: The recipe, an input or the output place is at fault; the message says what and how to mend it.
    """
    loaded, said = with_steps(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    size = parse_size(max_shard_size)
    place = as_path(out)
    job = MergeJob(loaded, place, overwrite, size, chunk_entries, mesh, allow_nonfinite, progress)
    job = job._replace(chosen=_chosen(loaded, weights), format=written_format(format, loaded), said=said)
    job = job._replace(as_step=step is not None, lanes=lanes)
    like = next(iter(loaded.named_models), None)
    with together(distributed) as processes, step_directory(place, step, like) as target:
        return _merge(job._replace(out=target), processes)


def _chosen(recipe: Recipe, weights: Mapping[str, Sequence[float]] | None) -> DrawnWeights | None:
    """Weights given in place of draws, checked."""
    if weights is None:
        return None
    if recipe.mixup is None:
        raise M3Error("weights: are given in place of draws, but the recipe has no mixup: write them into the recipe")
    if recipe.mixup.smooth:
        raise M3Error("weights: are given in place of draws, which mixup.smooth is about: leave it out of the recipe")
    try:
        wrong = next((group for group, values in weights.items() if not all(map(math.isfinite, values))), None)
    except (AttributeError, TypeError) as error:
        raise M3Error("weights: are not numbers by group: give such as {'model': [0.5, 0.5]}") from error
    if wrong is not None:
        raise M3Error(f"weights: those of {wrong} are not all finite: give numbers")
    if recipe.mixup.granularity == "model" and "model" not in weights:
        raise M3Error("weights: none given for 'model', the one group of this recipe: give {'model': [...]}")
    count = {"each": len(recipe.experts), "position": 1, "none": 0}[recipe.row.weighting]
    odd = next((group for group, values in weights.items() if len(values) != count), None)
    if odd is not None:
        raise M3Error(f"weights: {len(weights[odd])} are given for {odd} where {count} are needed")
    return {group: tuple(map(float, values)) for group, values in weights.items()}


def replay(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sources: Mapping[str, str] | None = None,
    allow_other_files: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    chunk_entries: int | None = None,
    mesh: Mesh | None = None,
    lanes: int | None = None,
    distributed: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MergeResult:
    """Make a recorded merge again, with the weights that were drawn then, and check that the bytes are the same.

    It is written in the format that it had then.

    Args:
        source: A manifest, or the model directory that holds one.
        out: The directory to make.
        sources: Where models are now, by the names that the manifest records.
        allow_other_files: Go on where config, tokenizer or chat template of the output would be others than then; a
            note names them.
        overwrite: Replace `out` if it exists.
        max_shard_size: Bytes per file at most; as recorded if None.
        chunk_entries: As in `merge_checkpoint`.
        mesh: As in `merge_checkpoint`.
        lanes: As in `merge_checkpoint`.
        distributed: As in `merge_checkpoint`.
        progress: Called after every chunk.

    Raises:
        M3Error: The manifest is damaged or edited, the package outside that brought the method is missing, an input
            has changed since, be it a file beside its weights (the message names the file), or, on a machine that
            computes something else, the bytes differ.
    """
    recorded = manifest.read(source)
    provenance.check(recorded)
    recipe = Recipe.model_validate(recorded["recipe"])
    recorded_size = recorded["output"]["max_shard_size"]
    size = parse_size(recorded_size if max_shard_size is None else max_shard_size)
    nonfinite = True  # the inputs' digests are checked, so they hold what was accepted then
    for each in manifest.within(recorded):
        provenance.check(each)
    manifest.check_sources(recorded, sources or {})
    job = MergeJob(
        recipe, as_path(out), overwrite, size, chunk_entries, mesh, nonfinite, progress, recorded, sources or {}
    )._replace(other_files=allow_other_files, lanes=lanes)
    job = as_recorded(job)
    changed = provenance.change(recorded)
    try:
        with together(distributed) as processes:
            result = _merge(job, processes)
    except OtherBytesError as error:
        raise M3Error(f"{error} ({changed})" if changed else str(error)) from error
    return result._replace(notes=(*result.notes, *([changed] if changed else [])))
