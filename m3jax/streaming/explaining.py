"""A recipe as it is resolved: what happens to each tensor, with which numbers, and why; no weights are read."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from m3jax.checkpoints import natural_key, sketch_model
from m3jax.checkpoints.formats import SAFETENSORS
from m3jax.checkpoints.views import stored_at
from m3jax.naming import block_of
from m3jax.recipe import Recipe, load_recipe
from m3jax.streaming.intermediates import outlined
from m3jax.streaming.jobs import Ready, prepared
from m3jax.streaming.plan import BlockPlan, TensorPlan
from m3jax.streaming.statistics import ROLE as STATISTICS
from m3jax.streaming.steps import with_steps

Runs = tuple[tuple[int, int], ...]
"""Numbers of blocks: the first and the last of each run."""


class TensorSource(NamedTuple):
    """A model that tensors are read from.

    Attributes:
        model: As the recipe names it.
        role: "expert", "base" or "statistics".
        shift: How much higher its blocks are numbered there than in the output.
    """

    model: str
    role: str
    shift: int = 0


class Treatment(NamedTuple):
    """What happens to tensors.

    Attributes:
        what: "merged", "averaged" or "copied".
        why: Why it is not what happens to others; empty where it is.
        sources: What is read.
        numbers: Weights, scale and parameters by name: one for each expert, or one.
        dtype: As it is written.
        masks: Whether entries are dropped at random, by the key of each tensor.
    """

    what: str
    why: str
    sources: tuple[TensorSource, ...]
    numbers: tuple[tuple[str, tuple[float, ...]], ...]
    dtype: str
    masks: bool


class TensorGroup(NamedTuple):
    """Tensors to which the same happens.

    Attributes:
        treatment: What happens to them.
        names: What they are called, with `*` for the number of a block, and the blocks that are meant.
        members: How many there are; of a stacked one, each block counts.
        keys: What masks of these are drawn from, by name, where that is another.
    """

    treatment: Treatment
    names: tuple[tuple[str, Runs], ...]
    members: int
    keys: Mapping[str, str]


class Explanation(NamedTuple):
    """A recipe as it is resolved.

    Attributes:
        recipe: As resolved.
        formula: Of its method.
        models: Every model that is read, with its role.
        drawn: Weights that are drawn, by group.
        groups: All tensors of the output.
        left_out: Tensors of the models that the output has not, with the reason.
        notes: What a reader should know.
        intermediates: The merges that it starts from, by name.
    """

    recipe: Recipe
    formula: str
    models: tuple[TensorSource, ...]
    drawn: Mapping[str, tuple[float, ...]]
    groups: tuple[TensorGroup, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    intermediates: "Mapping[str, Explanation]"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "recipe": self.recipe.resolved(),
            "formula": self.formula,
            "models": [{"model": each.model, "role": each.role} for each in self.models],
            "drawn": {group: list(weights) for group, weights in self.drawn.items()},
            "groups": [_group_json(group, self.recipe.seed) for group in self.groups],
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
            "intermediates": {name: each.to_json() for name, each in self.intermediates.items()},
        }


def _group_json(group: TensorGroup, seed: int) -> dict[str, Any]:
    told = group.treatment
    return {
        "is": told.what,
        "why": told.why,
        "tensors": [{"name": name, "blocks": [list(run) for run in runs]} for name, runs in group.names],
        "count": group.members,
        "sources": [source._asdict() for source in told.sources],
        "numbers": {name: list(values) for name, values in told.numbers},
        "dtype": told.dtype,
        "masks": {"seed": seed, "other_keys": dict(group.keys)} if told.masks else None,
    }


def explain(ready: Ready, recipe: Recipe, intermediates: "Mapping[str, Explanation]") -> Explanation:
    """What a prepared merge does.

    Args:
        ready: Of `streaming.prepared`.
        recipe: Its recipe.
        intermediates: The merges that it starts from, by name.
    """
    found: dict[Treatment, list[tuple[str, str]]] = {}
    for tensor in ready.plan.tensors:
        for name, key, treatment in _treatments(ready, recipe, tensor):
            found.setdefault(treatment, []).append((name, key))
    groups = tuple(
        TensorGroup(
            treatment,
            _collapsed([name for name, _ in members]),
            len(members),
            {name: key for name, key in members if treatment.masks and key != name},
        )
        for treatment, members in found.items()
    )
    models = tuple(TensorSource(source.input.name, source.role) for source in ready.sources)
    notes = tuple(dict.fromkeys((*recipe.notes(), *ready.plan.notes, *ready.notes)))
    left = tuple(_left_out(ready))
    return Explanation(recipe, recipe.row.formula, models, ready.plan.weights, groups, left, notes, intermediates)


def _treatments(ready: Ready, recipe: Recipe, tensor: TensorPlan) -> Iterator[tuple[str, str, Treatment]]:
    """For each block that a tensor consists of, what it is called, its masks' key and what happens to it."""
    pipe, dtype = tensor.pipeline, tensor.output.dtype
    sources = tuple(_sources(ready, tensor))
    if pipe is None:
        name = tensor.output.name
        yield name, name, Treatment("copied", tensor.why, sources[:1], (), dtype, False)
        return
    what = "copied" if len(tensor.sources) == 1 and tensor.apart else "averaged" if tensor.apart else "merged"
    if tensor.why.startswith("one tensor with"):
        what = "merged"
    for block in tensor.blocks:
        numbers = tuple(_numbers(recipe, tensor, block)) if what == "merged" else ()
        if what == "averaged":
            numbers = (("weight", tuple(map(float, block.settings.weights))),)
        yield block.name, block.key, Treatment(what, tensor.why, sources, numbers, dtype, pipe.random)


def _sources(ready: Ready, tensor: TensorPlan) -> Iterator[TensorSource]:
    """The models that a tensor is read from, experts first."""
    name = tensor.output.name
    models = tensor.models[1:] + tensor.models[:1] if tensor.has_base else tensor.models
    order = (*models, *tensor.statistics)
    for position in order:
        place = stored_at(ready.models[position].checkpoint, name)
        there = [source for source in ready.sources if source.checkpoint.location == place.location]
        model = there[0].input.name if there else ready.models[position].input.name
        here, stored = block_of(name), block_of(place.name)
        shift = stored[1] - here[1] if here is not None and stored is not None else 0
        role = "base" if tensor.has_base and position == tensor.sources[0] else "expert"
        yield TensorSource(model, STATISTICS if position in tensor.statistics else role, shift)


def _numbers(recipe: Recipe, tensor: TensorPlan, block: BlockPlan) -> Iterator[tuple[str, tuple[float, ...]]]:
    """The numbers of a block by what the recipe calls them."""
    settings, parameters = block.settings, recipe.row.parameters
    called = {parameter.sets: parameter.name for parameter in parameters}
    yield called.get("weights", "weight"), tuple(map(float, settings.weights))
    if "scale" in called:
        yield called["scale"], (float(settings.scale),)
    if tensor.pipeline is not None and tensor.pipeline.sparsifier is not None:
        own = "" if recipe.sparsify is None else "sparsify."
        yield from ((f"{own}{name}", tuple(values)) for name, values in settings.sparsifier.items())
    for name, values in settings.method.items():
        yield called.get(f"method.{name}", name), tuple(values)


def _left_out(ready: Ready) -> Iterator[tuple[str, str]]:
    written = {tensor.output.name for tensor in ready.plan.tensors}
    for model in ready.models:
        for name, part in model.input.anatomy.parts.items():
            if name in written:
                continue
            written.add(name)
            if part.alias_of is not None or (name == model.input.anatomy.head and model.input.anatomy.ties_embeddings):
                yield name, f"one tensor with {part.alias_of or model.input.anatomy.embedding}, which stands for it"
            else:
                yield name, f"{part.kind}, only in {model.input.name}" if part.kind == "parameter" else part.kind


def _collapsed(names: Sequence[str]) -> tuple[tuple[str, Runs], ...]:
    """Names with `*` for the number of a block, each with the numbers that it stands for.

    Example:
        >>> _collapsed(["layers.0.w", "layers.1.w", "layers.3.w", "norm"])
        (('layers.*.w', ((0, 1), (3, 3))), ('norm', ()))
    """
    numbers: dict[str, list[int]] = {}
    for name in sorted(names, key=natural_key):
        block = block_of(name)
        if block is None:
            numbers[name] = []
        else:
            stem = block[0].rpartition(".")[0]
            numbers.setdefault(f"{stem}.*{name[len(block[0]) :]}", []).append(block[1])
    return tuple((pattern, tuple(_runs(each))) for pattern, each in numbers.items())


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin: int | None = None
    for number, following in zip(numbers, [*numbers[1:], None], strict=False):
        begin = number if begin is None else begin
        if following != number + 1:
            yield begin, number
            begin = None


def explain_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    seed: int | None = None,
    format: str | None = None,
) -> Explanation:
    """What `m3jax merge` with the same arguments will do to each group of tensors; no weights are read.

    Args:
        recipe: A `Recipe`, its YAML file, or its content as a mapping.
        out: Where the output would go; it may be there.
        overrides: As in `load_recipe`.
        seed: As in `load_recipe`.
        format: As in `merge_checkpoint`.

    Raises:
        M3Error: The merge cannot be made, for the reason that it would give itself.

    Example:
        >>> explain_recipe("recipe.yaml", "merged").groups[0].treatment.numbers  # doctest: +SKIP
    """
    loaded, said = with_steps(recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides, seed))
    within = {}
    for number, each in enumerate(loaded.needed):
        alone = each.model_copy(update={"intermediates": loaded.needed[:number]})
        own = explain_recipe(alone, out, format=SAFETENSORS.name)
        within[str(each.name)] = own._replace(intermediates={})
    how: dict[str, Any] = {"format": format, "writes": False}
    with prepared(loaded, out, **how, locate=sketch_model, readying=outlined) as ready:
        found = explain(ready, loaded, within)
    return found._replace(notes=tuple(dict.fromkeys((*said, *found.notes))))
