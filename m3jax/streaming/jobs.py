"""A merge up to its first byte: inputs opened, compared and planned from their headers alone."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from m3jax.anatomy.agreement import notes_on_configurations
from m3jax.anatomy.stored import find_home, step_metadata
from m3jax.arithmetic import SCHEME
from m3jax.checkpoints import (
    FileFingerprint,
    ModelDirectory,
    TensorInfo,
    digest_file,
    locate_model,
    parse_size,
    plan_shards,
)
from m3jax.checkpoints.adapters import tokenizer_note
from m3jax.checkpoints.formats import ORBAX, SAFETENSORS
from m3jax.checkpoints.locate import digest_companions, read_config
from m3jax.checkpoints.opening import recognise
from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.checkpoints.trust import remarks
from m3jax.checkpoints.views import stored_at
from m3jax.cluster.processes import ALONE, Processes, gather
from m3jax.errors import M3Error, saying_what_failed
from m3jax.outputs import companions, manifest
from m3jax.outputs.copies import check_files
from m3jax.outputs.orbax import OrbaxOutput, plan_orbax
from m3jax.outputs.places import check_apart, check_free, check_place
from m3jax.outputs.remote import check_remote_free
from m3jax.progress import Progress
from m3jax.recipe import Recipe, Source
from m3jax.recipe.sections import Section, base_layers
from m3jax.streaming.aligning import Alignment, notes_on_numbers
from m3jax.streaming.opening import (
    OpenedModel,
    configuration_of,
    givers_of_rows,
    libraries_differ,
    notes_on_float8,
    open_models,
    with_written_dtypes,
)
from m3jax.streaming.plan import DrawnWeights, MergePlan, make_plan
from m3jax.streaming.statistics import OpenedStatistics, open_statistics
from m3jax.streaming.steps import with_steps

DEFAULT_SHARD_SIZE = "5GB"


class MergeJob(NamedTuple):
    """A merge as it was asked for.

    Attributes:
        recipe: What to merge.
        out: Where the output is to appear.
        overwrite: Replace what is there.
        max_shard_size: Bytes of tensors per file at most.
        chunk_entries: Entries per chunk; chosen if None.
        mesh: Devices to use; all local ones if None.
        allow_nonfinite: Let NaN and infinities pass.
        progress: Called after every chunk.
        recorded: The manifest that a replay follows.
        sources: Where its models are now, by the names that it records.
        other_files: Let a replay write other files beside the weights than were there then.
        chosen: Weights to use in place of draws.
        made: The manifests of the merges that it starts from, by name.
        locate: Finds the models; `sketch_model` where headers are all that is wanted of them.
        format: In which the output is written; as the recipe says, or else as the base is, if None.
        as_step: Write a step of a run, where the format has some.
        said: What a user should know of how the recipe was read.
        writes: Whether the output is to be made; a plan does not mind what is there.
        lanes: How many tensors are merged at the same time; by the machine's cores if None.
        outlined: The identities of the merges that it starts from and of which it has outlines, by name.
        whole: Its identity, whatever the merges that it starts from are told by; of what it is opened as if None.
    """

    recipe: Recipe
    out: Path
    overwrite: bool
    max_shard_size: int
    chunk_entries: int | None
    mesh: Mesh | None
    allow_nonfinite: bool
    progress: Callable[[Progress], None] | None
    recorded: Mapping[str, Any] | None = None
    sources: Mapping[str, str] = MappingProxyType({})
    other_files: bool = False
    chosen: DrawnWeights | None = None
    made: Mapping[str, Any] = MappingProxyType({})
    locate: Callable[[str], ModelDirectory] = locate_model
    format: str | None = None
    as_step: bool = False
    said: tuple[str, ...] = ()
    writes: bool = True
    lanes: int | None = None
    outlined: Mapping[str, str] = MappingProxyType({})
    whole: str | None = None

    @property
    def scheme(self) -> str:
        """How bits are made: as now, or as they were when a replayed merge was made."""
        return SCHEME if self.recorded is None else str(self.recorded["bits"])

    @property
    def expected(self) -> dict[str, str]:
        """The digests that a replay must give."""
        tensors = self.recorded["output"]["tensors"] if self.recorded is not None else {}
        return {name: entry["digest"] for name, entry in tensors.items()}


class Ready(NamedTuple):
    """A merge as it is prepared: nothing of it has been written yet.

    Attributes:
        models: The inputs of the plan, experts first, then the base if there is one, then the statistics of the experts
            if the method asks for some; views, where they are seen otherwise than they are stored.
        sources: The models that are read for them.
        plan: What happens to each tensor.
        shards: The files to write, each with its tensors.
        companions: The files that stand beside the weights, by name.
        fingerprints: What tells each input's files from others, without reading weights.
        identity: Digest of everything that the output's bytes depend on.
        picked: Where layers are stacked, for each which layer of the template it is taken to be, by module; else None.
        unties: Whether the output has an output embedding of its own where the template has none.
        notes: What a user should know of how the inputs were read.
        vocabulary: The one that all inputs have; None where the recipe asks for none.
        orbax: How the output is written where that is not as safetensors.
        tokens: For each model that is read the digest of its tokens' numbers; empty where they decide nothing.
        statistics: Of the experts, which are among `models` and `sources` too, last.
        digests: Of the files beside weights that are copied or that others are made of, by their paths.
        configurations: What was read of each model beside its weights to know its tensors.
    """

    models: list[OpenedModel]
    sources: list[OpenedModel]
    plan: MergePlan
    shards: list[tuple[str, list[TensorInfo]]]
    companions: dict[str, Path]
    fingerprints: list[dict[str, FileFingerprint]]
    identity: str
    picked: dict[str | None, list[int]] | None
    unties: bool
    notes: tuple[str, ...]
    vocabulary: Alignment | None
    orbax: OrbaxOutput | None = None
    tokens: tuple[str, ...] = ()
    statistics: OpenedStatistics = OpenedStatistics()
    digests: Mapping[Path, str] = MappingProxyType({})
    configurations: Sequence[Any] = ()


def written_format(asked: str | None, recipe: Recipe) -> str | None:
    """The format that a caller asks for, or else a recipe; None for that of the template.

    Raises:
        M3Error: A merge is not written in it.
    """
    known = (SAFETENSORS.name, ORBAX.name)
    if asked not in (None, "same", *known):
        raise M3Error(f"format: {asked!r} is not written by a merge: choose {', '.join((*known, 'same'))}")
    return None if asked == "same" else asked or recipe.format


def as_recorded(job: MergeJob) -> MergeJob:
    """A replay that writes in the format of then.

    Args:
        job: The replay.
    """
    output = {} if job.recorded is None else job.recorded["output"]
    return job._replace(format=output.get("format", SAFETENSORS.name), as_step=bool(output.get("item")))


def _identity(recipe: Recipe, plan: MergePlan, inputs: Any, rest: Any, scheme: str = SCHEME) -> str:
    """Digest of everything that the output's bytes depend on."""
    told = {
        "bits": scheme,
        "versions": manifest.versions(recipe.merge_method),
        "recipe": recipe.resolved(),
        "weights": {group: [w.hex() for w in map(float, ws)] for group, ws in plan.weights.items()},
        "inputs": inputs,
        "rest": rest,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _check_agreement(processes: Processes, recipe: Recipe, ready: Ready, rest: Any) -> None:
    """Raise M3Error unless all processes see the same, wherever each of them finds it."""
    seen = [
        [model.input.name, {file: [p["size"], p["header_blake3"]] for file, p in told.items()}]
        for model, told in zip(ready.models, ready.fingerprints, strict=True)
    ]
    said = gather(processes, _identity(recipe, ready.plan, seen, rest))
    odd = next((index for index, each in enumerate(said) if each != said[0]), None)
    if odd is not None:
        raise M3Error(
            f"process {odd} has other models, another recipe or other versions of packages than process 0: "
            "make them the same"
        )


def _check_output(job: MergeJob) -> None:
    """Raise M3Error where the output cannot be made in its place."""
    if isinstance(job.out, RemotePath):
        if job.writes:
            check_remote_free(job.out, job.overwrite)
    elif job.writes:
        check_free(job.out, job.overwrite)
    else:
        check_place(job.out)


def prepare(job: MergeJob, processes: Processes, stack: ExitStack) -> Ready:
    """Open the models and plan the merge.

    Args:
        job: What is asked for.
        processes: Who works at it; all of them have to see the same.
        stack: Keeps the models open.

    Raises:
        M3Error: The output place, the models or the recipe are at fault.
    """
    if job.recipe.seeds is not None:
        raise M3Error("seeds: asks for several merges, which m3jax merge and merge_seeds make: write one seed here")
    if processes.index == 0:
        _check_output(job)
    if job.recipe.also_for and isinstance(job.out, RemotePath):
        raise M3Error("also_for: links weights, which remote storage cannot: merge to this disk, or leave it out")
    lacking = next((recipe.name for recipe in job.recipe.needed if recipe.name not in job.sources), None)
    if lacking is not None:
        raise M3Error(
            f"{lacking}: is another document of the recipe, which only m3jax merge makes on its way: merge it first and"
            " name its directory instead"
        )
    models, sources, stacked, vocabulary = open_models(job, stack)
    models = with_written_dtypes(models, sources)
    statistics = open_statistics(job, models, stack)
    every, every_source = [*models, *statistics.models], [*sources, *statistics.sources]
    for source in every_source:
        check_apart(job.out, source.place, source.checkpoint.files())
    drawn: DrawnWeights | None = manifest.drawn_weights(job.recorded) if job.recorded is not None else job.chosen
    base = models[-1].input if models[-1].role != "expert" else None
    names = [name for source in sources for name in source.checkpoint.tensors] if stacked else []
    experts = [m.input for m in models if m.role == "expert"]
    plan = make_plan(job.recipe, experts, base, drawn, names, [m.input for m in statistics.models])
    places = [m.place for m in models]
    places += [source.place for source in sources if source.place not in places]  # those that only give layers
    united, size = (None, None) if vocabulary is None else (vocabulary.united, vocabulary.size)
    chosen = job.recipe, places, plan.template, united
    digests = dict(vocabulary.read) if vocabulary is not None else {}
    for place in companions.models_used(*chosen):
        digests = {**digest_companions(place.path), **digests}  # what a vocabulary was read from counts
    beside_weights = companions.gather(*chosen, size)
    digests |= {path: digest_file(path) for path in beside_weights.values() if path not in digests}  # those made here
    shards = plan_shards([t.output for t in plan.tensors], job.max_shard_size)
    tokens = vocabulary.numberings if vocabulary is not None else ()
    _check_recorded(job.recorded, plan, every_source, tokens)
    fingerprints = [m.checkpoint.fingerprint() for m in every]
    beside = {name: digests[path] for name, path in beside_weights.items()}
    configurations = read_beside(sources)
    orbax, said = _orbax_output(job, models, plan, stacked)
    decided = [configurations, tokens]
    rest = [
        shards,
        job.expected,
        beside,
        job.allow_nonfinite,
        decided,
        *([orbax.to_json()] if orbax is not None else []),
        *([statistics.identity()] if statistics.models else []),
    ]
    inputs = [
        [m.input.name, job.outlined.get(m.input.name) or [str(m.place.path), told]]
        for m, told in zip(every, fingerprints, strict=True)
    ]
    identity = job.whole or _identity(job.recipe, plan, inputs, rest, job.scheme)
    picked = _picked(job.recipe, plan.template == len(models) - 1 and base is not None) if stacked else None
    unties = models[plan.template].given_head
    notes = job.said + said + tuple(note for m in models for note in remarks(m.input.name, m.place.path, m.checkpoint))
    notes += tuple(note for source in sources if (note := tokenizer_note(source.place)) is not None)
    notes += tuple(notes_on_float8(job.recipe, sources))
    notes += tuple(notes_on_configurations([(s.input.name, read_config(s.place.path)) for s in sources]))
    notes += tuple(model.note for model in models if model.note is not None) + statistics.notes
    givers = givers_of_rows(models, sources, plan.template, job.recipe) if stacked else models
    notes += united.notes if united is not None else tuple(notes_on_numbers(givers, job.recipe, job.scheme))
    written = shards, beside_weights, fingerprints, identity, picked, unties, notes
    ready = Ready(every, every_source, plan, *written, vocabulary, orbax, tokens, statistics, digests, configurations)
    check_beside(job, ready)
    _check_agreement(processes, job.recipe, ready, rest)
    return ready


def check_beside(job: MergeJob, ready: Ready) -> None:
    """Raise M3Error if what stands beside an input's weights is not what the merge was planned from.

    Args:
        job: The merge.
        ready: The same, prepared.
    """
    sources = ready.sources[: len(ready.configurations)]  # without statistics
    now = [configuration_of(source.place.path) for source in sources]
    changed = [own != source.beside for own, source in zip(now, sources, strict=True)]
    planned = zip(ready.configurations, read_beside(sources), strict=True)
    changed = [odd or then != own for odd, (then, own) in zip(changed, planned, strict=True)]
    if any(changed):
        name = sources[changed.index(True)].input.name
        raise M3Error(
            f"{job.out}: the configuration of {name} changed while it was being merged: merge again once it is at rest"
        )
    check_files(ready.digests)


def read_beside(sources: Sequence[OpenedModel]) -> list[Any]:
    """What was read of each model beside its weights to know its tensors; its adapter's is in its fingerprint.

    Args:
        sources: The models that are read.
    """
    read = (lambda path: find_home(path).config) if libraries_differ(sources) else read_config
    return [[s.input.name, read(s.place.path), step_metadata(s.place.path)] for s in sources]


def _orbax_output(
    job: MergeJob, models: Sequence[OpenedModel], plan: MergePlan, stacked: bool
) -> tuple[OrbaxOutput | None, tuple[str, ...]]:
    """How the output is written as Orbax, and what a user should know of it; None where it is safetensors."""
    template = models[plan.template]
    same = recognise(template.place.path).name
    asked = job.format
    if asked not in (None, ORBAX.name) or (asked is None and same != ORBAX.name):
        return None, ()
    if stacked and same == ORBAX.name:
        what = "slices: stack layers" if job.recipe.modules is None else "modules: put models together"
        raise M3Error(
            f"{what}, for which the tree of {template.input.name} has no place: write safetensors "
            "(--format safetensors)"
        )
    if job.recipe.also_for:
        raise M3Error("also_for: links weight files, which Orbax cannot: write safetensors (--format safetensors)")
    outputs = [tensor.output for tensor in plan.tensors]
    stored = {
        info.name: stored_at(template.checkpoint, info.name).name
        if same == ORBAX.name and info.name in template.checkpoint.tensors
        else info.name
        for info in outputs
    }
    state = models[0].place.path if job.recipe.keep_state == "first" else None
    found = plan_orbax(template.place.path, state, stored, outputs, job.as_step)
    trees = ", ".join(found.trees_beside)
    copied = f"{trees} beside {found.item}: copied from {models[0].input.name} as it is, its parameters not merged"
    code = found.beside.note((template if state is None else models[0]).input.name)
    return found, tuple(note for note in (copied if trees else None, code) if note is not None)


def _picked(recipe: Recipe, from_base: bool) -> dict[str | None, list[int]]:
    """For each layer of stacked ones, which layer of the model that gives the configuration it is taken to be."""

    def layers_of(section: Section) -> range:
        source = section.experts[0]
        picked = base_layers(section) if from_base or not isinstance(source, Source) else source.layer_range
        return range(*picked)

    sliced = {module: own for module, own in recipe.sections.items() if own[0].layers is not None}
    return {module: [layer for section in own for layer in layers_of(section)] for module, own in sliced.items()}


def recorded_digests(ready: Ready, recorded: Mapping[str, Any] | None) -> dict[str, dict[str, str]] | None:
    """The digests that a replay's inputs must have: of stored tensors, by where they are.

    Args:
        ready: The merge.
        recorded: The manifest that it follows, if any.
    """
    if recorded is None:
        return None
    found: dict[str, dict[str, str]] = {}
    for source, record in zip(ready.sources, recorded["inputs"], strict=True):
        found.setdefault(source.checkpoint.location, {}).update(record["tensors"])
    return found


def _check_recorded(
    recorded: Mapping[str, Any] | None, plan: MergePlan, models: Sequence[OpenedModel], tokens: Sequence[str]
) -> None:
    """Refuse early what a replay cannot reproduce: tensors that came, went or changed their shape, other tokens."""
    if recorded is None:
        return
    planned = {t.output.name: [t.output.dtype, list(t.output.shape)] for t in plan.tensors}
    told = {name: [e["dtype"], e["shape"]] for name, e in recorded["output"]["tensors"].items()}
    if len(recorded["inputs"]) != len(models) or planned != told:
        name = next((n for n in {**planned, **told} if planned.get(n) != told.get(n)), "the list of models")
        raise M3Error(f"{models[0].checkpoint.location}: {name} is not as the manifest records: restore the models")
    for model, record in zip(models, recorded["inputs"], strict=True):
        then = record.get("adapter", {}).get("config")
        if then != (None if model.adapting is None else model.adapting.config_digest):
            raise M3Error(f"{model.input.name}: the adapter's configuration has changed since: restore it")
    for record, own in zip(recorded["inputs"], tokens, strict=False):  # none where a recipe asks for no vocabulary
        if record["name"] not in recorded.get("intermediates", {}) and record.get("tokens", own) != own:
            raise M3Error(manifest.other_tokens(record))


@contextmanager
def prepared(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    locate: Callable[[str], ModelDirectory] = locate_model,
    readying: Callable[[MergeJob, Processes], MergeJob] | None = None,
    format: str | None = None,
    writes: bool = True,
) -> Iterator[Ready]:
    """A merge up to its first byte: inputs opened, shapes compared, everything planned from headers alone.

    Args:
        recipe: What to merge.
        out: Where the output would go; it must be free if anything is to be written.
        overwrite: Let it exist.
        max_shard_size: As in `merge_checkpoint`.
        locate: Finds the models; `sketch_model` where headers are all that is wanted of them.
        readying: Finds the merges that this one starts from: `intermediates.outlined` where headers are all that is
            wanted of them.
        format: As in `merge_checkpoint`.
        writes: Whether anything is to be written.

    Yields:
        The merge, with its inputs open.

    Raises:
        M3Error: What `merge_checkpoint` would raise before it reads weights.
    """
    size = parse_size(DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size)
    loaded, said = with_steps(recipe)
    job = MergeJob(loaded, as_path(out), overwrite, size, None, None, False, None, locate=locate)
    job = job._replace(format=written_format(format, loaded), said=said, writes=writes)
    with saying_what_failed(job.out), ExitStack() as stack:
        yield prepare(job if readying is None else readying(job, ALONE), ALONE, stack)
