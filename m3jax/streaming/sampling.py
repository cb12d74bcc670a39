"""Merging a sample again: chunks of some tensors, computed from the inputs and compared with what is stored.

It takes seconds at any size: what methods measure of the whole model stands in the manifest. A manifest of an earlier
version does not tell it, and then it is measured again, which reads all inputs.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from reprlib import repr as brief  # what a manifest says may be long without end
from typing import Any, NamedTuple

import numpy as np

from m3jax.checkpoints import DTYPES, Checkpoint, digest_tensor, parse_size
from m3jax.checkpoints.locate import locate_recorded, scratch
from m3jax.checkpoints.remote import as_path
from m3jax.cluster.processes import ALONE
from m3jax.documents import FAULTS
from m3jax.errors import M3Error, saying_what_failed
from m3jax.outputs import manifest, provenance
from m3jax.outputs.verification import (
    Beside,
    Verification,
    compare_beside,
    is_of_conversion,
    mend_of,
    open_weights,
    with_inputs,
)
from m3jax.progress import Progress
from m3jax.recipe import Recipe
from m3jax.streaming.findings import MERGE, phases_of
from m3jax.streaming.jobs import MergeJob, Ready, as_recorded, prepare, recorded_digests
from m3jax.streaming.merging import check_companions
from m3jax.streaming.passes import Circumstances, Passes
from m3jax.streaming.plan import TensorPlan
from m3jax.streaming.reading import Visit, chunk_size, visits
from m3jax.text import size_text

DEFAULT_SAMPLE = 32
_PARTS = 3  # of a finding: its stage, whose it is, what was found
_EXPLAINED = 4  # tensors of which all is read to find out why they differ


def verify_sample(
    directory: str | os.PathLike[str],
    *,
    inputs: bool = False,
    sources: Mapping[str, str] | None = None,
    sample: int = DEFAULT_SAMPLE,
    seed: int = 0,
    chunk_entries: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Merge a sample of a recorded merge again, and compare the bytes with those that are stored.

    Of each tensor drawn one chunk is computed, which is all of a small one. The manifest, the files beside the weights
    and the headers of these are compared as `verify` does; bytes of weights that are not drawn are not read.

    Args:
        directory: What `m3jax merge` wrote.
        inputs: Compare all that was read with its digests, too.
        sources: Where models are now, by the names that the manifest records.
        sample: How many tensors to draw; of fewer, all are taken.
        seed: Which ones: the same seed draws the same.
        chunk_entries: As in `merge_checkpoint`.
        progress: Called after every tensor.

    Raises:
        M3Error: There is no manifest of a merge, or it is damaged.
    """
    if sample < 1:
        raise M3Error(f"sample: is {sample}, but at least one tensor is to be computed again: give a number from 1 on")
    if is_of_conversion(as_path(directory)):
        raise M3Error(
            f"{directory}: was converted, which computes nothing: verify it with --inputs in place of --replay"
        )
    beside = compare_beside(directory)
    if beside.recorded.get("intermediates"):
        raise M3Error(
            f"{directory}: was merged from merges that are made on the way, of which no sample can be computed alone: "
            "replay it, or verify it with --inputs in place of --replay"
        )
    manifest.check_sources(beside.recorded, sources or {})
    found, absent = _Sample((), 0, 0), 0
    with ExitStack() as stack:
        weights = open_weights(beside, stack)
        if beside.intact:
            stored = {name: checkpoint for checkpoint in weights.opened for name in checkpoint.tensors}
            asked = _Asked(sources or {}, sample, seed, chunk_entries, progress)
            try:
                found = _compare(beside, stored, asked)
            except M3Error as error:
                found = _Sample((f"nothing could be computed again: {error}",), 0, 0)
                absent = 1 if _lacks_models(beside.recorded, sources or {}) else 0
    differences = (*beside.differences, *weights.differences, *found.differences)
    recorded = beside.recorded["output"]
    if beside.intact:
        whole = sum(
            DTYPES[entry["dtype"]].itemsize * int(np.prod(entry["shape"], dtype=np.int64))
            for entry in recorded["tensors"].values()
        )
        said = (
            f"{size_text(found.bytes)} of {size_text(whole)} of weights were computed again from their inputs (seed "
            f"{seed}); the others were not read: without --replay all are compared with their digests",
        )
    else:
        said = ("nothing was computed again, as the manifest is not the one that was written",)
    # What an input or this machine has otherwise no replay mends.
    is_output = bool(beside.differences or weights.differences) or any(map(_is_output, found.differences))
    verified = Verification(
        beside.directory,
        None,
        found.tensors,
        len(recorded["files"]),
        differences,
        (*beside.notes, *found.notes, *said),
        sample=found.bytes,
        mend=mend_of(beside.directory, beside.recorded) if beside.intact and is_output else None,
        absent=absent,
    )
    return with_inputs(verified, beside.recorded, sources or {}, progress) if inputs else verified


_OTHER_BYTES = "its bytes are not those that were written"


class _Asked(NamedTuple):
    sources: Mapping[str, str]
    sample: int
    seed: int
    chunk_entries: int | None
    progress: Callable[[Progress], None] | None


class _Sample(NamedTuple):
    differences: tuple[str, ...]
    tensors: int
    bytes: int
    notes: tuple[str, ...] = ()


def _compare(beside: Beside, stored: Mapping[str, Checkpoint], asked: _Asked) -> _Sample:
    """Draw tensors, merge a chunk of each and compare it with what is stored."""
    recorded = beside.recorded
    provenance.check(recorded)
    recipe, size = Recipe.model_validate(recorded["recipe"]), parse_size(recorded["output"]["max_shard_size"])
    with saying_what_failed(beside.directory), ExitStack() as stack:
        nowhere = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch())), "out")
        job = MergeJob(recipe, nowhere, False, size, None, None, True, None, recorded, asked.sources, True)
        ready = prepare(as_recorded(job), ALONE, stack)
        other_files = check_companions(job, ready)
        entries = chunk_size(asked.chunk_entries, ready.plan, [model.checkpoint for model in ready.models])
        how = Circumstances(entries, None, ALONE, True, asked.progress)
        checkpoints = [model.checkpoint for model in ready.models]
        passes = Passes(ready.plan, checkpoints, recipe.seed, recorded_digests(ready, recorded), how)
        drawn = _drawn([t for t in ready.plan.tensors if t.output.name in stored], asked)
        notes = list(_measure_model(passes, recorded, ready))
        differences = [] if other_files is None else [other_files]
        chunks = [_visit(tensor, entries, asked.seed) for tensor in drawn]
        total = sum(visit.size * DTYPES[visit.plan.output.dtype].itemsize for visit in chunks)
        done = explained = 0
        for visit in chunks:
            tensor, name = visit.plan, visit.plan.output.name
            width = DTYPES[tensor.output.dtype].itemsize
            try:
                again = _merged(passes, tensor, visit)
                there = np.empty(visit.size * width, np.uint8)
                stored[name].read_into(name, visit.start * width, there)
            except M3Error as error:
                differences.append(f"{name}: cannot be computed again: {error}")
                continue
            done += len(again)
            if asked.progress is not None:
                asked.progress(Progress("computing again", done, total))
            if again != there.tobytes():
                explained += 1
                why = _why(passes, ready, recorded, tensor, stored[name]) if explained <= _EXPLAINED else None
                differences.append(
                    f"{name}: entries {visit.start:,} to {visit.start + visit.size - 1:,} are not what its inputs give"
                    + (f": {why}" if why else "")
                )
        changed = provenance.change(recorded)
    notes += [changed] if changed is not None else []
    return _Sample(tuple(differences), len(drawn), done, tuple(notes))


def _lacks_models(recorded: Mapping[str, Any], sources: Mapping[str, str]) -> bool:
    """Whether a model that was merged is not found, so that nothing is known of it."""
    for record in manifest.inputs_of(recorded):
        try:
            locate_recorded(str(record["name"]), sources)
        except M3Error:
            return True
    return False


def _rank(seed: int, name: str) -> bytes:
    """What tensors and chunks are drawn by: the same on every machine, whatever else there is."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _drawn(tensors: Sequence[TensorPlan], asked: _Asked) -> list[TensorPlan]:
    """The tensors to compute again, in their order."""
    names = sorted((t.output.name for t in tensors), key=lambda name: _rank(asked.seed, name))[: asked.sample]
    return [t for t in tensors if t.output.name in set(names)]


def _visit(tensor: TensorPlan, entries: int, seed: int) -> Visit:
    """One chunk of a tensor, drawn."""
    all_of_it = list(visits(MERGE, tensor, entries, False))
    number = int.from_bytes(_rank(seed, tensor.output.name)[-8:], "big") % len(all_of_it)
    return all_of_it[number]._replace(whole=False)


def _measure_model(passes: Passes, recorded: Mapping[str, Any], ready: Ready) -> Iterator[str]:
    """What is measured of the whole model, from the manifest or else anew; says what that takes."""
    *measured, _ = phases_of(ready.plan)
    wanted = {phase[0].stage for phase in measured if phase[0].scope == "model"}
    why = "the manifest is of a version that did not tell what this one measures of all"
    if "findings" in recorded:
        try:
            told = {_stage_of(entry) for entry in recorded["findings"]}
            if told == wanted:
                passes.findings.from_json(recorded["findings"])
        except FAULTS as error:
            raise M3Error(f"its findings are not what the method measures ({error}): replay it") from error
        if told == wanted and wanted:
            yield "what the method measures of the model was taken from the manifest; m3jax replay measures it again"
        if told == wanted:
            return
        why = f"the manifest tells {_named(told)} as measured of all, and this version measures {_named(wanted)}"
    if not measured:
        if "findings" in recorded:
            yield why
        return
    for phase in measured:
        if not passes.findings.settled(phase[0]):
            passes.measure(phase, ready.plan.tensors)
    yield f"{why}, so this was measured again: {size_text(passes.bytes_read)} were read"


def _stage_of(entry: Any) -> str:
    """Which stage an entry of findings is of."""
    if not isinstance(entry, list) or len(entry) != _PARTS or not isinstance(entry[0], str):
        raise TypeError(f"{brief(entry)} is no finding")
    return entry[0]


def _named(stages: Collection[str]) -> str:
    return ", ".join(map(brief, sorted(stages))) or "nothing"


def _merged(passes: Passes, tensor: TensorPlan, visit: Visit) -> bytes:
    """A chunk of a tensor, merged; what the method measures of the tensor is measured before."""
    for phase in phases_of(passes.plan):
        steps = [step for step in phase if step != MERGE and step.scope != "model"]
        if steps and not passes.findings.knows(steps, tensor):
            passes.measure(steps, [tensor])
    return passes.again(visit)


def _is_output(difference: str) -> bool:
    return difference.endswith(_OTHER_BYTES)


def _why(passes: Passes, ready: Ready, recorded: Mapping[str, Any], tensor: TensorPlan, stored: Checkpoint) -> str:
    """What has changed where a tensor is not what its inputs give."""
    name = tensor.output.name
    if digest_tensor(stored, name) != recorded["output"]["tensors"][name]["digest"]:
        return _OTHER_BYTES
    for position in (*tensor.models, *tensor.statistics):
        try:
            passes.note_digest(position, name, digest_tensor(ready.models[position].checkpoint, name))
        except M3Error as error:
            return str(error)
    return "inputs and output are those of then, so this machine computes otherwise: try m3jax doctor"
