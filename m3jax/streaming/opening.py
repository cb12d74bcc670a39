"""The inputs of a merge: models opened, and seen under one naming, layout and kind of numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m3jax import documents
from m3jax.anatomy import Overrides, Part
from m3jax.anatomy.float8 import Dequantisation, find_dequantisation, seen_dequantized, without_quantisation
from m3jax.anatomy.layout import find_layout
from m3jax.anatomy.libraries import (
    MAXTEXT,
    BlockLayout,
    WantedLayout,
    layout_of,
    library_of,
    parameters_of,
    seen_as,
)
from m3jax.anatomy.modules import modules_of
from m3jax.anatomy.namings import find_mapping
from m3jax.anatomy.stored import find_home, step_metadata, stored_anatomy
from m3jax.arithmetic import SCHEMES
from m3jax.checkpoints import Checkpoint, ModelDirectory
from m3jax.checkpoints.adapters import Adapting, check_no_adapter, open_stored, seen_adapted
from m3jax.checkpoints.locate import locate_recorded, read_config
from m3jax.checkpoints.views import Run, Stored, beside, part_of, prefix_view, renamed, stacked_layers, stored_at
from m3jax.checkpoints.views_assembled import assembled
from m3jax.checkpoints.views_stacked import BlockPlace, Stacking, restacked
from m3jax.errors import M3Error
from m3jax.outputs.statistics import check_no_statistics
from m3jax.recipe import Recipe, Source
from m3jax.recipe.sections import Section, base_layers
from m3jax.streaming.aligning import Alignment, aligned
from m3jax.streaming.plan import Input, as_stored, as_untied, untied_head
from m3jax.vocabulary import Model, word_tensors

_WEIGHTS = frozenset({"parameter", "statistics", "adapter", "quantised"})  # what every naming of a model has

if TYPE_CHECKING:
    from m3jax.streaming.jobs import MergeJob


class OpenedModel(NamedTuple):
    """One opened input.

    Attributes:
        role: "expert", "base", "template" for a base of which only config and tokenizer are used, or "statistics".
        place: Where it is.
        checkpoint: Its tensors.
        input: What the plan knows of it.
        dequantised: How its float8 weights are to be seen as numbers; None where they are not, or there are none.
        adapting: What the adapter does that it was named with; None where there is none.
        given_head: Whether its output embedding is its input embedding, seen under both names.
        note: How its names are read, where they are not those of the others.
        beside: What stood beside its weights, as `configuration_of` tells it, before anything was made of that.
    """

    role: str
    place: ModelDirectory
    checkpoint: Checkpoint
    input: Input
    dequantised: Dequantisation | None = None
    adapting: Adapting | None = None
    given_head: bool = False
    note: str | None = None
    beside: Sequence[Any] = ()


def configuration_of(path: Path) -> list[Any]:
    """What is read beside a model's weights to know its tensors.

    Args:
        path: Where it is.
    """
    return [read_config(path), step_metadata(path)]


def open_model(name: str, role: str, job: "MergeJob", stack: ExitStack) -> OpenedModel:
    """A model, or the statistics of one, as it is stored.

    Args:
        name: What the recipe calls it.
        role: As `OpenedModel.role`.
        job: The merge.
        stack: Keeps it open.

    Raises:
        M3Error: It cannot be opened, has no tensors, or holds statistics where a model is asked for.
    """
    if job.recorded is None:
        place = job.locate(job.sources.get(name, name))
    else:
        place = locate_recorded(name, job.sources, job.locate)
    check_no_adapter(place)
    if role in ("expert", "base"):
        check_no_statistics(name, place.path)
    told = configuration_of(place.path)
    stored, adapting = open_stored(place)
    checkpoint = stack.enter_context(stored)
    if not checkpoint.tensors:
        raise M3Error(f"{name}: holds no tensors, so there is nothing to merge: give a model that has weights")
    model = _opened(role, place._replace(name=name), checkpoint, job)
    model = model._replace(adapting=adapting, beside=told)
    if not job.recipe.dequantize:
        return model
    config = read_config(place.path)
    return model._replace(dequantised=find_dequantisation(checkpoint.tensors, config, name))


def viewed(model: OpenedModel, view: Checkpoint, job: "MergeJob") -> OpenedModel:
    """The same model seen otherwise.

    Args:
        model: As it was seen.
        view: What it is seen as.
        job: The merge.
    """
    opened = _opened(model.role, model.place, view, job, model.dequantised)
    return model._replace(checkpoint=view, input=opened.input)


def _dequantised(model: OpenedModel, job: "MergeJob") -> OpenedModel:
    """A model with numbers in place of float8 weights and scales, where a recipe asks for it, and with its adapter."""
    if model.dequantised is not None:
        model = viewed(model, seen_dequantized(model.checkpoint, model.dequantised), job)
    adapting = model.adapting
    if adapting is not None:
        model = viewed(model, seen_adapted(model.checkpoint, adapting), job)
        _check_copies(model.input, adapting)
    return model


def _check_copies(model: Input, adapting: Adapting) -> None:
    """Raise M3Error if an adapter leaves two of what is one tensor, as a recipe or the architecture has it."""
    for copy, part in model.anatomy.parts.items():
        original = part.alias_of
        if original is None or (copy in adapting.adaptations) == (original in adapting.adaptations):
            continue
        changed, kept = (copy, original) if copy in adapting.adaptations else (original, copy)
        raise M3Error(
            f"{model.name}: its adapter changes {changed} but not {kept}, which are one tensor here: where they are two"
            " embeddings, say so by tie_word_embeddings in config.json or `anatomy: {tied: false}`; else merge the"
            " adapter in PEFT first."
        )


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
        return _put_together(job, role, {}, stack)
    sources = [open_model(entry.model, "expert", job, stack) for entry in recipe.experts]
    base = recipe.every_section[0].base
    if base is not None and role is not None:
        sources.append(open_model(base, role, job, stack))
    declared = recipe.declared_layers()
    if declared is not None and any(_depth(model) != declared for model in sources):
        opened: dict[str, OpenedModel] = {}
        for model in sources:
            opened.setdefault(model.place.name, model)  # as the expert that it is, if a base is one
        return _put_together(job, role, opened, stack)  # of longer models
    _check_overrides(job, sources)
    models = _in_one_library([_dequantised(model, job) for model in sources], job)
    seen, vocabulary = aligned(_with_heads(seen_alike(models, job), job), recipe, job.scheme, _base_of(recipe, [base]))
    return OpenedModels(seen, sources, False, vocabulary)


def _base_of(recipe: Recipe, bases: Sequence[str | None]) -> str | None:
    """The first of some bases, which is the base of the whole merge; None where none is read as one."""
    is_read = recipe.base_role is not None or recipe.row.base == "first"
    return next((name for name in bases if name is not None), None) if is_read else None


def seen_alike(models: Sequence[OpenedModel], job: "MergeJob") -> list[OpenedModel]:
    """Models under the names and in the layout of the base or the first.

    Args:
        models: The base, if there is one, last.
        job: The merge.
    """
    return _under_one_naming(_stacked_alike(_alike(models, job), job), job)


def _alike(models: Sequence[OpenedModel], job: "MergeJob") -> list[OpenedModel]:
    """The models under one naming: without a wrapper that others have not, and with the template's boxes."""
    names = [list(model.checkpoint.tensors) for model in models]
    seen = []
    for i, model in enumerate(models):
        view = prefix_view(model.checkpoint, *(names[:i] + names[i + 1 :]))
        seen.append(model if view is model.checkpoint else viewed(model, view, job))
    template = _template_of(seen)
    wanted = {part.canonical: name for name, part in template.input.anatomy.parts.items()}

    def renamed_alike(model: OpenedModel) -> OpenedModel:
        own = {part.canonical: name for name, part in model.input.anatomy.parts.items()}
        if model.checkpoint.tensors.keys() <= template.checkpoint.tensors.keys() or not own.keys() <= wanted.keys():
            return model  # statistics, of which a tensor may have none, are alike with fewer
        view = renamed(model.checkpoint, {wanted[name]: stored for name, stored in own.items()})
        return viewed(model, view, job)

    return [renamed_alike(model) for model in seen]


def libraries_differ(models: Iterable[OpenedModel]) -> bool:
    """Whether models have the names of several libraries, so that a configuration decides how one is read."""
    return len({library_of(model.input.anatomy) for model in models} - {None}) > 1


def _in_one_library(models: Sequence[OpenedModel], job: "MergeJob") -> list[OpenedModel]:
    """The models with the names and the layout of the base or the first, where a JAX library stores some otherwise."""
    template = _template_of(models)
    wanted = library_of(template.input.anatomy)
    if wanted is None or not libraries_differ(models) or job.scheme == SCHEMES[0]:
        return list(models)
    configs = [find_home(model.place.path).config for model in (template, *models)]
    known = next((config for config in configs if config is not None), None)
    tensors, named = template.checkpoint.tensors, parameters_of(template.input.anatomy)
    told = {**template.checkpoint.metadata, **step_metadata(template.place.path)}
    stacks = layout_of(template.input.anatomy, told, template.input.name) if wanted == MAXTEXT.name else BlockLayout()
    layout = WantedLayout(wanted, stacks, {canonical: tensors[name] for canonical, name in named.items()})

    def in_library(model: OpenedModel) -> OpenedModel:
        own = library_of(model.input.anatomy)
        if own is None or own == wanted:
            return model
        name, metadata = model.input.name, {**model.checkpoint.metadata, **step_metadata(model.place.path)}
        config = find_home(model.place.path).config or known
        seen = seen_as(model.checkpoint, layout, config, metadata, name)
        first = next(iter(seen.checkpoint.tensors))
        read = f"{name}: its names and layout, {own}'s, are read as {wanted}'s, those of {template.input.name}: "
        note = f"{read}{stored_at(seen.checkpoint, first).name} as {first}"
        return viewed(model, seen.checkpoint, job)._replace(note="; ".join((note, *seen.notes)))

    return [in_library(model) for model in models]


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
        return viewed(model, restacked(model.checkpoint, {**rest, **found}), job)._replace(note=note)

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
        return viewed(model, assembled(model.checkpoint, found.assemblies), job)._replace(note=found.note)

    return [model if model is template else under_it(model) for model in models]


def _with_heads(
    models: Sequence[OpenedModel], job: "MergeJob", deciding: Sequence[OpenedModel] | None = None
) -> list[OpenedModel]:
    """The models with an output embedding, where one of those that decide (all, if None) has its own.

    A tied model's is its input embedding, whatever copy of it is stored.
    """
    heads = {untied_head(model.input) for model in (models if deciding is None else deciding)} - {None}
    if len(heads) != 1:
        return list(models)
    (head,) = heads

    def with_head(model: OpenedModel) -> OpenedModel:
        embedding, ties = model.input.anatomy.embedding, model.input.anatomy.ties_embeddings
        if ties is False or (head in model.checkpoint.tensors and not ties):
            return model  # one that is not tied lacks its head, which the plan says
        if head is None or embedding is None:
            return model
        tensors = model.checkpoint.tensors
        if head in tensors and tensors[head].shape != tensors[embedding].shape:
            return _untied(model)  # of which the anatomy says that they count as two
        rest = part_of(model.checkpoint, [name for name in model.checkpoint.tensors if name != head])
        return _untied(viewed(model, renamed(rest, {head: embedding, embedding: embedding}), job))

    return [with_head(model) for model in models]


def _untied(model: OpenedModel) -> OpenedModel:
    """A model whose output embedding stands for itself, though its configuration ties it."""
    return model._replace(input=model.input._replace(anatomy=as_untied(model.input.anatomy)), given_head=True)


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


def givers_of_rows(
    models: Sequence[OpenedModel], sources: Sequence[OpenedModel], template: int, recipe: Recipe
) -> list[OpenedModel]:
    """The models that the rows of tokens of stacked inputs are of, and last the one whose tokenizer the output has.

    Args:
        models: The inputs of the plan, each a view of several sources.
        sources: The models that are read for them.
        template: Which of the inputs gives the output its tokenizer.
        recipe: What is asked for: rows that it excludes are of the template alone.
    """
    places = {
        stored_at(model.checkpoint, name).location
        for position, model in enumerate(models)
        for name in word_tensors(Model(model.input.name, model.checkpoint, model.input.anatomy))
        if position == template or not recipe.excludes(name)
    }
    giving = [source._replace(role="expert") for source in sources if source.checkpoint.location in places]
    return [*giving, models[template]._replace(role="template")]


def _depth(model: OpenedModel) -> int:
    """How many layers a model has."""
    return max((tower.depth for tower in model.input.anatomy.towers.values()), default=0)


def _put_together(job: "MergeJob", role: str | None, opened: dict[str, OpenedModel], stack: ExitStack) -> OpenedModels:
    """The inputs of a merge of slices or modules: each a view of the models that its layers and modules come from."""
    recipe = job.recipe
    sections = recipe.every_section
    bases = [recipe.base_model, *(section.base for section in sections)]
    named = [(entry.model, "expert") for section in sections for entry in section.experts]
    named += [(name, role) for name in bases if name is not None and role is not None]
    for name, own_role in named:
        if name not in opened:
            opened[name] = open_model(name, own_role, job, stack)
    _check_overrides(job, list(opened.values()))
    base = _base_of(recipe, [name for name in bases if name in opened])
    numbers = {name: _dequantised(model, job) for name, model in opened.items()}
    ends = [numbers[name] for name in _ends(recipe, numbers, base if role is not None else None)]
    views, vocabulary = aligned(_with_heads(list(numbers.values()), job, ends), recipe, job.scheme, base)
    seen = dict(zip(opened, views, strict=True))
    parts = {name: _parts_of(recipe, model) for name, model in seen.items()}

    def column(pick: Callable[[Section], Picked | None]) -> Checkpoint:
        """What one expert, or the base, is over all sections."""
        found = []
        for module, own in recipe.sections.items():
            runs: list[Run] = []
            for section in own:
                picked = pick(section)
                layers = (0, section.layers or 0) if picked is None else picked.layers or (0, 0)
                runs.append((None if picked is None else parts[picked.model][module], *layers))
            here = [checkpoint for checkpoint, _, _ in runs if checkpoint is not None]
            found += [stacked_layers(runs) if own[0].layers is not None else here[0]] if here else []
        return found[0] if len(found) == 1 else beside(found)

    def expert(number: int) -> Callable[[Section], Picked | None]:
        return lambda section: _picked(section, number)

    gives_heads = any(model.given_head for model in views)

    def seen_by(model: OpenedModel, own_role: str, view: Checkpoint) -> OpenedModel:
        found = viewed(model._replace(role=own_role), view, job)
        return _untied(found)._replace(given_head=model.given_head) if gives_heads else found

    models = []
    for number in range(max(recipe.counts)):
        first = next(found for section in sections if (found := _picked(section, number)) is not None)
        models.append(seen_by(seen[first.model], "expert", column(expert(number))))
    _check_heads(models, ends, seen)
    if base is not None and role is not None:
        models.append(seen_by(seen[base], role, column(_picked_base)))
    return OpenedModels(models, list(opened.values()), True, vocabulary)


def _ends(recipe: Recipe, opened: Mapping[str, OpenedModel], base: str | None) -> list[str]:
    """The models that an output's embeddings may be of, and the one that gives its configuration."""
    parts = {name: _parts_of(recipe, model) for name, model in opened.items()}

    def has_words(module: str | None) -> bool:
        return any(
            {model.input.anatomy.embedding, model.input.anatomy.head} & parts[name][module].tensors.keys()
            for name, model in opened.items()
        )

    outer = [section for module, own in recipe.sections.items() if has_words(module) for section in (own[0], own[-1])]
    named = [entry.model for section in (recipe.every_section[0], *outer) for entry in section.experts]
    named += [section.base for section in outer if section.base is not None] if base is not None else []
    return list(dict.fromkeys([*named, *([base] if base is not None else [])]))


def _check_heads(models: Sequence[OpenedModel], ends: Sequence[OpenedModel], seen: Mapping[str, OpenedModel]) -> None:
    """Raise M3Error where some of the models at the ends have an output embedding, and stacked ones lack it."""
    heads = {head: model.input.name for model in ends if (head := untied_head(model.input)) is not None}
    if not heads:
        return
    (head, having), *_ = heads.items()
    tied = next((name for each in ends if seen[name := each.input.name].input.anatomy.ties_embeddings), None)
    lacking = next(
        (each.input.name for each in ends if not heads.keys() & seen[each.input.name].checkpoint.tensors), None
    )
    if tied is None and any(name in model.checkpoint.tensors for model in models for name in heads):
        return
    raise M3Error(
        f"{head}: is in {having} but not in {tied or lacking}, which would lose the output its output embedding: put "
        "together models of one architecture"
    )


class Picked(NamedTuple):
    """What a section takes of a model: the layers, or all that there is."""

    model: str
    layers: tuple[int, int] | None


def _picked(section: Section, number: int) -> Picked | None:
    """What a section takes for an expert; None where it has fewer."""
    if number >= len(section.experts):
        return None
    entry = section.experts[number]
    return Picked(entry.model, entry.layer_range if isinstance(entry, Source) else None)


def _picked_base(section: Section) -> Picked | None:
    if section.base is None:
        return None
    return Picked(section.base, None if section.layers is None else base_layers(section))


def _parts_of(recipe: Recipe, model: OpenedModel) -> dict[str | None, Checkpoint]:
    """A model by the modules of a recipe; under None where it has none."""
    if recipe.modules is None:
        return {None: model.checkpoint}
    owners = modules_of(model.input.anatomy, list(recipe.modules), model.input.name)
    return {
        module: part_of(model.checkpoint, [name for name, own in owners.items() if own == module])
        for module in recipe.modules
    }
