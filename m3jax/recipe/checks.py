"""What must hold between the keys of a recipe; each check raises a `RecipeError` at the place to mend."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from m3jax.methods import catalogue
from m3jax.methods.rows import MethodRow
from m3jax.recipe.blocks import weight_parameters
from m3jax.recipe.entries import MixupSettings, Module, Slice
from m3jax.recipe.sections import Section, entries_of
from m3jax.recipe.settings import (
    Place,
    RecipeError,
    Setting,
    covers,
    mergekits,
    nearest,
    parameters_of,
    users_of,
)

_SEVERAL = re.compile(r"@(last:[0-9]+|[0-9]+:[0-9]+(:[0-9]+)?)$")  # what names several steps of a run

if TYPE_CHECKING:
    from m3jax.recipe import Recipe


def placed_blocks(recipe: "Recipe") -> Iterator[tuple[Place, dict[str, Setting]]]:
    """Every block of parameters in the recipe, with its place."""
    yield ("parameters",), recipe.parameters
    for place, holder in _holders(recipe):
        if isinstance(holder, Module):
            yield (*place, "parameters"), holder.parameters
        for i, part in enumerate(holder.slices or ()):
            yield (*place, "slices", i, "parameters"), part.parameters
        for where, entry in entries_of(holder):
            yield (*place, *where, "parameters"), entry.parameters


def _holders(recipe: "Recipe") -> "Iterator[tuple[Place, Recipe | Module]]":
    """What has models or slices: the recipe, or its modules."""
    yield (), recipe
    yield from ((("modules", name), module) for name, module in (recipe.modules or {}).items())


def check_models(recipe: "Recipe") -> None:
    """Something is merged."""
    if recipe.models is None and recipe.slices is None and recipe.modules is None:
        raise RecipeError("missing; add it", "models")


def check_slices(recipe: "Recipe") -> None:
    """Every slice has layers, and as many of each of its sources."""
    for place, holder in _holders(recipe):
        for i, part in enumerate(holder.slices or ()):
            _check_slice(part, (*place, "slices", i))


def _check_slice(part: Slice, place: Place) -> None:
    for j, source in enumerate(part.sources):
        first, last = source.layer_range
        if first < 0 or last <= first:
            where = (*place, "sources", j, "layer_range")
            raise RecipeError(f"[{first}, {last}] holds no layers; write the first and the one after the last", *where)
    lengths = {last - first for first, last in (source.layer_range for source in part.sources)}
    if len(lengths) > 1:
        said = ", ".join(f"{source.model} {list(source.layer_range)}" for source in part.sources)
        raise RecipeError(f"the sources have runs of different lengths ({said}); make them equal", *place)


def check_names(recipe: "Recipe") -> None:
    """Each parameter is one that the method has, at a level where it can vary."""
    known = parameters_of(recipe.row)
    for place, block in placed_blocks(recipe):
        levels = ("expert",) if "sources" in place[:-1] or "models" in place[:-1] else ("expert", "tensor")
        for name, value in block.items():
            if name not in known:
                if mergekits(name):
                    continue  # which lets a method ignore what others use
                users = ", ".join(users_of(name))
                mend = nearest(name, known)
                raise RecipeError(f"{recipe.merge_method} does not use it, {users} do; {mend}", *place, name)
            parameter = known[name]
            if place != ("parameters",) and parameter.level not in levels:
                raise RecipeError("it is set for the whole merge; move it to the recipe's parameters", *place, name)
            if parameter.only and value != parameter.default:
                raise RecipeError(parameter.only.format(method=recipe.merge_method), *place, name)


def check_base(recipe: "Recipe") -> None:
    """The base is named where something needs it."""
    if recipe.uses_base and any(section.base is None for section in recipe.every_section):
        raise RecipeError(f"missing, and {recipe.merge_method} works on differences from it; name it", "base_model")
    if recipe.tokenizer_source == "base" and recipe.base_model is None:
        raise RecipeError("'base' needs a base_model; name one, or write union or a model", "tokenizer_source")


def check_tokenizers(recipe: "Recipe") -> None:
    """Whatever is said of vocabularies is of models that are merged."""
    sections = recipe.every_section
    experts = [entry.model for section in sections for entry in section.experts]
    names = list(dict.fromkeys([*experts, *filter(None, [recipe.base_model, *(each.base for each in sections)])]))
    for i, name in enumerate(recipe.also_for):
        if name not in names:
            raise RecipeError(f"{name} is not one of the models; {nearest(name, names)}", "also_for", i)
    if recipe.also_for and recipe.tokenizer_source is None:
        raise RecipeError("needs one vocabulary for all; write tokenizer_source: union", "also_for")
    for token, told in (recipe.tokenizer.tokens if recipe.tokenizer is not None else {}).items():
        model = told.source.model
        if model is not None and model not in names:
            place = ("tokenizer", "tokens", token, "source")
            raise RecipeError(f"{model} is not one of the models; {nearest(model, names)}", *place)


def check_experts(recipe: "Recipe") -> None:
    """There are as many experts as the method merges, in every section."""
    for section in recipe.every_section:
        if _names_several(section):
            continue  # how many steps of a run there are is seen when it is opened
        if (wrong := _wrong_count(recipe, len(section.experts))) is not None:
            raise RecipeError(wrong, *section.place)


def _names_several(section: Section) -> bool:
    """Whether some model of a section is several steps of a run, as which it is read when it is opened."""
    return any(_SEVERAL.search(entry.model) for entry in section.experts)


def _wrong_count(recipe: "Recipe", count: int) -> str | None:
    """What to say of a number of experts that the method does not merge; None where it does."""
    fewest, most = recipe.row.experts
    if fewest == most and count != fewest:
        base = ", and base_model is one if given," if recipe.row.base == "first" else ","
        return f"{recipe.merge_method} merges {fewest} model{'' if fewest == 1 else 's'}{base} not {count}"
    if count < fewest:
        found = f"{count} expert{'' if count == 1 else 's'}" if count else "no expert"
        wanted = "one or more" if fewest == 1 else f"{fewest} or more"
        return f"{found}, and {recipe.merge_method} needs {wanted} (base_model is not one of them); add a model"
    if most is not None and count > most:
        return f"{recipe.merge_method} merges at most {most}, not {count}; remove some"
    return None


def check_mixup(recipe: "Recipe") -> None:
    """What is drawn is not also given."""
    if recipe.mixup is None:
        return
    if recipe.row.weighting == "none":
        raise RecipeError(f"draws weights, and {recipe.merge_method} takes none; remove it", "mixup")
    if not any(map(_names_several, recipe.every_section)):
        _check_counts(recipe, recipe.mixup)
    if recipe.mixup.smooth and recipe.mixup.granularity != "layer":
        raise RecipeError("is of neighbouring layers; write granularity: layer, or remove it", "mixup", "smooth")
    for place, block in placed_blocks(recipe):
        for drawn in weight_parameters(recipe.row):
            if drawn in block:
                raise RecipeError("given, but mixup draws it; remove this or mixup", *place, drawn)


def _check_counts(recipe: "Recipe", mixup: MixupSettings) -> None:
    """There are as many experts as weights, be they drawn or the outcome of earlier draws."""
    if len(recipe.counts) > 1:
        said = " and ".join(map(str, recipe.counts))
        raise RecipeError(f"draws weights for as many experts everywhere, and here are {said}; remove it", "mixup")
    if len(recipe.experts) < 2:
        raise RecipeError("draws how experts share, and there is one only; remove it or add a model", "mixup")
    if isinstance(mixup.alpha, tuple) and len(recipe.experts) != 2:
        raise RecipeError(f"a pair is for two experts, not {len(recipe.experts)}; write one number", "mixup", "alpha")
    if mixup.weights is None:
        return
    if mixup.granularity == "model" and [*mixup.weights] != ["model"]:
        raise RecipeError("one draw for the model has one group; write {model: [...]}", "mixup", "weights")
    count = 1 if recipe.row.weighting == "position" else len(recipe.experts)
    for group, weights in mixup.weights.items():
        if len(weights) != count:
            raise RecipeError(f"{len(weights)} are given where {count} are needed", "mixup", "weights", group)


def check_given(recipe: "Recipe") -> None:
    """What has no default is there for every tensor, given or drawn."""
    drawn = weight_parameters(recipe.row) if recipe.mixup is not None else []
    for parameter in recipe.row.parameters:
        name = parameter.name
        if parameter.default is not None or name in drawn:
            continue
        if not all(any(_covers(name, level) for level in section.levels) for section in recipe.every_section):
            raise RecipeError(
                f"{recipe.merge_method} needs it for every tensor; write a number, or end the filters with one",
                "parameters",
                name,
            )


def _covers(name: str, block: dict[str, Setting]) -> bool:
    return name in block and covers(block[name])


def check_sparsify(recipe: "Recipe") -> None:
    """There is one sparsification, and something for it to act on."""
    if recipe.sparsify is None:
        return
    if recipe.row.sparsifier is not None:
        mend = f"remove this or use merge_method {recipe.row.without}" if recipe.row.without else "remove this"
        raise RecipeError(f"{recipe.merge_method} sparsifies already; {mend}", "sparsify")
    if not recipe.row.sparsifies:
        raise RecipeError(
            f"{recipe.merge_method} cannot be combined with one; remove this, or use linear or task_arithmetic",
            "sparsify",
        )


def check_whole(recipe: "Recipe") -> None:
    """What one measurement of the whole model depends on is one number for each model."""
    for name, parameter in parameters_of(recipe.row).items():
        if parameter.whole is None or recipe.parameters.get(parameter.whole[0]) != parameter.whole[1]:
            continue
        for place, block in placed_blocks(recipe):
            by_layer = place[0] in ("slices", "modules") and len(recipe.every_section) > 1
            if name in block and (by_layer or not isinstance(block[name], float)):
                said = ": ".join(parameter.whole)
                raise RecipeError(f"{said} needs one number for the whole model; write one", *place, name)


def check_normalizer(recipe: "Recipe") -> None:
    """Weights that are divided by their sum have one."""
    flags = [p for p in recipe.row.parameters if p.kind == "flag"]
    switch = next((p for p in flags if "normalize" in (p.name, p.sets.removeprefix("method."))), None)
    names = weight_parameters(recipe.row)
    if switch is None or not recipe.flag(switch.name) or not names or recipe.mixup is not None:
        return
    for section in recipe.every_section:
        if _names_several(section):
            continue
        settings = [
            next(
                (level[name] for level in (entry.parameters, *section.levels) for name in names if name in level), None
            )
            for entry in section.experts
        ]
        weights = [weight for weight in settings if isinstance(weight, float)]
        if len(weights) == len(settings) and abs(sum(weights)) <= 1e-8 * sum(map(abs, weights)):
            raise RecipeError(
                f"the weights sum to 0 and cannot be normalized; change them or write '{switch.name}: false'",
                "parameters",
                switch.name,
            )


def check_schedule(recipe: "Recipe") -> None:
    """Steps of a run can share a weight."""
    if recipe.schedule is None:
        return
    if recipe.mixup is not None:
        raise RecipeError("gives the weights of steps, and mixup draws them; remove one of the two", "schedule")
    if recipe.row.weighting != "each" or not weight_parameters(recipe.row):
        raise RecipeError(f"weighs steps of runs, and {recipe.merge_method} has no weights; use linear", "schedule")


def check_seeds(recipe: "Recipe") -> None:
    """Several seeds are in the place of one, and give different merges."""
    if recipe.seeds is None:
        return
    if "seed" in recipe.model_fields_set:
        raise RecipeError("given together with seed; keep one of the two", "seeds")
    if not is_random(recipe):
        raise RecipeError(f"{same_for_all(recipe)}; write seed, or draw something", "seeds")


def is_random(recipe: "Recipe") -> bool:
    """Whether a merge may depend on its seed: weights are drawn, or entries are dropped at random."""
    drawn = recipe.mixup is not None and recipe.mixup.weights is None
    factory = recipe.row.sparsifier if recipe.sparsify is None else recipe.sparsify.row.sparsifier
    return drawn or (factory is not None and catalogue.may_be_random(factory))


def same_for_all(recipe: "Recipe") -> str:
    """What to say of a merge that does not depend on its seed."""
    return f"nothing of this {recipe.merge_method} is drawn (mixup, dare, della), so that all merges would be the same"


def check_statistics(recipe: "Recipe") -> None:
    """Each model has the statistics that the method asks for, and they fit it as it is read."""
    kind, method = recipe.row.statistics, recipe.merge_method
    entries = [((*place, *where), entry) for place, holder in _holders(recipe) for where, entry in entries_of(holder)]
    for place, entry in entries:
        if entry.statistics is not None and not kind:
            users = " and ".join(row.name for row in catalogue.rows() if isinstance(row, MethodRow) and row.statistics)
            raise RecipeError(f"{method} takes no statistics, as {users} do; remove it", *place, "statistics")
    if not kind:
        return
    if recipe.models is None:
        raise RecipeError(f"{method} merges whole models, whose statistics it needs; write models", *entries[0][0][:1])
    for place, entry in entries:
        if _SEVERAL.search(entry.model):
            raise RecipeError("are several steps, and statistics are of one; name each step", *place, "model")
        if entry.statistics is None:
            mend = f"write the output of m3jax statistics MODEL OUT --kind {kind}"
            raise RecipeError(
                f"missing, and {method} needs {kind} statistics of each model; {mend}", *place, "statistics"
            )
    for key in ("tokenizer_source", "tokenizer", "also_for"):
        if getattr(recipe, key):
            raise RecipeError(
                f"gives models other rows, of which there are no statistics; remove it, and give {method} models of "
                "one vocabulary",
                key,
            )


CHECKS = (
    check_models,
    check_schedule,
    check_slices,
    check_names,
    check_base,
    check_tokenizers,
    check_experts,
    check_statistics,
    check_mixup,
    check_given,
    check_sparsify,
    check_whole,
    check_normalizer,
    check_seeds,
)
