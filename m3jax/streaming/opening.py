"""The inputs of a merge: models opened, and seen under one naming, layout and kind of numbers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from m3jax import documents
from m3jax.anatomy import Overrides, Part
from m3jax.anatomy.float8 import Dequantisation, find_dequantisation, seen_dequantized, without_quantisation
from m3jax.anatomy.layout import find_layout
from m3jax.anatomy.namings import find_mapping
from m3jax.anatomy.stored import stored_anatomy
from m3jax.arithmetic import SCHEMES
from m3jax.checkpoints import Checkpoint, ModelDirectory
from m3jax.checkpoints.adapters import Adapting, check_no_adapter, open_stored, seen_adapted
from m3jax.checkpoints.locate import locate_recorded, read_config
from m3jax.checkpoints.views import Stored, prefix_view, renamed, selected, stacked_layers, stored_at
from m3jax.checkpoints.views_assembled import assembled
from m3jax.checkpoints.views_stacked import BlockPlace, Stacking, restacked
from m3jax.errors import M3Error
from m3jax.naming import block_of
from m3jax.recipe import Recipe
from m3jax.streaming.aligning import Alignment, aligned
from m3jax.streaming.plan import Input, as_stored, as_untied, untied_head

_WEIGHTS = frozenset({"parameter", "statistics", "adapter", "quantised"})  # what every naming of a model has

if TYPE_CHECKING:
    from m3jax.streaming.jobs import MergeJob


class OpenedModel(NamedTuple):
    """One opened input.

    Attributes:
        role: "expert", "base", or "template" for a base of which only config and tokenizer are used.
        place: Where it is.
        checkpoint: Its tensors.
        input: What the plan knows of it.
        dequantised: How its float8 weights are to be seen as numbers; None where they are not, or there are none.
        adapting: What the adapter does that it was named with; None where there is none.
        given_head: Whether its output embedding is its input embedding, seen under both names.
        note: How its names are read, where they are not those of the others.
    """

    role: str
    place: ModelDirectory
    checkpoint: Checkpoint
    input: Input
    dequantised: Dequantisation | None = None
    adapting: Adapting | None = None
    given_head: bool = False
    note: str | None = None


def _open_model(name: str, role: str, job: "MergeJob", stack: ExitStack) -> OpenedModel:
    place = job.locate(name) if job.recorded is None else locate_recorded(name, job.sources, job.locate)
    check_no_adapter(place)
    stored, adapting = open_stored(place)
    checkpoint = stack.enter_context(stored)
    if not checkpoint.tensors:
        raise M3Error(f"{name}: holds no tensors, so there is nothing to merge: give a model that has weights")
    model = _opened(role, place._replace(name=name), checkpoint, job)._replace(adapting=adapting)
    if not job.recipe.dequantize:
        return model
    config = read_config(place.path)
    return model._replace(dequantised=find_dequantisation(checkpoint.tensors, config, name))


def _viewed(model: OpenedModel, view: Checkpoint, job: "MergeJob") -> OpenedModel:
    """The same model seen otherwise."""
    opened = _opened(model.role, model.place, view, job, model.dequantised)
    return model._replace(checkpoint=view, input=opened.input)


def _dequantised(model: OpenedModel, job: "MergeJob") -> OpenedModel:
    """A model with numbers in place of float8 weights and scales, where a recipe asks for it, and with its adapter."""
    if model.dequantised is not None:
        model = _viewed(model, seen_dequantized(model.checkpoint, model.dequantised), job)
    if model.adapting is not None:
        model = _viewed(model, seen_adapted(model.checkpoint, model.adapting), job)
    return model


def _opened(
    role: str, place: ModelDirectory, checkpoint: Checkpoint, job: "MergeJob", dequantised: Dequantisation | None = None
) -> OpenedModel:
    config, overrides = read_config(place.path), job.recipe.anatomy_overrides()
    if config is not None and dequantised is not None:
        config = without_quantisation(config)
    if job.scheme == SCHEMES[0]:
        anatomy = as_stored(checkpoint.tensors, config)
    else:
        said = _fitting(Overrides(**overrides), checkpoint.tensors) if overrides else None
        anatomy = stored_anatomy(checkpoint, place.path, config, said)
    return OpenedModel(role, place, checkpoint, Input(place.name, checkpoint.tensors, anatomy), dequantised)


def _fitting(said: Overrides, names: Iterable[str]) -> Overrides:
    """What a recipe says of tensors, without what is of models that are stored otherwise."""
    there = list(names)

    def found(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {each: told for each, told in patterns.items() if any(map(documents.pattern(each).search, there))}

    return said._replace(stacked=found(said.stacked), kinds=found(said.kinds))


def _check_overrides(job: "MergeJob", models: Sequence[OpenedModel]) -> None:
    """Raise M3Error if what a recipe says of tensors is of no model's."""
    said = Overrides(**(job.recipe.anatomy_overrides() or {}))
    found = _fitting(said, [name for model in models for name in model.checkpoint.tensors])
    for key, patterns, fitting in (("stacked", said.stacked, found.stacked), ("kinds", said.kinds, found.kinds)):
        lost = next((pattern for pattern in patterns if pattern not in fitting), None)
        if lost is not None:
            raise M3Error(f"anatomy: {key}: {lost!r} is found in no tensor's name: correct the pattern.")


class OpenedModels(NamedTuple):
    """The inputs of a plan.

    Attributes:
        models: Experts first, then the base if there is one.
        sources: The models that are read for them.
        stacked: Whether layers are stacked.
        vocabulary: The one that all of them have; None where the recipe asks for none.
    """

    models: list[OpenedModel]
    sources: list[OpenedModel]
    stacked: bool
    vocabulary: Alignment | None


def open_models(job: "MergeJob", stack: ExitStack) -> OpenedModels:
    """The inputs of the plan: the models that are read, or views of them."""
    recipe, role = job.recipe, job.recipe.base_role
    if recipe.stacks:
        return _stack_models(job, role, {}, stack)
    sources = [_open_model(entry.model, "expert", job, stack) for entry in recipe.experts]
    if recipe.declared_layers not in (None, _depth(sources[0].checkpoint)):  # the first layers of a longer model
        return _stack_models(job, role, {model.place.name: model for model in sources}, stack)
    if recipe.base_model is not None and role is not None:
        sources.append(_open_model(recipe.base_model, role, job, stack))
    _check_overrides(job, sources)
    models = [_dequantised(model, job) for model in sources]
    alike = _under_one_naming(_stacked_alike(_alike(models, job), job), job)
    seen, vocabulary = aligned(_with_heads(alike, job), recipe, job.scheme)
    return OpenedModels(seen, sources, False, vocabulary)


def _alike(models: Sequence[OpenedModel], job: "MergeJob") -> list[OpenedModel]:
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


def _stacked_alike(models: Sequence[OpenedModel], job: "MergeJob") -> list[OpenedModel]:
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


def _under_one_naming(models: Sequence[OpenedModel], job: "MergeJob") -> list[OpenedModel]:
    """The models under the names of the base or the first, where they store one architecture under several."""
    template = _template_of(models)

    def unnamed(model: OpenedModel) -> set[str]:
        anatomy = model.input.anatomy
        return {name for name, part in anatomy.parts.items() if part.kind not in _WEIGHTS or name == anatomy.head}

    def under_it(model: OpenedModel) -> OpenedModel:
        family, wanted = model.input.anatomy.family, template.input.anatomy.family
        if family is not None and wanted is not None and family != wanted:
            return model  # BERT and ELECTRA are alike but for a name
        found = find_mapping(
            model.checkpoint.tensors,
            template.checkpoint.tensors,
            called=(model.input.name, template.input.name),
            optional=unnamed(model) | unnamed(template),
            family=family,
        )
        if found is None:
            return model
        return _viewed(model, assembled(model.checkpoint, found.assemblies), job)._replace(note=found.note)

    return [model if model is template else under_it(model) for model in models]


def _with_heads(models: Sequence[OpenedModel], job: "MergeJob") -> list[OpenedModel]:
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


def with_written_dtypes(models: Sequence[OpenedModel], sources: Sequence[OpenedModel]) -> list[OpenedModel]:
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


def notes_on_float8(recipe: Recipe, sources: Sequence[OpenedModel]) -> Iterator[str]:
    """What a reader should know of weights that were float8."""
    found = [(source, source.dequantised) for source in sources if source.dequantised is not None]
    for source, told in found:
        yield f"{len(told.scalings)} float8 weights of {source.input.name} are merged as the numbers they stand for"
    if recipe.dequantize and not found:
        yield "dequantize: no model has float8 weights, so there was nothing to do"


def _depth(checkpoint: Checkpoint) -> int:
    """How many layers a model has."""
    return 1 + max((block[1] for block in map(block_of, checkpoint.tensors) if block), default=-1)


def _stack_models(job: "MergeJob", role: str | None, opened: dict[str, OpenedModel], stack: ExitStack) -> OpenedModels:
    """The inputs of a merge whose slices stack layers: each a view of the models that its layers come from."""
    recipe = job.recipe
    columns = recipe.stacked_experts()
    for column in columns:
        for source in column:
            if source.model not in opened:
                opened[source.model] = _open_model(source.model, "expert", job, stack)
    _check_overrides(job, list(opened.values()))
    if recipe.base_model is not None and role is not None and recipe.base_model not in opened:
        opened[recipe.base_model] = _open_model(recipe.base_model, role, job, stack)
    views, vocabulary = aligned([_dequantised(model, job) for model in opened.values()], recipe, job.scheme)
    seen = dict(zip(opened, views, strict=True))
    models = []
    for column in columns:
        runs = [(seen[source.model].checkpoint, *source.layer_range) for source in column]
        models.append(_viewed(seen[column[0].model], stacked_layers(runs), job))
    if recipe.base_model is not None and role is not None:
        base = seen[recipe.base_model]
        layers = selected(base.checkpoint, *recipe.stacked_base())
        models.append(_viewed(base._replace(role=role), layers, job))
    return OpenedModels(models, list(opened.values()), True, vocabulary)
