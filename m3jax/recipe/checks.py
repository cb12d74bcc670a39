"""What must hold between the keys of a recipe; each check raises a `RecipeError` at the place to mend."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from m3jax.recipe.settings import (
    MERGEKITS,
    PER_MODEL,
    PER_SLICE,
    Place,
    RecipeError,
    Setting,
    covers,
    known_parameters,
    nearest,
)

if TYPE_CHECKING:
    from m3jax.recipe import Recipe


def _blocks(recipe: "Recipe") -> Iterator[tuple[Place, dict[str, Setting]]]:
    """Every block of parameters in the recipe, with its place."""
    yield ("parameters",), recipe.parameters
    for i, entry in enumerate(recipe.models):
        yield ("models", i, "parameters"), entry.parameters
    for i, part in enumerate(recipe.slices or ()):
        yield ("slices", i, "parameters"), part.parameters
        for j, source in enumerate(part.sources):
            yield ("slices", i, "sources", j, "parameters"), source.parameters


def check_slices(recipe: "Recipe") -> None:
    """The slices tile whole models: the same ones, the same layers of each, in order, without gaps."""
    end = 0
    for i, part in enumerate(recipe.slices or ()):
        same = sorted(source.model for source in part.sources) == sorted(e.model for e in recipe.models)
        first, last = part.layers
        if not same or first != end or last <= first or any(s.layer_range != part.layers for s in part.sources):
            raise RecipeError(
                "the slices stack or shuffle layers, which is not merging; give every slice the same models"
                " with one layer_range for all of them, one slice after the other from layer 0",
                "slices",
                i,
            )
        end = last


def check_names(recipe: "Recipe") -> None:
    """Each parameter is one that the method has, at a level where it can vary."""
    known = known_parameters(recipe.merge_method)
    for place, block in _blocks(recipe):
        here = PER_MODEL if "sources" in place or "models" in place else PER_SLICE
        for name in block:
            if name not in known and name not in MERGEKITS:
                raise RecipeError(f"{recipe.merge_method} does not use it; {nearest(name, known)}", *place, name)
            if place != ("parameters",) and name not in here:
                raise RecipeError("it is set for the whole merge; move it to the recipe's parameters", *place, name)


def check_base(recipe: "Recipe") -> None:
    """The base is named where something needs it."""
    if recipe.uses_base and recipe.base_model is None:
        raise RecipeError(f"missing, and {recipe.merge_method} works on differences from it; name it", "base_model")
    if recipe.tokenizer_source == "base" and recipe.base_model is None:
        raise RecipeError("'base' needs a base_model; name one, or write union or a model", "tokenizer_source")


def check_experts(recipe: "Recipe") -> None:
    """There are enough experts to merge."""
    count = len(recipe.experts)
    if recipe.merge_method == "slerp" and count != 2:
        raise RecipeError(f"slerp joins two models, and base_model is one if given, not {count}", "models")
    if count < 2:
        found = "one expert only" if count else "no expert"
        raise RecipeError(
            f"{found}, and a merge needs two or more (base_model is not one of them); add a model", "models"
        )


def check_mixup(recipe: "Recipe") -> None:
    """What is drawn is not also given."""
    if recipe.mixup is None:
        return
    if isinstance(recipe.mixup.alpha, tuple) and len(recipe.experts) != 2:
        raise RecipeError(f"a pair is for two experts, not {len(recipe.experts)}; write one number", "mixup", "alpha")
    drawn = "t" if recipe.merge_method == "slerp" else "weight"
    for place, block in _blocks(recipe):
        if drawn in block:
            raise RecipeError("given, but mixup draws it; remove this or mixup", *place, drawn)


def check_slerp(recipe: "Recipe") -> None:
    """Slerp has its t for every tensor, given or drawn."""
    if recipe.merge_method != "slerp" or recipe.mixup is not None:
        return
    in_slices = recipe.slices and all(_covers_t(part.parameters) for part in recipe.slices)
    if not in_slices and not _covers_t(recipe.parameters):
        raise RecipeError(
            "slerp needs it for every tensor; write a number, or end the filters with one", "parameters", "t"
        )


def _covers_t(block: dict[str, Setting]) -> bool:
    return "t" in block and covers(block["t"])


def check_sparsify(recipe: "Recipe") -> None:
    """There is one sparsification, and something for it to act on."""
    if recipe.sparsify is None:
        return
    if recipe.merge_method.startswith("dare_"):
        plainer = {"dare_linear": "task_arithmetic", "dare_ties": "ties"}[recipe.merge_method]
        raise RecipeError(
            f"{recipe.merge_method} sparsifies already; remove this or use merge_method {plainer}", "sparsify"
        )
    if recipe.merge_method == "slerp" and recipe.sparsify.target == "delta":
        raise RecipeError("slerp has no task vectors; write 'target: weights'", "sparsify", "target")


def check_trim(recipe: "Recipe") -> None:
    """A model-wide trim has one density per model."""
    trim = {"ties": "density", "dare_ties": "trim_density"}.get(recipe.merge_method)
    if trim == "density" and recipe.flag("rescale"):
        raise RecipeError(
            "ties trims without rescaling; use sparsify with method magnitude and rescale: true instead",
            "parameters",
            "rescale",
        )
    if recipe.parameters.get("trim_scope") != "model":
        return
    for place, block in _blocks(recipe):
        by_layer = place[0] == "slices" and len(recipe.slices or ()) > 1
        if trim in block and (by_layer or not isinstance(block[trim], float)):
            raise RecipeError("trim_scope: model needs one number for the whole model; write one", *place, trim)


def check_normalizer(recipe: "Recipe") -> None:
    """Weights that are divided by their sum have one."""
    if not recipe.flag("normalize") or recipe.mixup is not None:
        return
    for part in recipe.slices or (None,):
        settings = [
            next(level["weight"] for level in recipe.levels(expert, part) if "weight" in level)
            for expert in recipe.experts
        ]
        weights = [weight for weight in settings if isinstance(weight, float)]
        if len(weights) == len(settings) and abs(sum(weights)) <= 1e-8 * sum(map(abs, weights)):
            raise RecipeError(
                "the weights sum to 0 and cannot be normalized; change them or write 'normalize: false'",
                "parameters",
                "normalize",
            )


CHECKS = (
    check_slices,
    check_names,
    check_base,
    check_experts,
    check_mixup,
    check_slerp,
    check_sparsify,
    check_trim,
    check_normalizer,
)
