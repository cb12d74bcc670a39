"""A recipe from its file, or from what a program says."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.errors import M3Error
from m3jax.recipe.checks import is_random, same_for_all
from m3jax.recipe.dialect import read_yaml, with_override
from m3jax.recipe.schema import Recipe
from m3jax.recipe.settings import RecipeError
from m3jax.recipe.values import read_seeds


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), seed: int | None = None
) -> Recipe:
    """Reads a recipe.

    Args:
      source: a YAML file's path, or a mapping such as a manifest holds.
      overrides: what `--set` says: "key=value" with a dotted key and a YAML value, the last one winning.
      seed: a seed that wins over the recipe's, in all of its documents.

    Returns:
      The recipe, checked.

    Raises:
      M3Error: the file cannot be read, or the recipe or an override is wrong.

    Example:
      >>> load_recipe({"merge_method": "linear", "models": ["a", "b"]}, ["mixup.alpha=0.5"], seed=7).seed
      7
    """
    origin = "recipe" if isinstance(source, Mapping) else os.fspath(source)
    if overrides or seed is not None:
        origin += " with the given changes"
    raw: object = source if isinstance(source, Mapping) else read_yaml(source)
    for override in overrides:
        raw = with_override(raw, override)
    if seed is not None and isinstance(raw, Mapping):
        raw = _with_seed(raw, seed)
    try:
        recipe = Recipe.model_validate(raw)
        json.dumps(recipe.resolved(), ensure_ascii=False).encode()
    except M3Error as error:
        raise M3Error(f"{origin}: {error}") from None
    except UnicodeEncodeError:
        raise M3Error(f"{origin}: holds half a character (a lone surrogate such as \\ud800): remove it") from None
    return recipe


def load_seeds(
    source: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    seeds: str | Sequence[int] | None = None,
) -> dict[int, Recipe]:
    """Reads the recipes of the merges that a recipe with `seeds` asks for.

    Args:
      source: as in `load_recipe`.
      overrides: as in `load_recipe`.
      seed: as in `load_recipe`; it wins over `seeds` in the recipe.
      seeds: several that win over those of the recipe, each in all of its documents, such as "0..31".

    Returns:
      For each seed the recipe with it alone; nothing where the recipe is of one merge.

    Raises:
      M3Error: as `load_recipe`, or the seeds are wrong, or all merges would be the same.
    """
    if seeds is None:
        loaded = source if isinstance(source, Recipe) else load_recipe(source, overrides, seed)
        return loaded.by_seed()
    if seed is not None:
        raise M3Error("--seeds: given together with --seed; keep one of the two")
    try:
        read = read_seeds(seeds)
        if isinstance(source, Recipe):
            found = {each: _seeded(source, each) for each in read}
        else:
            found = {each: load_recipe(source, overrides, each) for each in read}
        first = next(iter(found.values()))
        if not any(map(is_random, (first, *first.needed))):
            raise RecipeError(f"{same_for_all(first)}; give --seed")
    except RecipeError as fault:
        raise M3Error(f"--seeds: {fault}") from None
    return found


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    """A recipe with another seed, in all of its documents."""
    others = tuple(each.model_copy(update={"seed": seed}) for each in recipe.intermediates)
    return recipe.model_copy(update={"seed": seed, "seeds": None, "intermediates": others})


def _with_seed(raw: Mapping[str, Any], seed: int) -> dict[str, Any]:
    others = raw.get("intermediates")
    found = {**{key: value for key, value in raw.items() if key != "seeds"}, "seed": seed}
    if isinstance(others, list | tuple):
        found["intermediates"] = [{**each, "seed": seed} if isinstance(each, Mapping) else each for each in others]
    return found
