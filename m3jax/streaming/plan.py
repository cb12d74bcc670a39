"""The plan of a merge: what happens to each tensor, from a recipe and the tensors' names and shapes alone."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from m3jax.checkpoints import TensorInfo, natural_key
from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.methods.base import Method, Settings, Sparsifier
from m3jax.methods.leaf import Pipeline, check_pipeline, comparable, settings_of, without_idle_sparsifier
from m3jax.methods.mixup import draw
from m3jax.naming import block_group, block_of, layer_position
from m3jax.recipe import Recipe

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DTYPE_NAMES = {name: dtype for dtype, name in FLOATS.items()}
WHOLE_MODEL = "model"
"""The group of weights drawn once for the model."""

DrawnWeights = Mapping[str, tuple[float, ...]]
"""By group of tensors; for slerp the one position t."""


class Input(NamedTuple):
    """One model that is read.

    Attributes:
        name: As the recipe names it.
        tensors: What it holds.
        ties_embeddings: What its config says of its output embedding; None if it does not say.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    ties_embeddings: bool | None = None


class TensorPlan(NamedTuple):
    """What happens to one tensor.

    Attributes:
        output: The tensor to write.
        sources: The inputs it is read from, by position; the base, if it is used, first.
        pipeline: What is done; None if it is copied, from the first source, all sources being equal.
        settings: Its numbers; None if it is copied.
    """

    output: TensorInfo
    sources: tuple[int, ...]
    pipeline: Pipeline | None = None
    settings: Settings | None = None

    @property
    def has_base(self) -> bool:
        """Whether the first source is the base of task vectors."""
        return self.pipeline is not None and len(self.sources) > self.pipeline.num_experts


class MergePlan(NamedTuple):
    """A whole merge, decided.

    Attributes:
        pipeline: What is done to tensors that are merged.
        tensors: In the order of writing: the natural order of names.
        weights: What was drawn, by group; empty where weights are given.
        inputs: The models, experts first, then the base if there is one.
        template: The position of the input whose config and tokenizer the output takes.
    """

    pipeline: Pipeline
    tensors: tuple[TensorPlan, ...]
    weights: DrawnWeights
    inputs: tuple[Input, ...]
    template: int


def method_of(recipe: Recipe) -> Method:
    """The merge method that a recipe asks for, with the parameters that hold for the whole merge."""
    return catalogue.make_method(recipe.row, recipe.parameters)


def sparsifier_of(recipe: Recipe) -> Sparsifier | None:
    """The sparsifier that a recipe asks for; its parameters per tensor are in each tensor's settings."""
    if recipe.row.sparsifier is not None:
        return catalogue.make_sparsifier(recipe.row.sparsifier, recipe.row.parameters, recipe.parameters)
    if recipe.sparsify is None:
        return None
    row, asked = recipe.sparsify.row, recipe.sparsify
    return catalogue.make_sparsifier(row.sparsifier, row.parameters, asked.parameters, asked.target)


def _is_tied(model: Input, head: str) -> bool:
    """Whether a model uses its input embedding for `head`: it has no such tensor, or its config says so."""
    return head not in model.tensors or bool(model.ties_embeddings)


def _tied_heads(inputs: Sequence[Input]) -> set[str]:
    """Output embeddings that some model lacks because they are tied; they must be tied in all of them."""
    heads = {name for model in inputs for name in model.tensors if name.split(".")[-2:] == ["lm_head", "weight"]}
    absent = {head for head in heads if any(head not in model.tensors for model in inputs)}
    for head in absent:
        tied = next(m for m in inputs if _is_tied(m, head))
        untied = next((m for m in inputs if not _is_tied(m, head)), None)
        if untied is not None:
            raise M3Error(
                f"{head}: {tied.name} uses its input embedding instead, but {untied.name} has one of its own: "
                f"exclude the tensor or save {tied.name} with untied embeddings"
            )
    return absent


def _check_names(inputs: Sequence[Input], excluded: set[str], tied: set[str]) -> None:
    ignored = {*excluded, *tied}
    for model in inputs[1:]:
        first = inputs[0]
        for have, lack in ((first, model), (model, first)):
            missing = [name for name in have.tensors if name not in lack.tensors and name not in ignored]
            if missing:
                more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
                raise M3Error(
                    f"{missing[0]}{more}: in {have.name} but not in {lack.name}: "
                    "merge models of one architecture, or exclude the tensor"
                )


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


def draws_of(recipe: Recipe, method: Method, names: Sequence[str]) -> DrawnWeights:
    """The weights that a recipe's `mixup` draws, for every group of the named tensors."""
    if recipe.mixup is None:
        return {}
    granularity, alpha = recipe.mixup.granularity, recipe.mixup.alpha
    groups: dict[str, str | None] = {WHOLE_MODEL: None}
    if granularity != "model":
        groups = {group: group for group in (block_group(name, granularity) for name in names)}
    count = len(recipe.experts)
    return {label: draw(method.weighting, recipe.seed, alpha, count, group) for label, group in groups.items()}


def _settings(recipe: Recipe, pipeline: Pipeline, name: str, t: float, drawn: DrawnWeights) -> Settings:
    """The numbers of one tensor."""
    sparsifier = (
        recipe.numbers("sparsifier", name, t)
        if recipe.sparsify is None
        else recipe.sparsify.numbers(name, t, pipeline.num_experts)
    )
    (scale,) = {values[0] for values in recipe.numbers("scale", name, t).values()} or {1.0}
    weights = _weights_of(recipe, pipeline, name, t, drawn)
    return settings_of(pipeline, weights, scale, sparsifier, recipe.numbers("method", name, t))


def _weights_of(recipe: Recipe, pipeline: Pipeline, name: str, t: float, drawn: DrawnWeights) -> tuple[float, ...]:
    if recipe.mixup is None:
        (given,) = recipe.numbers("weights", name, t).values() or ((),)
        return given[: pipeline.num_weights]
    granularity = recipe.mixup.granularity
    group = WHOLE_MODEL if granularity == "model" else block_group(name, granularity)
    if group not in drawn or len(drawn[group]) != pipeline.num_weights:
        raise M3Error(f"weights: none recorded for {group}: the manifest does not belong to these models")
    return drawn[group]


def _check_rankings(pipeline: Pipeline, plans: Sequence[TensorPlan]) -> None:
    """Raise M3Error where one measurement of the whole model would need several numbers."""
    settings = [plan.settings for plan in plans if plan.settings is not None]
    for stage in pipeline.stages:
        if stage.measure.scope != "model":
            continue
        for name in stage.measure.uniform if settings else ():
            if len({stage.numbers(each)[name] for each in settings}) > 1:
                raise M3Error(f"{name}: is measured over the whole model at once, so it cannot vary between tensors")


def output_dtype(recipe: Recipe, info: TensorInfo) -> str:
    """The safetensors dtype of a merged tensor."""
    return _DTYPE_NAMES[recipe.output_dtype] if recipe.output_dtype else info.dtype


def make_plan(
    recipe: Recipe, experts: Sequence[Input], base: Input | None, drawn: DrawnWeights | None = None
) -> MergePlan:
    """Decide what happens to every tensor.

    Args:
        recipe: What is asked for.
        experts: The models to merge, in the recipe's order.
        base: The base, if the recipe names one.
        drawn: Weights drawn earlier, which a replay uses instead of drawing.

    Raises:
        M3Error: The models do not fit each other or the recipe.
    """
    count = len(experts)
    pipeline = Pipeline(method_of(recipe), sparsifier_of(recipe), count)
    check_pipeline(pipeline, base is not None)
    inputs = (*experts, *([base] if base is not None else []))
    template = len(inputs) - 1 if base is not None else 0
    used = (*((template,) if pipeline.uses_base else ()), *range(count))
    names = sorted({name for i in {template, *used} for name in inputs[i].tensors}, key=natural_key)
    excluded = {name for name in names if recipe.excludes(name)}
    for pattern in recipe.exclude:
        if not any(re.search(pattern, name) for name in excluded):
            raise M3Error(f"exclude: {pattern!r} matches no tensor of {inputs[template].name}: mend it or leave it out")
    models = [inputs[i] for i in used]
    tied = _tied_heads(models) - excluded
    _check_names(models, excluded, tied)
    kept = [n for n in names if n not in tied and (n in inputs[template].tensors if n in excluded else True)]
    kept = [n for n in kept if n in excluded or n in models[0].tensors]
    floats = [n for n in kept if n not in excluded and all(m.tensors[n].dtype in FLOATS for m in models)]
    blocks = [block[1] for block in map(block_of, names) if block]
    layers = max(blocks, default=-1) + 1
    if recipe.declared_layers is not None and recipe.declared_layers != layers:
        raise M3Error(f"slices: cover {recipe.declared_layers} layers, but {inputs[0].name} has {layers}")
    weights = drawn if drawn is not None else draws_of(recipe, pipeline.method, floats)
    mergeable = set(floats)

    plans = []
    for name in kept:
        if name in excluded:
            plans.append(TensorPlan(inputs[template].tensors[name], (template,)))
            continue
        _check_shapes(name, models)
        reference = (inputs[template] if template in used else inputs[0]).tensors[name]
        if name not in mergeable:
            if any(m.tensors[name].dtype != reference.dtype for m in models):
                said = ", ".join(f"{m.tensors[name].dtype} in {m.name}" for m in models)
                raise M3Error(f"{name}: is {said}: only BF16, F16 and F32 can be merged with each other")
            plans.append(TensorPlan(reference, used))
            continue
        t = layer_position(name, layers)
        settings = _settings(recipe, pipeline, name, t, weights)
        if pipeline.method.copies and settings.scale == 1.0 and output_dtype(recipe, reference) == reference.dtype:
            plans.append(TensorPlan(reference, used))
            continue
        sparse = without_idle_sparsifier(pipeline, settings)
        output = TensorInfo(name, reference.shape, output_dtype(recipe, reference))
        plans.append(TensorPlan(output, used, sparse, settings))
    return MergePlan(pipeline, tuple(_comparable(pipeline, plans)), weights, inputs, template)


def _comparable(pipeline: Pipeline, plans: Sequence[TensorPlan]) -> list[TensorPlan]:
    """The plans with the factors that make magnitudes comparable over the model, where that is what is measured."""
    _check_rankings(pipeline, plans)
    scaled = iter(comparable(pipeline, [plan.settings for plan in plans if plan.settings is not None]))
    return [plan if plan.settings is None else plan._replace(settings=next(scaled)) for plan in plans]


def row_size(plan: TensorPlan) -> int:
    """Entries of a row, along the tensor's last axis; at least 1."""
    shape = plan.output.shape
    return max(shape[-1], 1) if shape else 1


def total_entries(plans: Sequence[TensorPlan]) -> int:
    """N of a ranking over these tensors."""
    return sum(plan.output.size for plan in plans if plan.pipeline is not None)


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
