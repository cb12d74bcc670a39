"""The plan of a merge: what happens to each tensor, from a recipe and the tensors' names and shapes alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from m3jax.anatomy import MODEL_KINDS, OUTSIDE_BLOCKS, Anatomy, Part, Tower, block_position
from m3jax.anatomy.inputs import inputs_first
from m3jax.anatomy.kinds import mend_of
from m3jax.anatomy.modules import modules_of
from m3jax.checkpoints import TensorInfo, natural_key
from m3jax.errors import M3Error
from m3jax.methods import factories
from m3jax.methods.base import Method, Settings, Sparsifier
from m3jax.methods.leaf import (
    Pipeline,
    check_pipeline,
    comparable,
    settings_of,
    statistics_pipeline,
    statistics_weights,
    without_idle_sparsifier,
)
from m3jax.methods.mixup import draw_groups, likelihood_of_one
from m3jax.naming import block_of, layer_position
from m3jax.recipe import Recipe, unmatched
from m3jax.recipe.settings import nearest

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DTYPE_NAMES = {name: dtype for dtype, name in FLOATS.items()}
WHOLE_MODEL = "model"
"""The group of weights drawn once for the model."""

NEARLY_ALL = 0.95
"""The share of one expert above which a draw is remarked on."""

DrawnWeights = Mapping[str, tuple[float, ...]]
"""By group of tensors; for slerp the one position t."""


class Input(NamedTuple):
    """One model that is read.

    Attributes:
        name: As the recipe names it.
        tensors: What it holds.
        anatomy: What each of them is.
        written: The dtype that those have in an output which are read wider than they are worth, by name.
        inputs_first: Of statistics that are matrices, whether the inputs of a weight lie along its first axes, by name,
            as far as they tell it.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    anatomy: Anatomy
    written: Mapping[str, str] = MappingProxyType({})
    inputs_first: Mapping[str, bool] = MappingProxyType({})


class BlockPlan(NamedTuple):
    """What happens to one tensor of a model's block: a stored tensor, or the part of one that stacks blocks.

    Attributes:
        name: What tells it from all others of the merge.
        key: What its masks are drawn from: its canonical name; of an alias, its original's.
        layer: The block of the model that it belongs to, which shares a draw by layer.
        settings: Its numbers.
    """

    name: str
    key: str
    layer: str
    settings: Settings


class Matrices(NamedTuple):
    """The statistics of a tensor for which a method prepares something: a matrix of each expert, read as a whole.

    Attributes:
        positions: The inputs that hold them.
        width: How many rows and columns each has: the inputs of the tensor.
        first: Whether these lie along its first axes, and not along its last one.
    """

    positions: tuple[int, ...]
    width: int
    first: bool


class TensorPlan(NamedTuple):
    """What happens to one tensor.

    Attributes:
        output: The tensor to write.
        sources: The inputs it is read from chunk by chunk, by position; the base, if it is used, first; statistics
            last.
        pipeline: What is done; None if it is copied, from the first source, all sources being equal.
        blocks: What it consists of: itself, or the blocks that it stacks; nothing if it is copied.
        axis: Along which it stacks blocks; None if it does not.
        apart: It does not count in what is measured of the whole model: it is another name of a tensor that does, or
            running statistics.
        why: Why it is not merged as others are; empty where it is.
        matrices: The statistics that are read as a whole, of a method that asks for such.
    """

    output: TensorInfo
    sources: tuple[int, ...]
    pipeline: Pipeline | None = None
    blocks: tuple[BlockPlan, ...] = ()
    axis: int | None = None
    apart: bool = False
    why: str = ""
    matrices: Matrices | None = None

    @property
    def has_base(self) -> bool:
        """Whether the first source is the base of task vectors."""
        return self.pipeline is not None and len(self.sources) > self.pipeline.num_arrays

    @property
    def statistics(self) -> tuple[int, ...]:
        """The inputs that hold its statistics: the last of the sources, or those of matrices."""
        if self.pipeline is None:
            return ()
        if self.matrices is not None:
            return self.matrices.positions
        return self.sources[len(self.sources) - self.pipeline.num_arrays + self.pipeline.num_experts :]

    @property
    def models(self) -> tuple[int, ...]:
        """Those of the sources that are models: all others."""
        return self.sources[: len(self.sources) - len(self.statistics)] if self.matrices is None else self.sources

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of each of its blocks."""
        shape = self.output.shape
        return shape if self.axis is None else (*shape[: self.axis], *shape[self.axis + 1 :])


class MergePlan(NamedTuple):
    """A whole merge, decided.

    Attributes:
        pipeline: What is done to tensors that are merged.
        tensors: In the order of writing: the natural order of names.
        weights: What was drawn, by group; empty where weights are given.
        inputs: The models, experts first, then the base if there is one, then the statistics of the experts.
        template: The position of the input whose config and tokenizer the output takes.
        notes: Sentences that a reader of the recipe should know.
    """

    pipeline: Pipeline
    tensors: tuple[TensorPlan, ...]
    weights: DrawnWeights
    inputs: tuple[Input, ...]
    template: int
    notes: tuple[str, ...] = ()


def method_of(recipe: Recipe) -> Method:
    """The merge method that a recipe asks for, with the parameters that hold for the whole merge."""
    return factories.make_method(recipe.row, recipe.parameters, recipe.uses_base)


def sparsifier_of(recipe: Recipe) -> Sparsifier | None:
    """The sparsifier that a recipe asks for; its parameters per tensor are in each tensor's settings."""
    if recipe.sparsify is None:
        return factories.make_own_sparsifier(recipe.row, recipe.parameters)
    row, asked = recipe.sparsify.row, recipe.sparsify
    return factories.make_sparsifier(row.sparsifier, row.parameters, asked.parameters, asked.target)


def as_stored(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> Anatomy:
    """What merges of the scheme m3jax-1 knew of tensors: each is a parameter, called as it is stored.

    Args:
        tensors: The checkpoint's.
        config: Its config.json.
    """
    blocks = {name: block_of(name) for name in tensors}
    depth = 1 + max((block[1] for block in blocks.values() if block), default=-1)

    def part(name: str) -> Part:
        block = blocks[name]
        groups = () if block is None else (block[0],)
        return Part(kind="parameter", canonical=name, groups=groups, position=layer_position(name, depth))

    towers = {"model": Tower("model", depth)}  # also without blocks, of which nobody was warned then
    head = next((name for name in tensors if name.split(".")[-2:] == ["lm_head", "weight"]), None)
    ties = None if config is None else config.get("tie_word_embeddings")
    return Anatomy({name: part(name) for name in tensors}, towers, ties_embeddings=ties, head=head)


def untied_head(model: Input) -> str | None:
    """The output embedding that a model has of its own; None if it has none."""
    anatomy = model.anatomy
    return None if anatomy.ties_embeddings else anatomy.head


def as_untied(anatomy: Anatomy) -> Anatomy:
    """The anatomy of a model whose tied head stands for itself."""
    parts = {
        name: part._replace(alias_of=None) if name == anatomy.head else part for name, part in anatomy.parts.items()
    }
    return anatomy._replace(parts=parts, ties_embeddings=False)


def _tied_copies(names: Sequence[str], readers: Callable[[str], Sequence[Input]]) -> set[str]:
    """Output embeddings that some models store and others do not, where all of them use the input embedding."""
    return {
        name
        for name in names
        if any(name not in model.tensors for model in readers(name))
        and all(
            model.anatomy.head == name and model.anatomy.ties_embeddings
            for model in readers(name)
            if name in model.tensors
        )
    }


def _check_names(
    names: Sequence[str], first: Input, readers: Callable[[str], Sequence[Input]], ignored: set[str]
) -> None:
    missing: dict[tuple[str, str], list[str]] = {}
    tensors: dict[str, Mapping[str, TensorInfo]] = {}
    for name in names:
        for model in readers(name) if name not in ignored else ():
            if (name in model.tensors) != (name in first.tensors):
                have, lack = (model, first) if name in model.tensors else (first, model)
                missing.setdefault((have.name, lack.name), []).append(name)
                tensors |= {have.name: have.tensors, lack.name: lack.tensors}
    for (having, lacking), lost in missing.items():
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        own = [name for name in tensors[lacking] if name not in tensors[having] and name not in ignored]
        instead = f", which has {own[0]} instead" if own else ""
        said = f"{lost[0]}{more}: in {having} but not in {lacking}{instead}"
        raise M3Error(f"{said}: merge models of one architecture, or exclude the tensor")


def _check_shapes(name: str, inputs: Sequence[Input]) -> None:
    first = inputs[0].tensors[name]
    for model in inputs[1:]:
        other = model.tensors[name]
        if other.shape == first.shape:
            continue
        said = f"{name}: is {list(first.shape)} in {inputs[0].name} but {list(other.shape)} in {model.name}"
        if first.shape[1:] == other.shape[1:] and first.shape and other.shape:
            more, fewer = (inputs[0], model) if first.shape[0] > other.shape[0] else (model, inputs[0])
            rows = abs(first.shape[0] - other.shape[0])
            raise M3Error(
                f"{said}: {more.name} has {rows} more rows than {fewer.name}; resize one, or exclude the tensor"
            )
        raise M3Error(f"{said}: merge models of one architecture, or exclude the tensor")


class _Piece(NamedTuple):
    """A tensor of a model's block, as it is decided on.

    Attributes:
        name: What it is called in filters, and what tells it from others.
        key: As `BlockPlan.key`.
        group: The block that it belongs to, for draws by layer.
        t: Where gradients are read.
        module: The module that it is of, where the recipe has some.
        block: Its tower and its block there; None outside blocks.
    """

    name: str
    key: str
    group: str
    t: float
    module: str | None = None
    block: tuple[str, int] | None = None

    @property
    def layer(self) -> int | None:
        """Its block."""
        return None if self.block is None else self.block[1]


def _pieces(anatomy: Anatomy, name: str, module: str | None = None) -> list[_Piece]:
    """What a stored tensor consists of; an alias is keyed and weighed as what it is one with."""
    part = anatomy.parts[name]
    if part.stack_axis is not None:
        return [
            _Piece(own, own, group, block_position(anatomy, name, block), module, (str(part.tower), block))
            for own, group, block in zip(part.block_names, part.groups, part.blocks, strict=True)
        ]
    told = anatomy.parts[part.alias_of] if part.alias_of is not None else part
    group = told.groups[0] if told.groups else OUTSIDE_BLOCKS
    block = None if told.block is None else (str(told.tower), told.block)
    return [_Piece(name, told.canonical, group, told.position, module, block)]


def _group(piece: _Piece, granularity: str) -> str:
    return {"model": WHOLE_MODEL, "layer": piece.group}.get(granularity, piece.key)


def draws_of(recipe: Recipe, method: Method, pieces: Sequence[_Piece]) -> DrawnWeights:
    """The weights that a recipe's `mixup` draws, for every group of the pieces."""
    if recipe.mixup is None:
        return {}
    granularity, alpha = recipe.mixup.granularity, recipe.mixup.alpha
    groups: dict[str, str | None] = {WHOLE_MODEL: None}
    if granularity != "model":
        groups = {group: group for group in (_group(piece, granularity) for piece in pieces)}
    walks: dict[str, dict[int, str]] = {}
    for piece in pieces if recipe.mixup.smooth else ():
        if piece.block is not None:
            walks.setdefault(piece.block[0], {})[piece.block[1]] = piece.group
    how = (walks.values(), recipe.mixup.smooth)
    drawn = draw_groups(method.weighting, recipe.seed, alpha, len(recipe.experts), groups.values(), *how)
    return {label: drawn[group] for label, group in groups.items()}


def _settings(recipe: Recipe, pipeline: Pipeline, piece: _Piece, drawn: DrawnWeights) -> Settings:
    """The numbers of one piece."""
    name, t = piece.name, piece.t
    where = (name, t, piece.module, piece.layer)
    sparsifier = (
        recipe.numbers("sparsifier", *where)
        if recipe.sparsify is None
        else recipe.sparsify.numbers(name, t, pipeline.num_experts)
    )
    (scale,) = {values[0] for values in recipe.numbers("scale", *where).values()} or {pipeline.method.scale}
    weights = _weights_of(recipe, pipeline, piece, drawn)
    return settings_of(pipeline, weights, scale, sparsifier, recipe.numbers("method", *where))


def _weights_of(recipe: Recipe, pipeline: Pipeline, piece: _Piece, drawn: DrawnWeights) -> tuple[float, ...]:
    if recipe.mixup is None:
        (given,) = recipe.numbers("weights", piece.name, piece.t, piece.module, piece.layer).values() or ((),)
        return given[: pipeline.num_weights]
    group = _group(piece, recipe.mixup.granularity)
    if group not in drawn or len(drawn[group]) != pipeline.num_weights:
        raise M3Error(f"weights: none given for {group}: they are not of these models, or of another granularity")
    return drawn[group]


def _check_groups(recipe: Recipe, given: DrawnWeights, pieces: Sequence[_Piece]) -> None:
    """Raise M3Error where a recipe gives weights for a group that there is not."""
    groups = {_group(piece, recipe.mixup.granularity) for piece in pieces} if recipe.mixup is not None else set()
    if surplus := [group for group in given if group not in groups]:
        raise M3Error(f"mixup.weights: {surplus[0]} is no group of these models; {nearest(surplus[0], groups)}")


def settings_in(plans: Iterable[TensorPlan]) -> list[Settings]:
    """The numbers of everything that is merged, in order."""
    return [block.settings for plan in plans for block in plan.blocks]


def _check_rankings(pipeline: Pipeline, plans: Sequence[TensorPlan]) -> None:
    """Raise M3Error where one measurement of the whole model would need several numbers."""
    settings = settings_in(plan for plan in plans if not plan.apart)
    for stage in pipeline.stages:
        if stage.measure.scope != "model":
            continue
        for name in stage.measure.uniform if settings else ():
            if len({stage.numbers(each)[name] for each in settings}) > 1:
                raise M3Error(f"{name}: is measured over the whole model at once, so it cannot vary between tensors")


def output_dtype(recipe: Recipe, model: Input, name: str) -> str:
    """The safetensors dtype of a merged tensor, by what it is in a model."""
    told = model.written.get(name, model.tensors[name].dtype)
    return _DTYPE_NAMES[recipe.output_dtype] if recipe.output_dtype else told


def _excluded(recipe: Recipe, model: Input, names: Sequence[str]) -> set[str]:
    """The tensors that are not merged: those that a pattern or `only` leaves out, and whatever is one with them."""
    matched = {name for name in names if recipe.excludes(name)}
    if recipe.only:
        chosen = {name for name in names if name.split(".")[0] in recipe.only}
        if not chosen:
            there = ", ".join(sorted({name.split(".")[0] for name in names})[:10])
            raise M3Error(f"only: {', '.join(recipe.only)} begins no name of {model.name}: its collections are {there}")
        matched |= set(names) - chosen
    aliases = {name: part.alias_of for name, part in model.anatomy.parts.items() if part.alias_of is not None}
    originals = {aliases[name] for name in matched if name in aliases}
    return matched | originals | {name for name, original in aliases.items() if original in matched | originals}


def _why_excluded(recipe: Recipe, model: Input, name: str) -> str:
    if recipe.excludes(name):
        return "excluded"
    if recipe.only and name.split(".")[0] not in recipe.only:
        return f"not in {', '.join(recipe.only)}"
    parts = model.anatomy.parts
    same = [other for other, part in parts.items() if part.alias_of == name or parts[name].alias_of == other]
    return f"one tensor with {same[0]}, which is excluded" if same else "excluded"


def _check_kinds(inputs: Sequence[Input], excluded: set[str]) -> None:
    """Refuse what must not be interpolated, and what no one can interpolate."""
    for model in inputs:
        if model.anatomy.quantisation is not None:
            raise M3Error(
                f"{model.name}: its weights are quantised ({model.anatomy.quantisation}), and quantised numbers cannot "
                f"be averaged: {mend_of(model.anatomy.quantisation)}"
            )
        parts = model.anatomy.parts.items()
        factor = next((name for name, part in parts if part.kind == "adapter" and name not in excluded), None)
        if factor is not None:
            raise M3Error(
                f"{model.name}: holds LoRA factors ({factor}), and the average of factors is not that of what they "
                "multiply to: merge each adapter into its base first"
            )


def _state(model: Input, names: Sequence[str]) -> set[str]:
    """Tensors of training, not of the model: optimizer moments, steps, random states."""
    parts = model.anatomy.parts
    return {name for name in names if name in parts and parts[name].kind not in MODEL_KINDS}


def _modules_of(recipe: Recipe, model: Input) -> dict[str, str]:
    """The module that each tensor is of, where a recipe has some."""
    return {} if recipe.modules is None else modules_of(model.anatomy, list(recipe.modules), model.name)


def _readers(
    recipe: Recipe, pipeline: Pipeline, model: Input, used: tuple[int, ...]
) -> Callable[[str], tuple[int, ...]]:
    """The inputs that each tensor is merged of: all that are used, or fewer where sections have fewer experts.

    Raises:
        M3Error: They differ, and one measurement of the whole model would be of all.
    """
    if len(recipe.counts) == 1:
        return lambda name: used
    whole = next((stage.measure.label for stage in pipeline.stages if stage.measure.scope == "model"), None)
    if whole is not None:
        said = " and ".join(map(str, recipe.counts))
        raise M3Error(
            f"{whole}: is over the whole model, and parts of it have {said} experts: give all parts as many, or let "
            "each tensor be measured by itself"
        )
    modules = _modules_of(recipe, model)
    parts = model.anatomy.parts.items()
    counts = {name: recipe.count_at(name, part.position, modules.get(name), part.block) for name, part in parts}
    base = {used[0]} if pipeline.uses_base else set()
    return lambda name: tuple(i for i in used if i in base or i < counts.get(name, len(used)))


def _needs_blocks(recipe: Recipe) -> str | None:
    """The key of a recipe for which blocks must be known; None if there is none."""
    if recipe.mixup is not None and recipe.mixup.granularity == "layer":
        return "mixup.granularity: layer"
    if any(section.layers is not None for section in recipe.every_section):
        return "slices"
    return "a gradient" if recipe.has_gradients() else None


def _check_blocks(recipe: Recipe, model: Input, names: Sequence[str]) -> None:
    """Refuse a recipe that speaks of layers where the anatomy knows none, or cannot tell which."""
    key = _needs_blocks(recipe)
    if key is None:
        return
    doubt = next((part.doubt for name in names if (part := model.anatomy.parts[name]).doubt), None)
    if doubt is not None:
        raise M3Error(f"{key}: {doubt}")
    if not model.anatomy.towers:
        raise M3Error(
            f"{key}: speaks of layers, and none are found among the names of {model.name}: say how they are numbered, "
            r"such as anatomy: {blocks: 'layer_(\d+)'}"
        )


def make_plan(
    recipe: Recipe,
    experts: Sequence[Input],
    base: Input | None,
    drawn: DrawnWeights | None = None,
    stored: Sequence[str] = (),
    statistics: Sequence[Input] = (),
) -> MergePlan:
    """Decide what happens to every tensor.

    Args:
        recipe: What is asked for.
        experts: The models to merge, in the recipe's order.
        base: The base, if the recipe names one.
        drawn: Weights drawn earlier, which a replay uses instead of drawing.
        stored: What tensors are called in the models that layers are taken from, which filters see too.
        statistics: Those of the experts, in their order, under the names of the merge; for methods that ask for some.

    Raises:
        M3Error: The models do not fit each other or the recipe.
    """
    count = len(experts)
    pipeline = Pipeline(method_of(recipe), sparsifier_of(recipe), count)
    check_pipeline(pipeline, base is not None)
    inputs = (*experts, *([base] if base is not None else []), *statistics)
    template = count if base is not None else 0
    beside = range(len(inputs) - len(statistics), len(inputs))
    used = (*((template,) if pipeline.uses_base else ()), *range(count))
    models = [inputs[i] for i in used]
    names = sorted({name for i in {template, *used} for name in inputs[i].tensors}, key=natural_key)
    blocks = [own for model in inputs for part in model.anatomy.parts.values() for own in part.block_names]
    if (
        drawn is None and (said := unmatched(recipe, names, [*blocks, *stored])) is not None
    ):  # a replay does as was done
        raise M3Error(said)
    excluded = _excluded(recipe, inputs[template], names)
    _check_kinds([inputs[i] for i in sorted({template, *used})], excluded)
    state = {name for model in models for name in _state(model, names)} - excluded
    positions = _readers(recipe, pipeline, models[0], used)

    def readers(name: str) -> list[Input]:
        return [inputs[i] for i in positions(name)]

    tied = _tied_copies(names, readers) - excluded
    _check_names(names, models[0], readers, excluded | state | tied)
    kept = [n for n in names if n not in state | tied and (n in inputs[template].tensors if n in excluded else True)]
    kept = [n for n in kept if n in excluded or n in models[0].tensors]
    merged = [n for n in kept if n not in excluded]
    mergeable = {
        n
        for n in merged
        if models[0].anatomy.parts[n].kind != "buffer" and all(m.tensors[n].dtype in FLOATS for m in readers(n))
    }
    _check_blocks(recipe, models[0], merged)
    depth = max((tower.depth for tower in models[0].anatomy.towers.values()), default=0)
    declared = None if recipe.modules is not None else recipe.declared_layers()
    if declared is not None and len(models[0].anatomy.towers) > 1:
        said = f"{models[0].name} has several stacks of layers ({', '.join(models[0].anatomy.towers)})"
        raise M3Error(f"slices: {said}: give each its own under modules")
    if declared not in (None, depth):
        raise M3Error(f"slices: cover {declared} layers, but {inputs[0].name} has {depth}")
    modules = _modules_of(recipe, models[0])
    pieces = {name: _pieces(models[0].anatomy, name, modules.get(name)) for name in merged if name in mergeable}
    outcome = drawn if drawn is not None or recipe.mixup is None else recipe.mixup.weights
    weights = outcome
    every = [piece for own in pieces.values() for piece in own]
    if weights is None:
        weights = draws_of(recipe, pipeline.method, every)
    elif drawn is None:
        _check_groups(recipe, weights, every)

    plans = []
    bare = _without_statistics(experts, statistics, mergeable) if pipeline.method.statistics else set()
    if recipe.keep_state == "first":
        own = [name for name in names if name in state and name in inputs[0].tensors]
        plans += [TensorPlan(inputs[0].tensors[name], (0,), why="training state of the first model") for name in own]
    for name in kept:
        if name in excluded:
            plans.append(_taken(inputs, template, name)._replace(why=_why_excluded(recipe, inputs[template], name)))
            continue
        own_models = readers(name)
        _check_shapes(name, own_models)
        teller = inputs[template] if template in used else inputs[0]
        reference = teller.tensors[name]
        if name not in mergeable:
            if any(m.tensors[name].dtype != reference.dtype for m in own_models):
                said = ", ".join(f"{m.tensors[name].dtype} in {m.name}" for m in own_models)
                raise M3Error(f"{name}: is {said}: only BF16, F16 and F32 can be merged with each other")
            kind = models[0].anatomy.parts[name].kind
            why = "a buffer, no parameter" if kind == "buffer" else f"{reference.dtype}, which is not interpolated"
            plans.append(TensorPlan(reference, positions(name), why=why))
            continue
        own_pipeline = pipeline._replace(num_experts=len(own_models) - pipeline.uses_base)
        part = models[0].anatomy.parts[name]
        if part.kind == "statistics":
            plans.append(_of_statistics(recipe, own_pipeline, reference, part, pieces[name], weights))
            continue
        output = reference._replace(dtype=output_dtype(recipe, teller, name))
        if name in bare:
            average = _of_statistics(recipe, own_pipeline, output, part, pieces[name], weights)
            plans.append(average._replace(why="without statistics"))
            continue
        whole = own_pipeline.method.preparation is not None
        where = (*positions(name), *(() if whole else beside))
        merging = _merged(recipe, own_pipeline, reference, output, where, part, pieces[name], weights)
        plans.append(merging._replace(matrices=_matrices(merging, statistics, beside)) if whole else merging)
    notes = tuple(_notes(models[0], state, merged, recipe.keep_state))
    if parameters := sorted((n for n in bare if models[0].anatomy.parts[n].kind == "parameter"), key=natural_key):
        notes += (f"{len(parameters)} tensors without statistics ({parameters[0]}, …) are averaged",)
    if outcome is None:
        notes += tuple(_note_on_draw(recipe, weights, [expert.name for expert in experts]))
    plans.sort(key=lambda plan: natural_key(plan.output.name))
    return MergePlan(pipeline, tuple(_comparable(pipeline, plans)), weights, inputs, template, notes)


def _without_statistics(experts: Sequence[Input], statistics: Sequence[Input], names: set[str]) -> set[str]:
    """Those of the tensors of which no expert has statistics.

    Raises:
        M3Error: Some experts have them and others have not, or there are none at all.
    """
    if len(statistics) != len(experts):
        raise M3Error(f"{len(statistics)} statistics are given for {len(experts)} models: give those of each")
    bare = set()
    for name in names:
        having = [name in each.tensors for each in statistics]
        if not any(having):
            bare.add(name)
        elif not all(having):
            there, not_there = (statistics[having.index(each)].name for each in (True, False))
            raise M3Error(f"{name}: is in {there} but not in {not_there}: measure both anew, in the same way")
    if bare == names:
        raise M3Error(f"{statistics[0].name}: has statistics of no tensor that is merged: give those of these models")
    return bare


def _matrices(plan: TensorPlan, statistics: Sequence[Input], positions: Sequence[int]) -> Matrices:
    """The matrices of a tensor that is merged by some.

    Raises:
        M3Error: They are no matrices of its inputs, or which of its axes these are is unknown.
    """
    name, stacks, shape = plan.output.name, plan.axis is not None, plan.block_shape
    if plan.axis:
        raise M3Error(
            f"{name}: stacks blocks along axis {plan.axis}, and statistics that are matrices are of weights that stack "
            "them along axis 0 or not at all: convert the models (m3jax convert)"
        )
    lead = plan.output.shape[:1] if stacks else ()
    for each in statistics:
        own = each.tensors[name].shape
        if len(own) != len(lead) + 2 or own[: len(lead)] != lead or own[-1] != own[-2]:
            raise M3Error(
                f"{name}: is {list(own)} in {each.name}, where {'a square matrix for each block' if stacks else 'one'} "
                f"of the inputs of a weight {list(plan.output.shape)} is wanted: measure it with m3jax statistics"
            )
    widths = {each.name: each.tensors[name].shape[-1] for each in statistics}
    if len(set(widths.values())) > 1:
        said = " and ".join(f"{width} in {each}" for each, width in widths.items())
        raise M3Error(f"{name}: is of other numbers of inputs, {said}: measure both models anew")
    width = next(iter(widths.values()))
    told = {each.inputs_first[name] for each in statistics if name in each.inputs_first}
    if len(told) > 1:
        raise M3Error(f"{name}: its inputs lie along other axes in one model than in another: convert one of them")
    return Matrices(tuple(positions), width, inputs_first(name, shape, width, next(iter(told), None)))


def _taken(inputs: Sequence[Input], position: int, name: str) -> TensorPlan:
    """A tensor as one model has it: copied, or rounded to what it is worth where it is read wider."""
    model = inputs[position]
    info, part = model.tensors[name], model.anatomy.parts[name]
    if name not in model.written:
        return TensorPlan(info, (position,))
    itself = statistics_pipeline(1)
    pieces = _pieces(model.anatomy, name)
    blocks = tuple(BlockPlan(p.name, p.key, p.group, settings_of(itself, (1.0,), 1.0)) for p in pieces)
    output = info._replace(dtype=model.written[name])
    return TensorPlan(output, (position,), itself, blocks, part.stack_axis, apart=True)


def _merged(
    recipe: Recipe,
    pipeline: Pipeline,
    reference: TensorInfo,
    output: TensorInfo,
    used: tuple[int, ...],
    part: Part,
    pieces: Sequence[_Piece],
    drawn: DrawnWeights,
) -> TensorPlan:
    """What happens to a tensor that is merged."""
    settings = [_settings(recipe, pipeline, piece, drawn) for piece in pieces]
    if pipeline.method.copies and output == reference and all(each.scale == 1.0 for each in settings):
        return TensorPlan(reference, used, why="the one model's, unchanged")
    own = pipeline
    if all(without_idle_sparsifier(pipeline, each) != pipeline for each in settings):
        own = without_idle_sparsifier(pipeline, settings[0])
    blocks = tuple(BlockPlan(p.name, p.key, p.group, each) for p, each in zip(pieces, settings, strict=True))
    why = f"one tensor with {part.alias_of}" if part.alias_of is not None else ""
    return TensorPlan(output, used, own, blocks, part.stack_axis, part.alias_of is not None, why)


def _of_statistics(
    recipe: Recipe,
    pipeline: Pipeline,
    reference: TensorInfo,
    part: Part,
    pieces: Sequence[_Piece],
    drawn: DrawnWeights,
) -> TensorPlan:
    """Statistics of batch normalisation: their weighted average, whatever the method."""
    count = pipeline.num_experts
    average = statistics_pipeline(count)

    def weights(piece: _Piece) -> tuple[float, ...]:
        return statistics_weights(pipeline, _weights_of(recipe, pipeline, piece, drawn))

    blocks = tuple(BlockPlan(p.name, p.key, p.group, settings_of(average, weights(p), 1.0)) for p in pieces)
    why = "statistics of batch normalisation, which are averaged whatever the method"
    return TensorPlan(reference, tuple(range(count)), average, blocks, part.stack_axis, apart=True, why=why)


def _notes(model: Input, state: set[str], merged: Sequence[str], kept: str | None) -> Iterator[str]:
    if state:
        example = min(state, key=natural_key)
        done = "left out" if kept is None else f"those of the {kept} model"
        yield (
            f"{len(state)} tensors of training state ({example}, …) are {done}: optimizer moments, steps and random "
            "states are not merged"
        )
    statistics = [name for name in merged if model.anatomy.parts[name].kind == "statistics"]
    if statistics:
        yield f"{len(statistics)} statistics of batch normalisation are averaged: measure them anew on data if you can"


def _note_on_draw(recipe: Recipe, drawn: DrawnWeights, experts: Sequence[str]) -> Iterator[str]:
    """A sentence where the one draw of a merge gives nearly all to one expert, as draws of a small alpha often do."""
    weights = drawn.get(WHOLE_MODEL, ())
    if recipe.mixup is None or not weights:
        return
    shares = weights if len(weights) > 1 else (1.0 - weights[0], weights[0])  # one number is a place between two models
    largest = max(range(len(shares)), key=shares.__getitem__)
    if shares[largest] > NEARLY_ALL:
        often = likelihood_of_one(recipe.mixup.alpha, len(shares), NEARLY_ALL)
        yield (
            f"the draw gives {shares[largest]:.1%} to {experts[largest]}, so that the merge is nearly that model "
            f"alone; at this mixup.alpha {often:.0%} of draws give one model more than {NEARLY_ALL:.0%}: another "
            "--seed or a larger alpha draws otherwise, and m3jax explore tries many"
        )


def _comparable(pipeline: Pipeline, plans: Sequence[TensorPlan]) -> list[TensorPlan]:
    """The plans with the factors that make magnitudes comparable over the model, where that is what is measured."""
    _check_rankings(pipeline, plans)
    scaled = iter(comparable(pipeline, settings_in(plans)))

    def with_factors(plan: TensorPlan) -> TensorPlan:
        return plan._replace(blocks=tuple(block._replace(settings=next(scaled)) for block in plan.blocks))

    return [with_factors(plan) for plan in plans]


def row_size(plan: TensorPlan) -> int:
    """Entries of a row of a tensor's blocks, as its pipeline sees them; at least 1."""
    shape = plan.block_shape if plan.pipeline is None else plan.pipeline.laid_out(plan.block_shape)
    return max(shape[-1], 1) if shape else 1


def total_entries(plans: Sequence[TensorPlan]) -> int:
    """N of a ranking over these tensors: of those that count, each once."""
    return sum(plan.output.size for plan in plans if plan.pipeline is not None and not plan.apart)


def divide(sizes: Sequence[int], count: int) -> list[int]:
    """Who does which piece of work, so that all have about the same to do.

    Args:
        sizes: Of the pieces.
        count: How many there are to do them.

    Returns:
        For each piece the number of its owner: the largest pieces first, each to whoever has least so far.

    Example:
        >>> divide([5, 5, 2, 1], 2)
        [0, 1, 0, 1]
    """
    owners, loads = [0] * len(sizes), [0] * count
    for piece in sorted(range(len(sizes)), key=lambda piece: (-sizes[piece], piece)):
        owners[piece] = min(range(count), key=lambda owner: (loads[owner], owner))
        loads[owners[piece]] += sizes[piece]
    return owners
