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

from m3jax.anatomy import Overrides, Part
from m3jax.anatomy.float8 import Dequantisation, find_dequantisation, seen_dequantized, without_quantisation
from m3jax.anatomy.layout import find_layout
from m3jax.anatomy.namings import find_mapping
from m3jax.anatomy.stored import stored_anatomy
from m3jax.arithmetic import SCHEME, SCHEMES
from m3jax.checkpoints import (
    Checkpoint,
    FileFingerprint,
    ModelDirectory,
    TensorInfo,
    digest_file,
    locate_model,
    open_checkpoint,
    parse_size,
    plan_shards,
)
from m3jax.checkpoints.locate import read_config
from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.checkpoints.trust import remarks
from m3jax.checkpoints.views import Stored, prefix_view, renamed, selected, stacked_layers, stored_at
from m3jax.checkpoints.views_assembled import assembled
from m3jax.checkpoints.views_stacked import BlockPlace, Stacking, restacked
from m3jax.cluster.processes import ALONE, Processes, gather
from m3jax.errors import M3Error, saying_what_failed
from m3jax.naming import block_of
from m3jax.outputs import companions, manifest
from m3jax.outputs.local import check_free, replaced_with
from m3jax.outputs.remote import check_remote_free
from m3jax.progress import Progress
from m3jax.recipe import Recipe
from m3jax.streaming.plan import DrawnWeights, Input, MergePlan, as_stored, as_untied, make_plan, untied_head

DEFAULT_SHARD_SIZE = "5GB"
_WEIGHTS = frozenset({"parameter", "statistics", "adapter", "quantised"})  # what every naming of a model has


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
        locate: Finds the models; `sketch_model` where headers are all that is wanted of them.
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
    locate: Callable[[str], ModelDirectory] = locate_model

    @property
    def scheme(self) -> str:
        """How bits are made: as now, or as they were when a replayed merge was made."""
        return SCHEME if self.recorded is None else str(self.recorded["bits"])

    @property
    def expected(self) -> dict[str, str]:
        """The digests that a replay must give."""
        tensors = self.recorded["output"]["tensors"] if self.recorded is not None else {}
        return {name: entry["digest"] for name, entry in tensors.items()}


class OpenedModel(NamedTuple):
    """One opened input.

    Attributes:
        role: "expert", "base", or "template" for a base of which only config and tokenizer are used.
        place: Where it is.
        checkpoint: Its tensors.
        input: What the plan knows of it.
        dequantised: How its float8 weights are to be seen as numbers; None where they are not, or there are none.
        given_head: Whether its output embedding is its input embedding, seen under both names.
        note: How its names are read, where they are not those of the others.
    """

    role: str
    place: ModelDirectory
    checkpoint: Checkpoint
    input: Input
    dequantised: Dequantisation | None = None
    given_head: bool = False
    note: str | None = None


def _open_model(name: str, role: str, job: MergeJob, stack: ExitStack) -> OpenedModel:
    try:
        place = job.locate(job.sources.get(name, name))
    except M3Error as error:
        if job.recorded is None:
            raise
        hint = f"if it has moved, --input {name}=HERE says where it is"
        raise M3Error(f"{str(error).rstrip('.')}; {hint}") from error
    checkpoint = stack.enter_context(open_checkpoint(place.path))
    if not checkpoint.tensors:
        raise M3Error(f"{name}: holds no tensors, so there is nothing to merge: give a model that has weights")
    model = _opened(role, place._replace(name=name), checkpoint, job)
    if not job.recipe.dequantize:
        return model
    config = read_config(place.path)
    return model._replace(dequantised=find_dequantisation(checkpoint.tensors, config, name))


def _viewed(model: OpenedModel, view: Checkpoint, job: MergeJob) -> OpenedModel:
    """The same model seen otherwise."""
    opened = _opened(model.role, model.place, view, job, model.dequantised)
    return model._replace(checkpoint=view, input=opened.input)


def _dequantised(model: OpenedModel, job: MergeJob) -> OpenedModel:
    """A model with numbers in place of float8 weights and scales, where a recipe asks for it."""
    if model.dequantised is None:
        return model
    return _viewed(model, seen_dequantized(model.checkpoint, model.dequantised), job)


def _opened(
    role: str, place: ModelDirectory, checkpoint: Checkpoint, job: MergeJob, dequantised: Dequantisation | None = None
) -> OpenedModel:
    config, overrides = read_config(place.path), job.recipe.anatomy_overrides()
    if config is not None and dequantised is not None:
        config = without_quantisation(config)
    if job.scheme == SCHEMES[0]:
        anatomy = as_stored(checkpoint.tensors, config)
    else:
        said = Overrides(**overrides) if overrides else None
        anatomy = stored_anatomy(checkpoint, place.path, config, said)
    return OpenedModel(role, place, checkpoint, Input(place.name, checkpoint.tensors, anatomy), dequantised)


class _Opened(NamedTuple):
    """The inputs of a plan, the models that are read for them, and whether layers are stacked."""

    models: list[OpenedModel]
    sources: list[OpenedModel]
    stacked: bool


def _open_models(job: MergeJob, stack: ExitStack) -> _Opened:
    """The inputs of the plan: the models that are read, or views of them."""
    recipe, role = job.recipe, job.recipe.base_role
    if recipe.stacks:
        return _stack_models(job, role, {}, stack)
    sources = [_open_model(entry.model, "expert", job, stack) for entry in recipe.experts]
    if recipe.declared_layers not in (None, _depth(sources[0].checkpoint)):  # the first layers of a longer model
        return _stack_models(job, role, {model.place.name: model for model in sources}, stack)
    if recipe.base_model is not None and role is not None:
        sources.append(_open_model(recipe.base_model, role, job, stack))
    models = [_dequantised(model, job) for model in sources]
    alike = _under_one_naming(_stacked_alike(_alike(models, job), job), job)
    return _Opened(_with_heads(alike, job), sources, False)


def _alike(models: Sequence[OpenedModel], job: MergeJob) -> list[OpenedModel]:
    """The models under one naming: without a wrapper that others have not, and with the template's boxes."""
    names = [list(model.checkpoint.tensors) for model in models]
    seen = []
    for i, model in enumerate(models):
        view = prefix_view(model.checkpoint, *(names[:i] + names[i + 1 :]))
        seen.append(model if view is model.checkpoint else _viewed(model, view, job))
    template = seen[-1]
    wanted = {part.canonical: name for name, part in template.input.anatomy.parts.items()}

    def renamed_alike(model: OpenedModel) -> OpenedModel:
        own = {part.canonical: name for name, part in model.input.anatomy.parts.items()}
        if model.checkpoint.tensors.keys() == template.checkpoint.tensors.keys() or own.keys() != wanted.keys():
            return model
        view = renamed(model.checkpoint, {wanted[name]: stored for name, stored in own.items()})
        return _viewed(model, view, job)

    return [renamed_alike(model) for model in seen]


def _template_of(models: Sequence[OpenedModel]) -> OpenedModel:
    """The model whose names and layout an output has: the base, or else the first."""
    return models[-1] if models[-1].role != "expert" else models[0]


def _stacked_alike(models: Sequence[OpenedModel], job: MergeJob) -> list[OpenedModel]:
    """The models with their blocks stacked as the template's are, or one by one as there."""
    template = _template_of(models)

    def layout(model: OpenedModel) -> tuple[Mapping[str, Part], dict[str, tuple[int, ...]]]:
        tensors = model.checkpoint.tensors
        return model.input.anatomy.parts, {name: info.shape for name, info in tensors.items()}

    def stacked_alike(model: OpenedModel) -> OpenedModel:
        found = find_layout(layout(template), layout(model))
        if not found:
            return model
        used = {block.stored for stacking in found.values() for block in stacking.blocks} | found.keys()
        rest = {name: Stacking((BlockPlace(name),)) for name in model.checkpoint.tensors if name not in used}
        note = (
            f"{model.input.name}: its blocks are read as those of {template.input.name} are stacked: "
            f"{next(iter(found.values())).blocks[0].stored} as {next(iter(found))}"
        )
        return _viewed(model, restacked(model.checkpoint, {**rest, **found}), job)._replace(note=note)

    return [model if model is template else stacked_alike(model) for model in models]


def _under_one_naming(models: Sequence[OpenedModel], job: MergeJob) -> list[OpenedModel]:
    """The models under the names of the base or the first, where they store one architecture under several."""
    template = _template_of(models)

    def unnamed(model: OpenedModel) -> set[str]:
        anatomy = model.input.anatomy
        return {name for name, part in anatomy.parts.items() if part.kind not in _WEIGHTS or name == anatomy.head}

    def under_it(model: OpenedModel) -> OpenedModel:
        found = find_mapping(
            model.checkpoint.tensors,
            template.checkpoint.tensors,
            called=(model.input.name, template.input.name),
            optional=unnamed(model) | unnamed(template),
            family=model.input.anatomy.family,
        )
        if found is None:
            return model
        return _viewed(model, assembled(model.checkpoint, found.assemblies), job)._replace(note=found.note)

    return [model if model is template else under_it(model) for model in models]


def _with_heads(models: Sequence[OpenedModel], job: MergeJob) -> list[OpenedModel]:
    """The models with an output embedding, where one of them has its own: a tied one's is its input embedding."""
    heads = {untied_head(model.input) for model in models if model.role != "template"} - {None}
    if len(heads) != 1:
        return list(models)
    (head,) = heads

    def with_head(model: OpenedModel) -> OpenedModel:
        embedding = model.input.anatomy.embedding
        if model.input.anatomy.ties_embeddings is False or head in model.checkpoint.tensors:
            return model  # one that is not tied lacks its head, which the plan says
        if head is None or embedding is None:
            return model
        view = renamed(model.checkpoint, {head: embedding, embedding: embedding})
        opened = _viewed(model, view, job)
        untied = opened.input._replace(anatomy=as_untied(opened.input.anatomy))
        return opened._replace(input=untied, given_head=True)

    return [with_head(model) for model in models]


def _with_written(models: Sequence[OpenedModel], sources: Sequence[OpenedModel]) -> list[OpenedModel]:
    """The models with the dtypes that weights have in an output which are read as float32 because of their scales."""
    dtypes = {
        Stored(source.checkpoint.location, name): source.dequantised.dtype
        for source in sources
        if source.dequantised is not None
        for name in source.dequantised.scalings
    }

    def with_written(model: OpenedModel) -> OpenedModel:
        places = {name: stored_at(model.checkpoint, name) for name in model.checkpoint.tensors}
        written = {name: dtypes[place] for name, place in places.items() if place in dtypes}
        return model._replace(input=model.input._replace(written=written))

    return [with_written(model) for model in models] if dtypes else list(models)


def _on_float8(recipe: Recipe, sources: Sequence[OpenedModel]) -> Iterator[str]:
    """What a reader should know of weights that were float8."""
    found = [(source, source.dequantised) for source in sources if source.dequantised is not None]
    for source, told in found:
        yield f"{len(told.scalings)} float8 weights of {source.input.name} are merged as the numbers they stand for"
    if recipe.dequantize and not found:
        yield "dequantize: no model has float8 weights, so there was nothing to do"


def _depth(checkpoint: Checkpoint) -> int:
    """How many layers a model has."""
    return 1 + max((block[1] for block in map(block_of, checkpoint.tensors) if block), default=-1)


def _stack_models(job: MergeJob, role: str | None, opened: dict[str, OpenedModel], stack: ExitStack) -> _Opened:
    """The inputs of a merge whose slices stack layers: each a view of the models that its layers come from."""
    recipe = job.recipe
    columns = recipe.stacked_experts()
    for column in columns:
        for source in column:
            if source.model not in opened:
                opened[source.model] = _open_model(source.model, "expert", job, stack)
    seen = {name: _dequantised(model, job) for name, model in opened.items()}
    models = []
    for column in columns:
        runs = [(seen[source.model].checkpoint, *source.layer_range) for source in column]
        models.append(_viewed(seen[column[0].model], stacked_layers(runs), job))
    if recipe.base_model is not None and role is not None:
        if recipe.base_model not in opened:
            opened[recipe.base_model] = _open_model(recipe.base_model, role, job, stack)
        base = seen.get(recipe.base_model) or _dequantised(opened[recipe.base_model], job)
        layers = selected(base.checkpoint, *recipe.stacked_base())
        models.append(_viewed(base._replace(role=role), layers, job))
    return _Opened(models, list(opened.values()), True)


class Ready(NamedTuple):
    """A merge as it is prepared: nothing of it has been written yet.

    Attributes:
        models: The inputs of the plan, experts first, then the base if there is one; views, where they are seen
            otherwise than they are stored.
        sources: The models that are read for them.
        plan: What happens to each tensor.
        shards: The files to write, each with its tensors.
        companions: The files that stand beside the weights, by name.
        fingerprints: What tells each input's files from others, without reading weights.
        identity: Digest of everything that the output's bytes depend on.
        picked: Where layers are stacked, for each which layer of the template it is taken to be; else None.
        unties: Whether the output has an output embedding of its own where the template has none.
        notes: What a user should know of how the inputs were read.
    """

    models: list[OpenedModel]
    sources: list[OpenedModel]
    plan: MergePlan
    shards: list[tuple[str, list[TensorInfo]]]
    companions: dict[str, Path]
    fingerprints: list[dict[str, FileFingerprint]]
    identity: str
    picked: list[int] | None
    unties: bool
    notes: tuple[str, ...]


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


def prepare(job: MergeJob, processes: Processes, stack: ExitStack) -> Ready:
    """Open the models and plan the merge.

    Args:
        job: What is asked for.
        processes: Who works at it; all of them have to see the same.
        stack: Keeps the models open.

    Raises:
        M3Error: The output place, the models or the recipe are at fault.
    """
    if processes.index == 0 and isinstance(job.out, RemotePath):
        check_remote_free(job.out, job.overwrite)
    elif processes.index == 0:
        check_free(job.out, job.overwrite)
    models, sources, stacked = _open_models(job, stack)
    models = _with_written(models, sources)
    _check_apart(job.out, sources)
    drawn: DrawnWeights | None = manifest.drawn_weights(job.recorded) if job.recorded is not None else job.chosen
    base = models[-1].input if models[-1].role != "expert" else None
    plan = make_plan(job.recipe, [m.input for m in models if m.role == "expert"], base, drawn)
    beside_weights = companions.gather(job.recipe, [m.place for m in models], plan.template)
    shards = plan_shards([t.output for t in plan.tensors], job.max_shard_size)
    _check_recorded(job.recorded, plan, sources)
    fingerprints = [m.checkpoint.fingerprint() for m in models]
    beside = {name: digest_file(path) for name, path in beside_weights.items()}
    rest = [shards, job.expected, beside, job.allow_nonfinite]
    inputs = [[m.input.name, str(m.place.path), told] for m, told in zip(models, fingerprints, strict=True)]
    identity = _identity(job.recipe, plan, inputs, rest, job.scheme)
    picked = _picked(job.recipe, plan.template == len(models) - 1 and base is not None) if stacked else None
    unties = models[plan.template].given_head
    notes = tuple(note for m in models for note in remarks(m.input.name, m.place.path, m.checkpoint))
    notes += tuple(_on_float8(job.recipe, sources))
    notes += tuple(model.note for model in models if model.note is not None)
    ready = Ready(models, sources, plan, shards, beside_weights, fingerprints, identity, picked, unties, notes)
    _check_agreement(processes, job.recipe, ready, rest)
    return ready


def _picked(recipe: Recipe, from_base: bool) -> list[int]:
    """For each layer of stacked ones, which layer of the model that gives the configuration it is taken to be."""
    own = [source.layer_range for source in recipe.stacked_experts()[0]]
    return [layer for first, last in (recipe.stacked_base() if from_base else own) for layer in range(first, last)]


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


def _check_apart(out: Path, models: Sequence[OpenedModel]) -> None:
    """Refuse to replace a directory that a model is read from."""
    for model in models:
        target = replaced_with(out, model.place.path)
        if target is not None:
            raise M3Error(f"{target}: is one of the models, or holds {model.input.name}: choose another output")


def _check_recorded(recorded: Mapping[str, Any] | None, plan: MergePlan, models: Sequence[OpenedModel]) -> None:
    """Refuse early what a replay cannot reproduce: tensors that came, went or changed their shape."""
    if recorded is None:
        return
    planned = {t.output.name: [t.output.dtype, list(t.output.shape)] for t in plan.tensors}
    told = {name: [e["dtype"], e["shape"]] for name, e in recorded["output"]["tensors"].items()}
    if len(recorded["inputs"]) != len(models) or planned != told:
        name = next((n for n in {**planned, **told} if planned.get(n) != told.get(n)), "the list of models")
        raise M3Error(f"{models[0].checkpoint.location}: {name} is not as the manifest records: restore the models")


@contextmanager
def prepared(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    locate: Callable[[str], ModelDirectory] = locate_model,
) -> Iterator[Ready]:
    """A merge up to its first byte: inputs opened, shapes compared, everything planned from headers alone.

    Args:
        recipe: What to merge.
        out: Where the output would go; it must be free.
        overwrite: Let it exist.
        max_shard_size: As in `merge_checkpoint`.
        locate: Finds the models; `sketch_model` where headers are all that is wanted of them.

    Yields:
        The merge, with its inputs open.

    Raises:
        M3Error: What `merge_checkpoint` would raise before it reads weights.
    """
    size = parse_size(DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size)
    job = MergeJob(recipe, as_path(out), overwrite, size, None, None, False, None, locate=locate)
    with saying_what_failed(job.out), ExitStack() as stack:
        yield prepare(job, ALONE, stack)
